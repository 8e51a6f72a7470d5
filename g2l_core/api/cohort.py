"""A store in the hands of a notebook: its patches, labels and features, whole or in part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g2l_core.api.labels import read_labels
from g2l_core.api.selection import Part, Selection
from g2l_core.errors import UsageError
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.location import Location, folder_of
from g2l_core.types import Features

if TYPE_CHECKING:
    import anndata
    import dask.array
    import pandas
    import spatialdata
    import xarray

    import g2l_core.api.bags
    import g2l_core.api.batches
    import g2l_core.api.row_blocks
    import g2l_core.patches.relocate


@dataclass(frozen=True, repr=False)
class Cohort:
    """The patches of a store, or some of them, with their labels. `open_cohort`, that is `g2l.open`, makes one.

    It never changes: `where` and `with_labels` give another one, and nothing is read before it is needed. All arrays
    have their rows in the order of `patches`: slides sorted by id, each in its stored order.

    `encoder` is always what the command line takes: the name of an encoder (`efficientnet-lite0@64`), its key in the
    store, or a run folder. `view` 0 is the canonical view, the others are augmented.
    """

    _selection: Selection

    # -- what there is ----------------------------------------------------------------------------------------

    @property
    def path(self) -> Location:
        """The store's folder or address."""
        return self._selection.store.path

    @property
    def encoders(self) -> Mapping[str, EncoderFacts]:
        """What the store says of each of its encoders, by key."""
        return dict(self._selection.store.encoders)

    @property
    def slide_ids(self) -> list[str]:
        """The slides that take part, sorted."""
        return [part.slide_id for part in self._selection.parts()]

    @property
    def columns(self) -> list[str]:
        """The labels that some slide or patch has, sorted: what `where`, `bags` and `blocks` can name."""
        return sorted(self._selection.column_names())

    @property
    def failed(self) -> Mapping[str, str]:
        """Why slides of the store could not be used, by id. They have no patches and take no part."""
        return self._selection.store.failed_slides()

    @property
    def notes(self) -> tuple[str, ...]:
        """What label files left blank, or what was read of them otherwise than it is written, one sentence each."""
        return tuple(note for labels in reversed(self._selection.labels) for note in labels.notes)

    def __repr__(self) -> str:
        parts = self._selection.parts()
        counts = f"{len(parts):,} slides, {_short(sum(map(len, parts)))} patches"
        told = [counts, *(self._describe(key, parts) for key in self._selection.store.encoders)]
        told += [f"where {step}" for step in self._selection.steps]
        told += [f"labels of {labels.path.name}" for labels in reversed(self._selection.labels)]
        told += [f"{len(self.failed):,} slides failed"] if self.failed else []
        return f"<Cohort {self.path.name}: {', '.join(told)}>"

    def _describe(self, encoder: str, parts: Sequence[Part]) -> str:
        """An encoder with its number of views, and of slides where it lacks some."""
        facts = [part.slide.facts.features.get(encoder) for part in parts]
        views = max((of_slide.n_views for of_slide in facts if of_slide), default=0)
        whole = sum(of_slide is not None and of_slide.complete for of_slide in facts)
        known = [f"{views} views"] if views > 1 else []
        known += [f"{whole:,} of {len(parts):,} slides"] if whole < len(parts) else []
        return f"{encoder} ({', '.join(known)})" if known else encoder

    def patches(self, *, drop_unreadable: bool = False) -> "pandas.DataFrame":
        """The table of patches.

        Args:
            drop_unreadable: Leave out patches that have no features, because they cannot be read or show an artifact.

        Returns:
            A row a patch: slide_id, row (its stored row in the slide), x and y (its top-left corner in level-0 pixels;
            0 for patch images), status (ok, or why it has no features), patch_id (file name of a patch image), and a
            column for each label, a category that is missing where it is blank. Columns of `write_column` have the type
            that they were written with.

        Raises:
            StoreCorruptError: A table of a slide is not what was written.
        """
        from g2l_core.api.frames import patch_frame

        return patch_frame(self._parts(drop_unreadable))

    def slides(self) -> "pandas.DataFrame":
        """The table of slides.

        Returns:
            A row a slide: slide_id, kind (slide, or patches for a set of patch images), n_patches, mpp (um per level-0
            pixel, NaN where it is not known), width and height in level-0 pixels, patch_px_level0 (side of a patch in
            level-0 pixels), source (its file), and a column for each label of whole slides.
        """
        from g2l_core.api.frames import slide_frame

        return slide_frame(self._selection.parts())

    def _parts(self, drop_unreadable: bool) -> list[Part]:
        parts = self._selection.parts()
        return [part.readable() for part in parts] if drop_unreadable else parts

    def _dim(self, key: str) -> int:
        return self._selection.store.encoders[key].dim

    # -- which patches ----------------------------------------------------------------------------------------

    def with_labels(self, path: Path | str, *, missing: str = "refuse") -> "Cohort":
        """The same patches with the labels of a table, which the store itself does not keep.

        Rules are those of benchmark tasks: a column of the table replaces one of the same name of the manifest or of an
        earlier table; ids that differ in spelling alone are found; two rows of one slide or patch that contradict each
        other are refused by their lines; `notes` counts what is blank.

        Args:
            path: A table of separated values with slide_id; and patch_id for patch images, or x and y (level-0 pixels
                of the corner) for patches of a slide, where labels are of patches.
            missing: "skip" leaves out slides that the store does not have; "refuse" names them in an error.

        Raises:
            ManifestError: The table cannot be used.
            UsageError: `missing` is another word.
        """
        return Cohort(self._selection.with_labels(read_labels(Path(path), self._selection.store, missing=missing)))

    def where(
        self,
        *conditions: str,
        slides: Sequence[str] | None = None,
        encoders: Sequence[str] = (),
        n_patches: int | None = None,
        seed: int = 0,
    ) -> "Cohort":
        """Some of the patches.

        Args:
            conditions: COLUMN=PATTERN, shell-style, as in task files: "medical_center=A*". All must hold, for the slide
                or the patch. A column is a label or slide_id.
            slides: Ids of slides; None is all.
            encoders: Only slides that hold the canonical view of these whole.
            n_patches: Patches with features to draw from each slide, without replacement; all where it has fewer. What
                is drawn depends on the seed and the slide alone.
            seed: Of the draw.

        Raises:
            UsageError: No condition, or n_patches below 1.
            UnknownNameError: There is no such column, slide or encoder.
        """
        return Cohort(self._selection.where(conditions, slides, encoders, n_patches, seed))

    # -- features ---------------------------------------------------------------------------------------------

    def numpy(
        self,
        encoder: str,
        *,
        view: int = 0,
        drop_unreadable: bool = False,
        out: Path | str | None = None,
        mmap: bool = False,
        rows: Sequence[int] | None = None,
    ) -> Features:
        """The features of all patches, float16 (row, dim). NaN in the rows of unreadable patches.

        Args:
            encoder: Which encoder.
            view: Which view.
            drop_unreadable: Leave these rows out, as `patches(drop_unreadable=True)` does.
            out: A file .npy to write as well, slide by slide.
            mmap: Leave the features in that file and map it into memory, for more than memory holds.
            rows: Only these places of the table of patches, in this order. Quick at random where there is a `pack`.

        Raises:
            StoreMissingError: A slide does not have them all; names it.
            UnknownNameError: The store does not have the encoder.
            UsageError: `mmap` without `out`, or `out` is no .npy.
            StoreCorruptError: Something is not what was written.
        """
        from g2l_core.api.arrays import feature_array, features_at, write_features

        key = self._selection.encoder(encoder)
        parts = self._parts(drop_unreadable)
        if rows is not None:
            if out is not None or mmap:
                raise UsageError("rows are read into memory: leave out and mmap go with all of them")
            return features_at(parts, key, self._dim(key), rows, view=view)
        if out is None:
            if mmap:
                raise UsageError("mmap=True needs a file: give out='features.npy'")
            return feature_array(parts, key, self._dim(key), view=view)
        write_features(parts, key, self._dim(key), Path(out), view=view)
        import numpy

        return numpy.load(out, mmap_mode="r" if mmap else None)

    def dask(self, encoder: str, *, view: int = 0, drop_unreadable: bool = False) -> "dask.array.Array":
        """The features of all patches as a Dask array, float16 (row, dim); a chunk is what is taken of a shard.

        Arguments and errors as for `numpy`; with `drop_unreadable` the reason codes of all patches are read now.
        """
        from g2l_core.api.arrays import dask_array

        key = self._selection.encoder(encoder)
        return dask_array(self._parts(drop_unreadable), key, self._dim(key), view=view)

    def xarray(self, encoder: str, *, view: int = 0, drop_unreadable: bool = False) -> "xarray.DataArray":
        """As `dask`, as a DataArray (patch, feature) whose coordinates are the columns of `patches`.

        Raises:
            UsageError: xarray is not installed.
        """
        from g2l_core.api.arrays import data_array

        key = self._selection.encoder(encoder)
        return data_array(self._parts(drop_unreadable), key, self._dim(key), view=view)

    def blocks(
        self,
        encoder: str,
        *,
        rows: int = 4096,
        label: str = "",
        view: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        missing: str = "refuse",
    ) -> "g2l_core.api.row_blocks.RowBlocks":
        """The readable patches block by block, in memory that does not grow with the cohort.

        Args:
            encoder: Which encoder.
            rows: Patches of a block; the last one may have fewer.
            label: Column whose values the blocks have; none if empty.
            view: Which view.
            shuffle: Take the patches in random order, another one after `set_epoch`.
            seed: Of the order.
            missing: "skip" leaves out slides without these features; "refuse" names one in an error.

        Raises:
            StoreMissingError: No slide has the features, or one lacks them that must not.
            UnknownNameError: There is no such encoder or column.
            UsageError: `rows` is below 1, or `missing` another word.
        """
        from g2l_core.api.row_blocks import BlockOptions, RowBlocks

        key = self._selection.encoder(encoder)
        if label:
            self._selection.require_column(label)
        options = BlockOptions(rows=rows, label=label, view=view, shuffle=shuffle, seed=seed, missing=missing)
        return RowBlocks(self._selection.parts(), key, options)

    def torch(
        self,
        encoder: str,
        *,
        batch_size: int = 1024,
        label: str = "",
        view: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        missing: str = "refuse",
    ) -> "g2l_core.api.batches.PatchBatches":
        """The readable patches in batches, for a DataLoader with `batch_size=None`. Arguments as for `blocks`."""
        from g2l_core.api.batches import PatchBatches

        return PatchBatches(
            self.blocks(encoder, rows=batch_size, label=label, view=view, shuffle=shuffle, seed=seed, missing=missing)
        )

    def bags(
        self,
        encoder: str,
        *,
        by: str = "slide_id",
        label: str = "",
        view: int = 0,
        max_patches: int | None = None,
        seed: int = 0,
        missing: str = "refuse",
    ) -> "g2l_core.api.bags.PatchBags":
        """Bags of patches for multiple-instance learning, a torch Dataset of one item a bag.

        Args:
            encoder: Which encoder.
            by: Column of which each value is a bag, such as patient_id.
            label: Column of the bags' label, on which all labeled patches of a bag must agree; none if empty.
            view: Which view.
            max_patches: Maximum patches of a bag; of a larger one so many are drawn, others after `set_epoch`.
            seed: Of the draw.
            missing: "skip" leaves out slides without these features, patches that are of no bag, and bags without a
                label; `skipped` tells which. "refuse" names the first in an error.

        Raises:
            StoreMissingError: As for `blocks`.
            ManifestError: A bag has several labels, or something is missing that must not.
            UnknownNameError: There is no such encoder or column.
            UsageError: max_patches is below 1, or `missing` another word.
        """
        from g2l_core.api.bags import BagOptions, PatchBags

        key = self._selection.encoder(encoder)
        for column in filter(None, (by, label)):
            self._selection.require_column(column)
        if max_patches is not None and max_patches < 1:
            raise UsageError(f"max_patches must be at least 1; got {max_patches}")
        options = BagOptions(by=by, label=label, view=view, max_patches=max_patches, seed=seed, missing=missing)
        return PatchBags(self._selection.parts(), key, options)

    def anndata(
        self, encoders: Sequence[str] | str, *, view: int = 0, max_patches: int | None = 50_000, seed: int = 0
    ) -> "anndata.AnnData":
        """The readable patches as AnnData, in memory.

        Args:
            encoders: One encoder or several.
            view: Which view.
            max_patches: Of more patches so many are drawn, each with the same chance; None takes all.
            seed: Of the draw.

        Returns:
            X: features of the first encoder, float32. obsm: `X_<key>` of each further one, and `spatial`, the corners.
            obs: the columns of `patches`, called `<slide_id>#<row>`. uns["g2l"]: encoders and their digests, scale, and
            how many patches there were before the draw.

        Raises:
            UsageError: anndata is not installed, or no encoder is named.
            StoreMissingError: As for `numpy`.
            UnknownNameError: As for `numpy`.
        """
        from g2l_core.api.scverse import annotated_data

        names = [encoders] if isinstance(encoders, str) else encoders
        keys = [self._selection.encoder(name) for name in names]
        parts = self._selection.parts()
        return annotated_data(self._selection.store, parts, keys, view=view, max_patches=max_patches, seed=seed)

    def spatialdata(self, slide_id: str, encoders: Sequence[str] | str, *, view: int = 0) -> "spatialdata.SpatialData":
        """One slide as SpatialData: its patches as squares, and a table of features that annotates them.

        Args:
            slide_id: The slide.
            encoders: One encoder or several.
            view: Which view.

        Returns:
            shapes["patches"]: a square for each readable patch, in the coordinate systems `global` (level-0 pixels)
            and, where um/px is known, `um` (micrometers). tables["features"]: what `anndata` gives, linked to them.

        Raises:
            UsageError: spatialdata is not installed, or it is a set of patch images.
            UnknownNameError: There is no such slide or encoder.
        """
        from g2l_core.api.scverse import spatial_data

        return spatial_data(self.where(slides=[slide_id]).anndata(encoders, view=view, max_patches=None), self.slides())

    # -- writing ----------------------------------------------------------------------------------------------

    def to_parquet(
        self, path: Path | str, *, encoder: str | None = None, view: int = 0, drop_unreadable: bool = False
    ) -> Path:
        """Write the table of patches as a Parquet file, with a column `features` (a list of float32) if asked for.

        A row group is a slide, so that memory holds the features of one slide.

        Raises:
            UsageError: pyarrow is not installed.
            RunError: The file cannot be written.
            StoreMissingError: As for `numpy`.
            UnknownNameError: As for `numpy`.
        """
        from g2l_core.api.parquet import write_parquet

        key = None if encoder is None else self._selection.encoder(encoder)
        write_parquet(self._parts(drop_unreadable), Path(path), key, view=view)
        return Path(path)

    def copy(
        self,
        out: Path | str,
        *,
        slides: Sequence[str] | None = None,
        encoders: Sequence[str] | None = None,
        views: int | None = None,
    ) -> "Cohort":
        """Write these slides into a new store, with their labels and, of the store as a whole, its failed slides.

        Everything is read with its checksums, and written by the writers that stage one uses. Labels of files become
        those of the new store.

        Args:
            out: Its folder, which must not be there.
            slides: Ids of slides; None is all of the cohort.
            encoders: Encoders to keep; None is all.
            views: How many views to keep, the canonical one first; None is all.

        Raises:
            StoreError: There is something at `out`, or it cannot be written.
            StoreCorruptError: Something is not what was written.
            UnknownNameError: There is no such slide or encoder.
            UsageError: The cohort has parts of slides: a store holds whole ones.
        """
        from g2l_core.api.copies import Kept, write_store

        selection = self._selection if slides is None else self._selection.where((), slides, (), None, 0)
        keys = None if encoders is None else frozenset(map(selection.encoder, encoders))
        write_store([selection], Path(out), Kept(encoders=keys, n_views=views))
        return open_cohort(out)

    def pack(self, encoder: str, *, view: int = 0) -> Path:
        """Let the store keep one view's features of all slides in one more .npy file, from which any rows are quick.

        `numpy`, `blocks`, `torch`, `bags` and `anndata` read it from then on.

        Raises:
            StoreMissingError: No slide has these features whole; those that lack them are left out.
            UnknownNameError: The store does not have the encoder.
            StoreError: The store cannot be written, or another command writes into it.
        """
        from g2l_core.api.packs import write_pack

        key, store = self._selection.encoder(encoder), self._selection.store
        return write_pack(folder_of(store.path), list(store.slides()), key, self._dim(key), view=view).path

    def write_column(self, name: str, values: Any) -> None:
        """Add a column to the store: one value for each patch, such as a score. One of the same name is replaced.

        It is a label like any other from then on, also for benchmark tasks, and running stage one again keeps it. It is
        written slide by slide; slides that are not in the cohort keep what they have, and of those that are in it the
        patches that are not have no value.

        Args:
            name: Of the column.
            values: Numbers, truth values or texts in the order of `patches`; a pandas Series is aligned by the index of
                `patches`, and rows that it lacks have no value; a mapping has one value for all patches of a slide, by
                slide_id.

        Raises:
            UsageError: The number of values or the index does not fit, or the name is taken.
            UnknownNameError: A mapping names a slide that is not in the cohort.
            StoreError: The store cannot be written, or another command writes into it.
        """
        from g2l_core.api.user_columns import add_column

        add_column(self._selection, name, values)

    def relocate(self, folder: Path | str, *, dry_run: bool = False) -> "g2l_core.patches.relocate.Relocation":
        """Point the store at its slides below another folder, as `g2l store relocate` does.

        Raises:
            UsageError: There is no such folder.
            StoreError: The store cannot be written.
        """
        from g2l_core.patches.relocate import relocate

        return relocate(folder_of(self.path), Path(folder), dry_run=dry_run)


def open_cohort(path: Location | str) -> Cohort:
    """Open a store, with all of its patches and the labels of its manifest. As `g2l.open` it begins everything.

    Args:
        path: Its folder, as `g2l cache-teacher --store` was given it; or an address of s3://, gs:// or https://, as
            `g2l store upload` was given it.

    Raises:
        StoreMissingError: There is none.
        StoreError: The folder or address is something else, of a newer format, or cannot be read.
        UsageError: It is an address, and the package that reads it is not installed.
    """
    return Cohort(Selection(store=FeatureStore.open(path)))


def _short(number: int) -> str:
    """A count as people say it."""
    return f"{number / 1e6:,.1f} M" if number >= 1_000_000 else f"{number:,}"
