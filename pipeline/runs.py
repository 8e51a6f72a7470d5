"""The run folder of `g2l distill`: made once, continued only with the same settings, described by run.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from g2l_core.distillation.training import TrainOutcome
from g2l_core.encoders.resolve import RUN_RECORD
from g2l_core.errors import RunError
from g2l_core.files import write_text
from g2l_core.store.provenance import differences


@dataclass(frozen=True, kw_only=True)
class ResultFacts:
    """How a run ended: the result in run.json."""

    outcome: TrainOutcome
    before: Mapping[str, float]
    """Held-out metric values of the student before training."""
    after: Mapping[str, float]
    """The same of the student that was kept."""
    exported: Mapping[str, Any]
    """The record of the student folder."""
    kept: str
    """Which weights were kept: last or best."""
    kept_step: int
    share_waiting: float
    """Fraction of the training time that was spent waiting for data."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys of another version, kept as they are."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ResultFacts":
        """The result that `to_json` gave."""
        outcome = {**content["outcome"], "warnings": tuple(content["outcome"].get("warnings", ()))}
        return cls(**_arguments(cls, {**content, "outcome": TrainOutcome(**_arguments(TrainOutcome, outcome))}))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**_content(self), "outcome": _content(self.outcome)}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What run.json says of a run. Settings and specs are plain values, since another version's may lack some."""

    teacher: Mapping[str, Any]
    """The teacher's facts."""
    student: Mapping[str, Any]
    """The student's facts, before training."""
    settings: Mapping[str, Any]
    """`DistillSettings`, with the number of steps."""
    held_out: str
    """Describes what is held out."""
    rows: Mapping[str, Mapping[str, int]]
    """Number of patches by slide id, of `train` and `held_out`."""
    store: Mapping[str, Any] = field(default_factory=dict)
    """The store's grid and views."""
    replay: Mapping[str, Any] = field(default_factory=dict)
    """`ReplaySpec`."""
    ranks: int = 1
    about: Mapping[str, Any] = field(default_factory=dict)
    """Versions, device, and where the store is: what may differ when a run is resumed."""
    result: ResultFacts | None = None
    """None until the run has finished."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys of another version, kept as they are."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "RunFacts":
        """The facts that `to_json` gave."""
        result = content.get("result")
        return cls(**_arguments(cls, {**content, "result": ResultFacts.from_json(result) if result else None}))

    def to_json(self) -> dict[str, Any]:
        """Plain values; the result only where there is one."""
        content = _content(self)
        del content["result"]
        return {**content, "result": self.result.to_json()} if self.result else content

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes."""
        return {name: getattr(self, name) for name in _names(type(self)) if name not in {"about", "result"}}


def _names(kind: type) -> list[str]:
    return [f.name for f in fields(kind) if f.name != "extra"]


def _arguments(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a dataclass from JSON; keys that are none of its fields go into `extra`."""
    known = {name: value for name, value in content.items() if name in _names(kind)}
    return {**known, "extra": {name: value for name, value in content.items() if name not in known}}


def _content(facts: Any) -> dict[str, Any]:
    """The reverse of `_arguments`."""
    return {**facts.extra, **{name: getattr(facts, name) for name in _names(type(facts))}}


def open_run(folder: Path, facts: RunFacts, *, resume: bool) -> None:
    """Make a run folder, or check that the one there is the same run.

    Args:
        folder: The run folder.
        facts: What identifies the run.
        resume: Whether the user wants to continue a run that is there.

    Raises:
        RunError: The folder holds another run or something else.
    """
    if (folder / RUN_RECORD).is_file():
        if not resume:
            raise RunError(f"{folder} holds a run already: --resume continues it, or give another --out")
        changed = [
            f"{name} was {stored!r}, now {asked!r}"
            for name, stored, asked in differences(read_run(folder).identity(), facts.identity())
        ]
        if changed:
            raise RunError(f"{folder} was begun with other settings: {'; '.join(changed)}. Use them, or another --out")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and is no run of g2l distill; give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}") from error
    write_run(folder, facts)


def write_run(folder: Path, facts: RunFacts) -> None:
    """Write run.json, all of it or nothing."""
    write_text(folder / RUN_RECORD, json.dumps(facts.to_json(), indent=2, sort_keys=True) + "\n")


def read_run(folder: Path) -> RunFacts:
    """Read run.json.

    Raises:
        RunError: It is no record of a run.
    """
    path = folder / RUN_RECORD
    try:
        return RunFacts.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is no record of g2l distill: {error}") from error
