"""Write stored features as other tools read them: one function for each layout, in `FORMATS`.

What cannot be exported is named and never dropped in silence: slides that failed, are damaged, or lack an encoder. A
file appears under its name once it is whole. Where a layout has a file a slide, a second call of the same export passes
over the slides that are written already and have not changed.
"""

import csv
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

import numpy as np

from g2l_core.errors import (
    StoreCorruptError,
    StoreError,
    StoreMissingError,
    UnknownNameError,
    UsageError,
)
from g2l_core.files import csv_row
from g2l_core.store import schema
from g2l_core.store.features import FeatureStore, StoredSlide, require_whole
from g2l_core.store.formats import hdf5, raw2features, tables
from g2l_core.store.formats.item import POWERS, ExportCohort, ExportItem, magnification, whole_file
from g2l_core.store.formats.journal import Journal, Written, claim_export_folder
from g2l_core.store.locks import locked_output

__all__ = (
    "FORMATS", "POWERS", "SLIDES_FILE", "Exported", "Format", "Report", "chosen_slides", "count_unreadable",
    "export_features", "export_trident", "magnification", "reporting", "write_slides",
)  # fmt: skip

Report = Callable[[int, int], None]

SLIDES_FILE = "slides.csv"
"""Written beside every export: the slides and their labels, as `g2l store import --manifest` reads them."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A layout: a function of one slide, or of a whole cohort."""

    about: str
    """For people: who reads it."""
    write_slide: Callable[[ExportItem, ExportCohort, Path], Iterator[Path]] | None = None
    write_cohort: Callable[[Iterable[ExportItem], ExportCohort, Path], Iterator[Path]] | None = None
    needs_coords: bool = False
    """Whether sets of patch images, which have no coordinates, cannot be in it."""
    needs_mpp: bool = False
    """Whether the um/px of level 0 must be known."""
    needs_label: bool = False
    """Whether it asks for the column of classes."""


def _of_slides(
    about: str, write: Callable[[ExportItem, ExportCohort, Path], Iterator[Path]], *, needs_mpp: bool = False
) -> Format:
    return Format(about=about, write_slide=write, needs_coords=True, needs_mpp=needs_mpp)


FORMATS: Mapping[str, Format] = {
    "trident-h5": _of_slides("TRIDENT, Patho-Bench, TITAN", hdf5.write_trident),
    "clam": _of_slides("CLAM and most MIL code", hdf5.write_clam),
    "stamp-h5": _of_slides("STAMP", hdf5.write_stamp, needs_mpp=True),
    "atlaspatch-h5": _of_slides("AtlasPatch", hdf5.write_atlaspatch),
    "raw2features": _of_slides("raw2features", raw2features.write_raw2features),
    "eva": Format(about="eva", write_cohort=tables.write_eva),
    "croma": Format(about="croma", write_cohort=tables.write_croma, needs_label=True),
    "pathorob": Format(about="PathoROB", write_cohort=tables.write_pathorob, needs_label=True),
    "parquet": Format(about="pandas, Polars, DuckDB", write_cohort=tables.write_parquet),
    "npy": Format(about="NumPy", write_cohort=tables.write_npy),
}
"""Every layout by the name that users write."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export has done."""

    files: tuple[Path, ...]
    """Every file of it, also those that were there already."""
    slides: int
    patches: int
    left_out: Mapping[str, str]
    """Why slides, or one encoder of a slide, are not in it, by `slide` or `slide, encoder`."""
    unreadable: Mapping[str, int]
    """Patches that are not in it as they have no features, by the name of their reason code."""


@dataclass
class _Account:
    """What is counted while slides pass by."""

    slides: int = 0
    patches: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    unreadable: Counter[str] = field(default_factory=Counter)

    def add(self, patches: int, unreadable: Mapping[str, int]) -> None:
        """Count a slide that is in the export."""
        self.slides, self.patches = self.slides + 1, self.patches + patches
        self.unreadable.update(unreadable)

    def exported(self, files: Sequence[Path]) -> Exported:
        """What these files hold, and what they do not."""
        return Exported(
            files=tuple(files),
            slides=self.slides,
            patches=self.patches,
            left_out=self.left_out,
            unreadable=dict(self.unreadable),
        )


