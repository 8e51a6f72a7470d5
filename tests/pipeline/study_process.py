"""`g2l run` in a process that a test may kill at any moment, forked from one that has imported torch already."""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from g2l_core.encoders.timm_compat import import_timm
from pipeline.cli import main as command_line
from pipeline.study import run_study  # noqa: F401  imported here, and so once for all processes

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__])
import_timm()


def start(folder: Path, *arguments: str) -> BaseProcess:
    """Begin `g2l run` in a folder."""
    process = _SERVER.Process(target=_run, args=(folder, arguments))
    process.start()
    return process


def _run(folder: Path, arguments: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = ["g2l", "run", *arguments]
    command_line.main()
