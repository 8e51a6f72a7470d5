"""Widths of nested students as `g2l bench` takes them: from their own features, or the first of all stored ones."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from glob import has_magic
from pathlib import Path

from g2l_core.benchmark.widths import width_key
from g2l_core.encoders.resolve import find_stored, run_encoder, split_width
from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.store.facts import EncoderFacts
from pipeline.seeds import fitting_runs


def with_all_widths(text: str) -> list[str]:
    """RUN+all as the run and each of its widths, where RUN may be a pattern of runs; any other name as it is.

    Raises:
        UsageError: The run has no widths.
        EncoderError: The run's student is not finished, or its record cannot be read.
    """
    folder, width = split_width(text)
    runs = [folder] if width == "all" else []
    if text.endswith("+all") and has_magic(text):
        folder = text.removesuffix("+all")
        runs = fitting_runs(folder)
    if not runs:
        return [text]
    trained = [run_encoder(Path(run)).widths for run in runs]
    widths = [width for width in trained[0] if all(width in others for others in trained)]
    if not widths:
        raise UsageError(f"{text}: {folder} was not trained with --nested, so that it has no widths")
    return [folder, *(f"{folder}+{width}" for width in reversed(widths))]


def find_key(text: str, known: Mapping[str, EncoderFacts]) -> str:
    """The key of the stored encoder that a user means; for a width that is not stored by itself, KEY+WIDTH.

    Raises:
        UnknownNameError: No stored encoder fits.
        UsageError: Several fit, or the run was not trained for the width.
        EncoderError: The run's record cannot be read.
    """
    folder, width = split_width(text)
    if not width:
        return find_stored(text, known)
    try:
        return find_stored(text, known)
    except UnknownNameError:
        key = find_stored(folder, known)
    widths = tuple(known[key].extra.get("widths", ()))
    if int(width) not in widths:
        good = (
            f"the widths {', '.join(map(str, widths))}" if widths else "no widths, as it was not trained with --nested"
        )
        raise UsageError(f"{text}: {folder} has {good}")
    return width_key(key, int(width))


def facts_of_widths(keys: Iterable[str], known: Mapping[str, EncoderFacts]) -> dict[str, EncoderFacts]:
    """What is known of the KEY+WIDTH among some keys."""
    found = {}
    for key in keys:
        base, plus, width = key.rpartition("+")
        if key not in known and plus and base in known:
            facts = known[base]
            found[key] = replace(
                facts, name=f"{facts.name}+{width}", dim=int(width), extra={**facts.extra, "width": int(width)}
            )
    return found


def nested_in(facts: EncoderFacts) -> str:
    """Which nested encoder's first features these are, or all; empty where features are not nested."""
    if "widths" not in facts.extra:
        return ""
    return facts.name.removesuffix(f"+{facts.extra.get('width')}")
