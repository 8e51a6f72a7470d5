"""Whether features follow the biology or the medical centre: two indices on the same neighbour counts.

Of a query's k nearest neighbours, those of its own slide left out, count

- SS: same class, same centre;
- SO: same class, other centre (the biology brought them near);
- OS: other class, same centre (the centre did).

Sums of these counts over queries give both indices, so a bootstrap over slides or patients only sums again;
the neighbours stay those of the whole data.
"""

import numpy as np
from jaxtyping import Float64, Int64, Num, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.neighbors import Neighbors
from g2l_core.metrics.statistics import require_aligned


def robustness_counts(
    neighbors: Neighbors,
    biological_classes: Shaped[np.ndarray, " row"],
    medical_centers: Shaped[np.ndarray, " center_row"],
    *,
    k: int,
) -> Int64[np.ndarray, "row 3"]:
    """Counts each row's neighbours of kind SS, SO and OS among the first k.

    Args:
        neighbors: From `nearest` with `queries` None and the slides as `groups`.
        biological_classes: The tissue class of each row.
        medical_centers: The centre of each row.
        k: At most the number of neighbours found.

    Raises:
        TaskError: If the lengths differ, there is one class or one centre only, k is out of range, or no
            neighbour at all is of its query's centre, as when every centre has a single slide: then both
            indices say nothing.
    """
    require_aligned(rows=len(neighbors.indices), classes=len(biological_classes), centers=len(medical_centers))
    if not 1 <= k <= neighbors.indices.shape[1]:
        raise TaskError(f"k must lie between 1 and the {neighbors.indices.shape[1]} neighbours found; got {k}")
    for name, values in (("class", biological_classes), ("medical centre", medical_centers)):
        if len(np.unique(values)) < 2:
            raise TaskError(f"robustness needs two of each at least; every row has the {name} {values[0]}")
    near = neighbors.indices[:, :k]
    same_class = biological_classes[near] == biological_classes[:, None]
    same_center = medical_centers[near] == medical_centers[:, None]
    if not same_center.any():
        raise TaskError(
            "no neighbour is of its query's medical centre; "
            "as those of the same slide are left out, some centre needs two slides at least"
        )
    kinds = (same_class & same_center, same_class & ~same_center, ~same_class & same_center)
    return np.stack([kind.sum(axis=1) for kind in kinds], axis=1)


def ratio_index(totals: Num[np.ndarray, "draw 3"]) -> Float64[np.ndarray, " draw"]:
    """Neighbours of the same class over neighbours of the same centre: (SS + SO) / (SS + OS).

    Above 1, the biology dominates. Has no upper bound, and depends on k and on how many rows each class
    and centre has.

    Args:
        totals: SS, SO and OS, summed over the queries of each draw.

    Returns:
        The index of each draw; NaN where no neighbour is of the same centre.

    References:
        de Jong et al., Current Pathology Foundation Models are unrobust to Medical Center Differences
        (2025), arXiv 2501.18055.
    """
    return _ratio(totals[:, 0] + totals[:, 1], totals[:, 0] + totals[:, 2])


def pathorob_index(totals: Num[np.ndarray, "draw 3"]) -> Float64[np.ndarray, " draw"]:
    """PathoROB's robustness index, SO / (SO + OS), between 0 and 1.

    Args:
        totals: SS, SO and OS, summed over the queries of each draw.

    Returns:
        The index of each draw; NaN where all neighbours share both class and centre, or neither.

    References:
        Kömen et al., Towards Robust Foundation Models for Digital Pathology (2025), arXiv 2507.17845.
    """
    return _ratio(totals[:, 1], totals[:, 1] + totals[:, 2])


def _ratio(above: Num[np.ndarray, " draw"], below: Num[np.ndarray, " draw"]) -> Float64[np.ndarray, " draw"]:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
