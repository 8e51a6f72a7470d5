"""Weights as people bring them: checkpoints of training, shards, folders, adapters; sizes and features that lose."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from g2l_core.benchmark.evaluate import BenchSpec, evaluate_task
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.encoders.loading import build_network, encode, load_encoder, stored_facts, stored_key
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.encoders.weights import require_weights, weights_content
from g2l_core.errors import EncoderError, UsageError
from g2l_core.extraction.batching import MIN_DIFFERENT, describe_sameness
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.store.features import FeatureStore
from g2l_core.store.schema import STATUS
from g2l_core.store.writer import SMALLEST, FeatureWriter
from pipeline.cache_teacher import run_extraction
from pipeline.extract import ExtractionSettings
from tests.encoders.test_loading import VIT
from tests.store import toy


def state(seed: int) -> dict[str, torch.Tensor]:
    return build_network(replace(VIT, weights=f"random:{seed}")).state_dict()


def named(tensors, prefix):
    return {prefix + key: tensor for key, tensor in tensors.items()}


def digest(weights) -> str:
    return load_encoder(replace(VIT, weights=f"file:{weights}")).weights_digest


ONE, OTHER = state(1), state(2)
DIGEST = load_encoder(replace(VIT, weights="random:1")).weights_digest


def saved(folder: Path, content, name: str = "w.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


# ---- several networks in one file ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema", "module_ema", "ema_state_dict"])
@pytest.mark.parametrize("plain", ["state_dict", "model"])
def test_averaged_weights_are_taken_before_those_of_the_last_step(tmp_path, caplog, key, plain):
    content = {plain: OTHER, key: named(ONE, "module."), "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    path = saved(
        tmp_path, {**content, "metric": np.float64(0.5), "optimizer": {"state": {0: {"step": ONE["cls_token"]}}}}
    )
    encoder = load_encoder(replace(VIT, weights=f"file:{path}"))
    assert encoder.weights_digest == DIGEST
    note = f"the network '{key}' of its weights file is taken, not '{plain}'"
    assert encoder.notes == (note,)
    assert [record.getMessage() for record in caplog.records] == [f"tiny-vit: {note} ({path})"]
    assert digest(f"{path}#{plain}") != DIGEST == digest(f"{path}#{key}")


def test_averaged_weights_that_do_not_fit_are_not_passed_over(tmp_path):
    path = saved(tmp_path, {"state_dict": ONE, "state_dict_ema": {"shadow": torch.zeros(2)}})
    with pytest.raises(EncoderError, match=rf"do not fit .*'state_dict_ema' of .*--weights {path}#state_dict takes"):
        digest(path)
    assert digest(f"{path}#state_dict") == DIGEST
    assert digest(saved(tmp_path, {"state_dict": ONE, "state_dict_ema": None})) == DIGEST  # as timm writes it without


TWO_NETWORKS = {
    "DINO": ({"student": named(OTHER, "module.backbone."), "teacher": named(ONE, "backbone."), "epoch": 1}, "teacher"),
    "DINO with heads": (
        {
            "student": {**named(OTHER, "module.backbone."), "module.head.mlp.0.weight": torch.zeros(4, 48)},
            "teacher": {**named(ONE, "backbone."), "head.mlp.0.weight": torch.zeros(4, 48)},
            "dino_loss": {"center": torch.zeros(1, 9)},
            "args": argparse.Namespace(arch="vit"),
        },
        "teacher",
    ),
    "DINOv2": (
        {"model": {
            **named(OTHER, "student.backbone."), **named(ONE, "teacher.backbone."),
            "student.dino_head.mlp.0.weight": torch.zeros(3, 48), "teacher.dino_head.mlp.0.weight": torch.zeros(3, 48),
            "dino_loss.center": torch.zeros(1, 9),
        }, "iteration": 7},
        "teacher",
    ),
    "Lightning": (
        {"state_dict": {**named(OTHER, "model.student."), **named(ONE, "model.teacher.")}, "global_step": 5},
        "teacher",
    ),
    "MoCo": (
        {"state_dict": {
            **named(OTHER, "module.encoder_q."), **named(ONE, "module.encoder_k."), "module.queue": torch.zeros(2, 3),
        }},
        "encoder_k",
    ),
    "I-JEPA": (
        {"encoder": named(OTHER, "module."), "target_encoder": named(ONE, "module."),
         "predictor": {"module.norm.weight": torch.zeros(3)}},
        "target_encoder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TWO_NETWORKS)
def test_two_networks_that_fit_are_refused_unless_one_is_chosen(tmp_path, kind):
    content, wanted = TWO_NETWORKS[kind]
    path = saved(tmp_path, content)
    with pytest.raises(EncoderError, match=r"holds 2 networks that fit and differ: .*Choose one: --weights") as caught:
        digest(path)
    assert f"--weights {path}#{wanted}" in str(caught.value)
    assert digest(f"{path}#{wanted}") == DIGEST
    with pytest.raises(EncoderError, match=r"has no network 'teachers'; it holds \w+"):
        digest(f"{path}#teachers")


def test_the_only_network_that_fits_is_taken_and_two_equal_ones_are_one(tmp_path, caplog):
    smaller = {"norm.weight": torch.zeros(3)}
    assert digest(saved(tmp_path, {"student": smaller, "teacher": named(ONE, "backbone.")})) == DIGEST
    assert "the network 'teacher' of its weights file is taken, not 'student'" in caplog.text
    assert digest(saved(tmp_path, {"student": named(ONE, "module."), "teacher": ONE})) == DIGEST
    with pytest.raises(EncoderError, match=r"fit the architecture: .* \(the network 'student' of "):
        digest(saved(tmp_path, {"student": smaller, "teacher": {"a": torch.zeros(1)}}))


def test_the_key_that_was_found_is_named(tmp_path, caplog):
    assert digest(saved(tmp_path, {"model": {"state_dict": ONE}})) == DIGEST
    assert "the weights are those under 'state_dict' in" in caplog.text
    caplog.clear()
    assert digest(saved(tmp_path, ONE)) == DIGEST
    assert not caplog.records


def test_a_chosen_network_is_a_source_of_its_own(tmp_path):
    """The choice is kept with the encoder, found again without loading, and noted in the report."""
    path = saved(tmp_path, {"student": OTHER, "teacher": ONE})
    spec = resolve_encoder("timm:vit_small_patch14_reg4_dinov2", weights=f"{path}#teacher")
    assert (spec.weights, spec.source.where, spec.source.network) == (f"file:{path}#teacher", str(path), "teacher")
    with pytest.raises(UsageError, match="no such file .*absent.pth"):
        resolve_encoder("timm:vit_small_patch14_reg4_dinov2", weights=f"{tmp_path}/absent.pth#teacher")
    (tmp_path / "lab#2.pth").write_bytes(path.read_bytes())
    odd = resolve_encoder("timm:vit_small_patch14_reg4_dinov2", weights=f"{tmp_path}/lab#2.pth")
    assert odd.source.where.endswith("lab#2.pth")
    chosen = replace(VIT, weights=f"file:{path}#teacher")
    loaded = load_encoder(chosen)
    facts = {loaded.key: stored_facts(loaded)}
    assert stored_key(chosen, facts) == loaded.key
    assert stored_key(replace(chosen, weights=f"file:{path}#student"), facts) is None
    (tmp_path / "mine.toml").write_text(
        'architecture = "vit_small_patch14_reg4_dinov2"\nweights = "w.pth#teacher"\ninput_px = 56\n'
        "mean = [0.7, 0.6, 0.5]\nstd = [0.2, 0.25, 0.3]\n"
        "[arguments]\nimg_size = 56\ndepth = 2\nembed_dim = 48\nnum_heads = 3\n"
    )
    assert load_encoder(resolve_encoder(str(tmp_path / "mine.toml"), trusted=None)).weights_digest == DIGEST


def test_a_choice_is_noted_in_the_report(tmp_path):
    store = toy.create(tmp_path / "s.zarr")
    note = "the network 'ema' of its weights file is taken, not 'model'"
    store.add_encoder("other", replace(store.encoders[toy.ENCODER], weights_notes=(note,)))
    for i in range(4):
        slide = toy.lay(store, f"s{i}", n_views=1, labels={"patient_id": f"p{i}", "grade": "a"})
        toy.fill(slide, n_views=1)
        toy.fill(slide, n_views=1, encoder="other")
    task = TaskSpec(name="t", label="grade", folds=2, metrics=("knn",))
    outcome = evaluate_task([store], task, BenchSpec(encoders=(toy.ENCODER, "other"), draws=100), tmp_path)
    assert f"task t: other: {note}" in outcome.notes


# ---- names that wrappers of training put in ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"_fsdp_wrapped_module.{key}",
        lambda key: key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
        lambda key: key.replace(".attn.", ".attn._fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda key: f"_forward_module.model.{key}",
        lambda key: f"net.{key}",
        lambda key: f"teacher.backbone.{key}",
        lambda key: f"momentum_encoder.{key}",
    ],
)  # fmt: skip
def test_names_of_wrappers_are_stripped(tmp_path, rename):
    assert digest(saved(tmp_path, {rename(key): tensor for key, tensor in ONE.items()})) == DIGEST


def test_a_name_that_a_wrapper_doubles_is_refused(tmp_path):
    with pytest.raises(EncoderError, match=r"holds cls_token twice, once as _orig_mod.cls_token"):
        digest(saved(tmp_path, {**ONE, "_orig_mod.cls_token": OTHER["cls_token"]}))


class Compiled(nn.Module):
    """A network of a user's own whose names are those of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = nn.Linear(3, 4)
        self.mean, self.std, self.input_px = (0.5,) * 3, (0.5,) * 3, 16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._orig_mod(images.mean(dim=(2, 3)))


