"""How commands behave at a terminal, in a log, for programs, and when they are interrupted."""

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from typer.main import get_command

from pipeline.cli.interruption import LEFT, left_by
from pipeline.cli.main import app
from pipeline.interruption import if_interrupted
from pipeline.progress import ProgressLine
from pipeline.tables import at_words, table_text
from tests.conftest import TEACHER
from tests.pipeline.test_cli import KEY, g2l

ROOT = Path(__file__).resolve().parents[2]
MODULE = [sys.executable, "-m", "g2l_core"]


def commands(typed=app, *words):
    """Every command by its words."""
    for info in typed.registered_commands:
        yield " ".join([*words, info.name or info.callback.__name__.replace("_", "-")]), info.callback
    for group in typed.registered_groups:
        yield from commands(group.typer_instance, *words, group.name)


COMMANDS = dict(commands())


# -- Ctrl-C ------------------------------------------------------------------------------------------------


def test_every_command_has_its_words_for_an_interruption():
    assert set(COMMANDS) <= set(LEFT)


def test_what_is_told_depends_on_what_was_asked():
    assert left_by("cache-teacher", {"dry_run": True}).startswith("nothing was written")
    assert left_by("store verify", {"repair": False}).startswith("nothing was written")
    assert left_by("store verify", {"repair": True}).startswith("what is repaired stays so")
    with if_interrupted(lambda: "step 3 of 9 is kept; the same command goes on from there"):
        assert left_by("distill", {}) == "step 3 of 9 is kept; the same command goes on from there"
        assert "the same command without --restart goes on" in left_by("distill", {"restart": True})
        assert left_by("distill", {"dry_run": True}).startswith("nothing")
    assert left_by("distill", {}) == LEFT["distill"]


