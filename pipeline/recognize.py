"""One slide, one id: the slides of the inputs that a store has under another id keep the id that they have there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from g2l_core.concurrency import run_ahead
from g2l_core.errors import ReadError
from g2l_core.slides.fingerprint import fingerprint
from g2l_core.slides.manifest import Source
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.types import SlideId


@dataclass(frozen=True, kw_only=True)
class Recognized:
    """The sources with the ids that the store has for them."""

    sources: tuple[Source, ...]
    renamed: Mapping[str, str]
    """Stored id by the id that the inputs give."""
    refused: Mapping[str, str]
    """Why sources are left out, by id."""


def recognize(store: FeatureStore, sources: Sequence[Source], *, workers: int) -> Recognized:
    """Find the sources that the store has under another id.

    A source is recognized where it lies, or else, if it is a file, by its fingerprint: a fingerprint of a folder covers
    names and sizes alone, which other slides may have too. One that lies elsewhere takes the stored id only if it
    brings labels for it, and is refused otherwise.
    """
    met = {slide.slide_id: slide for slide in store.slides()}
    met |= {slide_id: store.slide(slide_id) for slide_id in store.failed_slides()}
    ids = _by_place(met, sources)
    elsewhere = [s for s in sources if s.slide_id not in ids and s.slide_id not in met and s.path.is_file()]
    refused: dict[str, str] = {}
    stored = {slide.facts.fingerprint: slide_id for slide_id, slide in met.items() if slide.facts.fingerprint}
    for source, found in zip(elsewhere, _fingerprints(elsewhere if stored else [], workers), strict=False):
        if (slide_id := stored.get(found)) is None:
            continue
        ids[source.slide_id] = slide_id
        if not source.labels:
            refused[source.slide_id] = same_slide(source.path, slide_id)
    kept: dict[str, Source] = {}
    for source in sorted(sources, key=lambda s: ids.get(s.slide_id, s.slide_id) != s.slide_id):  # its own id goes first
        slide_id = ids.get(source.slide_id, source.slide_id)
        if slide_id in kept:
            refused.setdefault(source.slide_id, same_slide(source.path, slide_id))
        elif source.slide_id not in refused:
            kept[slide_id] = _as_stored(source, met[slide_id]) if source.slide_id in ids else source
    renamed = {asked: slide_id for asked, slide_id in ids.items() if asked != slide_id and asked not in refused}
    return Recognized(sources=tuple(kept[slide_id] for slide_id in sorted(kept)), renamed=renamed, refused=refused)


def same_slide(path: Path, slide_id: str) -> str:
    """Why a slide is not stored once more."""
    return f"{path} is the slide {slide_id}, which would count twice. Leave it out, or give that slide_id in a manifest"


def _by_place(met: Mapping[str, StoredSlide], sources: Sequence[Source]) -> dict[str, str]:
    """The stored ids of the sources that lie where the store has something."""
    slides = {slide.facts.source: slide_id for slide_id, slide in met.items() if slide.facts.kind != "patches"}
    images: dict[Path, str] = {}
    if any(source.patch_ids and not _lies_where_stored(source, met) for source in sources):
        images = {_images(slide)[0]: slide_id for slide_id, slide in met.items() if slide.facts.kind == "patches"}
    found: dict[str, str] = {}
    for source in sources:
        if _lies_where_stored(source, met):
            found[source.slide_id] = source.slide_id
        elif slide_id := _set_among(source, images, met) if source.patch_ids else slides.get(_place(source)):
            found[source.slide_id] = slide_id
    return found


def _set_among(source: Source, images: Mapping[Path, str], met: Mapping[str, StoredSlide]) -> str | None:
    """The stored set of patch images that all belong to this source; None if there is none."""
    files = {source.path.resolve() / name for name in source.patch_ids}
    candidates = {images[file] for file in files if file in images}
    return next((slide_id for slide_id in sorted(candidates) if files.issuperset(_images(met[slide_id]))), None)


def _images(slide: StoredSlide) -> list[Path]:
    return [Path(slide.facts.source) / name for name in slide.patch_ids or ()]


def _place(source: Source) -> str:
    return str(source.path.resolve())


def _lies_where_stored(source: Source, met: Mapping[str, StoredSlide]) -> bool:
    return source.slide_id in met and _place(source) == met[source.slide_id].facts.source


def _fingerprints(sources: Sequence[Source], workers: int) -> Iterator[str]:
    """One of each source; empty for a file that cannot be read, which fails by its name later."""

    def read(source: Source) -> str:
        try:
            return fingerprint(source.path)
        except ReadError:
            return ""

    return run_ahead(read, sources, workers=workers, lookahead=2 * max(1, workers))


def _as_stored(source: Source, stored: StoredSlide) -> Source:
    """The source under its stored id. Of patch images that lie below another folder, the names are those stored."""
    if not source.patch_ids or _place(source) == stored.facts.source:
        return replace(source, slide_id=SlideId(stored.slide_id))
    path, names = Path(stored.facts.source), tuple(stored.patch_ids or ())
    place_of = {source.path.resolve() / name: i for i, name in enumerate(source.patch_ids)}
    order = [place_of[file] for file in _images(stored)]
    labels = {column: tuple(values[i] for i in order) for column, values in source.patch_labels.items()}
    return replace(source, slide_id=SlideId(stored.slide_id), path=path, patch_ids=names, patch_labels=labels)
