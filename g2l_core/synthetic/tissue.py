"""Draw one H&E-like field of tissue with three classes that differ in texture but not in color.

A drawing has this order: a layout (tissue blob, regions, their class) at `MAP_UM`; the cytoplasm and the fibers at
`GROUND_UM`; the nuclei at the slide's own mpp; then Beer-Lambert absorption, the scanner's blur and its noise.
Lengths are in micrometers. Stain densities are natural-log optical densities.
"""

from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt8

from g2l_core.types import Rgb

CLASSES = ("stroma", "tumor", "lymphoid")
"""Class `CLASSES[i]` is `i + 1` in a class map; 0 is glass."""

MAP_UM = 4.0
"""Micrometers per pixel of a class map."""

GROUND_UM = 0.5
"""Micrometers per pixel at which fibers and cytoplasm are drawn. No detail of them is finer than 1 um."""

REGION_UM2 = 0.27e6
"""Wanted area of one region. It is about 520 um wide, so that most patches of 128 um are in one class."""

DENSITY_UNIT = 0.01
"""Density of one gray level in the drawings, which have 8 bits because OpenCV needs that for smooth edges."""

# Each region draws its own values from these ranges. They overlap between classes on purpose, so that a good ImageNet
# encoder solves the task nearly but not wholly.
TUMOR_RADIUS = (3.4, 5.2)
"""Mean radius of the tumor's nuclei, um."""
LYMPHOCYTE_RADIUS = (2.6, 3.4)
SEPTA = (1.2, 4.5)
"""Width of the bands between the tumor's nests, without a unit."""
CROWD = (0.6, 0.95)
"""Fraction of the lattice that lymphocytes fill in lymphoid tissue."""
STRAYS = (0.01, 0.3)
"""The same fraction in other tissue: inflamed stroma, infiltrated tumor."""

NOISE = 2.0
"""Standard deviation of the scanner's noise before its blur, in gray levels."""

STRIP = 256
"""Number of rows that are exposed at once."""

Plane: TypeAlias = Float32[np.ndarray, "height width"]
GroundPlane: TypeAlias = Float32[np.ndarray, "ground_height ground_width"]
ClassMap: TypeAlias = UInt8[np.ndarray, "map_height map_width"]
Points: TypeAlias = Float[np.ndarray, "point 2"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """How one laboratory stains and scans, which must not decide the class."""

    hematoxylin: tuple[float, float, float]
    """Absorption of red, green and blue for a unit of stain."""
    eosin: tuple[float, float, float]
    strength: tuple[float, float]
    """Factor on the hematoxylin and on the eosin density."""
    glass: tuple[float, float, float]
    """Gray levels of empty glass."""
    blur_um: float
    """Standard deviation of the scanner's point spread."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where tissue and regions are, at `MAP_UM`."""

    tissue: Bool[np.ndarray, "height width"]
    regions: Int32[np.ndarray, "height width"]
    """The index of the region, also on glass."""
    region_class: Int32[np.ndarray, " region"]
    """Class of each region, 1 .. len(CLASSES)."""

    @property
    def classes(self) -> ClassMap:
        """The class map: 0 on glass, else `CLASSES` index + 1."""
        return np.where(self.tissue, self.region_class[self.regions], 0).astype(np.uint8)

    def at(self, points: Points, values: Float[np.ndarray, " region"]) -> Float[np.ndarray, " point"]:
        """The value of the region in which each point (um) lies."""
        column, row = (points / MAP_UM).astype(int).T
        return values[self.regions[row, column]]

    def share(self, class_index: int) -> Plane:
        """1 on the tissue of a class, else 0."""
        return (self.classes == class_index).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Smooth closed outlines (nuclei, cell bodies): one row each, in micrometers from the slide's corner."""

    center: Points
    radii: Points
    """Half axes."""
    angle: Float[np.ndarray, " point"]
    roughness: float
    """Standard deviation of the outline's relative bumps."""


# ---- noise ------------------------------------------------------------------------------------------------


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale_px: float) -> Plane:
    """Gaussian noise that varies over about `scale_px` pixels.

    Args:
        rng: Advanced.
        shape: Height and width in pixels.
        scale_px: Distance of the random knots, between which the noise is a cubic.

    Returns:
        float32 (height, width), mean about 0, standard deviation about 1.
    """
    height, width = shape
    knots = rng.standard_normal((int(height / scale_px) + 4, int(width / scale_px) + 4), dtype=np.float32)
    knots /= np.float32(0.87)  # the cubic between independent knots has 0.87 of their deviation (measured)
    size = (round(knots.shape[1] * scale_px), round(knots.shape[0] * scale_px))
    offset = round(1.5 * scale_px)
    fine = cv2.resize(knots, size, interpolation=cv2.INTER_CUBIC)
    return fine[offset : offset + height, offset : offset + width]


