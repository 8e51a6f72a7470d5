"""HTML pages from the templates in `templates/`: style sheet inside, light and dark, no script, no network.

Every text that a template is given is escaped, unless it is `Markup`: HTML made here.
"""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from g2l_core.report.tables import number, proper
from g2l_core.report.wrapping import WHOLE

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


def mark(series: int, x: str = "0", y: str = "0") -> Markup:
    """The mark of the page's series with this number about (x, y), an SVG path."""
    path = Markup('<path class="mark e{}" d="{}" transform="translate({} {}) scale(5)"/>')
    return path.format(series % COLORS, SHAPES[series % len(SHAPES)], x, y)


def breakable(name: str) -> Markup:
    """A name that lines may break in after the signs that names are made with, if it is long."""
    if len(name) <= WHOLE:
        return escape(name)
    return Markup("<wbr>").join(re.findall(r"[^-_/@+.:]*[-_/@+.:]+|[^-_/@+.:]+", name))


def render(template: str, **values: object) -> Markup:
    """HTML of one of the templates."""
    return Markup(_TEMPLATES.get_template(template).render(values))


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_TEMPLATES.globals["mark"] = mark
_TEMPLATES.filters |= {"proper": proper, "number": number, "breakable": breakable}
