"""One bad slide costs that slide: exceptions of any type, slides that end the process, slides that hang."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from g2l_core.errors import NotASlideError, ReadError, SlideError, StoreError
from g2l_core.slides.boundary import SlideTimeoutError, slide_errors, within
from g2l_core.slides.under_way import UnderWay
from g2l_core.store.features import FeatureStore
from tests.conftest import TEACHER
from tests.pipeline.test_cli import G2L

ROOT = Path(__file__).resolve().parents[2]

READER = '''
"""A reader whose files say how it goes wrong: KIND PLACE ID, in a file that ends in .trap."""
import os, signal, sys, time
from pathlib import Path
import cv2, numpy, openslide
from PIL import Image

def go_wrong(kind):
    if Path("mended").exists():
        return
    if kind == "cv2":
        cv2.resize(numpy.zeros((0, 0, 3), "u1"), (3, 3))
    elif kind == "hang":
        time.sleep(3600)
    elif kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "exit":
        os._exit(3)
    elif kind == "abort":
        os.abort()
    elif kind != "fine":
        raise {"IndexError": IndexError, "TypeError": TypeError, "MemoryError": MemoryError,
               "RecursionError": RecursionError, "ZeroDivisionError": ZeroDivisionError}[kind]("of the trap")

class Trap(openslide.ImageSlide):
    def __init__(self, path):
        self.kind, self.place, seed = path.read_text().split()
        noise = numpy.random.default_rng(int(seed)).integers(0, 40, (520, 600, 3), "u1")
        pixels = noise + numpy.array([200, 80, 160], "u1")
        super().__init__(Image.fromarray(pixels))
        if self.place == "open":
            go_wrong(self.kind)

    @property
    def properties(self):
        return {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5"}

    def read_region(self, location, level, size):
        wide = size[0] > 300
        if self.place == ("thumbnail" if wide else "patch"):
            go_wrong(self.kind)
        if Path("slow").exists() and not wide:
            Path("reading").touch()
            time.sleep(0.3)
        return super().read_region(location, level, size)

def open_trap(path):
    return Trap(path) if path.suffix == ".trap" else None

open_trap.suffixes = [".trap"]
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An installed plug-in."""
    site = tmp_path_factory.mktemp("site")
    info = site / "trap-1.0.dist-info"
    info.mkdir()
    (site / "trap.py").write_text(READER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trap\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[g2l.readers]\ntrap = trap:open_trap\n")
    return site


def traps(folder: Path, **kinds: str) -> Path:
    folder.mkdir()
    for number, (name, kind) in enumerate(sorted(kinds.items())):
        (folder / f"{name}.trap").write_text(f"{kind} {number}" if " " in kind else f"{kind} nowhere {number}")
    return folder


def start(site, folder: Path, store: Path, *more: object, before: Sequence[str] = ()) -> subprocess.Popen:
    command = [*G2L, *before, "cache-teacher", folder, "--store", store, "--teacher", TEACHER, "--weights", "random:0"]
    command += ["--views", "0", "--tissue", "none", "--mpp", "0.5", *more]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(site, folder: Path, store: Path, *more: object, before: Sequence[str] = ()) -> subprocess.CompletedProcess:
    process = start(site, folder, store, *more, before=before)
    out, told = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, told)


def failures(done: subprocess.CompletedProcess) -> dict[str, str]:
    """The reason by slide; slides that share one are named in one line, as `2 slides, a, b: reason`."""
    lines = (line for line in done.stderr.splitlines() if line.startswith("failed  "))
    told = (line.removeprefix("failed  ").split(": ", 1) for line in lines)
    return {name: reason for names, reason in told for name in re.sub(r"^\d+ slides, ", "", names).split(", ")}


def leftovers(store: Path) -> list[str]:
    return [path.name for path in store.parent.glob(".*under-way/*")]


# -- exceptions -------------------------------------------------------------------------------------------

KINDS = ("IndexError", "TypeError", "MemoryError", "RecursionError", "ZeroDivisionError", "cv2")
PLACES = ("open", "thumbnail", "patch")


