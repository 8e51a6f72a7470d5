"""ALIAS=ENCODER: names that users give the encoders of a benchmark, and a report that speaks of encoders by them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from g2l_core.encoders.resolve import split_width
from g2l_core.errors import UsageError
from g2l_core.results import EncoderSummary, Report

_NAMING = frozenset({"encoder", "reference", "encoders"})
"""Fields of a report's rows and pictures that hold encoders' names."""


def split_names(text: str) -> list[str]:
    """The encoders in a list by comma. A comma in the name of a folder that is there, as of g2l sweep's, is its own.

    Examples:
        >>> split_names("h-optimus-0, G2L=run/")
        ['h-optimus-0', 'G2L=run/']
    """
    parts, names, first = text.split(","), list[str](), 0
    while first < len(parts):
        ends = range(len(parts), first, -1)
        last = next((end for end in ends if _is_folder(",".join(parts[first:end]))), first + 1)
        names.append(",".join(parts[first:last]).strip())
        first = last
    return [name for name in names if name]


def _is_folder(text: str) -> bool:
    """Whether a text, or what follows its alias, names folders that are there."""
    alias, _, name = text.partition("=")
    return any(_is_path(each.strip()) for each in (text, name if "," not in alias else "") if each.strip())


def split_alias(text: str) -> tuple[str, str]:
    """The alias in ALIAS=ENCODER, empty where there is none, and the encoder.

    Raises:
        UsageError: One side is empty.
    """
    alias, equals, name = text.partition("=")
    if not equals or "/" in alias or _is_path(text):
        return "", text
    if not alias.strip() or not name.strip():
        raise UsageError(f"--encoders {text}: expected ENCODER or ALIAS=ENCODER, as in G2L=run/")
    return alias.strip(), name.strip()


def _is_path(text: str) -> bool:
    """Whether a text names folders that are there: loss=mse is one of g2l sweep, loss=* a pattern of several."""
    return Path(split_width(text)[0]).exists() or (has_magic(text) and bool(glob(text)))  # noqa: PTH207


def require_distinct(columns: Sequence[str]) -> None:
    """Refuse a report that would have one name twice.

    Raises:
        UsageError: Two encoders have one name, or one encoder stands there twice.
    """
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UsageError(f"--encoders names {twice[0]} twice: leave one out, or give the encoders different aliases")


def with_aliases(report: Report, aliases: Mapping[str, str]) -> Report:
    """The report with aliases in place of encoders' names, everywhere but in what the encoders are described by.

    Args:
        report: All of one benchmark run.
        aliases: By the name that the encoder has in the report.
    """
    if not aliases:
        return report
    nested = {row.name: aliases[row.key] for row in report.encoders if row.key in aliases}
    return replace(
        report,
        summary=tuple(_in_text(text, aliases) for text in report.summary),
        notes=tuple(_in_text(text, aliases) for text in report.notes),
        encoders=tuple(_described(row, aliases, nested) for row in report.encoders),
        results=_renamed(report.results, aliases),
        comparisons=_renamed(report.comparisons, aliases),
        failures=_renamed(report.failures, aliases),
        pictures=_renamed(report.pictures, aliases),
    )


def _described(row: EncoderSummary, aliases: Mapping[str, str], nested: Mapping[str, str]) -> EncoderSummary:
    row = replace(row, nested_in=nested.get(row.nested_in, row.nested_in))
    return replace(row, key=aliases[row.key], stored_key=row.stored_key or row.key) if row.key in aliases else row


def _in_text(text: str, aliases: Mapping[str, str]) -> str:
    """A sentence "task NAME: ..." with aliases; the task keeps its name."""
    task, colon, words = text.partition(": ")
    names = "|".join(re.escape(name) for name in sorted(aliases, key=len, reverse=True))
    found = re.compile(rf"(?<![\w.+/-])(?:{names})(?![\w+/-])")
    return task + colon + found.sub(lambda match: aliases[match[0]], words)


def _renamed(value: Any, aliases: Mapping[str, str]) -> Any:
    """Rows or pictures with aliases in the fields that name encoders, and in settings, which may name one."""
    if isinstance(value, tuple):
        return tuple(_renamed(each, aliases) for each in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed: dict[str, Any] = {}
    for each in fields(value):
        found = getattr(value, each.name)
        if each.name == "settings":
            changed[each.name] = {name: aliases.get(what, what) for name, what in found.items()}
        elif each.name not in _NAMING:
            changed[each.name] = _renamed(found, aliases)
        elif isinstance(found, str):
            changed[each.name] = aliases.get(found, found)
        else:
            changed[each.name] = tuple(aliases.get(name, name) for name in found)
    return replace(value, **changed)
