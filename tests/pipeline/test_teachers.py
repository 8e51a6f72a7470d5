"""Several teachers and nested widths end to end: the store's targets, resuming, sweeps, widths, terms, refusals."""

import csv
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from g2l_core.distillation.loader import Reading, ReplayDataset
from g2l_core.distillation.replay import ReplaySpec, good_rows
from g2l_core.distillation.target_statistics import FILE, read_statistics, target_statistics
from g2l_core.encoders.loading import encode_all, load_encoder
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.errors import G2LError, RunError, UnknownNameError, UsageError
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.store.documents import CHECKSUM, write_group
from g2l_core.store.features import FeatureStore
from pipeline.bench import run_bench
from pipeline.cache_teacher import run_extraction
from pipeline.cli.main import app
from pipeline.distill import DistillHow, run_distill
from pipeline.extract import ExtractionSettings
from pipeline.split import split_store
from pipeline.sweep import read_sweep, run_sweep
from pipeline.widths import with_all_widths
from tests.conftest import TEACHER
from tests.distillation.test_training import rows
from tests.pipeline.test_distill import settings, student, tensors

A, B, C = KEYS = (
    "timm-mobilenetv3_small_050-64-random0",
    "timm-vit_tiny_patch16_224-32-random0",
    "timm-vit_tiny_patch16_224-32-random1",
)
DIMS = (1024, 192, 192)


@pytest.fixture(scope="module")
def store(cached_store, cohort, tmp_path_factory):
    """The store of the others with two more teachers, of another width than the first."""
    path = Path(shutil.copytree(cached_store, tmp_path_factory.mktemp("teachers") / "store.zarr"))
    more = [resolve_encoder("timm:vit_tiny_patch16_224@32", weights=f"random:{seed}") for seed in (0, 1)]
    run_extraction([cohort], path, more, GridSpec(), ViewSpec(), ExtractionSettings(batch_size=16))
    assert tuple(FeatureStore.open(path).encoders) == KEYS
    return path


@pytest.fixture(scope="module")
def holey(store, tmp_path_factory):
    """That store, where one slide lacks the third teacher, and another is incomplete in one view of it."""
    path = Path(shutil.copytree(store, tmp_path_factory.mktemp("holey") / "store.zarr"))
    slides = FeatureStore.open(path, writable=True).slides()
    trained = sorted(split_store(FeatureStore.open(store), (), "0.34", 0).train)
    for slide in slides:
        if slide.slide_id == trained[0]:
            for shard in slide.shards([0, 1, 2]):
                slide.shard_path(C, shard).unlink()
        if slide.slide_id == trained[1]:
            slide.shard_path(C, slide.shards([2])[0]).unlink()
    return path


def distill(store, out, teachers=KEYS, **changes):
    how = DistillHow(workers=1, resume=changes.pop("resume", False), permissive=changes.pop("permissive", False))
    chosen = settings(**{"steps": 6, "validate_every": 6, **changes})
    return run_distill(store, list(teachers), student(), out, chosen, how=how)


# ---- what the loader gives --------------------------------------------------------------------------------------


def stream(store, keys, n=30, *, gb=1.0, may_miss=False):
    chosen = {slide.slide_id: good_rows(slide) for slide in store.slides()}
    spec = ReplaySpec(encoders=tuple(keys), n_augmented=2, batch_size=8, pool_blocks=2, may_miss=may_miss)
    dataset = ReplayDataset(store, chosen, spec, Reading(targets_gb=gb))
    return list(itertools.islice(dataset.batches(0), n))


@pytest.mark.parametrize("gb", [0.0, 1.0])
def test_targets_of_all_teachers_lie_beside_one_another(store, gb):
    opened = FeatureStore.open(store)
    together = stream(opened, KEYS, gb=gb)
    alone = [stream(opened, [key]) for key in KEYS]
    for batch, *each in zip(together, *alone, strict=True):
        assert np.array_equal(batch.targets, np.concatenate([one.targets for one in each], axis=1))
        assert all(np.array_equal(batch.pixels, one.pixels) for one in each)


