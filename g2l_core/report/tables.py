"""What the written and the drawn forms of a report share: reading order, human names, metric values as text."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, isfinite, isnan, log10
from typing import Literal

from g2l_core.errors import TaskError
from g2l_core.report.meanings import METRICS, RETAINED_SHARE, Meaning
from g2l_core.results import FEWEST, RETAINED, Comparison, Estimate, Failure, Plots, PublishedValue, Report, Result

_MAX_DECIMALS = 5
_LARGE = 1e7
ALPHA = 0.05
_FEW = 10
"""Fewer patients than this are said to be few."""
_ROUNDING = 1e-9
"""A value that is off by exactly the tolerance is within it."""

HEADLINES = (
    "knn_balanced_accuracy",
    "probe_balanced_accuracy",
    "slide_probe_balanced_accuracy",
    "slide_vote_balanced_accuracy",
    "abmil_balanced_accuracy",
    "survival_c_index",
    "regression_pearson",
    "cka_debiased",
    "robustness_ratio_k5",
    "consistency_cosine",
)
"""The first of these that a task has represents it where there is room for one value only; of several k, the first.
A task with none of them is represented by its first metric."""

_HIDDEN = ("duplicates_dropped",)
"""Settings that do not matter to how a value is computed."""


def meaning_of(metric: str) -> Meaning:
    """The meaning of a metric by the name in `METRICS` that it begins with, else its own name."""
    if metric.startswith(RETAINED):
        of = meaning_of(metric.removeprefix(RETAINED))
        return replace(RETAINED_SHARE, title=f"{RETAINED_SHARE.title}: {of.title}")
    for stem, known in METRICS.items():
        if metric == stem or metric.startswith(f"{stem}_"):
            rest = re.sub(r"\bk(\d+)\b", r"k=\1", metric[len(stem) :].replace("_", " ").strip())
            title = f"{known.title}, {rest}" if rest else known.title
            return Meaning(title=title, sentence=known.sentence, scale=known.scale, neutral=known.neutral)
    return Meaning(title=metric, scale=metric)


def split_k(metric: str) -> tuple[str, int | None]:
    """`robustness_ratio_k5` as ("robustness_ratio", 5); (metric, None) where the name does not end so."""
    match = re.fullmatch(r"(.+)_k([1-9][0-9]{0,8})", metric)
    return (match[1], int(match[2])) if match else (metric, None)


ROBUSTNESS = ("robustness_", "center_", "bias_drop_", "consistency_")
"""What the names of figures of robustness begin with. Features that have forgotten tissue are robust too."""

QUALITY = ("probe_balanced_accuracy", "knn_balanced_accuracy")
"""The first of these that a task has, or else another figure of `QUALITY_GROUPS`, stands beside every figure of
robustness."""

QUALITY_GROUPS = ("probe_", "knn_", "slide_probe_", "slide_vote_", "abmil_", "survival_", "regression_")
"""What the names of figures begin with that say how good features are at a task."""

NOT_KNOWN = "the task has no probe or kNN, so what such robustness costs is not known"


def is_of_robustness(metric: str) -> bool:
    """Whether a figure is of robustness, or the share of the teacher's robustness."""
    return metric.removeprefix(RETAINED).startswith(ROBUSTNESS)


def _quality(part: "TaskPart") -> str | None:
    """The figure that stands beside those of robustness; None where the task has none."""
    others = (name for group in QUALITY_GROUPS for name in part.results if name.startswith(group))
    return next((name for name in QUALITY if name in part.results), None) or next(others, None)


def beside(part: "TaskPart", metric: str) -> str:
    """What must be read beside a figure of robustness: how good the same features are at the task. Else nothing.

    In brackets is the difference from the first encoder, the teacher or whatever else a report begins with.
    """
    if not is_of_robustness(metric):
        return ""
    quality = _quality(part)
    if quality is None:
        return NOT_KNOWN
    row = part.results[quality]
    robust = part.results.get(metric) or part.results.get(metric.removeprefix(RETAINED), row)
    first = part.encoders[0]
    values = []
    for key in part.encoders:
        if key not in row:
            values += [f"{key} not known"] if key in robust else []
            continue
        value = row[key].estimate.value
        loss = f" ({number(value - row[first].estimate.value, 3, '+')})" if first in row and key != first else ""
        values.append(f"{key} {number(value, 3)}{loss}")
    return f"{meaning_of(quality).title} beside it: {', '.join(values)}"


