"""Micrometers per level-0 pixel: where a slide's value comes from, and whether the values of a cohort can be true.

Property names and units are those of OpenSlide 4.0.1 (its `src/openslide-vendor-*.c`). OpenSlide copies most of
them to `openslide.mpp-x` and `-y` itself; they are looked up again for older builds and for other readers.
"""

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median

from g2l_core.errors import MppError
from g2l_core.types import Mpp

PLAUSIBLE_MPP = (0.05, 20.0)
"""A value outside this range is a mistake: a resolution tag of 72 dpi means 353 um/px."""

SLIDE_MPP = (0.1, 1.2)
"""Scans of pathology slides lie in this range, 100x to 8x. A value outside of it is doubtful."""

SQUARE_TO = 0.01
"""Maximum relative difference of um/px in x and y at which pixels still count as square."""

CLOSE, FAR = 1.25, 1.6
"""Two values agree if they differ by at most the first factor (scanners call 0.22 to 0.27 um/px 40x). They contradict
each other from the second factor on, which is below the 2 between neighboring magnifications."""

TOLD = 0.02
"""Relative difference of a manifest's scale from the header's up to which it is that of rounding: 0.25 for 0.2525."""

MAJORITY_SHARE, MAJORITY_SLIDES = 0.8, 5
"""A cohort has one scale if it has at least this number of slides and this fraction of them agree."""

LENS_VENDORS = frozenset({"mirax", "zeiss"})
"""Their objective power is that of the lens only. Camera adapters magnify further (0.23 um/px at 20x), so it does not
determine the scale."""

SHOWN_FINDINGS = 20
_BESIDE = " (header: "
TABLE_WIDTH = 80

_OPENSLIDE = "openslide.mpp-x", "openslide.mpp-y"
_MIRAX = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_"
_DICOM = "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing"
_PHILIPS = "philips.DICOM_PIXEL_SPACING"
_HAMAMATSU = "hamamatsu.PhysicalWidth", "hamamatsu.PhysicalHeight"
_TIFF = "tiff.XResolution", "tiff.YResolution"
_OME = "ome.PhysicalSizeX", "ome.PhysicalSizeY"

_UM_PER_UNIT = (
    (*_OPENSLIDE, 1.0),
    ("aperio.MPP", "aperio.MPP", 1.0),
    (f"{_MIRAX}X", f"{_MIRAX}Y", 1.0),
    ("ventana.ScanRes", "ventana.ScanRes", 1.0),
    ("sakura.ResolutionMmPerPix", "sakura.ResolutionMmPerPix", 1e3),
    ("zeiss.Scaling.Items.X.Value", "zeiss.Scaling.Items.Y.Value", 1e6),
    (f"{_DICOM}[1]", f"{_DICOM}[0]", 1e3),  # rows come first
)
"""Keys of x and y whose text is one number, and the micrometers in its unit; in the order of trust."""

_UM_PER_TIFF_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0}

