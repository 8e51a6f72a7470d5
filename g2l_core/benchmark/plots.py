"""The plots of a task from its rows and features: CKA of all pairs, projections, slides in color, confusions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from math import nan

import numpy as np
from jaxtyping import Bool, Float64

from g2l_core.benchmark.metric_groups.values import Confusion, Settings
from g2l_core.benchmark.projections import (
    cells_of,
    chosen_rows,
    cka_matrix,
    coded,
    component_colors,
    means_of_cells,
    principal_components,
    umap_plane,
    within_unit,
)
from g2l_core.benchmark.rows import TaskRows
from g2l_core.benchmark.widths import canonical_features
from g2l_core.errors import G2LError
from g2l_core.results import CkaMatrix, ConfusionMatrix, Failure, Plots, Projection, SlideMap
from g2l_core.store.schema import STATUS
from g2l_core.store.slide import StoredSlide
from g2l_core.types import Features

CKA_ROWS = 10_000
"""Maximum rows of the CKA matrix, as its cost grows with rows and with pairs."""
FITTED_ROWS = 3_000
"""Maximum rows that principal components are fitted on."""
POINTS = 1_000
"""Maximum points of a projection."""
SLIDES = 3
"""Number of slides shown as maps."""
CELLS = 1_500
"""Maximum cells of a slide map."""
_DECIMALS = 3


def task_plots(
    task: str, rows: TaskRows, chosen: Bool[np.ndarray, " row"], features: Mapping[str, Features], seed: int
) -> tuple[Plots, list[Failure]]:
    """All plots of a task but its confusion matrices.

    Args:
        task: The name of the task.
        rows: All rows of the task.
        chosen: The rows to plot, which nothing is trained on.
        features: Features of all rows, by encoder.
        seed: The random seed for drawing rows where there are too many.

    Returns:
        The plots, and a failure for each that could not be made.
    """
    shown = rows.take(chosen)
    slides = _largest_slides(shown)
    makers: list[tuple[str, str, Callable[[], Plots]]] = []
    if len(features) > 1:
        makers.append(("CKA of all pairs", "", partial(_cka, task, chosen, features, seed)))
    for encoder, values in features.items():
        makers.append(("projection", encoder, partial(_projections, task, encoder, shown, values[chosen], seed)))
        if slides:
            makers.append(("slide maps", encoder, partial(_slide_maps, task, encoder, slides, seed)))
    plots, failures = Plots(), []
    for what, encoder, make in makers:
        try:
            plots += make()
        except G2LError as error:
            failures.append(Failure(task=task, encoder=encoder, reason=f"{what}: {error}"))
    return plots, failures


def confusion_matrix(task: str, encoder: str, confusion: Confusion, settings: Settings) -> Plots:
    """The plot of one classifier's counts, true class by predicted class."""
    matrix = ConfusionMatrix(
        task=task,
        classifier=confusion.classifier,
        encoder=encoder,
        classes=tuple(map(str, confusion.classes)),
        counts=tuple(map(tuple, confusion.counts.tolist())),
        settings=settings,
    )
    return Plots(confusions=(matrix,))


def _cka(task: str, chosen: Bool[np.ndarray, " row"], features: Mapping[str, Features], seed: int) -> Plots:
    candidates = np.flatnonzero(chosen)
    used = candidates[chosen_rows(len(candidates), CKA_ROWS, seed)]
    values = cka_matrix({encoder: values[used] for encoder, values in features.items()})
    matrix = CkaMatrix(
        task=task,
        encoders=tuple(features),
        values=tuple(map(tuple, values.tolist())),
        rows="all" if chosen.all() else "test",
        n=len(used),
        of=len(candidates),
    )
    return Plots(cka=(matrix,))


def _projections(task: str, encoder: str, rows: TaskRows, features: Features, seed: int) -> Plots:
    """PCA, and UMAP of the same rows if umap-learn is installed."""
    components = principal_components(features[chosen_rows(len(rows), FITTED_ROWS, seed)], 2)
    shown = chosen_rows(len(rows), POINTS, seed)
    shares = tuple(round(share, _DECIMALS) for share in components.explained_variance_ratio_.tolist())
    planes = [_projection(task, encoder, "PCA", rows.take(shown), components.transform(features[shown]), shares)]
    embedded = umap_plane(features[shown], seed)
    if embedded is not None:
        planes.append(_projection(task, encoder, "UMAP", rows.take(shown), embedded, ()))
    return Plots(projections=tuple(replace(plane, of=len(rows)) for plane in planes))


def _projection(
    task: str,
    encoder: str,
    method: str,
    rows: TaskRows,
    points: Float64[np.ndarray, "row 2"],
    shares: tuple[float, ...],
) -> Projection:
    x, y = np.round(within_unit(points), _DECIMALS).T.tolist()
    classes, class_of = coded(rows.label)
    centers, center_of = coded(rows.center)
    return Projection(
        task=task,
        encoder=encoder,
        method=method,
        shares=shares,
        x=tuple(x),
        y=tuple(y),
        classes=classes,
        class_of=tuple(class_of.tolist()),
        centers=centers,
        center_of=tuple(center_of.tolist()),
        of=len(rows),
    )


def _largest_slides(rows: TaskRows) -> list[StoredSlide]:
    """The slides with most rows here, in stored order if equal. Sets of patch images are left out: they have no map."""
    counts = np.bincount(rows.slide_index, minlength=len(rows.slides))
    order = np.argsort(-counts, kind="stable")[:SLIDES].tolist()
    return [rows.slides[i] for i in order if counts[i] and rows.slides[i].facts.kind == "slide"]


def _slide_maps(task: str, encoder: str, slides: Sequence[StoredSlide], seed: int) -> Plots:
    """Maps of all readable patches of the slides, labeled or not, on the same components and colors."""
    good = [np.flatnonzero(slide.patch_status == STATUS["ok"]) for slide in slides]
    features = [canonical_features(slide, encoder)[kept] for slide, kept in zip(slides, good, strict=True)]
    everything = np.concatenate(features)
    components = principal_components(everything[chosen_rows(len(everything), FITTED_ROWS, seed)], 3)
    sides = [slide.facts.patch_px_level0 for slide in slides]
    corners = [slide.coords[kept] for slide, kept in zip(slides, good, strict=True)]
    cells = [cells_of(coords, side, CELLS) for coords, side in zip(corners, sides, strict=True)]
    means = [
        means_of_cells(components.transform(values), cell.of_patch)
        for values, cell in zip(features, cells, strict=True)
    ]
    colors = iter(component_colors(np.concatenate(means)))
    maps = tuple(
        SlideMap(
            task=task,
            encoder=encoder,
            slide=slide.slide_id,
            cell_mm=cell.side * (slide.facts.mpp or nan) / 1000,
            columns=tuple(cell.columns.tolist()),
            rows=tuple(cell.rows.tolist()),
            colors=tuple(islice(colors, len(cell.rows))),
            patches=len(values),
        )
        for slide, cell, values in zip(slides, cells, features, strict=True)
    )
    return Plots(slides=maps)
