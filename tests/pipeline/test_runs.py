"""run.json: what another version wrote is read, compared and kept; what cannot be read is refused."""

import json
import shutil
from dataclasses import replace

import pytest

from g2l_core.encoders.resolve import RUN_RECORD
from g2l_core.errors import RunError
from pipeline.runs import RunRecord, open_run, read_run, write_run
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
    open_run(folder, record, resume=True)
    with pytest.raises(RunError, match="holds a run already: --resume continues it"):
        open_run(folder, record, resume=False)
    changed = replace(record, ranks=2, settings={**record.settings, "batch_size": 7})
    with pytest.raises(
        RunError, match=r"begun with other settings: ranks was 1, now 2; settings.batch_size was \d+, now 7"
    ):
        open_run(folder, changed, resume=True)


def test_a_record_of_an_unfinished_run_has_no_result(folder):
    record = replace(read_run(folder), result=None)
    assert "result" not in record.to_json()
    assert RunRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"teacher": 1}'])
def test_what_is_no_record_is_refused(folder, text):
    (folder / RUN_RECORD).write_text(text)
    with pytest.raises(RunError, match="run.json is no record of g2l distill"):
        read_run(folder)
