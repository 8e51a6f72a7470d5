"""A report as JSON and back.

Keys are sorted and floats are written by `repr`, so equal reports give equal bytes. JSON has no word for some floats:
NaN is null, and the infinities are the strings "Infinity" and "-Infinity", which the text of a setting can therefore
not be.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from math import inf, isnan, nan
from typing import Any

from g2l_core.results import (
    CkaMatrix,
    Comparison,
    ConfusionMatrix,
    EncoderSummary,
    Estimate,
    ExpectedFigure,
    Failure,
    Pictures,
    Projection,
    Report,
    Result,
    SlideMap,
)

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
        KeyError: Or a TypeError, ValueError or AttributeError: it is no report.
    """
    return Report(
        title=raw["title"],
        summary=tuple(raw["summary"]),
        encoders=tuple(EncoderSummary(**row) for row in raw["encoders"]),
        results=tuple(_result(row) for row in raw["results"]),
        comparisons=tuple(_comparison(row) for row in raw["comparisons"]),
        failures=tuple(Failure(**row) for row in raw["failures"]),
        provenance=dict(raw["provenance"]),
        notes=tuple(raw.get("notes", ())),
        expected=tuple(
            ExpectedFigure(**{**row, "value": _float(row["value"]), "tolerance": _float(row["tolerance"])})
            for row in raw.get("expected", ())
        ),
        pictures=_pictures(raw.get("pictures", {})),
    )


def _pictures(raw: Mapping[str, Any]) -> Pictures:
    return Pictures(
        cka=tuple(
            CkaMatrix(**_tuples({**row, "values": [map(_float, line) for line in row["values"]]}))
            for row in raw.get("cka", ())
        ),
        projections=tuple(
            Projection(**_tuples({**row, **{name: map(_float, row[name]) for name in ("x", "y", "shares")}}))
            for row in raw.get("projections", ())
        ),
        slides=tuple(SlideMap(**_tuples({**row, "cell_mm": _float(row["cell_mm"])})) for row in raw.get("slides", ())),
        confusions=tuple(
            ConfusionMatrix(**_tuples({**row, "settings": _settings(row["settings"])}))
            for row in raw.get("confusions", ())
        ),
    )


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its lists, and the lists in them, as tuples."""
    return {name: value if isinstance(value, str | Mapping) else _tuple(value) for name, value in row.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _result(raw: Mapping[str, Any]) -> Result:
    return Result(**{**raw, "estimate": _estimate(raw["estimate"]), "settings": _settings(raw["settings"])})


def _settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _FLOAT_WORDS.get(value, value) for key, value in raw.items()}


def _comparison(raw: Mapping[str, Any]) -> Comparison:
    return Comparison(
        **{
            **raw,
            "difference": _estimate(raw["difference"]),
            "p_value": _float(raw["p_value"]),
            "p_holm": _float(raw.get("p_holm")),
        },
    )


def _estimate(raw: Mapping[str, Any]) -> Estimate:
    return Estimate(**{**raw, **{name: _float(raw[name]) for name in ("value", "low", "high")}})


def _float(word: float | str | None) -> float:
    return float(_FLOAT_WORDS[word] if word is None or isinstance(word, str) else word)
