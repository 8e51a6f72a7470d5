"""Imported features with planted mistakes: each is named. Networks are timm's, with seeded random weights.

The features are computed here with OpenSlide, NumPy and the bare network: nothing of G2L's rendering or preprocessing.
"""

import cv2
import numpy as np
import openslide
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from g2l_core.encoders.loading import build_network
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.extraction.import_features import UNPROVED, ImportSettings, import_features
from g2l_core.store.features import FeatureStore
from pipeline.cli.main import app
from pipeline.recompute import recompute
from tests.extraction.test_import import plain

NAME, SIDE, SLIDE = "timm:vit_tiny_patch16_224.augreg_in21k@64", 64, "p01-1"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def spec():
    return resolve_encoder(NAME, weights="random:3")


@pytest.fixture(scope="module")
def network(spec):
    network = build_network(spec).eval()
    with torch.no_grad():  # timm's own scale of .02 makes features that hardly depend on the image
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return network


@pytest.fixture(scope="module")
def corners():
    return np.stack(np.divmod(np.arange(100), 10)[::-1], axis=1) * 2 * SIDE + 128


@pytest.fixture(scope="module")
def slide(cohort):
    with openslide.OpenSlide(cohort.parent / f"slides/{SLIDE}.tiff") as slide:
        yield slide


def pixels(slide, corners, *, side=SIDE, shift=0):
    found = []
    for x, y in (corners + shift).tolist():
        region = np.asarray(slide.read_region((x, y), 0, (side, side)).convert("RGB"))
        found.append(
            cv2.resize(region, (SIDE, SIDE), interpolation=cv2.INTER_AREA if side > SIDE else cv2.INTER_LINEAR)
        )
    return np.stack(found)


def encoded(network, images, *, mean=(0.5,) * 3, std=(0.5,) * 3, pooling="cls", dtype=None):
    batch = (images.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        tokens = network.forward_features(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()))
    tokens = tokens.float().numpy()
    return {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(axis=1)}[pooling]


@pytest.fixture
def proved(spec, network, corners, cohort, tmp_path, monkeypatch):
    """What `verify --recompute` finds of features that a test gives."""
    monkeypatch.setattr("g2l_core.encoders.loading.build_architecture", lambda *_: network)

    def prove(features, n=12, patch_px=SIDE):
        plain(tmp_path / "f", SLIDE, features, corners)
        settings = ImportSettings(mpp=0.5, patch_px=patch_px, slides=cohort.parent / "slides")
        done = import_features("plain", tmp_path / "f", tmp_path / "i.zarr", NAME, spec, settings)
        assert (done.failed, done.with_slides) == ({}, 1)
        (found,) = recompute(FeatureStore.open(tmp_path / "i.zarr"), n, seed=1, device="cpu", batch_size=8)
        return found

    return prove


def test_sound_features_are_proved(proved, network, slide, corners):
    found = proved(encoded(network, pixels(slide, corners)))
    assert (found.agrees, found.problems, found.compared) == (True, (), 12)
    assert found.min_cosine > 0.99999
    assert found.verdict.startswith(
        "scale, offset, crop, channels, normalization, pooling and feature length agree, precision fp32: of 12 patches"
    )


def test_features_of_another_precision_agree_and_it_is_named(proved, network, slide, corners):
    found = proved(encoded(network, pixels(slide, corners), dtype=torch.bfloat16))
    assert found.agrees
    assert "agree, precision bf16" in found.verdict


