"""Plain text in lines of a width: broken between words, and names of encoders where people would break them."""

import re

WHOLE = 24
"""Words up to this length stay whole. Longer ones are names such as `timm-mobilenetv3_small_100-128-random0`."""


def wrapped(text: str, width: int) -> list[str]:
    """Text in lines of at most `width` characters; only what cannot be broken is longer.

    Words are broken where they are longer than the width, after the signs that names are made with.

    Examples:
        >>> wrapped("of timm-mobilenetv3_small_100-128-random0", 20)
        ['of timm-mobilenetv3_', 'small_100-128-', 'random0']
    """
    lines, line = list[str](), ""
    for word in text.split():
        for i, piece in enumerate([word] if len(word) <= width else _pieces(word)):
            space = " " if line and i == 0 else ""
            if line and len(line) + len(space) + len(piece) > width:
                lines.append(line)
                line, space = "", ""
            line += space + piece
    return [*lines, line]


def narrowest(text: str, whole: int = WHOLE) -> int:
    """The smallest width in which no line of a text is longer than the width, and no word of up to `whole` broken."""
    pieces = [piece for word in text.split() for piece in ([word] if len(word) <= whole else _pieces(word))]
    return max(map(len, pieces), default=0)


def _pieces(word: str) -> list[str]:
    """The parts of a name, each with the sign after it. Paths and addresses are one, since they are copied."""
    return [word] if "/" in word else re.findall(r"[^-_@+.,:=]*[-_@+.,:=]+|[^-_@+.,:=]+", word)