def export_features(
    store: FeatureStore,
    folder: Path,
    layout: str,
    *,
    encoders: Sequence[str] = (),
    view: int = 0,
    where: Mapping[str, str] | None = None,
    label: str = "",
    dry_run: bool = False,
    report: Report = lambda done, total: None,
) -> Exported:
    """Write a cohort's features in a layout, without the patches that have none.

    Args:
        store: The cohort.
        folder: Where to write; made where it is missing. Files of the same names are replaced.
        layout: A name of `FORMATS`.
        encoders: Their keys; empty for all.
        view: Which view; 0 is canonical.
        where: Shell-style patterns by column of the slides' labels, or for slide_id; a slide must fit all.
        label: The column of classes, for the layouts that have one.
        dry_run: Only count, by what the store records.
        report: Is told how many slides are done, and of how many.

    Raises:
        UnknownNameError: There is no such layout or encoder.
        UsageError: No slide fits the conditions, the layout asks for a label and none is named, or it needs a package
            that is not installed.
        StoreMissingError: There is nothing to export.
        StoreError: The files cannot be written.
        RunError: Another command writes into the folder, or it cannot be made.
    """
    if layout not in FORMATS:
        raise UnknownNameError("format", layout, FORMATS)
    for encoder in encoders:
        if encoder not in store.encoders:
            raise UnknownNameError("encoder", encoder, store.encoders, f"The store is {store.path}.")
    if not store.encoders:
        raise StoreMissingError(f"{store.path} has no features of any encoder yet")
    if FORMATS[layout].needs_label and not label:
        raise UsageError(f"format {layout} asks for classes: name their column with --label COLUMN")
    account = _Account()
    with nullcontext() if dry_run else locked_output(folder):
        slides, left_out = chosen_slides(store, where or {})
        account.left_out |= left_out
        cohort = _cohort(store, slides, encoders or tuple(store.encoders), view, label)
        usable = [slide for slide in slides if not _is_refused(slide, FORMATS[layout], layout, account)]
        if dry_run:
            _plan(reporting(usable, report), cohort, account)
            return account.exported([])
        claim_export_folder(folder)
        files = _write(reporting(usable, report), cohort, FORMATS[layout], layout, folder, account)
        if files:
            write_slides(folder / SLIDES_FILE, usable)
    return account.exported(files)


def reporting(slides: Sequence[StoredSlide], report: Report) -> Iterator[StoredSlide]:
    """The slides; each is reported as done when the next one is asked for."""
    for done, slide in enumerate(slides, start=1):
        yield slide
        report(done, len(slides))


def _plan(slides: Iterable[StoredSlide], cohort: ExportCohort, account: _Account) -> None:
    """Count what would be written. Of features only the records are looked at."""
    for slide in slides:
        lacking = dict[str, str]()
        for encoder in cohort.encoders:
            try:
                require_whole(slide, encoder, view=cohort.view)
            except StoreMissingError as error:
                lacking[f"{slide.slide_id}, {encoder}"] = str(error)
        account.left_out |= lacking
        if len(lacking) < len(cohort.encoders):
            status = slide.patch_status
            account.add(int((status == schema.STATUS["ok"]).sum()), count_unreadable(status))


def export_trident(store: FeatureStore, encoder: str, folder: Path, *, view: int = 0) -> list[Path]:
    """Write a cohort's features as TRIDENT's files, all slides or none; see `formats.hdf5.write_trident`.

    Args:
        store: All of its slides are written.
        encoder: Key of the encoder.
        folder: TRIDENT's job folder; made where it is missing.
        view: Which view; 0 is canonical.

    Returns:
        The feature files.

    Raises:
        UnknownNameError: The store does not know the encoder.
        StoreMissingError: A slide's features are not complete.
        StoreCorruptError: A slide is damaged.
        StoreError: The store holds sets of patch images, which have no coordinates, or the files cannot be written.
        RunError: Another command writes into the folder, or it cannot be made.
    """
    for slide in store.complete_slides(encoder, view=view):
        if slide.facts.kind != "slide":
            raise StoreError(f"{slide.slide_id} is a set of patch images: TRIDENT's files need coordinates on a slide")
    done = export_features(store, folder, "trident-h5", encoders=[encoder], view=view)
    damaged = {slide: reason for slide, reason in done.left_out.items() if slide not in store.failed_slides()}
    if damaged:
        raise StoreCorruptError(next(iter(damaged.values())))
    return [path for path in done.files if path.parts[len(folder.parts) + 1] == f"features_{encoder}"]


# -- which slides -----------------------------------------------------------------------------------------


def chosen_slides(store: FeatureStore, where: Mapping[str, str]) -> tuple[list[StoredSlide], dict[str, str]]:
    """The slides with patches that fit the conditions, and why others that may fit them are left out.

    Args:
        store: The cohort.
        where: Shell-style patterns by column of the slides' labels, or for slide_id; a slide must fit all.

    Raises:
        UsageError: No slide fits.
        StoreMissingError: There is none.
    """

    def fits(slide_id: str, labels: Mapping[str, str]) -> bool:
        values = {**labels, "slide_id": slide_id}
        return all(fnmatchcase(values.get(column, ""), pattern) for column, pattern in where.items())

    slides = [slide for slide in store.slides() if fits(slide.slide_id, slide.labels)]
    labels = store.failed_labels()
    lost = {slide_id: f"it failed in stage one: {reason}" for slide_id, reason in store.failed_slides().items()}
    lost |= {slide_id: f"it is damaged: {damage}" for slide_id, damage in store.damaged.items()}
    left_out = {i: why for i, why in lost.items() if not labels.get(i) or fits(i, labels[i])}
    if not slides and not left_out:
        if not where:
            raise StoreMissingError(f"{store.path} has no slide with patches")
        known = sorted({"slide_id", *(column for slide in store.slides() for column in slide.labels)})
        asked = " and ".join(f"{column}={pattern}" for column, pattern in where.items())
        raise UsageError(f"no slide of {store.path} fits {asked}; its columns are {', '.join(known)}")
    return slides, left_out


