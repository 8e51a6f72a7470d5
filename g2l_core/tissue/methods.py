"""From the word after --tissue to a method, and the name of the method that a store keeps.

The name says all that decides the mask of a slide to come: a threshold's by its name, a network's by its digest.
Annotations differ by slide, and slides are added later, so theirs is a plain word, and the digest of each file stands
in its slide's record. docs/decisions/09-tissue.md has the reasons.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.slides.slide import Slide, Thumbnail
from g2l_core.tissue import annotations, network
from g2l_core.tissue.thresholds import THUMBNAIL_MPP, color_tissue, otsu_tissue
from g2l_core.types import Mpp, Rgb, TissueMask

ANNOTATIONS, NETWORK, NONE = "annotations", "network", "none"

THRESHOLDS: Mapping[str, Callable[[Rgb, Mpp], TissueMask]] = {"otsu": otsu_tissue, "color": color_tissue}


@dataclass(frozen=True, kw_only=True)
class FoundTissue:
    """Where a slide has tissue."""

    mask: TissueMask | None
    """In the slide's frame at `THUMBNAIL_MPP`; None where everything counts."""
    thumbnail: Thumbnail | None = None
    """The slide at that scale, if it was read."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What the slide's record must keep: of an annotation, `tissue_file` and `tissue_sha256`."""


@dataclass(frozen=True, kw_only=True)
class TissueMethod:
    """A way to find tissue."""

    identity: str
    """`GridSpec.tissue`: its name in a store's identity."""
    find: Callable[[Slide, str], FoundTissue]
    """Of an open slide and its id. Raises ReadError where the slide, or its annotation, cannot be read."""
    file_sha256: Callable[[str], str | None] = lambda _: None
    """The digest of what it would read for a slide id now; None where that is nothing."""


def resolve_tissue(method: str) -> TissueMethod:
    """The method behind `--tissue METHOD`.

    Args:
        method: `otsu`, `color` or `none`; a network, FILE.onnx or FILE.pt; or a folder of annotations.

    Raises:
        UsageError: It is none of these, its file cannot be used, or it is the name under which a store keeps a
            network or annotations, whose files must be given again.
    """
    if method in THRESHOLDS:
        return TissueMethod(identity=method, find=_by_threshold(THRESHOLDS[method]))
    if method == NONE:
        return TissueMethod(identity=NONE, find=lambda _slide, _id: FoundTissue(mask=None))
    if method == ANNOTATIONS or method.startswith(f"{NETWORK}:"):
        raise UsageError(
            f"the store's tissue method is {method!r}: give its "
            f"{'folder' if method == ANNOTATIONS else 'file'} again with --tissue"
        )
    path = Path(method)
    if path.suffix.lower() in network.SUFFIXES:
        return _by_network(path)
    if path.is_dir():
        return _by_annotations(path)
    hint = "Or give a network (FILE.onnx, FILE.pt) or a folder of annotations (<slide_id>.geojson or .png)."
    raise UnknownNameError("tissue method", method, [*THRESHOLDS, NONE], hint)


def _by_threshold(threshold: Callable[[Rgb, Mpp], TissueMask]) -> Callable[[Slide, str], FoundTissue]:
    def find(slide: Slide, _: str) -> FoundTissue:
        thumbnail = slide.read_thumbnail(THUMBNAIL_MPP)
        return FoundTissue(mask=threshold(thumbnail.image, thumbnail.mpp), thumbnail=thumbnail)

    return find


def _by_network(path: Path) -> TissueMethod:
    loaded = network.load_network(path)

    def find(slide: Slide, _: str) -> FoundTissue:
        frame = slide.thumbnail_frame(THUMBNAIL_MPP)
        return FoundTissue(mask=network.network_tissue(loaded, slide, frame))

    return TissueMethod(identity=f"{NETWORK}:{loaded.name}@sha256:{loaded.digest[:12]}", find=find)


def _by_annotations(folder: Path) -> TissueMethod:
    def find(slide: Slide, slide_id: str) -> FoundTissue:
        frame = slide.thumbnail_frame(THUMBNAIL_MPP)
        found = annotations.read_annotation(folder, slide_id, slide.level0_size, frame)
        return FoundTissue(mask=found.mask, facts=found.facts)

    return TissueMethod(
        identity=ANNOTATIONS,
        find=find,
        file_sha256=lambda slide_id: annotations.annotation_sha256(folder, slide_id),
    )
