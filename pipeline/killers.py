"""Slides that may have ended a process are read alone, in a process of their own, before a run reads them again.

`python -m pipeline.killers` is that process. It opens the slide, finds its patches, and decodes all of them.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from g2l_core.errors import ReadError
from g2l_core.extraction.patching import patch_source
from g2l_core.patches.render import ImagePatches, SlidePatches
from g2l_core.patches.spec import GridSpec
from g2l_core.slides.boundary import SlideTimeoutError, within
from g2l_core.slides.manifest import Source
from g2l_core.slides.slide import open_slide
from g2l_core.slides.under_way import UnderWay
from g2l_core.tissue.methods import NONE, THRESHOLDS
from g2l_core.tissue.thresholds import THUMBNAIL_MPP
from g2l_core.types import Level0Px, SlideId
from pipeline.progress import say
from pipeline.settings import ExtractionSettings

BEGUN, DONE = "begun", "done"
"""What the process prints. One that prints the first and not the second was ended by the slide."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of the slides that may have ended a process."""

    sources: tuple[Source, ...]
    """The sources that can be read."""
    blamed: dict[str, str]
    """Why the others cannot, by id."""
    left_out: tuple[Source, ...]
    """The others."""
    acquitted: frozenset[str]
    """Slides that were suspects or blamed, and can be read."""


def without_killers(sources: Sequence[Source], store: Path, grid: GridSpec, settings: ExtractionSettings) -> Trial:
    """Leave out the slides that end the process that reads them.

    A slide that was under way when a process ended is only a suspect: there may have been several, and the process may
    have been killed. So each is read alone first. What was blamed stays so until `settings.retry_failed`.
    """
    watch = UnderWay(store)
    blamed = watch.blamed()
    doubtful = {*watch.suspects(), *(blamed if settings.retry_failed else ())}
    acquitted = set[str]()
    for source in sources:
        if source.slide_id in doubtful:
            say(f"slide {source.slide_id} was being read when a process ended; it is read alone first")
            reason = read_alone(source, grid, settings)
            if reason:
                watch.blame(source.slide_id, reason)
                blamed[source.slide_id] = reason
            else:
                watch.acquit(source.slide_id)
                blamed.pop(source.slide_id, None)
                acquitted.add(source.slide_id)
    left_out = tuple(source for source in sources if source.slide_id in blamed)
    return Trial(
        sources=tuple(source for source in sources if source.slide_id not in blamed),
        blamed={source.slide_id: blamed[source.slide_id] for source in left_out},
        left_out=left_out,
        acquitted=frozenset(acquitted),
    )


def read_alone(source: Source, grid: GridSpec, settings: ExtractionSettings) -> str:
    """Read a slide in a process of its own; why that process ended before its time, empty if it did not."""
    case: dict[str, Any] = {
        "slide_id": source.slide_id,
        "path": str(source.path),
        "patch_ids": source.patch_ids,
        "mpp": source.mpp,
        "mpp_override": settings.mpp_override,
        "timeout": settings.slide_timeout,
        "grid": grid.to_json(),
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pipeline.killers"],  # -P: the working folder may hold another pipeline.py
        input=json.dumps(case),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    said = done.stdout.split()
    if BEGUN not in said or DONE in said:
        return ""
    code = done.returncode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    memory = ", for want of memory perhaps" if how == "SIGKILL" else ""
    return f"the process ended while this slide was read ({how}{memory}), and again when it was read alone"


def _read_all(case: dict[str, Any]) -> None:
    """Do with a slide what stage one does with it, but for the encoding."""
    grid, timeout = GridSpec.from_json(case["grid"]), case["timeout"]
    source = Source(
        slide_id=SlideId(case["slide_id"]), path=Path(case["path"]), patch_ids=tuple(case["patch_ids"]), mpp=case["mpp"]
    )
    if source.patch_ids:
        images = ImagePatches(source.path, source.patch_ids, grid.patch_px, icc=grid.icc)
        _read_rows(images, len(source.patch_ids), timeout)
        return
    scale = {"manifest_mpp": source.mpp, "mpp_override": case["mpp_override"]}
    slide = within(timeout, lambda: open_slide(source.path, **scale, icc=grid.icc), "opening")
    within(timeout, lambda: slide.read_thumbnail(THUMBNAIL_MPP), "its thumbnail")
    if grid.tissue not in {*THRESHOLDS, NONE}:
        grid = replace(grid, tissue=NONE)  # a network or annotations: their files are not known here
    patched = within(timeout, lambda: patch_source(source, grid, case["mpp_override"]), "its tissue")
    side = Level0Px(patched.facts.patch_px_level0)
    _read_rows(SlidePatches(slide, patched.coords, side, grid.patch_px), len(patched.coords), timeout)


def _read_rows(reader: ImagePatches | SlidePatches, n: int, timeout: float | None) -> None:
    for row in range(n):
        try:
            within(timeout, lambda row=row: reader.read(row), "a patch")  # type: ignore[misc]
        except SlideTimeoutError:
            raise
        except ReadError:
            continue


def main() -> None:
    """Read the slide that the standard input describes."""
    case = json.loads(sys.stdin.read())
    os.write(1, f"{BEGUN}\n".encode())
    with suppress(Exception):  # the run meets it again, and says it
        _read_all(case)
    os.write(1, f"{DONE}\n".encode())
    os._exit(0)  # stuck threads are not waited for


if __name__ == "__main__":
    main()
