"""SVG text that takes its colors and fonts from the page's style sheet: axes, marks, primitives.

Lengths are SVG user units, x to the right and y down. Class `eN` colors what belongs to series N of the page; the
shapes tell the same series apart without color.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

COLORS = 6
SHAPES = (
    "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",
    "M-.9-.9H.9V.9H-.9z",
    "M0-1.3 1.3 0 0 1.3-1.3 0z",
    "M0-1.2 1.2.9H-1.2z",
    "M0 1.2 1.2-.9H-1.2z",
    "M-.4-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4z",
    "M0-1.2 1.14-.37.71.97H-.71L-1.14-.37z",
)
"""Within about 1.2 of the origin. As 6 colors and 7 shapes share no divisor, 42 encoders differ."""

DOTS = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "m-4-4h8v8h-8z",
    "m0-5 5 5-5 5-5-5z",
    "m0-5 5 9h-10z",
    "m0 5 5-9h-10z",
    "m-2-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "m0-5 5 4-2 6h-6l-2-6z",
)
"""The same shapes from their middles, in relative commands alone, within about 5."""

WIDTH = 920
DRAWABLE = 1e12


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From values to lengths."""

    ticks: tuple[float, ...]
    digits: int
    start: float
    stop: float
    """Where the first and the last tick stand; start > stop turns the axis."""

    def at(self, value: float) -> float:
        """Where a value stands; beyond the ticks, at the nearest of them."""
        low, high = self.ticks[0], self.ticks[-1]
        share = (min(max(value, low), high) - low) / (high - low)
        return round(self.start + share * (self.stop - self.start), 1)


def axis_for(values: Iterable[float], start: float, stop: float) -> Axis:
    """Ticks at multiples of 1, 2 or 5 times a power of ten that enclose the values, some three to seven."""
    drawn = [value for value in values if isfinite(value) and abs(value) < DRAWABLE] or [0.0]
    low, high = min(drawn), max(drawn)
    size = max(abs(low), abs(high), 1e-3)
    if high - low < 1e-6 * size:
        low, high = low - size / 2, high + size / 2
    rough = (high - low) / 5
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    ticks = tuple(i * step for i in range(floor(low / step + 1e-9), ceil(high / step - 1e-9) + 1))
    return Axis(ticks=ticks, digits=max(0, -floor(log10(step) + 1e-9)), start=start, stop=stop)


def text_at(x: float, y: float, text: str, style: str) -> str:
    """Escaped text."""
    return f'<text x="{x}" y="{y}" class="{style}">{escape(text)}</text>'


def line_to(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return f'<path d="M{x1} {y1}L{x2} {y2}" class="{style}"/>'


def shortened(text: str, chars: int) -> str:
    """Text of at most so many characters; what is cut is in the middle, as names often differ at their ends."""
    if len(text) <= chars:
        return text
    tail = (chars - 1) // 2
    return f"{text[: chars - 1 - tail]}\u2026{text[len(text) - tail :]}"


def picture(width: float, height: float, label: str, parts: Iterable[str], style: str = "plot") -> str:
    """One svg element; the label is for screen readers."""
    return (
        f'<svg class="{style}" role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}">'
        f"{''.join(parts)}</svg>"
    )


def shape(encoder: int, x: float = 0, y: float = 0, size: float = 5) -> str:
    """The mark of the page's encoder with this number, about (x, y)."""
    return (
        f'<path class="mark e{encoder % COLORS}" d="{SHAPES[encoder % len(SHAPES)]}" '
        f'transform="translate({x} {y}) scale({size})"/>'
    )


def dots(series: int, points: Iterable[tuple[int, int]]) -> str:
    """Small marks of one series as a single path, so that a thousand points stay small on the page."""
    mark = DOTS[series % len(DOTS)]
    return f'<path class="dots e{series % COLORS}" d="{"".join(f"M{x} {y}{mark}" for x, y in points)}"/>'


def key_mark(encoder: int) -> str:
    """The encoder's mark as a picture to stand in a line of text."""
    return f'<svg class="key" viewBox="-8 -8 16 16" aria-hidden="true">{shape(encoder)}</svg>'
