"""From a run to another machine: exports judged on a store, embedding with a runtime, measuring, and the doctor."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from g2l_core.distillation.replay import count_rows
from g2l_core.encoders.loading import load_encoder
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.errors import EncoderError, UsageError
from g2l_core.store.features import FeatureStore
from g2l_core.synthetic.cohort import label_patches
from pipeline import doctor
from pipeline.bench import encoder_summary
from pipeline.doctor import ADVICE, BROKEN, OK, UNCHECKED, examine, findings_text, is_broken
from pipeline.energy import EnergyMeter
from pipeline.export_student import GateSettings, linear_classifier, read_patches, run_export
from pipeline.fit_head import run_fit_head
from pipeline.measure import Cost, Measured, MeasureSettings, measure_rows, measure_text, run_measure
from pipeline.predict import run_predict
from pipeline.settings import ExtractionSettings
from pipeline.split import split_store
from tests.encoders.test_weights import closed_port, hub, settings_of_a_hub  # noqa: F401  hub is a fixture
from tests.faults.small_run import settings
from tests.small_student import make_run, tiny_vit

needs_onnx = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnxscript") is None, reason="the extra onnx is not installed"
)

TASKS = """
[tasks.tissue]
labels = "labels.csv"
label = "tissue"
metrics = ["probe"]
probe_c = [0.1]
folds = 2
"""


def g2l(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(cohort, cached_store, tmp_path_factory):
    """A store of six slides, a run that was trained on the first two of them, and a task with planted classes."""
    folder = tmp_path_factory.mktemp("deploy")
    store = shutil.copytree(cached_store, folder / "s.zarr")
    slides = [slide.slide_id for slide in FeatureStore.open(store).slides()]
    make_run(folder / "run", tiny_vit(folder), train=[*slides[:2], "elsewhere"], held_out=slides[2:3])
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide_id", "x", "y", "tissue"])
        for slide in FeatureStore.open(store).slides():
            truth, side = cohort.parent / f"truth/{slide.slide_id}.classes.png", slide.facts.patch_px_level0
            names = label_patches(truth, slide.coords, side, slide.facts.level0_size)
            table.writerows(
                [slide.slide_id, x, y, name] for (x, y), name in zip(slide.coords.tolist(), names, strict=True)
            )
    (folder / "tasks.toml").write_text(TASKS)
    return folder


# ---- judged on a store ----------------------------------------------------------------------------------------


def test_patches_of_slides_that_were_trained_on_judge_nothing(study):
    store = FeatureStore.open(study / "s.zarr")
    slides = [slide.slide_id for slide in store.slides()]
    found = read_patches(study / "run", None, GateSettings(store=study / "s.zarr"), calibrate=True)
    assert set(found.slides) == set(slides[2:])
    assert len(found.pixels) == sum(len(store.slide(i)) for i in slides[2:])
    assert len(found.calibration) == sum(len(store.slide(i)) for i in slides[:2])
    alone = make_run(study / "alone", tiny_vit(study), train=[*slides, "elsewhere"], held_out=[])
    with pytest.raises(UsageError, match="the student was trained on every slide in it"):
        read_patches(alone, None, GateSettings(store=study / "s.zarr"), calibrate=True)


def test_in_the_store_of_the_run_its_own_split_judges(study):
    store, chosen = FeatureStore.open(study / "s.zarr"), settings()
    split = split_store(store, (), chosen.hold_out, chosen.train.seed)
    counts = {"train": count_rows(store, split.train), "held_out": count_rows(store, split.held_out)}
    own = make_run(study / "own", tiny_vit(study), **counts)
    found = read_patches(own, None, GateSettings(store=study / "s.zarr"), calibrate=False)
    assert found.origin == "held out by the run: some"
    assert set(found.slides) == set(split.held_out)


def test_another_cohort_with_the_same_names_is_not_the_store_of_the_run(study):
    """Slides of the same names, but not as many patches: the named ones judge nothing."""
    store, chosen = FeatureStore.open(study / "s.zarr"), settings()
    split = split_store(store, (), chosen.hold_out, chosen.train.seed)
    counts = {"train": dict.fromkeys(split.train, 999), "held_out": dict.fromkeys(split.held_out, 999)}
    other = make_run(study / "namesake", tiny_vit(study), **counts)
    found = read_patches(other, None, GateSettings(store=study / "s.zarr"), calibrate=False)
    assert found.origin == "slides that were not trained on"
    assert set(found.slides) == set(split.held_out)


def test_another_cohort_calibrates_with_slides_that_judge_nothing(study):
    other = make_run(study / "other", tiny_vit(study), train=["x"], held_out=["y"])
    found = read_patches(other, None, GateSettings(store=study / "s.zarr"), calibrate=True)
    pixels = {patch.tobytes() for patch in found.pixels}
    assert len(found.calibration)
    assert not any(patch.tobytes() in pixels for patch in found.calibration)


@pytest.fixture(scope="module")
def exported(study):
    settings = GateSettings(store=study / "s.zarr", tasks=study / "tasks.toml")
    return run_export(study / "run", "onnx", study / "run-onnx", settings)


@needs_onnx
def test_an_export_that_is_judged_on_a_store_and_by_a_probe(exported, study):
    found = exported.agreement
    assert found is not None
    assert found.min_cosine > 0.9999
    assert found.slides == 4
    assert found.probe is not None
    assert 0.3 < found.probe.student <= 1
    assert found.probe.exported == pytest.approx(found.probe.student, abs=0.01)
    record = json.loads((study / "run-onnx" / "export.json").read_text())
    assert record["gate"]["probe"]["task"] == "tissue"


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        ("onnx", {"tasks": Path("tasks.toml")}, "--tasks needs --store"),
        ("timm", {"store": Path("s.zarr")}, "copy of the student, bit for bit"),
        ("onnx-int8", {}, "give --store"),
    ],
)
def test_what_cannot_be_judged(study, form, settings, message):
    settings = {name: study / path for name, path in settings.items()}
    with pytest.raises(UsageError, match=message):
        run_export(study / "run", form, study / "no", GateSettings(**settings))
    assert not (study / "no").exists()


# ---- runtimes in stage one --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(exported, cohort, study):
    """The student's features in torch and in ONNX Runtime, and what a second call with it says."""
    common = ("embed", cohort, "--store", study / "s.zarr", "--encoder", study / "run", "--json")
    done = [g2l(*common), g2l(*common, "--runtime", "onnx"), g2l(*common, "--runtime", "onnx")]
    assert [run.returncode for run in done] == [0, 0, 0], done[1].stderr
    return [json.loads(run.stdout) for run in done]


