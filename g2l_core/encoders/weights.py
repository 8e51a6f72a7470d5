"""Find the weights file of an encoder, on disk or on the model hub, and read its tensors."""

import hashlib
import importlib.util
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from g2l_core.encoders.spec import EncoderSpec
from g2l_core.errors import EncoderError

FILE_NAMES = ("model.safetensors", "pytorch_model.bin")


def hub_file(spec: EncoderSpec) -> Path:
    """The local copy of a repository's weights file, downloaded if it is not in the hub's cache.

    HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to `huggingface_hub`.

    Raises:
        EncoderError: The file cannot be downloaded. The message says why and what to do.
    """
    from huggingface_hub import errors, hf_hub_download

    repository, revision, file_name = spec.source.where, spec.source.revision, spec.source.file
    # The client lets errors of its transport through, such as a broken connection. Its own errors have the same base.
    refusals: tuple[type[Exception], ...] = (*errors.HfHubHTTPError.__bases__, OSError, ValueError)
    names = (file_name,) if file_name else FILE_NAMES
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except errors.LocalEntryNotFoundError as error:
            raise EncoderError(
                f"{spec.name}: the hub cannot be reached and {repository} is not in the cache"
                + (f" at revision {revision}" if revision else "")
                + ". Connect once, or give --weights FILE"
            ) from error
        except errors.EntryNotFoundError:
            continue
        except refusals as error:
            raise EncoderError(f"{spec.name}: {_refusal(error, repository, revision)}") from error
    lacking = f"no {file_name}" if file_name else f"neither {' nor '.join(FILE_NAMES)}"
    raise EncoderError(f"{spec.name}: {repository} has {lacking}")


def _refusal(error: Exception, repository: str, revision: str) -> str:
    """Why the hub does not give a file and what to do, in one line."""
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            return (
                f"access to {repository} is gated. Accept its license at {constants.ENDPOINT}/{repository}, "
                "then set HF_TOKEN (or run `hf auth login`)"
            )
        case errors.RepositoryNotFoundError():
            return f"the hub has no {repository}, or it is private: then set HF_TOKEN (or run `hf auth login`)"
        case errors.RevisionNotFoundError():
            return f"the hub's {repository} has no revision {revision!r}"
        case _:
            return f"cannot download {repository}: {str(error).partition(chr(10))[0] or type(error).__name__}"


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
            return Path(spec.source.where)
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or torch file, in the file's order.

    Raises:
        EncoderError: It is neither, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{path} is refused: its pickle is damaged, or holds more than tensors and could run code. "
            "Give safetensors, or a torch file of a plain state dict"
        ) from error
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise EncoderError(
            f"{path} is no weights file that can be read (safetensors, or a torch file of tensors): {reason}"
        ) from error
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise EncoderError(f"{path} holds no state dict (a mapping from names to tensors)")
    return dict(content)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
