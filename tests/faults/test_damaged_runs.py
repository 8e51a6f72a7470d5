"""Run folders, reports, labels and task files that are empty, torn, flipped or of another type are named."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from g2l_core.distillation import checkpoints
from g2l_core.distillation.distiller import Distiller
from g2l_core.distillation.logs import CsvLog, read_log
from g2l_core.distillation.optim import EarlyStop, OptimSpec, build_optimizer
from g2l_core.encoders.loading import load_encoder
from g2l_core.encoders.resolve import find_stored, resolve_encoder
from g2l_core.encoders.student_export import export_student
from g2l_core.errors import G2LError, RunError
from g2l_core.report.write import read_report
from g2l_core.store.features import FeatureStore
from pipeline.bench import run_bench
from pipeline.run_page import HELD_OUT
from pipeline.runs import read_run
from tests.faults.small_run import KEY, OPTIONS, damaged, distill, flipped, retyped
from tests.pipeline.test_cli import g2l
from tests.test_golden import GOLDEN, student_spec


@pytest.fixture(scope="module")
def finished_run(cached_store, tmp_path_factory):
    """A run of six steps. Not to be changed: copy it first."""
    out = tmp_path_factory.mktemp("finished") / "student-a"
    distill(cached_store, out)
    return out


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "student-a")


ADVICE = ("restore", "again", "give", "needs", "must", "expected", "read it with", "did you mean", "known", "no such")


def refusals(path, read, *, n=60, json_too=True):
    """Damage a file in `n` ways and read it: a refusal names the file. Returns the damages that were not noticed."""
    rng = np.random.default_rng(0)
    whole = path.read_bytes()
    tried = [*damaged(whole, rng, n), *(retyped(whole, rng, n // 2) if json_too else ())]
    believed, unclear = [], []
    for name, content in tried:
        path.write_bytes(content)
        try:
            read()
        except G2LError as error:
            unclear += [] if path.name in str(error) and any(a in str(error).lower() for a in ADVICE) else [str(error)]
        else:
            believed.append(name)
    assert not unclear
    path.write_bytes(whole)
    return believed


def test_run_json(run):
    """A flip in the name of the digest's key leaves all else as it was; every other damage is refused."""
    whole = read_run(run)
    believed = refusals(run / "run.json", lambda: same(replace(read_run(run), extra={}), whole), n=200)
    assert len(believed) <= 3


def same(found, wanted):
    assert found == wanted


def test_the_student_s_record(run):
    whole = resolve_encoder(str(run))
    believed = refusals(run / "student" / "encoder.json", lambda: same(resolve_encoder(str(run)), whole), n=200)
    assert len(believed) <= 8


@pytest.mark.parametrize("name", ["run.json", "student/encoder.json"])
def test_records_of_older_versions_are_refused_or_read(tmp_path, name):
    """They have no digest of their own, so that a digit may change unnoticed; nothing ends in an internal error."""
    run = shutil.copytree(GOLDEN / "run", tmp_path / "run")
    refusals(run / name, lambda: (read_run(run), resolve_encoder(str(run))))


def test_the_student_s_weights(run, tmp_path):
    """Every flip in the values is refused by whoever loads them."""
    path = run / "student" / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    for bit in rng.integers(8 * start, 8 * len(whole), 10):
        path.write_bytes(flipped(whole, int(bit)))
        with pytest.raises(G2LError, match=r"model\.safetensors does not hold the weights"):
            load_encoder(resolve_encoder(str(run)), device="cpu")
    with pytest.raises(G2LError, match=r"model\.safetensors does not hold the weights"):
        export_student(run, "timm", tmp_path / "exported")
    assert not list(tmp_path.glob("exported*"))


def test_the_student_s_config(run, tmp_path):
    def export():
        export_student(run, "timm", tmp_path / "exported")
        shutil.rmtree(tmp_path / "exported")

    path = run / "student" / "config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain))  # without white space, in which a bit may flip unnoticed
    assert all(name.startswith("bit") for name in refusals(path, export, n=20))


