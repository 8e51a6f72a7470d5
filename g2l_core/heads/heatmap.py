"""What a head says of each patch of a slide: as GeoJSON for QuPath, and as a picture over the slide."""

import json
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image, ImageDraw, ImageFont

from g2l_core.types import Coords, Rgb

LONGEST_PX = 1600
"""Maximum of the picture's long side."""
LEGEND_PX = 64
OPACITY = 0.6
COLD, WARM = (59, 76, 192), (180, 4, 38)
"""The ends of a blue-white-red scale that color-blind people can read (Moreland 2009)."""
MIDDLE = (221, 221, 221)


def measurements(
    values: Float64[np.ndarray, "patch class"],
    classes: Sequence[str],
    attention: Float64[np.ndarray, " patch"] | None,
) -> list[dict[str, float]]:
    """Name what is known of each patch, as QuPath shows it in its measurement table.

    Examples:
        >>> measurements(np.array([[0.25, 0.75]]), ["normal", "tumor"], None)
        [{'normal': 0.25, 'tumor': 0.75}]
    """
    named = [
        {name: round(float(value), 6) for name, value in zip(classes, row, strict=True)} for row in values.tolist()
    ]
    if attention is not None:
        for of_patch, weight in zip(named, attention.tolist(), strict=True):
            of_patch["attention"] = float(f"{weight:.6g}")
    return named


def heatmap_geojson(coords: Coords, side: int, measured: Sequence[Mapping[str, float]], name: str) -> str:
    """Write one tile a patch, for QuPath's File, Import objects from file; then Measure, Show measurement maps.

    Args:
        coords: (patch, 2) top-left corners in level-0 pixels.
        side: Of a patch, in level-0 pixels.
        measured: The measurements of each patch, finite.
        name: The name of every object.

    Returns:
        A FeatureCollection. QuPath's own reader takes `objectType` tile and `measurements` as an object of numbers.

    References:
        QuPath 0.4 and later: qupath.lib.io.PathObjectTypeAdapters.
    """
    features = []
    for (x, y), values in zip(coords.tolist(), measured, strict=True):
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "tile", "name": name, "measurements": dict(values)},
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":")) + "\n"


def colors_of(share: Float64[np.ndarray, " patch"]) -> np.ndarray:
    """Colors from blue at 0 over gray to red at 1; uint8 (patch, 3).

    Examples:
        >>> colors_of(np.array([0.0, 0.5, 1.0])).tolist()
        [[59, 76, 192], [221, 221, 221], [180, 4, 38]]
    """
    ends = np.array([COLD, MIDDLE, WARM], np.float64)
    at = np.clip(share, 0, 1) * 2
    low = np.minimum(at.astype(int), 1)
    return np.rint(ends[low] + (at - low)[:, None] * (ends[low + 1] - ends[low])).astype(np.uint8)


def heatmap_picture(
    thumbnail: Rgb,
    downsample: float,
    coords: Coords,
    side: int,
    values: Float64[np.ndarray, " patch"],
    *,
    limits: tuple[float, float],
    caption: str,
) -> UInt8[np.ndarray, "picture_height picture_width 3"]:
    """Draw the patches in colors over the slide, with a scale and a caption below.

    Args:
        thumbnail: The slide, uint8 (height, width, 3).
        downsample: Level-0 pixels per pixel of the thumbnail.
        coords: (patch, 2) top-left corners in level-0 pixels.
        side: Of a patch, in level-0 pixels.
        values: (patch,) what is drawn.
        limits: The values of the scale's blue and red ends.
        caption: One line.

    Returns:
        uint8 (height, width, 3), at most `LONGEST_PX` long beside the caption.
    """
    shrink = max(1.0, max(thumbnail.shape[:2]) / LONGEST_PX)
    height, width = (max(1, round(n / shrink)) for n in thumbnail.shape[:2])
    image = cv2.resize(thumbnail, (width, height), interpolation=cv2.INTER_AREA) if shrink > 1 else thumbnail.copy()
    scale = 1 / (downsample * shrink)
    span = limits[1] - limits[0]
    colors = colors_of((values - limits[0]) / span if span else np.full(len(values), 0.5))
    painted = image.copy()
    low = np.floor(coords * scale).astype(int)
    high = np.maximum(np.floor((coords + side) * scale).astype(int), low + 1)
    for (left, top), (right, bottom), color in zip(low.tolist(), high.tolist(), colors.tolist(), strict=True):
        painted[top:bottom, left:right] = color
    image = cv2.addWeighted(painted, OPACITY, image, 1 - OPACITY, 0)
    canvas = Image.new("RGB", (max(width, 480), height + LEGEND_PX), "white")
    canvas.paste(Image.fromarray(image), (0, 0))
    _draw_legend(canvas, height, limits, caption)
    return np.asarray(canvas)


def _draw_legend(canvas: Image.Image, top: int, limits: tuple[float, float], caption: str) -> None:
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    bar = np.tile(colors_of(np.linspace(0, 1, 160))[None], (14, 1, 1))
    left = 12 + int(draw.textlength(f"{limits[0]:.2g}", font=font)) + 8
    draw.text((12, top + 8), f"{limits[0]:.2g}", fill=(40, 40, 40), font=font)
    canvas.paste(Image.fromarray(bar), (left, top + 11))
    draw.text((left + 168, top + 8), f"{limits[1]:.2g}", fill=(40, 40, 40), font=font)
    draw.text((12, top + 34), _fitting(draw, caption, font, canvas.width - 24), fill=(40, 40, 40), font=font)


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: object, width: int) -> str:
    """The text, shortened with three dots to a width in pixels."""
    if draw.textlength(text, font=font) <= width:  # type: ignore[arg-type]
        return text
    while text and draw.textlength(text + "...", font=font) > width:  # type: ignore[arg-type]
        text = text[:-1]
    return text + "..."
