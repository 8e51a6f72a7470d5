"""The tissue method behind the value of --tissue, and the name under which a store keeps it.

The name identifies everything that decides the mask of a new slide: a threshold by its name, a network by its digest.
Annotations differ by slide, and slides are added later, so all of them have one plain name, and each slide's record
keeps the digest of its file. docs/decisions/09-tissue.md has the reasons.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.slides.manifest import Source
from g2l_core.slides.notes import Note
from g2l_core.slides.slide import Slide, Thumbnail
from g2l_core.tissue import annotations, network
from g2l_core.tissue.classes import ClassChoice
from g2l_core.tissue.coord_files import GivenPatches
from g2l_core.tissue.coordinates import Coordinates
from g2l_core.tissue.geojson import EVERY_CLASS
from g2l_core.tissue.thresholds import THUMBNAIL_MPP, color_tissue, otsu_tissue
from g2l_core.types import Mpp, Rgb, TissueMask

ANNOTATIONS, NETWORK, NONE = "annotations", "network", "none"
COORDINATES = "coordinates"
"""The identity where the patches themselves are given (`--coords`), and no tissue is looked for."""

THRESHOLDS: Mapping[str, Callable[[Rgb, Mpp], TissueMask]] = {"otsu": otsu_tissue, "color": color_tissue}


@dataclass(frozen=True, kw_only=True)
class FoundTissue:
    """The tissue of a slide."""

    mask: TissueMask | None
    """Where tissue is, in the slide's frame at `THUMBNAIL_MPP`; None if the whole slide counts."""
    thumbnail: Thumbnail | None = None
    """The slide at the mask's scale, if it was read."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What the slide's record must keep. For an annotation, and for coordinates, these are `tissue_file` and
    `tissue_sha256`."""
    notes: tuple[Note, ...] = ()
    """What of an annotation, or of coordinates, was left out."""
    given: GivenPatches | None = None
    """The patches, or the boxes that they lie in, where these are given in place of tissue."""


@dataclass(frozen=True, kw_only=True)
class TissueMethod:
    """A way to find tissue."""

    identity: str
    """Its name in a store's identity (`GridSpec.tissue`)."""
    find: Callable[[Slide, str], FoundTissue]
    """Finds the tissue of an open slide, given with its id. Raises ReadError if slide or annotation cannot be read."""
    file_sha256: Callable[[str, Path], str | None] = lambda _id, _path: None
    """The digest of what it would read for a slide, its id and its file, now; None if it reads nothing."""
    require_distinct: Callable[[Iterable[Source]], None] = lambda _: None
    """Raises UsageError if two slides would get what is meant for one."""


def resolve_tissue(method: str) -> TissueMethod:
    """Find the tissue method that `--tissue METHOD` means.

    Args:
        method: `otsu`, `color` or `none`; a network, FILE.onnx or FILE.pt; or a folder of annotations, which may
            have classes behind it: `FOLDER:Tumor,Stroma`, `FOLDER:!Necrosis`.

    Raises:
        UsageError: It is none of these, or its file cannot be used. Or it is the name under which a store keeps a
            network or annotations, whose file or folder must be given again.
    """
    if method in THRESHOLDS:
        return TissueMethod(identity=method, find=_by_threshold(THRESHOLDS[method]))
    if method == NONE:
        return TissueMethod(identity=NONE, find=lambda _slide, _id: FoundTissue(mask=None))
    path = Path(method)
    if method == COORDINATES and not path.is_dir():
        raise UsageError("the store's patches are given coordinates: give their folder or file again with --coords")
    if method == ANNOTATIONS or (method.startswith((f"{NETWORK}:", f"{ANNOTATIONS}:")) and not path.is_dir()):
        folder, _, classes = method.partition(":")
        again = f"folder, with :{classes} behind it if it had classes," if classes else "folder"
        raise UsageError(
            f"the store's tissue method is {method!r}: give its "
            f"{again if folder == ANNOTATIONS else 'file'} again with --tissue"
        )
    if path.suffix.lower() in network.SUFFIXES:
        return _by_network(path)
    if path.is_dir():
        return _by_annotations(path, EVERY_CLASS)
    folder, colon, classes = method.rpartition(":")
    if colon and Path(folder).is_dir():
        return _by_annotations(Path(folder), ClassChoice.parse(classes))
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


def _by_annotations(folder: Path, choice: ClassChoice) -> TissueMethod:
    def find(slide: Slide, slide_id: str) -> FoundTissue:
        frame = slide.thumbnail_frame(THUMBNAIL_MPP)
        annotation = annotations.read_annotation(folder, slide_id, slide.level0_size, frame, choice)
        counts = ", ".join(f"{count:,} {what}" for what, count in sorted(annotation.left_out.items()))
        notes = (Note(text="objects of the annotation do not count as tissue", detail=counts),) if counts else ()
        return FoundTissue(mask=annotation.mask, facts=annotation.facts, notes=notes)

    return TissueMethod(
        identity=f"{ANNOTATIONS}:{choice}" if choice != EVERY_CLASS else ANNOTATIONS,
        find=find,
        file_sha256=lambda slide_id, _: annotations.annotation_sha256(folder, slide_id),
    )


def resolve_coords(path: Path) -> TissueMethod:
    """The method that takes the patches that `--coords PATH` gives, and looks for no tissue.

    Args:
        path: A folder with a file a slide, or one file; see `coordinates.Coordinates`.

    Raises:
        UsageError: It is none of these.
        ManifestError: It is a table that cannot be read.
    """
    coordinates = Coordinates(path)

    def find(slide: Slide, slide_id: str) -> FoundTissue:
        name, given = coordinates.read(slide_id, slide.path)
        repeated = Note(text="rows of the coordinates repeat another", detail=f"{given.repeated:,}")
        return FoundTissue(
            mask=None,
            given=given,
            facts={"tissue_file": name, "tissue_sha256": given.sha256},
            notes=(repeated,) if given.repeated else (),
        )

    return TissueMethod(
        identity=COORDINATES,
        find=find,
        file_sha256=coordinates.sha256,
        require_distinct=coordinates.require_distinct,
    )
