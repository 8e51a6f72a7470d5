"""`g2l baseline --kind pca`: the teacher's principal components, as an encoder of the store.

They are a column of the store and no network: all that is known of the teacher are its stored features, and its weights
need not be at hand. Nor are they computed in bench, whose rows have labels and a split of their own: fitted once, on
the very features that the distillation learned from, they are the same in every task and never saw a held-out patch.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64

from g2l_core.distillation.replay import good_rows
from g2l_core.distillation.target_statistics import SAMPLE_ROWS, first_rows
from g2l_core.errors import UsageError
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import StoredSlide
from g2l_core.store.location import folder_of
from g2l_core.store.locks import LOCKS, locked
from g2l_core.store.provenance import digest
from g2l_core.store.writer import FeatureWriter
from pipeline.baseline import Baseline
from pipeline.bench import COMPONENTS_OF


def principal_components(
    mean: Float64[np.ndarray, " dim"], covariance: Float64[np.ndarray, "dim dim"], width: int
) -> tuple[Float64[np.ndarray, "dim width"], float]:
    """The eigenvectors of a covariance with the largest eigenvalues, and their share of the variance.

    An eigenvector's sign is free; here its largest entry is positive, so that equal features give equal components.
    """
    values, vectors = np.linalg.eigh(covariance)
    chosen = vectors[:, ::-1][:, :width]
    largest = np.abs(chosen).argmax(axis=0)
    share = float(values[::-1][:width].sum() / values.sum())
    return chosen * np.sign(chosen[largest, np.arange(width)]), share


def run_pca(baseline: Baseline) -> tuple[str, float]:
    """Write the principal components of the teacher's canonical features into the store.

    They are fitted on the views that the distillation replayed, of its training patches; of more than a million rows,
    on the first ones of each slide. What is stored already is not written again.

    Returns:
        The key of the new encoder, and the share of the teacher's variance that it has.

    Raises:
        UsageError: There are several teachers, or as many components as features.
        StoreError: The store cannot be written to, or features are missing or damaged.
    """
    if len(baseline.teachers) > 1:
        raise UsageError("pca is of one teacher, and this distillation has several: give a run of one of them")
    teacher, store = baseline.teachers[0], baseline.store
    facts, width = store.encoders[teacher], baseline.asked.width or baseline.like.student.dim
    if width >= facts.dim:
        raise UsageError(
            f"{width} principal components of the {facts.dim} features of {teacher} are all of it: give a smaller "
            "--width"
        )
    mean, covariance, count = _moments(baseline, teacher)
    components, share = principal_components(mean, covariance, width)
    rows = {slide_id: count if chosen is None else chosen.tolist() for slide_id, chosen, count in _trained(baseline)}
    made = digest([facts.digest, width, baseline.like.replay["n_augmented"], rows])
    key = f"{teacher}-pca{width}-{made[:8]}"
    with locked(folder_of(store.path) / LOCKS / "writer", wait_s=0, holder="another g2l command writes into it"):
        store.add_encoder(
            key,
            EncoderFacts(
                name=f"{facts.name or teacher}, PCA {width}",
                weights=f"principal components of {teacher} over {count:,} rows of training patches, "
                f"{share:.1%} of its variance",
                dim=width,
                digest=made,
                imported=f"the principal components of {teacher}",
                proof="computed from its stored features",
                pooling=facts.pooling,
                precision=facts.precision,
                extra={COMPONENTS_OF: teacher},
            ),
        )
        for slide in store.slides():
            if teacher in slide.facts.features:
                _write(slide, teacher, key, made, mean, components)
        store.save_catalogue()
    return key, share


def _trained(baseline: Baseline) -> Iterator[tuple[str, np.ndarray | None, int]]:
    """Each training slide with its chosen rows and their number, which decide the components with the features."""
    counts = baseline.like.rows["train"]
    for slide_id, chosen in sorted(baseline.split.train.items()):
        yield slide_id, chosen, counts[slide_id]


def _moments(
    baseline: Baseline, teacher: str
) -> tuple[Float64[np.ndarray, " dim"], Float64[np.ndarray, "dim dim"], int]:
    """Mean and covariance of the teacher's features of the training patches, and of how many rows."""
    dim, views = baseline.store.encoders[teacher].dim, max(1, int(baseline.like.replay["n_augmented"]))
    count, total, products = 0, np.zeros(dim), np.zeros((dim, dim))
    for features in first_rows(baseline.store, baseline.split.train, teacher, range(1, 1 + views), SAMPLE_ROWS):
        values = features.astype(np.float64)
        count, total, products = count + len(values), total + values.sum(0), products + values.T @ values
    mean = total / count
    return mean, products / count - np.outer(mean, mean), count


def _write(
    slide: StoredSlide,
    teacher: str,
    key: str,
    made: str,
    mean: Float64[np.ndarray, " dim"],
    components: Float64[np.ndarray, "dim width"],
) -> None:
    writer = FeatureWriter.open(slide, key, digest=made, dim=components.shape[1], n_views=1)
    missing = writer.missing([0])
    if not missing:
        return
    features, status, good = slide.features(teacher), slide.patch_status, good_rows(slide)
    projected = np.full((len(slide), components.shape[1]), np.nan, np.float32)
    projected[good] = (features[good].astype(np.float64) - mean) @ components
    for shard in missing:
        rows = slice(shard.start, shard.stop)
        writer.write(shard, projected[rows], np.zeros(shard.stop - shard.start, np.uint64), status[rows])
