"""Preloaded by dask workers: opening a slide whose name says so ends the process, as an abort in a C library does."""

import os

from g2l_core.patches import render
from g2l_core.slides.slide import open_slide


def open_or_die(path, **how):
    if "poison" in path.name:
        os.abort()
    return open_slide(path, **how)


render.open_slide = open_or_die