MISTAKES = {
    "um/px off by 2": lambda n, s, c: encoded(n, pixels(s, c, side=2 * SIDE)),
    "patches of half the side": lambda n, s, c: encoded(n, pixels(s, c, side=SIDE // 2)),
    "half a side away: centers were taken for corners": lambda n, s, c: encoded(n, pixels(s, c, shift=-SIDE // 2)),
    "half a side away: corners were taken for centers": lambda n, s, c: encoded(n, pixels(s, c, shift=SIDE // 2)),
    "channels in the order blue, green, red": lambda n, s, c: encoded(n, pixels(s, c)[..., ::-1]),
    "standard deviation (ImageNet's) than the encoder's own": lambda n, s, c: encoded(
        n, pixels(s, c), mean=IMAGENET[0], std=IMAGENET[1]
    ),
    "pooling mean (the mean of the patch tokens), not native": lambda n, s, c: encoded(n, pixels(s, c), pooling="mean"),
    "features divided by their length": lambda n, s, c: (
        lambda f: f / np.linalg.norm(f, axis=1, keepdims=True)
    )(encoded(n, pixels(s, c))),
    "the features stand in another order than the coordinates": lambda n, s, c: encoded(n, pixels(s, c))[::-1].copy(),
}  # fmt: skip


@pytest.mark.parametrize("cause", MISTAKES)
def test_a_planted_mistake_is_named(proved, network, slide, corners, cause):
    found = proved(MISTAKES[cause](network, slide, corners))
    assert not found.agrees
    (problem,) = found.problems
    assert problem.kind == "unproved"
    assert "likeliest cause: " in found.verdict
    assert cause in found.verdict.partition("likeliest cause: ")[2]


def larger(slide, corners):
    """Patches of 96 px, which the network wants as 64 px."""
    regions = [np.asarray(slide.read_region((x, y), 0, (96, 96)).convert("RGB")) for x, y in corners.tolist()]
    return np.stack(regions)


def resized(images, method):
    return np.stack([np.asarray(Image.fromarray(image).resize((SIDE, SIDE), method)) for image in images])


@pytest.mark.parametrize("method", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_resizing(proved, network, slide, corners, method):
    found = proved(encoded(network, resized(larger(slide, corners), method)), patch_px=96)
    assert found.agrees == (method == Image.Resampling.BICUBIC)
    assert found.agrees or "likeliest cause: bilinear resizing, not bicubic" in found.verdict


def test_another_crop(proved, network, slide, corners):
    found = proved(encoded(network, larger(slide, corners)[:, 16:80, 16:80]), patch_px=96)
    assert "likeliest cause: the center crop of 64 px, not the whole patch of 96 px" in found.verdict


def test_two_mistakes_at_once(proved, network, slide, corners):
    found = proved(encoded(network, pixels(slide, corners)[..., ::-1], mean=IMAGENET[0], std=IMAGENET[1]))
    told = found.verdict.partition("likeliest cause: ")[2]
    assert "blue, green, red" in told
    assert "ImageNet's" in told


def test_features_of_nothing_known(proved):
    found = proved(np.random.default_rng(0).normal(size=(100, 192)).astype(np.float32))
    assert not found.agrees
    assert "no candidate explains it" in found.verdict


def test_the_command_keeps_what_it_has_found(proved, network, slide, corners, tmp_path):
    proved(encoded(network, pixels(slide, corners)))
    out = str(tmp_path / "i.zarr")
    (key,) = FeatureStore.open(out).encoders
    assert FeatureStore.open(out).encoders[key].weights_notes == (UNPROVED,)
    done = CliRunner().invoke(app, ["store", "verify", out, "--recompute", "6"])
    assert done.exit_code == 0, done.output
    facts = FeatureStore.open(out).encoders[key]
    assert facts.weights_notes == ()
    assert "agree, precision fp32: of 6 patches" in facts.proof
    assert "feature length agree" in CliRunner().invoke(app, ["store", "info", out]).stdout


def test_the_command_says_what_differs_and_repairs_nothing(proved, network, slide, corners, tmp_path):
    proved(encoded(network, pixels(slide, corners)[..., ::-1]))
    out = str(tmp_path / "i.zarr")
    done = CliRunner().invoke(app, ["store", "verify", out, "--recompute", "6", "--repair"])
    assert "likeliest cause: channels in the order blue, green, red" in done.stdout
    opened = FeatureStore.open(out)
    assert opened.slide(SLIDE).encoder_keys == list(opened.encoders)
    (facts,) = opened.encoders.values()
    assert facts.weights_notes[0].startswith("imported: it is not what the encoder gives")
    assert CliRunner().invoke(app, ["store", "verify", out, "--recompute", "6"]).exit_code == 1


def test_without_slides_nothing_is_proved_and_nothing_is_wrong(spec, corners, tmp_path):
    plain(tmp_path / "f", SLIDE, np.ones((100, 192), np.float32), corners)
    settings = ImportSettings(mpp=0.5, patch_px=SIDE, mpp_override=0.5)
    import_features("plain", tmp_path / "f", tmp_path / "i.zarr", NAME, spec, settings)
    done = CliRunner().invoke(app, ["store", "verify", str(tmp_path / "i.zarr"), "--recompute", "6"])
    assert done.exit_code == 0
    assert "cannot be proved: g2l store import with --slides FOLDER" in done.stdout


def test_an_exported_store_proves_itself_and_can_be_embedded_into(cohort, cached_store, tmp_path):
    from g2l_core.store.export import export_features

    run, out, name = CliRunner(), str(tmp_path / "i.zarr"), "timm:mobilenetv3_small_050@64"
    export_features(FeatureStore.open(cached_store), tmp_path / "job", "stamp-h5")
    source = next(path for path in (tmp_path / "job").iterdir() if path.name.startswith("timm"))
    options = ["--encoder", name, "--weights", "random:0", "--store", out]
    done = run.invoke(app, ["store", "import", "stamp-h5", str(source), *options, "--slides", str(cohort.parent)])
    assert done.exit_code == 0, done.output
    assert (
        "175 patches of 6 slides imported as timm-mobilenetv3_small_050-64-imported; 6 slides are at hand"
        in done.stdout
    )
    done = run.invoke(app, ["store", "verify", out, "--recompute", "10"])
    assert done.exit_code == 0, done.output
    assert (
        "feature length agree, precision fp32: of 10 patches encoded again, the lowest cosine is 1.000" in done.stdout
    )
    done = run.invoke(app, ["embed", str(cohort), "--store", out, *options[:4], "--device", "cpu"])
    assert done.exit_code == 0, done.output
    for slide in FeatureStore.open(out).slides():
        imported, own = slide.encoder_keys
        assert imported.endswith("imported")
        assert slide.pixel_hash.all()
        difference = slide.features(imported).astype(np.float32) - slide.features(own)
        assert np.abs(difference).max() < 0.01
    assert run.invoke(app, ["store", "verify", out, "--recompute", "3"]).exit_code == 0