def beside_difference(part: "TaskPart", compared: Comparison) -> str:
    """What must be read beside a difference in robustness: the difference in the task's figure. Else nothing."""
    if not is_of_robustness(compared.metric):
        return ""
    quality = _quality(part)
    if quality is None:
        return NOT_KNOWN
    row = part.results[quality]
    title = meaning_of(quality).title
    if not {compared.encoder, compared.reference} <= row.keys():
        return f"{title} beside it: not known"
    change = row[compared.encoder].estimate.value - row[compared.reference].estimate.value
    return f"{title} beside it: {number(change, 3, '+')}"


@dataclass(frozen=True, kw_only=True)
class TaskPart:
    """The part of a report about one task; metrics in order of appearance, encoders in the report's order."""

    name: str
    encoders: tuple[str, ...]
    """The encoders with a result or a failure here."""
    results: Mapping[str, Mapping[str, Result]]
    """By metric and encoder."""
    comparisons: tuple[Comparison, ...]
    failures: tuple[Failure, ...]
    expected: tuple[PublishedValue, ...]
    pictures: Plots

    @property
    def is_shown(self) -> bool:
        """Whether there is more to show than failures."""
        return bool(self.results or self.comparisons or self.expected or self.pictures.tasks())

    def headline(self) -> str | None:
        """The metric that represents the task; None where it has no result."""
        return headline(tuple(self.results))

    def gap(self, encoder: str) -> Literal["failed", "-"]:
        """The word for a value that is missing."""
        return "failed" if any(failure.encoder == encoder for failure in self.failures) else "-"


def headline(metrics: Sequence[str]) -> str | None:
    """The metric that represents the others; None where there is none."""
    own = [metric for metric in metrics if not metric.startswith(RETAINED)]
    for wanted in HEADLINES:
        for metric in own:
            if wanted in (metric, split_k(metric)[0]):
                return metric
    return own[0] if own else None


def encoder_order(report: Report) -> tuple[str, ...]:
    """The encoders' keys: the described ones first, then any other with a result, failure, comparison or picture."""
    described = [encoder.key for encoder in report.encoders]
    compared = [key for row in report.comparisons for key in (row.encoder, row.reference)]
    measured = [row.encoder for row in report.results]
    failed = [row.encoder for row in report.failures if row.encoder]
    return tuple(dict.fromkeys([*described, *measured, *failed, *compared, *report.pictures.encoders()]))


def task_parts(report: Report) -> tuple[TaskPart, ...]:
    """The report cut by task, in order of first appearance.

    Raises:
        TaskError: If two results have the same task, metric and encoder.
    """
    kinds: tuple[Iterable[Result | Comparison | Failure], ...] = (report.results, report.comparisons, report.failures)
    names = dict.fromkeys(row.task for rows in kinds for row in rows)
    names |= dict.fromkeys([*(row.task for row in report.expected), *report.pictures.tasks()])
    order = encoder_order(report)
    return tuple(_task_part(report, name, order) for name in names)


def _task_part(report: Report, name: str, order: Sequence[str]) -> TaskPart:
    results = [row for row in report.results if row.task == name]
    failures = tuple(row for row in report.failures if row.task == name)
    here = {row.encoder for row in results} | {row.encoder for row in failures}
    by_metric: dict[str, dict[str, Result]] = {}
    for row in results:
        if by_metric.setdefault(row.metric, {}).setdefault(row.encoder, row) is not row:
            raise TaskError(
                f"task {name!r} has two figures {row.metric!r} of encoder {row.encoder!r}; "
                "give what tells them apart in the metric's name"
            )
    return TaskPart(
        name=name,
        encoders=tuple(key for key in order if key in here),
        results={metric: by_metric[metric] for metric in _metric_order(results)},
        comparisons=tuple(row for row in report.comparisons if row.task == name),
        failures=failures,
        expected=tuple(row for row in report.expected if row.task == name),
        pictures=report.pictures.of_task(name),
    )


def _metric_order(results: Sequence[Result]) -> Mapping[str, None]:
    """As the encoder with the most metrics has them: the teacher, the first, has no similarity to itself."""
    counts = Counter(row.encoder for row in results)
    fullest = max(counts, key=counts.__getitem__, default="")
    return dict.fromkeys([row.metric for row in results if row.encoder == fullest] + [row.metric for row in results])


