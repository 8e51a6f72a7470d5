"""A part of a store made ready for others: the store, a card, and checksums. Nothing is sent anywhere."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from g2l_core.api.copies import Copied, Kept, new_folder, require_new, write_store
from g2l_core.api.selection import Selection
from g2l_core.encoders.spec import STORED_LICENSE
from g2l_core.errors import StoreMissingError, UsageError
from g2l_core.files import write_text
from g2l_core.store.boundary import writing
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore

STORE, CARD, CHECKSUMS = "store.zarr", "README.md", "SHA256SUMS"
SHOWN_VALUES = 12
"""Values of a label that the card counts one by one."""
_READ_BYTES = 1 << 20
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's names for numbers of rows; larger ones follow by tens."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the store cannot know."""

    title: str
    slides_license: str
    """The terms of the slides, or of their data set."""
    encoder_licenses: Mapping[str, str]
    """The terms of encoders of which the store knows none, by key."""
    cite: Sequence[str] = ()
    """What to cite for the slides, one text each."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What was made ready, or would be."""

    copied: Copied
    columns: Mapping[str, int]
    """The labels that others will see, with how many different values each has."""
    licenses: Mapping[str, str]
    """By encoder."""


def publish(selection: Selection, out: Path, kept: Kept, facts: CardFacts, *, dry_run: bool = False) -> Published:
    """Write a folder with a store of some slides, a card and checksums, for others to have.

    Places on this machine, slides that failed and former runs are left out, and so are the labels of `kept.without`.

    Raises:
        StoreError: There is something at `out`, or it cannot be written.
        StoreMissingError: There are no features.
        UsageError: The terms of an encoder are not known, or parts of slides are chosen.
        StoreCorruptError: Something is not what was written.
    """
    require_new(out)
    copied = write_store([selection], out / STORE, kept, dry_run=True)
    if not copied.encoders:
        raise StoreMissingError(f"{selection.store.path} has no features to publish")
    licenses = _licenses(copied.encoders, facts.encoder_licenses)
    if dry_run:
        counts = _label_counts(selection, kept)
    else:
        with new_folder(out) as folder:
            with writing(str(out)):
                folder.mkdir(parents=True)
            write_store([selection], folder / STORE, kept)
            store = FeatureStore.open(folder / STORE)
            counts = _label_counts(selection, kept)
            with writing(str(out)):
                write_text(folder / CARD, card(store, copied, counts, licenses, facts))
                write_text(folder / CHECKSUMS, checksums(folder))
    return Published(copied=copied, columns={name: len(found) for name, found in counts.items()}, licenses=licenses)


def _licenses(encoders: Mapping[str, EncoderFacts], given: Mapping[str, str]) -> dict[str, str]:
    """The terms of each encoder: what the user says, else what its spec says.

    Raises:
        UsageError: Nobody says it.
    """
    known = {key: str(given.get(key) or facts.extra.get(STORED_LICENSE, "")) for key, facts in encoders.items()}
    lacking = [key for key, terms in known.items() if terms in {"", "unknown"}]
    if lacking:
        raise UsageError(
            f"nothing says under which terms features of {lacking[0]} may be passed on: read its license, then give "
            f'--encoder-license "{lacking[0]}=TERMS", or leave it out with --encoder'
        )
    return known


def _label_counts(selection: Selection, kept: Kept) -> dict[str, Counter[str]]:
    """How many patches have each value of each label."""
    counts: dict[str, Counter[str]] = {}
    for part in selection.parts():
        columns = part.columns
        for name in sorted(columns.names - {"slide_id"} - kept.without):
            constant = columns.constant(name)
            values = [constant] * len(part) if constant is not None else columns.column(name, part.rows).tolist()
            counts.setdefault(name, Counter()).update(value for value in map(str, values) if value)
    return dict(sorted(counts.items()))


