"""The files that hold a network's weights: one file, the shards that an index names, or a folder of a model hub.

Nothing here needs torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from g2l_core.errors import EncoderError, refuse_open_files
from g2l_core.files import parse_json

INDEX = ".index.json"
"""Ending of a file that names the shard of each tensor, as transformers and huggingface_hub write it."""

FILE_NAMES = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
"""The weights of a repository, and of a snapshot of one; the first that is there is read."""

ADAPTER = "adapter_config.json"
"""What PEFT writes beside an adapter."""

_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}


def weights_path(path: Path) -> Path:
    """The weights file that a path means: the file itself, or the one in a folder.

    Raises:
        EncoderError: The folder holds no weights, those of an adapter or of a distributed checkpoint, or several files.
    """
    if not path.is_dir():
        return path
    if (path / ADAPTER).is_file():
        raise EncoderError(f"{path} {ADAPTER_ADVICE}")
    if (path / ".metadata").is_file():
        raise EncoderError(
            f"{path} is a distributed checkpoint of torch. Convert it to one file first: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt"
        )
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    others = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if len(others) == 1:
        return others[0]
    found = f"holds several: {', '.join(file.name for file in others)}" if others else "holds none"
    raise EncoderError(f"{path} {found}; expected one weights file, such as {' or '.join(FILE_NAMES)}. Name the file")


ADAPTER_ADVICE = (
    "holds an adapter of PEFT (LoRA and its kin), which is a part of a network. Merge it into its base model "
    "(model.merge_and_unload()), save that, and give the saved file"
)


def shards_of(path: Path) -> tuple[Path, ...]:
    """The files with the tensors of a weights file: itself, or the shards that it names if it is an index.

    Raises:
        EncoderError: The index cannot be read, or names files elsewhere.
    """
    if not path.name.endswith(INDEX):
        return (path,)
    return tuple(path.parent / name for name in sorted(set(shard_names(path).values())))


def shard_names(index: Path) -> dict[str, str]:
    """The name of the shard of every tensor.

    Raises:
        EncoderError: The index cannot be read, or names files elsewhere.
    """
    try:
        names = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        wrong = [name for name in names.values() if name in {"", ".", ".."} or Path(name).name != name]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EncoderError(
            f"{index} is no index of weights ({type(error).__name__}: {error}); expected a weight_map from tensors to "
            "files. Copy it again"
        ) from error
    if wrong:
        raise EncoderError(f"{index} names {wrong[0]!r}, which is no file beside it")
    return dict(names)


def preprocessing_beside(path: Path) -> dict[str, Any]:
    """Mean and standard deviation that a hub snapshot names beside its weights, as timm or transformers write them."""
    timms, transformers = _object(path.parent / "config.json"), _object(path.parent / "preprocessor_config.json")
    found = timms.get("pretrained_cfg", {})
    named = found if isinstance(found, Mapping) else {}
    values = {
        "mean": named.get("mean", transformers.get("image_mean")),
        "std": named.get("std", transformers.get("image_std")),
    }
    return {key: value for key, value in values.items() if isinstance(value, list)}


def _object(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse_open_files(error, path, EncoderError)
        return {}
    return content if isinstance(content, dict) else {}
