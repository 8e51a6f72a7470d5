"""What a task file says: the rows, the split, the families of figures and their options. Plain values, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from g2l_core.errors import TaskError
from g2l_core.metrics.mil import AbmilSettings
from g2l_core.metrics.ridge import PENALTIES
from g2l_core.results import ExpectedFigure

DISTANCES = ("cosine", "euclidean")
VOTES = ("majority", "weighted")
BAGS = ("slide", "patient")
_ABMIL = AbmilSettings()
PROBE_C = (0.001, 0.01, 0.1, 1.0, 10.0)


def _require(holds: bool, key: str, wanted: str, found: object) -> None:
    if not holds:
        raise TaskError(f"{key} must be {wanted}; got {list(found) if isinstance(found, tuple) else found!r}")


def _counts(key: str, values: tuple[int, ...]) -> None:
    wanted = "different whole numbers of at least 1"
    _require(bool(values) and min(values) >= 1 and len(set(values)) == len(values), key, wanted, values)


def _positive(key: str, values: tuple[float, ...]) -> None:
    _require(bool(values) and all(0 < value < inf for value in values), key, "positive numbers", values)


@dataclass(frozen=True, kw_only=True)
class SimilarityOptions:
    """Of `similarity`."""

    rows: int = 2048
    """Drawn by the seed for what is quadratic in rows: RBF CKA, mutual neighbors, and for the effective rank."""
    k: tuple[int, ...] = (10,)
    """Mutual neighbors."""
    bandwidth: float = 1.0
    """Of the RBF kernel, in median distances."""
    trim: float = 0.01
    """Share of rows farthest from the median, of either encoder, that the trimmed CKA leaves out."""
    folds: int = 5
    """At most, of the ridge map: over the training part for its penalty, and over all rows without a split."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _require(self.rows >= 4, "similarity_rows", "at least 4", self.rows)
        _counts("similarity_k", self.k)
        _positive("similarity_bandwidth", (self.bandwidth,))
        _require(0 <= self.trim < 0.5, "similarity_trim", "in [0, 0.5)", self.trim)
        _require(self.folds >= 2, "similarity_folds", "at least 2", self.folds)


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """Of `knn`."""

    k: tuple[int, ...] = (20,)
    distance: str = "cosine"
    votes: tuple[str, ...] = ("majority",)
    """majority; weighted by exp(cosine / 0.07), or by 1 / Euclidean distance."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _counts("knn_k", self.k)
        _require(self.distance in DISTANCES, "knn_distance", " or ".join(DISTANCES), self.distance)
        _require(
            bool(self.votes) and set(self.votes) <= set(VOTES), "knn_votes", f"among {', '.join(VOTES)}", self.votes
        )


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Of `probe`, `slide_probe` and `slide_vote`."""

    c: tuple[float, ...] = PROBE_C
    """Inverse penalties; of several, that with the least log loss on validation folds of the training patients."""
    folds: int = 5
    """At most; as many as the rarest class has training patients, if these are fewer."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _positive("probe_c", self.c)
        _require(self.folds >= 2, "probe_folds", "at least 2", self.folds)


@dataclass(frozen=True, kw_only=True)
class PrototypeOptions:
    """Of `prototypes`."""

    shots: tuple[int, ...] = (1, 4, 16)
    """Training patches of each class."""
    repeats: int = 20
    """Draws of them."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _counts("prototypes_shots", self.shots)
        _counts("prototypes_repeats", (self.repeats,))


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Of `retrieval`."""

    k: tuple[int, ...] = (1, 5, 10)
    distance: str = "cosine"

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _counts("retrieval_k", self.k)
        _require(self.distance in DISTANCES, "retrieval_distance", " or ".join(DISTANCES), self.distance)


@dataclass(frozen=True, kw_only=True)
class RegressionOptions:
    """Of `regression`."""

    penalties: tuple[float, ...] = PENALTIES
    """In mean variances of a feature; of several, the best on folds of the training patients."""
    folds: int = 5
    """At most."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _positive("regression_penalties", self.penalties)
        _require(self.folds >= 2, "regression_folds", "at least 2", self.folds)