def _grid(shape: tuple[int, int], step_um: float) -> tuple[Plane, Plane]:
    """The pixel centers in micrometers, x and y."""
    y, x = ((np.arange(side, dtype=np.float32) + np.float32(0.5)) * np.float32(step_um) for side in shape)
    return np.broadcast_to(x, shape), np.broadcast_to(y[:, None], shape)


# ---- layout -----------------------------------------------------------------------------------------------


def draw_layout(rng: np.random.Generator, size_um: tuple[float, float]) -> Layout:
    """Draw an irregular piece of tissue and divides it into regions of one class each.

    Args:
        rng: Advanced.
        size_um: Width and height of the slide.

    Returns:
        The layout at `MAP_UM`, each class on a third of the regions (to within one region).
    """
    shape = (round(size_um[1] / MAP_UM), round(size_um[0] / MAP_UM))
    count = max(len(CLASSES), round(size_um[0] * size_um[1] / REGION_UM2))
    x, y = _grid(shape, MAP_UM)
    x, y = (axis + 30 * smooth_noise(rng, shape, 25.0) + 10 * smooth_noise(rng, shape, 7.0) for axis in (x, y))
    sites = _spread_points(rng, count, size_um)
    distance = np.stack([(x - sx) ** 2 + (y - sy) ** 2 for sx, sy in sites])
    classes = rng.permutation(np.arange(count) + rng.integers(len(CLASSES))) % len(CLASSES) + 1
    return Layout(
        tissue=_blob(rng, shape),
        regions=distance.argmin(0).astype(np.int32),
        region_class=classes.astype(np.int32),
    )


def _spread_points(rng: np.random.Generator, count: int, size_um: tuple[float, float]) -> Points:
    """Points far from each other. Each is the best of 30 candidates (Mitchell, SIGGRAPH 1991)."""
    points = rng.uniform(0.1, 0.9, (1, 2)) * size_um
    while len(points) < count:
        candidates = rng.uniform(0.1, 0.9, (30, 2)) * size_um
        nearest = np.linalg.norm(candidates[:, None] - points, axis=2).min(1)
        points = np.vstack([points, candidates[nearest.argmax()]])
    return points