def test_logs(run):
    for name, needs in (("validation.csv", HELD_OUT), ("log.csv", ("loss_per_element",))):
        refusals(run / name, lambda path=run / name, needs=needs: read_log(path, needs), json_too=False)
        for content in (b"step\n", b"\0\n\0\n", b"\xff\n", b"step,loss\n1\n2,3\n", b"step,loss\n1,x\n", b"loss\n1\n"):
            (run / name).write_bytes(content)
            if content != b"step\n":
                with pytest.raises(RunError, match=name):
                    read_log(run / name, needs)


def test_a_run_whose_log_lost_its_beginning_is_not_continued(run, cached_store):
    (run / "validation.csv").write_text("")
    with pytest.raises(RunError, match=r"validation\.csv has no row of step 0"):
        distill(cached_store, run)


def test_a_log_with_other_columns_is_refused(tmp_path):
    (tmp_path / "log.csv").write_text("step,lozz\n0,1.5\n")
    log = CsvLog(tmp_path / "log.csv", keep_below=5)
    with pytest.raises(RunError, match=r"log\.csv has the columns step, lozz, not step, loss"):
        log.write({"step": 1, "loss": 1.0})


def test_a_last_row_without_its_end_is_written_again(tmp_path):
    """A kill within the last figure leaves a row that looks complete."""
    (tmp_path / "log.csv").write_text("step,loss\n0,1.5\n1,1.2")
    assert read_log(tmp_path / "log.csv") == [{"step": 0.0, "loss": 1.5}]


def test_results_json(tmp_path):
    report = shutil.copytree(GOLDEN / "report", tmp_path / "report")
    refusals(report / "results.json", lambda: read_report(report))


TASK = 'labels = "labels.csv"\nlabel = "kind"\nfolds = 2\nmetrics = ["cka"]\n'


def test_task_files_and_labels(cached_store, tmp_path):
    """A damaged task file stops the command, damaged labels only their task."""
    (tmp_path / "tasks.toml").write_text(f"[tasks.a]\n{TASK}\n[tasks.b]\nmetrics = ['cka']\n")
    slides = [slide.slide_id for slide in FeatureStore.open(cached_store).slides()]
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,kind\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(slides)))

    def bench():
        return run_bench(tmp_path / "tasks.toml", [cached_store], [KEY], tmp_path / "out", draws=10)

    assert not bench().failures
    refusals(tmp_path / "tasks.toml", bench, n=21, json_too=False)

    def task_a():
        for failure in bench().failures:
            assert (failure.task, "labels.csv" in failure.reason or "task a" in failure.reason) == ("a", True)

    refusals(labels, task_a, n=21, json_too=False)


def test_bench_goes_on_without_a_damaged_run(run, cached_store, tmp_path):
    (tmp_path / "tasks.toml").write_text('[tasks.a]\nmetrics = ["cka"]\n')
    (run / "student" / "encoder.json").write_bytes(b"\0")
    done = g2l(
        "bench", tmp_path / "tasks.toml", "--store", cached_store, "--encoders", f"{KEY},{run}", "--out", tmp_path / "r"
    )
    assert done.returncode == 2  # the teacher alone has no CKA to another
    assert f"failed  a ({run}): {run}/student/encoder.json is no record of a student" in done.stderr


def test_a_sweep_goes_on_without_a_damaged_run(cached_store, tmp_path):
    options = "".join(f"{name} = {json.dumps(value)}\n" for name, value in {**OPTIONS, "steps": 2}.items())
    (tmp_path / "seeds.toml").write_text(f"[base]\n{options}[grid]\nseed = [0, 1]\n")
    command = [
        "sweep", tmp_path / "seeds.toml", "--store", cached_store, "--teacher", KEY, "--student",
        "timm:mobilenetv3_small_050@64", "--weights", "random:1", "--out", tmp_path / "s", "--device", "cpu",
    ]  # fmt: skip
    assert g2l(*command).returncode == 0
    record = tmp_path / "s" / "seed=1" / "run.json"
    record.write_bytes(record.read_bytes()[:500])
    done = g2l(*command)
    assert done.returncode == 1
    assert f"failed  seed=1: {record} is no record of g2l distill" in done.stderr
    assert (tmp_path / "s" / "results.csv").read_text().count("seed=0") == 1


