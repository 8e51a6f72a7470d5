"""Commands in processes that a test may kill at any moment.

They are forked from a server that has imported torch and timm already: importing takes longer than the work.
"""

import importlib
import multiprocessing
import os
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import matplotlib.figure
import torch

import g2l_core.benchmark.evaluate
import g2l_core.report.write  # noqa: F401
from g2l_core.encoders.timm_compat import import_timm
from g2l_core.store.export import export_trident
from g2l_core.store.features import FeatureStore
from pipeline.bench import run_bench
from pipeline.settings import DistillHow
from pipeline.sweep import read_sweep, run_sweep
from tests.faults.small_run import KEY, STUDENT, STUDENT_WEIGHTS, distill

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__])
import_timm()
matplotlib.use("svg")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("torch.utils.tensorboard")


def start(command: str, inputs: Path, out: Path) -> BaseProcess:
    """Begin a command. `inputs` holds s.zarr, tasks.toml, labels.csv and seeds.toml; it is given at most 60 s."""
    process = _SERVER.Process(target=_run, args=(command, inputs, out))
    process.start()
    return process


def start_g2l(words: list[str], environment: dict[str, str]) -> BaseProcess:
    """Begin a command line of g2l, its output unseen."""
    process = _SERVER.Process(target=_run_g2l, args=(words, environment))
    process.start()
    return process


def _run_g2l(words: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    from pipeline.cli.main import app

    app(words)


def _encoders(inputs: Path) -> list[str]:
    return [KEY, (inputs / "student").read_text()]


def _run(command: str, inputs: Path, out: Path) -> None:
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    commands: dict[str, Callable[[], object]] = {
        "distill": lambda: distill(inputs / "s.zarr", out, steps=4, validate_every=2, checkpoint_every=1),
        "bench": lambda: run_bench(inputs / "tasks.toml", [inputs / "s.zarr"], _encoders(inputs), out, draws=100),
        "export": lambda: export_trident(FeatureStore.open(inputs / "s.zarr"), KEY, out),
        "sweep": lambda: run_sweep(
            read_sweep(str(inputs / "seeds.toml"), []), inputs / "s.zarr", KEY, STUDENT, STUDENT_WEIGHTS, out,
            DistillHow(resume=True, workers=1, device="cpu"),
        ),
    }  # fmt: skip
    commands[command]()
