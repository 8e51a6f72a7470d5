"""An overview of a slide for people: a picture of its tissue and patches, and its tissue as GeoJSON for QuPath.

They are beside the store, in `<store name>.qc/<slide_id>.jpg` and `.geojson`. `--tissue FOLDER` reads the GeoJSON,
edited or not.
"""

import json
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFont

from g2l_core.files import write_text, write_with
from g2l_core.slides.slide import Slide, Thumbnail
from g2l_core.tissue.geojson import areas_of
from g2l_core.types import Coords, Level0Px, Mpp, Rgb, TissueMask

LONGEST_PX = 1600
"""Maximum of the picture's long side."""

SHORTEST_PX = 800
"""A thumbnail whose long side is shorter, which small slides have, is read again at a finer scale."""

TISSUE_COLOR, PATCH_COLOR, TEXT_COLOR = (0, 158, 115), (0, 70, 200), (40, 40, 40)
"""Green and blue that color-blind people can distinguish (Okabe & Ito), far from hematoxylin and eosin."""

EXCLUDED_VEIL = 0.55
"""Opacity of the white over what is not kept."""

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

FONT_PX = 20
"""Size of Pillow's own font, which has Latin letters, but no micro sign and no ellipsis."""
CAPTION_PX = 76
"""Height of the strip under the picture, for two lines of text."""
NARROWEST_PX = 760
"""Minimum width of the picture, so that the caption fits."""

GENERATOR = '{"generator":"g2l",'
"""How our GeoJSON begins. QuPath's export begins differently, so a file that was edited in it is never replaced."""


@dataclass(frozen=True, kw_only=True)
class SlideOverview:
    """What an overview shows: the tissue of a slide, and the patches that were kept."""

    slide_id: str
    coords: Coords
    side: Level0Px
    mask: TissueMask | None
    """Where tissue is; None if the whole slide counts."""
    downsample: float
    """Level-0 pixels per mask pixel."""
    method: str
    """Identity of the tissue method."""


def overview_folder(store: Path) -> Path:
    """The folder of a store's overviews, beside the store."""
    return store.with_name(store.name.removesuffix(".zarr") + ".qc")


def write_overview(folder: Path, slide: Slide, overview: SlideOverview, thumbnail: Thumbnail | None) -> str:
    """Write a slide's picture and tissue outlines. Each replaces its file as a whole or not at all.

    Args:
        folder: As `overview_folder` gives it.
        slide: The open slide. It is read again if there is no thumbnail or a too small one.
        overview: What to show.
        thumbnail: The slide at a small scale, if it has been read.

    Returns:
        A warning if outlines of that name were edited and therefore not replaced, else an empty text.

    Raises:
        ReadError: The slide cannot be read.
        OSError: The files cannot be written.
    """
    picture = Image.fromarray(draw_overview(thumbnail_to_show(slide, thumbnail), overview, slide.mpp))
    outlines = folder / f"{overview.slide_id}.geojson"
    outlines.parent.mkdir(parents=True, exist_ok=True)
    write_with(folder / f"{overview.slide_id}.jpg", lambda path: picture.save(path, "JPEG", quality=88))
    if outlines.exists() and not _is_ours(outlines):
        return f"{outlines} was edited and is left as it is"
    write_text(outlines, tissue_geojson(overview, slide.level0_size))
    return ""


def tissue_geojson(overview: SlideOverview, level0_size: tuple[int, int]) -> str:
    """A slide's tissue as a GeoJSON document in level-0 pixels, which is the whole slide if there is no mask."""
    if overview.mask is None:
        document = areas_of(np.ones((1, 1), bool), 1.0)
        width, height = level0_size
        corners = [[0, 0], [width, 0], [width, height], [0, height], [0, 0]]
        document["features"][0]["geometry"]["coordinates"] = [corners]
    else:
        document = areas_of(overview.mask, overview.downsample)
    return GENERATOR + json.dumps(document, separators=(",", ":"))[1:]


def thumbnail_to_show(slide: Slide, thumbnail: Thumbnail | None) -> Thumbnail:
    """The thumbnail, or one read again that is large enough to look at but no larger than level 0."""
    if thumbnail is not None and max(thumbnail.image.shape) >= SHORTEST_PX:
        return thumbnail
    return slide.read_thumbnail(Mpp(max(slide.level0_size) * slide.mpp / LONGEST_PX))


def draw_overview(thumbnail: Thumbnail, overview: SlideOverview, slide_mpp: Mpp) -> Rgb:
    """Draw the picture: tissue and patches outlined, the rest paler, a scale bar and two lines of caption.

    Args:
        thumbnail: The slide at a small scale.
        overview: What to show.
        slide_mpp: Micrometers per level-0 pixel.

    Returns:
        uint8 (height, width, 3), the slide at most `LONGEST_PX` long.
    """
    image, downsample = _fitted(thumbnail)
    height, width = image.shape[:2]
    kept = _boxes(overview, downsample)
    shown = _veiled(image, kept)
    _outline_patches(shown, kept)
    if overview.mask is not None:
        _outline_tissue(shown, overview.mask, overview.downsample / downsample)
    canvas = Image.new("RGB", (max(width, NARROWEST_PX), height + CAPTION_PX), "white")
    canvas.paste(Image.fromarray(shown), (0, 0))
    _write_caption(canvas, height, overview, slide_mpp, downsample)
    return np.asarray(canvas)


