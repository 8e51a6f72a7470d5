"""Encoders by other names: short ones where a page has room for one name only, and those that users give them."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from g2l_core.report.tables import encoder_order
from g2l_core.results import Report

_OF_ENCODERS = frozenset({"key", "encoder", "reference", "encoders"})
"""Fields of a report that hold keys of encoders."""


def named(report: Report) -> Report:
    """The report with names in place of keys, without the digests at the ends of keys that need none to differ.

    The table of encoders has the digests in a column of their own.
    """
    names = {key: name for key, name in short_names(report).items() if name != key}
    return replace(renamed(report, names), expected=_renamed(report.expected, names))


def renamed(report: Report, names: Mapping[str, str]) -> Report:
    """The report with other names in place of keys, everywhere but in what encoders are described by.

    Published values keep their encoders' names, which are those of their source.

    Args:
        report: All of one benchmark run.
        names: The new names by key. Keys without one stay.
    """
    if not names:
        return report
    nested = {row.name: names[row.key] for row in report.encoders if row.key in names}
    tasks = {row.task for rows in (report.results, report.comparisons, report.failures) for row in rows}
    new = replace(_renamed(report, names), expected=report.expected)
    return replace(
        new,
        summary=tuple(_in_text(text, names, tasks) for text in report.summary),
        notes=tuple(_in_text(text, names, tasks) for text in report.notes),
        encoders=tuple(replace(row, nested_in=nested.get(row.nested_in, row.nested_in)) for row in new.encoders),
    )


def short_names(report: Report) -> dict[str, str]:
    """By key, the key without its end if that is the beginning of the encoder's digest and nobody else has the rest."""
    digests = {encoder.key: encoder.digest for encoder in report.encoders}
    order = encoder_order(report)
    stems = {key: _without_digest(key, digests.get(key, "")) for key in order}
    counts = Counter([*stems.values(), *(key for key in order if stems[key] != key)])
    return {key: stem if counts[stem] == 1 else key for key, stem in stems.items()}


def _without_digest(key: str, digest: str) -> str:
    found = re.fullmatch(r"(.+)-([0-9a-f]{8})", key)
    return found[1] if found and digest.startswith(found[2]) else key


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The same with other names in the fields that hold keys, however deep, and in settings, which may name one."""
    if isinstance(value, tuple):
        return tuple(_renamed(item, names) for item in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed: dict[str, Any] = {}
    for kept in fields(value):
        held = getattr(value, kept.name)
        if kept.name == "settings":
            changed[kept.name] = {setting: names.get(what, what) for setting, what in held.items()}
        elif kept.name not in _OF_ENCODERS:
            changed[kept.name] = _renamed(held, names)
        elif isinstance(held, tuple):
            changed[kept.name] = tuple(
                names.get(item, item) if isinstance(item, str) else _renamed(item, names) for item in held
            )
        else:
            changed[kept.name] = names.get(held, held)
    return replace(value, **changed)


def _in_text(text: str, names: Mapping[str, str], tasks: set[str]) -> str:
    """A sentence with other names. A task that it begins with, as in "task NAME: ...", keeps its own."""
    head, colon, words = text.partition(": ")
    if not colon or head.removeprefix("task ") not in tasks:
        head, colon, words = "", "", text
    keys = "|".join(re.escape(key) for key in sorted(names, key=len, reverse=True))
    found = re.compile(rf"(?<![\w.+/-])(?:{keys})(?![\w+/-])")
    return head + colon + found.sub(lambda match: names[match[0]], words)