def test_a_network_that_has_such_names_itself_keeps_them(tmp_path):
    path = saved(tmp_path, Compiled().state_dict())
    spec = replace(VIT, architecture="tests.inputs.test_weights_inputs:Compiled", arguments={}, input_px=16)
    assert load_encoder(replace(spec, weights=f"file:{path}")).dim == 4


# ---- parts of networks, and files that are none -----------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.blocks.0.attn.qkv.lora_A.weight",
        "blocks.0.attn.qkv.lora_B.default.weight",
        "blocks.0.attn.qkv.base_layer.weight",
        "blocks.0.attn.qkv.hada_w1_a",
        "blocks.0.attn.qkv.ia3_l",
        "blocks.0.attn.qkv.lora_magnitude_vector",
    ],
)
def test_adapters_are_refused_by_name(tmp_path, key):
    for content in ({key: torch.zeros(2)}, {**ONE, key: torch.zeros(2)}, {"state_dict": {key: torch.zeros(2)}}):
        with pytest.raises(EncoderError, match="adapter of PEFT .*merge_and_unload.*Its first tensor is .*blocks.0"):
            digest(saved(tmp_path, content))


def test_folders_that_hold_no_whole_network(tmp_path):
    def refusal():
        with pytest.raises(EncoderError) as caught:
            resolve_encoder("timm:vit_small_patch14_reg4_dinov2", weights=str(tmp_path))
        return str(caught.value)

    assert f"{tmp_path} holds none; expected one weights file" in refusal()
    (tmp_path / ".metadata").touch()
    assert "is a distributed checkpoint of torch. Convert it" in refusal()
    (tmp_path / ".metadata").unlink()
    for name in ("a.pth", "b.safetensors"):
        (tmp_path / name).touch()
    assert "holds several: a.pth, b.safetensors" in refusal()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter of PEFT" in refusal()
    flat = saved(tmp_path, {"_fsdp_wrapped_module._flat_param": torch.zeros(9)}, "c.pth")
    with pytest.raises(EncoderError, match="flattened parameters of FSDP"):
        digest(flat)


