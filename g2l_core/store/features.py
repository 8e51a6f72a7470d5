"""Open a store, add encoders and slides to it, and find them again."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from g2l_core.errors import (
    StoreCorruptError,
    StoreError,
    StoreMismatchError,
    StoreMissingError,
    StoreUnreadError,
    UnknownNameError,
    refuse_address,
)
from g2l_core.files import sync_folder, sync_tree
from g2l_core.store import catalogue, format1, schema
from g2l_core.store.boundary import writing
from g2l_core.store.catalogue import Entry
from g2l_core.store.documents import GROUP_FILE, read_group, write_group
from g2l_core.store.facts import FAILED, EncoderFacts, ExtractionRunFacts, SlideFacts, StoreFacts
from g2l_core.store.ids import folders_of, refusals, why_impossible
from g2l_core.store.location import Location, folder_of, locate
from g2l_core.store.provenance import differences, software, utc_now
from g2l_core.store.slide import StoredSlide
from g2l_core.store.tables import Shard, block_checksums
from g2l_core.store.zarr_files import create_array
from g2l_core.types import Coords, ViewParams

__all__ = ("FeatureStore", "Shard", "StoredSlide")

KEPT_RUNS = 20
"""Calls of stage one that the store remembers."""


class FeatureStore:
    """A store of cached features. Open it with `FeatureStore.open` or `FeatureStore.create`.

    Attributes:
        path: Where it is: a folder, or an address that is read.
        facts: What it keeps about itself.
    """

    def __init__(self, path: Location, facts: StoreFacts, *, writable: bool) -> None:
        self.path, self.facts = path, facts
        self._writable = writable
        self._entries, self._was_scanned = catalogue.load(path), False

    def __repr__(self) -> str:
        return f"<FeatureStore {self.path}: {len(self.entries):,} slides, {', '.join(self.encoders) or 'no encoders'}>"

    @classmethod
    def open(cls, path: Location | str, *, writable: bool = False) -> "FeatureStore":
        """Open an existing store.

        Args:
            path: A folder; or an address of s3://, gs://, https:// or http://, which is listed once, so what is added
                later is seen by those who open it later.
            writable: Whether it will be written to; only a folder can be.

        Raises:
            StoreMissingError: There is none.
            StoreError: The folder is something else, of a newer format, or cannot be read; or the address cannot.
            UsageError: It is an address, and the package that reads it is not installed.
        """
        path = folder_of(locate(path)) if writable else locate(path)
        try:
            stored = read_group(path, checked=False)
        except FileNotFoundError as error:
            made = "g2l cache-teacher makes" if isinstance(path, Path) else "g2l store upload puts"
            raise StoreMissingError(f"there is no store at {path}; {made} one there") from error
        if stored is None:
            raise StoreError(f"{path} is a Zarr group but no G2L store: its attributes have no {schema.ATTRIBUTE!r}")
        store_format = stored.get("format")
        if not isinstance(store_format, int):
            raise StoreCorruptError(f"{path / GROUP_FILE} is damaged: its format is {store_format!r}, no number")
        if store_format > schema.FORMAT:
            raise StoreError(
                f"{path} has store format {store_format}; this version reads up to {schema.FORMAT}. Update G2L"
            )
        if store_format == format1.FORMAT and not isinstance(path, Path):
            raise StoreError(f"{path} has store format 1, which is read from folders only: run g2l store upgrade there")
        if store_format > format1.FORMAT:
            stored = read_group(path, checked=True)
        return cls(path, _store_facts(path, stored or {}), writable=writable)

    @classmethod
    def create(cls, path: Path | str, *, grid: Mapping[str, object], views: Mapping[str, object]) -> "FeatureStore":
        """Open the store at `path` for writing, making it if there is none.

        Args:
            path: Its folder.
            grid: The grid spec as plain values; with `views` the identity of the store.
            views: The view spec as plain values.

        Raises:
            StoreMismatchError: The store there was made with another grid or other views.
            StoreError: The folder holds something else, or a store of format 1.
        """
        refuse_address(path)
        path = Path(path)
        if (path / GROUP_FILE).exists():
            store = cls.open(path, writable=True)
            format1.refuse_writing(store.facts.format, path)
            if any(entry.facts is None or entry.facts.status != FAILED for entry in store.entries.values()):
                store.require_identity(grid=grid, views=views)
            else:  # there are no patches yet, so nothing is lost by other settings
                store._set_facts(grid=dict(grid), views=dict(views), patch_status=dict(schema.STATUS))
            return store
        if path.is_file() or (path.is_dir() and any(not _is_side_file(p) for p in path.iterdir())):
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
            path.mkdir(parents=True, exist_ok=True)
            write_group(path, facts.to_json())
        except OSError as error:
            raise StoreError(f"cannot create a store at {path}: {error.strerror or error}") from error
        return cls(path, facts, writable=True)

    def _set_facts(self, **changes: Any) -> None:
        """Replace some facts, in the store first."""
        facts = replace(self.facts, **changes)
        with writing(str(self.path)):
            write_group(self.path, facts.to_json())
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
                f"use another --store, or the settings that {self.path} was made with: {'; '.join(changed)}"
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
                f"use another --store: {self.path} holds features of another encoder under {key!r} ({fields})"
            )

    def set_proof(self, key: str, proof: str, notes: Sequence[str]) -> None:
        """Replace what is said of how an imported encoder's features compare with what it gives."""
        facts = replace(self.encoders[key], proof=proof, weights_notes=tuple(notes))
        self._set_facts(encoders={**self.encoders, key: facts})

    def add_run(self, run: ExtractionRunFacts) -> None:
        """Keep what a call of stage one did and how long its parts took; the last `KEPT_RUNS` are kept."""
        self._set_facts(runs=(*self.facts.runs, run)[-KEPT_RUNS:])

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What the file system has now of every slide, or an address had when it was listed, by id, sorted."""
        if isinstance(self.path, Path) or not self._was_scanned:
            self._entries = catalogue.scan(self.path, self.facts.format, self._entries)
            self._was_scanned = True
        return self._entries

    def slide_ids(self) -> list[str]:
        """The ids of all slides that stage one has met, sorted, failed and damaged ones included."""
        return list(self.entries)

    def slides(self) -> Iterator[StoredSlide]:
        """The slides that have patches, sorted by id; those in `damaged` are left out."""
        stored = (self._stored(slide_id, e.facts) for slide_id, e in self.entries.items() if e.facts is not None)
        return (slide for slide in stored if slide.has_patches)

    @property
    def damaged(self) -> dict[str, str]:
        """What is wrong with the document of each slide whose own cannot be used, by id. It names the file."""
        return {slide_id: entry.damage for slide_id, entry in self.entries.items() if entry.damage}

    def complete_slides(self, encoder: str, *, view: int) -> list[StoredSlide]:
        """The slides that have patches, sorted by id. All of them must hold one view of an encoder whole.

        Raises:
            UnknownNameError: The store does not know the encoder.
            StoreMissingError: There is no slide, or a slide's features are not complete.
            StoreCorruptError: A slide is damaged.
        """
        if encoder not in self.encoders:
            raise UnknownNameError("encoder", encoder, self.encoders, f"The store is {self.path}.")
        self.require_undamaged()
        slides = list(self.slides())
        if not slides:
            raise StoreMissingError(f"{self.path} has no slide with patches")
        for slide in slides:
            require_whole(slide, encoder, view=view)
        return slides

    def require_undamaged(self) -> None:
        """Refuse a store of which some slides cannot be used, for work that must not leave any out.

        Raises:
            StoreCorruptError: Some are damaged; names the first.
        """
        damaged = self.damaged
        if damaged:
            slide_id, damage = next(iter(damaged.items()))
            more = f" ({len(damaged) - 1} more slides are damaged)" if len(damaged) > 1 else ""
            raise StoreCorruptError(f"slide {slide_id}: {damage}{more}")

    def slide(self, slide_id: str) -> StoredSlide:
        """One slide.

        Raises:
            UnknownNameError: It is not in the store.
            StoreCorruptError: Its document is damaged.
        """
        entry = self._entry(slide_id)
        if entry is None:
            raise UnknownNameError("slide", slide_id, self.slide_ids(), f"The store is {self.path}.")
        if entry.facts is None:
            raise StoreCorruptError(f"slide {slide_id}: {entry.damage}")
        return self._stored(slide_id, entry.facts)

    def failed_slides(self) -> dict[str, str]:
        """Reason by id of every slide that could not be used."""
        facts = {slide_id: entry.facts for slide_id, entry in self.entries.items() if entry.facts is not None}
        return {slide_id: known.reason for slide_id, known in facts.items() if known.status == FAILED}

    def failed_labels(self) -> dict[str, Mapping[str, str]]:
        """What the manifest says of every slide that could not be used, by id."""
        facts = {slide_id: entry.facts for slide_id, entry in self.entries.items() if entry.facts is not None}
        return {slide_id: known.labels for slide_id, known in facts.items() if known.status == FAILED}

    def good_by_block(self, slide: StoredSlide) -> UInt8[np.ndarray, " block"]:
        """How many good patches each block of `REPLAY_ROWS` stored rows has: from the catalogue, or counted now.

        Raises:
            StoreCorruptError: The slide's reason codes are not what was written.
        """
        entry = self._entries.get(slide.slide_id)
        if entry is not None and entry.good is not None and entry.facts == slide.facts:
            return entry.good
        counts = catalogue.count_good(slide.patch_status)
        if entry is not None and entry.facts == slide.facts:
            self._entries[slide.slide_id] = replace(entry, good=counts)
        return counts

    def save_catalogue(self) -> None:
        """Write the index of the slides, so that the store opens quickly next time. Failing to is no error."""
        if self.facts.format == format1.FORMAT or not self._writable:
            return
        for slide in self.slides():
            try:
                self.good_by_block(slide)
            except (StoreCorruptError, StoreUnreadError):
                continue  # verify names it
        try:
            catalogue.save(folder_of(self.path), self._entries)
        except OSError:
            return

    def _entry(self, slide_id: str) -> Entry | None:
        """One slide as it stands now."""
        if why_impossible(slide_id):
            return None
        entry = catalogue.entry(self.path, slide_id, self.facts.format, self._entries.get(slide_id))
        if entry is not None:
            self._entries[slide_id] = entry
        return entry

    def _folder(self, slide_id: str) -> Path:
        return folder_of(self.path) / "slides" / slide_id

    def _stored(self, slide_id: str, facts: SlideFacts) -> StoredSlide:
        return StoredSlide(
            slide_id,
            facts,
            self.path / "slides" / slide_id,
            store_format=self.facts.format,
            writable=self._writable,
        )

    def refusals(self, slide_ids: Iterable[str]) -> dict[str, str]:
        """Why the store cannot take new slides of these ids, by id. See `ids.refusals`."""
        return refusals(slide_ids, self.entries.keys())

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
        """Write a slide's patches: in a folder aside, which then takes its place in one step.

        Args:
            slide_id: Its id.
            facts: Its source, scale and labels.
            coords: Corners, in stored order.
            view_params: Parameters of the views known now.
            columns: Names of the parameters.
            patch_ids: File names of patch images, None for a slide.

        Raises:
            StoreError: The disk is full or cannot be written to, the id is impossible, or a slide with patches
                stands there.
        """
        n, n_views = view_params.shape[:2]
        arrays: dict[str, np.ndarray] = {
            "coords": coords,
            "patch_status": np.zeros(n, np.uint8),
            "view_params": view_params,
            "pixel_hash": np.zeros((n, n_views), np.uint64),
        }
        if patch_ids is not None:
            arrays[schema.PATCH_ID] = np.array(patch_ids, dtype=object)
        written = {name: arrays[name] for name in ("coords", "view_params", schema.PATCH_ID) if name in arrays}
        tables = {name: block_checksums(values, name == "view_params") for name, values in written.items()}
        facts = replace(facts, slide_id=slide_id, n_patches=n, n_views=n_views, tables=tables)
        with writing(f"slide {slide_id}"), self._replacing(slide_id) as folder:
            for name, values in arrays.items():
                attributes = {"columns": list(columns)} if name == "view_params" else {}
                is_text = name == schema.PATCH_ID
                layout = schema.text_layout(n) if is_text else schema.table_layout(name, values.shape)
                create_array(folder / name, layout, is_durable=False, **attributes)[:] = values
            write_group(folder, facts.to_json())
        return self.slide(slide_id)

    def fail_slide(self, slide_id: str, source: str, reason: str, labels: Mapping[str, str] | None = None) -> None:
        """Record that a slide could not be used, and why; never over one that has patches, or is damaged.

        Args:
            slide_id: Its id.
            source: Its file or folder.
            reason: Why, in words.
            labels: What the manifest says of it, so that a benchmark can tell what it lacks.

        Raises:
            StoreError: The disk is full or cannot be written to, or the id is impossible.
        """
        entry = self._entry(slide_id)
        if entry is not None and (entry.facts is None or entry.facts.status != FAILED):
            return
        facts = SlideFacts(slide_id=slide_id, source=source, status=FAILED, reason=reason, labels=dict(labels or {}))
        with writing(f"slide {slide_id}"), self._replacing(slide_id) as folder:
            write_group(folder, facts.to_json())

    @contextmanager
    def _replacing(self, slide_id: str) -> Iterator[Path]:
        """A folder aside that becomes the slide's when the block ends. Only a failed slide is ever replaced."""
        around = {folder for folder in folders_of(slide_id) if self._entry(folder) is not None}
        for refused in refusals([slide_id], around).values():
            raise StoreError(f"slide {slide_id!r}: {refused}")
        target, aside = self._folder(slide_id), folder_of(self.path) / "slides" / f"{os.getpid()}{schema.LEFTOVER}"
        entry = self._entry(slide_id)
        if entry is not None and (entry.facts is None or entry.facts.status != FAILED):
            raise StoreError(f"slide {slide_id!r} is in the store already")
        shutil.rmtree(aside, ignore_errors=True)
        self._make_groups(target.parent)
        aside.mkdir()
        yield aside
        sync_tree(aside)
        if entry is not None:
            (target / GROUP_FILE).unlink()
        # A folder that is not empty is never replaced: the system refuses it, whatever was thought to be there.
        aside.rename(target)
        sync_folder(target.parent)
        self._entry(slide_id)

    def _make_groups(self, folder: Path) -> None:
        """Make the groups down to a folder of slides."""
        groups = [folder, *folder.parents][: len(folder.relative_to(folder_of(self.path)).parts)]
        for group in reversed(groups):
            if not (group / GROUP_FILE).exists():
                write_group(group)

    def remove_slide(self, slide_id: str) -> None:
        """Delete a slide with everything that was cached of it, so that stage one meets it as a new one.

        Raises:
            StoreError: It cannot be deleted.
        """
        format1.refuse_writing(self.facts.format, self.path)
        aside = folder_of(self.path) / "slides" / f"{os.getpid()}-removed{schema.LEFTOVER}"
        with writing(f"slide {slide_id}"):
            self._folder(slide_id).rename(aside)
            shutil.rmtree(aside)
        self._entries.pop(slide_id, None)

    def withdraw_slide(self, slide_id: str, reason: str) -> None:
        """Delete what was cached of a slide whose document is whole, and keep it with its labels as one that failed.

        So nobody takes the store for complete, and stage one tries the slide again.

        Args:
            slide_id: Its id.
            reason: Why, in words.

        Raises:
            StoreError: It cannot be deleted or written.
        """
        known = self.slide(slide_id).facts
        self.remove_slide(slide_id)
        self.fail_slide(slide_id, known.source, reason, known.labels)

    def restore_document(self, slide_id: str) -> bool:
        """Put a slide's document back from the catalogue, if that has one; whether it had.

        Raises:
            StoreError: It cannot be written.
        """
        known = catalogue.load(self.path).get(slide_id)
        if known is None or known.facts is None:
            return False
        with writing(f"slide {slide_id}"):
            write_group(self._folder(slide_id), known.facts.to_json())
        return True

    def sweep(self) -> None:
        """Delete the temporary files of killed writers. Only for the one who holds the store's lock."""
        for path in leftovers(self.path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def require_whole(slide: StoredSlide, encoder: str, *, view: int) -> None:
    """Refuse a slide that does not hold one view of an encoder whole.

    Raises:
        StoreMissingError: Names the slide.
    """
    if encoder not in slide.facts.features:
        raise StoreMissingError(
            f"slide {slide.slide_id} has no features of {encoder} yet. Run the command that caches it again"
        )
    slide.require_complete(encoder, view)


def leftovers(store: Location) -> list[Path]:
    """The temporary files and folders of killed writers, sorted. Those of a writer at work are among them.

    At an address there are none: an object is written in one step.
    """
    if not isinstance(store, Path):
        return []
    found = sorted(store.rglob(f"*{schema.LEFTOVER}"))
    return [path for path in found if not any(parent.name.endswith(schema.LEFTOVER) for parent in path.parents)]


def _is_side_file(path: Path) -> bool:
    """Whether a file is none of the store's content: a lock, an index, or left behind by a killed writer."""
    return path.name.startswith(".") or path.suffix == schema.LEFTOVER


def _store_facts(path: Location, stored: Mapping[str, Any]) -> StoreFacts:
    try:
        return StoreFacts.from_json(stored)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise StoreCorruptError(f"{path / GROUP_FILE} is damaged: {error!r}. Restore it from a copy") from error