@needs_onnx
def test_embed_with_a_runtime(embedded, study):
    """Its features are the student's to float16, under a digest of their own; a second call encodes nothing."""
    torchs, runtimes, again = embedded
    assert runtimes["encoded"] == torchs["encoded"] > 0
    assert again["encoded"] == 0
    store = FeatureStore.open(study / "s.zarr")
    (key,), (other,) = torchs["encoders"], runtimes["encoders"]
    assert store.encoders[key].digest != store.encoders[other].digest
    assert store.encoders[other].extra["runtime"]["name"] == "onnx"
    assert store.encoders[other].extra["runtime"]["student_digest"] == store.encoders[key].digest
    for slide in store.slides():
        np.testing.assert_allclose(
            slide.features(other).astype(float), slide.features(key).astype(float), rtol=2e-3, atol=2e-3
        )
    verified = g2l("store", "verify", study / "s.zarr", "--recompute", "8")
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_runtime_without_an_export_is_refused(study):
    bare = make_run(study / "bare", tiny_vit(study))
    done = g2l("embed", study, "--store", study / "s.zarr", "--encoder", bare, "--runtime", "openvino")
    assert done.returncode == 2
    assert "g2l export-student" in done.stderr
    assert "--format openvino" in done.stderr


@needs_onnx
def test_predict_with_a_runtime(embedded, cohort, study, tmp_path):
    """An export of the head's own student answers as the student does; that of another one is refused."""
    head = study / "answers"
    run_fit_head(study / "tasks.toml", "tissue", [study / "s.zarr"], str(study / "run"), head)
    shutil.copytree(study / "run-onnx", study / "answers-onnx")
    settings = ExtractionSettings(batch_size=16, pictures=False)
    found = {}
    for runtime in ("torch", "onnx"):
        summary = run_predict(
            [cohort],
            head,
            tmp_path / runtime,
            replace(settings, runtime=runtime),
            store=study / "s.zarr",
            pictures=False,
        )
        found[runtime] = [[float(value) for name, value in row.items() if name[:2] == "p("] for row in summary.rows]
    np.testing.assert_allclose(found["onnx"], found["torch"], atol=2e-3)
    other = make_run(tmp_path / "run", replace(tiny_vit(tmp_path), weights="random:2"))
    shutil.rmtree(head / "student")
    shutil.copytree(other / "student", head / "student")
    with pytest.raises(EncoderError, match="was exported from another student"):
        run_predict([cohort], head, tmp_path / "no", replace(settings, runtime="onnx"))