def support(row: Mapping[str, Result]) -> str:
    """What a row of values is computed from, as far as it is the same for all encoders: rows and settings."""
    results = list(row.values())
    rows = sorted({result.n for result in results})
    shared = [item for item in results[0].settings.items() if all(item in r.settings.items() for r in results)]
    k = ("k", split_k(results[0].metric)[1])
    settings = settings_text({name: value for name, value in shared if (name, value) != k})
    count = " to ".join(f"{n:,}" for n in dict.fromkeys((rows[0], rows[-1])))
    over = results[0].estimate
    patients = f" of {over.clusters:,} {over.unit}" if over.clusters and over.clusters != rows[-1] else ""
    return "; ".join(filter(None, (f"n = {count}{patients}", settings)))


def few_patients(part: "TaskPart") -> str:
    """What a reader must know where a task tests few patients; empty where it tests ten or more."""
    over = [result.estimate for row in part.results.values() for result in row.values() if result.estimate.clusters]
    least = min(over, key=lambda estimate: estimate.clusters, default=None)
    if least is None or least.clusters >= _FEW:
        return ""
    count, unit = least.clusters, least.unit
    if count < FEWEST:
        tested = f"Only {count} {unit} are tested" if count > 1 else f"Only one of the {unit} is tested"
        return f"{tested}: too few for an interval, which needs {FEWEST}, or for a p-value."
    sure = (
        "no difference can reach p < 0.05" if 2.0 ** (1 - count) >= ALPHA else "only a difference that nearly all show"
    )
    end = "" if sure.startswith("no") else " can reach p < 0.05"
    return f"Only {count} {unit} are tested: each of them decides much, intervals are wide, and {sure}{end}."


def settings_text(settings: Mapping[str, str | int | float | bool]) -> str:
    """`C = 1.0; converged; split: 5 folds by patients`, in the order of the names."""
    return "; ".join(_setting(*item) for item in sorted(settings.items()) if item[0] not in _HIDDEN)


