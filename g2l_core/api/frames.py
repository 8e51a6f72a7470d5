"""The patches and the slides of a cohort as tables."""

from collections.abc import Iterator, Sequence
from operator import attrgetter

import numpy as np
import pandas as pd
from jaxtyping import Shaped

from g2l_core.api.selection import Part
from g2l_core.benchmark.columns import SlideColumns, value_text
from g2l_core.store.location import read_ahead
from g2l_core.store.schema import STATUS

FIXED = ("slide_id", "row", "x", "y", "status", "patch_id")
"""The columns that every table of patches begins with. A label of one of these names is called NAME_label there."""


def patch_frame(parts: Sequence[Part]) -> pd.DataFrame:
    """The table of patches that `Cohort.patches` gives."""
    sizes = [len(part) for part in parts]
    xy = _joined(_tables(parts, "coords"), np.zeros((0, 2), np.int32))
    codes = {code: name for name, code in STATUS.items()}
    status = _joined(_tables(parts, "status"), np.zeros(0, np.uint8))
    frame = pd.DataFrame(
        {
            "slide_id": _repeated([part.slide_id for part in parts], sizes),
            "row": _joined([part.rows for part in parts], np.zeros(0, np.int64)).astype(np.int32),
            "x": xy[:, 0],
            "y": xy[:, 1],
            "status": pd.Categorical.from_codes(status.astype(np.int8), [codes[i] for i in range(len(codes))]),
            "patch_id": _joined([_patch_ids(part) for part in parts], np.zeros(0, object)),
        }
    )
    columns = [part.columns for part in parts]
    for name in sorted(set().union(*(of_part.names for of_part in columns)) - {"slide_id"}):
        label = f"{name}_label" if name in FIXED else name
        frame[label] = _label_column(name, list(zip(parts, columns, strict=True)))
    return frame


def slide_frame(parts: Sequence[Part]) -> pd.DataFrame:
    """The table of slides that `Cohort.slides` gives."""
    facts = [part.slide.facts for part in parts]
    frame = pd.DataFrame(
        {
            "slide_id": [part.slide_id for part in parts],
            "kind": pd.Categorical([of_slide.kind for of_slide in facts], ["slide", "patches"]),
            "n_patches": np.array([len(part) for part in parts], np.int64),
            "mpp": np.array([np.nan if of_slide.mpp is None else of_slide.mpp for of_slide in facts], float),
            "width": np.array([of_slide.level0_size[0] for of_slide in facts], np.int64),
            "height": np.array([of_slide.level0_size[1] for of_slide in facts], np.int64),
            "patch_px_level0": np.array([of_slide.patch_px_level0 for of_slide in facts], np.int64),
            "source": [of_slide.source for of_slide in facts],
        }
    )
    columns = [part.columns for part in parts]
    for name in sorted(set().union(*(of_slide.names for of_slide in columns)) - {"slide_id"}):
        values = [of_slide.constant(name) for of_slide in columns]
        if any(value is not None for value in values):
            frame[f"{name}_label" if name in frame else name] = pd.Categorical([value or None for value in values])
    return frame


def _patch_ids(part: Part) -> Shaped[np.ndarray, " row"]:
    names = part.slide.patch_ids
    return np.full(len(part), None, object) if names is None else np.array(names, object)[part.rows]


def _tables(parts: Sequence[Part], name: str) -> list[np.ndarray]:
    return list(read_ahead(attrgetter(name), parts, parts[0].slide.folder)) if parts else []


def _joined(arrays: Sequence[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays) if arrays else empty


def _repeated(values: Sequence[str | None], sizes: Sequence[int]) -> pd.Categorical:
    """A text for each slide, repeated for each of its patches; None is a missing one."""
    known = sorted({value for value in values if value})
    places = {value: place for place, value in enumerate(known)}
    codes = np.array([places.get(value or "", -1) for value in values], _code_type(len(known)))
    return pd.Categorical.from_codes(np.repeat(codes, sizes), known)


def _code_type(n: int) -> type[np.signedinteger]:
    return np.int8 if n < 2**7 else np.int16 if n < 2**15 else np.int32


def _label_column(name: str, parts: Sequence[tuple[Part, SlideColumns]]) -> "pd.Categorical | np.ndarray":
    """A label of every patch: of its stored type if it was added to the store, else a category."""
    here = [columns for _, columns in parts if name in columns.names]
    if here and all(columns.is_typed(name) for columns in here):
        return _typed_column(name, parts)
    constants = [columns.constant(name) if name in columns.names else "" for _, columns in parts]
    if all(value is not None for value in constants):
        return _repeated(constants, [len(part) for part, _ in parts])
    return _categories(_texts(name, parts))


def _typed_column(name: str, parts: Sequence[tuple[Part, SlideColumns]]) -> "pd.Categorical | np.ndarray":
    found = [columns.values(name)[part.rows] if name in columns.names else None for part, columns in parts]
    kinds = {values.dtype.kind for values in found if values is not None}
    if "O" in kinds:
        texts = (np.full(len(part), "", object) if v is None else v for v, (part, _) in zip(found, parts, strict=True))
        return _categories(texts)
    blank = any(values is None for values in found)
    arrays = [np.full(len(part), np.nan) if v is None else v for v, (part, _) in zip(found, parts, strict=True)]
    return np.concatenate([values.astype(float) if blank else values for values in arrays])


def _texts(name: str, parts: Sequence[tuple[Part, SlideColumns]]) -> Iterator[np.ndarray]:
    for part, columns in parts:
        yield columns.column(name, part.rows) if name in columns.names else np.full(len(part), "", object)


def _categories(arrays: "Iterator[np.ndarray]") -> pd.Categorical:
    """Texts as categories; blank ones are missing."""
    places: dict[str, int] = {}
    codes = [
        np.fromiter((places.setdefault(value_text(value), len(places)) for value in values.tolist()), np.int32)
        for values in arrays
    ]
    known = sorted(value for value in places if value)
    order = np.full(max(len(places), 1), -1, _code_type(len(known)))
    for new, value in enumerate(known):
        order[places[value]] = new
    return pd.Categorical.from_codes(order[np.concatenate(codes)], known)
