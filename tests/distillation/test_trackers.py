"""W&B and MLflow get what the CSV files have, in their own offline forms, and none of them can end a training."""

import importlib.util
import time

import pytest

from g2l_core.distillation import trackers
from g2l_core.distillation.logs import TrainingLogs
from g2l_core.distillation.trackers import Tracking, open_trackers, parse_trackers, require_trackers
from g2l_core.errors import RunError, UsageError
from pipeline.settings import DistillHow

ROWS = [
    ("train", {"step": 0, "loss": 2.0}),
    ("train", {"step": 1, "loss": 1.5}),
    ("held out", {"step": 2, "cka@64": 0.5}),
]


def write(folder, *names, rows=ROWS, config=None):
    notes = []
    for tracker in open_trackers(Tracking(names=names, config=config or {"a": {"b": 3}}), folder, 0, notes.append):
        for group, row in rows:
            tracker.add(group, row)
        tracker.close()
    return notes


def test_mlflow_has_every_value_and_a_resumed_run_is_the_same_one(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="MLflow is not installed (the extra mlflow)")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert write(tmp_path, "mlflow") == []
    assert write(tmp_path, "mlflow", rows=[("train", {"step": 2, "loss": 1.0})]) == []
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "g2l"]
    (run,) = client.search_runs([experiment.experiment_id])
    found = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert found == [(0, 2.0), (1, 1.5), (2, 1.0)]
    assert run.data.metrics["held out/cka_64"] == 0.5
    assert run.data.params["a.b"] == "3"
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")


def test_wandb_writes_its_offline_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="W&B is not installed (the extra wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert write(tmp_path, "wandb") == []
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert (tmp_path / "wandb-run.txt").read_text().strip() in file.name
    wanted, until = (b"train/loss", b"1.5", b"held out/cka@64", b"0.5"), time.monotonic() + 20
    while not all(text in file.read_bytes() for text in wanted):  # records as they are; another process writes them
        assert time.monotonic() < until
        time.sleep(0.1)
    assert wandb.run is None


class Broken:
    """A tracker that fails at its second row."""

    def __init__(self, *_):
        self.rows = 0

    def add(self, group, row):
        self.rows += 1
        if self.rows == 2:
            raise ConnectionResetError("the server has gone\nand more")

    def close(self):
        raise AssertionError("it has failed and is not asked again")


def test_one_that_fails_is_told_of_once_and_the_csv_has_all(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_Wandb", Broken)
    monkeypatch.setattr(trackers, "require_trackers", lambda names: None)
    notes = []
    logs = TrainingLogs(tmp_path, 0, Tracking(names=("wandb",)), notes.append)
    logs.validation({"step": 0, "figure": 1.0})
    for step in range(50):
        logs.step({"step": step, "loss": 1.0})
    logs.close()
    assert notes == ["wandb failed and gets no more values (the server has gone); training goes on, log.csv has all"]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 51


def test_one_that_hangs_does_not_keep_training(tmp_path, monkeypatch):
    class Hanging(Broken):
        def add(self, group, row):
            time.sleep(30)

    monkeypatch.setattr(trackers, "_Wandb", Hanging)
    monkeypatch.setattr(trackers, "require_trackers", lambda names: None)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    begin = time.monotonic()
    (note,) = write(tmp_path, "wandb")
    assert time.monotonic() - begin < 5
    assert "has not taken all values" in note


def test_one_that_cannot_begin_is_refused_before_training(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no login")

    monkeypatch.setattr(trackers, "_Mlflow", refuse)
    monkeypatch.setattr(trackers, "require_trackers", lambda names: None)
    with pytest.raises(RunError, match=r"--log-to mlflow: it cannot begin \(no login\)"):
        write(tmp_path, "mlflow")


def test_what_is_not_installed_is_refused_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name, extra in trackers.EXTRAS.items():
        with pytest.raises(UsageError, match=rf"g2l\[{extra}\]"):
            require_trackers([name])
    require_trackers(["auto"])


def test_names_as_users_write_them():
    assert parse_trackers("wandb, tensorboard,wandb") == ("wandb", "tensorboard")
    assert parse_trackers("auto") == DistillHow().log_to
    with pytest.raises(UsageError, match="stands alone"):
        parse_trackers("auto,wandb")
    with pytest.raises(UsageError, match="tracker"):
        parse_trackers("neptune")
