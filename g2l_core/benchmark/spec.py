"""What a task file says: the rows, the split, the metric groups and their options, as plain values that are checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from g2l_core.errors import TaskError
from g2l_core.metrics.mil import AbmilSettings
from g2l_core.metrics.ridge import PENALTIES
from g2l_core.results import PublishedValue

DISTANCES = ("cosine", "euclidean")
VOTES = ("majority", "weighted")
BAGS = ("slide", "patient")
MISSING = ("refuse", "note")
_ABMIL = AbmilSettings()
PROBE_C = (0.001, 0.01, 0.1, 1.0, 10.0)


def _require(holds: bool, key: str, wanted: str, value: object) -> None:
    if not holds:
        raise TaskError(f"{key} must be {wanted}; got {list(value) if isinstance(value, tuple) else value!r}")


def _counts(key: str, values: tuple[int, ...]) -> None:
    wanted = "different whole numbers of at least 1"
    _require(bool(values) and min(values) >= 1 and len(set(values)) == len(values), key, wanted, values)


def _positive(key: str, values: tuple[float, ...]) -> None:
    _require(bool(values) and all(0 < value < inf for value in values), key, "positive numbers", values)


@dataclass(frozen=True, kw_only=True)
class SimilarityOptions:
    """Options of `similarity`."""

    rows: int = 2048
    """Rows that are drawn for what is quadratic in rows (RBF CKA, mutual neighbors) and for the effective rank."""
    k: tuple[int, ...] = (10,)
    """Numbers of mutual neighbors."""
    bandwidth: float = 1.0
    """Width of the RBF kernel, in median distances."""
    trim: float = 0.01
    """Fraction of rows farthest from the median of either encoder, which the trimmed CKA leaves out."""
    folds: int = 5
    """Maximum folds of the ridge map: of the training part for its penalty, and of all rows if there is no split."""

    def __post_init__(self) -> None:
        """Refuse values that no task can use."""
        _require(self.rows >= 4, "similarity_rows", "at least 4", self.rows)
        _counts("similarity_k", self.k)
        _positive("similarity_bandwidth", (self.bandwidth,))
        _require(0 <= self.trim < 0.5, "similarity_trim", "in [0, 0.5)", self.trim)
        _require(self.folds >= 2, "similarity_folds", "at least 2", self.folds)


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """Options of `knn`."""

    k: tuple[int, ...] = (20,)
    distance: str = "cosine"
    votes: tuple[str, ...] = ("majority",)
    """majority, or weighted: by exp(cosine / 0.07), or by 1 / Euclidean distance."""

    def __post_init__(self) -> None:
        """Refuse values that no task can use."""
        _counts("knn_k", self.k)
        _require(self.distance in DISTANCES, "knn_distance", " or ".join(DISTANCES), self.distance)
        _require(
            bool(self.votes) and set(self.votes) <= set(VOTES), "knn_votes", f"among {', '.join(VOTES)}", self.votes
        )


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Options of `probe`, `slide_probe` and `slide_vote`."""

    c: tuple[float, ...] = PROBE_C
    """Inverse penalties. Of several, the one with the lowest log loss on folds of the training patients is taken."""
    folds: int = 5
    """Maximum folds. If the rarest class has fewer training patients, there are as many folds as these."""

    def __post_init__(self) -> None:
        """Refuse values that no task can use."""
        _positive("probe_c", self.c)
        _require(self.folds >= 2, "probe_folds", "at least 2", self.folds)


