"""The paired 2x2 design against croma, by hand, and on planted truth."""

import warnings
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
from croma.metrics.ri import RobustnessIndex
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import TaskError
from g2l_core.metrics.intervals import Figure, estimate
from g2l_core.metrics.knn.neighbors import nearest
from g2l_core.metrics.patients import design_of
from g2l_core.metrics.robustness import (
    paired_combinations,
    paired_counts,
    pathorob_index,
    ratio_index,
    robustness_counts,
)
from g2l_core.metrics.scales import SHARE

KS = [1, 5, 11]


def cohort(seed, biology, center, n=480, slide=0.5):
    """Three classes in three centers, 8 slides a center; slides have a look of their own."""
    rng = np.random.default_rng(seed)
    classes, slides = rng.integers(3, size=n), rng.integers(24, size=n)
    centers = slides % 3
    looks = [rng.standard_normal((count, 16)) for count in (3, 3, 24)]
    features = biology * looks[0][classes] + center * looks[1][centers] + slide * looks[2][slides]
    return (features + rng.standard_normal((n, 16))).astype(np.float32), classes, centers, slides


def heavy_tailed(seed):
    """As networks give them: correlated, of very unequal scale, positive, in float16."""
    features, classes, centers, slides = cohort(seed, 1.0, 1.0)
    rng = np.random.default_rng(seed)
    mixed = np.maximum(features @ rng.standard_normal((16, 96)), 0) * np.geomspace(0.01, 10, 96)
    return mixed.astype(np.float16), classes, centers, slides


def croma_table(design, classes, centers, slides):
    """One row for each time that a row is in a combination, which croma calls a subset."""
    rows = np.concatenate([combination.rows for combination in design])
    subset = np.repeat(np.arange(len(design)), [len(combination.rows) for combination in design])
    table = pd.DataFrame({"label": classes[rows], "center": centers[rows], "group_id": slides[rows]}).astype(str)
    table["subset"] = [f"s{number}" for number in subset]
    table["sample_id"] = table["image_path"] = [f"p{i}" for i in range(len(rows))]
    return rows, table


COHORTS = {
    "random": lambda seed: cohort(seed, 0, 0, slide=0),
    "biology": lambda seed: cohort(seed, 2, 0.5),
    "center": lambda seed: cohort(seed, 0.5, 2),
    "float16": heavy_tailed,
}


