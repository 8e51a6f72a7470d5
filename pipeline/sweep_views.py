"""Sweeps over the number of cached views: what the words in them mean, what each run costs, and the chart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from markupsafe import Markup
from scipy.special import stdtrit

from g2l_core.distillation.logs import read_log
from g2l_core.encoders.resolve import EncoderSpec, find_stored, spec_from_json
from g2l_core.encoders.trust import with_trusted_code
from g2l_core.errors import StoreMissingError, UsageError
from g2l_core.report.plots import Curve, curves
from g2l_core.results import Estimate
from g2l_core.store.features import FeatureStore
from pipeline.forecast import gigabytes, third
from pipeline.runs import read_run

VIEWS, ONLINE = "views", "online"
WORDS = ("E/3", "E", ONLINE)
HOURS = 3600


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run costs beside its quality."""

    gigabytes: float
    """Size of the teacher's features that it needs, the canonical view included; 0 where the teacher runs live."""
    hours: float
    """Of caching these views and of training, on the machines where both ran."""


def in_numbers(values: Sequence[Any], base: Mapping[str, Any], default_epochs: int) -> list[Any]:
    """The numbers of views that a sweep's list means: E is the number of epochs; `ONLINE` stays.

    Raises:
        UsageError: The list has E, and the sweep has steps in place of epochs.
    """
    words = [value for value in values if isinstance(value, str)]
    if "steps" in base and (about := [word for word in words if word in {"E", "E/3"}]):
        raise UsageError(f"views = {about[0]!r}: E is the number of epochs, so give epochs in place of steps")
    epochs = int(base.get("epochs", default_epochs))
    meant = {"E": epochs, "E/3": third(epochs)}
    found = dict.fromkeys(meant.get(value, value) if isinstance(value, str) else value for value in values)
    numbers = sorted(value for value in found if isinstance(value, int))
    return [*numbers, *(value for value in found if not isinstance(value, int))]


def with_live_teacher(run: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run; views = online means new ones every epoch, of a teacher that runs live."""
    return {**run, VIEWS: 0, ONLINE: True} if run.get(VIEWS) == ONLINE else dict(run)


def live_specs(store: FeatureStore, names: Sequence[str], trusted: Sequence[str]) -> list[EncoderSpec]:
    """The teachers as encoders that can run, from what the store keeps of them.

    Raises:
        UnknownNameError: One is not stored.
        EncoderError: Its code is not trusted.
    """
    stored = [store.encoders[find_stored(name, store.encoders)].to_json() for name in names]
    return [with_trusted_code(spec_from_json(facts, str(store.path)), trusted) for facts in stored]


def require_views(store: FeatureStore, runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Refuse a sweep that wants more views than are cached, before its first run.

    Raises:
        StoreMissingError: Says how many there are.
    """
    wanted = max((run[VIEWS] for run in runs if VIEWS in run and not run.get(ONLINE)), default=0)
    for name in names if wanted else ():
        key = find_stored(name, store.encoders)
        there = [s.feature_facts(key).n_views - 1 for s in store.slides() if key in s.facts.features]
        if there and min(there) < wanted:
            raise StoreMissingError(
                f"the sweep wants up to {wanted} views, and {store.path} has {min(there)} of {key}: run g2l "
                f"cache-teacher --views {wanted}, or sweep fewer with --set epochs={max(1, min(there))}"
            )


def cost_of(folder: Path, store: FeatureStore) -> Cost:
    """What a finished run cost. Hours of caching are those of the store's last run for the teacher; NaN if unknown."""
    record = read_run(folder)
    training = sum(row["seconds"] for row in read_log(folder / "log.csv", ("seconds",))) / HOURS
    if record.settings.get(ONLINE):
        return Cost(gigabytes=0.0, hours=training)
    patches = sum(sum(rows.values()) for rows in record.rows.values())
    views = 1 + int(record.replay["n_augmented"])
    size = gigabytes(patches, views, [teacher.dim for teacher in record.teachers])
    keys = {key for key, facts in store.encoders.items() if facts.digest in {t.digest for t in record.teachers}}
    last = {
        key: run for run in store.facts.runs if run.patches and run.views for key in keys.intersection(run.encoders)
    }
    rates = {id(run): run.elapsed / (run.patches * run.views) for run in last.values()}
    caching = sum(rates.values()) * patches * views / HOURS if keys and keys == last.keys() else nan
    return Cost(gigabytes=size, hours=training + caching)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean with its 95 % t interval over seeds, which two or more have."""
    middle = mean(values)
    if len(values) < 2:
        return Estimate(value=middle)
    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / sqrt(len(values))
    return Estimate(value=middle, low=middle - half, high=middle + half)


def cost_charts(groups: Sequence[tuple[str, Sequence[float], Sequence[Cost]]]) -> list[tuple[Markup, str]]:
    """Held-out CKA over gigabytes and over hours: a point for each number of views, with its interval over seeds.

    Args:
        groups: The name of each number of views, with the CKA and the cost of its runs.

    Returns:
        Each chart with its caption. Hours are left out where the store does not know how long caching took.
    """
    axes = {
        "GB of cached features": [mean(cost.gigabytes for cost in costs) for _, _, costs in groups],
        "hours of caching and training": [mean(cost.hours for cost in costs) for _, _, costs in groups],
    }
    charts = []
    for label, xs in axes.items():
        if not groups or any(map(isnan, xs)):
            continue
        points = [
            Curve(label=name, series=i, points=((x, over_seeds(quality)),))
            for i, ((name, quality, _), x) in enumerate(zip(groups, xs, strict=True))
        ]
        caption = f"Held-out CKA over {label}: means over seeds, with 95 % t intervals where there are several"
        charts.append((curves(points, x_label=label, label=f"Held-out CKA over {label}"), caption))
    return charts