def _is_refused(slide: StoredSlide, form: Format, layout: str, account: _Account) -> bool:
    """Whether a slide cannot be in a layout at all; says why."""
    if form.needs_coords and slide.facts.kind != "slide":
        account.left_out[slide.slide_id] = f"it is a set of patch images: {layout} needs coordinates on a slide"
    elif form.needs_mpp and not slide.facts.mpp:
        account.left_out[slide.slide_id] = f"its um/px is not known, and the coordinates of {layout} are micrometers"
    return slide.slide_id in account.left_out


def _cohort(
    store: FeatureStore, slides: Sequence[StoredSlide], encoders: Sequence[str], view: int, label: str
) -> ExportCohort:
    own = {column for slide in slides for column in _own_columns(slide)}
    columns = sorted({column for slide in slides for column in slide.labels} | own)
    if label and label not in columns:
        raise UsageError(f"--label {label}: no slide has that column; there is {', '.join(columns) or 'none'}")
    return ExportCohort(
        encoders={key: store.encoders[key] for key in encoders},
        patch_px=store.grid["patch_px"],
        mpp=store.grid["mpp"],
        crop_px=store.views["crop_px"],
        view=view,
        label=label,
        columns=tuple(columns),
    )


def _own_columns(slide: StoredSlide) -> set[str]:
    """The columns in which single patch images have values of their own."""
    with suppress(StoreCorruptError):  # which is said when the slide is read
        return {column for labels in slide.patch_labels for column in labels} if slide.has_patch_labels else set()
    return set()


# -- their features ---------------------------------------------------------------------------------------


def _item(slide: StoredSlide, cohort: ExportCohort, account: _Account) -> ExportItem | None:
    """What is exported of a slide; None where nothing is. Whatever is left out is counted."""
    features: dict[str, np.ndarray] = {}
    try:
        status = slide.patch_status
        good = status == schema.STATUS["ok"]
        coords, ids, labels = slide.coords[good], slide.patch_ids, slide.patch_labels
    except StoreCorruptError as error:
        account.left_out[slide.slide_id] = f"it is damaged: {error}"
        return None
    for encoder in cohort.encoders:
        try:
            features[encoder] = slide.features(encoder, view=cohort.view)[good]
        except UnknownNameError:
            account.left_out[f"{slide.slide_id}, {encoder}"] = "it has no features of this encoder yet"
        except (StoreMissingError, StoreCorruptError) as error:
            account.left_out[f"{slide.slide_id}, {encoder}"] = str(error)
    if not features:
        return None
    account.add(len(coords), count_unreadable(status))
    return ExportItem(
        slide_id=slide.slide_id,
        facts=slide.facts,
        coords=coords,
        patch_ids=None if ids is None else [ids[row] for row in np.flatnonzero(good)],
        patch_labels=[labels[row] for row in np.flatnonzero(good)],
        features=features,
    )


def _write(
    slides: Iterable[StoredSlide], cohort: ExportCohort, form: Format, layout: str, folder: Path, account: _Account
) -> list[Path]:
    if form.write_cohort:
        items = (item for slide in slides if (item := _item(slide, cohort, account)) is not None)
        first = next(items, None)  # a cohort without a slide would be files without rows
        return [] if first is None else list(form.write_cohort(chain([first], items), cohort, folder))
    assert form.write_slide
    files: list[Path] = []
    journal = Journal(folder, f"{layout} {cohort}")
    for slide in slides:
        facts = slide.facts.to_json()
        if known := journal.entry(facts):
            account.add(known.patches, known.unreadable)
            files += known.files
        elif (item := _item(slide, cohort, account)) is not None:
            written = tuple(form.write_slide(item, cohort, folder))
            if len(item.features) == len(cohort.encoders):
                unreadable = count_unreadable(slide.patch_status)
                journal.note(facts, Written(files=written, patches=len(item), unreadable=unreadable))
            files += written
    return files


def count_unreadable(status: np.ndarray) -> dict[str, int]:
    """How many patches have no features, by the name of their reason code."""
    return {name: n for name, code in schema.STATUS.items() if code and (n := int((status == code).sum()))}


def write_slides(path: Path, slides: Collection[StoredSlide]) -> None:
    """The slides and their labels as a CSV file."""
    columns = sorted({column for slide in slides for column in slide.labels})
    with whole_file(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["slide_id", *columns])
        for slide in slides:
            writer.writerow(csv_row([slide.slide_id, *(slide.labels.get(column, "") for column in columns)]))
