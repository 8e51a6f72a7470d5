"""Metric groups of slides and patients: `slide_probe`, `slide_vote`, `abmil`, `survival`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from g2l_core.benchmark.metric_groups.patches import Predicted, fit_probe, numbers, probe_folds, probe_settings
from g2l_core.benchmark.metric_groups.values import (
    MetricValue,
    Settings,
    TaskInput,
    describe_choices,
    metric_values,
)
from g2l_core.benchmark.rows import Bags, bags, split_parts
from g2l_core.errors import TaskError
from g2l_core.metrics.bags import bag_values, mean_pool, patch_vote
from g2l_core.metrics.intervals import Figure
from g2l_core.metrics.mil import train_abmil
from g2l_core.metrics.patients import MAX_GROUPS, leave_out_groups
from g2l_core.metrics.scales import ORDER
from g2l_core.metrics.survival import choose_cox_penalty, concordance_index, fit_cox

_OBSERVED = ("1", "1.0", "true", "yes", "y", "deceased", "dead", "died", "event", "recurred", "progressed")
_CENSORED = ("0", "0.0", "false", "no", "n", "living", "alive", "censored")
_EVENTS = dict.fromkeys(_OBSERVED, True) | dict.fromkeys(_CENSORED, False)


def event_of(text: str) -> bool | None:
    """Whether an event was observed; None if the text does not say. A number before a colon counts, as in cBioPortal.

    Example:
        >>> [event_of(text) for text in ("1:DECEASED", "0:LIVING", "Yes", "maybe")]
        [True, False, True, None]
    """
    number, colon, _ = text.partition(":")
    return _EVENTS.get((number if colon and number in {"0", "1"} else text).strip().lower())


def _bag_parts(task: TaskInput, whole: Bags) -> list[tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]]:
    """Training and test bags. Folds are dealt by bag, so that a large slide counts like a small one."""
    return split_parts(whole.label, whole.cluster, whole.part, task.spec, task.rows.cluster_unit, task.seed)


def slide_probe(task: TaskInput) -> list[MetricValue]:
    """Logistic regression on the mean feature of each bag."""
    whole = bags(task.rows, task.spec)
    _, means = mean_pool(task.features, whole.of_row)
    predicted, settings = probe_folds(task, means, whole.label, whole.cluster, _bag_parts(task, whole))
    return predicted.values(task, "slide_probe", {"bag": task.spec.bag, "pooling": "mean of patches", **settings})


def slide_vote(task: TaskInput) -> list[MetricValue]:
    """Logistic regression on patches that inherit their bag's class; the patches of a bag vote."""
    whole, spec, features = bags(task.rows, task.spec), task.spec, task.features
    tested, probes, folds = [], [], []
    for train, test in _bag_parts(task, whole):
        train_rows, test_rows = whole.rows(train), whole.rows(test)
        labels, groups = task.rows.label[train_rows], task.rows.cluster[train_rows]
        result, chosen_by = fit_probe(features[train_rows], labels, groups, features[test_rows], spec.probe, task.seed)
        vote = patch_vote(result.probabilities, result.classes, whole.of_row[test_rows])
        folds.append((result.classes, vote.probabilities, vote.majority))
        probes.append((result, chosen_by))
        tested.append(test)
    predicted = Predicted.of_folds(whole.label, whole.cluster, tested, folds)
    settings = {"bag": spec.bag, "vote": "majority; mean probability", **probe_settings(task, probes)}
    return predicted.values(task, "slide_vote", settings)


def abmil(task: TaskInput) -> list[MetricValue]:
    """Gated attention over the patches of each bag."""
    whole, options, features = bags(task.rows, task.spec), task.spec.abmil, task.features
    tested, folds, epochs = [], [], []
    for train, test in _bag_parts(task, whole):
        train_rows, test_rows = whole.rows(train), whole.rows(test)
        result = train_abmil(
            features[train_rows],
            whole.of_row[train_rows],
            whole.label[train],
            whole.cluster[train],
            features[test_rows],
            whole.of_row[test_rows],
            settings=options,
            seed=task.seed,
        )
        folds.append((result.classes, result.probabilities, result.predictions))
        tested.append(test)
        epochs.append(result.epochs)
    predicted = Predicted.of_folds(whole.label, whole.cluster, tested, folds)
    settings = {"bag": task.spec.bag, "epochs": ", ".join(map(str, epochs)), **asdict(options)}
    return predicted.values(task, "abmil", {**settings, **task.split_settings})


