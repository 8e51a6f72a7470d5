"""Which patches of a store take part: slides, conditions and draws, one step after another, slide by slide."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from g2l_core.api.labels import FileLabels, require_missing
from g2l_core.api.packs import packed_rows
from g2l_core.benchmark.columns import SlideColumns, spelled
from g2l_core.encoders.resolve import find_stored
from g2l_core.errors import StoreMissingError, UnknownNameError, UsageError
from g2l_core.rng import keyed_generator
from g2l_core.slides.manifest import parse_condition
from g2l_core.store.features import FeatureStore, StoredSlide, require_whole
from g2l_core.store.location import Location
from g2l_core.store.quick_tables import read_small_table
from g2l_core.store.rows import read_selected
from g2l_core.store.schema import STATUS
from g2l_core.types import Coords, Features, PatchStatus

Rows = Int64[np.ndarray, " row"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The patches of one slide that take part."""

    store: Location
    slide: StoredSlide
    labels: tuple[FileLabels, ...]
    """The file that takes precedence first."""
    chosen: Rows | None = None
    """Stored rows, ascending; None is all of them."""

    @property
    def slide_id(self) -> str:
        """Its slide."""
        return self.slide.slide_id

    def __len__(self) -> int:
        return len(self.slide) if self.chosen is None else len(self.chosen)

    @property
    def rows(self) -> Rows:
        """The stored rows."""
        return np.arange(len(self.slide)) if self.chosen is None else self.chosen

    @property
    def columns(self) -> SlideColumns:
        """The labels of all of the slide's patches."""
        return SlideColumns(self.slide, *self.labels)

    @property
    def status(self) -> PatchStatus:
        """uint8: the reason code of each row."""
        return self._taken(read_small_table(self.slide, "patch_status"))

    @property
    def coords(self) -> Coords:
        """int32 (row, 2): top-left corners in level-0 pixels."""
        return self._taken(read_small_table(self.slide, "coords"))

    def _taken(self, values: np.ndarray) -> np.ndarray:
        return values if self.chosen is None else values[self.chosen]

    def readable(self) -> "Part":
        """The rows that have features."""
        good = self.status == STATUS["ok"]
        return self if good.all() else replace(self, chosen=self.rows[good])

    def features(self, encoder: str, view: int) -> Features:
        """float16 (row, dim), from a pack where there is one. The rows of patches that have no features are NaN."""
        packed = packed_rows(self.store, self.slide, encoder, self.chosen, view=view)
        return read_selected(self.slide, encoder, self.chosen, view=view) if packed is None else packed


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of `where`: what it asks of a slide and its patches."""

    conditions: tuple[str, ...] = ()
    slide_ids: frozenset[str] | None = None
    encoders: tuple[str, ...] = ()
    """Keys of encoders whose canonical view a slide must have whole."""
    n_patches: int | None = None
    seed: int = 0
    labels: tuple[FileLabels, ...] = ()

    def taken(self, part: Part) -> Part | None:
        """What is left of a slide's patches; None where nothing is asked of it."""
        if self.slide_ids is not None and part.slide_id not in self.slide_ids:
            return None
        if not all(_is_whole(part.slide, encoder) for encoder in self.encoders):
            return None
        columns = SlideColumns(part.slide, *self.labels)
        for condition in self.conditions:
            fitting = columns.fitting(condition, part.rows)
            part = part if fitting.all() else replace(part, chosen=part.rows[fitting])
        if self.conditions and not len(part):
            return None
        return part if self.n_patches is None else self._drawn(part.readable(), self.n_patches)

    def _drawn(self, part: Part, n: int) -> Part | None:
        """A number of patches, drawn without replacement by the seed and the slide alone."""
        if len(part) > n:
            drawn = keyed_generator("where", self.seed, part.slide_id).choice(len(part), n, replace=False)
            part = replace(part, chosen=part.rows[np.sort(drawn)])
        return part if len(part) else None

    def __str__(self) -> str:
        words = [*self.conditions, *(f"with {encoder}" for encoder in self.encoders)]
        words += [] if self.slide_ids is None else [f"{len(self.slide_ids):,} named slides"]
        drawn = [] if self.n_patches is None else [f"{self.n_patches:,} patches a slide (seed {self.seed})"]
        return ", ".join([*words, *drawn])