class Settings:
    """What a training framework pickles beside its tensors."""


def test_what_could_run_code_is_named(tmp_path):
    with pytest.raises(EncoderError, match="its pickle holds tests.inputs.test_weights_inputs.Settings, which is more"):
        digest(saved(tmp_path, {"state_dict": ONE, "hyper_parameters": Settings()}))


# ---- shards and folders -----------------------------------------------------------------------------------------


def sharded(folder: Path, suffix: str) -> Path:
    """The network in three files with an index, as transformers writes it, and the index."""
    stem, save = {"safetensors": ("model", save_file), "bin": ("pytorch_model", torch.save)}[suffix]
    folder.mkdir(exist_ok=True)
    names, shards = {}, {}
    for i, (key, tensor) in enumerate(ONE.items()):
        names[key] = f"{stem}-{i % 3 + 1:05}-of-00003.{suffix}"
        shards.setdefault(names[key], {})[key] = tensor
    for name, tensors in shards.items():
        save(tensors, folder / name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_weights(tmp_path, suffix):
    index = sharded(tmp_path / "snapshot", suffix)
    assert digest(index) == digest(index.parent) == DIGEST
    spec = replace(VIT, weights=f"file:{index}")
    require_weights(spec)
    before = weights_content(spec)
    shard = index.parent / next(iter(json.loads(index.read_text())["weight_map"].values()))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert weights_content(spec) != before  # a shard counts, not the index alone
    shard.unlink()
    with pytest.raises(EncoderError, match=f"there is no weights file {shard}"):
        require_weights(spec)
    with pytest.raises(EncoderError, match=shard.name):
        digest(index)


def test_indexes_that_cannot_be_used(tmp_path):
    index = sharded(tmp_path, "safetensors")
    names = json.loads(index.read_text())["weight_map"]
    for content, message in (
        ("{", "is no index of weights"),
        ("[1]", "is no index of weights"),
        ('{"weight_map": {"a": 3}}', "is no index of weights"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "names '../secret.safetensors', which is no file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "which is no file beside it"),
        (json.dumps({"weight_map": {**names, "extra": names["norm.bias"]}}), "holds no extra, which"),
    ):
        index.write_text(content)
        with pytest.raises(EncoderError, match=message):
            digest(index)


def test_a_folder_of_a_hub_snapshot(tmp_path, caplog):
    """Its weights are found; preprocessing that its files name otherwise is noted, the encoder's own is used."""
    save_file(ONE, tmp_path / "model.safetensors")
    spec = resolve_encoder("timm:vit_small_patch14_reg4_dinov2", weights=str(tmp_path))
    assert spec.weights == f"file:{tmp_path / 'model.safetensors'}"
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": VIT.mean, "std": VIT.std}}))
    encoder = load_encoder(replace(VIT, weights=f"file:{tmp_path}"))
    assert (encoder.weights_digest, encoder.notes, caplog.text) == (DIGEST, (), "")
    (tmp_path / "config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.2, 0.25, 0.3]})
    )
    encoder = load_encoder(replace(VIT, weights=f"file:{tmp_path}"))
    assert encoder.notes == ("mean [0.7, 0.6, 0.5] is used, the files beside its weights say [0.5, 0.5, 0.5]",)


@pytest.mark.parametrize("name", ["checkpoint.pth", "weights.pt", "open_clip_pytorch_model.bin"])
def test_a_folder_of_one_weights_file(tmp_path, name):
    saved(tmp_path, ONE, name)
    (tmp_path / "README.md").touch()
    assert digest(tmp_path) == DIGEST


# ---- input sides -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("timm:vit_small_patch16_224@225", "224 and 240"),
        ("timm:vit_small_patch16_224@230", "224 and 240"),
        ("hibou-b@225", "224 and 238"),
        ("timm:vit_tiny_patch16_224@17", "16 and 32"),
        ("timm:swin_tiny_patch4_window7_224@225", "224 and 228"),
        ("timm:convnext_atto@230", "224 and 256"),
    ],
)
def test_sides_that_the_network_would_not_see_whole(name, sizes):
    with pytest.raises(UsageError, match=f"is no multiple of the network's .* px of each side .*sizes are {sizes}$"):
        load_encoder(resolve_encoder(name, weights="random:0"), device="cpu")


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050@65", "timm:resnet18@65", "timm:vit_tiny_patch16_224@240"])
def test_networks_that_see_every_pixel_of_such_a_side(name):
    encoder = load_encoder(resolve_encoder(name, weights="random:0"), device="cpu")
    blank = np.full((1, *[encoder.spec.input_px] * 2, 3), 128, np.uint8)
    changed = blank.copy()
    changed[:, -1, -1] = 255
    assert (encode(encoder, blank) != encode(encoder, changed)).any()


