"""Exported students that G2L runs itself: the folder of `g2l export-student`, known by its export.json.

Nothing here needs torch or a runtime; `runtimes` opens the networks.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from g2l_core.encoders.spec import EXPORT, EncoderSpec, spec_from_json, spec_to_json
from g2l_core.errors import EncoderError, G2LError, UnknownNameError, UsageError, refuse_open_files
from g2l_core.files import parse_json, write_text
from g2l_core.store.provenance import digest

EXPORT_RECORD = "export.json"
FORMAT = 1
RECORD_DIGEST = "record_digest"

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""The package of each runtime beside torch, by its name, which is that of G2L's extra too."""

RUNTIME_CHOICES = ("auto", "torch", *RUNTIMES)

AGAIN = "Copy the folder again, or make it with g2l export-student"


def is_export_folder(text: str) -> bool:
    """Whether `text` is a folder of `g2l export-student` that has a network for one of `RUNTIMES`."""
    return (Path(text) / EXPORT_RECORD).is_file()


def write_export_record(folder: Path, spec: EncoderSpec, files: tuple[str, ...], facts: Mapping[str, Any]) -> None:
    """Write export.json.

    Args:
        folder: The exported folder, with its files in it.
        spec: The student.
        files: Names of the network's files.
        facts: form, runtime, precision, batch, student_digest, student_weights_digest and gate.
    """
    record: dict[str, Any] = {
        "format": FORMAT,
        **facts,
        "spec": spec_to_json(spec),
        "files": {name: _sha256(folder / name) for name in files},
    }
    record = json.loads(json.dumps(record))
    record[RECORD_DIGEST] = digest(record)
    write_text(folder / EXPORT_RECORD, json.dumps(record, indent=2) + "\n")


def read_export_record(folder: Path) -> dict[str, Any]:
    """The content of export.json.

    Raises:
        EncoderError: There is none, it is damaged, or a later version wrote it.
    """
    path = folder / EXPORT_RECORD
    try:
        record: dict[str, Any] = {**parse_json(path.read_text(encoding="utf-8"))}
        claimed = record.pop(RECORD_DIGEST)
        if record["format"] != FORMAT:
            raise EncoderError(f"{path} is of format {record['format']!r}; this version of G2L reads {FORMAT}")
        if record["runtime"] not in RUNTIMES or not record["files"]:
            raise ValueError(f"unknown runtime {record['runtime']!r}")
        names = [name for name in record["files"] if Path(name).name != name]
        if claimed != digest(record) or names:
            raise ValueError("its content is not what its digest says")
        spec_from_json(record["spec"])
    except EncoderError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, G2LError) as error:
        refuse_open_files(error, path, EncoderError)
        raise EncoderError(f"{path} is no record of an export ({type(error).__name__}: {error}). {AGAIN}") from error
    return record


def export_encoder(folder: Path) -> EncoderSpec:
    """An exported student as an encoder, whose precision names its runtime, as in `int8+onnx`.

    Raises:
        EncoderError: The folder's record cannot be read.
    """
    folder = folder.resolve()
    record = read_export_record(folder)
    spec = spec_from_json(record["spec"], str(folder / EXPORT_RECORD))
    precision = f"{record['precision']}+{record['runtime']}"
    return replace(spec, name=folder.name, weights=f"{EXPORT}:{folder}", card_precision=precision, named_in="")


def export_digest(record: Mapping[str, Any]) -> str:
    """sha256 of the names and contents of the network's files."""
    return digest(dict(record["files"]))


def network_files(folder: Path) -> tuple[Path, ...]:
    """The files of the network, the one that a runtime opens first.

    Raises:
        EncoderError: The folder's record cannot be read.
    """
    return tuple(folder / name for name in read_export_record(folder)["files"])


def require_intact(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse a network that is not the one that was written and compared with its student.

    Raises:
        EncoderError: A file is gone or has changed.
    """
    for name, wanted in record["files"].items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            refuse_open_files(error, folder / name, EncoderError)
            raise EncoderError(f"cannot read {folder / name}: {error.strerror}. {AGAIN}") from error
        if found != wanted:
            raise EncoderError(
                f"{folder / name} is not what {EXPORT_RECORD} names: its digest is {found[:12]}, not {wanted[:12]}. "
                f"{AGAIN}"
            )


def with_runtime(spec: EncoderSpec, runtime: str) -> EncoderSpec:
    """The encoder as a runtime runs it.

    Args:
        spec: Any encoder.
        runtime: auto (an exported folder's own runtime, else torch), torch, onnx or openvino. For the student of a
            run folder RUN the exported folder RUN-onnx or RUN-openvino beside it is taken.

    Raises:
        UnknownNameError: There is no such runtime.
        UsageError: The encoder has no form for it.
        EncoderError: The exported folder is damaged, or is of another student.
    """
    if runtime not in RUNTIME_CHOICES:
        raise UnknownNameError("runtime", runtime, RUNTIME_CHOICES)
    source = spec.source
    own = spec.card_precision.rpartition("+")[2] if spec.is_export else "torch"
    if runtime in {"auto", own}:
        return spec
    if spec.is_export:
        raise UsageError(f"--runtime {runtime}: {source.where} was exported for {own}; leave --runtime out")
    if source.kind != "run":
        raise UsageError(f"--runtime {runtime} runs exported students; {spec.name} is none. Leave --runtime out")
    run = Path(source.where).parent
    folder = run.with_name(f"{run.name}-{runtime}")
    if not is_export_folder(str(folder)):
        raise UsageError(
            f"--runtime {runtime}: there is no exported student {folder}. Make it with g2l export-student {run} "
            f"--format {runtime}, or name the exported folder as the encoder"
        )
    exported, recorded = (
        read_export_record(folder),
        parse_json((Path(source.where) / "encoder.json").read_text("utf-8")),
    )
    if exported["student_weights_digest"] != recorded["weights_digest"]:
        raise EncoderError(f"{folder} was exported from another student than {run} has now; export it again")
    return export_encoder(folder)


def _sha256(path: Path) -> str:
    state = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            state.update(block)
    return state.hexdigest()