# ---- heads for WSInfer ------------------------------------------------------------------------------------------


def test_a_head_as_one_linear_layer(study):
    """Scaling, probe and temperature in one layer give the head's own probabilities."""
    key = next(iter(FeatureStore.open(study / "s.zarr").encoders))
    head = run_fit_head(study / "tasks.toml", "tissue", [study / "s.zarr"], key, study / "head")
    features = next(iter(FeatureStore.open(study / "s.zarr").slides())).features(key).astype(np.float32)
    linear = linear_classifier(head)
    logits = features.astype(np.float64) @ linear.weights.T + linear.bias
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(chances, head.apply(features).patches, atol=1e-4)
    assert (linear.classes, linear.mpp, linear.patch_px) == (head.facts.classes, 0.5, 224)


# ---- measuring --------------------------------------------------------------------------------------------------


@needs_onnx
def test_measuring_a_student(exported, study):
    settings = MeasureSettings(store=study / "s.zarr", patches=16, batch_size=8, threads=1)
    card = study / "run" / "student" / "README.md"
    before = card.read_text()
    found = run_measure(study / "run", settings, card=True)
    rows = {row.name: row for row in found.rows}
    assert rows["run"].runtime == "fp32, torch"
    assert rows["run-onnx"].runtime == "fp32+onnx"
    assert rows["run-onnx"].disk_bytes == (study / "run-onnx" / "model.onnx").stat().st_size
    assert any(name.startswith("teacher") for name in rows)
    assert bool(rows["run-openvino"].failed) == (find_spec("openvino") is None)
    for row in (row for row in found.rows if not row.failed):
        assert row.patches_per_s == pytest.approx(1e3 / row.patch_ms)
        assert 0 < row.start_s < row.first_slide_s
        assert 50e6 < row.memory_bytes < 4e9
        pace = row.patch_ms / 1e3 + found.read_ms / 1e3 / found.threads
        assert row.slides_per_h == pytest.approx(3600 / (found.patches_a_slide * pace))
    text = measure_text(found)
    assert "slides/h" in text
    assert "energy: " in text
    assert card.read_text().startswith(before.rstrip("\n"))
    assert card.read_text().count("## Speed") == 1
    facts = load_encoder(resolve_encoder(str(study / "run"))).facts
    said = encoder_summary("run", facts).speed
    assert f"{rows['run'].patches_per_s:,.3g} patches/s in fp32, torch" in said
    assert "fp32+onnx" in said
    assert encoder_summary("run", replace(facts, weights_digest="other")).speed == ""
    assert load_encoder(resolve_encoder(str(study / "run"))).dim == 48


def test_what_cannot_run_is_said_and_columns_without_values_are_left_out():
    rows = (
        Cost(name="a", runtime="fp32, torch", patch_ms=2.0, patches_per_s=500.0),
        Cost(name="b", runtime="", failed="gone"),
    )
    found = Measured(
        run="r",
        rows=rows,
        patches=3,
        pixels="random",
        threads=2,
        slides=0,
        patches_a_slide=None,
        read_ms=None,
        energy="no",
    )
    assert measure_rows(found) == (("encoder", "computes in", "patches/s"), [("a", "fp32, torch", "500")])
    assert "not measured  b: gone" in measure_text(found)


def zone(root, name, kind, count, top=1000):
    folder = root / name
    folder.mkdir(parents=True)
    for file, value in (("name", kind), ("energy_uj", count), ("max_energy_range_uj", top)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


def test_energy_of_packages_that_count_round(tmp_path):
    """Cores are in their package, and the platform counts everything: only packages are summed."""
    first, second = zone(tmp_path, "intel-rapl:0", "package-0", 990), zone(tmp_path, "intel-rapl:1", "package-1", 5)
    core, platform = zone(tmp_path, "intel-rapl:0:0", "core", 1), zone(tmp_path, "intel-rapl:2", "psys", 1)
    meter = EnergyMeter(tmp_path)
    for file, count in ((first, 9), (second, 25), (core, 900), (platform, 900)):
        file.write_text(str(count))
    assert meter.joules() == pytest.approx((20 + 20) / 1e6)  # 990 to 9 is 20 steps of a counter from 0 to 1000
    assert meter.words == "of 2 processor packages whole, by RAPL"


def test_energy_that_is_not_counted(tmp_path):
    assert EnergyMeter(tmp_path).joules() is None
    assert "no counter" in EnergyMeter(tmp_path).words
    zone(tmp_path, "intel-rapl:0", "package-0", "broken")
    assert EnergyMeter(tmp_path).joules() is None
    assert "cannot be read" in EnergyMeter(tmp_path).words


# ---- the doctor -------------------------------------------------------------------------------------------------


def test_a_sound_machine_without_a_hub(tmp_path):
    home = settings_of_a_hub(tmp_path / "home", closed_port())
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "doctor", "--folder", str(tmp_path), "--json"],
        env=home, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    said = json.loads(done.stdout)
    assert not said["broken"]
    by_area = {}
    for finding in said["findings"]:
        by_area.setdefault(finding["area"], []).append(finding)
    assert set(by_area) == {"versions", "torch", "GPU", "slides", "hub", "disk", "memory", "self-test"}
    assert by_area["self-test"][0]["status"] == OK
    assert [f["status"] for f in by_area["hub"] if "access" in f["what"]] == [UNCHECKED]
    assert all(f["remedy"] for f in said["findings"] if f["status"] in {ADVICE, BROKEN})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".g2l-doctor")]


