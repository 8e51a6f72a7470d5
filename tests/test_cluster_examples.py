"""The examples for Slurm and Nextflow, dry: what they would start is what g2l takes, and the parts make the whole."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from g2l_core.benchmark.task_file import read_tasks
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from tests.conftest import TEACHER
from tests.documents import ROOT, g2l_commands, parse
from tests.pipeline.test_cli import KEY, g2l

EXAMPLES = ROOT / "docs" / "examples"
SLURM, NEXTFLOW = EXAMPLES / "slurm", EXAMPLES / "nextflow"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
RECORD = '#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@" "" >> "$RECORDED"\n'


@pytest.fixture
def node(cohort, tmp_path, monkeypatch):
    """A node of a cluster in the folder of the manifest; gives a function that starts a script on it."""
    folder, programs = tmp_path / "work", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    shutil.copytree(cohort.parent / "slides", folder / "slides")
    shutil.copy(cohort, folder / "slides.csv")
    monkeypatch.chdir(folder)
    known = dict(os.environ) | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RECORDED": str(tmp_path / "recorded"),
        "SLURM_JOB_ID": "17",
        "SLURM_ARRAY_TASK_MIN": "4",
        "SLURM_ARRAY_TASK_COUNT": "2",
        "SLURM_GPUS_ON_NODE": "2",
    }

    def start(name, *arguments, then="", **variables):
        for program in ("g2l", "torchrun", "scontrol"):
            (programs / program).write_text(RECORD + (then if program == "g2l" else ""), encoding="utf-8")
            (programs / program).chmod(0o755)
        (tmp_path / "recorded").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", SLURM / name, *arguments], env=known | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def recorded():
        path = tmp_path / "recorded"
        calls = path.read_text(encoding="utf-8").split("\n\n")[:-1] if path.exists() else []
        return [call.split("\n") for call in calls]

    def run(name, *arguments, **variables):
        script = start(name, *arguments, **variables)
        told = script.communicate(timeout=60)[0].decode()
        return script.returncode, told, recorded()

    run.start, run.recorded = start, recorded
    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_and_tells_slurm_what_it_needs(script):
    assert len(SCRIPTS) == 2
    subprocess.run(["bash", "-n", script], check=True)
    asked = re.findall(r"^#SBATCH (--[\w-]+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"--time", "--signal", "--requeue", "--open-mode", "--gres"} <= set(asked)


def test_the_jobs_of_an_array_make_one_store(node):
    for task in ("4", "5"):
        code, told, calls = node("cache-teacher.sbatch", "slides.csv", "parts", TEACHER, SLURM_ARRAY_TASK_ID=task)
        assert (code, told, len(calls)) == (0, "", 1)
        parse(calls[0][1:])
        assert g2l(*calls[0][1:], "--weights", "random:0").returncode == 0
    parts = [[s.slide_id for s in FeatureStore.open(f"parts/{part}.zarr").slides()] for part in (0, 1)]
    assert list(map(len, parts)) == [3, 3]

    code, _, calls = node("distill.sbatch", "slides.csv", "parts", "h-optimus-0", "hibou-l")
    assert code == 0
    (merge, *others) = calls
    assert g2l(*merge[1:]).returncode == 0
    store = FeatureStore.open("store.zarr")
    assert sorted(s.slide_id for s in store.slides()) == sorted(parts[0] + parts[1])
    assert list(verify(store)) == []
    assert KEY in store.encoders
    assert [call[0] for call in others] == ["torchrun", "g2l", "g2l"]
    for call in others:
        parse(call[call.index("distill") :] if call[0] == "torchrun" else call[1:])

    _, _, calls = node("distill.sbatch", "slides.csv", "parts", "h-optimus-0", "hibou-l")
    assert "merge" not in calls[0]  # the store is there already


def test_a_job_without_slides_ends_well(node):
    everything = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "9", "SLURM_ARRAY_TASK_ID": "8"}
    code, told, calls = node("cache-teacher.sbatch", "slides.csv", "parts", "h-optimus-0", **everything)
    assert (code, told, calls) == (0, "no slide is left for this job\n", [])


@pytest.mark.parametrize(("theirs", "ours"), [(0, 0), (1, 0), (2, 2), (70, 70)])
def test_failed_slides_are_no_failed_job_and_refusals_are(node, theirs, ours):
    here = {"SLURM_ARRAY_TASK_ID": "4", "then": f"exit {theirs}\n"}
    assert node("cache-teacher.sbatch", "slides.csv", "parts", "h-optimus-0", **here)[0] == ours


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_missing_argument_is_named(script, node):
    code, told, calls = node(script.name, "slides.csv")
    assert code != 0
    assert "PARTS is missing" in told
    assert calls == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_before_the_time_limit_a_job_goes_into_the_queue_again(script, node):
    """Slurm signals the script alone (B:USR1), which ends the command and asks for another turn."""
    job = node.start(script.name, "slides.csv", "parts", "a", "b", then="exec sleep 60\n", SLURM_ARRAY_TASK_ID="4")
    until = time.monotonic() + 20
    while not node.recorded() and time.monotonic() < until:
        time.sleep(0.02)
    begin = time.monotonic()
    job.send_signal(signal.SIGUSR1)
    told = job.communicate(timeout=20)[0].decode()
    assert time.monotonic() - begin < 15
    assert job.returncode == 0
    assert "requeued" in told
    assert [call for call in node.recorded() if call[0] == "scontrol"] == [["scontrol", "requeue", "17"]]


def processes():
    """The processes of main.nf by name, each with its text."""
    text = (NEXTFLOW / "main.nf").read_text(encoding="utf-8")
    return dict(re.findall(r"^process (\w+) \{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE))


def as_bash(groovy):
    """A script block as Nextflow hands it to bash, every value in it a word."""
    text = re.sub(r"(?<!\\)\$\{[^}]*views\}|(?<!\\)\$\{task.cpus\}", "2", groovy)
    text = re.sub(r"(?<!\\)\$\{([^}]*)\}", lambda found: re.sub(r"\W", "_", found[1]), text)
    return text.replace("\\\\", "\\").replace("\\$", "$")


def test_nextflow_processes_call_g2l_as_it_is():
    called = []
    for name, text in processes().items():
        (script,) = re.findall(r'script:\s+"""(.*?)"""', text, re.DOTALL)
        for arguments in g2l_commands(as_bash(script)):
            parse(arguments)
            called.append((name, arguments[0]))
        subprocess.run(["bash", "-n"], input=as_bash(script), text=True, check=True)
    assert called == [
        ("CACHE_TEACHER", "cache-teacher"), ("MERGE", "store"), ("DISTILL", "distill"),
        ("BENCH", "store"), ("BENCH", "embed"), ("BENCH", "bench"),
    ]  # fmt: skip


def test_nextflow_outputs_are_what_scripts_and_stubs_write():
    for text in processes().values():
        (output,) = re.findall(r"output:\n    path ['\"](.+?)['\"]\n", text)
        (script,) = re.findall(r'script:\s+"""(.*?)"""', text, re.DOTALL)
        (stub,) = re.findall(r'stub:\s+"""(.*?)"""', text, re.DOTALL)
        assert f"mkdir {output}" in stub
        assert re.search(rf"--(?:out|store) {re.escape(output)}(?!\S)", script)


def test_nextflow_names_only_what_there_is():
    text = (NEXTFLOW / "main.nf").read_text(encoding="utf-8")
    config = (NEXTFLOW / "nextflow.config").read_text(encoding="utf-8")
    assert set(re.findall(r"params\.(\w+)", text)) == set(re.findall(r"^params\.(\w+) =", text, re.MULTILINE))
    workflow = text[text.index("\nworkflow {") :]
    assert set(re.findall(r"\b([A-Z]+(?:_[A-Z]+)*)\b(?=\(|\.out)", workflow)) == set(processes())
    for label in set(re.findall(r"label '(\w+)'", text)):
        assert f"withLabel: {label}" in config
    for each in (text, config):
        code = re.sub(r"//.*", "", each)
        assert code.count("{") == code.count("}")
        assert code.count("(") == code.count(")")


def test_the_nextflow_workflow_runs_its_stubs(cohort, tmp_path):
    if not shutil.which("nextflow"):
        pytest.skip("needs nextflow")
    shutil.copytree(NEXTFLOW, tmp_path / "flow")
    command = ["nextflow", "run", "main.nf", "-stub-run", "--manifest", str(cohort), "--slides_per_part", "2"]
    subprocess.run(command, cwd=tmp_path / "flow", check=True, timeout=300)
    assert Path(tmp_path, "flow", "results", "report").is_dir()


@pytest.mark.parametrize("folder", [SLURM, NEXTFLOW], ids=lambda path: path.name)
def test_their_task_files_are_read(folder):
    _, tasks = read_tasks(folder / "tasks.toml")
    assert [task.name for task in tasks] == ["similarity"]


@pytest.mark.parametrize("name", ["slurm", "nextflow"])
def test_they_are_had_without_a_clone(name, tmp_path):
    done = g2l("init", tmp_path / "here", "--example", name)
    assert done.returncode == 0, done.stderr
    theirs = {path.name: path.read_bytes() for path in (EXAMPLES / name).iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()} == theirs