def _blob(rng: np.random.Generator, shape: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """A rounded rectangle with a frayed edge, a few tears, and glass all around."""
    x, y = (2 * axis / axis.max() - 1 for axis in _grid(shape, 1.0))
    outline = 0.62 - np.abs(x) ** 3 - np.abs(y) ** 3
    fray = 0.16 * smooth_noise(rng, shape, 30.0) + 0.05 * smooth_noise(rng, shape, 8.0)
    tears = smooth_noise(rng, shape, 14.0) > 2.3
    margin = np.maximum(np.abs(x), np.abs(y)) > 0.96
    return (outline + fray > 0) & ~tears & ~margin


# ---- fibers and cytoplasm ---------------------------------------------------------------------------------


def _fiber_coordinates(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Plane, Plane]:
    """Micrometers across and along bent, wavy fibers."""
    x, y = _grid(shape, GROUND_UM)
    bend = 130 / GROUND_UM
    x, y = (axis + 40 * smooth_noise(rng, shape, bend) for axis in (x, y))
    turn = rng.uniform(0, np.pi)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    along = x * sin - y * cos
    wave = np.sin(along / np.float32(6.5) + 2 * smooth_noise(rng, shape, 60 / GROUND_UM))
    return x * cos + y * sin + np.float32(1.6) * wave, along


def _streaks(rng: np.random.Generator, across: Plane, along: Plane, width_um: float, length_um: float) -> Plane:
    """Noise drawn out along the fibers, standard deviation about 1: a stretched texture, looked up."""
    texture = rng.standard_normal((768, 1024), dtype=np.float32)
    stretched: Plane = cv2.GaussianBlur(texture, (0, 0), sigmaX=6, sigmaY=1.5)
    stretched /= stretched.std()
    u, v = along * np.float32(6 / length_um), across * np.float32(1.5 / width_um)
    return cv2.remap(stretched, u + 300, v + 300, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def _collagen(rng: np.random.Generator, across: Plane, along: Plane) -> Plane:
    """Density of fibrous ground, mean about 1: bundles of fibers, with pale clefts between some."""
    fibers = 1 + 0.22 * _streaks(rng, across, along, 0.7, 14.0) + 0.16 * _streaks(rng, across, along, 2.2, 40.0)
    bundles = _streaks(rng, across, along, 3.0, 30.0)
    clefts = np.clip((bundles - np.float32(1.1)) * 2.5, 0, 0.9)
    return np.maximum(fibers, np.float32(0.3)) * (1 - clefts)


def _septa(rng: np.random.Generator, shape: tuple[int, int], layout: Layout) -> Plane:
    """1 in the fibrous bands between the nests of a tumor, else 0, with soft edges. Each region has its own width."""
    level = smooth_noise(rng, shape, 110 / GROUND_UM)
    width = rng.uniform(*SEPTA, len(layout.region_class))
    return np.clip(_spread(layout, width, shape) - np.abs(level) * 11, 0, 1)


def _spread(layout: Layout, values: Float[np.ndarray, " region"], shape: tuple[int, int]) -> Plane:
    """A plane of each region's value, blended over some 40 um where regions meet."""
    plane = cv2.GaussianBlur(values.astype(np.float32)[layout.regions], (0, 0), 3)
    return _enlarge(plane, shape)


def _enlarge(plane: Plane, shape: tuple[int, int]) -> Float32[np.ndarray, "new_height new_width"]:
    height, width = shape
    return cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR)


def _grain(rng: np.random.Generator, shape: tuple[int, int], scale_um: float, amount: float) -> Plane:
    """Granular ground of mean 1."""
    return 1 + np.float32(amount) * smooth_noise(rng, shape, scale_um / GROUND_UM)


# ---- cells ------------------------------------------------------------------------------------------------


def _scatter(
    rng: np.random.Generator, keep: Float[np.ndarray, "height width"], spacing_um: float, jitter: float
) -> Points:
    """A disturbed hexagonal lattice, each point kept with the probability that `keep` (at `MAP_UM`) gives it."""
    height, width = (side * MAP_UM for side in keep.shape)
    rows, columns = int(height / (0.866 * spacing_um)), int(width / spacing_um)
    j, i = np.indices((rows, columns)).reshape(2, -1)
    points = np.stack([(i + 0.5 * (j % 2)) * spacing_um, j * 0.866 * spacing_um], 1)
    points += rng.normal(0, jitter * spacing_um, points.shape)
    inside = (points >= 0).all(1) & (points < (width, height)).all(1)
    points = points[inside]
    column, row = (points / MAP_UM).astype(int).T
    return points[rng.random(len(points)) < keep[row, column]]


def _outlines(rng: np.random.Generator, shapes: Shapes, mpp: float) -> Int32[np.ndarray, "point vertex 2"]:
    """Polygons in 1/8 pixels: ellipses whose radius is modulated by harmonics 2 to 4 with random phases."""
    turn = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    phase = rng.uniform(0, 2 * np.pi, (len(shapes.center), 3, 1))
    bumps = rng.normal(0, shapes.roughness, phase.shape) * np.cos(np.array([[[2], [3], [4]]]) * turn + phase)
    radius = 1 + bumps.sum(1)
    x, y = radius * np.cos(turn) * shapes.radii[:, :1], radius * np.sin(turn) * shapes.radii[:, 1:]
    cos, sin = np.cos(shapes.angle)[:, None], np.sin(shapes.angle)[:, None]
    outline = shapes.center[:, None] + np.stack([x * cos - y * sin, x * sin + y * cos], 2)
    return np.rint((outline / mpp - 0.5) * 8).astype(np.int32)


def _fill(
    canvas: UInt8[np.ndarray, "height width"],
    outlines: Int32[np.ndarray, "point vertex 2"],
    density: Float[np.ndarray, " point"],
) -> None:
    """Fill each outline with its density, in place, with smooth edges."""
    for outline, level in zip(outlines, np.clip(density / DENSITY_UNIT, 0, 255), strict=True):
        cv2.fillPoly(canvas, [outline], float(level), cv2.LINE_AA, 3)


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The drawings of the nuclei, at the slide's mpp, and of the cell bodies, at `GROUND_UM`."""

    mpp: float
    nuclei: UInt8[np.ndarray, "height width"]
    """Hematoxylin density of the nuclei, in `DENSITY_UNIT`."""
    bodies: UInt8[np.ndarray, "ground_height ground_width"]
    """Relative eosin density of the tumor's cell bodies, in `DENSITY_UNIT`; pale between them."""

    def nucleus(self, rng: np.random.Generator, shapes: Shapes, density: Float[np.ndarray, " point"]) -> None:
        """Add filled outlines to the nuclei."""
        _fill(self.nuclei, _outlines(rng, shapes, self.mpp), density)

    def body(self, rng: np.random.Generator, shapes: Shapes, density: Float[np.ndarray, " point"]) -> None:
        """Add filled outlines to the cell bodies."""
        _fill(self.bodies, _outlines(rng, shapes, GROUND_UM), density)


def _draw_lymphocytes(
    rng: np.random.Generator, canvas: Canvas, center: Points, size: Float[np.ndarray, " point"]
) -> None:
    """Small round nuclei with clumped, dark chromatin."""
    n = len(center)
    radii = size[:, None] * rng.normal(1, 0.09, (n, 1)) * rng.normal(1, 0.05, (n, 2))
    shapes = Shapes(center=center, radii=radii, angle=rng.uniform(0, np.pi, n), roughness=0.02)
    canvas.nucleus(rng, shapes, rng.normal(1.25, 0.16, n))


def _draw_spindles(
    rng: np.random.Generator, canvas: Canvas, center: Points, across: Float[np.ndarray, "height width"]
) -> None:
    """Long thin nuclei that lie along the fibers, the level lines of `across`."""
    n = len(center)
    row, column = np.clip(center[:, ::-1] / GROUND_UM, 4, np.array(across.shape) - 5).astype(int).T
    slope_x = across[row, column + 4] - across[row, column - 4]
    slope_y = across[row + 4, column] - across[row - 4, column]
    angle = np.arctan2(slope_x, -slope_y) + rng.normal(0, 0.12, n)
    radii = np.stack([rng.normal(6.5, 1.3, n), rng.normal(1.5, 0.3, n)], 1).clip(0.8)
    shapes = Shapes(center=center, radii=radii, angle=angle, roughness=0.04)
    canvas.nucleus(rng, shapes, rng.normal(1.2, 0.2, n))


def _draw_tumor_cells(
    rng: np.random.Generator, canvas: Canvas, center: Points, size: Float[np.ndarray, " point"]
) -> None:
    """Cell bodies with a pale halo; large uneven nuclei with a dark membrane, clear inside, with nucleoli."""
    n = len(center)
    angle = rng.uniform(0, np.pi, n)
    size = size[:, None] * rng.lognormal(0, 0.2, (n, 1))
    radii = size * np.exp(rng.normal(0, 0.14, (n, 1)) * [1, -1])

    def scaled(factor: float, rough: float) -> Shapes:
        return Shapes(center=center, radii=radii * factor, angle=angle, roughness=rough)

    bodies = Shapes(center=center, radii=4 + 0.85 * radii, angle=angle, roughness=0.06)
    canvas.body(rng, bodies, rng.normal(1.15, 0.14, n))
    canvas.body(rng, scaled(1.22, 0.04), np.full(n, 0.55))
    # The membrane and the clear inside must share their outline, so they share its random numbers.
    seed = rng.integers(2**63)
    density = rng.normal(0.95, 0.22, n).clip(0.45)
    canvas.nucleus(np.random.default_rng(seed), scaled(1.0, 0.06), density * 1.25)
    canvas.nucleus(np.random.default_rng(seed), scaled(0.82, 0.06), density * rng.uniform(0.55, 0.95, n))
    for _ in range(2):
        _draw_nucleoli(rng, canvas, center + rng.normal(0, 0.3, (n, 2)) * size, density)


def _draw_nucleoli(
    rng: np.random.Generator, canvas: Canvas, center: Points, density: Float[np.ndarray, " point"]
) -> None:
    """A dark dot in seven of ten nuclei."""
    some = rng.random(len(center)) < 0.7
    n = int(some.sum())
    radii = np.repeat(rng.normal(1.0, 0.25, (n, 1)).clip(0.4), 2, axis=1)
    shapes = Shapes(center=center[some], radii=radii, angle=np.zeros(n), roughness=0.05)
    canvas.nucleus(rng, shapes, density[some] + 0.9)


def _draw_cells(rng: np.random.Generator, canvas: Canvas, layout: Layout, across: Plane, septa: Plane) -> None:
    """Every class's own cells, and a few strays of lymphocytes and fibroblasts in the others."""
    stroma, tumor, lymphoid = (layout.share(index + 1) for index in range(len(CLASSES)))
    count = len(layout.region_class)
    height, width = layout.regions.shape
    bands = cv2.resize(septa, (width, height), interpolation=cv2.INTER_AREA)

    points = _scatter(rng, tumor * (bands < 0.4) * 0.95, 14.0, 0.17)
    _draw_tumor_cells(rng, canvas, points, layout.at(points, rng.uniform(*TUMOR_RADIUS, count)))
    points = _scatter(rng, (stroma + tumor * bands) * 0.7, 21.0, 0.3)
    _draw_spindles(rng, canvas, points, across)
    crowd = lymphoid * rng.uniform(*CROWD, count)[layout.regions]
    strays = (stroma + tumor) * rng.uniform(*STRAYS, count)[layout.regions]
    points = _scatter(rng, crowd + strays, 7.4, 0.15)
    _draw_lymphocytes(rng, canvas, points, layout.at(points, rng.uniform(*LYMPHOCYTE_RADIUS, count)))


# ---- the whole field --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stains:
    """Densities of the two stains."""

    hematoxylin: Plane
    eosin: Plane


def _ground(
    rng: np.random.Generator, layout: Layout, bodies: UInt8[np.ndarray, "height width"], collagen: Plane, septa: Plane
) -> Stains:
    """Fibers and cytoplasm without nuclei, each of mean about 1 inside its class, 0 on glass."""
    shape = collagen.shape
    stroma, tumor, lymphoid = (
        _enlarge(cv2.GaussianBlur(layout.share(index + 1), (0, 0), 0.8), shape) for index in range(len(CLASSES))
    )
    tissue = np.clip((stroma + tumor + lymphoid - 0.5) * 8 + 0.5, 0, 1)
    cytoplasm = bodies.astype(np.float32) * np.float32(DENSITY_UNIT) * _grain(rng, shape, 1.5, 0.1)
    nests = septa * collagen + (1 - septa) * cytoplasm
    reticulum = _grain(rng, shape, 2.5, 0.2) * _grain(rng, shape, 25.0, 0.12)
    eosin = tissue * (stroma * collagen + tumor * nests + lymphoid * reticulum)
    return Stains(hematoxylin=eosin * _grain(rng, shape, 5.0, 0.12), eosin=eosin * _grain(rng, shape, 60.0, 0.08))


def _region_means(layout: Layout, plane: Float[np.ndarray, "height width"]) -> Float[np.ndarray, " region"]:
    """Mean over each region's tissue of a plane of any finer scale."""
    height, width = layout.regions.shape
    small = cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA)
    index, count = layout.regions[layout.tissue], len(layout.region_class)
    area = np.bincount(index, minlength=count).clip(1)
    return np.bincount(index, small[layout.tissue], count) / area