def _setting(name: str, value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return name.replace("_", " ") if value else f"not {name.replace('_', ' ')}"
    return (
        f"{name.replace('_', ' ')} = {value}"
        if isinstance(value, int | float)
        else f"{name.replace('_', ' ')}: {value}"
    )


@dataclass(frozen=True, kw_only=True)
class ExpectedVsFound:
    """A published value and the one of this report."""

    expected: PublishedValue
    found: Estimate | None
    """None where that encoder or metric was not run."""

    @property
    def within(self) -> bool | None:
        """Whether the found value is within the tolerance; None where there is none to judge."""
        if self.found is None or isnan(self.found.value):
            return None
        return abs(self.found.value - self.expected.value) <= self.expected.tolerance + _ROUNDING

    @property
    def verdict(self) -> str:
        """In words."""
        if self.found is None or self.within is None:
            return "not run here"
        return "within" if self.within else f"off by {number(self.found.value - self.expected.value, 3, '+')}"


def published_text(expected: PublishedValue) -> str:
    """`0.95 \u00b1 0.01`."""
    return f"{expected.value:g} \u00b1 {expected.tolerance:g}"


def against_published(part: TaskPart, report: Report) -> tuple[ExpectedVsFound, ...]:
    """Each published value of a task with the one found, by the encoder's alias, key or name.

    Case and separators do not count: G2L and g2l, uni_v2 and uni-v2 are the same. Of several encoders that fit, one
    whose alias or key does goes before one whose name does.
    """
    keys = {_plain(encoder.name): encoder.key for encoder in reversed(report.encoders)}
    keys |= {_plain(encoder.stored_key): encoder.key for encoder in report.encoders if encoder.stored_key}
    keys |= {_plain(key): key for key in part.encoders}
    pairs = []
    for row in part.expected:
        result = part.results.get(row.metric, {}).get(keys.get(_plain(row.encoder), row.encoder))
        pairs.append(ExpectedVsFound(expected=row, found=result.estimate if result else None))
    return tuple(pairs)


def reasons(failures: Sequence[Failure]) -> list[tuple[str, str]]:
    """Where and why; encoders of a task that failed alike in one row: ("oral, a and b", "no probe converged")."""
    alike: dict[tuple[str, str], list[str]] = {}
    for row in failures:
        alike.setdefault((row.task, row.reason), []).append(row.encoder)
    return [(", ".join(filter(None, (task, listed(keys)))), reason) for (task, reason), keys in alike.items()]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    named = [word for word in words if word]
    return " and ".join(filter(None, (", ".join(named[:-1]), *named[-1:])))


def best(part: TaskPart, row: Mapping[str, Result]) -> frozenset[str]:
    """The encoder that is ahead of all others in one metric: its differences from them are sure, all together.

    None where fewer than two have a value, none is better, or a difference was not taken or may be 0: where its
    interval holds 0, or its adjusted p is not below 0.05.
    """
    values = {key: result.estimate.value for key, result in row.items() if not isnan(result.estimate.value)}
    better = next(iter(row.values())).better
    if len(values) < 2 or better == "neither":
        return frozenset()
    top = (max if better == "higher" else min)(values, key=values.__getitem__)
    metric = next(iter(row.values())).metric
    behind = {
        row.reference if row.encoder == top else row.encoder
        for row in part.comparisons
        if row.metric == metric and top in (row.encoder, row.reference) and is_sure(row)
    }
    return frozenset({top}) if behind >= set(values) - {top} else frozenset()


def is_sure(row: Comparison) -> bool:
    """Whether a difference is not 0: by its interval, and by its p-value among all that were taken."""
    p_value = row.p_value if isnan(row.p_holm) else row.p_holm
    return p_value < ALPHA and not row.difference.low <= 0 <= row.difference.high


def is_as_good(row: Comparison) -> bool:
    """Whether two encoders differ by less than the margin (two one-sided tests)."""
    return row.p_equivalent < ALPHA


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric value in a table."""

    text: str
    interval: str = ""
    kind: Literal["value", "best", "failed", "-"] = "value"


def cells(part: TaskPart, row: Mapping[str, Result], keys: Iterable[str]) -> Iterator[Cell]:
    """The cells of one metric, one for each of the encoders."""
    digits, leading = decimals((result.estimate for result in row.values()), spare=1), best(part, row)
    for key in keys:
        if key not in row:
            yield Cell(text=part.gap(key), kind=part.gap(key))
            continue
        estimate = row[key].estimate
        kind: Literal["value", "best"] = "best" if key in leading else "value"
        yield Cell(text=number(estimate.value, digits), interval=interval(estimate, digits), kind=kind)


def decimals(estimates: Iterable[Estimate], spare: int = 0) -> int:
    """How many decimals show the leading digit of the narrowest interval, and `spare` more.

    At least 2 where a value is below 10 in size, and 3 (1 where all are larger) without an interval; at most 5.
    """
    known = [estimate for estimate in estimates if isfinite(estimate.value)]
    small = any(abs(estimate.value) < 10 for estimate in known)
    widths = [estimate.high - estimate.low for estimate in known]
    widths = [width for width in widths if isfinite(width) and width > 0]
    if not widths:
        return 3 if small else 1
    wanted = -floor(log10(min(widths))) + spare
    return min(_MAX_DECIMALS, max(2 if small else 0, wanted))


def number(value: float, digits: int, sign: Literal["-", "+"] = "-") -> str:
    """A value with so many decimals, never "-0.00"; "n/a" for NaN. With sign "+", positive ones carry it."""
    if isnan(value):
        return "n/a"
    return format(value, f"{sign}z.{digits}f" if abs(value) < _LARGE else f"{sign}.3g")


def interval(estimate: Estimate, digits: int, sign: Literal["-", "+"] = "-") -> str:
    """`[0.66, 0.75]`, or nothing where there is none."""
    if isnan(estimate.low) or isnan(estimate.high):
        return ""
    return f"[{number(estimate.low, digits, sign)}, {number(estimate.high, digits, sign)}]"


def estimate_text(estimate: Estimate, digits: int, sign: Literal["-", "+"] = "-") -> str:
    """`0.71 [0.66, 0.75]`, or `0.71` where there is no interval."""
    return f"{number(estimate.value, digits, sign)} {interval(estimate, digits, sign)}".rstrip()


def proper(text: str) -> str:
    """Numbers with a true minus sign, for print."""
    return text.replace("-", "\u2212")


def p_text(p_value: float) -> str:
    """`p = 0.043`, `p < 0.001`, or nothing for NaN."""
    if isnan(p_value):
        return ""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def shortened(text: str, chars: int) -> str:
    """Text of at most so many characters; what is cut is in the middle, as names often differ at their ends."""
    if len(text) <= chars:
        return text
    tail = (chars - 1) // 2
    return f"{text[: chars - 1 - tail]}\u2026{text[len(text) - tail :]}"