def test_any_exception_anywhere_costs_that_slide(site, tmp_path):
    bad = {f"{kind}-{place}": f"{kind} {place}" for kind in KINDS for place in PLACES}
    folder, store = traps(tmp_path / "in", good="fine", **bad), tmp_path / "s.zarr"
    done = run(site, folder, store, "--tissue", "otsu", "--min-tissue", "0")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    told = failures(done)
    assert set(told) == set(bad)
    for name, reason in told.items():
        kind = name.partition("-")[0]
        assert ("error" if kind == "cv2" else kind) in reason
        assert "in trap.py, line " in reason
    assert {slide.slide_id for slide in FeatureStore.open(store).slides()} >= {"good"}
    assert leftovers(store) == []


def test_debug_shows_where_it_went_wrong(site, tmp_path):
    folder = traps(tmp_path / "in", bad="IndexError open", good="fine")
    done = run(site, folder, tmp_path / "s.zarr", before=["--debug"])
    assert done.returncode == 1
    assert 'raise {"IndexError"' in done.stderr
    assert "IndexError: of the trap" in done.stderr


def test_errors_of_g2l_and_the_end_of_the_program_pass():
    for error in (StoreError("full"), ReadError("torn"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)), slide_errors(SlideError):
            raise error
    unsaid = r"MemoryError in test_bad_slides.py, line \d+: no more is said"
    with pytest.raises(NotASlideError, match=unsaid), slide_errors(NotASlideError):
        raise MemoryError


# -- slides that end the process --------------------------------------------------------------------------


def killed_and_named(site, folder: Path, store: Path, word: str) -> None:
    """The first process is ended by the slide `bad`; the second says which it was, and does the others."""
    first = run(site, folder, store)
    assert first.returncode not in {0, 1, 2}
    assert leftovers(store)
    second = run(site, folder, store)
    assert second.returncode == 1, second.stderr
    assert list(failures(second)) == ["bad"]
    assert f"the process ended while this slide was read ({word}" in failures(second)["bad"]


@pytest.mark.parametrize(("kind", "word"), [("abort open", "SIGABRT"), ("exit thumbnail", "exit code 3")])
def test_a_slide_that_ends_the_process_is_named_by_the_next(site, tmp_path, kind, word):
    folder = traps(tmp_path / "in", bad=kind, good="fine", good2="fine")
    killed_and_named(site, folder, tmp_path / "s.zarr", word)
    assert {slide.slide_id for slide in FeatureStore.open(tmp_path / "s.zarr").slides()} == {"good", "good2"}


