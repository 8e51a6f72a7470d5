"""Stored features as a torch Dataset: one item a slide, for training on whole slides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from g2l_core.errors import ManifestError
from g2l_core.store.features import FeatureStore
from g2l_core.store.schema import STATUS


class SlideFeatures(Dataset[dict[str, Any]]):
    """The stored features of a cohort, one item a slide.

    An item is a dict: `features` float32 (n, dim), `coords` int32 (n, 2) in level-0 pixels, `slide_id`, and
    `label` where a column was asked for; unreadable patches are left out. Slides differ in n, so a DataLoader
    needs `batch_size=None`, or a collate function. Workers may be processes of any start method.

    Attributes:
        slide_ids: The slides, in the order of the items.
        labels: Label of each slide by id; empty where no column was asked for.
    """

    def __init__(self, store: Path | str, encoder: str, *, view: int = 0, label: str | None = None) -> None:
        """Open the store and check that everything is there.

        Args:
            store: Its folder.
            encoder: Key of the encoder.
            view: Which view; 0 is canonical.
            label: Column of the manifest that gives each slide's label.

        Raises:
            StoreMissingError: There is no store, no slide, or one whose features are not complete.
            UnknownNameError: The store does not know the encoder.
            ManifestError: A slide has no such label.
        """
        self._store, self._encoder, self._view, self._label = FeatureStore.open(store), encoder, view, label
        slides = self._store.complete_slides(encoder, view=view)
        self.slide_ids = tuple(slide.slide_id for slide in slides)
        self.labels = _labels({slide.slide_id: slide.labels for slide in slides}, label) if label else {}

    def __len__(self) -> int:
        return len(self.slide_ids)

    def __repr__(self) -> str:
        return f"<SlideFeatures: {len(self):,} slides of {self._encoder}, view {self._view}>"

    def __getitem__(self, index: int) -> dict[str, Any]:
        slide = self._store.slide(self.slide_ids[index])
        good = slide.patch_status == STATUS["ok"]
        item: dict[str, Any] = {
            "features": torch.from_numpy(slide.features(self._encoder, view=self._view)[good].astype(np.float32)),
            "coords": torch.from_numpy(slide.coords[good]),
            "slide_id": slide.slide_id,
        }
        return item | {"label": self.labels[slide.slide_id]} if self._label else item


def _labels(by_slide: Mapping[str, Mapping[str, str]], column: str) -> dict[str, str]:
    missing = [slide_id for slide_id, labels in by_slide.items() if column not in labels]
    if missing:
        known = sorted({name for labels in by_slide.values() for name in labels})
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ManifestError(
            f"no label {column!r} for slide {', '.join(missing[:3])}{more}; labels here: {', '.join(known) or 'none'}. "
            "Give it as a column of the manifest and run g2l cache-teacher again: it only updates the labels"
        )
    return {slide_id: labels[column] for slide_id, labels in by_slide.items()}
