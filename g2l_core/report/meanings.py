"""Titles and explanations of the metrics of a report."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """The title and explanation of a metric."""

    title: str
    sentence: str = ""
    scale: str
    """Metrics of one scale are drawn on one axis."""
    neutral: float | None = None
    """The value that separates good from bad, where there is one."""


_SHARE, _SIMILARITY = "share", "similarity"

_BASIC: Mapping[str, Meaning] = {
    "cka_debiased": Meaning(
        title="CKA, debiased",
        sentence="Linear centered kernel alignment with the reference encoder's features: 1 where the two agree up to "
        "rotation and scale, about 0 where they are unrelated.",
        scale=_SIMILARITY,
    ),
    "cka_biased": Meaning(
        title="CKA, biased",
        sentence="The common form of CKA; it stays above 0 even for unrelated features, the more so the fewer the "
        "patches.",
        scale=_SIMILARITY,
    ),
    "knn_accuracy": Meaning(
        title="kNN accuracy",
        sentence="Share of patches whose nearest neighbors in the training part vote for the right class; nothing "
        "is fitted.",
        scale=_SHARE,
    ),
    "knn_balanced_accuracy": Meaning(
        title="kNN balanced accuracy",
        sentence="As kNN accuracy, but the mean over classes, so that a common class weighs no more than a rare one.",
        scale=_SHARE,
    ),
    "knn_f1": Meaning(
        title="kNN macro F1", sentence="Mean over classes of the F1 score of the kNN vote.", scale=_SHARE
    ),
    "probe_accuracy": Meaning(
        title="Probe accuracy",
        sentence="Share of patches that a logistic regression on the frozen features classifies rightly.",
        scale=_SHARE,
    ),
    "probe_balanced_accuracy": Meaning(
        title="Probe balanced accuracy",
        sentence="Mean over classes of the share that a logistic regression on the frozen features gets right.",
        scale=_SHARE,
    ),
    "probe_f1": Meaning(
        title="Probe macro F1", sentence="Mean over classes of the F1 score of the linear probe.", scale=_SHARE
    ),
    "probe_auc": Meaning(
        title="Probe AUC",
        sentence="Chance that the linear probe ranks a patch of a class above one of another; mean over classes.",
        scale=_SHARE,
    ),
    "robustness_ratio": Meaning(
        title="Robustness ratio",
        sentence="Neighbors of the same tissue class over neighbors of the same medical center: above 1, biology "
        "outweighs the center.",
        scale="ratio",
        neutral=1.0,
    ),
    "robustness_pathorob": Meaning(
        title="PathoROB index",
        sentence="Of the neighbors that share either class or center but not both, the share with the same class: "
        "above 0.5, biology outweighs the center.",
        scale="index",
        neutral=0.5,
    ),
}

_SIMILARITIES = {
    "similarity_rbf_cka": Meaning(
        title="CKA with RBF kernels",
        sentence="Debiased CKA that weighs near patches more: whether the same patches are near in both encoders.",
        scale=_SIMILARITY,
    ),
    "similarity_trimmed_cka": Meaning(
        title="CKA, trimmed",
        sentence="Debiased linear CKA without the patches farthest from the median, which can decide it alone.",
        scale=_SIMILARITY,
    ),
    "similarity_mutual_knn": Meaning(
        title="Mutual neighbors",
        sentence="Share of a patch's nearest neighbors that it has in the reference encoder too.",
        scale=_SIMILARITY,
    ),
    "similarity_procrustes": Meaning(
        title="Procrustes similarity",
        sentence="How much of the features a rotation brings onto the reference encoder's; of few patches it is above "
        "0 for unrelated features too.",
        scale=_SIMILARITY,
    ),
    "similarity_ridge_r2": Meaning(
        title="Linear map, R2",
        sentence="Share of the reference encoder's variance that a ridge map from these features explains on patients "
        "it was not fitted on.",
        scale=_SIMILARITY,
    ),
    "similarity_projected_cosine": Meaning(
        title="Linear map, cosine",
        sentence="Mean cosine between the mapped features and the reference encoder's, on other patients.",
        scale=_SIMILARITY,
    ),
    "similarity_effective_rank": Meaning(
        title="Effective rank",
        sentence="How many directions the features really use; neither high nor low is better by itself.",
        scale="directions",
    ),
}

_CLASSIFIERS = {
    "knn_weighted": ("Weighted kNN", "the vote of the nearest training patches, near ones counting more"),
    "prototypes": ("Prototypes", "the nearest class mean of a few training patches"),
    "slide_probe": ("Slide probe", "a logistic regression on the mean feature of a slide or patient"),
    "slide_vote": ("Slide vote", "the patches of a slide or patient, each judged by a linear probe"),
    "abmil": ("ABMIL", "gated attention over the patches of a slide or patient"),
}

_SCORES = {
    "accuracy": ("accuracy", "Share of cases classified rightly by {}.", _SHARE),
    "balanced_accuracy": ("balanced accuracy", "Mean over classes of the share classified rightly by {}.", _SHARE),
    "f1": ("macro F1", "Mean over classes of the F1 score of {}.", _SHARE),
    "auc": ("AUC", "Chance that a case of a class ranks above one of another, by {}; mean over classes.", _SHARE),
    "brier": ("Brier score", "Mean squared error of the probabilities by {}, summed over classes.", "error"),
    "ece": ("calibration error", "Mean gap between confidence and accuracy of {}.", "error"),
}


def _classifier_meanings() -> dict[str, Meaning]:
    """Every score of every classifier; `_BASIC` has texts of its own for some."""
    names = {**_CLASSIFIERS, "probe": ("Probe", "a logistic regression on the frozen features")}
    return {
        f"{name}_{score}": Meaning(title=f"{title} {words}", sentence=sentence.format(what), scale=scale)
        for name, (title, what) in names.items()
        for score, (words, sentence, scale) in _SCORES.items()
    }


_OTHERS = {
    "regression_pearson": Meaning(
        title="Regression, Pearson",
        sentence="Correlation of the label with a ridge regression's prediction on other patients.",
        scale=_SIMILARITY,
    ),
    "regression_r2": Meaning(
        title="Regression, R2",
        sentence="Share of the label's variance about the training mean that a ridge regression explains.",
        scale=_SIMILARITY,
    ),
    "retrieval_top": Meaning(
        title="Retrieval, found",
        sentence="Share of patches with one of their class among the first k of other patients.",
        scale=_SHARE,
    ),
    "retrieval_map": Meaning(
        title="Retrieval, mAP",
        sentence="Mean average precision among the first k patches of other patients.",
        scale=_SHARE,
    ),
    "survival_c_index": Meaning(
        title="Survival, C-index",
        sentence="Of two patients known to differ in survival, how often the earlier one has the higher predicted "
        "risk: 0.5 by chance.",
        scale="index",
        neutral=0.5,
    ),
    "robustness_paired": Meaning(
        title="PathoROB index, paired",
        sentence="The index within balanced pairs of classes and centers: above 0.5, biology outweighs the center.",
        scale="index",
        neutral=0.5,
    ),
    "center_balanced_accuracy": Meaning(
        title="Center predicted",
        sentence="How well a linear probe predicts the medical center of unseen patients; lower is better, and the "
        "class alone may give some of it away.",
        scale=_SHARE,
    ),
    "bias_drop_in_domain": Meaning(
        title="Loss under bias",
        sentence="Mean relative change of a probe's balanced accuracy as its training set ties class to center, on "
        "held-out slides of these centers: 0 loses nothing.",
        scale="drop",
        neutral=0.0,
    ),
    "bias_drop_out_of_domain": Meaning(
        title="Loss under bias, other centers",
        sentence="The same on centers that were not trained on.",
        scale="drop",
        neutral=0.0,
    ),
    "consistency_cosine": Meaning(
        title="Consistency, cosine",
        sentence="Cosine between the same tissue under two scanners or stains; median over pairs of them.",
        scale=_SIMILARITY,
    ),
    "consistency_top": Meaning(
        title="Consistency, found again",
        sentence="How often the same tissue under another scanner or stain is among the first k of all patches.",
        scale=_SHARE,
    ),
}

RETAINED_SHARE = Meaning(
    title="Retained share",
    sentence="The encoder's figure over the first encoder's, the teacher: 1 is as good. A guess has a share above 0 "
    "too, so read it beside a baseline's.",
    scale="retained share",
    neutral=1.0,
)
"""Of a metric, whose title follows."""

METRICS: Mapping[str, Meaning] = {**_classifier_meanings(), **_BASIC, **_SIMILARITIES, **_OTHERS}
"""By the first part of a metric's name; what follows it (`_k5`) is added to the title in words."""