@pytest.mark.parametrize("gb", [0.0, 1.0])
def test_missing_targets_are_nan_and_only_those(store, holey, gb):
    whole, masked = stream(FeatureStore.open(store), KEYS), stream(FeatureStore.open(holey), KEYS, gb=gb, may_miss=True)
    gone = 0
    for full, batch in zip(whole, masked, strict=True):
        missing = np.isnan(batch.targets)
        assert not missing[:, : sum(DIMS[:2])].any()
        assert np.array_equal(missing[:, sum(DIMS[:2]) :].all(axis=1), missing[:, -1])
        assert np.array_equal(batch.targets[~missing], full.targets[~missing])
        gone += int(missing[:, -1].sum())
    assert 0 < gone < 30 * 8


# ---- runs -------------------------------------------------------------------------------------------------------

JOINT = {"loss": f"mse,{B}=cosine", "teacher_norm": "phi-s", "balance": "running", "nested": (64, 256)}


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "joint"
    return out, distill(store, out, teacher_weight=(f"{A}=2",), **JOINT)


def test_a_run_says_all_of_each_teacher(run):
    out, summary = run
    record = json.loads((out / "run.json").read_text())
    assert [record["teacher"]["name"], *(t["name"] for t in record["more_teachers"])] == [
        TEACHER, "timm:vit_tiny_patch16_224@32", "timm:vit_tiny_patch16_224@32",
    ]  # fmt: skip
    log = rows(out / "log.csv")
    for row in log:
        losses = [float(row[f"loss:{key}"]) for key in KEYS]
        shares = [float(row[f"share:{key}"]) for key in KEYS]
        assert sum(shares) == pytest.approx(1)
        assert all(np.isfinite(losses))
        assert {"loss@64", "loss@256", "loss@1024"} <= row.keys()
    for name in ("cka_debiased", "knn_overlap"):
        assert summary.after[name] == pytest.approx(np.mean([summary.after[f"{name}:{key}"] for key in KEYS]))
    assert summary.after["cka_debiased@64"] != summary.after["cka_debiased@256"]
    assert [tuple(t.shape) for n, t in load_file(out / "projector.safetensors").items() if n.endswith("0.weight")]
    page = (out / "curves.html").read_text()
    assert f"of {B}" in page
    assert "width 64" in page
    card = (out / "student" / "README.md").read_text()
    assert f"{TEACHER} and timm:vit_tiny_patch16_224@32" in card
    assert "its first 64, 256 features alone" in card


def test_the_student_leaves_without_projectors(run):
    out, _ = run
    state = load_file(out / "student" / "model.safetensors")
    fresh = load_encoder(student()).module.network.state_dict()
    assert state.keys() == fresh.keys()
    assert not any("heads" in name for name in state)


def test_statistics_are_taken_once_and_kept(run, store):
    out, _ = run
    opened = FeatureStore.open(store)
    train = split_store(opened, (), "0.34", 0).train
    found = read_statistics(out)
    assert tuple(found) == KEYS
    for key in KEYS:
        wanted = target_statistics(opened, train, key, range(1, 3), with_phi_s=True)
        assert torch.equal(found[key].phi_s, wanted.phi_s)
        assert torch.equal(found[key].mean, wanted.mean)
        values = np.concatenate([opened.slide(i).features(key, view=v) for i in train for v in (1, 2)])
        y = (values.astype(np.float64) - found[key].mean.numpy()) @ found[key].phi_s.numpy().T
        np.testing.assert_allclose(y.var(axis=0), 1, rtol=1e-3)


def test_statistics_that_were_changed_stop_the_run(run, store, tmp_path):
    out = shutil.copytree(run[0], tmp_path / "run")
    content = bytearray((out / FILE).read_bytes())
    content[-5] ^= 1
    (out / FILE).write_bytes(content)
    with pytest.raises(RunError, match="is not what g2l distill wrote"):
        distill(store, out, teacher_weight=(f"{A}=2",), resume=True, **JOINT)


class StoppedError(Exception):
    """Stands for anything that ends a run in the middle of it."""


