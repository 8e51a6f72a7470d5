"""Stage two end to end: kill -9 and resume give the same student, timm loads it, and it has learned."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from g2l_core.encoders.loading import encode_all, load_encoder
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.encoders.timm_compat import import_timm
from g2l_core.errors import UsageError
from g2l_core.store.features import FeatureStore
from pipeline.config import settings_of
from pipeline.distill import DistillHow, run_distill
from pipeline.split import split_store
from tests.conftest import TEACHER

KEY = "timm-mobilenetv3_small_050-64-random0"
STUDENT = "timm:mobilenetv3_small_050@64"


OPTIONS = {
    "steps": 12, "lr": 1e-3, "validate_every": 4, "checkpoint_every": 3, "early_stop": 0, "batch_size": 8,
    "pool_blocks": 2, "hold_out": "0.34",
}  # fmt: skip


def settings(**changes):
    return settings_of({**OPTIONS, **changes})[0]


def student():
    return resolve_encoder(STUDENT, weights="random:1")


@pytest.fixture(scope="module")
def run(cached_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "student-a"
    summary = run_distill(cached_store, KEY, student(), out, settings(), how=DistillHow(workers=1))
    return out, summary


def tensors(folder):
    return load_file(folder / "student" / "model.safetensors") | load_file(folder / "projector.safetensors")


def test_the_run_folder_tells_everything(run):
    out, summary = run
    record = json.loads((out / "run.json").read_text())
    assert record["teacher"]["name"] == TEACHER
    assert record["student"]["digest"] != record["result"]["exported"]["digest"]
    assert record["settings"]["train"]["objective"]["loss"] == "logsum"
    assert record["about"]["software"]["torch"] == torch.__version__
    assert set(record["rows"]["train"]) & set(record["rows"]["held_out"]) == set()
    assert record["held_out"].startswith("patients p")
    assert summary.after["step"] == 12
    assert len((out / "log.csv").read_text().splitlines()) == 13


def test_timm_loads_the_student_and_gives_the_encoder_s_features(run):
    out, _ = run
    network = import_timm().create_model(f"local-dir:{out}/student", pretrained=True, num_classes=0).eval()
    encoder = load_encoder(resolve_encoder(str(out)))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    config = network.pretrained_cfg
    written = json.loads((out / "student" / "config.json").read_text())
    older = import_timm().create_model(  # as versions do that know no local-dir
        written["architecture"],
        num_classes=0,
        checkpoint_path=str(out / "student" / "model.safetensors"),
        **written["model_args"],
    )
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
        expected = network(images).numpy()
        assert np.array_equal(older.eval()(images).numpy(), expected)
    assert tuple(config["input_size"]) == (3, 64, 64)
    np.testing.assert_allclose(encode_all(encoder, pixels, 2), expected, rtol=1e-4, atol=1e-4)
    assert encoder.key.startswith("student-a-")


def test_the_exported_digest_is_the_loaded_encoder_s(run):
    out, _ = run
    exported = json.loads((out / "run.json").read_text())["result"]["exported"]
    encoder = load_encoder(resolve_encoder(str(out)))
    assert (encoder.weights_digest, encoder.digest) == (exported["weights_digest"], exported["digest"])


KILLED = """
import sys
from tests.pipeline.test_distill import settings, student, KEY
from pipeline.distill import DistillHow, run_distill
out = __import__("pathlib").Path(sys.argv[2])
run_distill(sys.argv[1], KEY, student(), out, settings(), how=DistillHow(resume=True))
"""


@pytest.mark.slow
def test_kill_9_and_resume_give_the_same_student(run, cached_store, tmp_path):
    """Killed three times, each time at another step, in processes of its own."""
    out = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(cached_store), str(out)]
    for stop in (1, 5, 8):
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as running:
            while running.poll() is None and steps_logged(out) <= stop:
                time.sleep(0.01)
            running.send_signal(signal.SIGKILL)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, resumed = tensors(run[0]), tensors(out)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(out) == losses(run[0])
    assert (out / "validation.csv").read_text() == (run[0] / "validation.csv").read_text()


def steps_logged(out):
    log = out / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def losses(out):
    return [line.split(",")[2] for line in (out / "log.csv").read_text().splitlines()]


def test_the_number_of_threads_changes_nothing(run, cached_store, tmp_path):
    run_distill(cached_store, KEY, student(), tmp_path / "threads", settings(), how=DistillHow(workers=3))
    whole, threads = tensors(run[0]), tensors(tmp_path / "threads")
    assert all(torch.equal(whole[name], threads[name]) for name in whole)


def test_a_finished_run_resumes_to_itself(run, cached_store, tmp_path):
    out = shutil.copytree(run[0], tmp_path / "again")
    run_distill(cached_store, KEY, student(), out, settings(), how=DistillHow(resume=True, workers=1))
    assert all(torch.equal(tensors(run[0])[name], tensors(out)[name]) for name in tensors(out))


def test_float16_training_is_refused(cached_store, tmp_path):
    with pytest.raises(UsageError, match="fp16 cannot train"):
        run_distill(cached_store, KEY, student(), tmp_path / "run", settings(precision="fp16"))


# -- the split ---------------------------------------------------------------------------------------------


def test_whole_patients_are_held_out(cached_store):
    store = FeatureStore.open(cached_store)
    split = split_store(store, (), "0.34", seed=0)
    patients = [{store.slide(i).labels["patient_id"] for i in part} for part in (split.train, split.held_out)]
    assert [len(p) for p in patients] == [3, 3]
    assert not patients[0] & patients[1]


def test_a_condition_holds_out_and_another_selects(cached_store):
    store = FeatureStore.open(cached_store)
    split = split_store(store, ["medical_center=north"], "slide_id=p01*", seed=0)
    assert list(split.held_out) == ["p01-1"]
    assert all(store.slide(i).labels["medical_center"] == "north" for i in split.train)


def test_of_a_single_slide_rows_are_held_out_and_it_says_so(cached_store):
    split = split_store(FeatureStore.open(cached_store), ["slide_id=p01-1"], "0.1", seed=0)
    train, held_out = split.train["p01-1"], split.held_out["p01-1"]
    assert not set(train.tolist()) & set(held_out.tolist())
    assert len(held_out) >= 4
    assert "no slide or patient is held out whole" in split.description
