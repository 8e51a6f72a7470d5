"""The run folder of `g2l distill` and `g2l baseline`: made once, continued with equal settings, told by run.json."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from g2l_core.distillation.training import TrainOutcome
from g2l_core.encoders.resolve import RUN_RECORD
from g2l_core.errors import RunError, refuse_open_files, writing
from g2l_core.files import parse_json, write_text
from g2l_core.store.facts import EncoderFacts, Facts
from g2l_core.store.locks import LOCKS, holds_only_locks
from g2l_core.store.provenance import differences

REMAINS = ".removed.partial"
"""Where in its folder a run is put that is to be removed."""
SEAL = "sha256"
"""The key of the digest of all other keys of run.json; older versions did not write it."""


@dataclass(frozen=True, kw_only=True)
class RunResult(Facts):
    """How a run ended: the result in run.json."""

    outcome: TrainOutcome
    before: Mapping[str, float]
    """Held-out metric values of the student before training, with their step."""
    after: Mapping[str, float]
    """The same of the student that was kept."""
    exported: Mapping[str, Any]
    """The record in the student folder, as `write_student` returns it."""
    kept: str
    """Which weights were kept: last or best."""
    kept_step: int
    share_waiting: float
    """Fraction of the training time that was spent waiting for data."""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "RunResult":
        """Read the result of a run."""
        return super().from_json({**stored, "outcome": TrainOutcome.from_json(stored["outcome"])})


@dataclass(frozen=True, kw_only=True)
class RunRecord(Facts):
    """What run.json says about a run."""

    teacher: EncoderFacts
    """The teacher, or the first of several."""
    more_teachers: tuple[EncoderFacts, ...] = field(default=(), metadata={"sparse": True})
    """The others of several."""
    student: EncoderFacts
    """The student before training."""
    settings: Mapping[str, Any]
    """`DistillSettings` with the number of steps, as plain values: those of another version may be others."""
    held_out: str
    """Describes what is held out."""
    rows: Mapping[str, Mapping[str, int]]
    """Number of patches by slide id, of `train` and of `held_out`."""
    baseline: Mapping[str, Any] = field(default_factory=dict, metadata={"sparse": True})
    """Of a run of g2l baseline, which learns from no teacher, what it learns from; `teacher` is then what it is
    compared with."""
    store: Mapping[str, Any] = field(default_factory=dict)
    """The store's grid and views."""
    replay: Mapping[str, Any] = field(default_factory=dict)
    """`ReplaySpec`, as plain values."""
    ranks: int = 1
    """Processes that trained together."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Versions, device, and where the store is: what may differ when a run is resumed."""
    result: RunResult | None = field(default=None, metadata={"sparse": True})
    """None until the run has finished."""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "RunRecord":
        """Read the record of a run, finished or not."""
        encoders: dict[str, Any] = {role: EncoderFacts.from_json(stored[role]) for role in ("teacher", "student")}
        more = stored.get("more_teachers", ())
        encoders["more_teachers"] = tuple(EncoderFacts.from_json(facts) for facts in more)
        result = {"result": RunResult.from_json(stored["result"])} if "result" in stored else {}
        return super().from_json({**stored, **encoders, **result})

    def identity(self) -> dict[str, Any]:
        """What a run has in common with the one that it resumes, as plain values."""
        differing = {"about", "result", *self.extra}
        return {name: value for name, value in self.to_json().items() if name not in differing}

    @property
    def teachers(self) -> tuple[EncoderFacts, ...]:
        """All teachers."""
        return (self.teacher, *self.more_teachers)


def open_run(folder: Path, record: RunRecord, *, restart: bool = False) -> None:
    """Make a run folder, or check that the one there is the same run, which then goes on.

    Args:
        folder: The run folder.
        record: What identifies the run.
        restart: Whether to remove a run that is there, and begin anew.

    Raises:
        RunError: The folder holds another run or something else.
    """
    remains = folder / REMAINS
    with writing(folder):
        if (folder / RUN_RECORD).is_file() and restart:
            _set_aside(folder, remains)
        shutil.rmtree(remains, ignore_errors=True)
    if (folder / RUN_RECORD).is_file():
        changed = [
            f"{name} was {stored!r}, now {asked!r}"
            for name, stored, asked in differences(read_run(folder).identity(), record.identity())
        ]
        if changed:
            raise RunError(
                f"use the former settings, another --out, or --restart, which removes the run in {folder}: it was "
                f"begun with other settings: {'; '.join(changed)}"
            )
        return
    if folder.exists() and not (folder.is_dir() and holds_only_locks(folder)):
        raise RunError(f"{folder} exists and is no run of g2l distill; give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}") from error
    write_run(folder, record)


def _set_aside(folder: Path, remains: Path) -> None:
    """Move what a run folder holds into `remains`, the record last: until then it is a run that has not begun."""
    remains.mkdir(exist_ok=True)
    held = [path for path in folder.iterdir() if path.name not in {LOCKS, REMAINS}]
    for path in sorted(held, key=lambda path: path.name == RUN_RECORD):
        path.replace(remains / path.name)


def write_run(folder: Path, record: RunRecord) -> None:
    """Write run.json, all of it or nothing.

    Raises:
        RunError: The disk is full, or cannot be written to.
    """
    content = record.to_json()
    with writing(folder / RUN_RECORD):
        sealed = {**content, SEAL: _digest(content)}
        write_text(folder / RUN_RECORD, json.dumps(sealed, indent=2, sort_keys=True) + "\n")


def _digest(content: Mapping[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_run(folder: Path) -> RunRecord:
    """Read run.json.

    Raises:
        RunError: It is no record of a run.
    """
    path = folder / RUN_RECORD
    try:
        content = {**parse_json(path.read_text(encoding="utf-8"))}
        seal = content.pop(SEAL, None)
        if seal not in (None, _digest(content)):
            raise ValueError("its content is not what its digest says")
        record = RunRecord.from_json(content)
        _require_kinds(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        refuse_open_files(error, path, RunError)
        raise RunError(
            f"{path} is no record of g2l distill ({type(error).__name__}: {error}): restore it from a copy, "
            "or remove the folder and distill again"
        ) from error
    return record


def _require_kinds(record: RunRecord) -> None:
    """Refuse values of other types than the fields have: whoever reads a record relies on them.

    Raises:
        ValueError: A value is of another type.
    """
    from pydantic import TypeAdapter

    settings: TypeAdapter[Any] = TypeAdapter(dict[str, Any])
    for mapping in (record.settings, record.store, record.replay, record.about, record.baseline):
        settings.validate_python(mapping, strict=True)
    TypeAdapter(dict[str, dict[str, int]]).validate_python(record.rows, strict=True)
    for text in (record.held_out, record.student.name, *(t.name for t in record.teachers), record.teacher.digest):
        TypeAdapter(str).validate_python(text, strict=True)
    if record.result is not None:
        values: TypeAdapter[Any] = TypeAdapter(dict[str, float])
        for mapping in (record.result.before, record.result.after):
            values.validate_python(mapping, strict=True)
        TypeAdapter(int).validate_python(record.result.outcome.steps, strict=True)
