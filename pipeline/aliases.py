"""ALIAS=ENCODER: names that users give the encoders of a benchmark, and a report that speaks of encoders by them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import glob, has_magic
from pathlib import Path

from g2l_core.encoders.resolve import split_width
from g2l_core.errors import UsageError
from g2l_core.report.names import renamed
from g2l_core.results import Report


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
    new = renamed(report, aliases)
    rows = zip(report.encoders, new.encoders, strict=True)
    described = [replace(row, stored_key=old.stored_key or old.key) if old.key in aliases else row for old, row in rows]
    return replace(new, encoders=tuple(described))
