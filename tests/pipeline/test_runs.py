"""run.json: what another version wrote is read, compared and kept; what cannot be read is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from g2l_core.encoders.resolve import RUN_RECORD
from g2l_core.errors import RunError
from pipeline.runs import REMAINS, RunRecord, open_run, read_run, write_run
from tests.test_golden import GOLDEN


@pytest.fixture
def folder(tmp_path):
    """A run folder of 0.1.0 with what a later version might add to run.json."""
    path = tmp_path / "run"
    path.mkdir()
    record = json.loads((GOLDEN / "run" / RUN_RECORD).read_text())
    record["later"] = {"key": [1]}
    record["result"]["outcome"]["later"] = 2
    (path / RUN_RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return path


def test_what_is_read_is_written_again_byte_for_byte(folder):
    text = (folder / RUN_RECORD).read_text()
    record = read_run(folder)
    assert record.extra == {"later": {"key": [1]}}
    assert record.result.outcome.steps == 4
    write_run(folder, record)
    written = json.loads((folder / RUN_RECORD).read_text())
    assert len(written.pop("sha256")) == 64
    assert json.dumps(written, indent=2, sort_keys=True) + "\n" == text
    assert read_run(folder) == record
    shutil.copy(GOLDEN / "run" / RUN_RECORD, folder)
    assert read_run(folder).to_json() == json.loads((GOLDEN / "run" / RUN_RECORD).read_text())


def test_only_the_same_run_is_resumed(folder):
    record = replace(read_run(folder), result=None, about={"device": "another"}, extra={})
    open_run(folder, record)
    changed = replace(record, ranks=2, settings={**record.settings, "batch_size": 7})
    with pytest.raises(
        RunError,
        match=r"^use the former settings, .*--restart.*: ranks was 1, now 2; settings.batch_size was \d+, now 7",
    ):
        open_run(folder, changed)
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "step-00000004.pt").write_bytes(b"old")
    open_run(folder, changed, restart=True)
    assert [path.name for path in folder.iterdir()] == [RUN_RECORD]
    assert read_run(folder).identity() == changed.identity()


def test_a_restart_that_is_killed_leaves_a_run_that_begins_anew(folder, monkeypatch):
    """Killed at the last move, only the record is left: the same run, without a checkpoint."""
    record = replace(read_run(folder), result=None, extra={})
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "step-00000004.pt").write_bytes(b"old")
    move = Path.replace

    def killed(path, target):
        if path.name == RUN_RECORD:
            raise KeyboardInterrupt
        return move(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run(folder, record, restart=True)
    assert {path.name for path in folder.iterdir()} == {RUN_RECORD, REMAINS}
    open_run(folder, record)
    assert [path.name for path in folder.iterdir()] == [RUN_RECORD]


def test_a_record_of_an_unfinished_run_has_no_result(folder):
    record = replace(read_run(folder), result=None)
    assert "result" not in record.to_json()
    assert RunRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"teacher": 1}'])
def test_what_is_no_record_is_refused(folder, text):
    (folder / RUN_RECORD).write_text(text)
    with pytest.raises(RunError, match="run.json is no record of g2l distill"):
        read_run(folder)