_UM_PER_OME_UNIT = {"\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
"""The units of length of OME-XML that a slide may have; its pixel and reference frame are no lengths."""

KEYS = (*(x for x, _, _ in _UM_PER_UNIT), _PHILIPS, _HAMAMATSU[0], _OME[0], _TIFF[0])
"""The keys that are looked for; of a pair, the key of x."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Micrometers per level-0 pixel, and where they come from."""

    mpp_x: float
    mpp_y: float
    source: str
    """"header: KEY", "manifest", "manifest (header: UM_PER_PX)" where the two differ, or "override"."""
    header: "Scale | None" = None
    """The header's scale, where the manifest's takes its place."""

    @property
    def mpp(self) -> Mpp:
        """The mean of x and y."""
        return Mpp((self.mpp_x + self.mpp_y) / 2)


@dataclass(frozen=True, kw_only=True)
class ScaleFacts:
    """What is known of one slide's scale without reading a pixel."""

    slide_id: str
    scale: Scale
    objective_power: float | None
    """Nominal magnification of the scan. None where the header gives none, or only that of the lens."""
    manifest_mpp: float | None
    level0_size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ScaleFinding:
    """A slide whose scale is doubtful, and the reasons."""

    slide_id: str
    reasons: tuple[str, ...]


def find_scale(
    properties: Mapping[str, str],
    level0_size: tuple[int, int],
    *,
    manifest_mpp: float | None = None,
    mpp_override: float | None = None,
) -> Scale:
    """A slide's scale: from the manifest, else from the header, else from the override.

    If manifest and header differ by no more than `TOLD` and the header's pixels are square, the header's value is used,
    as it has more digits. A header's value outside `PLAUSIBLE_MPP` is ignored.

    Args:
        properties: The header, under OpenSlide's names.
        level0_size: Width and height in level-0 pixels.
        manifest_mpp: Micrometers per level-0 pixel.
        mpp_override: The same, for slides where neither header nor manifest gives one.

    Raises:
        MppError: No source gives a scale, or the one of the manifest or of the override is not plausible.
    """
    header, implausible = _header_scale(properties, level0_size)
    if header is not None and (manifest_mpp is None or (_is_square(header) and not differs(header.mpp, manifest_mpp))):
        return header
    for value, source in ((manifest_mpp, "manifest"), (mpp_override, "override")):
        if value is None:
            continue
        if not _is_plausible(value):
            raise MppError(f"its {source} gives {value:g} um/px, outside {_describe_range(PLAUSIBLE_MPP)}")
        if header is not None and differs(header.mpp, value):
            source = f"{source}{_BESIDE}{header.mpp:.4g})"
        return Scale(mpp_x=float(value), mpp_y=float(value), source=source, header=header)
    remedy = "give them with --mpp-override UM_PER_PX or in the manifest's column mpp"
    if implausible:
        raise MppError(f"{implausible}: {remedy}")
    raise MppError(f"its header has no micrometers per pixel: {remedy} (looked for {', '.join(KEYS)})")


def objective_power(properties: Mapping[str, str]) -> float | None:
    """The scan's nominal magnification; None where the header gives none that determines the scale."""
    if properties.get("openslide.vendor") in LENS_VENDORS:
        return None
    return _number(properties.get("openslide.objective-power"))


def differs(mpp: float, reference: float) -> bool:
    """Whether two scales differ by more than rounding explains."""
    return abs(mpp - reference) > TOLD * reference + 1e-9


def _header_scale(properties: Mapping[str, str], level0_size: tuple[int, int]) -> tuple[Scale | None, str]:
    """The first plausible scale of the header; or none, and what is wrong with the first one that it gives."""
    implausible = ""
    for key, x, y in _header_values(properties, level0_size):
        if _is_plausible(x) and _is_plausible(y):
            return Scale(mpp_x=x, mpp_y=y, source=f"header: {key}"), ""
        mean = (x + y) / 2
        implausible = (
            implausible or f"its header's {key} gives {mean:g} um/px, outside {_describe_range(PLAUSIBLE_MPP)}"
        )
    return None, implausible or _no_length(properties)


def _no_length(properties: Mapping[str, str]) -> str:
    """What is wrong with the unit of OME-XML's scale; empty if it has none, or a length."""
    units = {properties.get(f"{key}Unit", "\u00b5m") for key in _OME if key in properties}
    if unknown := sorted(units - _UM_PER_OME_UNIT.keys()):
        return f"its header's {_OME[0]} is given in {unknown[0]!r}, not in \u00b5m, nm, mm, cm or m"
    return ""


def _header_values(properties: Mapping[str, str], level0_size: tuple[int, int]) -> Iterator[tuple[str, float, float]]:
    """Every scale that a header gives as (key of x, um/px in x, um/px in y), in the order of trust."""
    for key_x, key_y, um in _UM_PER_UNIT:
        x, y = _number(properties.get(key_x)), _number(properties.get(key_y))
        if x is not None and y is not None:
            yield key_x, x * um, y * um
    spacing = [_number(text) for text in re.findall(r"[^\s\"]+", properties.get(_PHILIPS, ""))]
    if len(spacing) == 2 and spacing[0] is not None and spacing[1] is not None:
        yield _PHILIPS, spacing[1] * 1e3, spacing[0] * 1e3  # millimeters, rows first
    width, height = (_number(properties.get(key)) for key in _HAMAMATSU)
    if width is not None and height is not None:
        yield _HAMAMATSU[0], width / 1e3 / level0_size[0], height / 1e3 / level0_size[1]  # nanometers, the whole slide
    sizes = [_number(properties.get(key)) for key in _OME]
    units = [_UM_PER_OME_UNIT.get(properties.get(f"{key}Unit", "\u00b5m")) for key in _OME]
    if sizes[0] is not None and units[0] is not None and sizes[1] is not None and units[1] is not None:
        yield _OME[0], sizes[0] * units[0], sizes[1] * units[1]
    across, down = (_number(properties.get(key)) for key in _TIFF)
    if across is not None and down is not None:
        um_per_unit = _UM_PER_TIFF_UNIT.get(properties.get("tiff.ResolutionUnit", "inch"))
        if properties.get("openslide.vendor") == "trestle":
            yield _TIFF[0], across, down  # um/px, against the TIFF specification
        elif um_per_unit is not None:
            yield _TIFF[0], um_per_unit / across, um_per_unit / down


def _number(text: str | None) -> float | None:
    """The positive number that a text is, or None. Decimal commas come from the locales of scanners."""
    try:
        value = float((text or "").replace(",", "."))
    except ValueError:
        return None
    return value if isfinite(value) and value > 0 else None


def _is_plausible(mpp: float) -> bool:
    return PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]