@dataclass(frozen=True, kw_only=True)
class _Patients:
    """One row a patient, in the order of their sorted names."""

    names: Shaped[np.ndarray, " patient"]
    features: Float64[np.ndarray, "patient dim"]
    times: Float64[np.ndarray, " patient"]
    events: Bool[np.ndarray, " patient"]
    part: Shaped[np.ndarray, " patient"]
    left_out: int
    """Patients without time or event."""


def _patients(task: TaskInput) -> _Patients:
    rows, options = task.rows, task.spec.survival
    times, events = rows.columns[options.time], rows.columns[options.event]
    known = (times != "") & (events != "")
    if not known.any():
        raise TaskError(f"no patch has both {options.event!r} and {options.time!r}; are the columns in the manifest?")
    names = rows.cluster[known]
    read = {text: event_of(text) for text in set(events[known].tolist())}
    spoken = np.array([text if read[text] is None else str(read[text]) for text in events[known].tolist()])
    observed = bag_values(spoken, names, options.event)
    wrong = sorted(set(observed.tolist()) - {"True", "False"})
    if wrong:
        raise TaskError(
            f"column {options.event!r} must be 1 or 0 (yes or no, true or false, 1:DECEASED or 0:LIVING); "
            f"got {wrong[0]!r}"
        )
    patients, means = mean_pool(task.features[known], names)
    return _Patients(
        names=patients,
        features=means,
        times=numbers(bag_values(times[known], names, options.time), options.time),
        events=observed == "True",
        part=bag_values(rows.part[known], names, "part of the split"),
        left_out=len(set(rows.cluster.tolist()) - set(names.tolist())),
    )


def survival(task: TaskInput) -> list[MetricValue]:
    """Harrell's C of a ridge Cox model on each patient's mean feature; with folds, the mean over folds."""
    patients, options, spec = _patients(task), task.spec.survival, task.spec
    strata = np.where(patients.events, "with event", "censored")
    if spec.has_fixed_split:
        strata = np.full(len(strata), "all")
    risks, tested, penalties, converged = np.zeros(len(patients.names)), [], [], True
    for train, test in split_parts(strata, patients.names, patients.part, spec, task.rows.cluster_unit, task.seed):
        x, times, events = patients.features[train], patients.times[train], patients.events[train]
        penalty = options.penalties[0]
        if len(options.penalties) > 1:
            penalty = choose_cox_penalty(
                x, times, events, penalties=options.penalties, folds=options.folds, seed=task.seed
            )
        model = fit_cox(x, times, events, penalty=penalty)
        risks[test] = model.risks(patients.features[test])
        tested.append(test)
        penalties.append(penalty)
        converged = converged and model.converged
    settings: Settings = {
        "pooling": "mean of patches",
        "penalty": describe_choices(penalties),
        "converged": converged,
        "events": int(patients.events[np.concatenate(tested)].sum()),
        "left_out": patients.left_out,
        **task.split_settings,
    }
    return _concordance(task, patients, risks, tested, settings)


def _concordance(
    task: TaskInput,
    patients: _Patients,
    risks: Float64[np.ndarray, " patient"],
    tested: Sequence[Int64[np.ndarray, "_"]],
    settings: Settings,
) -> list[MetricValue]:
    """Risks of different models have no common scale, so pairs are formed within folds."""
    order = np.concatenate(tested)
    folds = np.split(np.arange(len(order)), np.cumsum([len(test) for test in tested])[:-1])
    times, events, scores = patients.times[order], patients.events[order], risks[order]
    for fold in folds:  # refuses a fold without a pair of patients that differ in survival
        concordance_index(times[fold], events[fold], scores[fold])

    def score(weights: Int64[np.ndarray, "draw patient"]) -> Float64[np.ndarray, " draw"]:
        by_fold = [concordance_index(times[f], events[f], scores[f], weights[:, f]) for f in folds]
        values = np.stack(by_fold, axis=1)
        defined = np.isfinite(values)
        sums, counts = np.where(defined, values, 0.0).sum(axis=1), defined.sum(axis=1)
        return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)

    clusters = patients.names[order]
    groups, count = leave_out_groups(clusters)
    weights = np.vstack([np.ones(len(order), np.int64), np.arange(count)[:, None] != groups]).astype(np.int64)
    figure = Figure(values=score(weights), design=task.design(clusters, most=MAX_GROUPS), scale=ORDER)
    return metric_values("survival", {"c_index": figure}, settings, n=len(order))
