"""Write docs/reference.md, every option and every TOML key: `python -m pipeline.cli.reference`."""

import ast
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any, get_args

import typer
from typer.models import ArgumentInfo, CommandInfo, OptionInfo

from g2l_core.files import write_text
from g2l_core.options import PANELS, entries
from pipeline.config import NAMES, OPTIONS, describe_kind
from pipeline.study_file import BenchTable, SlidesTable, StudentTable, TeacherTable

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
INTRODUCTION = """\
# Reference of all options

Made from the code by `python -m pipeline.cli.reference`; edit the specs, not this page."""
RECIPES = f"""\
## Recipes and sweeps

A recipe is a TOML file for `g2l distill --config`; a sweep has these keys in `[base]`, and lists of their values in
`[grid]`. An option of the command line takes precedence over a recipe. A recipe may also name {", ".join(NAMES)}.
"""
STUDY_KEYS = """\
## Study files

The tables of a [study](studies.md) have the options above as keys: `[slides]` those of slides and patches of
`g2l cache-teacher`, `[teacher]` its others, `[student]` those of `g2l distill`, and these. `[bench.slides.NAME]` has
the keys of `[slides]`. `g2l init` writes a file that explains all of them.
"""
TASKS = """\
## Task files

One table `[tasks.NAME]` for each task of `g2l bench`. A single value may stand in place of a list of one. A
task may also have tables `[tasks.NAME.expected.METRIC]` of published values.
"""


def reference() -> str:
    """The page as Markdown."""
    from pipeline.cli.main import app

    lines = [INTRODUCTION]
    for name, command in _commands(app, "g2l"):
        lines += ["", f"## {name}\n\n{inspect.getdoc(command)}\n", *_command_tables(command)]
    rows = [
        (f"`{name}`", describe_kind(entry.kind), _shown(entry.default), entry.option.help)
        for name, entry in sorted(OPTIONS.items(), key=lambda item: PANELS.index(item[1].option.panel))
    ]
    lines += ["", RECIPES, *_table(("key", "value", "default", "meaning"), rows)]
    lines += ["", STUDY_KEYS, *_table(("table", "key", "value", "default", "meaning"), _study_rows())]
    lines += ["", TASKS, *_table(("key", "value", "default", "meaning"), _task_rows())]
    return "\n".join(lines) + "\n"


def _commands(app: typer.Typer, prefix: str) -> Iterator[tuple[str, Any]]:
    for info in app.registered_commands:
        yield f"{prefix} {_command_name(info)}", info.callback
    for group in app.registered_groups:
        if group.typer_instance:
            yield from _commands(group.typer_instance, f"{prefix} {group.name}")


def _command_name(info: CommandInfo) -> str:
    return info.name or getattr(info.callback, "__name__", "").replace("_", "-")


def _command_tables(command: Any) -> Iterator[str]:
    """A table for each panel of a command's help page."""
    panels: dict[str, list[tuple[str, ...]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind, info = get_args(parameter.annotation)
        if info.hidden:
            continue
        is_argument = isinstance(info, ArgumentInfo)
        value = "" if kind is bool else describe_kind(kind).removeprefix("a list of ")
        value += f" >= {info.min:g}" if info.min is not None else ""
        default = "required" if parameter.default is parameter.empty else _shown(parameter.default)
        row = (f"`{_shown_name(parameter.name, info)}`", value, default, info.help)
        panels.setdefault("Arguments" if is_argument else info.rich_help_panel or "Options", []).append(row)
    for place, (panel, rows) in enumerate(panels.items()):
        yield from ("",) * (place > 0)
        yield from _table((panel, "value", "default", "meaning"), rows)


def _shown_name(name: str, info: ArgumentInfo | OptionInfo) -> str:
    """The option as users write it. In an annotation, typer takes the first name as the default."""
    names = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
    default = name if isinstance(info, ArgumentInfo) else f"--{name.replace('_', '-')}"
    return ", ".join(names) or default


def _shown(default: Any) -> str:
    """A default as users write it; nothing where there is none."""
    if isinstance(default, bool):
        return "on" if default else ""
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`" if default else ""
    return "" if default is None or default in ("", MISSING) else f"`{default}`"


def _study_rows() -> Iterator[tuple[str, ...]]:
    tables = {"slides": SlidesTable, "teacher": TeacherTable, "student": StudentTable, "bench": BenchTable}
    for table, spec in tables.items():
        for name, kind, default, option in entries(spec):
            yield f"`[{table}]`", f"`{name}`", describe_kind(kind), _shown(default), option.help


def _task_rows() -> Iterator[tuple[str, str, str, str]]:
    from g2l_core.benchmark.spec import TaskSpec

    meanings = attribute_docs(TaskSpec)
    for field in fields(TaskSpec):
        if is_dataclass(field.default):
            inner = attribute_docs(type(field.default))
            for option in fields(field.default):
                value = getattr(field.default, option.name)
                yield f"`{field.name}_{option.name}`", _describe_value(value), _shown(value), inner.get(option.name, "")
        elif field.default is not MISSING and field.name != "expected":
            yield f"`{field.name}`", _describe_value(field.default), _shown(field.default), meanings.get(field.name, "")


def _describe_value(default: Any) -> str:
    """The kind of value that a key takes, by its default."""
    if isinstance(default, tuple):
        return describe_kind(tuple[type(default[0]) if default else str, ...])  # type: ignore[misc]
    return describe_kind(type(default))


def attribute_docs(spec: type) -> dict[str, str]:
    """The docstrings below the fields of a class, by field."""
    (body,) = ast.parse(dedent(inspect.getsource(spec))).body
    found = {}
    if isinstance(body, ast.ClassDef):
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = inspect.cleandoc(str(getattr(text.value, "value", "")))
    return found


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *cells)]


if __name__ == "__main__":
    write_text(PAGE, reference())
