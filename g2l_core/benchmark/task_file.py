"""Read task files: one TOML table for each task, whose keys are the fields of `TaskSpec` and its options."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from math import inf, isfinite
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from g2l_core.benchmark.spec import TaskSpec
from g2l_core.errors import G2LError, TaskError, UnknownNameError, UsageError
from g2l_core.files import parse_toml
from g2l_core.results import PublishedValue

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a table of texts",
    "mapping_type": "a table of texts",
}
"""What a value should have been, by the type of pydantic's error."""


def task_tables(path: Path) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """The title of a task file and the table of each task, still to be read by `read_task`.

    Raises:
        UsageError: The file is not TOML, or has no task.
    """
    try:
        content = parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the task file {path}, which must be TOML: {error}") from error
    unknown = set(content) - {"title", "tasks"}
    tables = content.get("tasks")
    if unknown or not isinstance(tables, dict) or not tables or not all(isinstance(t, dict) for t in tables.values()):
        found = f"; found {', '.join(sorted(unknown))}" if unknown else ""
        raise UsageError(f"{path} needs one table [tasks.NAME] for each task, and may have a title{found}")
    return content.get("title", path.stem), tables


def read_tasks(path: Path) -> tuple[str, list[TaskSpec]]:
    """The title and the tasks of a task file.

    Raises:
        UsageError: The file is not TOML, has no task, or has a key that no task has.
        TaskError: A task cannot be evaluated.
    """
    title, tables = task_tables(path)
    return title, [read_task(path, name, table) for name, table in tables.items()]


def read_named_task(path: Path, name: str) -> TaskSpec:
    """The one task of a file that a user names; the name may be empty where there is one.

    Raises:
        UsageError: There is no such task, or which of several is not said.
        TaskError: The task cannot be evaluated.
    """
    _, tables = task_tables(path)
    if not name and len(tables) == 1:
        name = next(iter(tables))
    if name not in tables:
        wanted = f"there is no task {name!r}" if name else "say which task with --task"
        raise UsageError(f"{path}: {wanted}; it has {', '.join(tables)}")
    return read_task(path, name, tables[name])


def read_task(path: Path, name: str, table: Mapping[str, Any]) -> TaskSpec:
    """One task.

    Args:
        path: The task file, for error messages.
        name: The name of the task.
        table: Its keys. An option of a metric group is written with the name of its field first: `knn_k`.

    Raises:
        UsageError: No task has such a key, or a value is of another kind.
        TaskError: The task cannot be evaluated.
    """
    where = f"{path}, [tasks.{name}]"
    known = known_keys()
    plain: dict[str, Any] = {}
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        if key not in known:
            raise UnknownNameError(f"key of [tasks.{name}] in {path}:", key, known)
        group, option, kind = known[key]
        if key == "expected":
            if not isinstance(value, dict):
                raise UsageError(f"{where}: expected must be a table of metrics, not {value!r}")
            plain[key] = parse_expected(name, value)
        else:
            target = grouped.setdefault(group, {}) if group else plain
            target[option] = _checked(f"{where}: {key}", value, kind, UsageError)
    hints = get_type_hints(TaskSpec)
    try:
        options = {group: hints[group](**values) for group, values in grouped.items()}
    except TaskError as error:
        raise TaskError(f"task {name}: {error}") from error
    return TaskSpec(name=name, **plain, **options)


def parse_expected(task: str, table: Mapping[str, Any]) -> tuple[PublishedValue, ...]:
    """The published values of a task file.

    Args:
        task: The name of the task, for error messages.
        table: {metric: {encoder, value, tolerance, source}}, or a list of such tables for several encoders.

    Raises:
        TaskError: An entry lacks a key, has another one, or has a value that cannot be used.
    """
    kinds = {key: kind for key, kind in get_type_hints(PublishedValue).items() if key not in ("task", "metric")}
    expected = []
    for metric, entries in table.items():
        where = f"task {task}: expected.{metric}"
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, Mapping) or set(entry) != set(kinds):
                found = ", ".join(sorted(entry)) if isinstance(entry, Mapping) else repr(entry)
                raise TaskError(f"{where} needs just the keys {', '.join(kinds)}; found {found}")
            values = {key: _checked(f"{where}: {key}", entry[key], kind, TaskError) for key, kind in kinds.items()}
            published = PublishedValue(task=task, metric=metric, **values)
            if not published.encoder or not published.source or not isfinite(published.value):
                raise TaskError(f"{where}: encoder and source may not be empty, and value must be finite")
            if not 0 <= published.tolerance < inf:
                raise TaskError(f"{where}: tolerance must be 0 or more, not {entry['tolerance']}")
            expected.append(published)
    return tuple(expected)


@cache
def known_keys() -> Mapping[str, tuple[str, str, Any]]:
    """What each key of a task sets: the group of options (empty for the task itself), the field, its type."""
    keys: dict[str, tuple[str, str, Any]] = {}
    for name, kind in get_type_hints(TaskSpec).items():
        if is_dataclass(kind):
            keys |= {f"{name}_{option}": (name, option, type_) for option, type_ in get_type_hints(kind).items()}
        elif name != "name":
            keys[name] = ("", name, kind)
    return keys


def _checked(where: str, value: object, kind: Any, refusal: type[G2LError]) -> Any:
    """A value if it is of this type. TOML's whole numbers are numbers too; a single value becomes a list of one.

    Raises:
        G2LError: The value is of another type. It is raised as `refusal`.
    """
    many = get_origin(kind) is tuple
    try:
        candidate = tuple(value if isinstance(value, list) else [value]) if many else value
        return TypeAdapter(kind).validate_python(candidate, strict=True)
    except ValidationError as error:
        wanted = _KINDS[error.errors()[0]["type"]] + (", or a list of such" if many else "")
        raise refusal(f"{where} must be {wanted}, not {value!r}") from error