# -- checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A folder, and what makes the state of a very small run."""
    student = load_encoder(resolve_encoder(str(student_spec(tmp_path))), device="cpu")

    def state():
        model = Distiller(student.module.requires_grad_(True), student.dim, 4, seed=0)
        optimizer = build_optimizer(model, OptimSpec())
        model(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).sum().backward()
        optimizer.step()
        return checkpoints.RunState(distiller=model, optimizer=optimizer, early_stop=EarlyStop(3, 3))

    return tmp_path, state


def test_200_of_200_flipped_checkpoints_are_refused(saved):
    folder, state = saved
    first = state()
    for step in (2, 4):
        first.step = step
        checkpoints.save(folder, first)
    newest = folder / "checkpoints" / "step-00000004.pt"
    whole = newest.read_bytes()
    rng = np.random.default_rng(0)
    tail = 8 * (len(whole) - 42)
    bits = [*rng.integers(0, 8 * len(whole), 180), *rng.integers(tail, 8 * len(whole), 20)]
    for bit in map(int, bits):
        newest.write_bytes(flipped(whole, bit))
        second, notes = state(), []
        checkpoints.restore(folder, second, notes.append)
        assert second.step == 2, bit
        assert len(notes) == 1
        assert f"{newest} cannot be used and is passed over" in notes[0]
    newest.write_bytes(whole)
    second, notes = state(), []
    checkpoints.restore(folder, second, notes.append)
    assert (second.step, notes) == (4, [])
    assert torch.equal(second.distiller.projector.weight, first.distiller.projector.weight)


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"PK\3\4", b"text", "a pickle of another kind", "a folder"])
def test_what_is_no_checkpoint_is_passed_over(saved, content):
    folder, state = saved
    first = state()
    first.step = 2
    checkpoints.save(folder, first)
    newest = folder / "checkpoints" / "step-00000004.pt"
    match content:
        case bytes():
            newest.write_bytes(content)
        case "a folder":
            newest.mkdir()
        case _:
            torch.save([1, 2], newest)
    second, notes = state(), []
    checkpoints.restore(folder, second, notes.append)
    assert (second.step, len(notes)) == (2, 1)


def test_no_checkpoint_left_is_an_error_and_not_a_new_beginning(run, cached_store):
    for path in (run / "checkpoints").glob("step-*.pt"):
        path.write_bytes(b"torn")
    with pytest.raises(RunError, match="none of the 2 checkpoints in .* can be used: restore one from a copy"):
        distill(cached_store, run)


def test_checkpoints_of_older_versions_are_used_with_a_note(saved):
    folder, state = saved
    first = state()
    first.step = 2
    checkpoints.save(folder, first)
    path = folder / "checkpoints" / "step-00000002.pt"
    content = torch.load(path, weights_only=True)
    del content["sealed"]
    torch.save(content, path)
    second, notes = state(), []
    checkpoints.restore(folder, second, notes.append)
    assert second.step == 2
    assert "of an older version and has no digest" in notes[0]


def test_a_damaged_checkpoint_is_said_and_the_run_ends_the_same(run, finished_run, cached_store, capsys):
    newest = sorted((run / "checkpoints").glob("step-*.pt"))[-1]
    newest.write_bytes(flipped(newest.read_bytes(), 100_000))
    distill(cached_store, run)
    assert f"note  the checkpoint {newest} cannot be used and is passed over" in capsys.readouterr().err
    for name in ("student/model.safetensors", "projector.safetensors"):
        assert (run / name).read_bytes() == (finished_run / name).read_bytes()


def test_where_the_best_weights_are_lost_the_last_are_kept_and_it_says_so(cached_store, tmp_path, capsys):
    out = tmp_path / "run"
    distill(cached_store, out, keep="best")
    (out / "checkpoints" / "best.pt").write_bytes(b"torn")
    distill(cached_store, out, keep="best")
    assert "warning  the best weights cannot be read: the last ones are kept" in capsys.readouterr().err
    result = read_run(out).result
    assert (result.kept, result.kept_step) == ("last", OPTIONS["steps"])


def test_find_stored_names_a_damaged_record(run, cached_store):
    stored = FeatureStore.open(cached_store).encoders
    refusals(run / "student" / "encoder.json", lambda: find_stored(str(run), stored), n=20)