@dataclass(frozen=True, kw_only=True)
class PrototypeOptions:
    """Options of `prototypes`."""

    shots: tuple[int, ...] = (1, 4, 16)
    """Numbers of training patches of each class."""
    repeats: int = 20
    """How often the training patches are drawn."""

    def __post_init__(self) -> None:
        """Refuse values that no task can use."""
        _counts("prototypes_shots", self.shots)
        _counts("prototypes_repeats", (self.repeats,))


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Options of `retrieval`."""

    k: tuple[int, ...] = (1, 5, 10)
    distance: str = "cosine"

    def __post_init__(self) -> None:
        """Refuse values that no task can use."""
        _counts("retrieval_k", self.k)
        _require(self.distance in DISTANCES, "retrieval_distance", " or ".join(DISTANCES), self.distance)


@dataclass(frozen=True, kw_only=True)
class RegressionOptions:
    """Options of `regression`."""

    penalties: tuple[float, ...] = PENALTIES
    """In mean variances of a feature. Of several, the best on folds of the training patients is taken."""
    folds: int = 5
    """Maximum folds for the choice of the penalty."""

    def __post_init__(self) -> None:
        """Refuse values that no task can use."""
        _positive("regression_penalties", self.penalties)
        _require(self.folds >= 2, "regression_folds", "at least 2", self.folds)


@dataclass(frozen=True, kw_only=True)
class SurvivalOptions:
    """Options of `survival`."""

    event: str = ""
    """Column that is 1 where the event was observed, 0 where not."""
    time: str = ""
    """Column of the time to the event or to the end of follow-up, in any unit."""
    penalties: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """Penalties of the Cox model. Of several, the best on folds of the training patients is taken."""
    folds: int = 5
    """Folds for the choice of the penalty."""

    def __post_init__(self) -> None:
        """Refuse values that no task can use."""
        _positive("survival_penalties", self.penalties)
        _require(self.folds >= 2, "survival_folds", "at least 2", self.folds)


@dataclass(frozen=True, kw_only=True)
class RobustnessOptions:
    """Options of `robustness` and `robustness_paired`."""

    k: tuple[int, ...] = (3, 5, 10, 20)
    rows_per_stratum: int = 0
    """Maximum patches of each class and center in the paired design; 0 is no limit."""

    def __post_init__(self) -> None:
        """Refuse values that no task can use."""
        _counts("robustness_k", self.k)
        holds = self.rows_per_stratum == 0 or self.rows_per_stratum >= 2
        _require(holds, "robustness_rows_per_stratum", "0 or at least 2", self.rows_per_stratum)


@dataclass(frozen=True, kw_only=True)
class CenterOptions:
    """Options of `center`."""

    c: float = 1.0
    """The probe's inverse penalty."""
    folds: int = 5

    def __post_init__(self) -> None:
        """Refuse values that no task can use."""
        _positive("center_probe_c", (self.c,))
        _require(self.folds >= 2, "center_probe_folds", "at least 2", self.folds)


@dataclass(frozen=True, kw_only=True)
class BiasDropOptions:
    """Options of `bias_drop`; see `metrics.center_bias.BiasDesign`."""

    centers: tuple[str, ...] = ()
    """Centers to train and test on. If empty, those with most patients, as many as there are classes."""
    slides_per_class: int = 0
    """Patients of each class in every training set; 0 takes two from each center."""
    rows_per_slide: int = 20
    test_slides: int = 1
    levels: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 20
    c: float = 1.0
    """The probe's inverse penalty."""

    def __post_init__(self) -> None:
        """Refuse values that no task can use; what depends on the data is refused there."""
        _positive("bias_drop_c", (self.c,))
        _counts("bias_drop_repeats", (self.repeats,))