@pytest.mark.parametrize("balance", ["running", "dropping"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(store, tmp_path, monkeypatch, balance):
    """Running means come out of the checkpoint, and the draws of dropping go on where they stopped."""
    options = {"loss": f"mse,{B}=cosine", "teacher_norm": "dataset", "balance": balance, "nested": (64,), "steps": 7}
    distill(store, tmp_path / "whole", **options)

    def stop(self, step, *_):
        if step == 5:
            raise StoppedError

    monkeypatch.setattr("pipeline.distill.ProgressLine.update", stop)
    with pytest.raises(StoppedError):
        distill(store, tmp_path / "stopped", **options)
    monkeypatch.undo()
    distill(store, tmp_path / "stopped", resume=True, **options)
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    ours, theirs = (
        [{**row, "seconds": "", "seconds_waiting": ""} for row in rows(tmp_path / name / "log.csv")]
        for name in ("whole", "stopped")
    )
    assert ours == theirs


def test_masked_slides_are_trained_on_with_the_teachers_that_they_have(holey, tmp_path):
    distill(holey, tmp_path / "run", loss="mse", missing_targets="mask", steps=4, validate_every=4)
    log = rows(tmp_path / "run" / "log.csv")
    assert all(np.isfinite(float(row["loss"])) for row in log)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["replay"]["may_miss"]
    with pytest.raises(G2LError, match="is not complete|have no features of"):
        distill(holey, tmp_path / "refused", loss="mse")
    assert not (tmp_path / "refused").exists()


def test_live_teachers_give_the_same_losses(store, tmp_path):
    specs = [
        resolve_encoder(TEACHER, weights="random:0"),
        resolve_encoder("timm:vit_tiny_patch16_224@32", weights="random:1"),
    ]
    distill(store, tmp_path / "cached", teachers=(A, C), steps=4)
    run_distill(store, specs, student(), tmp_path / "live", settings(online=True, steps=4))
    ours, theirs = ([float(row["loss"]) for row in rows(tmp_path / name / "log.csv")] for name in ("cached", "live"))
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)


@pytest.mark.parametrize(
    ("teachers", "options", "message"),
    [
        ((A, A), {}, f"are both {A}: name each once"),
        ((A, "timm:mobilenetv3_small_050@64"), {}, "name each once"),
        ((A, B), {"teacher_weight": ("uni=2",)}, "unknown teacher in --teacher-weight 'uni'"),
        ((A, B), {"teacher_weight": (f"{C}=2",)}, "unknown teacher in --teacher-weight"),
        ((A, B), {"loss": f"mse,{C}=cosine"}, "unknown teacher in --loss"),
        ((A, B), {"loss": f"{A}=mse"}, f"gives {B} none"),
        ((A, B), {"loss": f"mse,{A}=cosine,timm:mobilenetv3_small_050@64=kl"}, f"--loss names {A} twice"),
        ((A,), {"teacher_weight": (f"{A}=2",)}, "--teacher-weight is for several teachers"),
        ((A,), {"balance": "running"}, "--balance is for several teachers"),
        ((A,), {"missing_targets": "mask"}, "--missing-targets is for several teachers"),
        ((A, B), {"nested": (64, 2000)}, "a width of 2000 is more than the 1024 features"),
        ((A, B), {"balance": "dropping"}, "logsum has none"),
        ((), {}, "expected a teacher"),
    ],
)
def test_refusals_before_anything_is_trained(store, tmp_path, teachers, options, message):
    with pytest.raises((UsageError, UnknownNameError), match=message):
        distill(store, tmp_path / "run", teachers=teachers, **options)
    assert not (tmp_path / "run" / "log.csv").exists()


def test_teachers_with_different_numbers_of_views(store, cohort, tmp_path):
    path = Path(shutil.copytree(store, tmp_path / "store.zarr"))
    fewer = resolve_encoder("timm:vit_tiny_patch16_224@32", weights="random:2")
    run_extraction([cohort], path, [fewer], GridSpec(), ViewSpec(), ExtractionSettings(batch_size=16, views=1))
    teachers = (A, "timm-vit_tiny_patch16_224-32-random2")
    with pytest.raises(UsageError, match="different numbers of augmented views, 2 of .* and 1 of .*: give --views 1"):
        distill(path, tmp_path / "run", teachers=teachers)
    distill(path, tmp_path / "run", teachers=teachers, views=1, steps=2)


# ---- terms ------------------------------------------------------------------------------------------------------


def with_terms(store, path, key, terms):
    shutil.copytree(store, path)
    facts = json.loads((path / "zarr.json").read_text())["attributes"]["g2l"]
    facts["encoders"][key] |= {"licence": terms, "weights": "file:/w.pt", "name": "uni"}
    write_group(path, {name: value for name, value in facts.items() if name != CHECKSUM})
    return path


def test_permissive_refuses_what_would_not_be_free(store, tmp_path):
    path = with_terms(store, tmp_path / "store.zarr", B, "CC-BY-NC-ND-4.0")
    with pytest.raises(UsageError, match=r"not be free for any use, because of the teacher uni \(CC-BY-NC-ND-4.0\)"):
        distill(path, tmp_path / "refused", teachers=(A, B), permissive=True)
    assert not (tmp_path / "refused").exists()
    distill(path, tmp_path / "run", teachers=(A, B), steps=2)
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "This student is non-commercial because of the teacher uni (CC-BY-NC-ND-4.0)." in card
    assert json.loads((tmp_path / "run" / "student" / "encoder.json").read_text())["licence"] == "CC-BY-NC-ND-4.0"
    free = with_terms(store, tmp_path / "free.zarr", B, "Apache-2.0")
    distill(free, tmp_path / "free", teachers=(A, B), permissive=True, steps=2)


# ---- the command line, recipes and sweeps -----------------------------------------------------------------------

BASICS = "--weights random:1 --steps 2 --batch-size 8 --hold-out 0.34 --early-stop 0 --workers 1"


def test_the_command_line_and_a_recipe_take_several(store, tmp_path):
    names = [f"--teacher {A}", f"--teacher {B}", f"--teacher-weight {A}=2 --loss mse,{B}=cosine --nested 64,128"]
    arguments = f"distill --store {store} {' '.join(names)} --student {TEACHER} {BASICS} --out {tmp_path / 'line'}"
    done = CliRunner().invoke(app, arguments.split())
    assert done.exit_code == 0, done.output
    (tmp_path / "mine.toml").write_text(
        f'teacher = ["{A}", "{B}"]\nteacher_weight = ["{A}=2"]\nloss = "mse,{B}=cosine"\nnested = [64, 128]\n'
    )
    arguments = f"distill --config {tmp_path / 'mine.toml'} --store {store} --student {TEACHER} {BASICS}"
    done = CliRunner().invoke(app, [*arguments.split(), "--out", str(tmp_path / "recipe")])
    assert done.exit_code == 0, done.output
    assert all(torch.equal(t, tensors(tmp_path / "recipe")[n]) for n, t in tensors(tmp_path / "line").items())


SWEEP = f"""
title = "Sets of teachers"
[base]
steps = 2
batch_size = 8
hold_out = "0.34"
early_stop = 0
loss = "mse"
[grid]
teacher = ["{B}", ["{B}", "{C}"]]
"""


def test_a_sweep_over_sets_of_teachers(store, tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP)
    sweep = read_sweep(str(tmp_path / "sweep.toml"), [])
    found = run_sweep(sweep, store, (), TEACHER, "random:1", tmp_path / "s", DistillHow(resume=True))
    assert not found.failed
    with (tmp_path / "s" / "results.csv").open(newline="") as file:
        table = [row["teacher"] for row in csv.DictReader(file)]
    assert table == [B, f"{B}+{C}"]
    for row in table:
        record = json.loads((tmp_path / "s" / f"teacher={row}" / "run.json").read_text())
        assert 1 + len(record.get("more_teachers", ())) == row.count("+") + 1
    with pytest.raises(UsageError, match="sets of teachers already: leave --teacher out"):
        run_sweep(sweep, store, [A], TEACHER, "random:1", tmp_path / "t", DistillHow())
    with pytest.raises(UsageError, match="expected a teacher: give --teacher, or sets of them"):
        run_sweep(read_sweep("losses", []), store, (), TEACHER, "random:1", tmp_path / "t", DistillHow())


# ---- widths -----------------------------------------------------------------------------------------------------


def test_a_width_is_the_first_features(run):
    out, _ = run
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    whole, part = (load_encoder(resolve_encoder(text)) for text in (str(out), f"{out}+64"))
    assert (whole.dim, part.dim) == (1024, 64)
    assert np.array_equal(encode_all(part, pixels, 2), encode_all(whole, pixels, 2)[:, :64])
    assert whole.key != part.key
    assert json.loads((out / "student" / "encoder.json").read_text())["widths"] == [64, 256]
    with pytest.raises(UsageError, match="a width of 100 is asked for, but it has the widths 64, 256"):
        resolve_encoder(f"{out}+100")
    with pytest.raises(UsageError, match="a width is for folders of g2l distill --nested, as in run/.64"):
        resolve_encoder("efficientnet-lite0+64")


TASKS = """
[tasks.center]
label = "medical_center"
group = "patient_id"
folds = 2
metrics = ["cka", "knn"]
knn_k = [3]
"""


def test_embed_and_bench_take_widths(run, store, cohort, tmp_path):
    """A width that is stored by itself and one that is read from all features have the values of those columns."""
    out, path = run[0], Path(shutil.copytree(store, tmp_path / "store.zarr"))
    for more in (f"--encoder {out}", f"--encoder {out} --dim 64"):
        done = CliRunner().invoke(app, ["embed", str(cohort), "--store", str(path), *more.split()])
        assert done.exit_code == 0, done.output
    opened = FeatureStore.open(path)
    full, narrow = list(opened.encoders)[-2:]
    assert (opened.encoders[full].dim, opened.encoders[narrow].dim) == (1024, 64)
    for slide in opened.slides():
        np.testing.assert_array_equal(slide.features(narrow), slide.features(full)[:, :64])
    (tmp_path / "tasks.toml").write_text(TASKS)
    report = run_bench(tmp_path / "tasks.toml", [path], [A, f"{out}/+all"], tmp_path / "report", draws=100)
    assert [(s.key, s.dim) for s in report.encoders] == [(A, 1024), (full, 1024), (f"{full}+256", 256), (narrow, 64)]
    assert [s.nested_in for s in report.encoders] == ["", "joint", "joint", "joint"]
    assert {r.encoder for r in report.results} == {A, full, f"{full}+256", narrow}
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("over the bytes a patch") == 1
    alone = run_bench(tmp_path / "tasks.toml", [path], [A, f"{out}+256"], tmp_path / "alone", draws=100)
    values = {(r.metric, r.encoder): r.estimate.value for r in report.results}
    assert all(r.estimate.value == values[r.metric, r.encoder] for r in alone.results)
    assert "over the bytes a patch" not in (tmp_path / "alone" / "report.html").read_text()
    with pytest.raises(UsageError, match="has the widths 64, 256"):
        run_bench(tmp_path / "tasks.toml", [path], [A, f"{out}+100"], tmp_path / "wrong", draws=100)
    for seed in (0, 1):
        shutil.copytree(out, tmp_path / f"seed-{seed}")
    pattern = f"{tmp_path}/seed-*"
    assert with_all_widths(f"{pattern}+all") == [pattern, f"{pattern}+256", f"{pattern}+64"]
    assert with_all_widths(f"{tmp_path}/none-*+all") == [f"{tmp_path}/none-*+all"]


def test_a_run_without_nested_features_has_no_widths(store, tmp_path):
    distill(store, tmp_path / "plain", teachers=(A,), steps=1)
    assert "widths" not in json.loads((tmp_path / "plain" / "student" / "encoder.json").read_text())
    with pytest.raises(UsageError, match="it was not trained with --nested"):
        resolve_encoder(f"{tmp_path / 'plain'}+64")


# ---- compiled ---------------------------------------------------------------------------------------------------


def test_a_compiled_student_is_said_to_be(store, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    distill(store, tmp_path / "run", teachers=(A,), steps=1, compile=True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(compiled) == 1
    assert record["settings"]["compile"]
    assert record["student"]["precision"] == "fp32+compile"