def _balance(rng: np.random.Generator, layout: Layout, nuclei: Plane, ground: Stains) -> tuple[GroundPlane, Stains]:
    """Give each region mean densities that do not depend on its class, so that color does not show the class.

    The nuclei give as much of a region's wanted hematoxylin as they can, at most 85 %, and the ground gives the rest.

    Returns:
        The factor on the nuclei's density, at the ground's scale, and the ground with its final densities.
    """
    count = len(layout.region_class)
    blue, pink = rng.uniform(0.38, 0.64, count), rng.uniform(0.40, 0.75, count)
    have = _region_means(layout, nuclei).clip(1e-3)
    gain = np.minimum(rng.uniform(0.85, 1.25, count), 0.85 * blue / have)
    rest = (blue - gain * have) / _region_means(layout, ground.hematoxylin).clip(0.1)
    tint = pink / _region_means(layout, ground.eosin).clip(0.1)
    shape = ground.eosin.shape
    return _spread(layout, gain, shape), Stains(
        hematoxylin=ground.hematoxylin * _spread(layout, rest, shape),
        eosin=ground.eosin * _spread(layout, tint, shape),
    )


def _expose(rng: np.random.Generator, stains: Stains, look: Look, mpp: float) -> Rgb:
    """Light through stained tissue: glass * exp(-sum of densities) (Beer-Lambert), then the scanner.

    The noise is blurred with the image, as a scanner's own denoising leaves it.
    """
    absorbed = np.array([look.hematoxylin, look.eosin]).T * look.strength
    # The glass enters as one more density, so that one matrix gives the exponents of all three channels.
    exponents = np.column_stack([-absorbed, np.log(look.glass)]).astype(np.float32)
    image = np.empty((*stains.eosin.shape, 3), np.uint8)
    noise = rng.standard_normal((STRIP, image.shape[1] + STRIP, 1), dtype=np.float32) * np.float32(NOISE)
    for top in range(0, len(image), STRIP):  # in strips, so that a large slide needs little memory
        rows = slice(top, top + STRIP)
        light: Float32[np.ndarray, "rows width 3"] = cv2.exp(
            cv2.transform(cv2.merge((stains.hematoxylin[rows], stains.eosin[rows])), exponents)
        )
        shift = int(rng.integers(STRIP))
        light += noise[: len(light), shift : shift + image.shape[1]]
        image[rows] = cv2.convertScaleAbs(light)
    return cv2.GaussianBlur(image, (0, 0), look.blur_um / mpp)


