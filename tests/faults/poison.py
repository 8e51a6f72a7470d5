"""Preloaded by dask workers: opening a slide whose name says so ends the process, or takes memory.

`poison` aborts, as a C library does; `killed` is ended as the system does it for want of memory; `hungry` takes memory
until its nanny ends it; and `heavy` takes what makes its worker pause, and goes on.
"""

import os
import signal
import time

import numpy as np
import psutil
from distributed import get_worker

from g2l_core.patches import render
from g2l_core.slides.slide import open_slide

HELD = []


def take_memory(share):
    """Hold so much of the worker's memory limit, and give its monitor the time to notice."""
    limit = get_worker().memory_manager.memory_limit
    while psutil.Process().memory_info().rss < share * limit:
        HELD.append(np.ones(1 << 24, np.uint8))
        time.sleep(0.01)
    time.sleep(1)


def open_or_die(path, **how):
    if "poison" in path.name:
        os.abort()
    if "killed" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hungry" in path.name:
        take_memory(1.5)
    if "heavy" in path.name:
        take_memory(0.85)
    return open_slide(path, **how)


def dask_setup(_worker):
    """Only in a worker: a test process that imports this module opens slides as ever."""
    render.open_slide = open_or_die
