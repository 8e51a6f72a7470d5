"""A lab's own encoder: a TOML file of about ten lines."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from g2l_core.encoders.spec import PRECISIONS, STORED_LICENSE, EncoderSpec
from g2l_core.errors import UnknownNameError, UsageError

_KEYS: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "architecture": (str,),
    "arguments": (dict,),
    "weights": (str,),
    "layout": (str,),
    "input_px": (int,),
    "mean": (list,),
    "std": (list,),
    "interpolation": (str,),
    "pooling": (str,),
    "dim": (int,),
    "mpp": (int, float),
    "also_mpp": (list,),
    "card_precision": (str,),
    "license": (str,),
    "trained_on": (str,),
}
_NEEDED = ("architecture", "weights", "mean", "std", "input_px")


def read_encoder_file(path: Path) -> EncoderSpec:
    """The encoder that a spec file describes.

    `weights` is a file beside it (or at an absolute path), `hub:REPOSITORY[@REVISION][#FILE]`, `random:SEED`, or, for
    an architecture MODULE:FUNCTION that loads its own, `module`. Its name is the file's unless it says another.

    Raises:
        UsageError: It cannot be read, lacks a key, has an unknown one, or a value of another kind; names it.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the encoder's spec file {path}: {error}") from error
    if STORED_LICENSE in fields:  # the key's older spelling
        fields["license"] = fields.pop(STORED_LICENSE)
    _check_keys(path, fields)
    for key, count in (("mean", 3), ("std", 3), ("also_mpp", None)):
        if key in fields:
            fields[key] = _numbers(path, key, fields[key], count)
    if fields.get("card_precision", "fp32") not in PRECISIONS[1:]:
        raise UnknownNameError("card_precision", fields["card_precision"], PRECISIONS[1:])
    return EncoderSpec(**{"name": path.stem, **fields, "weights": _weights(path, fields)})


def _check_keys(path: Path, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        if key not in _KEYS:
            raise UnknownNameError(f"key in {path}", key, _KEYS)
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in _KEYS[key])
            raise UsageError(f"{path}: {key} must be {wanted}, not {value!r}")
    missing = [key for key in _NEEDED if key not in fields]
    if missing:
        raise UsageError(f"{path}: missing {', '.join(missing)}; a spec file needs {', '.join(_NEEDED)}")


def _numbers(path: Path, key: str, values: list[Any], count: int | None) -> tuple[float, ...]:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or count not in {None, len(values)}:
        raise UsageError(f"{path}: {key} must be {f'{count} ' if count else ''}numbers, not {values!r}")
    return tuple(float(value) for value in values)


def _weights(path: Path, fields: Mapping[str, Any]) -> str:
    weights = str(fields["weights"])
    if weights == "module":
        if ":" not in fields["architecture"]:
            raise UsageError(f'{path}: weights = "module" is for an architecture MODULE:FUNCTION that loads its own')
        return f"module:{fields['architecture']}"
    if weights.startswith(("hub:", "random:")):
        return weights
    file = (path.parent / weights).resolve()
    if not file.is_file():
        raise UsageError(f"{path}: no weights file {file}; give a path from the spec file's folder")
    return f"file:{file}"