@dataclass(frozen=True, kw_only=True)
class SurvivalOptions:
    """Of `survival`."""

    event: str = ""
    """Column: 1 where the event was observed, 0 where not."""
    time: str = ""
    """Column: time to the event or to the end of follow-up, in any unit."""
    penalties: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """Of the Cox model; of several, the best on folds of the training patients."""
    folds: int = 5
    """For the choice of the penalty."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _positive("survival_penalties", self.penalties)
        _require(self.folds >= 2, "survival_folds", "at least 2", self.folds)


@dataclass(frozen=True, kw_only=True)
class RobustnessOptions:
    """Of `robustness` and `robustness_paired`."""

    k: tuple[int, ...] = (3, 5, 10, 20)
    rows_per_stratum: int = 0
    """At most so many patches of each class and center in the paired design; 0 is no limit."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _counts("robustness_k", self.k)
        holds = self.rows_per_stratum == 0 or self.rows_per_stratum >= 2
        _require(holds, "robustness_rows_per_stratum", "0 or at least 2", self.rows_per_stratum)


@dataclass(frozen=True, kw_only=True)
class CenterOptions:
    """Of `center`."""

    c: float = 1.0
    """The probe's inverse penalty."""
    folds: int = 5

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _positive("center_probe_c", (self.c,))
        _require(self.folds >= 2, "center_probe_folds", "at least 2", self.folds)


@dataclass(frozen=True, kw_only=True)
class BiasDropOptions:
    """Of `bias_drop`; see `metrics.center_bias.BiasDesign`."""

    centers: tuple[str, ...] = ()
    """Trained and tested on; empty: those with most patients, as many as there are classes."""
    slides_per_class: int = 0
    """Patients of each class in every training set; 0: two from each center."""
    rows_per_slide: int = 20
    test_slides: int = 1
    levels: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 20
    c: float = 1.0
    """The probe's inverse penalty."""

    def __post_init__(self) -> None:
        """Refuse what means nothing; what hangs on the data is refused there."""
        _positive("bias_drop_c", (self.c,))
        _counts("bias_drop_repeats", (self.repeats,))


@dataclass(frozen=True, kw_only=True)
class ConsistencyOptions:
    """Of `consistency`."""

    condition: str = ""
    """Column that names the scanner, the stain, or both."""
    patch: str = "patch_id"
    """Column that is the same for the same tissue under every condition. patch_id is the stored one if no column has
    that name; corner is the patch's place, "x,y" in level-0 pixels."""
    k: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _counts("consistency_k", self.k)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a family cannot do without."""

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
"""The families, in the order in which a report has them."""

DEFAULT_METRICS = ("cka", "knn", "probe", "robustness")


def family_of(metric: str) -> str:
    """The family that a figure's name begins with, the longest that fits; empty if none does."""
    fitting = [name for name in NEEDS if metric.startswith(f"{name}_")]
    return max(fitting, key=len, default="")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One table of a task file; the option k of knn stands there as knn_k."""

    name: str
    metrics: tuple[str, ...] = DEFAULT_METRICS
    label: str = ""
    """Column of the biological class, for `regression` of a number; some families need none."""
    labels: str = ""
    """A CSV with that column, by slide_id, by slide_id and patch_id, or by slide_id, x and y. Relative to the task
    file. Columns that it has not are those that the store's manifest gave; empty, all are."""
    split: str = ""
    """Column that says train or test; other values are left out."""
    train: str = ""
    """COLUMN=PATTERN in place of a split column, with `test`."""
    test: str = ""
    folds: int = 0
    """Folds by group in place of a fixed split."""
    group: str = "patient_id"
    center: str = "medical_center"
    where: tuple[str, ...] = ()
    """Conditions COLUMN=PATTERN that a slide must fit to take part."""
    bag: str = "slide"
    """What `slide_probe`, `slide_vote` and `abmil` predict: a slide, or a patient."""
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
    expected: tuple[ExpectedFigure, ...] = ()
    """Published figures; nothing is computed from them."""

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
        for family, columns in self.extra_columns.items():
            if not all(columns):
                keys = {"survival": "survival_event and survival_time", "consistency": "consistency_condition"}
                raise TaskError(f"{where} {family} needs {keys[family]}, names of columns")
        for figure in self.expected:
            if family_of(figure.metric) not in self.metrics:
                raise TaskError(f"{where} expected.{figure.metric} is of none of its metrics {self.metrics}")

    def _require_split(self, where: str) -> None:
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
        """Whether rows are train or test once and for all."""
        return bool(self.split or self.train)

    @property
    def extra_columns(self) -> Mapping[str, tuple[str, ...]]:
        """The further columns that the families of this task read."""
        known = {
            "survival": (self.survival.event, self.survival.time),
            "consistency": (self.consistency.condition, self.consistency.patch),
        }
        return {family: columns for family, columns in known.items() if family in self.metrics}
