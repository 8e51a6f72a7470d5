"""Add a column to the patches of a store."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Shaped

from g2l_core.api.frames import FIXED
from g2l_core.api.selection import Part, Selection
from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.slides.manifest import canonical_column
from g2l_core.store.columns import write_column
from g2l_core.store.features import FeatureStore
from g2l_core.store.location import folder_of
from g2l_core.store.locks import LOCKS, locked


def add_column(selection: Selection, name: str, values: Any) -> None:
    """Write the column that `Cohort.write_column` describes."""
    if name in FIXED or canonical_column(name) != name:
        raise UsageError(f"no column can be called {name!r}: {', '.join(FIXED)} and spellings of other names are taken")
    path = folder_of(selection.store.path)
    with locked(path / LOCKS / "writer", wait_s=0, holder="another g2l command writes into it"):
        parts = selection.parts()
        store = FeatureStore.open(path, writable=True)
        for part, of_part in zip(parts, _by_part(parts, values), strict=True):
            write_column(store.slide(part.slide_id), name, _of_slide(part, of_part))
        store.save_catalogue()


def _by_part(parts: Sequence[Part], values: Any) -> list[Shaped[np.ndarray, "_"]]:
    """The values of each slide's patches, all of one type."""
    sizes = [len(part) for part in parts]
    if isinstance(values, Mapping):
        known = {part.slide_id for part in parts}
        for slide_id in values:
            if slide_id not in known:
                raise UnknownNameError("slide", str(slide_id), sorted(known), "It is none of the cohort.")
        of_slides = pd.Series([values.get(part.slide_id) for part in parts])
        return list(np.split(np.repeat(_typed(of_slides), sizes), np.cumsum(sizes)[:-1])) if parts else []
    series = values if isinstance(values, pd.Series) else pd.Series(np.asarray(values))
    total = sum(sizes)
    if isinstance(values, pd.Series):
        series = _aligned(series, total)
    if len(series) != total:
        raise UsageError(f"expected {total:,} values, one for each row of patches(); got {len(series):,}")
    return np.split(_typed(series), np.cumsum(sizes)[:-1]) if parts else []


def _aligned(series: "pd.Series", total: int) -> "pd.Series":
    """A series in the order of the table of patches; rows that it does not have are missing."""
    is_index = pd.api.types.is_integer_dtype(series.index.dtype) and series.index.is_unique
    if not is_index or (len(series) and not (series.index.min() >= 0 and series.index.max() < total)):
        raise UsageError(
            f"the index of the series must be that of patches(), different whole numbers from 0 to {total - 1:,}; give "
            "an array to go by position"
        )
    return series.reindex(range(total))


def _typed(series: "pd.Series") -> Shaped[np.ndarray, " row"]:
    """Numbers, truth values or texts; missing ones are NaN or empty."""
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(object)
    series = series.convert_dtypes() if series.dtype == object else series
    if pd.api.types.is_bool_dtype(series.dtype) and not series.isna().any():
        return series.to_numpy(dtype=bool)
    if pd.api.types.is_integer_dtype(series.dtype) and not series.isna().any():
        return series.to_numpy(dtype=np.int64)
    if pd.api.types.is_numeric_dtype(series.dtype):
        dtype = np.float32 if series.dtype == np.float32 else np.float64
        return series.to_numpy(dtype=dtype, na_value=np.nan)
    return np.array(
        ["" if missing else str(value) for value, missing in zip(series, series.isna(), strict=True)], object
    )


def _of_slide(part: Part, values: Shaped[np.ndarray, "_"]) -> Shaped[np.ndarray, " patch"]:
    """The values of all stored patches; those that are not in the cohort are missing."""
    if len(part) == len(part.slide):
        return values
    if values.dtype == object:
        whole = np.full(len(part.slide), "", object)
    else:
        dtype = values.dtype if values.dtype.kind == "f" else np.float64
        whole = np.full(len(part.slide), np.nan, dtype)
    whole[part.rows] = values
    return whole