def _describe_range(limits: tuple[float, float]) -> str:
    return f"the plausible range {limits[0]:g} to {limits[1]:g}"


def _is_square(scale: Scale) -> bool:
    return abs(scale.mpp_x - scale.mpp_y) <= SQUARE_TO * max(scale.mpp_x, scale.mpp_y)


def _factor(a: float, b: float) -> float:
    """The factor by which two values differ, at least 1."""
    return max(a / b, b / a)


# ---- the audit ----------------------------------------------------------------------------------------------


def audit_scale(facts: Sequence[ScaleFacts]) -> list[ScaleFinding]:
    """Find the slides whose scale is doubtful: by itself, against the manifest, or against the rest of the cohort.

    If a manifest's scale is beyond `CLOSE` of a header's that is not doubtful by itself, one of them is wrong. A slide
    that differs from the others is not flagged if its own objective power agrees with its scale. No slide is
    flagged if its header and the manifest agree.
    """
    majority = _majority(facts)
    audited = ((fact, _reasons(fact, majority)) for fact in facts)
    return [ScaleFinding(slide_id=fact.slide_id, reasons=tuple(reasons)) for fact, reasons in audited if reasons]


def doubts(scale: Scale, power: float | None) -> list[str]:
    """Why a scale is doubtful by itself: pixels not square, a value unusual for slides, or its objective power.

    The objective's nominal scale is 10 / power um/px: 0.25 at 40x, 0.5 at 20x.
    """
    reasons = []
    if not _is_square(scale):
        reasons.append(f"{scale.mpp_x:g} um/px across but {scale.mpp_y:g} um/px down: pixels are not square")
    if not SLIDE_MPP[0] <= scale.mpp <= SLIDE_MPP[1]:
        reasons.append(f"outside the {SLIDE_MPP[0]:g} to {SLIDE_MPP[1]:g} um/px of slides")
    if power is not None and _factor(scale.mpp, 10 / power) >= FAR:
        reasons.append(f"{_times(scale.mpp, 10 / power)} the {10 / power:g} um/px of its objective, {power:g}x")
    return reasons


def _reasons(fact: ScaleFacts, majority: float | None) -> list[str]:
    mpp, header, power = fact.scale.mpp, fact.scale.header, fact.objective_power
    if header is not None and _factor(mpp, header.mpp) > CLOSE and not doubts(header, power):
        return [
            f"the manifest's is {_times(mpp, header.mpp)} the {header.mpp:.4g} um/px of its header: correct or empty it"
        ]
    told = header or (fact.scale if fact.scale.source.startswith("header") else None)
    if told is not None and fact.manifest_mpp is not None and _factor(told.mpp, fact.manifest_mpp) <= CLOSE:
        return []
    reasons = doubts(fact.scale, power)
    corroborated = power is not None and _factor(mpp, 10 / power) < FAR
    if majority is not None and _factor(mpp, majority) >= FAR and not corroborated:
        reasons.append(f"{_times(mpp, majority)} the {majority:.3g} um/px of most slides")
    return reasons


