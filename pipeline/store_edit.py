"""What changes a store after it was made, without weights or slides: labels after the fact, and slides taken out."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from g2l_core.api.labels import FileLabels, read_labels
from g2l_core.api.packs import FOLDER as PACKS
from g2l_core.api.selection import Selection
from g2l_core.api.user_columns import add_column
from g2l_core.errors import StoreError, UnknownNameError
from g2l_core.store import schema
from g2l_core.store.address_lock import locked_address
from g2l_core.store.features import FeatureStore
from g2l_core.store.location import Location, can_list, sizes_below
from g2l_core.store.locks import LOCKS, locked
from g2l_core.store.upload import target_of, upload

_HELD = "another g2l command writes into it"

Report = Callable[[int, int], None]
"""Is told how many slides are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What `label_store` did."""

    columns: tuple[str, ...]
    slides: int
    """Slides whose labels of the whole slide were replaced."""
    by_patch: int
    """Slides whose patches have labels of their own."""
    notes: tuple[str, ...]
    """What was left out, blank, or read otherwise than it is written."""


def label_store(path: Path, table: Path, *, missing: str, dry_run: bool, report: Report) -> Labelled:
    """Write the labels of a table into a store.

    A column of the table replaces one of the same name; where it is blank, the slide has none. A slide whose patches
    have labels of their own gets them as columns.

    Args:
        path: The store.
        table: A table of separated values with slide_id; and patch_id, or x and y, where labels are of patches.
        missing: "refuse" slides that the store does not have, or "skip" them.
        dry_run: Only read, and tell.
        report: Is told how far it is.

    Raises:
        ManifestError: The table cannot be used.
        StoreError: The store cannot be written.
    """
    store = FeatureStore.open(path)
    labels = read_labels(table, store, missing=missing)
    whole = [slide_id for slide_id, lines in labels.lines.items() if isinstance(lines, int)]
    by_patch = [slide_id for slide_id in labels.lines if slide_id not in set(whole)]
    if not dry_run:
        _label_slides(path, labels, whole, report)
        _label_patches(store, labels, by_patch)
    return Labelled(
        columns=tuple(sorted(labels.columns)), slides=len(whole), by_patch=len(by_patch), notes=labels.notes
    )


def _label_slides(path: Path, labels: FileLabels, slide_ids: Sequence[str], report: Report) -> None:
    with locked(path / LOCKS / "writer", wait_s=0, holder=_HELD):
        store = FeatureStore.open(path, writable=True)
        for done, slide_id in enumerate(slide_ids, start=1):
            slide, line = store.slide(slide_id), labels.lines[slide_id]
            told = {column: str(labels.values[column][line]) for column in labels.columns}
            now = {name: value for name, value in {**slide.labels, **told}.items() if value}
            if now != slide.labels:
                slide.set_labels(now)
            report(done, len(slide_ids))
        store.save_catalogue()


def _label_patches(store: FeatureStore, labels: FileLabels, slide_ids: Sequence[str]) -> None:
    if not slide_ids:
        return
    selection = Selection(store=store).where((), slide_ids, (), None, 0)
    for column in sorted(labels.columns):
        texts = [labels.texts(column, labels.of(part.slide)) for part in selection.parts()]
        add_column(selection, column, [str(text) for of_slide in texts for text in of_slide])


def remove_slides(path: Path, slide_ids: Sequence[str], *, dry_run: bool, report: Report) -> int:
    """Delete slides with everything that was cached of them.

    Args:
        path: The store.
        slide_ids: Their ids; one that is unknown stops the command before anything is deleted.
        dry_run: Only tell.
        report: Is told how far it is.

    Returns:
        The bytes on disk that are free now, or would be.

    Raises:
        UnknownNameError: The store has no such slide.
        StoreError: A slide cannot be deleted.
    """
    with locked(path / LOCKS / "writer", wait_s=0, holder=_HELD):
        store = FeatureStore.open(path, writable=not dry_run)
        known = {*(slide.slide_id for slide in store.slides()), *store.failed_slides(), *store.damaged}
        for slide_id in slide_ids:
            if slide_id not in known:
                raise UnknownNameError("slide", slide_id, sorted(known), "g2l store ls lists them.")
        freed = sum(sum(_bytes_by_part(path / "slides" / slide_id).values()) for slide_id in slide_ids)
        if not dry_run:
            for done, slide_id in enumerate(slide_ids, start=1):
                store.remove_slide(slide_id)
                report(done, len(slide_ids))
            store.save_catalogue()
    return freed


def upload_store(
    path: Path, address: str, show: Callable[[int, int], None], *, take_lock: bool = False
) -> tuple[int, int]:
    """Copy a store to an address, see `store.upload`.

    Args:
        path: The store.
        address: Where to.
        show: Called with the files that are there, and those that will be.
        take_lock: Whether to take over the lock of a command elsewhere.

    Returns:
        The bytes that were sent, and those that were there already.

    Raises:
        StoreError: The store cannot be read, or the address cannot be written to.
    """
    FeatureStore.open(path)  # before a lock file is made in what is no store
    sent, kept, target = 0, 0, target_of(address)
    with (
        locked(path / LOCKS / "writer", wait_s=0, holder=_HELD),
        locked_address(target, path, take=take_lock),
    ):
        for done, file in enumerate(upload(FeatureStore.open(path), address), start=1):
            sent, kept = (sent + file.size, kept) if file.is_new else (sent, kept + file.size)
            show(done, file.total)
    return sent, kept


def usage(path: Path) -> dict[str, int]:
    """The bytes on disk of each encoder's features, of packs, and of all else, by name.

    Raises:
        StoreError: There is no store, or nothing can be listed there.
    """
    total: Counter[str] = Counter()
    store = FeatureStore.open(path)
    if not can_list(store.path):
        raise StoreError(f"{store.path}: over HTTP nothing can be listed, so nobody knows what takes room there")
    for slide in store.slides():
        total += _bytes_by_part(slide.folder)
    for pack in (path / PACKS).glob("*"):
        total["packs"] += pack.stat().st_size
    return dict(total.most_common())


def _bytes_by_part(folder: Location) -> Counter[str]:
    """Bytes below one slide's folder, without those of slides whose ids lie inside it: there are none."""
    found: Counter[str] = Counter()
    for parts, size in sizes_below(folder):
        found[parts[1] if len(parts) > 2 and parts[0] == schema.FEATURES else "tables"] += size
    return found
