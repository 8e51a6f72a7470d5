"""A fitted head: how it is applied to the features of a slide's patches, and its folder of safetensors and JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from g2l_core.errors import UsageError
from g2l_core.files import parse_json, write_bytes, write_text
from g2l_core.heads.calibration import tempered
from g2l_core.metrics.logistic import Scaling, log_probabilities
from g2l_core.metrics.mil import AbmilNetwork
from g2l_core.store.provenance import digest

RECORD = "head.json"
TENSORS = "head.safetensors"
FORMAT = 1

KINDS = {
    "probe": "logistic regression on single patches; a slide has the mean probability of its patches",
    "slide_probe": "logistic regression on the mean feature of a slide",
    "abmil": "gated attention over the patches of a slide",
    "regression": "ridge regression of a number on single patches; a slide has their mean",
}
"""What can be fitted, by the name of its metric group."""


@dataclass(frozen=True, kw_only=True)
class HeadFigure:
    """A figure that the head has on patients that it was not fitted on."""

    metric: str
    value: float
    low: float | None
    """None where there is no interval; `method` says why."""
    high: float | None
    n: int
    clusters: int
    unit: str
    method: str


@dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """What a head says of itself, in head.json."""

    kind: str
    task: str
    label: str
    classes: tuple[str, ...]
    """In the order of the probabilities; one name, that of the label, where a number is predicted."""
    bag: str
    """slide or patient: what the task gives an answer for."""
    temperature: float
    """By which log-probabilities are divided; 1 where nothing was held out."""
    calibration: Mapping[str, float | int | str]
    encoder: Mapping[str, Any]
    """What the store says of the encoder: name, weights, digest, precision."""
    grid: Mapping[str, Any]
    """How patches were laid: um/px, side in pixels, tissue."""
    views: Mapping[str, Any]
    """The store's; view 0 is the center of each patch, of `crop_px` pixels."""
    figures: tuple[HeadFigure, ...]
    figures_of: str
    """Which heads the figures are of, in words."""
    trained_on: Mapping[str, Any]
    """How many patients and patches of each class, and a digest of each training patient's name and pixels."""
    license: str
    """The terms of the encoder, as its card says."""
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class SlidePrediction:
    """What a head says of one slide, or of one patient's patches."""

    values: Float64[np.ndarray, " class"]
    """Calibrated probabilities, which sum to 1; or the predicted number."""
    patches: Float64[np.ndarray, "patch class"]
    """What the head says of each patch alone: not calibrated for patches where the head is of slides."""
    attention: Float64[np.ndarray, " patch"] | None = None
    """Of ABMIL: the weight of each patch, which sum to 1."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """Facts and tensors."""

    facts: HeadFacts
    tensors: Mapping[str, Float[np.ndarray, "..."]]

    @property
    def dim(self) -> int:
        """How many values a patch's feature has."""
        return len(self.tensors["mean"])

    def apply(self, features: Float[np.ndarray, "patch dim"]) -> SlidePrediction:
        """Predict a slide from the features of its patches.

        Args:
            features: (patch, dim) of the canonical views; any float type.

        Returns:
            The prediction.

        Raises:
            UsageError: There is no patch, the width is not the head's, or a value is not finite.
        """
        if not len(features):
            raise UsageError("the slide has no patch to predict from")
        if features.shape[1] != self.dim:
            raise UsageError(f"the head takes features of {self.dim} values; these have {features.shape[1]}")
        if not np.isfinite(features).all():
            raise UsageError("the features hold NaN or infinity")
        apply = {"probe": _probe, "slide_probe": _slide_probe, "abmil": _abmil, "regression": _regression}
        return apply[self.facts.kind](self, features)


def patch_terms(head: Head, features: Float[np.ndarray, "patch dim"]) -> Float64[np.ndarray, "patch term"]:
    """What a slide's answer is a function of, once it is averaged over all of its patches.

    Probabilities of a probe, features of a slide probe, numbers of a regression; of ABMIL exp(s) h and exp(s), with s
    the attention score and h the embedding: z is the quotient of their means. Scores are taken relative to the largest
    one here, which cancels.

    Args:
        head: The head.
        features: (patch, dim), finite, at least one patch.

    Returns:
        (patch, term).
    """
    match head.facts.kind:
        case "slide_probe":
            return features.astype(np.float64)
        case "abmil":
            scores, embeddings = AbmilNetwork.from_arrays(head.tensors).scores(features)
            weights = np.exp(scores - scores.max())[:, None]
            return np.concatenate([weights * embeddings, weights], axis=1)
        case _:
            return head.apply(features).patches