def _is_whole(slide: StoredSlide, encoder: str) -> bool:
    try:
        require_whole(slide, encoder, view=0)
    except StoreMissingError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A store, labels of files, and the steps that choose among its patches."""

    store: FeatureStore
    labels: tuple[FileLabels, ...] = ()
    """The newest file first: it takes precedence."""
    steps: tuple[Step, ...] = ()

    def parts(self) -> list[Part]:
        """The patches that take part, slide by slide, sorted by id; slides of which nothing is left are left out.

        Raises:
            StoreCorruptError: A slide is damaged.
        """
        self.store.require_undamaged()
        return list(self._parts())

    def _parts(self) -> Iterator[Part]:
        for slide in self.store.slides():
            part: Part | None = Part(store=self.store.path, slide=slide, labels=self.labels)
            for step in self.steps:
                part = step.taken(part) if part is not None else None
            if part is not None:
                yield part

    def with_labels(self, labels: FileLabels) -> "Selection":
        """The same patches with further labels."""
        return replace(self, labels=(labels, *self.labels))

    def where(
        self,
        conditions: Sequence[str],
        slides: Sequence[str] | None,
        encoders: Sequence[str],
        n_patches: int | None,
        seed: int,
    ) -> "Selection":
        """Those of the patches that fit; see `Cohort.where`."""
        for condition in conditions:
            self.require_column(parse_condition(condition)[0])
        known = self.store.slide_ids() if slides is not None else []
        unknown = sorted(set(slides or ()) - set(known))
        if unknown:
            raise UnknownNameError("slide", unknown[0], known, f"The store is {self.store.path}.")
        if n_patches is not None and n_patches < 1:
            raise UsageError(f"n_patches must be at least 1; got {n_patches}")
        step = Step(
            conditions=tuple(conditions),
            slide_ids=None if slides is None else frozenset(slides),
            encoders=tuple(self.encoder(name) for name in encoders),
            n_patches=n_patches,
            seed=seed,
            labels=self.labels,
        )
        return replace(self, steps=(*self.steps, step))

    def require_column(self, name: str) -> None:
        """Refuse a column that no patch has.

        Raises:
            UnknownNameError: Names the columns that there are.
        """
        known = self.column_names()
        if spelled(name, known) not in known:
            raise UnknownNameError("column", name, sorted(known), f"The store is {self.store.path}.")

    def column_names(self) -> set[str]:
        """Every column that some slide has."""
        return {"slide_id"}.union(*(SlideColumns(slide, *self.labels).names for slide in self.store.slides()))

    def encoder(self, name: str) -> str:
        """The key of the stored encoder that a user means, as the command line takes it.

        Raises:
            UnknownNameError: No stored encoder fits.
            UsageError: Several stored encoders fit.
        """
        return find_stored(name, self.store.encoders)


def whole_parts(
    parts: Sequence[Part], encoder: str, view: int, missing: str = "refuse"
) -> tuple[list[Part], Mapping[str, str]]:
    """Those of the slides that hold one view of an encoder whole, and why each other one does not, by id.

    Raises:
        StoreMissingError: One does not, and `missing` is refuse; or none does.
        UsageError: `missing` is another word.
    """
    require_missing(missing)
    whole, skipped = list[Part](), dict[str, str]()
    for part in parts:
        try:
            require_whole(part.slide, encoder, view=view)
        except StoreMissingError as error:
            if missing == "refuse":
                raise StoreMissingError(
                    f'{error}; or take the others alone with where(encoders=["{encoder}"])'
                ) from error
            skipped[part.slide_id] = str(error)
            continue
        whole.append(part)
    if not whole:
        why = f": {next(iter(skipped.values()))}" if skipped else ""
        raise StoreMissingError(f"no slide with features of {encoder}, view {view}, is left{why}")
    return whole, skipped