def interrupted(arguments, ready, cwd):
    """Run a command, send SIGINT as soon as `ready(stderr so far)`, and return what it said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [*MODULE, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment) as running:
        said = ""
        while not ready(said):
            line = running.stderr.readline()
            assert line, said
            said += line
        running.send_signal(signal.SIGINT)
        _, rest = running.communicate(timeout=60)
    assert running.returncode == 130, said + rest
    assert "Traceback" not in rest
    (line,) = [line for line in rest.splitlines() if line.startswith("interrupted")]
    return line


def test_stage_one_says_how_many_patches_are_kept_and_stage_two_which_step(cohort, tmp_path):
    slides = cohort.parent / "slides"
    cache = ["cache-teacher", slides, "--store", "s.zarr", "--teacher", TEACHER, "--weights", "random:0"]
    told = interrupted([*cache, "--views", "30", "--workers", "1"], lambda said: "patches" in said, tmp_path)
    found = re.fullmatch(
        r"interrupted; ([\d,]+) of ([\d,]+) patches are kept; the same command goes on from there", told
    )
    assert found, told
    assert 0 <= int(found[1].replace(",", "")) <= int(found[2].replace(",", ""))


def test_distill_goes_on_by_itself_after_an_interruption(cached_store, tmp_path):
    run = ["distill", "--store", cached_store, "--teacher", KEY, "--student", "timm:mobilenetv3_small_050@64"]
    run += ["--weights", "random:1", "--out", "run", "--batch-size", "8", "--workers", "1", "--steps", "100000"]
    run += ["--checkpoint-every", "2", "--validate-every", "100000"]
    kept = tmp_path / "run" / "checkpoints"

    def ready(_said):
        while not list(kept.glob("step-*.pt")):
            time.sleep(0.02)
        return True

    told = interrupted(run, ready, tmp_path)
    step = re.fullmatch(r"interrupted; step (\d+) of 100,000 is kept; the same command goes on from there", told)
    assert step, told
    assert (kept / f"step-{int(step[1]):08d}.pt").is_file()


def test_a_finished_or_begun_run_goes_on_and_restart_begins_anew(cached_store, tmp_path):
    run = ["distill", "--store", cached_store, "--teacher", KEY, "--student", "timm:mobilenetv3_small_050@64"]
    run += ["--weights", "random:1", "--out", tmp_path / "run", "--batch-size", "8", "--workers", "1", "--steps", "2"]
    first = g2l(*run, "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["steps"] == 2
    log = tmp_path / "run" / "log.csv"
    before = log.stat().st_mtime_ns, log.read_bytes()
    again = g2l(*run)
    assert again.returncode == 0, again.stderr
    assert (
        again.stdout.splitlines()[-1] == f"next: g2l embed SLIDES --store {cached_store} --encoder {tmp_path / 'run'}"
    )
    assert log.read_bytes() == before[1]  # nothing was trained again
    other = g2l(*run, "--lr", "0.5")
    assert other.returncode == 2
    assert other.stderr.startswith("error: use the former settings")
    assert "settings.train.optim.lr was 0.0001, now 0.5" in other.stderr
    anew = g2l(*run, "--lr", "0.5", "--restart")
    assert anew.returncode == 0, anew.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["train"]["optim"]["lr"] == 0.5
    assert g2l(*run, "--restart", "--resume").returncode == 2


# -- logs and terminals ------------------------------------------------------------------------------------


def test_a_log_of_fifteen_hours_has_a_line_a_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pipeline.progress.monotonic", lambda: now[0])
    log, times = io.StringIO(), []
    line = ProgressLine("encode", "patches", stream=log)
    for second in range(15 * 3600 + 1):
        now[0] = float(second)
        length = log.tell()
        line.update(second, 15 * 3600)
        if log.tell() > length:
            times.append(second)
    assert len(times) < 15 * 60 + 10
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps[:4]) >= 5
    assert max(gaps[:4]) <= 6
    assert min(gaps[6:-1]) >= 60
    assert max(gaps) <= 61


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("words", [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_no_escapes_gets_lines(monkeypatch, words):
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    with ProgressLine("tissue", "slides", stream=terminal) as line:
        line.update(1, 2)
        line.update(2, 2)
    assert terminal.getvalue().splitlines() == ["tissue  1/2 slides", "tissue  2/2 slides"]


def at_a_terminal(*arguments, cwd=None, **environment):
    """What a command writes to a pseudo-terminal of 80 columns."""
    main, end = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TERM": "xterm", **environment}
    for name in [name for name, value in environment.items() if value is None]:
        del environment[name]
    running = subprocess.Popen(
        [*MODULE, *map(str, arguments)], stdout=end, stderr=end, stdin=end, cwd=cwd, env=environment
    )
    os.close(end)
    said = b""
    try:
        while part := os.read(main, 4096):
            said += part
    except OSError:  # the other end is closed
        pass
    running.wait(timeout=60)
    os.close(main)
    return said.decode()


def test_no_escapes_reach_a_terminal_that_wants_none(tmp_path):
    assert "\x1b[" in at_a_terminal("--help", NO_COLOR=None)
    assert "\x1b" not in at_a_terminal("--help", NO_COLOR="1")
    assert "\x1b" not in at_a_terminal("--help", TERM="dumb", NO_COLOR=None)
    refused = at_a_terminal("store", "ls", tmp_path / "no store that anybody has ever made at this place", TERM="dumb")
    assert "\x1b" not in refused
    lines = refused.replace("\r", "").splitlines()
    assert len(lines) > 1
    words = {word for line in lines for word in line.split()}
    assert {"anybody", "ever"} <= words  # no word was broken
    assert all(len(line) <= 80 or " " not in line for line in lines)


def test_words_are_broken_on_terminals_only():
    text = "word " * 40 + "\n  indented " + "x" * 100
    assert at_words(text, io.StringIO()) == text
    broken = at_words(text, Terminal()).splitlines()
    assert broken[-1] == "  indented " + "x" * 100
    assert "".join(" ".join(broken[:-1]).split()) == "word" * 40


def test_a_table_breaks_no_word():
    path = "/a/long/path/" + "folder/" * 12 + "slide.svs"
    text = table_text([("p01", path, "some words that can go to the next line of their column, as words can")])
    assert path in text
    assert "p01" in text.splitlines()[0]


# -- for programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_every_command_reports_as_json_if_asked(words):
    command = get_command(app)
    for word in words.split():
        command = command.commands[word]
    assert "--json" in {flag for parameter in command.params for flag in parameter.opts}


@pytest.mark.parametrize(
    "words",
    ["models", "models uni", "datasets", "datasets breakhis", "store ls", "store info", "store verify", "store du"],
)
def test_what_is_looked_up_is_json(words, cached_store):
    done = g2l(*words.split(), *([cached_store] if words.startswith("store") else []), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found
    if words == "store ls":
        assert all(slide["features"][KEY] == [3, 3] for slide in found["slides"].values())
    if words == "store verify":
        assert found["problems"] == []


def test_a_damaged_store_is_told_as_json(cached_store, tmp_path):
    store = shutil.copytree(cached_store, tmp_path / "s.zarr")
    shard = next((store / "slides").rglob("features/*/c.0.0.0"))
    shard.write_bytes(shard.read_bytes()[:-3])
    done = g2l("store", "verify", store, "--json")
    assert done.returncode == 1
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem["kind"] == "damaged"
    assert g2l("store", "verify", store).stdout.splitlines()[-1].startswith(f"next: g2l store verify {store} --repair")


# -- where users work --------------------------------------------------------------------------------------


@pytest.fixture
def with_pipeline(tmp_path):
    """A folder in which a user has a pipeline.py of their own."""
    (tmp_path / "pipeline.py").write_text("raise SystemExit('the pipeline of the user was imported')\n")
    return tmp_path


def test_a_pipeline_of_the_user_is_left_alone(with_pipeline, cached_store):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = {"cwd": with_pipeline, "env": environment, "capture_output": True, "text": True, "check": False}
    assert "of the user" in subprocess.run([sys.executable, "-m", "pipeline.cli", "models"], **call).stderr
    script = with_pipeline / "bin" / "g2l"  # as pip writes it
    script.parent.mkdir()
    script.write_text("import sys\nfrom pipeline.cli.main import main\nsys.exit(main())\n")
    for program in (MODULE, [sys.executable, str(script)]):
        done = subprocess.run([*program, "store", "ls", str(cached_store)], **call)
        assert done.returncode == 0, done.stderr
        assert "p01-1" in done.stdout


@pytest.mark.slow
def test_torchrun_distills_beside_a_pipeline_of_the_user(with_pipeline, cached_store):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "g2l_core"]
    command += [
        "distill",
        "--store",
        str(cached_store),
        "--teacher",
        KEY,
        "--student",
        TEACHER,
        "--weights",
        "random:1",
    ]
    command += ["--out", "run", "--batch-size", "8", "--workers", "1", "--steps", "1", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=with_pipeline, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (with_pipeline / "run" / "student").is_dir()


def test_completion_is_typers_own(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "SHELL": "/bin/bash"}
    # Typer looks for a shell among the processes above, and a test runner may have none.
    in_shell = ["bash", "-c", '"$@"; exit $?', "bash", *MODULE, "--show-completion", "bash"]
    shown = subprocess.run(in_shell, env=environment, capture_output=True, text=True, check=True).stdout
    assert "_G2L_COMPLETE=complete_bash" in shown
    environment |= {"_G2L_COMPLETE": "complete_bash", "COMP_WORDS": "g2l store ver", "COMP_CWORD": "2"}
    found = subprocess.run(MODULE, env=environment, capture_output=True, text=True, check=False).stdout
    assert found.split() == ["verify"]
