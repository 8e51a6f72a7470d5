"""`g2l init`: a study file that explains every key, made from the options themselves; and the shipped examples."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from g2l_core.errors import RunError, UnknownNameError, writing
from g2l_core.files import write_text
from g2l_core.options import Entry
from pipeline.config import describe_kind
from pipeline.study_file import TABLES, shipped_studies

EXAMPLES = Path(__file__).parent / "examples"
TEMPLATE = "study.toml"
WIDTH = 100

_HEAD = """\
# A study: everything from slides to a report, by one command that can be interrupted and called again.
#   g2l run study.toml --dry-run    tells what would be done, hours and gigabytes
#   g2l run study.toml              does it, in the folder study/
# Lines with # before a key show its default. Paths are relative to the folder that g2l run is called in.
title = "My study"
"""
_FILLED: Mapping[tuple[str, str], Any] = {
    ("slides", "inputs"): ["slides/"],
    ("teacher", "teacher"): "h-optimus-0",
    ("student", "student"): "hibou-l",
}
"""What every study needs, as an example."""
_LAST = """
# Other slides to benchmark on, as many tables as wanted, with the keys of [slides]. Without any, the slides above are.
# [bench.slides.NAME]
# inputs = ["other/"]
"""


def study_template() -> str:
    """The text of a study file with every key, its meaning and its default."""
    lines = [_HEAD.rstrip()]
    for table, keys in TABLES.items():
        lines += ["", f"[{table}]"]
        for name, entry in keys.items():
            if not entry.option.recipe_only:
                lines += _key_lines(table, name, entry)
    return "\n".join(lines) + "\n" + _LAST


def _key_lines(table: str, name: str, entry: Entry) -> Iterator[str]:
    yield from wrap(entry.option.help, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    if (table, name) in _FILLED:
        yield f"{name} = {_toml(_FILLED[table, name])}"
    elif entry.default is None or entry.default in ("", ()) or (name == "drawn" and not entry.default):
        yield f"# {name} =   # {describe_kind(entry.kind)}"
    else:
        yield f"# {name} = {_toml(entry.default)}"


def _toml(value: Any) -> str:
    """A plain value as TOML, which writes texts, numbers, booleans and lists as JSON does."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def write_template(folder: Path) -> Path:
    """Write study.toml, with every key explained.

    Raises:
        RunError: It is there already, or the folder cannot be written to.
    """
    _write({folder / TEMPLATE: study_template()})
    return folder / TEMPLATE


def examples() -> dict[str, list[Path]]:
    """The files of each shipped example: studies, and task files with labels of public images."""
    found = {name: [path] for name, path in shipped_studies().items()}
    return found | {path.name: sorted(path.iterdir()) for path in sorted(EXAMPLES.iterdir()) if path.is_dir()}


def write_example(name: str, folder: Path) -> list[Path]:
    """Write the files of a shipped example. Nothing is downloaded.

    Raises:
        UnknownNameError: There is no such example.
        RunError: A file of that name is there already, or the folder cannot be written to.
    """
    known = examples()
    if name not in known:
        raise UnknownNameError("example", name, known)
    texts = {folder / path.name: path.read_text(encoding="utf-8") for path in known[name]}
    _write(texts)
    return list(texts)


def _write(texts: Mapping[Path, str]) -> None:
    if there := [path for path in texts if path.exists()]:
        raise RunError(f"{there[0]} is there already: move it away, or name another folder")
    for path, text in texts.items():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
