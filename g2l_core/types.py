"""Units, ids and array aliases.

A coordinate or a size always says its frame: level-0 pixels (the slide's finest level) or patch pixels
(a patch as the encoder's views are cut from it). `mpp` is micrometers per pixel.
"""

from typing import NewType, TypeAlias

import numpy as np
from jaxtyping import Bool, Float16, Float32, Int32, UInt8, UInt64

Mpp = NewType("Mpp", float)
"""Micrometers per pixel."""

Level0Px = NewType("Level0Px", int)
"""A length in pixels of the slide's finest level."""

PatchPx = NewType("PatchPx", int)
"""A length in pixels of a patch at its wanted mpp."""

SlideId = NewType("SlideId", str)
"""The slide's path relative to its input folder, without the suffix; `/` between folders."""

Rgb: TypeAlias = UInt8[np.ndarray, "height width 3"]
"""An image; red, green, blue."""

TissueMask: TypeAlias = Bool[np.ndarray, "height width"]
"""True where there is tissue, at the thumbnail's scale."""

Coords: TypeAlias = Int32[np.ndarray, "patch 2"]
"""x and y of each patch's top-left corner in level-0 pixels."""

ViewParams: TypeAlias = Float32[np.ndarray, "patch view parameter"]
"""The parameters of each patch's views; the columns are those of `views.columns_of`."""

PixelHash: TypeAlias = UInt64[np.ndarray, "patch view"]
"""xxh3-64 of each view's uint8 pixels; 0 where it is not known yet."""

PatchStatus: TypeAlias = UInt8[np.ndarray, " patch"]
"""0 where the patch is good, else a reason code of the store."""

Features: TypeAlias = Float16[np.ndarray, "patch dim"]
"""Features of one view of each patch."""
