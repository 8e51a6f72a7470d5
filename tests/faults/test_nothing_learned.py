"""A distillation that learns nothing says so on the terminal, on its page, in run.json and in the model card."""

from pipeline.runs import read_run
from tests.faults.small_run import KEY, STUDENT, STUDENT_WEIGHTS
from tests.pipeline.test_cli import g2l

COMMAND = [
    "distill", "--teacher", KEY, "--student", STUDENT, "--weights", STUDENT_WEIGHTS, "--device", "cpu", "--steps", "4",
    "--batch-size", "8", "--hold-out", "0.34", "--early-stop", "0", "--validate-every", "4",
]  # fmt: skip


def test_a_run_that_ends_below_its_start(cached_store, tmp_path):
    done = g2l(*COMMAND, "--store", cached_store, "--out", tmp_path / "run", "--lr", "3")
    assert done.returncode == 0, done.stderr
    (warning,) = read_run(tmp_path / "run").result.outcome.warnings
    assert warning.startswith("nothing was learned: CKA to the teacher was ")
    assert "best at step 0" in warning
    assert f"warning  step 4: {warning}" in done.stderr
    assert "nothing was learned" in (tmp_path / "run" / "curves.html").read_text()
    assert f"**Warning**: {warning}." in (tmp_path / "run" / "student" / "README.md").read_text()


def test_a_loss_that_becomes_nan_ends_the_run_and_says_what_to_do(cached_store, tmp_path):
    done = g2l(*COMMAND, "--store", cached_store, "--out", tmp_path / "run", "--lr", "1e30")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "the loss of step" in line
    assert "Lower --lr" in line
    assert not (tmp_path / "run" / "student").exists()
