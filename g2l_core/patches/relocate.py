"""`g2l store relocate`: find the slides of a store in another folder, by what they are and not by where they were.

Neither the teacher's weights nor any setting of stage one is needed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from g2l_core.concurrency import run_ahead
from g2l_core.errors import ReadError, UsageError
from g2l_core.patches.identity import current_fingerprint
from g2l_core.slides.fingerprint import file_state, fingerprint
from g2l_core.slides.manifest import files_below
from g2l_core.slides.readers import slide_suffixes
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.locks import LOCKS, locked

WORKERS = 8
"""Threads that take fingerprints, which read 3 MiB of a file."""


@dataclass(frozen=True, kw_only=True)
class Relocation:
    """Where the slides of a store are now."""

    found: Mapping[str, Path]
    """By slide id."""
    kept: tuple[str, ...]
    """Slides that are not in the folder, but still where the store has them."""
    ambiguous: Mapping[str, tuple[Path, ...]]
    """Several places whose fingerprint fits, none of which resembles the former one most."""
    missing: Mapping[str, str]
    """The former place of slides that are nowhere."""

    @property
    def is_complete(self) -> bool:
        """Whether every slide has a place."""
        return not self.ambiguous and not self.missing


def relocate(path: Path, folder: Path, *, dry_run: bool) -> Relocation:
    """Point a store at its slides below a folder.

    Files with the name of a slide are looked at first, and all others only for slides that none of these is. Where
    several files fit, the one whose path ends like the former path, for more folders than the others, is taken.

    Args:
        path: The store.
        folder: Where to look, with all folders below.
        dry_run: Write nothing.

    Raises:
        UsageError: There is no such folder.
        StoreError: The store cannot be used.
    """
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}")
    lock = locked(path / LOCKS / "writer", wait_s=0, holder="another g2l command writes into it")
    FeatureStore.open(path)  # before a lock file is made in what is no store
    with nullcontext() if dry_run else lock:
        store = FeatureStore.open(path, writable=not dry_run)
        slides = list(store.slides())
        places = _places(slides, list(files_below(folder)))
        found = {slide_id: best for slide_id, fitting in places.items() if (best := _best(store, slide_id, fitting))}
        rest = [slide for slide in slides if slide.slide_id not in found]
        ambiguous = {slide.slide_id: places[slide.slide_id] for slide in rest if places.get(slide.slide_id)}
        gone = [slide for slide in rest if slide.slide_id not in ambiguous]
        kept = tuple(slide.slide_id for slide in gone if _fits(slide, Path(slide.facts.source)))
        for slide_id, place in () if dry_run else found.items():
            slide = store.slide(slide_id)
            if slide.facts.source != str(place):
                slide.set_source(place, slide.facts.fingerprint, file_state(place))
    missing = {slide.slide_id: slide.facts.source for slide in gone if slide.slide_id not in kept}
    return Relocation(found=found, kept=kept, ambiguous=ambiguous, missing=missing)


def _places(slides: Sequence[StoredSlide], files: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """The distinct places where each slide may be now, by id; only slides with a place are in it."""
    by_name = defaultdict(list)
    for file in files:
        by_name[file.name].append(file)
    images = [slide for slide in slides if slide.facts.kind == "patches"]
    whole = [slide for slide in slides if slide.facts.kind != "patches"]
    places = {slide.slide_id: _folders_of(slide, by_name) for slide in images}
    named = [file for name in {Path(slide.facts.source).name for slide in whole} for file in by_name[name]]
    places |= _by_fingerprint(whole, named)
    rest = [slide for slide in whole if slide.slide_id not in places]
    seen, suffixes = set(named), slide_suffixes()
    others = [file for file in files if (file not in seen and file.suffix.lower() in suffixes) or file.is_dir()]
    places |= _by_fingerprint(rest, others if rest else [])
    return {slide_id: fitting for slide_id, fitting in places.items() if fitting}


def _by_fingerprint(slides: Sequence[StoredSlide], files: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    wanted = defaultdict(list)
    for slide in slides:
        wanted[slide.facts.fingerprint].append(slide.slide_id)
    fitting: dict[str, set[Path]] = defaultdict(set)
    for file, found in zip(files, _each(fingerprint, files), strict=True):
        for slide_id in wanted.get(found or "", ()):
            fitting[slide_id].add(file.resolve())
    return {slide_id: tuple(sorted(paths)) for slide_id, paths in fitting.items()}


def _each(function: Callable[[Path], str], files: Iterable[Path]) -> Iterator[str | None]:
    """The function of every file, in threads; None for a file that cannot be read."""

    def call(file: Path) -> str | None:
        try:
            return function(file) if file.is_file() or file.is_dir() else None
        except ReadError:
            return None

    return run_ahead(call, files, workers=WORKERS, lookahead=2 * WORKERS)


def _folders_of(slide: StoredSlide, by_name: Mapping[str, Sequence[Path]]) -> tuple[Path, ...]:
    """The folders that hold a set of patch images under the names that the store has."""
    first = Path((slide.patch_ids or [""])[0])
    depth = len(first.parts)
    if first.is_absolute():  # and so are all others: they are where they are
        return ()
    files = (file for file in by_name.get(first.name, ()) if file.parts[-depth:] == first.parts)
    candidates = {file.parents[depth - 1].resolve() for file in files}
    return tuple(sorted(folder for folder in candidates if _fits(slide, folder)))


def _fits(slide: StoredSlide, place: Path) -> bool:
    try:
        return current_fingerprint(slide, place) == slide.facts.fingerprint
    except (ReadError, OSError):
        return False


def _best(store: FeatureStore, slide_id: str, fitting: Sequence[Path]) -> Path | None:
    """The place whose path ends most like the former one; None if there are two of them."""
    former = Path(store.slide(slide_id).facts.source).parts[::-1]

    def alike(place: Path) -> int:
        pairs = list(zip(former, place.parts[::-1], strict=False))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    ranked = sorted(fitting, key=alike, reverse=True)
    is_clear = len(ranked) == 1 or alike(ranked[0]) > alike(ranked[1])
    return ranked[0] if is_clear else None