@dataclass(frozen=True, kw_only=True)
class ConsistencyOptions:
    """Options of `consistency`."""

    condition: str = ""
    """Column that names the scanner, the stain, or both."""
    patch: str = "patch_id"
    """Column that has the same value for the same tissue under every condition. If there is no such column, patch_id
    is the stored one, and corner is the patch's place, "x,y" in level-0 pixels."""
    k: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self) -> None:
        """Refuse values that no task can use."""
        _counts("consistency_k", self.k)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a metric group needs of a task."""

    label: bool = True
    split: bool = False


NEEDS: Mapping[str, Needs] = {
    "cka": Needs(label=False),
    "similarity": Needs(label=False),
    "knn": Needs(split=True),
    "probe": Needs(split=True),
    "prototypes": Needs(split=True),
    "regression": Needs(split=True),
    "retrieval": Needs(),
    "slide_probe": Needs(split=True),
    "slide_vote": Needs(split=True),
    "abmil": Needs(split=True),
    "survival": Needs(label=False, split=True),
    "robustness": Needs(),
    "robustness_paired": Needs(),
    "center": Needs(label=False),
    "bias_drop": Needs(),
    "consistency": Needs(label=False),
}
"""The metric groups, in the order in which a report has them."""

DEFAULT_METRICS = ("cka", "knn", "probe", "robustness")


def metric_group(metric: str) -> str:
    """The metric group that a metric's name begins with, the longest that fits; empty if none does."""
    fitting = [name for name in NEEDS if metric.startswith(f"{name}_")]
    return max(fitting, key=len, default="")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One table of a task file; the option k of knn stands there as knn_k."""

    name: str
    metrics: tuple[str, ...] = DEFAULT_METRICS
    label: str = ""
    """Column of the biological class, for `regression` of a number; some metric groups need none."""
    labels: str = ""
    """A CSV with that column, by slide_id, by slide_id and patch_id, or by slide_id, x and y. Its path is relative to
    the task file. A column that it has is taken from it alone; others, or all if there is no such file, are those of
    the store's manifest."""
    classes: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Classes to merge or rename: {written = "name"}. An empty name leaves the class out."""
    missing: str = "refuse"
    """What a slide of the label file that no store has does: refuse the task, or note it."""
    split: str = ""
    """Column that says train or test; other values are left out."""
    train: str = ""
    """COLUMN=PATTERN in place of a split column, with `test`."""
    test: str = ""
    folds: int = 0
    """Number of folds by group, in place of a fixed split."""
    training_halves: int = 0
    """Random halves of the training patients that classifiers are fitted on as well, so that intervals hold the
    variation of the training part; 0 does without."""
    group: str = "patient_id"
    center: str = "medical_center"
    where: tuple[str, ...] = ()
    """Conditions COLUMN=PATTERN that a slide must fit to take part."""
    bag: str = "slide"
    """What `slide_probe`, `slide_vote` and `abmil` predict: slide or patient."""
    similarity: SimilarityOptions = SimilarityOptions()
    knn: KnnOptions = KnnOptions()
    probe: ProbeOptions = ProbeOptions()
    prototypes: PrototypeOptions = PrototypeOptions()
    retrieval: RetrievalOptions = RetrievalOptions()
    regression: RegressionOptions = RegressionOptions()
    abmil: AbmilSettings = _ABMIL
    survival: SurvivalOptions = SurvivalOptions()
    robustness: RobustnessOptions = RobustnessOptions()
    bias_drop: BiasDropOptions = BiasDropOptions()
    consistency: ConsistencyOptions = ConsistencyOptions()
    center_probe: CenterOptions = CenterOptions()
    expected: tuple[PublishedValue, ...] = ()
    """Published values that the report puts beside this run's; nothing is computed from them."""

    def __post_init__(self) -> None:
        """Refuse a task that cannot be evaluated."""
        where = f"task {self.name}:"
        unknown = [metric for metric in self.metrics if metric not in NEEDS]
        if unknown or not self.metrics:
            raise TaskError(f"{where} unknown metric {unknown[0] if unknown else ''!r}; known: {', '.join(NEEDS)}")
        self._require_split(where)
        labeled = [metric for metric in self.metrics if NEEDS[metric].label]
        if labeled and not self.label:
            raise TaskError(f"{where} give label = COLUMN, the biological class, for {', '.join(labeled)}")
        if "regression" in self.metrics and len(labeled) > 1:
            others = ", ".join(metric for metric in labeled if metric != "regression")
            raise TaskError(f"{where} regression takes the label for a number, {others} for a class; make two tasks")
        if self.bag not in BAGS:
            raise TaskError(f"{where} bag must be {' or '.join(BAGS)}; got {self.bag!r}")
        if self.missing not in MISSING:
            raise TaskError(f"{where} missing must be {' or '.join(MISSING)}; got {self.missing!r}")
        for group, columns in self.extra_columns.items():
            if not all(columns):
                keys = {"survival": "survival_event and survival_time", "consistency": "consistency_condition"}
                raise TaskError(f"{where} {group} needs {keys[group]}, names of columns")
        for published in self.expected:
            if metric_group(published.metric) not in self.metrics:
                raise TaskError(f"{where} expected.{published.metric} is of none of its metrics {self.metrics}")

    def _require_split(self, where: str) -> None:
        if self.training_halves < 0 or self.training_halves == 1:
            raise TaskError(f"{where} training_halves is 0, or at least 2; got {self.training_halves}")
        if self.training_halves and not self.has_fixed_split:
            raise TaskError(f"{where} training_halves needs a fixed split: with folds, every patient is tested too")
        ways = [bool(self.split), bool(self.train or self.test), bool(self.folds)]
        needing = sorted(metric for metric in self.metrics if NEEDS[metric].split)
        if needing and sum(ways) != 1:
            raise TaskError(
                f"{where} {', '.join(needing)} need exactly one of split = COLUMN, "
                f"train and test = CONDITION, or folds = N; found {sum(ways)}"
            )
        if bool(self.train) != bool(self.test):
            raise TaskError(f"{where} train and test conditions come together")
        if self.folds < 0 or self.folds == 1:
            raise TaskError(f"{where} folds must be at least 2; got {self.folds}")

    @property
    def has_fixed_split(self) -> bool:
        """Whether every row is train or test, without folds."""
        return bool(self.split or self.train)

    def class_of(self, label: str) -> str:
        """The class that a label stands for, after `classes`."""
        return self.classes.get(label, label)

    @property
    def conditions(self) -> tuple[str, ...]:
        """All conditions COLUMN=PATTERN of the task."""
        return (*self.where, *(text for text in (self.train, self.test) if text))

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that the task reads, the label first."""
        further = [name for names in self.extra_columns.values() for name in names]
        conditional = [text.partition("=")[0] for text in self.conditions]
        named = (self.label, self.split, self.group, self.center, *further, *conditional)
        return tuple(dict.fromkeys(name for name in named if name))

    @property
    def extra_columns(self) -> Mapping[str, tuple[str, ...]]:
        """The further columns that the metric groups of this task read."""
        columns = {
            "survival": (self.survival.event, self.survival.time),
            "consistency": (self.consistency.condition, self.consistency.patch),
        }
        return {group: names for group, names in columns.items() if group in self.metrics}