HUB = """
import json
from dataclasses import asdict
from g2l_core.encoders import registry
from pipeline.doctor import hub_access
print(json.dumps([asdict(finding) for finding in hub_access(ask=True)]))
"""


def test_login_and_gated_access(hub, tmp_path):  # noqa: F811
    """Every model is asked for; a refusal has the remedy, and what is open is said together."""
    hub.refused["/MahmoodLab/"] = (403, "GatedRepo")
    hub.files["/api/whoami-v2"] = b'{"name": "somebody", "type": "user"}'
    from g2l_core.encoders.registry import TABLE

    for spec in TABLE.values():
        if spec.source.kind == "hub":
            name = spec.source.file or "model.safetensors"
            hub.files[f"/{spec.source.where}/resolve/{spec.source.revision or 'main'}/{name}"] = b"x"
    home = settings_of_a_hub(tmp_path / "home", hub.url, HF_TOKEN="hf_x")
    done = subprocess.run(
        [sys.executable, "-c", HUB], env=home, capture_output=True, text=True, timeout=120, check=False
    )
    found = json.loads(done.stdout)
    whats = {finding["what"]: finding for finding in found}
    assert whats["logged in as somebody"]["status"] == OK
    gated = {what: finding for what, finding in whats.items() if "is gated" in what}
    assert {what.partition(":")[0] for what in gated} == {"uni", "uni2-h"}
    assert all(f["status"] == ADVICE and "Accept its license" in f["remedy"] for f in gated.values())
    (access,) = [what for what in whats if what.startswith("access to")]
    assert "h-optimus-0" in access


def test_what_breaks_is_named_and_the_rest_is_still_looked_at(tmp_path, monkeypatch):
    def broken():
        raise OSError("libopenslide.so.1: cannot open shared object file")
        yield

    monkeypatch.setattr(doctor, "slide_formats", broken)
    for name in ("self_test", "torch_build", "gpu", "versions"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    found = examine(tmp_path, hub=False)
    (named,) = [finding for finding in found if finding.status == BROKEN]
    assert "libopenslide" in named.what
    assert named.remedy
    assert is_broken(found)
    assert "memory" in {finding.area for finding in found}
    assert findings_text(found).endswith("1 broken")


@pytest.mark.parametrize(
    ("declared", "status", "what"),
    [
        (["numpy>=1"], OK, "1 packages fit"),
        (["numpy<1"], BROKEN, "numpy<1 (here: "),
        (["no-such-thing-of-g2l>=2"], BROKEN, "absent"),
        (['no-such-thing-of-g2l>=2; extra == "onnx"'], ADVICE, "exporting to and running ONNX"),
        (['no-such-thing-of-g2l>=2; extra == "docs"'], OK, "0 packages fit"),
        (['no-such-thing-of-g2l>=2; python_version < "3"'], OK, "0 packages fit"),
    ],
)
def test_versions_that_do_not_fit(monkeypatch, declared, status, what):
    monkeypatch.setattr(doctor, "requires", lambda _: declared)
    found = list(doctor.versions())[1:]
    assert {f.status for f in found} - {OK} == {status} - {OK}
    assert what in " ".join(finding.what for finding in found)


def test_the_exit_code_of_a_broken_machine():
    """It is 1, and what is broken is counted."""
    code = (
        "import pipeline.doctor as d, sys; from pathlib import Path;"
        "d.examine = lambda folder, hub: (d.Finding(area='disk', what='w', status=d.BROKEN, remedy='r'),);"
        "from pipeline.cli.main import main; sys.argv = ['g2l', 'doctor']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "1 broken"
