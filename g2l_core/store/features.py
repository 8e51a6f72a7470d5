"""Open a store, add encoders and slides to it, and find them again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from g2l_core.errors import StoreCorruptError, StoreError, StoreMismatchError, StoreMissingError, UnknownNameError
from g2l_core.store import schema
from g2l_core.store.facts import FAILED, EncoderFacts, ExtractionRunFacts, SlideFacts, StoreFacts
from g2l_core.store.provenance import differences, software, utc_now
from g2l_core.store.slide import Shard, StoredSlide, members, writing
from g2l_core.types import Coords, ViewParams

__all__ = ("FeatureStore", "Shard", "StoredSlide")

KEPT_RUNS = 20
"""Calls of stage one that the store remembers."""

READ_MODE, WRITE_MODE = "r", "r+"


class FeatureStore:
    """A store of cached features. Open it with `FeatureStore.open` or `FeatureStore.create`.

    Attributes:
        path: Its folder.
        facts: What it keeps about itself.
    """

    def __init__(self, path: Path, root: zarr.Group) -> None:
        self.path = path
        self.facts = StoreFacts.from_json(root.attrs[schema.ATTRIBUTE])
        self._root = root

    @classmethod
    def open(cls, path: Path | str, *, writable: bool = False) -> "FeatureStore":
        """Open an existing store.

        Raises:
            StoreMissingError: There is none.
            StoreError: The folder is something else, of a newer format, or cannot be read.
        """
        path = Path(path)
        try:
            root = zarr.open_group(path, mode=WRITE_MODE if writable else READ_MODE, zarr_format=3)
        except FileNotFoundError as error:
            raise StoreMissingError(f"there is no store at {path}; g2l cache-teacher makes one") from error
        except OSError as error:
            raise StoreError(f"cannot read the store {path}: {error.strerror or error}") from error
        except json.JSONDecodeError as error:
            raise StoreCorruptError(f"{path / 'zarr.json'} is damaged ({error}); restore it from a copy") from error
        if schema.ATTRIBUTE not in root.attrs:
            raise StoreError(f"{path} is a Zarr group but no G2L store: its attributes have no {schema.ATTRIBUTE!r}")
        store_format = root.attrs[schema.ATTRIBUTE]["format"]
        if store_format > schema.FORMAT:
            raise StoreError(
                f"{path} has store format {store_format}; this version reads up to {schema.FORMAT}. Update G2L"
            )
        return cls(path, root)

    @classmethod
    def create(cls, path: Path | str, *, grid: Mapping[str, object], views: Mapping[str, object]) -> "FeatureStore":
        """Open the store at `path` for writing, making it if there is none.

        Args:
            path: Its folder.
            grid: The grid spec as plain values; with `views` the identity of the store.
            views: The view spec as plain values.

        Raises:
            StoreMismatchError: The store there was made with another grid or other views.
            StoreError: The folder holds something else.
        """
        path = Path(path)
        if (path / "zarr.json").exists():
            store = cls.open(path, writable=True)
            if any(store.slides()):
                store.require_identity(grid=grid, views=views)
            else:  # there are no patches yet, so nothing is lost by other settings
                store._set_facts(grid=dict(grid), views=dict(views), patch_status=dict(schema.STATUS))
            return store
        if path.is_file() or (path.is_dir() and any(p.suffix != schema.LEFTOVER for p in path.iterdir())):
            raise StoreError(f"{path} exists and is no store; give --store another folder")
        facts = StoreFacts(
            format=schema.FORMAT,
            grid=dict(grid),
            views=dict(views),
            patch_status=dict(schema.STATUS),
            created=utc_now(),
            software=software(),
        )
        try:
            root = zarr.create_group(path, zarr_format=3, attributes={schema.ATTRIBUTE: facts.to_json()})
        except OSError as error:
            raise StoreError(f"cannot create a store at {path}: {error.strerror or error}") from error
        return cls(path, root)

    def _set_facts(self, **changes: Any) -> None:
        """Replace some facts, in the store first."""
        facts = replace(self.facts, **changes)
        with writing(str(self.path)):
            self._root.attrs[schema.ATTRIBUTE] = facts.to_json()
        self.facts = facts

    def require_identity(self, *, grid: Mapping[str, object], views: Mapping[str, object]) -> None:
        """Refuse other settings than those that the store was made with.

        Raises:
            StoreMismatchError: They differ. The message names each field.
        """
        stored, asked = {"grid": self.grid, "views": self.views}, {"grid": grid, "views": views}
        changed = [f"{name} is {there!r} there, {now!r} asked" for name, there, now in differences(stored, asked)]
        if changed:
            raise StoreMismatchError(
                f"{self.path} was made with other settings: {'; '.join(changed)}. Use its settings, or another --store"
            )

    @property
    def grid(self) -> dict[str, Any]:
        """The grid spec as plain values, for `GridSpec.from_json`."""
        return dict(self.facts.grid)

    @property
    def views(self) -> dict[str, Any]:
        """The view spec as plain values, for `ViewSpec.from_json`."""
        return dict(self.facts.views)

    @property
    def encoders(self) -> Mapping[str, EncoderFacts]:
        """Every encoder that has features here, by key."""
        return self.facts.encoders

    def add_encoder(self, key: str, encoder: EncoderFacts) -> None:
        """Add an encoder; nothing happens if the same one is there.

        Raises:
            StoreMismatchError: Another encoder has that key.
        """
        known = self.encoders.get(key)
        if known is None:
            self._set_facts(encoders={**self.encoders, key: encoder})
        elif known.digest != encoder.digest:
            changed = differences(known.to_json(), encoder.to_json())
            fields = ", ".join(f"{name}: {there!r} there, {now!r} now" for name, there, now in changed)
            raise StoreMismatchError(
                f"{self.path} holds features of another encoder under {key!r} ({fields}). Use another --store"
            )

    def add_run(self, run: ExtractionRunFacts) -> None:
        """Keep what a call of stage one did and how long its parts took; the last `KEPT_RUNS` are kept."""
        self._set_facts(runs=(*self.facts.runs, run)[-KEPT_RUNS:])

    def slide_ids(self) -> list[str]:
        """The ids of all slides that stage one has met, sorted, failed ones included."""
        if "slides" not in self._root:
            return []
        return sorted(_slide_ids(self._root["slides"], self.path / "slides", ""))

    def slides(self) -> Iterator[StoredSlide]:
        """The slides that have patches, sorted by id."""
        return (s for s in map(self._stored, self.slide_ids()) if s.has_patches)

    def complete_slides(self, encoder: str, *, view: int) -> list[StoredSlide]:
        """The slides that have patches, sorted by id. All of them must hold one view of an encoder whole.

        Raises:
            UnknownNameError: The store does not know the encoder.
            StoreMissingError: There is no slide, or a slide's features are not complete.
        """
        if encoder not in self.encoders:
            raise UnknownNameError("encoder", encoder, self.encoders, f"The store is {self.path}.")
        slides = list(self.slides())
        if not slides:
            raise StoreMissingError(f"{self.path} has no slide with patches")
        for slide in slides:
            if encoder not in slide.encoder_keys:
                raise StoreMissingError(
                    f"slide {slide.slide_id} has no features of {encoder} yet. Run the command that caches it again"
                )
            slide.require_complete(encoder, view)
        return slides

    def slide(self, slide_id: str) -> StoredSlide:
        """One slide.

        Raises:
            UnknownNameError: It is not in the store.
        """
        if not self._has_met(slide_id):
            raise UnknownNameError("slide", slide_id, self.slide_ids(), f"The store is {self.path}.")
        return self._stored(slide_id)

    def failed_slides(self) -> dict[str, str]:
        """Reason by id of every slide that could not be used."""
        slides = map(self._stored, self.slide_ids())
        return {s.slide_id: s.facts.reason for s in slides if not s.has_patches}

    def _has_met(self, slide_id: str) -> bool:
        """Whether a group is a slide whose facts are written, and neither a folder of slides nor left by a kill."""
        path = f"slides/{slide_id}"
        return path in self._root and schema.ATTRIBUTE in self._root[path].attrs

    def _stored(self, slide_id: str) -> StoredSlide:
        return StoredSlide(slide_id, self._root[f"slides/{slide_id}"], self.path / "slides" / slide_id)

    def add_slide(
        self,
        slide_id: str,
        facts: SlideFacts,
        *,
        coords: Coords,
        view_params: ViewParams,
        columns: Sequence[str],
        patch_ids: Sequence[str] | None,
    ) -> StoredSlide:
        """Write a slide's patches. Until this returns, the slide counts as never met.

        Args:
            slide_id: Its id.
            facts: Its source, scale and labels.
            coords: Corners, in stored order.
            view_params: Parameters of the views known now.
            columns: Names of the parameters.
            patch_ids: File names of patch images, None for a slide.

        Raises:
            StoreError: The disk is full, or cannot be written to.
        """
        n, n_views = view_params.shape[:2]
        with writing(f"slide {slide_id}"):
            group = self._fresh_group(slide_id)
            schema.create_coords(group, n)[:] = coords
            schema.create_patch_status(group, n)
            schema.create_view_params(group, n, n_views, list(columns))[:] = view_params
            schema.create_pixel_hash(group, n, n_views)
            if patch_ids is not None:
                schema.create_patch_id(group, n)[:] = np.array(patch_ids, dtype=object)
            group.attrs[schema.ATTRIBUTE] = replace(facts, n_patches=n, n_views=n_views).to_json()
        return self._stored(slide_id)

    def fail_slide(self, slide_id: str, source: str, reason: str) -> None:
        """Record that a slide could not be used, and why; never over one that has patches."""
        if self._has_met(slide_id) and self._stored(slide_id).has_patches:
            return
        with writing(f"slide {slide_id}"):
            group = self._fresh_group(slide_id)
            group.attrs[schema.ATTRIBUTE] = SlideFacts(source=source, status=FAILED, reason=reason).to_json()

    def _fresh_group(self, slide_id: str) -> zarr.Group:
        return self._root.create_group(f"slides/{slide_id}", overwrite=True)


def _slide_ids(group: zarr.Group, folder: Path, prefix: str) -> Iterator[str]:
    for name in members(folder):
        member = group[name]
        if schema.ATTRIBUTE in member.attrs:
            yield prefix + name
        elif isinstance(member, zarr.Group):
            yield from _slide_ids(member, folder / name, f"{prefix}{name}/")