@pytest.mark.parametrize("name", COHORTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_index_support_and_accuracy_equal_croma(name, seed):
    check_against_croma(*COHORTS[name](seed), seed)


def test_real_patches_equal_croma(oscc_patches):
    """Thumbnails as features: normal and tumor, the two folders as centers, five patches of a folder a slide."""
    paths = [p for part in ("train", "test") for name in ("Normal", "OSCC") for p in folder(oscc_patches, part, name)]
    images = [cv2.resize(cv2.imread(str(path)), (12, 12), interpolation=cv2.INTER_AREA) for path in paths]
    names, parts = (np.array([path.parts[at] for path in paths]) for at in (-2, -3))
    check_against_croma(np.stack(images).reshape(len(paths), -1).astype(np.float32), names, parts, slides_of(paths), 0)


def folder(patches, part, name):
    return sorted((patches / part / name).glob("*"))[:40]


def slides_of(paths):
    return np.array([f"{path.parts[-3]} {path.parts[-2]} {number // 5}" for number, path in enumerate(paths)])


def check_against_croma(features, classes, centers, slides, seed):
    """The index, its support, each combination's value, and the k that the class's accuracy chooses."""
    design = paired_combinations(classes, centers, slides, k=max(KS), rows_per_stratum=25, seed=seed)
    got = paired_counts(features, classes, centers, slides, design, ks=KS)
    rows, table = croma_table(design, classes, centers, slides)
    for k in KS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # croma warns of a support below 1
            expected = RobustnessIndex.compute(
                features[rows].astype(np.float64),
                table,
                confounder_column="center",
                k_candidates=[k],
                evaluation_design="paired_2x2",
            )
        assert pathorob_index(got[k].counts.sum(axis=0, keepdims=True))[0] == pytest.approx(expected.value, abs=1e-12)
        assert got[k].support == pytest.approx(expected.support, abs=1e-12)
        per_combination = np.nan_to_num(pathorob_index(got[k].combinations), nan=0.5)
        np.testing.assert_allclose(per_combination, expected.pair_values, atol=1e-12)
        chosen = RobustnessIndex._select_operating_k(
            features=features[rows].astype(np.float64),
            manifest=table,
            confounder_column="center",
            k_candidates=KS,
            evaluation_design="paired_2x2",
        )
    assert chosen == max(KS, key=lambda k: (got[k].class_accuracy, -k))


def test_strata_are_equally_large_and_spread_over_their_slides():
    classes, centers, slides = cohort(0, 1, 1)[1:]
    for combination in paired_combinations(classes, centers, slides, k=5, rows_per_stratum=12, seed=3):
        rows = combination.rows
        assert len(rows) == 48
        assert (np.diff(rows) > 0).all()
        for name in combination.classes:
            for place in combination.centers:
                stratum = rows[(classes[rows] == name) & (centers[rows] == place)]
                assert len(stratum) == 12
                assert np.unique(slides[stratum], return_counts=True)[1].max() == 2  # 12 rows of 8 slides


def test_a_stratum_without_two_slides_takes_no_part():
    classes = np.array(["t", "n", "t", "n"] * 6)
    centers = np.array(["A", "A", "B", "B"] * 6)
    slides = np.array([f"{c}{i // 8}" for i, c in enumerate(centers)])
    (only,) = paired_combinations(classes, centers, slides, k=4, seed=0)
    np.testing.assert_array_equal(only.rows, np.arange(24))
    alone = np.where((classes == "t") & (centers == "B"), "B9", slides)
    with pytest.raises(TaskError, match="two slides at least in each, with 4 rows"):
        paired_combinations(classes, centers, alone, k=4, seed=0)
    with pytest.raises(TaskError, match="no four strata do"):
        paired_combinations(classes, centers, slides, k=21, seed=0)
    with pytest.raises(TaskError, match="rows_per_stratum at least 2; got 4 and 1"):
        paired_combinations(classes, centers, slides, k=4, rows_per_stratum=1, seed=0)
    with pytest.raises(TaskError, match="0 combinations"):
        paired_counts(np.eye(24, dtype=np.float32), classes, centers, slides, (), ks=[1])


def test_counts_of_two_directions_by_hand():
    """Every patch looks like its class alone: all neighbors are of it, those of the own slide left out."""
    classes, centers = np.array([0, 0, 1, 1] * 4), np.array([0, 1] * 8)
    slides = centers + 2 * (np.arange(16) // 8)
    features = np.eye(2, dtype=np.float32)[classes]
    design = paired_combinations(classes, centers, slides, k=6, seed=0)
    got = paired_counts(features, classes, centers, slides, design, ks=[2, 6])
    assert got[6].occurrences == 16
    np.testing.assert_array_equal(got[6].counts[:, :2], np.tile([2, 4], (16, 1)))
    np.testing.assert_array_equal(got[6].counts[:, 2], 0)
    assert got[2].class_accuracy == 1


def test_unpaired_indices_follow_both_strengths_too():
    """Chance by counting candidates: of 8 slides a center, one is left out; a third of each has the class."""

    def both(biology, center, seeds=3):
        drawn = []
        for seed in range(seeds):
            features, classes, centers, slides = cohort(seed, biology, center, slide=0)
            graph = nearest(features, None, 11, groups=slides)
            totals = robustness_counts(graph, classes, centers, k=11).sum(axis=0, keepdims=True)
            drawn.append([ratio_index(totals)[0], pathorob_index(totals)[0]])
        return np.mean(drawn, axis=0)

    rising = np.array([both(strength, 1.0) for strength in (0.0, 0.5, 1.0, 2.0)])
    falling = np.array([both(1.0, strength) for strength in (0.0, 0.5, 1.0, 2.0)])
    assert (np.diff(rising, axis=0) > 0.02).all()
    assert (np.diff(falling, axis=0) < -0.02).all()
    same, other = 7 / 8, 2.0  # slides of the center, and of the two others, for each slide of a class
    chance = [(same + other) / (same + 2 * same), other / (other + 2 * same)]
    np.testing.assert_allclose(both(0, 0, seeds=16), chance, atol=0.02)


def indices(strengths, seeds=range(4)):
    """The index at k = 5 for each (biology, center), the mean over seeds."""
    values = []
    for strength in strengths:
        drawn = []
        for seed in seeds:
            features, classes, centers, slides = cohort(seed, *strength)
            design = paired_combinations(classes, centers, slides, k=5, rows_per_stratum=30, seed=seed)
            counts = paired_counts(features, classes, centers, slides, design, ks=[5])[5].counts
            drawn.append(pathorob_index(counts.sum(axis=0, keepdims=True))[0])
        values.append(np.mean(drawn))
    return np.array(values)


def test_index_rises_with_the_class_and_falls_with_the_center():
    assert (np.diff(indices([(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (2.0, 1.0)])) > 0.05).all()
    assert (np.diff(indices([(1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (1.0, 2.0)])) < -0.02).all()


def test_features_without_meaning_where_slides_hold_all_classes():
    drawn = []
    for seed in range(6):
        features, classes, centers, slides = cohort(seed, 0, 0, slide=0)
        design = paired_combinations(classes, centers, slides, k=11, seed=seed)
        counts = paired_counts(features, classes, centers, slides, design, ks=[11])[11].counts
        drawn.append(pathorob_index(counts.sum(axis=0, keepdims=True))[0])
    # Of 8 slides, 8 give SO neighbors but 7 OS ones: the query's own slide holds the other class too.
    assert np.mean(drawn) == pytest.approx(8 / 15, abs=0.02)
    assert np.std(drawn) < 0.03


def test_features_without_meaning_sit_at_one_half_where_a_slide_holds_one_class():
    drawn = []
    for seed in range(6):
        features, _, centers, slides = cohort(seed, 0, 0, slide=0)
        classes = slides // 3 % 2
        design = paired_combinations(classes, centers, slides, k=11, seed=seed)
        counts = paired_counts(features, classes, centers, slides, design, ks=[11])[11].counts
        drawn.append(pathorob_index(counts.sum(axis=0, keepdims=True))[0])
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.015)


@given(seed=st.integers(0, 2**32 - 1))
def test_draw_depends_on_the_seed_and_on_no_other_class(seed):
    classes, centers, slides = cohort(1, 1, 1)[1:]
    design = paired_combinations(classes, centers, slides, k=3, rows_per_stratum=8, seed=seed)
    two = np.flatnonzero(classes < 2)
    (part, *_) = paired_combinations(classes[two], centers[two], slides[two], k=3, rows_per_stratum=8, seed=seed)
    np.testing.assert_array_equal(two[part.rows], design[0].rows)
    again = paired_combinations(classes, centers, slides, k=3, rows_per_stratum=8, seed=seed)
    np.testing.assert_array_equal(design[0].rows, again[0].rows)
    other = paired_combinations(classes, centers, slides, k=3, rows_per_stratum=8, seed=seed + 1)
    assert not np.array_equal(design[0].rows, other[0].rows)


def test_interval_over_slides():
    features, classes, centers, slides = cohort(0, 1, 1)
    design = paired_combinations(classes, centers, slides, k=5, seed=0)
    counts = paired_counts(features, classes, centers, slides, design, ks=[5])[5]
    figure = Figure(values=pathorob_index(counts.totals), design=design_of(slides, unit="slides"), scale=SHARE)
    got = estimate(figure)
    assert got.low < got.value < got.high
    assert got.value == pathorob_index(counts.counts.sum(axis=0, keepdims=True))[0]


def test_a_slide_is_left_out_as_query_and_as_neighbor():
    features, classes, centers, slides = cohort(0, 1, 1)
    design = paired_combinations(classes, centers, slides, k=5, seed=0)
    totals = paired_counts(features, classes, centers, slides, design, ks=[5])[5].totals
    names = np.unique(slides)
    for number, name in enumerate(names.tolist()):
        kept = [replace(part, rows=part.rows[slides[part.rows] != name]) for part in design]
        alone = paired_counts(features, classes, centers, slides, kept, ks=[5])[5].counts.sum(axis=0)
        np.testing.assert_array_equal(totals[1 + number], alone)
