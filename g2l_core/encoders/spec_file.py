"""Read the spec file of a lab's own encoder: a TOML file of about ten lines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from g2l_core.encoders.spec import PRECISIONS, STORED_LICENSE, EncoderSpec, WeightsSource, split_network
from g2l_core.encoders.weight_files import weights_path
from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.files import parse_toml

_KEYS = (
    "name", "architecture", "arguments", "weights", "layout", "input_px", "mean", "std", "interpolation", "pooling",
    "dim", "mpp", "also_mpp", "card_precision", "license", "trained_on",
)  # fmt: skip
"""The fields of `EncoderSpec` that a spec file may set."""

_NEEDED = ("architecture", "weights", "mean", "std", "input_px")

_KINDS = {"string_type": "str", "int_type": "int", "float_type": "int or float", "dict_type": "dict"}
"""What a value must be, by the type of pydantic's error."""

_LISTS = {"mean": "3 numbers", "std": "3 numbers", "also_mpp": "numbers"}


def read_encoder_file(path: Path) -> EncoderSpec:
    """Read the encoder that a spec file describes.

    `weights` is a file beside it (or at an absolute path), `hub:REPOSITORY[@REVISION][#FILE]`, `random:SEED`, or
    `module` for an architecture MODULE:FUNCTION that loads its own weights. The name of the file is the name of the
    encoder, unless the key `name` gives another.

    Raises:
        UsageError: It cannot be read, lacks a key, has an unknown one, or a value of another type. The message names
            the key.
    """
    try:
        fields = parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the encoder's spec file {path}: {error}") from error
    if STORED_LICENSE in fields:  # the key's older spelling
        fields["license"] = fields.pop(STORED_LICENSE)
    fields = {key: _checked(path, key, value) for key, value in fields.items()}
    if missing := [key for key in _NEEDED if key not in fields]:
        raise UsageError(f"{path}: missing {', '.join(missing)}; a spec file needs {', '.join(_NEEDED)}")
    if fields.get("card_precision", "fp32") not in PRECISIONS[1:]:
        raise UnknownNameError("card_precision", fields["card_precision"], PRECISIONS[1:])
    return EncoderSpec(**{"name": path.stem, **fields, "weights": _weights(path, fields), "named_in": str(path)})


def _checked(path: Path, key: str, value: object) -> Any:
    """The value of a key, if it is of the field's type."""
    if key not in _KEYS:
        raise UnknownNameError(f"key in {path}", key, _KEYS)
    kind = TypeAdapter(get_type_hints(EncoderSpec)[key])
    try:
        return kind.validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except ValidationError as error:
        wanted = _LISTS.get(key) or _KINDS[error.errors()[0]["type"]]
        raise UsageError(f"{path}: {key} must be {wanted}, not {value!r}") from error


def _weights(path: Path, fields: Mapping[str, Any]) -> str:
    weights = str(fields["weights"])
    if weights == "module":
        if ":" not in fields["architecture"]:
            raise UsageError(f'{path}: weights = "module" is for an architecture MODULE:FUNCTION that loads its own')
        return f"module:{fields['architecture']}"
    if weights.startswith(("hub:", "random:")):
        return weights
    return local_weights(path.parent, weights, f"{path}: weights = {weights!r}")


def local_weights(folder: Path, text: str, what: str) -> str:
    """The text of a `WeightsSource` for weights on this machine.

    Args:
        folder: What the path is relative to.
        text: A file, a folder of a hub snapshot, or either with #NETWORK behind it.
        what: How the user wrote it, for messages.

    Raises:
        UsageError: There is no such file.
        EncoderError: The folder holds no weights that can be used.
    """
    name, network = (text, "") if (folder / text).exists() else split_network(text)
    path = (folder / name).resolve()
    if not path.exists():
        raise UsageError(f"{what}: no such file {path} (or give random:SEED, or hub:REPOSITORY)")
    return str(WeightsSource(kind="file", where=str(weights_path(path)), network=network))
