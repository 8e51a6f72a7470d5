"""Families that ask slides and patients: `slide_probe`, `slide_vote`, `abmil`, `survival`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from g2l_core.benchmark.families.figures import Drawn, Figure, Settings, TaskInput, chosen_in_words
from g2l_core.benchmark.families.patches import Predicted, fit_probe, numbers, probe_settings
from g2l_core.benchmark.rows import Bags, bags, split_parts
from g2l_core.errors import TaskError
from g2l_core.metrics.bags import bag_values, mean_pool, patch_vote
from g2l_core.metrics.mil import train_abmil
from g2l_core.metrics.statistics import of_weights
from g2l_core.metrics.survival import choose_cox_penalty, concordance_index, fit_cox

_Parts = Iterator[tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]]

_EVENTS = {"1": True, "true": True, "yes": True, "1.0": True, "0": False, "false": False, "no": False, "0.0": False}


def _bag_parts(given: TaskInput, whole: Bags) -> _Parts:
    """Training and test bags, folds dealt by bag so that a large slide counts like a small one."""
    rows = given.rows
    yield from split_parts(whole.label, whole.cluster, whole.part, given.spec, rows.cluster_unit, given.seed)


def slide_probe(given: TaskInput) -> list[Figure]:
    """Logistic regression on the mean feature of each bag."""
    whole, spec = bags(given.rows, given.spec), given.spec
    _, means = mean_pool(given.features, whole.of_row)
    tested, found = [], []
    for train, test in _bag_parts(given, whole):
        labels, groups = whole.label[train], whole.cluster[train]
        found.append(fit_probe(means[train], labels, groups, means[test], spec.probe, given.seed))
        tested.append(test)
    said = Predicted.of(
        [whole.label[test] for test in tested],
        [whole.cluster[test] for test in tested],
        [(result.classes, result.probabilities, result.predictions) for result, _ in found],
    )
    settings = {"bag": spec.bag, "pooling": "mean of patches", **probe_settings(given, found)}
    return said.figures("slide_probe", settings)


def slide_vote(given: TaskInput) -> list[Figure]:
    """Logistic regression on patches that inherit their bag's class; the patches of a bag vote."""
    whole, spec, features = bags(given.rows, given.spec), given.spec, given.features
    tested, found, said = [], [], []
    for train, test in _bag_parts(given, whole):
        fit, asked = whole.rows(train), whole.rows(test)
        labels, groups = given.rows.label[fit], given.rows.cluster[fit]
        result, how = fit_probe(features[fit], labels, groups, features[asked], spec.probe, given.seed)
        vote = patch_vote(result.probabilities, result.classes, whole.of_row[asked])
        said.append((result.classes, vote.probabilities, vote.majority))
        found.append((result, how))
        tested.append(test)
    everything = Predicted.of([whole.label[test] for test in tested], [whole.cluster[test] for test in tested], said)
    settings = {"bag": spec.bag, "vote": "majority; mean probability", **probe_settings(given, found)}
    return everything.figures("slide_vote", settings)


def abmil(given: TaskInput) -> list[Figure]:
    """Gated attention over the patches of each bag."""
    whole, options, features = bags(given.rows, given.spec), given.spec.abmil, given.features
    tested, said, epochs = [], [], []
    for train, test in _bag_parts(given, whole):
        fit, asked = whole.rows(train), whole.rows(test)
        result = train_abmil(
            features[fit],
            whole.of_row[fit],
            whole.label[train],
            whole.cluster[train],
            features[asked],
            whole.of_row[asked],
            settings=options,
            seed=given.seed,
        )
        said.append((result.classes, result.probabilities, result.predictions))
        tested.append(test)
        epochs.append(result.epochs)
    everything = Predicted.of([whole.label[test] for test in tested], [whole.cluster[test] for test in tested], said)
    settings = {"bag": given.spec.bag, "epochs": ", ".join(map(str, epochs)), **asdict(options)}
    return everything.figures("abmil", {**settings, **given.split_settings})


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


def _patients(given: TaskInput) -> _Patients:
    rows, options = given.rows, given.spec.survival
    times, events = rows.columns[options.time], rows.columns[options.event]
    known = (times != "") & (events != "")
    if not known.any():
        raise TaskError(f"no patch has both {options.event!r} and {options.time!r}; are the columns in the manifest?")
    names = rows.cluster[known]
    event = bag_values(np.char.lower(events[known]), names, options.event)
    wrong = sorted(set(event.tolist()) - set(_EVENTS))
    if wrong:
        raise TaskError(f"column {options.event!r} must be 1 or 0 (yes or no, true or false); got {wrong[0]!r}")
    patients, means = mean_pool(given.features[known], names)
    return _Patients(
        names=patients,
        features=means,
        times=numbers(bag_values(times[known], names, options.time), options.time),
        events=np.array([_EVENTS[value] for value in event]),
        part=bag_values(rows.part[known], names, "part of the split"),
        left_out=len(set(rows.cluster.tolist()) - set(names.tolist())),
    )


def survival(given: TaskInput) -> list[Figure]:
    """Harrell's C of a ridge Cox model on each patient's mean feature; of folds, the mean over folds."""
    people, options, spec = _patients(given), given.spec.survival, given.spec
    strata = np.where(people.events, "with event", "censored")
    if spec.has_fixed_split:
        strata = np.full(len(strata), "all")
    risks, tested, penalties, converged = np.zeros(len(people.names)), [], [], True
    for train, test in split_parts(strata, people.names, people.part, spec, given.rows.cluster_unit, given.seed):
        x, times, events = people.features[train], people.times[train], people.events[train]
        penalty = options.penalties[0]
        if len(options.penalties) > 1:
            penalty = choose_cox_penalty(
                x, times, events, penalties=options.penalties, folds=options.folds, seed=given.seed
            )
        model = fit_cox(x, times, events, penalty=penalty)
        risks[test] = model.risks(people.features[test])
        tested.append(test)
        penalties.append(penalty)
        converged = converged and model.converged
    settings: Settings = {
        "pooling": "mean of patches",
        "penalty": chosen_in_words(penalties),
        "converged": converged,
        "events": int(people.events[np.concatenate(tested)].sum()),
        "left_out": people.left_out,
        **given.split_settings,
    }
    return [_concordance(people, risks, tested, settings)]


def _concordance(
    people: _Patients,
    risks: Float64[np.ndarray, " patient"],
    tested: Sequence[Int64[np.ndarray, "_"]],
    settings: Settings,
) -> Figure:
    """Risks of different models have no common scale, so pairs are formed within folds."""
    order = np.concatenate(tested)
    folds = np.split(np.arange(len(order)), np.cumsum([len(test) for test in tested])[:-1])
    times, events, scores = people.times[order], people.events[order], risks[order]
    for fold in folds:
        concordance_index(times[fold], events[fold], scores[fold])

    def score(weights: Int64[np.ndarray, "draw patient"]) -> Float64[np.ndarray, " draw"]:
        found = [concordance_index(times[f], events[f], scores[f], weights[:, f]) for f in folds]
        values = np.stack(found, axis=1)
        defined = np.isfinite(values)
        sums, counts = np.where(defined, values, 0.0).sum(axis=1), defined.sum(axis=1)
        return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)

    clusters = people.names[order]
    return Figure(
        metric="survival_c_index",
        interval=Drawn(statistic=of_weights(score, clusters), clusters=clusters),
        n=len(order),
        settings=settings,
    )
