"""Encoders by name: the names that users write, and the keys under which stores keep features.

Nothing here needs torch; `loading` builds the networks. Teacher and student are roles and not types of encoders: a run
folder of `g2l distill` is an encoder like any other.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from g2l_core.encoders.exported import export_digest, export_encoder, is_export_folder, read_export_record
from g2l_core.encoders.registry import TABLE
from g2l_core.encoders.spec import POOLINGS, EncoderSpec, WeightsSource, spec_digest, spec_from_json, spec_to_json
from g2l_core.encoders.spec_file import local_weights, read_encoder_file
from g2l_core.encoders.trust import require_trusted, with_trusted_code
from g2l_core.errors import EncoderError, G2LError, UnknownNameError, UsageError, refuse_open_files
from g2l_core.files import parse_json
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.provenance import digest

__all__ = [
    "RUN_RECORD", "STUDENT_FOLDER", "STUDENT_RECORD", "TABLE", "EncoderSpec", "encoder_key", "find_stored",
    "is_run_folder", "normalized", "resolve_encoder", "run_encoder", "spec_from_json", "spec_to_json", "split_width",
]  # fmt: skip

RESTORE = "Restore it from a copy, or write the student again with the same g2l distill"
RUN_RECORD = "run.json"
STUDENT_FOLDER = "student"
STUDENT_RECORD = "encoder.json"
RECORD_DIGEST = "record_digest"
"""The key of the digest of all other keys of encoder.json; older versions did not write it."""

_WIDTH = re.compile(r"(.+)\+([0-9]{1,9}|all)", re.DOTALL)

_FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def normalized(name: str) -> str:
    """A name without case and separators, so that H_optimus_0 and h-optimus-0 are equal."""
    return re.sub(r"[^a-z0-9@]", "", name.lower())


def resolve_encoder(
    text: str,
    *,
    weights: str | None = None,
    seed_hint: bool = True,
    named_in: str = "",
    trusted: Collection[str] | None = (),
) -> EncoderSpec:
    """Find the spec of the encoder that a user names.

    Args:
        text: A name of the table, `timm:NAME`, a run folder, a folder of `g2l export-student`, a spec file (`.toml`),
            or MODULE:FUNCTION. `@PX` after it sets another input size, and `+POOLING` another pooling, as in
            `virchow2@448+cls`. `+WIDTH` after a run folder takes its first so many features, as in `run/+256`.
        weights: Replaces the encoder's own weights: `random:SEED`, a file or folder, `FILE#NETWORK` where the file
            holds several networks, or `hub:REPOSITORY[@REVISION][#FILE[#NETWORK]]`.
        seed_hint: Whether the message for missing weights mentions random ones.
        named_in: The file that `text` comes from; empty if the user wrote it.
        trusted: Modules whose code may run if a file names it. With None the spec is only to be looked at.

    Raises:
        UnknownNameError: No encoder or pooling has that name. The message suggests the nearest.
        UsageError: A timm architecture without weights, a malformed size, or a spec file that cannot be used.
        EncoderError: A run folder is not complete, a function cannot be used, or a file names code of a module that
            is not trusted.
    """
    folder, width = split_width(text)
    if is_run_folder(folder):
        spec = with_trusted_code(run_encoder(Path(folder)), trusted)
        return _with_width(spec, width) if width else spec
    if is_export_folder(text):
        return export_encoder(Path(text))
    base, pooling = _split_pooling(text)
    name, _, size = base.rpartition("@") if re.search(r"@[^@/]*$", base) else (base, "", "")
    spec = with_trusted_code(_base_spec(name, named_in, trusted), trusted)
    if "@" in base and name != base:
        spec = _with_input_px(spec, size)
    if pooling:
        spec = _with_pooling(spec, pooling)
    if weights is not None:
        spec = _with_weights(spec, weights)
    if not spec.weights:
        raise UsageError(
            f"{spec.name} is an architecture without weights: give --weights FILE"
            + (", or random:SEED for a trial" if seed_hint else "")
        )
    return spec


def split_width(text: str) -> tuple[str, str]:
    """The run folder in RUN+WIDTH, and the width: a number, or `all` where every width is meant; empty without one."""
    found = None if is_run_folder(text) else _WIDTH.fullmatch(text)
    return (found[1], found[2]) if found and is_run_folder(found[1]) else (text, "")


def _with_width(spec: EncoderSpec, width: str) -> EncoderSpec:
    if not width.isdecimal():
        raise UsageError(f"{spec.name}+{width}: expected one width here, as in {spec.name}+256")
    return replace(spec, name=f"{spec.name}+{width}", width=int(width), dim=None)


def _split_pooling(text: str) -> tuple[str, str]:
    """The text before `+POOLING`, and the pooling."""
    base, plus, pooling = text.rpartition("+")
    return (base, pooling) if plus else (text, "")


def _base_spec(name: str, named_in: str, trusted: Collection[str] | None) -> EncoderSpec:
    if name.lower().startswith("timm:"):
        return _timm_spec(name)
    if name.lower().endswith(".toml"):
        return read_encoder_file(Path(name))
    if _FUNCTION.match(name):
        return _function_spec(name, named_in, trusted)
    return _table_spec(name)


def _table_spec(name: str) -> EncoderSpec:
    for known, spec in TABLE.items():
        if normalized(known) == normalized(name):
            return spec
    raise UnknownNameError(
        "encoder",
        name,
        TABLE,
        "g2l models lists them; timm:NAME is any timm architecture; a folder of g2l distill, a spec file (.toml) and "
        "MODULE:FUNCTION are encoders too.",
    )


def _timm_spec(name: str) -> EncoderSpec:
    from g2l_core.encoders.timm_compat import timm_preprocessing

    architecture = name.partition(":")[2]
    return EncoderSpec(name=f"timm:{architecture}", weights="", **timm_preprocessing(architecture))


def _function_spec(text: str, named_in: str, trusted: Collection[str] | None) -> EncoderSpec:
    """The spec of a module that a function returns, with the preprocessing in the module's attributes.

    Raises:
        EncoderError: The function cannot be used, or its module has no `mean`, `std` or `input_px`.
    """
    require_trusted(text, named_in, trusted or ())
    from g2l_core.encoders.architectures import call_function

    network = call_function(text, {})
    known = ("mean", "std", "input_px", "mpp", "pooling", "interpolation", "license", "trained_on")
    fields = {key: getattr(network, key) for key in known if hasattr(network, key)}
    missing = [key for key in ("mean", "std", "input_px") if key not in fields]
    if missing:
        raise EncoderError(
            f"{text}: the module must say its preprocessing in the attributes mean, std and input_px; "
            f"missing: {', '.join(missing)}. Or write a spec file with architecture = {text!r}"
        )
    fields |= {key: tuple(float(value) for value in fields[key]) for key in ("mean", "std")}
    return EncoderSpec(name=text.partition(":")[2], architecture=text, weights=f"module:{text}", **fields)


def _with_input_px(spec: EncoderSpec, size: str) -> EncoderSpec:
    if not size.isdecimal():
        raise UsageError(f"{spec.name}@{size}: the input size behind @ must be a whole number of pixels")
    arguments = {**spec.arguments, "img_size": int(size)} if "img_size" in spec.arguments else spec.arguments
    return replace(spec, name=f"{spec.name}@{size}", input_px=int(size), arguments=arguments)


def _with_pooling(spec: EncoderSpec, pooling: str) -> EncoderSpec:
    if pooling.isdecimal():
        raise UsageError(f"{spec.name}+{pooling}: a width is for folders of g2l distill --nested, as in run/+{pooling}")
    if pooling not in POOLINGS:
        raise UnknownNameError("pooling", pooling, POOLINGS)
    if pooling == spec.pooling:
        return spec
    return replace(spec, name=f"{spec.name}+{pooling}", pooling=pooling, dim=None)


def _with_weights(spec: EncoderSpec, weights: str) -> EncoderSpec:
    source = WeightsSource.parse(weights)
    if source.kind == "random":
        if not source.where.isdecimal():
            raise UsageError(f"--weights {weights}: expected random:SEED with a whole number, such as random:0")
        return replace(spec, weights=weights, layout="timm", trained_on="")
    if source.kind == "hub" and "/" in source.where:
        return replace(spec, weights=weights, layout="auto", trained_on="")
    layout = spec.layout if spec.layout == "in-order" else "auto"
    return replace(spec, weights=local_weights(Path(), weights, f"--weights {weights}"), layout=layout, trained_on="")


def is_run_folder(text: str) -> bool:
    """Whether `text` is a folder that `g2l distill` wrote."""
    return (Path(text) / RUN_RECORD).is_file()


def run_encoder(folder: Path) -> EncoderSpec:
    """The student of a run folder as an encoder.

    Raises:
        EncoderError: The run has no finished student, or its record cannot be read.
    """
    student = (folder / STUDENT_FOLDER).resolve()
    record = student / STUDENT_RECORD
    fields = {**_student_record(folder), "name": folder.resolve().name, "weights": f"run:{student}"}
    try:
        return spec_from_json(fields, str(record))
    except (TypeError, ValueError, AttributeError) as error:
        raise EncoderError(f"{record} describes no encoder: {error}. Run the same g2l distill again") from error


def _student_record(folder: Path) -> dict[str, Any]:
    record = folder / STUDENT_FOLDER / STUDENT_RECORD
    if not record.is_file():
        if not is_run_folder(str(folder)):
            lacking = f"it has neither {RUN_RECORD} nor {STUDENT_FOLDER}/{STUDENT_RECORD}"
            raise EncoderError(f"{folder} is no run folder: {lacking}. Name one that g2l distill has made")
        raise EncoderError(
            f"{folder} has no finished student; run the same g2l distill --out {folder} again, which goes on"
        )
    return read_student_record(record)


def read_student_record(path: Path) -> dict[str, Any]:
    """The content of a student's encoder.json: its spec, and the digests of its weights and of the encoder.

    Raises:
        EncoderError: The file is damaged.
    """
    try:
        fields: dict[str, Any] = {**parse_json(path.read_text(encoding="utf-8"))}
        spec = spec_from_json(fields)
        found = {"digest": spec_digest(spec, fields["weights_digest"], "fp32")}
        if RECORD_DIGEST in fields:
            found[RECORD_DIGEST] = digest({key: value for key, value in fields.items() if key != RECORD_DIGEST})
        changed = [key for key, value in found.items() if fields[key] != value]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, G2LError) as error:
        refuse_open_files(error, path, EncoderError)
        raise EncoderError(f"{path} is no record of a student ({type(error).__name__}: {error}): {RESTORE}") from error
    if changed:
        raise EncoderError(f"{path} is not as g2l distill wrote it: its digest is another one. {RESTORE}")
    return fields


def encoder_key(spec: EncoderSpec, digest: str) -> str:
    """The name under which a store keeps the encoder's features.

    Published encoders keep their name. Random weights add their seed. Files, runs, functions and repositories that a
    user names add the beginning of the digest, so that two encoders of one name have different keys.
    """
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", spec.name).strip("-")
    if spec.is_untrained:
        return f"{slug}-random{spec.source.where}"
    published = any(spec.weights == known.weights for known in TABLE.values())
    return slug if published else f"{slug}-{digest[:8]}"


def find_stored(text: str, stored: Mapping[str, EncoderFacts]) -> str:
    """The key of the stored encoder that a user means: its key, its name, or what `resolve_encoder` took for it.

    Args:
        text: What the user wrote.
        stored: The stored encoders, by key.

    Raises:
        UnknownNameError: No stored encoder fits.
        UsageError: Several stored encoders fit.
    """
    if text in stored:
        return text
    folder, width = split_width(text)
    if is_run_folder(folder) or is_export_folder(folder):
        tensors = _folder_digest(Path(folder))
        fitting = [
            key
            for key, facts in stored.items()
            if facts.weights_digest == tensors and str(facts.extra.get("width") or "") == width
        ]
        own = [
            key for key in fitting if stored[key].name == Path(folder).resolve().name + (f"+{width}" if width else "")
        ]
        fitting = own if len(own) == 1 else fitting  # a start may be that of several runs
        if not fitting:
            what = "run" if is_run_folder(folder) else "export"
            raise UnknownNameError(
                "encoder", text, stored, f"This {what} has no features here yet: g2l embed --encoder {text}"
            )
    else:
        name = read_encoder_file(Path(text)).name if text.lower().endswith(".toml") else text
        fitting = [k for k, facts in stored.items() if normalized(name) in {normalized(k), normalized(facts.name)}]
        fitting = fitting or [k for k, facts in stored.items() if text == _function_name(facts)]
    if len(fitting) > 1:
        raise UsageError(f"{text!r} fits several stored encoders: {', '.join(fitting)}. Write the one you mean")
    if not fitting:
        raise UnknownNameError("encoder", text, stored, "g2l store ls lists them.")
    return fitting[0]


def _folder_digest(folder: Path) -> str:
    """The digest of the weights in a run folder or an exported one, as its record says."""
    if is_export_folder(str(folder)):
        return export_digest(read_export_record(folder))
    return str(_student_record(folder)["weights_digest"])


def _function_name(facts: EncoderFacts) -> str:
    """MODULE:FUNCTION of a stored encoder, with its size and pooling; empty if it came from no function."""
    kind, _, function = facts.weights.partition(":")
    return f"{function.partition(':')[0]}:{facts.name}" if kind == "module" else ""
