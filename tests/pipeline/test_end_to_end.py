"""The three stages together: the demo, the user's own slides, and a real Aperio slide through the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import zarr

from pipeline.demo import DemoSettings, run_demo
from tests.pipeline.test_cli import g2l

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The demo's folder and what it printed: those of a run that has ended (`G2L_DEMO`, as in CI), or of one now."""
    done = os.environ.get("G2L_DEMO")
    if done:
        return Path(done), Path(done).with_suffix(".txt").read_text()
    out = tmp_path_factory.mktemp("demo") / "g2l-demo"
    done = g2l("demo", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_the_demo_brings_the_student_closer_on_held_out_patients(demo):
    folder, printed = demo
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("report "))
    report = json.loads((folder / "report" / "results.json").read_text())
    gains = {
        c["metric"]: c["difference"]
        for c in report["comparisons"]
        if c["encoder"].startswith("run-") and c["reference"].endswith("random0")
    }
    # Not the interval over four patients: rounding, and so the number of threads, moves its end across 0.
    assert gains["cka_debiased"]["value"] > 0.2
    assert gains["knn_accuracy"]["value"] > 0.05
    assert "CKA to the teacher" in printed
    assert not report["failures"]
    page = (folder / "report" / "report.html").read_text()
    assert "untrained" in page
    assert "ImageNet" in page


FIGURE = r"[+-]?\d+(?:\.\d+)?"


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "docs/quickstart.md"])
def test_the_table_in_the_documents_is_what_the_demo_prints(demo, document):
    """Word for word but for the figures, of which threads and processors move the students'."""
    _, printed = demo
    shown = (ROOT / document).read_text()
    begin, end = "on held-out slides", "robustness index"
    table, told = (
        text[text.index(begin) : text.index("\n", text.index(end, text.index(begin)))].splitlines()
        for text in (printed, shown)
    )
    assert [re.sub(FIGURE, "#", line).split() for line in told] == [re.sub(FIGURE, "#", line).split() for line in table]
    for ours, theirs in zip(told, table, strict=True):
        if theirs.startswith(("CKA", "kNN", "robustness")):
            values, found = (np.array(re.findall(FIGURE, line), float)[-5:] for line in (ours, theirs))
            np.testing.assert_allclose(values[:3], found[:3], atol=0.15)


@pytest.mark.slow
def test_the_transcript_in_the_quick_start_is_what_a_new_user_sees(demo, tmp_path):
    """Word for word but for figures, at 80 columns; `python docs/make_quickstart.py g2l-demo` writes it anew."""
    script = ROOT / "docs" / "make_quickstart.py"
    made = run_path(str(script))
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    shown = page[page.index(made["BEGIN"]) : page.index(made["END"]) + len(made["END"])]
    new = made["transcript"](*demo, tmp_path)
    assert made["masked"](shown) == made["masked"](new), f"python {script.relative_to(ROOT)} g2l-demo"
    assert max(map(len, shown.splitlines())) <= made["COLUMNS"]
    assert (tmp_path / "page.html").stat().st_size > 100_000


def test_the_demo_takes_own_slides(cohort, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for path in sorted((cohort.parent / "slides").glob("*.tiff"))[:3]:
        shutil.copy(path, folder)
    settings = DemoSettings(teacher="efficientnet-lite0@64", student="timm:mobilenetv3_small_050@64", steps=20)
    printed = run_demo(tmp_path / "demo", folder, settings)
    assert "CKA to the teacher" in printed
    assert "kNN" not in printed  # there are no classes to vote on


@pytest.mark.slow
def test_a_real_slide_through_the_three_commands(real_slide, tmp_path):
    def g2l(*arguments):
        command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    teacher, student = "efficientnet-lite0@64", "timm:mobilenetv3_small_050@64"
    g2l("cache-teacher", real_slide, "--store", "s.zarr", "--teacher", teacher, "--views", "2")
    g2l(
        *("distill", "--store", "s.zarr", "--teacher", teacher, "--student", student, "--weights", "random:0"),
        *("--steps", "3", "--out", "run"),
    )
    g2l("embed", real_slide, "--store", "s.zarr", "--encoder", "run")
    (tmp_path / "tasks.toml").write_text('[tasks.similarity]\nmetrics = ["cka"]\n')
    told = g2l("bench", "tasks.toml", "--store", "s.zarr", "--encoders", f"{teacher},run", "--out", "report")
    assert "CKA, debiased" in told
    slide = zarr.open_group(tmp_path / "s.zarr", mode="r")["slides/CMU-1-Small-Region"]
    coords, features = slide["coords"][:], slide["features/efficientnet-lite0-64"][:]
    assert slide.attrs["g2l"]["patch_px_level0"] == 257  # 256 px at 0.5 um/px of a slide at 0.499
    assert coords.shape == (len(features), 2)
    assert (coords % 257 == 0).all()
    assert features.shape[1:] == (3, 1280)
    assert np.isfinite(features).all()
