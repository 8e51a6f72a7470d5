"""What is no refusal of ours ends in one line with a place in the code, and an exit code of its own."""

import errno
import os

import pytest

from g2l_core.errors import StoreError, UsageError, machine_fault, writing
from pipeline.cli import EXIT_CODES
from tests.pipeline.test_cli import g2l

QUICKSTART = "docs/quickstart.md"


def broken(error):
    def run(*_args, **_kwargs):
        raise error

    return run


def test_an_internal_error_has_a_code_of_its_own(monkeypatch, cached_store):
    monkeypatch.setattr("g2l_core.store.features.FeatureStore.slides", broken(KeyError("level\nzero")))
    done = g2l("store", "ls", cached_store)
    assert done.returncode == 70
    (line,) = done.stderr.splitlines()
    assert line.startswith("internal error: KeyError: 'level\\nzero' (pipeline/cli/store.py:")
    assert " in list_slides)" in line
    assert "g2l --debug COMMAND for the traceback, and report it" in line


def test_debug_shows_the_traceback_and_keeps_the_code(monkeypatch, cached_store):
    monkeypatch.setattr("g2l_core.store.features.FeatureStore.slides", broken(RuntimeError("odd")))
    done = g2l("--debug", "store", "ls", cached_store)
    assert done.returncode == 70
    assert "Traceback" in done.stderr
    assert "RuntimeError: odd" in done.stderr


def test_a_refusal_keeps_its_code(tmp_path):
    assert g2l("store", "ls", tmp_path / "none.zarr").returncode == 2
    assert g2l("--debug", "store", "ls", tmp_path / "none.zarr").returncode == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE, errno.EROFS, errno.EACCES])
def test_an_error_of_the_machine_that_nobody_translated_is_no_internal_error(monkeypatch, cached_store, code):
    error = OSError(code, os.strerror(code), "/data/x")
    monkeypatch.setattr("g2l_core.store.features.FeatureStore.slides", broken(error))
    done = g2l("store", "ls", cached_store)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot ")
    assert f"/data/x: {os.strerror(code)}" in line


def test_the_codes_are_in_the_help_and_in_the_quick_start(pytestconfig):
    shown = " ".join(g2l("--help").stdout.split())
    page = (pytestconfig.rootpath / QUICKSTART).read_text()
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning.split(';')[0].split(':')[0]}" in shown.replace("│", "")
        assert f"| {code} |" in page


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (OSError("Can't write data (errno = 122, error message = 'Disk quota exceeded')"), errno.EDQUOT),
        (RuntimeError("[Errno 24] Too many open files: '/x'"), errno.EMFILE),
        (RuntimeError("unexpected pos 64 vs 0"), None),
        (ValueError("28"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
    ],
)
def test_the_error_of_the_system_behind_another_library_s(error, code):
    found = machine_fault(error)
    assert (found.errno if found else None) == code


def test_a_context_is_looked_through():
    error = RuntimeError("unexpected pos 64 vs 0")  # as torch raises it
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert machine_fault(error).errno == errno.ENOSPC


def test_what_is_translated_and_what_is_not():
    words = "cannot write a table: No space left on device; free space and run the same"
    with pytest.raises(StoreError, match=words), writing("a table", StoreError):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ZeroDivisionError), writing("a table"):
        1 / 0  # noqa: B018
    with pytest.raises(UsageError, match="mine"), writing("a table"):
        raise UsageError("mine") from OSError(errno.ENOSPC, "full")