# ---- features that float16 cannot hold, or that say nothing ------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-9, 2e-8, 1e-6, 0.9 * SMALLEST])
def test_features_that_underflow_are_refused(tmp_path, scale):
    features = np.random.default_rng(0).uniform(0.5, 1, (20, toy.DIM)).astype(np.float32)
    features[7] *= scale
    slide = toy.lay(toy.create(tmp_path / "s.zarr"), "s", n_views=1)
    writer = FeatureWriter.open(slide, toy.ENCODER, digest="0" * 64, dim=toy.DIM, n_views=1)
    (shard,) = writer.missing([0])
    with pytest.raises(EncoderError, match=r"too small for float16 \(at most .* for row 7 at"):
        writer.write(shard, features, toy.hashes_of(20, 1)[:, 0], np.zeros(20, np.uint8))
    features[7] = 0  # of one patch, zeros are what the network says
    writer.write(shard, features, toy.hashes_of(20, 1)[:, 0], np.zeros(20, np.uint8))


def same(n=20, value=0.25, hashes=None, status=None):
    features = np.full((1, n, toy.DIM), value, np.float16)
    hashes = np.arange(1, n + 1, dtype=np.uint64) if hashes is None else hashes
    return describe_sameness(features, hashes[None], np.zeros(n, np.uint8) if status is None else status)


