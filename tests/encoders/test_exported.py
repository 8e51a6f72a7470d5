"""Exports: what passes the gate is the student, runs as an encoder of its own, and is refused once it has changed."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from g2l_core.encoders.conversion import LinearClassifier, open_torchscript
from g2l_core.encoders.exported import EXPORT_RECORD, export_encoder, with_runtime, write_export_record
from g2l_core.encoders.gate import Agreement, HeldOutPatches, ProbeLoss, compare, cosines
from g2l_core.encoders.loading import encode, encode_all, load_encoder, stored_facts, stored_key
from g2l_core.encoders.resolve import find_stored, resolve_encoder
from g2l_core.encoders.student_export import export_student
from g2l_core.errors import EncoderError, UnknownNameError, UsageError
from pipeline.distill import run_distill
from tests.faults.small_run import KEY, settings
from tests.small_student import make_run, tiny_vit

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra onnx)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (the extra onnx)")
openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed (the extra openvino)")


def drawn(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 56, 56, 3), dtype=np.uint8)


def patches(n=256, slides=4, **changes):
    """Random patches said to be of so many slides."""
    known = {"pixels": drawn(n), "slides": np.arange(n) % slides, "origin": "drawn", "calibration": drawn(32, 7)}
    return HeldOutPatches(**{**known, **changes})


# ---- the gate -------------------------------------------------------------------------------------------------


@given(arrays(np.float32, (4, 5), elements=st.floats(-9, 9, width=32)))
def test_cosines_are_those_of_scikit_learn(features):
    other = features[::-1] + 1
    found = cosines(features, other)
    wanted = np.diag(cosine_similarity(features.astype(np.float64), other.astype(np.float64)))
    zero = (np.linalg.norm(features, axis=1) == 0) | (np.linalg.norm(other, axis=1) == 0)
    assert (np.isnan(found) == zero).all()
    np.testing.assert_allclose(found[~zero], wanted[~zero], atol=1e-6)


def rotated(pixels, degrees):
    """Unit features in a plane, turned by an angle."""
    angle = pixels.reshape(len(pixels), -1).mean(axis=1) + np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


@pytest.mark.parametrize(("degrees", "passes"), [(0.0, True), (8.0, True), (8.2, False), (180.0, False)])
def test_the_gate_stands_at_a_cosine_of_099(degrees, passes):
    """The cosine of 8.11 degrees."""
    found = compare(patches(), lambda pixels: rotated(pixels, 0), lambda pixels: rotated(pixels, degrees))
    assert found.min_cosine == pytest.approx(np.cos(np.radians(degrees)), abs=1e-6)
    assert (found.patches, found.slides) == (256, 4)
    if passes:
        found.require_near("test")
        return
    with pytest.raises(EncoderError, match=r"test export is refused: on 256 patches of 4 slides .* at least 0\.99"):
        found.require_near("test")


def test_one_bad_patch_is_enough_to_refuse():
    def exported(pixels):
        features = rotated(pixels, 0)
        features[17] = 0
        return features

    with pytest.raises(EncoderError, match="cosine of nan at least"):
        compare(patches(), lambda pixels: rotated(pixels, 0), exported).require_near("test")


@pytest.mark.parametrize(("exported", "passes"), [(0.9, True), (0.891, True), (0.889, False), (np.nan, False)])
def test_the_gate_of_the_probe(exported, passes):
    probe = ProbeLoss(task="t", metric="balanced", patches=9, student=0.9, exported=exported)
    near = Agreement(
        patches=9, slides=3, origin="", min_cosine=1.0, median_cosine=1.0, min_centered_cosine=1.0, probe=probe
    )
    assert (near.refusal == "") == passes


def test_a_mean_that_all_patches_share_hides_nothing():
    """The cosine is 0.9998 and the gate open, but all that differs between patches is noise: that is said."""
    noise = np.random.default_rng(0).normal(size=(2, 256, 8)).astype(np.float32)
    found = compare(patches(), lambda _: 100 + noise[0], lambda _: 100 + noise[1])
    assert found.refusal == ""
    assert "judge it by a task" in found.doubt
    assert replace(found, min_centered_cosine=0.96).doubt == ""


@pytest.mark.parametrize(("n", "slides", "enough"), [(256, 3, True), (255, 3, False), (300, 2, False)])
def test_how_many_patches_are_enough(n, slides, enough):
    if enough:
        patches(n, slides).require_enough()
        return
    with pytest.raises(UsageError, match=f"at least 256 patches of 3 slides .* there are {n} of {slides}"):
        patches(n, slides).require_enough()


# ---- exports --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return make_run(folder / "run", tiny_vit(folder))


@pytest.fixture(scope="module")
def onnx(run):
    return export_student(run, "onnx", run.with_name("run-onnx"), held_out=patches())


@pytest.fixture(scope="module")
def student(run):
    return load_encoder(resolve_encoder(str(run)), device="cpu")


def test_an_exported_folder_is_an_encoder_of_its_own(run, onnx, student):
    spec = resolve_encoder(str(onnx.out))
    encoder = load_encoder(spec)
    assert (spec.name, encoder.precision, encoder.dim) == ("run-onnx", "fp32+onnx", student.dim)
    np.testing.assert_allclose(encode_all(encoder, drawn(7), 4), encode_all(student, drawn(7), 4), atol=1e-4)
    assert onnx.agreement is not None
    assert onnx.agreement.min_cosine > 0.99999
    assert encoder.digest != student.digest
    assert encoder.key != student.key
    facts = stored_facts(encoder)
    assert facts.extra["runtime"]["name"] == "onnx"
    assert facts.extra["runtime"]["student_digest"] == load_encoder(resolve_encoder(str(run))).digest
    assert facts.extra["runtime"]["gate"]["patches"] == 256
    stored = {encoder.key: facts, student.key: stored_facts(student)}
    assert stored_key(spec, stored) == encoder.key
    assert find_stored(str(onnx.out), stored) == encoder.key
    assert find_stored(str(run), stored) == student.key
    assert "have a cosine of 1.00000" in (onnx.out / "README.md").read_text()


def test_the_runtime_of_a_run_is_the_folder_beside_it(run, onnx):
    spec = resolve_encoder(str(run))
    assert with_runtime(spec, "auto") == with_runtime(spec, "torch") == spec
    assert with_runtime(spec, "onnx") == export_encoder(onnx.out)
    assert with_runtime(export_encoder(onnx.out), "onnx") == export_encoder(onnx.out)
    with pytest.raises(UsageError, match="no exported student .*run-openvino. Make it with g2l export-student"):
        with_runtime(spec, "openvino")
    with pytest.raises(UsageError, match="was exported for onnx"):
        with_runtime(export_encoder(onnx.out), "torch")
    with pytest.raises(UsageError, match="resnet18 is none"):
        with_runtime(resolve_encoder("timm:resnet18", weights="random:0"), "onnx")
    with pytest.raises(UnknownNameError, match="unknown runtime 'onx'. Did you mean onnx"):
        with_runtime(spec, "onx")


def test_an_export_of_another_student_is_no_runtime_of_this_one(run, onnx, tmp_path):
    other = make_run(tmp_path / "run", replace(tiny_vit(tmp_path), weights="random:2"))
    (tmp_path / "run-onnx").symlink_to(onnx.out)
    with pytest.raises(EncoderError, match="was exported from another student"):
        with_runtime(resolve_encoder(str(other)), "onnx")


def test_an_export_is_not_trained(onnx, cached_store, tmp_path):
    with pytest.raises(UsageError, match="is an export, which cannot be trained; give the run folder"):
        run_distill(cached_store, KEY, resolve_encoder(str(onnx.out)), tmp_path / "out", settings())
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32+compile"])
def test_precisions_of_torch_are_refused(onnx, precision):
    with pytest.raises(UsageError, match="computes in fp32 with onnxruntime"):
        load_encoder(resolve_encoder(str(onnx.out)), precision=precision)


def copied(folder, onnx):
    for file in onnx.out.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_changed_network_is_refused(onnx, tmp_path):
    network = copied(tmp_path, onnx) / "model.onnx"
    spec = resolve_encoder(str(tmp_path))
    content = bytearray(network.read_bytes())
    content[len(content) // 2] ^= 1
    network.write_bytes(content)
    with pytest.raises(EncoderError, match=r"model\.onnx is not what export\.json names"):
        load_encoder(spec)
    network.unlink()
    with pytest.raises(EncoderError, match=r"model\.onnx"):
        load_encoder(spec)


@pytest.mark.parametrize("change", [{"precision": "fp64"}, {"runtime": "tpu"}, {"files": {"../x": "0"}}, {"spec": {}}])
def test_a_changed_record_is_refused(onnx, tmp_path, change):
    record = copied(tmp_path, onnx) / EXPORT_RECORD
    record.write_text(json.dumps({**json.loads(record.read_text()), **change}))
    with pytest.raises(EncoderError, match="is no record of an export"):
        resolve_encoder(str(tmp_path))


def test_a_file_that_no_runtime_can_open_is_one_clear_line(run, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no network")
    facts = {"form": "onnx", "runtime": "onnx", "precision": "fp32", "batch": None, "student_digest": "",
             "student_weights_digest": "", "gate": None}  # fmt: skip
    write_export_record(tmp_path, resolve_encoder(str(run)), ("model.onnx",), facts)
    with pytest.raises(EncoderError, match="onnxruntime cannot open"):
        load_encoder(resolve_encoder(str(tmp_path)))


def test_8_bits_need_patches(run, tmp_path):
    with pytest.raises(UsageError, match="judged on held-out patches: give --store"):
        export_student(run, "onnx-int8", tmp_path / "out")
    with pytest.raises(UsageError, match="there are 255 of 4"):
        export_student(run, "onnx-int8-dynamic", tmp_path / "out", held_out=patches(255))
    with pytest.raises(UsageError, match="takes its scales from patches of further slides"):
        export_student(run, "onnx-int8", tmp_path / "out", held_out=patches(calibration=drawn(0)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "form"), [("onnxruntime", "onnx"), ("onnxscript", "onnx"), ("openvino", "openvino")]
)
def test_a_missing_package_names_the_extra(run, tmp_path, monkeypatch, package, form):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf'need {package}: pip install "g2l\[{form}\]"'):
        export_student(run, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def dynamic(run):
    return export_student(run, "onnx-int8-dynamic", run.with_name("run-onnx-int8-dynamic"), held_out=patches())


def test_dynamic_8_bits_pass_for_a_transformer(dynamic, onnx, student):
    assert dynamic.agreement is not None
    assert dynamic.agreement.min_cosine >= 0.99
    assert 0.99 <= dynamic.agreement.min_centered_cosine < 0.9999  # it is 8-bit indeed
    encoder = load_encoder(resolve_encoder(str(dynamic.out)))
    assert encoder.precision == "int8-dynamic+onnx"
    assert encoder.digest not in {student.digest, load_encoder(resolve_encoder(str(onnx.out))).digest}
    assert (dynamic.out / "model.onnx").stat().st_size < 0.5 * (onnx.out / "model.onnx").stat().st_size
    assert not (dynamic.out / "aside").exists()


@given(st.integers(0, 2**16), st.integers(2, 6))
def test_features_do_not_depend_on_the_neighbors_in_a_batch(dynamic_encoder, seed, n):
    """One scale for a whole batch would make them: a store would depend on where a run was interrupted."""
    pixels = drawn(n, seed)
    neighbors = np.concatenate([pixels[:1], 255 - pixels[1:] // 3])
    assert (encode(dynamic_encoder, pixels)[0] == encode(dynamic_encoder, neighbors)[0]).all()


@pytest.fixture(scope="module")
def dynamic_encoder(dynamic):
    return load_encoder(resolve_encoder(str(dynamic.out)))


@openvino
def test_openvino_gives_the_student_features(run, student, tmp_path):
    exported = export_student(run, "openvino", tmp_path / "ov", held_out=patches())
    encoder = load_encoder(resolve_encoder(str(exported.out)))
    assert encoder.precision == "fp32+openvino"
    for n in (1, 5):
        np.testing.assert_allclose(encode(encoder, drawn(n)), encode(student, drawn(n)), atol=1e-4)
    (exported.out / "model.bin").write_bytes(b"")
    with pytest.raises(EncoderError, match=r"model\.bin is not what export\.json names"):
        load_encoder(resolve_encoder(str(exported.out)))


@pytest.mark.slow
def test_a_convolutional_network_in_static_8_bits(tmp_path):
    """ResNets keep their features. Dynamic scales are for matrix products, of which it has none."""
    run = make_run(tmp_path / "run", resolve_encoder("timm:resnet10t@56", weights="random:0"))
    exported = export_student(run, "onnx-int8", tmp_path / "out", held_out=patches())
    assert exported.agreement is not None
    assert exported.agreement.min_cosine >= 0.99
    assert exported.agreement.min_centered_cosine < 0.9999
    assert load_encoder(resolve_encoder(str(exported.out))).precision == "int8+onnx"
    with pytest.raises(EncoderError, match="nothing of this network can be made 8-bit as onnx-int8-dynamic"):
        export_student(run, "onnx-int8-dynamic", tmp_path / "other", held_out=patches())
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_efficientnet_lite0_in_static_8_bits_is_refused(oscc_patches, crc_patches, tmp_path):
    """Real weights on real patches: its features are others, and nothing of it is kept."""
    run = make_run(tmp_path / "run", resolve_encoder("efficientnet-lite0@112"))
    folders = sorted(path for path in oscc_patches.glob("*/*") if path.is_dir())
    files = [file for folder in folders for file in sorted(folder.iterdir())[:80]]

    def read(paths):
        return np.stack([np.asarray(Image.open(path).convert("RGB").resize((112, 112))) for path in paths])

    held_out = HeldOutPatches(
        pixels=read(files),
        slides=np.array([file.parent.parent.name + file.parent.name for file in files]),
        origin="oral mucosa",
        calibration=read(sorted(crc_patches.iterdir())[:32]),
    )
    with pytest.raises(EncoderError, match=r"the onnx-int8 export is refused: on \d+ patches of 4 slides") as refusal:
        export_student(run, "onnx-int8", tmp_path / "out", held_out=held_out)
    assert "at least 0.99 is wanted of every patch" in str(refusal.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "out.partial"}
    assert not list((tmp_path / "out.partial").glob("student"))


# ---- classifiers ----------------------------------------------------------------------------------------------


def head(dim, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(3, dim)).astype(np.float32)
    return LinearClassifier(
        classes=("tumor", "stroma", "fat"), weights=weights, bias=np.float32([0.1, 0.0, -0.2]), mpp=0.5, patch_px=224
    )


def zoo_schema():
    """The schema in the package wsinfer_zoo, which makes a folder in the home when it is imported."""
    found = find_spec("wsinfer_zoo")
    if found is None:
        pytest.skip("wsinfer-zoo is not installed (the extra test)")
    return json.loads((Path(found.origin).parent / "schemas/model-config.schema.json").read_text())


def test_wsinfer_folder(run, student, tmp_path):
    """Its config is what the zoo's schema says, and its transform and softmax give the head's probabilities."""
    out = export_student(run, "wsinfer", tmp_path / "zoo", head=head(student.dim), held_out=patches()).out
    config = json.loads((out / "config.json").read_text())
    jsonschema.validate(config, zoo_schema())
    assert (config["num_classes"], config["spacing_um_px"], config["patch_size_pixels"]) == (3, 0.5, 224)
    from torchvision import transforms

    steps = [getattr(transforms, step["name"])(**step.get("arguments", {})) for step in config["transform"]]
    pixels = np.random.default_rng(1).integers(0, 256, (4, 224, 224, 3), dtype=np.uint8)
    images = torch.stack([transforms.Compose(steps)(Image.fromarray(patch)) for patch in pixels])
    with torch.inference_mode():
        found = open_torchscript(out / "torchscript_model.pt")(images).softmax(1).numpy()
    logits = encode(student, pixels) @ head(student.dim).weights.T + head(student.dim).bias
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=5e-3)


def test_wsinfer_needs_a_head_of_this_student(run, student, tmp_path):
    with pytest.raises(UsageError, match="give the folder of g2l fit-head"):
        export_student(run, "wsinfer", tmp_path / "x")
    with pytest.raises(EncoderError, match="the head takes 5 features, its student gives 48"):
        export_student(run, "wsinfer", tmp_path / "x", head=head(5))
    assert not (tmp_path / "x").exists()
