"""g2l run and g2l init: one file, one folder, one command that continues whatever has stopped it."""

import json
import re
import shutil
import signal
import tomllib
from time import sleep

import pytest

from g2l_core.errors import UsageError
from g2l_core.report.write import FILES, read_report
from pipeline.study_file import COHORTS, TABLES, read_study, shipped_studies
from pipeline.study_settings import resolve_study
from pipeline.study_template import EXAMPLES, study_template
from tests.conftest import TEACHER
from tests.pipeline.study_process import start
from tests.pipeline.test_cli import g2l

STUDENT = "timm:mobilenetv3_small_075@64"
SMALL = {
    "slides": {"drawn": 6, "max_patches": 12},
    "teacher": {"teacher": TEACHER, "weights": "random:0", "views": 1, "batch_size": 8},
    "student": {"student": STUDENT, "weights": "random:1", "steps": 6, "batch_size": 8, "checkpoint_every": 1},
    "bench": {"encoders": [f"teacher={TEACHER}", f"before={STUDENT}", "G2L=run"]},
}
"""What makes the demo's study small."""


def small_study(path, **changes):
    """The shipped demo with small models, few patches and few steps."""
    content = tomllib.loads(shipped_studies()["demo"].read_text())
    for table in (*SMALL, *(changes.keys() - SMALL.keys())):
        content[table] = {**content.get(table, {}), **SMALL.get(table, {}), **changes.get(table, {})}
    lines = [f"title = {json.dumps(content.pop('title'))}"]
    for table, keys in content.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the small study has run without interruption."""
    folder = tmp_path_factory.mktemp("finished")
    small_study(folder / "small.toml")
    process = start(folder, "small.toml")
    process.join(timeout=300)
    assert process.exitcode == 0
    return folder / "small"


def killed_when(folder, reached):
    process = start(folder, "small.toml")
    while process.is_alive() and not reached():
        sleep(0.002)
    process.kill()
    process.join(timeout=60)
    return process.exitcode == -signal.SIGKILL


def test_killed_three_times_and_finished_by_the_same_command(finished, tmp_path):
    small_study(tmp_path / "small.toml")
    out = tmp_path / "small"
    moments = [
        lambda: list(out.glob("store.zarr/slides/*/features")),  # the teacher is being cached
        lambda: list(out.glob("run/checkpoints/step-0000000[2-4].pt")),  # half of the steps
        lambda: (out / "steps.json").is_file(),  # distilled, and nothing compared yet
    ]
    assert [killed_when(tmp_path, moment) for moment in moments] == [True] * 3
    assert not (out / "report" / "results.json").exists()
    process = start(tmp_path, "small.toml")
    process.join(timeout=300)
    assert process.exitcode == 0
    for name in FILES:
        assert (out / "report" / name).read_bytes() == (finished / "report" / name).read_bytes(), name
    log = (out / "run" / "log.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in log[1:]] == [0, 1, 2, 3, 4, 5]


def test_the_report_speaks_of_the_study_s_encoders(finished):
    report = read_report(finished / "report")
    assert report.title == "G2L demo: drawn slides"
    assert [encoder.key for encoder in report.encoders] == ["teacher", "before", "G2L"]
    assert {(row.encoder, row.reference) for row in report.comparisons} >= {("G2L", "teacher"), ("G2L", "before")}
    assert not report.failures


def test_done_steps_are_skipped_and_other_settings_refused(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "small")
    small_study(tmp_path / "small.toml")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "small").rglob("*") if path.is_file()}
    again = g2l("run", "small.toml")
    assert again.returncode == 0, again.stderr
    for words in ("drawn already", "all of them were stored already", "distilled already", "written already"):
        assert words in again.stderr
    assert "CKA, debiased" in again.stdout
    changed = {path.relative_to(tmp_path / "small") for path in before if path.stat().st_mtime_ns != before[path]}
    assert not [path for path in changed if path.parts[0] in {"run", "report", "cohort"} or path.name.startswith("c.")]

    planned = json.loads(g2l("run", "small.toml", "--dry-run", "--json").stdout)
    assert [step["state"] for step in planned["steps"]] == ["done", "done", "done", "to do"]
    small_study(tmp_path / "small.toml", student={"lr": 0.5})
    refused = g2l("run", "small.toml")
    assert refused.returncode == 2
    assert "lr was 0.001, now 0.5" in refused.stderr
    small_study(tmp_path / "small.toml", bench={"draws": 200})  # what costs seconds is done anew
    assert g2l("run", "small.toml").returncode == 0
    assert "draws = 200" in (tmp_path / "small" / "study.toml").read_text()


def test_a_dry_run_tells_steps_hours_and_gigabytes_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_study(tmp_path / "small.toml")
    done = g2l("run", "small.toml", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert [step["state"] for step in steps] == ["to do"] * 4
    assert steps[0]["gigabytes"] == pytest.approx(72 * 2 * 1024 * 2 / 1e9)
    assert steps[2]["gigabytes"] == pytest.approx(72 * 2 * 1024 * 2 / 1e9)  # two encoders of one view
    assert all(step["hours"] > 0 for step in steps[:3])
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]
    text = g2l("run", "small.toml", "--dry-run").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "in all about" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student": {"losss": "mse"}}, ["line", "[student]", "losss", "Did you mean loss"]),
        ({"studnet": {"lr": 1}}, ["line", "table", "studnet", "Did you mean student"]),
        ({"student": {"lr": "fast"}}, ["line", "lr must be a number", "'fast'"]),
        ({"student": {"lr": -1.0}}, ["[student]", "lr > 0"]),
        ({"student": {"batch_size": 1}}, ["line", "batch_size must be at least 2"]),
        ({"student": {"loss": "mes"}}, ["[student]", "Did you mean mse"]),
        ({"teacher": {"teacher": "h-optimus-9"}}, ["[teacher]", "Did you mean h-optimus"]),
        ({"teacher": {"trust_code": "os"}}, ["[teacher]", "trust_code"]),
        ({"slides": {"drawn": None, "inputs": "nowhere/"}}, ["[slides]", "no such file or folder: nowhere"]),
        ({"slides": {"inputs": "."}}, ["[slides]", "either inputs", "or drawn"]),
        ({"slides": {"tissue": "ostu"}}, ["[slides]", "tissue method", "otsu"]),
        ({"student": {"student": TEACHER}}, ["[student]", "teacher and student are both called"]),
        ({"bench": {"tasks": "braest"}}, ["[bench]", "no such task file: braest"]),
        ({"bench": {"baseline": "befor"}}, ["[bench]", "Did you mean before"]),
        ({"bench": {"encoders": ["a=run", "a=run"]}}, ["[bench]", "names a twice"]),
        ({"bench.slides.other": {"inputs": ["nowhere.csv"]}}, ["[bench", "tasks"]),
        ({"bench.slides.other": {"mp": 0.5}}, ["line", "[bench.slides.other]", "Did you mean mpp"]),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    small_study(tmp_path / "small.toml", **changes)
    done = g2l("run", "small.toml")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


def test_a_folder_of_something_else_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_study(tmp_path / "small.toml")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.txt").write_text("chapter 1")
    done = g2l("run", "small.toml")
    assert done.returncode == 2
    assert "small holds thesis.txt and no study" in done.stderr
    unknown = g2l("run", "braest")
    assert unknown.returncode == 2
    assert "Did you mean breast" in unknown.stderr


def test_the_template_explains_every_key_and_its_defaults_are_the_defaults(tmp_path):
    text = study_template()
    for keys in TABLES.values():
        for name, entry in keys.items():
            assert entry.option.recipe_only or re.search(rf"^(# )?{name} =", text, re.MULTILINE), name
    (tmp_path / "slides").mkdir()
    written = tmp_path / "study.toml"
    written.write_text(text)
    assert read_study(str(written)).student == {"student": "hibou-l"}
    # Every default as a key, by taking away the marks of comments where a value stands
    keys_alone = text.partition("# Other slides")[0]
    written.write_text(re.sub(r"^# (\w+ = [^#\n]+)$", r"\1", keys_alone, flags=re.MULTILINE))
    filled = read_study(str(written))
    assert len(filled.student) > 30
    for table in ("slides", "teacher", "student", "bench"):
        for name, value in getattr(filled, table).items():
            if name not in {"inputs", "teacher", "student"}:
                default = TABLES[table][name].default
                assert value == default or tuple(value) == tuple(default), (table, name)


def test_init_writes_the_template_and_the_examples_and_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = g2l("init")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "study.toml").read_text() == study_template()
    (tmp_path / "study.toml").write_text("mine")
    again = g2l("init")
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert (tmp_path / "study.toml").read_text() == "mine"
    for name in ("oscc", "crc", "breast"):
        assert g2l("init", name, "--example", name).returncode == 0
    assert {path.name for path in (tmp_path / "oscc").iterdir()} == {p.name for p in (EXAMPLES / "oscc").iterdir()}
    assert (tmp_path / "breast" / "breast.toml").is_file()
    assert "Did you mean oscc" in g2l("init", "--example", "osc").stderr


def test_the_paper_s_studies_are_the_paper_s_recipes(tmp_path, monkeypatch, cohort):
    monkeypatch.chdir(tmp_path)
    for name, training in (("breast", "tcga-brca"), ("prostate", "tcga-prad")):
        (tmp_path / training).symlink_to(cohort.parent / "slides")
        file = read_study(name)
        for manifest in (path for values in file.cohorts.values() for path in values["inputs"]):
            shutil.copy(cohort, manifest)
            text = cohort.read_text().replace("slides/", f"{cohort.parent}/slides/")
            (tmp_path / manifest).write_text(text)
        study = resolve_study(file, tmp_path / "out")
        assert (study.teachers[0].name, study.student.name, study.epochs) == ("h-optimus-0", "hibou-l", 5)
        assert (study.distill.train.optim.lr, study.cohort.settings.views) == (1e-4, 5)
        assert [each.alias or each.name for each in study.compared] == ["h-optimus-0", "hibou-l", "G2L"]
        assert {path.parent.name for path in study.evaluated} == {COHORTS}
        (tmp_path / manifest).unlink()
        with pytest.raises(UsageError, match=rf"no such file or folder.*g2l init --example {name}"):
            resolve_study(file, tmp_path / "out")
