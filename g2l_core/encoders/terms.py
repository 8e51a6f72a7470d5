"""What the terms of teachers, start and data mean for a student. These are words for people and no legal advice."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FREE, COPYLEFT, UNKNOWN, NON_COMMERCIAL = "free", "copyleft", "unknown", "non-commercial"

_FREE = {
    "apache", "mit", "bsd", "isc", "cc0", "cc-by", "unlicense", "public-domain", "bsl", "zlib", "pddl", "odc-by",
}  # fmt: skip
"""Names of licenses, without versions, that allow any use of what is made from a work, if only it is named."""

_COPYLEFT = {"gpl", "agpl", "lgpl", "mpl", "cc-by-sa", "odbl", "eupl"}
"""Those that ask the same terms of what is made from a work."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Something that a student is made from."""

    what: str
    """Such as: the teacher uni."""
    license: str
    """Its terms as its publisher writes them."""

    @property
    def kind(self) -> str:
        """The strictest kind of the terms: `FREE`, `COPYLEFT`, `UNKNOWN` or `NON_COMMERCIAL`.

        Terms that contradict each other ("MIT or CC-BY-NC-ND", where a model's card and its repository differ) count as
        the stricter ones.
        """
        return kind_of(self.license)


def kind_of(license: str) -> str:
    """The strictest kind of some terms, see `Source.kind`."""
    parts = re.split(r"\s+(?:and|or|with)\s+|[,;/]", license.strip(), flags=re.IGNORECASE)
    kinds = {_kind_of_one(part) for part in parts if part.strip()} or {UNKNOWN}
    return next(kind for kind in (NON_COMMERCIAL, UNKNOWN, COPYLEFT, FREE) if kind in kinds)


def _kind_of_one(text: str) -> str:
    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    if re.search(r"(^|-)nc(-|$)|non-?commercial|research-(use-)?only|academic", name):
        return NON_COMMERCIAL
    if re.search(r"(^|-)nd(-|$)|no-?deriv", name):
        return UNKNOWN  # whether a student is a derivative of its teacher is for lawyers to say
    plain = re.sub(r"-?(license|licence)", "", name)
    base = re.sub(r"-?v?\d[\d.]*(-(clause|or-later|only|universal|international))?$", "", plain)
    return COPYLEFT if base in _COPYLEFT else FREE if base in _FREE else UNKNOWN


def combined(sources: Iterable[Source]) -> str:
    """All terms in one text, each once, as the license of a student; `kind_of` reads it again."""
    return " AND ".join(dict.fromkeys(source.license for source in sources)) or "unknown"


def verdict(sources: Sequence[Source]) -> str:
    """One sentence for the model card: what the terms come to, and because of what."""
    words = {
        NON_COMMERCIAL: "non-commercial",
        UNKNOWN: "not known to be free",
        COPYLEFT: "to be shared alike",
    }
    found = [
        f"{said} because of {_listed(source for source in sources if source.kind == kind)}"
        for kind, said in words.items()
        if any(source.kind == kind for source in sources)
    ]
    return "; ".join(found) or f"free for any use under the terms of {_listed(sources) or 'whoever trained it'}"


def not_free(sources: Sequence[Source]) -> str:
    """What keeps a student from being free for any use; empty where nothing does."""
    return _listed(source for source in sources if source.kind != FREE)


def _listed(sources: Iterable[Source]) -> str:
    return ", ".join(f"{source.what} ({source.license})" for source in sources)
