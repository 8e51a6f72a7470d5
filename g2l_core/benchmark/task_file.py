"""Read task files: one TOML table for each task, whose keys are the fields of `TaskSpec` and its options."""

import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from g2l_core.benchmark.spec import TaskSpec, parse_expected
from g2l_core.errors import TaskError, UnknownNameError, UsageError


def task_tables(path: Path) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """The title of a task file and the table of each task, not yet read.

    Raises:
        UsageError: It is no TOML, or has no task.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the task file {path}: {error}") from error
    unknown = set(content) - {"title", "tasks"}
    tables = content.get("tasks")
    if unknown or not isinstance(tables, dict) or not tables or not all(isinstance(t, dict) for t in tables.values()):
        found = f"; found {', '.join(sorted(unknown))}" if unknown else ""
        raise UsageError(f"{path} needs one table [tasks.NAME] for each task, and may have a title{found}")
    return content.get("title", path.stem), tables


def read_task(path: Path, name: str, table: Mapping[str, Any]) -> TaskSpec:
    """One task.

    Args:
        path: The task file, for messages.
        name: The task's.
        table: Its keys. Those of a family's options begin with the field's name: knn_k.

    Raises:
        UsageError: A key that no task has, or a value of another kind.
        TaskError: It cannot be evaluated.
    """
    where = f"{path}, [tasks.{name}]"
    known = known_keys()
    plain: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    expected = table.get("expected", {})
    if not isinstance(expected, dict):
        raise UsageError(f"{where}: expected must be a table of metrics, not {expected!r}")
    for key, value in table.items():
        if key not in known:
            raise UnknownNameError(f"key of [tasks.{name}] in {path}:", key, known)
        group, option, default = known[key]
        if key != "expected":
            given = plain if not group else groups.setdefault(group, {})
            given[option] = _value(f"{where}: {key}", value, default)
    try:
        options = {group: type(_DEFAULTS[group])(**given) for group, given in groups.items()}
    except TaskError as error:
        raise TaskError(f"task {name}: {error}") from error
    return TaskSpec(name=name, expected=parse_expected(name, expected), **plain, **options)


_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(TaskSpec) if field.name != "name"}


def known_keys() -> dict[str, tuple[str, str, Any]]:
    """What each key of a task sets: the group of options (empty for the task itself), the field, its default."""
    found: dict[str, tuple[str, str, Any]] = {}
    for name, default in _DEFAULTS.items():
        if is_dataclass(default):
            for option in fields(default):
                found[f"{name}_{option.name}"] = (name, option.name, getattr(default, option.name))
        else:
            found[name] = ("", name, default)
    return found


def _value(where: str, value: object, default: object) -> object:
    """A value of the default's kind; one in place of a list is a list of one.

    Raises:
        UsageError: It is of another kind.
    """
    if isinstance(default, tuple):
        kind = type(default[0]) if default else str
        listed = value if isinstance(value, list) else [value]
        if all(_fits(item, kind) for item in listed):
            return tuple(kind(item) for item in listed)
        raise UsageError(f"{where} must be {_WORDS[kind]}, or a list of such, not {value!r}")
    if not _fits(value, type(default)):
        raise UsageError(f"{where} must be {_WORDS[type(default)]}, not {value!r}")
    return value


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _fits(value: object, kind: type) -> bool:
    """TOML's whole numbers are numbers too; its booleans are not."""
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)
