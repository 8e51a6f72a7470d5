"""Encoders by the names that people know, where a page has room for one name only."""

import re
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from typing import Any

from g2l_core.report.tables import encoder_order
from g2l_core.results import Report

_OF_ENCODERS = frozenset({"key", "encoder", "reference", "nested_in", "encoders"})
"""Fields of a report that hold keys of encoders."""


def named(report: Report) -> Report:
    """The report with names in place of keys, without the digests at the ends of keys that need none to differ.

    The table of encoders has the digests in a column of their own.
    """
    names = short_names(report)
    changed = {kept.name: _renamed(getattr(report, kept.name), names) for kept in fields(report)}
    summary = tuple(_in_sentence(sentence, names) for sentence in report.summary)
    return replace(report, **{**changed, "summary": summary})


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


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """The same with other names in the fields that hold keys, however deep."""
    if isinstance(value, tuple):
        return tuple(_renamed(item, names) for item in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed: dict[str, Any] = {}
    for kept in fields(value):
        held = getattr(value, kept.name)
        if kept.name not in _OF_ENCODERS:
            new = _renamed(held, names) if isinstance(held, tuple) or is_dataclass(held) else held
        elif isinstance(held, tuple):
            new = tuple(names.get(item, item) if isinstance(item, str) else _renamed(item, names) for item in held)
        else:
            new = names.get(held, held)
        if new is not held:
            changed[kept.name] = new
    return replace(value, **changed) if changed else value


def _in_sentence(sentence: str, names: dict[str, str]) -> str:
    for key, name in sorted(names.items(), key=lambda item: -len(item[0])):
        if key != name:
            sentence = re.sub(rf"(?<![\w-]){re.escape(key)}(?![\w-])", name.replace("\\", r"\\"), sentence)
    return sentence