def test_features_that_are_the_same_for_different_pixels_are_refused():
    assert same() == same(value=-3.0) == "the same features for all 20 different views"
    assert same(value=0.0) == same(value=-0.0) == "zeros alone for all 20 different views"
    assert same(MIN_DIFFERENT)
    two_views = np.full((2, 4, toy.DIM), 1, np.float16), np.arange(8, dtype=np.uint64).reshape(2, 4)
    assert describe_sameness(*two_views, np.zeros(4, np.uint8))


def test_equal_patches_and_few_patches_may_have_the_same_features():
    few = MIN_DIFFERENT - 1
    assert not same(few)
    assert not same(hashes=(np.arange(20) % few).astype(np.uint64))
    assert not same(status=np.where(np.arange(20) < few, STATUS["ok"], STATUS["black"]).astype(np.uint8))
    assert not same(status=np.full(20, STATUS["unreadable"], np.uint8))
    one_differs = np.full((1, 20, toy.DIM), 1, np.float16)
    one_differs[0, 7, -1] = 2
    assert not describe_sameness(one_differs, np.arange(20, dtype=np.uint64)[None], np.zeros(20, np.uint8))


class OfScale(nn.Module):
    """A network whose features are as large as is wanted."""

    mean, std, input_px = (0.5,) * 3, (0.5,) * 3, 32

    def __init__(self, scale: float, offset: float) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * images.flatten(2).std(dim=2).repeat(1, 4) + self.offset


def tiny() -> OfScale:
    return OfScale(1e-9, 0.0)


def dead() -> OfScale:
    return OfScale(0.0, 0.0)


def stuck() -> OfScale:
    return OfScale(0.0, 2.5)


@pytest.mark.parametrize(
    ("network", "message"),
    [("tiny", "too small for float16"), ("dead", "gave zeros alone"), ("stuck", "gave the same features")],
)
def test_stage_one_stores_nothing_of_such_features(tmp_path, cohort, network, message):
    encoder = resolve_encoder(f"{__name__}:{network}")
    slides = sorted((cohort.parent / "slides").iterdir())[:2]
    settings = ExtractionSettings(batch_size=16, device="cpu")
    done = run_extraction(slides, tmp_path / "s.zarr", [encoder], GridSpec(), ViewSpec(), settings)
    assert len(done.failed_slides) == 2
    assert all(message in reason for reason in done.failed_slides.values())
    stored = list(FeatureStore.open(tmp_path / "s.zarr").slides())
    assert len(stored) == 2
    assert not any(slide.records(key) for slide in stored for key in slide.encoder_keys)
