"""Which stored patches train the student, and which are held out to watch it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from jaxtyping import Int64

from g2l_core.distillation.replay import good_rows
from g2l_core.errors import UsageError
from g2l_core.rng import keyed_generator
from g2l_core.slides.manifest import fits, held_out_groups, parse_condition
from g2l_core.store.features import FeatureStore, StoredSlide

LEAST_HELD_OUT = 4

Rows = dict[str, Int64[np.ndarray, " row"]]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows by slide id, and in words how they were parted."""

    train: Rows
    held_out: Rows
    description: str


def split_store(
    store: FeatureStore, where: Sequence[str], hold_out: str, seed: int, *, slides: int | None = None
) -> Split:
    """Part a store's good patches into training and held-out ones.

    Args:
        store: The store.
        where: Conditions COLUMN=PATTERN that a slide must all fit; others are not used at all.
        hold_out: COLUMN=PATTERN, or a share. A share takes whole patients, or slides where patients are not
            known; where there is a single one, or only sets of images, it takes rows of every slide.
        seed: Names the draw.
        slides: Train on so many slides, at random; fewer are always among more, so that sizes can be compared.

    Raises:
        UsageError: Nothing is left on either side, or an argument is malformed.
    """
    split = _split(store, where, hold_out, seed)
    return split if slides is None else _of_slides(split, slides, seed)


def _of_slides(split: Split, count: int, seed: int) -> Split:
    """The split with `count` of its training slides."""
    if not 1 <= count <= len(split.train):
        raise UsageError(f"--slides {count}: there are {len(split.train)} slides to train on")
    kept = keyed_generator("training slides", seed).permutation(sorted(split.train))[:count].tolist()
    return replace(split, train={slide_id: split.train[slide_id] for slide_id in kept})


def _split(store: FeatureStore, where: Sequence[str], hold_out: str, seed: int) -> Split:
    conditions = [parse_condition(text) for text in where]
    slides = [s for s in store.slides() if all(fits(c, s.slide_id, s.labels) for c in conditions)]
    if not slides:
        raise UsageError(f"no slide of {store.path} fits {' and '.join(where) or 'at all'}")
    if "=" in hold_out:
        condition = parse_condition(hold_out)
        chosen = {s.slide_id for s in slides if fits(condition, s.slide_id, s.labels)}
        return _by_slide(slides, chosen, f"slides with {hold_out}")
    share = _share(hold_out)
    groups = {s.slide_id: s.labels.get("patient_id") or s.slide_id for s in slides}
    whole_slides = all(s.facts.kind == "slide" or "patient_id" in s.labels for s in slides)
    if not whole_slides or len(set(groups.values())) < 2:
        return _by_row(slides, share, seed)
    held = held_out_groups(groups.values(), share, seed)
    kind = "patients" if all("patient_id" in s.labels for s in slides) else "slides"
    return _by_slide(slides, {i for i, group in groups.items() if group in held}, f"{kind} {', '.join(sorted(held))}")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UsageError(f"--hold-out {text}: expected a share between 0 and 1, or COLUMN=PATTERN")
    return share


def _by_slide(slides: Sequence[StoredSlide], held: set[str], description: str) -> Split:
    train = {s.slide_id: good_rows(s) for s in slides if s.slide_id not in held}
    held_out = {s.slide_id: good_rows(s) for s in slides if s.slide_id in held}
    if not held_out or not train:
        raise UsageError(
            f"--hold-out takes {len(held_out)} of {len(slides)} slides: both sides need at least one ({description})"
        )
    return Split(train=train, held_out=held_out, description=description)


def _by_row(slides: Sequence[StoredSlide], share: float, seed: int) -> Split:
    """Hold out rows of every slide, at least four in all: fewer give no debiased CKA."""
    train: Rows = {}
    held_out: Rows = {}
    fewest = ceil(LEAST_HELD_OUT / len(slides))
    for slide in slides:
        rows = good_rows(slide)
        order = keyed_generator("held-out rows", seed, slide.slide_id).permutation(rows)
        count = max(fewest, round(share * len(rows)))
        held_out[slide.slide_id], train[slide.slide_id] = np.sort(order[:count]), np.sort(order[count:])
    n = sum(map(len, held_out.values()))
    whose = "the one slide" if len(slides) == 1 else f"{len(slides)} slides or image sets"
    return Split(
        train=train,
        held_out=held_out,
        description=f"{n} random patches of {whose} that also trains: no slide or patient is held out whole",
    )