@pytest.mark.parametrize("kind", ["abort open", "exit patch"])
def test_bench_counts_a_slide_that_ended_the_process_among_its_class(site, tmp_path, kind):
    traps(tmp_path / "in", bad=kind, g1="fine", g2="fine", g3="fine", g4="fine")
    rows = [f"in/{name}.trap,{kind},{name},{part}" for name, kind, part in [
        ("bad", "a", "train"), ("g1", "a", "train"), ("g2", "b", "train"), ("g3", "a", "test"), ("g4", "b", "test"),
    ]]  # fmt: skip
    manifest, store = tmp_path / "m.csv", tmp_path / "s.zarr"
    manifest.write_text("\n".join(["path,kind,patient_id,split", *rows]))
    killed_and_named(site, manifest, store, "SIGABRT" if kind == "abort open" else "exit code 3")
    assert FeatureStore.open(store).failed_labels() == {"bad": {"kind": "a", "patient_id": "bad", "split": "train"}}
    (tmp_path / "t.toml").write_text('[tasks.t]\nlabel = "kind"\nsplit = "split"\nmetrics = ["knn"]\nknn_k = 3\n')
    (tmp_path / "l.toml").write_text((tmp_path / "t.toml").read_text() + 'labels = "labels.csv"\n')
    (tmp_path / "labels.csv").write_text("slide_id,kind\nbad,a\ng1,a\ng2,b\ng3,a\ng4,b\n")
    (encoder,) = FeatureStore.open(store).encoders
    for tasks in ("t.toml", "l.toml"):
        done = subprocess.run(
            [*G2L, "bench", tmp_path / tasks, "--store", store, "--encoders", encoder, "--out", tmp_path / "out"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "left out, failed in stage one: 1 slide (bad), 1 of a" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_slide_that_ends_the_process_stays_out_until_it_is_retried(site, tmp_path):
    folder, store = traps(tmp_path / "in", bad="segfault patch", good="fine"), tmp_path / "s.zarr"
    killed_and_named(site, folder, store, "SIGSEGV")
    third = run(site, folder, store)
    assert list(failures(third)) == ["bad"]
    assert "read alone first" not in third.stderr
    again = run(site, folder, store, "--retry-failed")
    assert list(failures(again)) == ["bad"]
    assert "read alone first" in again.stderr
    (tmp_path / "mended").touch()
    mended = run(site, folder, store, "--retry-failed")
    assert mended.returncode == 0, mended.stderr
    assert leftovers(store) == []
    for slide in FeatureStore.open(store).slides():
        assert np.isfinite(slide.features(slide.encoder_keys[0], view=0)).all()


@pytest.mark.slow
def test_an_innocent_slide_is_not_lost_by_kills(site, tmp_path):
    folder, store = traps(tmp_path / "in", good="fine", good2="fine", good3="fine"), tmp_path / "s.zarr"
    (tmp_path / "slow").touch()
    for how in (signal.SIGKILL, signal.SIGTERM):  # twice in a row at the same slide
        (tmp_path / "reading").unlink(missing_ok=True)
        process = start(site, folder, store)
        while not (tmp_path / "reading").exists() or not leftovers(store):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(how)
        process.communicate(timeout=60)
        assert leftovers(store)
    (tmp_path / "slow").unlink()
    done = run(site, folder, store)
    assert done.returncode == 0, done.stderr
    assert "read alone first" in done.stderr
    assert leftovers(store) == []
    assert len(list(FeatureStore.open(store).slides())) == 3


def test_ctrl_c_leaves_no_suspects(site, tmp_path):
    folder, store = traps(tmp_path / "in", good="fine", good2="fine"), tmp_path / "s.zarr"
    (tmp_path / "slow").touch()
    process = start(site, folder, store)
    while not (tmp_path / "reading").exists() or not leftovers(store):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert leftovers(store) == []


def test_marks_of_a_living_process_are_no_suspects(tmp_path):
    watch, other = UnderWay(tmp_path / "s.zarr"), UnderWay(tmp_path / "s.zarr")
    with watch.reading("a/b"), watch.reading("a/b"), watch.reading("c\n"):
        assert other.suspects() == []
    assert list(tmp_path.rglob("*.slide")) == []
    code = "import os, sys; from pathlib import Path; from g2l_core.slides.under_way import UnderWay;"
    code += "mark = UnderWay(Path(sys.argv[1])).reading('a/b'); mark.__enter__(); os._exit(0)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "s.zarr"], check=True, env=environment)
    assert watch.suspects() == ["a/b"]
    watch.blame("a/b", "why")
    assert (watch.suspects(), watch.blamed()) == ([], {"a/b": "why"})
    watch.acquit("a/b")
    assert list(tmp_path.iterdir()) == []


def test_marks_that_cannot_be_written_stop_nothing(tmp_path):
    (tmp_path / ".s.zarr.under-way").write_text("in the way")
    watch = UnderWay(tmp_path / "s.zarr")
    with watch.reading("a"):
        assert watch.suspects() == []
    watch.blame("a", "why")
    assert watch.blamed() == {}


# -- slides that hang -------------------------------------------------------------------------------------


def test_slides_that_hang_fail_by_name_and_nobody_waits(site, tmp_path):
    bad = {f"hang-{place}": f"hang {place}" for place in PLACES}
    folder, store = traps(tmp_path / "in", good="fine", **bad), tmp_path / "s.zarr"
    begin = time.monotonic()
    done = run(site, folder, store, "--tissue", "otsu", "--min-tissue", "0", "--slide-timeout", "1")
    assert time.monotonic() - begin < 60
    assert done.returncode == 1, done.stderr
    assert set(failures(done)) == set(bad)
    for reason in failures(done).values():
        assert "takes longer than 1 s (--slide-timeout)" in reason
    assert [slide.slide_id for slide in FeatureStore.open(store).slides() if slide.encoder_keys] >= ["good"]


def test_what_hangs_and_what_is_slow():
    over = threading.Event()
    with pytest.raises(SlideTimeoutError, match=r"^opening takes longer than 0.05 s \(--slide-timeout\)$"):
        within(0.05, over.wait, "opening")
    over.set()  # the thread ends, so that no later test ends the process on its account
    while any(thread.name == "g2l-slide" for thread in threading.enumerate()):
        time.sleep(0.01)
    assert within(5, lambda: 3, "opening") == 3
    assert within(None, threading.get_ident, "opening") == threading.get_ident()
    with pytest.raises(TimeoutError, match="its own"):
        within(5, own_timeout, "opening")


def own_timeout():
    raise TimeoutError("its own")
