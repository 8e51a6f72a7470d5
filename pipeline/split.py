"""Which stored patches train the student, and which are held out to validate it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from jaxtyping import Int64

from g2l_core.distillation.replay import ChosenRows, good_rows
from g2l_core.errors import UsageError
from g2l_core.rng import keyed_generator
from g2l_core.slides.manifest import fits, held_out_groups, parse_condition
from g2l_core.store.features import FeatureStore, StoredSlide

MIN_HELD_OUT = 4
"""Fewer patches give no debiased CKA."""

Rows = dict[str, Int64[np.ndarray, " row"]]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows that train and rows that are held out, by slide id."""

    train: ChosenRows
    held_out: ChosenRows
    description: str
    """Describes what is held out."""


def split_store(
    store: FeatureStore, where: Sequence[str], hold_out: str, seed: int, *, slides: int | None = None
) -> Split:
    """Split a store's good patches into training and held-out ones.

    Args:
        store: The store.
        where: Conditions COLUMN=PATTERN. Slides that do not fit all of them are not used.
        hold_out: COLUMN=PATTERN, or a fraction. A fraction takes whole patients, or slides where patients are not
            known. Where there is a single one, or only sets of images, it takes rows of every slide.
        seed: Random seed.
        slides: Number of slides to train on, at random; None is all. A smaller number is a subset of a larger one, so
            that sizes can be compared.

    Raises:
        StoreCorruptError: A slide's document is damaged, so that nobody knows whether it would take part.
        UsageError: No patches are left to train on or to hold out, or an argument is malformed.
    """
    split = _split(store, where, hold_out, seed)
    return split if slides is None else _take_slides(split, slides, seed)


def _take_slides(split: Split, count: int, seed: int) -> Split:
    """The split with `count` of its training slides."""
    if not 1 <= count <= len(split.train):
        raise UsageError(f"--slides {count}: there are {len(split.train)} slides to train on")
    kept = keyed_generator("training slides", seed).permutation(sorted(split.train))[:count].tolist()
    return replace(split, train={slide_id: split.train[slide_id] for slide_id in kept})


def _split(store: FeatureStore, where: Sequence[str], hold_out: str, seed: int) -> Split:
    store.require_undamaged()
    conditions = [parse_condition(text) for text in where]
    slides = [s for s in store.slides() if all(fits(c, s.slide_id, s.labels) for c in conditions)]
    if not slides:
        raise UsageError(f"no slide of {store.path} fits {' and '.join(where) or 'at all'}")
    if "=" in hold_out:
        condition = parse_condition(hold_out)
        chosen = {s.slide_id for s in slides if fits(condition, s.slide_id, s.labels)}
        return _by_slide(slides, chosen, f"slides with {hold_out}")
    fraction = _parse_fraction(hold_out)
    if any("patient_id" in labels for s in slides if s.has_patch_labels for labels in s.patch_labels):
        return _by_patient_of_patch(slides, fraction, seed)
    groups = {s.slide_id: s.labels.get("patient_id") or s.slide_id for s in slides}
    whole_slides = all(s.facts.kind == "slide" or "patient_id" in s.labels for s in slides)
    if not whole_slides or len(set(groups.values())) < 2:
        return _by_row(slides, fraction, seed)
    held = held_out_groups(groups.values(), fraction, seed)
    kind = "patients" if all("patient_id" in s.labels for s in slides) else "slides"
    return _by_slide(slides, {i for i, group in groups.items() if group in held}, f"{kind} {', '.join(sorted(held))}")


def _parse_fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise UsageError(f"--hold-out {text}: expected a share between 0 and 1, or COLUMN=PATTERN")
    return fraction


def _by_slide(slides: Sequence[StoredSlide], held: set[str], description: str) -> Split:
    train: ChosenRows = {s.slide_id: None for s in slides if s.slide_id not in held}
    held_out: ChosenRows = {s.slide_id: None for s in slides if s.slide_id in held}
    if not held_out or not train:
        raise UsageError(
            f"--hold-out takes {len(held_out)} of {len(slides)} slides: both sides need at least one ({description})"
        )
    return Split(train=train, held_out=held_out, description=description)


def _by_patient_of_patch(slides: Sequence[StoredSlide], fraction: float, seed: int) -> Split:
    """Hold out whole patients where patch images of one set are of several; without a patient, each counts as one."""
    rows = {slide.slide_id: good_rows(slide) for slide in slides}
    patients = {slide.slide_id: np.array(_patients(slide))[rows[slide.slide_id]] for slide in slides}
    held = held_out_groups((name for names in patients.values() for name in names.tolist()), fraction, seed)
    is_held = {slide_id: np.isin(names, sorted(held)) for slide_id, names in patients.items()}
    train: ChosenRows = {i: rows[i][~mask] for i, mask in is_held.items() if not mask.all()}
    held_out: ChosenRows = {i: rows[i][mask] for i, mask in is_held.items() if mask.any()}
    if not held_out or not train:
        raise UsageError("--hold-out takes whole patients, and the patch images have a single one; give COLUMN=PATTERN")
    return Split(train=train, held_out=held_out, description=f"patients {', '.join(sorted(held))}")


def _patients(slide: StoredSlide) -> list[str]:
    """The patient of each stored patch."""
    of_slide = slide.labels.get("patient_id") or (slide.slide_id if slide.facts.kind == "slide" else "")
    own = [labels.get("patient_id") or of_slide for labels in slide.patch_labels]
    return [patient or f"{slide.slide_id}#{row}" for row, patient in enumerate(own)]


def _by_row(slides: Sequence[StoredSlide], fraction: float, seed: int) -> Split:
    """Hold out rows of every slide, at least `MIN_HELD_OUT` in all."""
    train: Rows = {}
    held_out: Rows = {}
    min_rows = ceil(MIN_HELD_OUT / len(slides))
    for slide in slides:
        rows = good_rows(slide)
        order = keyed_generator("held-out rows", seed, slide.slide_id).permutation(rows)
        count = max(min_rows, round(fraction * len(rows)))
        held_out[slide.slide_id], train[slide.slide_id] = np.sort(order[:count]), np.sort(order[count:])
    n = sum(map(len, held_out.values()))
    whose = "the one slide" if len(slides) == 1 else f"{len(slides)} slides or image sets"
    return Split(
        train=train,
        held_out=held_out,
        description=f"{n} random patches of {whose} that also trains: no slide or patient is held out whole",
    )