def draw_field(rng: np.random.Generator, size_um: tuple[float, float], mpp: float, look: Look) -> tuple[Rgb, ClassMap]:
    """Draw the tissue of one slide.

    Args:
        rng: Advanced. The same state gives the same pixels.
        size_um: Width and height; multiples of `MAP_UM`, which is a multiple of `mpp`.
        mpp: Micrometers per pixel of the image.
        look: Stain and scanner.

    Returns:
        The uint8 RGB image, and its class map at `MAP_UM` (0 glass, else `CLASSES` index + 1).
    """
    width, height = size_um
    ground_shape = (round(height / GROUND_UM), round(width / GROUND_UM))
    shape = (round(height / mpp), round(width / mpp))
    layout = draw_layout(rng, size_um)
    across, along = _fiber_coordinates(rng, ground_shape)
    septa = _septa(rng, ground_shape, layout)
    canvas = Canvas(mpp=mpp, nuclei=np.zeros(shape, np.uint8), bodies=np.full(ground_shape, 40, np.uint8))
    _draw_cells(rng, canvas, layout, across, septa)
    ground = _ground(rng, layout, canvas.bodies, _collagen(rng, across, along), septa)
    nuclei = canvas.nuclei.astype(np.float32) * np.float32(DENSITY_UNIT)
    gain, ground = _balance(rng, layout, nuclei, ground)
    gain *= _grain(rng, ground_shape, 0.9, 0.16)  # chromatin
    stains = Stains(
        hematoxylin=_enlarge(ground.hematoxylin, shape) + nuclei * _enlarge(gain, shape),
        eosin=_enlarge(ground.eosin, shape),
    )
    return _expose(rng, stains, look, mpp), layout.classes