def answers(head: Head, means: Float64[np.ndarray, "slide term"]) -> Float64[np.ndarray, "slide class"]:
    """What the head says of slides whose patches have these means of `patch_terms`; as `SlidePrediction.values`."""
    match head.facts.kind:
        case "slide_probe":
            return tempered(_logs(head, means), head.facts.temperature)
        case "abmil":
            logs = AbmilNetwork.from_arrays(head.tensors).bag_log_probabilities(means[:, :-1] / means[:, -1:])
            return tempered(logs, head.facts.temperature)
        case _:
            return means


def _logs(head: Head, features: np.ndarray) -> np.ndarray:
    scaling = Scaling(mean=head.tensors["mean"], deviation=head.tensors["deviation"])
    return log_probabilities(features, scaling, head.tensors["weights"])


def _probe(head: Head, features: np.ndarray) -> SlidePrediction:
    patches = tempered(_logs(head, features), head.facts.temperature)
    return SlidePrediction(values=patches.mean(axis=0), patches=patches)


def _slide_probe(head: Head, features: np.ndarray) -> SlidePrediction:
    """The scores are linear in features, so that those of the patches average to those of the slide."""
    patches = np.exp(_logs(head, features))
    mean = features.astype(np.float64).mean(axis=0, keepdims=True)
    return SlidePrediction(values=tempered(_logs(head, mean), head.facts.temperature)[0], patches=patches)


def _abmil(head: Head, features: np.ndarray) -> SlidePrediction:
    """A patch alone is a bag of one."""
    network = AbmilNetwork.from_arrays(head.tensors)
    logs, attention = network.apply(features, [np.arange(len(features))])
    return SlidePrediction(
        values=tempered(logs, head.facts.temperature)[0],
        patches=np.exp(network.patch_log_probabilities(features)),
        attention=attention,
    )


def _regression(head: Head, features: np.ndarray) -> SlidePrediction:
    patches = (features - head.tensors["mean"]) @ head.tensors["weights"] + head.tensors["offset"]
    return SlidePrediction(values=patches.mean(axis=0), patches=patches)


def write_head(head: Head, folder: Path) -> None:
    """Write head.safetensors, then head.json with a digest of both."""
    from safetensors.numpy import save

    tensors = {name: np.ascontiguousarray(value) for name, value in head.tensors.items()}
    data = save(tensors)
    write_bytes(folder / TENSORS, data)
    record: dict[str, Any] = {"format": FORMAT, **asdict(head.facts), "tensors_sha256": digest_of_bytes(data)}
    record["record_sha256"] = digest(json.loads(json.dumps(record)))
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


def digest_of_bytes(data: bytes) -> str:
    """sha256 of some bytes, in hexadecimal digits."""
    from hashlib import sha256

    return sha256(data).hexdigest()


def read_head(folder: Path) -> Head:
    """Read what `write_head` wrote.

    Raises:
        UsageError: There is no head, it is damaged, or a later version wrote it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = folder / RECORD
    if not path.is_file():
        raise UsageError(f"{folder} holds no head ({RECORD}); g2l fit-head makes one")
    try:
        record: dict[str, Any] = dict(parse_json(path.read_text(encoding="utf-8")))
        if record.get("format") != FORMAT:
            raise UsageError(f"{path} is of format {record.get('format')!r}; this version of G2L reads {FORMAT}")
        claimed = record.pop("record_sha256")
        data = (folder / TENSORS).read_bytes()
        sound = claimed == digest(record) and record["tensors_sha256"] == digest_of_bytes(data)
        tensors = load(data)
        facts = _facts(record)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
        raise UsageError(f"{folder}: the head cannot be read ({error}). Copy it again, or run g2l fit-head") from error
    if not sound:
        raise UsageError(f"{folder}: the head is not as g2l fit-head wrote it: a digest differs. Copy it again")
    return Head(facts=facts, tensors=tensors)


def _facts(record: Mapping[str, Any]) -> HeadFacts:
    fields = {name: record[name] for name in HeadFacts.__dataclass_fields__}
    fields["classes"] = tuple(record["classes"])
    fields["figures"] = tuple(HeadFigure(**figure) for figure in record["figures"])
    return HeadFacts(**fields)


def describe(facts: HeadFacts) -> Sequence[str]:
    """A few lines for people: what the head predicts, how well, and under which terms."""
    lines = [f"{facts.task}: {KINDS[facts.kind]}", f"classes: {', '.join(facts.classes)}", f"terms: {facts.license}"]
    for figure in facts.figures:
        interval = f" [{figure.low:.3f}, {figure.high:.3f}]" if figure.low is not None else ""
        lines.append(f"{figure.metric}: {figure.value:.3f}{interval}, {figure.clusters} {figure.unit}")
    return lines