def card(
    store: FeatureStore,
    copied: Copied,
    labels: Mapping[str, Counter[str]],
    licenses: Mapping[str, str],
    facts: CardFacts,
) -> str:
    """README.md as the hub reads it: a header, what is in the store, how to read it, terms, citations, checksums."""
    terms = "; ".join([f"slides: {facts.slides_license}", *(f"{key}: {text}" for key, text in licenses.items())])
    header = [
        "---",
        f"pretty_name: {_quoted(facts.title)}",
        "license: other",
        f"license_name: {_quoted(terms)}",
        f"size_categories: [{_size(copied.patches)}]",
        "tags: [pathology, histology, features, zarr, g2l]",
        "---",
        "",
        f"# {facts.title}",
        "",
    ]
    return "\n".join([*header, *_contents(store, copied, labels), *_terms(store, licenses, facts), ""])


def _contents(store: FeatureStore, copied: Copied, labels: Mapping[str, Counter[str]]) -> list[str]:
    grid, crop_px = store.grid, store.views["crop_px"]
    return [
        f"Features of {copied.patches:,} patches of {copied.slides:,} slides, cached by G2L (arXiv 2510.11176).",
        f"Patches are {grid['patch_px']} px at {grid['mpp']:g} um/px; view 0 is the center crop of {crop_px} px.",
        "",
        "| encoder | features | views | precision | pooling | weights | digest |",
        "|---|---|---|---|---|---|---|",
        *(_encoder_row(key, encoder, store) for key, encoder in store.encoders.items()),
        "",
        *(f"- {key}: {note}" for key, encoder in store.encoders.items() for note in encoder.weights_notes),
        "",
        "| label | patches that have it | values |",
        "|---|---|---|",
        *(f"| {name} | {sum(found.values()):,} | {_values(found)} |" for name, found in labels.items()),
        "",
        "## Read it",
        "",
        "```python",
        "import g2l_core as g2l",
        "",
        f'store = g2l.open("{STORE}")',
        f'features = store.numpy("{next(iter(store.encoders))}")  # float16 (patch, feature)',
        "patches = store.patches()  # slide, coordinates and labels of each",
        "```",
        "",
        f'Without G2L: `zarr.open_group("{STORE}")` reads it, plain Zarr version 3. Coordinates are level-0 pixels.',
        "",
    ]


def _terms(store: FeatureStore, licenses: Mapping[str, str], facts: CardFacts) -> list[str]:
    authors = sorted({encoder.name or key for key, encoder in store.encoders.items()})
    return [
        "## Terms",
        "",
        f"- Slides: {facts.slides_license}",
        *(f"- Features of {key}: {text}" for key, text in licenses.items()),
        "",
        "What is made of features inherits the terms of the slides and of the encoder.",
        "",
        "## Cite",
        "",
        *(f"- {text}" for text in facts.cite),
        *(f"- The authors of {name}." for name in authors),
        "- G2L: From Giga-Scale to Cancer-Specific Large-Scale Pathology Foundation Models via Knowledge",
        "  Distillation, arXiv 2510.11176.",
        "",
        "## Checksums",
        "",
        f"`sha256sum --check {CHECKSUMS}` compares every file; `g2l store verify {STORE}` compares every value.",
    ]


def _encoder_row(key: str, facts: EncoderFacts, store: FeatureStore) -> str:
    views = max((s.facts.features[key].n_views for s in store.slides() if key in s.facts.features), default=0)
    unknown = "unknown"
    origin = f"imported ({facts.imported})" if facts.imported else facts.weights or unknown
    words = (key, facts.dim, views, facts.precision or unknown, facts.pooling or unknown, origin, facts.digest[:12])
    return f"| {' | '.join(map(str, words))} |"


def _values(found: Counter[str]) -> str:
    if len(found) > SHOWN_VALUES:
        return f"{len(found):,} different"
    return ", ".join(f"{value} ({count:,})" for value, count in sorted(found.items())).replace("|", "/")


def _quoted(text: str) -> str:
    """A text as YAML takes it, whatever is in it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{" ".join(escaped.split())}"'


def _size(rows: int) -> str:
    return next((name for limit, name in _SIZES if rows < limit), "1M<n<10M" if rows < 10_000_000 else "n>10M")


def checksums(folder: Path) -> str:
    """A line of sha256 and relative path for every file below a folder, as `sha256sum --check` reads them.

    Raises:
        OSError: A file cannot be read.
    """
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                state.update(block)
        lines.append(f"{state.hexdigest()}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)