def _fitted(thumbnail: Thumbnail) -> tuple[Rgb, float]:
    """The thumbnail, shrunk if it is too large, and its level-0 pixels per pixel."""
    shrink = max(1.0, max(thumbnail.image.shape) / LONGEST_PX)
    if shrink == 1:
        return thumbnail.image.copy(), float(thumbnail.downsample)
    height, width = thumbnail.image.shape[:2]
    size = max(1, round(width / shrink)), max(1, round(height / shrink))
    return cv2.resize(thumbnail.image, size, interpolation=cv2.INTER_AREA), thumbnail.downsample * shrink


def _boxes(overview: SlideOverview, downsample: float) -> np.ndarray:
    """Left, top, right and bottom of each kept patch in pixels of the picture, int (n, 4)."""
    low = overview.coords / downsample
    return np.rint(np.hstack([low, low + overview.side / downsample])).astype(int)


def _veiled(image: Rgb, kept: np.ndarray) -> Rgb:
    pale = cv2.addWeighted(image, 1 - EXCLUDED_VEIL, np.full_like(image, 255), EXCLUDED_VEIL, 0)
    for left, top, right, bottom in kept.tolist():
        pale[top:bottom, left:right] = image[top:bottom, left:right]
    return pale


def _outline_patches(image: Rgb, kept: np.ndarray) -> None:
    """Outline the patches. Lines of smaller patches are fainter, so that the tissue stays visible."""
    if not len(kept):
        return
    lines, side = image.copy(), int(kept[0, 2] - kept[0, 0])
    for left, top, right, bottom in kept.tolist():
        cv2.rectangle(lines, (left, top), (right, bottom), PATCH_COLOR, 1 + (side > 60))
    strength = float(np.clip(side / 24, 0.35, 0.9))
    cv2.addWeighted(lines, strength, image, 1 - strength, 0, dst=image)


def _outline_tissue(image: Rgb, mask: Bool[np.ndarray, "mask_height mask_width"], scale: float) -> None:
    """Outline the tissue; `scale` is picture pixels per mask pixel."""
    size = max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale))
    shown = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(shown, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(image, contours, -1, TISSUE_COLOR, max(2, round(max(size) / 400)), cv2.LINE_AA)


def _write_caption(canvas: Image.Image, top: int, overview: SlideOverview, slide_mpp: Mpp, downsample: float) -> None:
    """Write two lines: the slide with its scale bar, and the legend."""
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_PX)
    first, second = top + 10, top + 10 + FONT_PX + 12
    bar_um = _round_length(150 * downsample * slide_mpp)
    bar_px = bar_um / downsample / slide_mpp
    right = canvas.width - 12
    bar_text = f"{bar_um / 1000:g} mm" if bar_um >= 1000 else f"{bar_um:g} um"
    bar_left = right - bar_px
    draw.rectangle((bar_left, first + 9, right, first + 13), fill=TEXT_COLOR)
    text_left = bar_left - 10 - draw.textlength(bar_text, font)
    draw.text((text_left, first), bar_text, TEXT_COLOR, font)
    title = f"{overview.slide_id}   {slide_mpp:.4g} um/px"
    draw.text((12, first), _shortened(title, text_left - 36, draw, font), TEXT_COLOR, font)
    left = _legend(draw, 12, second, f"{len(overview.coords):,} patches kept", PATCH_COLOR, font)
    tissue = f"tissue ({overview.method})" if overview.mask is not None else "no tissue mask: everything counts"
    room = canvas.width - left - 42
    _legend(draw, left, second, _shortened(tissue, room, draw, font), TISSUE_COLOR, font)


def _legend(draw: ImageDraw.ImageDraw, left: float, top: int, text: str, color: tuple[int, ...], font: Font) -> float:
    """Draw a colored frame and its meaning. Returns where the next one may begin."""
    draw.rectangle((left, top + 4, left + 18, top + 20), outline=color, width=3)
    draw.text((left + 28, top), text, TEXT_COLOR, font)
    return left + 28 + draw.textlength(text, font) + 32


def _shortened(text: str, room: float, draw: ImageDraw.ImageDraw, font: Font) -> str:
    """The text, cut off at its beginning until it fits, since the ids of a folder's slides differ at their ends."""
    cut = text
    while draw.textlength(cut, font) > room and len(cut) > 4:
        cut = "..." + cut[4:]
    return cut


def _round_length(at_most_um: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that is not larger."""
    power = 10.0 ** int(np.floor(log10(at_most_um)))
    return max(step * power for step in (1, 2, 5) if step * power <= at_most_um)


def _is_ours(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(len(GENERATOR)) == GENERATOR
