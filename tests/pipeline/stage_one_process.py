"""Stage one in a process that a test may kill at any moment.

The processes are forked from a server that has imported torch and timm already: importing takes longer than the work.
"""

import json
import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.encoders.timm_compat import import_timm
from g2l_core.extraction import batching
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.store import schema
from pipeline.cache_teacher import run_extraction
from pipeline.extract import ExtractionSettings
from tests.conftest import TEACHER

SHARD_ROWS, BATCH_SIZE, N_VIEWS = 2, 8, 9

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__])
import_timm()


def start(manifest: Path, store: Path, log: Path) -> BaseProcess:
    """Begin stage one; `log` gets one byte for each batch, and `log`.json the summary at the end."""
    process = _SERVER.Process(target=_run, args=(manifest, store, log))
    process.start()
    return process


def _run(manifest: Path, store: Path, log: Path) -> None:
    torch.set_num_threads(1)
    schema.SHARD_ROWS, schema.CHUNK_ROWS = SHARD_ROWS, 2
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    encode = batching.encode

    def logged_encode(encoder, pixels):
        os.write(file, b"b")  # at once, so that it outlives the process
        return encode(encoder, pixels)

    batching.encode = logged_encode
    settings = ExtractionSettings(views=N_VIEWS - 1, batch_size=BATCH_SIZE)
    encoder = resolve_encoder(TEACHER, weights="random:0")
    summary = run_extraction([manifest], store, [encoder], GridSpec(), ViewSpec(), settings)
    facts = {"complete": summary.is_complete, "patches": summary.patches, "encoded": summary.encoded}
    log.with_suffix(".json").write_text(json.dumps(facts))
