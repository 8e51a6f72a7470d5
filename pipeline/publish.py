"""A student made ready for others, and sent to the model hub only where that is asked for: behind `g2l publish`."""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from g2l_core.api.copies import new_folder, require_new
from g2l_core.api.publish import CHECKSUMS, checksums
from g2l_core.encoders.resolve import RECORD_DIGEST, STUDENT_FOLDER, STUDENT_RECORD, read_student_record, run_encoder
from g2l_core.encoders.spec import STORED_LICENSE
from g2l_core.encoders.student_folder import write_json
from g2l_core.encoders.terms import UNKNOWN, kind_of
from g2l_core.encoders.weights import hub_errors, state_digest
from g2l_core.errors import EncoderError, UsageError, writing
from g2l_core.files import write_text
from g2l_core.store.provenance import digest

CARD, WEIGHTS, CONFIG = "README.md", "model.safetensors", "config.json"
LOCAL_NAME = "local-dir:FOLDER"
"""How the card names the folder for timm, as `student_folder.usage` writes it."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_FOLDERS = re.compile(r"(?<![\w:/.])(?:/[^\s/|\"']+)+/(?=[^\s/|\"'])")
"""The folders of an absolute path, but not of an address."""


@dataclass(frozen=True, kw_only=True)
class PublishedStudent:
    """What was made ready, or would be."""

    folder: Path
    files: tuple[str, ...]
    bytes: int
    terms: str
    """What the student may be used for, as its record says."""
    uploaded_to: str = ""
    """The address of the repository; empty where nothing was sent."""


def publish_student(
    run: Path, out: Path, *, repository: str = "", private: bool = False, dry_run: bool = False
) -> PublishedStudent:
    """Copy a run's student into a folder as the model hub has it: weights, configuration, card, checksums.

    Folders of this machine are left out of the card and of the record, whose digest is made anew.

    Args:
        run: The run folder.
        out: The folder to make.
        repository: OWNER/NAME on the hub to send it to; empty sends nothing.
        private: Whether a repository that is made for it is for its owner alone.
        dry_run: Only check and tell.

    Raises:
        EncoderError: There is no student, its files are not what was written, or the hub refuses it.
        UsageError: The repository's name is none, or the student's terms are not known and it is to be sent.
        StoreError: There is something at `out`, or it cannot be written.
    """
    if repository and not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"--upload-to {repository}: expected OWNER/NAME of a model on the hub")
    require_new(out)
    run_encoder(run)
    source = run / STUDENT_FOLDER
    record = read_student_record(source / STUDENT_RECORD)
    _require_weights(source / WEIGHTS, record)
    terms = str(record.get(STORED_LICENSE) or "unknown")
    if repository and kind_of(terms) == UNKNOWN:
        raise UsageError(
            f"the terms of {run} are {terms!r}, so nobody knows whether it may be passed on: its card lists what it is "
            f"made from. Ask their owners, then send the folder yourself: hf upload {repository} {out}"
        )
    names = [name for name in (CARD, CONFIG, STUDENT_RECORD, WEIGHTS) if (source / name).is_file()]
    if CARD not in names:
        raise EncoderError(f"{source} has no {CARD}: a student without its card is not passed on. Restore it")
    size = sum((source / name).stat().st_size for name in names)
    done = PublishedStudent(folder=out, files=(*names, CHECKSUMS), bytes=size, terms=terms)
    if dry_run:
        return done
    with new_folder(out) as folder, writing(out):
        folder.mkdir(parents=True)
        _fill(folder, source, names, record, repository)
    if not repository:
        return done
    return PublishedStudent(**{**vars(done), "uploaded_to": upload(out, repository, private=private)})


def _require_weights(path: Path, record: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = state_digest(load_file(path))
    except (OSError, SafetensorError) as error:
        raise EncoderError(f"{path} cannot be read ({error}): restore it from a copy, or distill again") from error
    if found != record["weights_digest"]:
        raise EncoderError(
            f"{path} has other weights than {STUDENT_RECORD} records (digest {found[:12]}, recorded "
            f"{record['weights_digest'][:12]}): restore it from a copy, or distill again"
        )


def _fill(folder: Path, source: Path, names: list[str], record: Mapping[str, Any], repository: str) -> None:
    for name in {WEIGHTS, CONFIG}.intersection(names):
        shutil.copyfile(source / name, folder / name)
    card = without_folders((source / CARD).read_text(encoding="utf-8"))
    write_text(folder / CARD, card.replace(LOCAL_NAME, f"hf-hub:{repository}") if repository else card)
    public = {key: _public(value) for key, value in record.items() if key != RECORD_DIGEST}
    write_json(folder / STUDENT_RECORD, {**public, RECORD_DIGEST: digest(public)})
    write_text(folder / CHECKSUMS, checksums(folder))


def without_folders(text: str) -> str:
    """A text in which absolute paths are names of files only.

    Examples:
        >>> without_folders("file /home/ann/teacher.pth, https://host/a/b, 5 patches/s")
        'file teacher.pth, https://host/a/b, 5 patches/s'
    """
    return _FOLDERS.sub("", text)


def _public(value: Any) -> Any:
    match value:
        case str():
            return without_folders(value)
        case list():
            return [_public(one) for one in value]
        case dict():
            return {key: _public(one) for key, one in value.items()}
        case _:
            return value


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Send a folder to a model repository of the hub, which is made if it is not there.

    HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to `huggingface_hub`.

    Returns:
        The address of the repository.

    Raises:
        EncoderError: The hub refuses, or cannot be reached. The folder stays, and can be sent again.
    """
    from huggingface_hub import HfApi, get_token

    with _hub_refusals(folder, repository):
        if get_token() is None:
            raise EncoderError("the hub needs your token: set HF_TOKEN, or run `hf auth login`")
        api = HfApi()
        address = api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="A student distilled by G2L")
    return str(address)


@contextmanager
def _hub_refusals(folder: Path, repository: str) -> Iterator[None]:
    """Say in one line why the hub did not take a folder, and that it is still there."""
    from huggingface_hub import errors

    again = f"{folder} is complete: hf upload {repository} {folder} sends it"
    try:
        yield
    except EncoderError as error:
        raise EncoderError(f"{error}. {again}") from error
    except errors.OfflineModeIsEnabled as error:
        raise EncoderError(f"HF_HUB_OFFLINE is set, so nothing is sent. {again} once it is not") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = str(error).strip().splitlines()[0]
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            reason = f"your token may not write there (HTTP {status:d}); take one with the right to write"
        raise EncoderError(f"the hub does not take {repository}: {reason}. {again}") from error
    except hub_errors() as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EncoderError(f"cannot send {repository} to the hub: {reason}. {again}") from error