def _majority(facts: Sequence[ScaleFacts]) -> float | None:
    """The scale of nearly all slides; None if they have no common one."""
    if len(facts) < MAJORITY_SLIDES:
        return None
    middle = median(fact.scale.mpp for fact in facts)
    near = sum(_factor(fact.scale.mpp, middle) <= CLOSE for fact in facts)
    return middle if near >= MAJORITY_SHARE * len(facts) else None


def _times(mpp: float, reference: float) -> str:
    if mpp >= reference:
        return f"about {mpp / reference:.2g} times"
    return f"about 1/{reference / mpp:.2g} of"


def audit_table(facts: Sequence[ScaleFacts], findings: Sequence[ScaleFinding]) -> str:
    """The scales of a cohort with counts, then the slides whose manifest and header differ, then the doubtful ones.

    Lines have at most 80 characters.
    """
    groups: dict[tuple[float, str], list[float]] = defaultdict(list)
    for fact in facts:
        groups[float(f"{fact.scale.mpp:.2g}"), fact.scale.source.partition(_BESIDE)[0]].append(fact.scale.mpp)
    lines = [f"{'um/px':<17} {'slides':>7}  source"]
    for (_, source), values in sorted(groups.items()):
        low, high = f"{min(values):.4g}", f"{max(values):.4g}"
        lines.append(f"{low if low == high else f'{low} to {high}':<17} {len(values):>7}  {_shortened(source, 53)}")
    lines += _differing_lines(facts)
    if not findings:
        return "\n".join(lines)
    lines += ["", f"{len(findings)} of {len(facts)} slides have a doubtful scale:"]
    by_id = {fact.slide_id: fact for fact in facts}
    for finding in findings[:SHOWN_FINDINGS]:
        lines += _finding_lines(by_id[finding.slide_id], finding)
    if len(findings) > SHOWN_FINDINGS:
        lines.append(f"  and {len(findings) - SHOWN_FINDINGS} more")
    return "\n".join(lines)


def _differing_lines(facts: Sequence[ScaleFacts]) -> list[str]:
    """The slides whose manifest gives another scale than the header."""
    differing = [fact for fact in facts if _BESIDE in fact.scale.source]
    if not differing:
        return []
    lines = ["", *textwrap.wrap("The manifest's um/px is used where the header gives another:", TABLE_WIDTH)]
    for fact in differing[:SHOWN_FINDINGS]:
        text = f"{fact.slide_id}: {fact.scale.mpp:.4g} um/px in place of {fact.scale.source.partition(_BESIDE)[2][:-1]}"
        lines += textwrap.wrap(text, TABLE_WIDTH, initial_indent="  ", subsequent_indent="      ")
    if len(differing) > SHOWN_FINDINGS:
        lines.append(f"  and {len(differing) - SHOWN_FINDINGS} more")
    return lines


def describe_unused_override(facts: Sequence[ScaleFacts], override: float | None) -> str:
    """A line on the slides whose header or manifest gives another scale than an override; empty if there are none."""
    if override is None:
        return ""
    others = [f for f in facts if f.scale.source != "override" and differs(f.scale.mpp, override)]
    if not others:
        return ""
    return (
        f"--mpp-override {override:g} is not used for {len(others)} slides, whose header or manifest gives another "
        f"um/px, such as {others[0].slide_id} ({others[0].scale.mpp:.4g}); a manifest's column mpp takes precedence"
    )


def _finding_lines(fact: ScaleFacts, finding: ScaleFinding) -> list[str]:
    width, height = fact.level0_size
    value = f"{fact.scale.mpp:.4g} um/px of {width} x {height} px ({fact.scale.source})"
    text = f"{finding.slide_id}: {value}: {'; '.join(finding.reasons)}"
    return textwrap.wrap(text, TABLE_WIDTH, initial_indent="  ", subsequent_indent="      ")


def _shortened(text: str, width: int) -> str:
    """The text without its middle, if it is longer than `width`."""
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[:half]}...{text[-half:]}"
