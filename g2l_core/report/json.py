"""A report as JSON and back.

Keys are sorted and floats are written by `repr`, so equal reports give equal bytes. JSON has no word for some floats:
NaN is null, and the infinities are the strings "Infinity" and "-Infinity", which the text of a setting can therefore
not be.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from math import inf, isnan, nan
from typing import Any

from g2l_core.results import Report

FORMAT = 1
"""The version of results.json."""

_FLOAT_WORDS: Mapping[str | None, float] = {None: nan, "Infinity": inf, "-Infinity": -inf}
_NUMBERS = re.compile(r"\[\n[-+.0-9eE,\s]+\]")
"""No text of JSON holds a line break, so this finds lists alone."""


def _plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, tuples as lists, floats that JSON lacks as their words."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and isnan(value):
        return None
    if isinstance(value, float) and value in (inf, -inf):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def json_text(report: Report) -> str:
    """The whole report; a list of numbers stands on one line."""
    text = json.dumps({"format": FORMAT, **_plain(report)}, sort_keys=True, indent=1, allow_nan=False)
    return _NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n"


def report_of(raw: Mapping[str, Any]) -> Report:
    """The report that parsed JSON holds; what later versions added may be absent.

    Raises:
        ValueError: It is no report.
    """
    from pydantic import TypeAdapter

    return TypeAdapter(Report).validate_python(_with_floats(raw))


def _with_floats(value: Any) -> Any:
    """JSON with NaN in place of null. In settings, which may be texts, the infinities' words become floats as well.

    Elsewhere the type of a field says whether it holds a number, and pydantic reads the words so.
    """
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    if isinstance(value, dict):
        return {
            key: {name: _FLOAT_WORDS.get(word, word) for name, word in item.items()}
            if key == "settings" and isinstance(item, dict)
            else _with_floats(item)
            for key, item in value.items()
        }
    return nan if value is None else value
