"""Whoever can open no file knows nothing about its content: it is never taken for damaged, absent or unreadable."""

import errno
import os
from functools import partial
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from g2l_core.distillation import checkpoints
from g2l_core.distillation.distiller import Distiller
from g2l_core.encoders.loading import load_encoder
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.encoders.weight_files import preprocessing_beside
from g2l_core.errors import (
    MACHINE_FAULTS,
    EncoderError,
    NotASlideError,
    ReadError,
    RunError,
    StoreCorruptError,
    StoreError,
    StoreUnreadError,
    machine_fault,
    with_remedy,
)
from g2l_core.patches.render import render_block
from g2l_core.patches.views import COLUMNS, ViewSpec
from g2l_core.slides.slide import open_slide
from g2l_core.store.boundary import reading, writing
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.verify import verify
from tests.conftest import TEACHER

CODES = [errno.EMFILE, errno.ENFILE]
LIMIT = r"raise the limit of open files \(ulimit -n\)"


def error_of(code, path="/data/x"):
    return OSError(code, os.strerror(code), path)


def raising(code):
    def run(*_args, **_kwargs):
        raise error_of(code)

    return run


REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space, or have the quota raised",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or free space",
    errno.EROFS: "make it writable",
    errno.EACCES: "allow it",
    errno.EPERM: "allow it",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, which hold all files that this machine can have open",
    errno.ENOTDIR: "make the store writable",
}


@pytest.mark.parametrize("code", REMEDIES)
def test_each_error_of_writing_has_its_own_remedy(code):
    with pytest.raises(StoreError) as caught, writing("features of slide x"):
        raise error_of(code)
    assert str(caught.value) == (
        f"cannot write features of slide x: {os.strerror(code)}; {REMEDIES[code]} and run the same command again: "
        "what is recorded is kept"
    )
    assert not isinstance(caught.value, StoreCorruptError)


def test_an_error_of_the_system_behind_a_library_s_is_no_damage():
    with pytest.raises(StoreError, match=LIMIT) as caught, writing("x"):
        raise RuntimeError("can't open") from error_of(errno.EMFILE)
    assert not isinstance(caught.value, StoreCorruptError)
    with pytest.raises(StoreCorruptError), writing("x"):
        raise ValueError("torn")


@pytest.mark.parametrize("code", CODES)
def test_what_cannot_be_opened_is_not_damaged(code):
    with pytest.raises(StoreError, match=os.strerror(code)) as caught, reading("a table"):
        raise error_of(code)
    assert not isinstance(caught.value, StoreCorruptError)
    with pytest.raises(StoreCorruptError), reading("a table"):
        raise error_of(errno.ENODEV)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EIO])
def test_what_this_machine_cannot_read_is_no_damage(cached_store, code, monkeypatch):
    """A shard and a table: those who read say why, verify goes on, and nothing is there to be repaired."""
    store = FeatureStore.open(cached_store)
    (key,), slide = store.encoders, store.slide("p01-1")
    opened = os.open

    def refusing(path, *how, **options):
        if "p01-1" in str(path) and Path(path).name == "c.0.1.0":
            raise error_of(code, path)
        return opened(path, *how, **options)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(StoreUnreadError, match=rf"cannot use .*c\.0\.1\.0: {os.strerror(code)}; {REMEDIES[code]}"):
        slide.features(key, view=1)
    (found,) = verify(store)
    assert (found.kind, found.slide_id, found.encoder) == ("unread", "p01-1", key)
    monkeypatch.undo()
    state = Path.stat
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda path, **_: raising(code)() if path.name == "c.0.1.0" else state(path))
        with pytest.raises(StoreUnreadError, match=REMEDIES[code]):
            slide.records(key)
    with monkeypatch.context() as patch:
        patch.setattr(StoredSlide, "array", lambda slide, name: raising(code)() if name == "coords" else None)
        with pytest.raises(StoreUnreadError, match=os.strerror(code)):
            _ = slide.coords


def test_the_two_codes_are_told_apart():
    """The text of one begins with that of the other."""
    for code in CODES:
        assert machine_fault(RuntimeError(f"x: {os.strerror(code)} (os error)")).errno == code
        told = with_remedy(f"x: {os.strerror(code)}.")
        assert told == f"x: {os.strerror(code)}; {MACHINE_FAULTS[code]} and run the same command again"
        assert with_remedy(told) == told
    assert with_remedy("No space left on device") == "No space left on device"


def test_a_slide_of_which_no_document_can_be_opened_is_not_removed(cached_store, monkeypatch):
    store = FeatureStore.open(cached_store)
    monkeypatch.setattr(Path, "read_bytes", raising(errno.EMFILE))
    store._entries.clear()
    with pytest.raises(StoreError, match=LIMIT) as caught:
        list(store.slides())
    assert not isinstance(caught.value, StoreCorruptError)
    with pytest.raises(StoreError, match=LIMIT):
        store.restore_document("p01-1")


def test_the_pixels_do_not_depend_on_how_many_files_are_open(cohort, monkeypatch):
    """Without its tiles a slide would be read through another decoder, or as a plain image."""
    slide = cohort.parent / "slides/p01-1.tiff"
    with monkeypatch.context() as patch:
        patch.setattr(tifffile, "TiffFile", raising(errno.EMFILE))
        with pytest.raises(NotASlideError, match=LIMIT):
            open_slide(slide)
    with monkeypatch.context() as patch:
        patch.setattr(openslide.OpenSlide, "__init__", unsupported)
        with pytest.raises(NotASlideError, match=LIMIT):
            open_slide(slide, mpp_override=0.5)
    open_slide(slide).close()


def unsupported(*_args):
    raise openslide.OpenSlideUnsupportedFormatError("Unsupported or missing image file")


class Reader:
    """Raises the error that it is made with."""

    def __init__(self, error):
        self.error = error

    def read(self, _row, _max_absent=1.0):
        raise ReadError(f"cannot read x: {self.error.strerror}") from self.error

    def close(self):
        pass


def test_a_patch_that_cannot_be_opened_is_not_unreadable():
    render = partial(
        render_block,
        rows=[0],
        params=np.zeros((1, 1, len(COLUMNS)), np.float32),
        status=np.zeros(1, np.uint8),
        spec=ViewSpec(),
    )
    with pytest.raises(ReadError, match=LIMIT):
        render(Reader(error_of(errno.EMFILE)))
    assert list(render(Reader(error_of(errno.EIO))).reasons) == [0]


def test_a_checkpoint_that_cannot_be_opened_is_not_passed_over(tmp_path, monkeypatch):
    """Else the last weights would be kept where the best are."""
    student = load_encoder(resolve_encoder(TEACHER, weights="random:0"), device="cpu")
    distiller = Distiller(student.module, student.dim, 4, seed=0)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / checkpoints.BEST).write_bytes(b"x" * 99)
    monkeypatch.setattr(Path, "open", raising(errno.EMFILE))
    notes = []
    with pytest.raises(RunError, match=LIMIT):
        checkpoints.restore_best(tmp_path, distiller, notes.append)
    assert notes == []


def test_mean_and_deviation_beside_weights_are_not_left_out(tmp_path, monkeypatch):
    assert preprocessing_beside(tmp_path / "w.safetensors") == {}
    monkeypatch.setattr(Path, "read_text", raising(errno.EMFILE))
    with pytest.raises(EncoderError, match=LIMIT):
        preprocessing_beside(tmp_path / "w.safetensors")
