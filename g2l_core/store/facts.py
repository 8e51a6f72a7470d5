"""What a store keeps about itself, its slides, its encoders, and the runs that filled it, as frozen values.

The store's facts are the attribute `g2l` of its root's `zarr.json`, a slide's that of the slide's; `documents` reads
and writes both. `from_json` reads what any version wrote: a key that is absent gives the field's default, and a key
that is not known is kept in `extra` and written back by `to_json`. docs/store-format.md describes the keys.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Any, TypeVar

AnyFacts = TypeVar("AnyFacts", bound="Facts")

OK, FAILED = "ok", "failed"
"""The status of a slide that has patches, and of one that stage one could not use."""

_SPARSE = {"sparse": True}
"""Marks a field that is not written while it has its default."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The base of all facts: how they are read from plain JSON values, and written as them."""

    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys that this version does not know, as they were read."""

    @classmethod
    def from_json(cls: type[AnyFacts], stored: Mapping[str, Any]) -> AnyFacts:
        """Read facts from plain values; lists become tuples."""
        names = _names(cls)  # type: ignore[arg-type]  # a class is hashable
        known = {names[key]: _frozen(value) for key, value in stored.items() if key in names}
        return cls(**known, extra={key: value for key, value in stored.items() if key not in names})

    def to_json(self) -> dict[str, Any]:
        """The facts as plain values."""
        values = {f: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        written = {_key(f): _plain(value) for f, value in values.items() if not _is_left_out(f, value)}
        return {**written, **self.extra}


@cache
def _names(kind: type[Facts]) -> dict[str, str]:
    """Field names by JSON key."""
    return {_key(f): f.name for f in fields(kind) if f.name != "extra"}


def _key(known: "Field[Any]") -> str:
    """The JSON key of a field: its name, but for a spelling that files keep."""
    return str(known.metadata.get("key", known.name))


def _is_left_out(known: "Field[Any]", value: object) -> bool:
    default = known.default if known.default_factory is MISSING else known.default_factory()
    return known.metadata.get("sparse", False) and bool(value == default)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Facts):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class EncoderFacts(Facts):
    """An encoder whose features are stored. `extra` holds the rest of its spec, as `encoders.spec` writes it."""

    name: str = field(default="", metadata=_SPARSE)
    """Its name, as users write it."""
    weights: str = field(default="", metadata=_SPARSE)
    """Where its weights came from."""
    pooling: str = field(default="", metadata=_SPARSE)
    dim: int
    """Width of a feature."""
    precision: str = field(default="", metadata=_SPARSE)
    weights_digest: str = field(default="", metadata=_SPARSE)
    """sha256 of its tensors."""
    digest: str
    """sha256 of everything that decides its features."""
    weights_notes: tuple[str, ...] = field(default=(), metadata=_SPARSE)
    """What was chosen or is doubtful where its weights were read, of one sentence each."""
    imported: str = field(default="", metadata=_SPARSE)
    """The layout that its features were imported from; empty where G2L has encoded them. Of an imported encoder the
    pixel hashes are unknown, and so is how patches were preprocessed, until `proof` says otherwise."""
    rounded_bits: int = field(default=0, metadata=_SPARSE)
    """Bits of the mantissa, of float16's 10, that `g2l store compact` left of its features; 0 where it left all."""
    proof: str = field(default="", metadata=_SPARSE)
    """How an imported encoder's features were found to be those that it gives, in words."""


@dataclass(frozen=True, kw_only=True)
class ExtractionRunFacts(Facts):
    """One call of stage one: what it encoded, and where the time went."""

    ended: str = ""
    """When it ended, UTC, ISO 8601."""
    encoders: tuple[str, ...] = ()
    """Keys of the encoders."""
    patches: int = 0
    views: int = 0
    """Views of each patch, the canonical one included."""
    workers: int = 0
    batch_size: int = 0
    device: str = ""
    elapsed: float = 0.0
    """Seconds from the first patch to the last shard."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds by part: read, augment, encode, write, wait."""
    utilization: float = field(default=0.0, metadata={"key": "utilisation"})
    """Fraction of the elapsed time in which the encoder was at work."""


@dataclass(frozen=True, kw_only=True)
class StoreFacts(Facts):
    """The store itself: its identity (`grid` and `views`), its encoders, and how it was made."""

    format: int
    grid: Mapping[str, Any]
    """The grid spec, as `GridSpec.to_json` writes it."""
    views: Mapping[str, Any]
    """The view spec, as `ViewSpec.to_json` writes it."""
    patch_status: Mapping[str, int] = field(default_factory=dict)
    """The reason codes, by name."""
    encoders: Mapping[str, EncoderFacts] = field(default_factory=dict)
    """The encoders that have features here, by key."""
    created: str = ""
    """When it was made, UTC, ISO 8601."""
    software: Mapping[str, str] = field(default_factory=dict)
    """Versions of what can change a result, by package."""
    runs: tuple[ExtractionRunFacts, ...] = field(default=(), metadata=_SPARSE)
    """The last calls of stage one, oldest first."""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "StoreFacts":
        """Read the facts of a store. One that is older than the artifact filters was made without them."""
        encoders = {key: EncoderFacts.from_json(spec) for key, spec in stored.get("encoders", {}).items()}
        runs = tuple(ExtractionRunFacts.from_json(run) for run in stored.get("runs", ()))
        grid = {"artefacts": "none", **stored["grid"]}
        return super().from_json({**stored, "grid": grid, "encoders": encoders, "runs": runs})


@dataclass(frozen=True, kw_only=True)
class ShardRecord(Facts):
    """The completion record of one shard."""

    rows: int
    failed: int
    """How many of its patches have no features."""
    crc32c: int
    """Checksum of its float16 values in C order."""
    size: int | None = field(default=None, metadata=_SPARSE)
    """Bytes of its file; 0 where it has none, as no patch has features. None in format 1."""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "ShardRecord":
        """Read a record. The common case is quick, for a store of 100,000 slides has millions of them."""
        is_plain = stored.keys() <= {"rows", "failed", "crc32c", "size"}
        return cls(**stored) if is_plain else super().from_json(stored)


@dataclass(frozen=True, kw_only=True)
class FeatureFacts(Facts):
    """One encoder's features of one slide: what has been written of them."""

    encoder: str = field(default="", metadata=_SPARSE)
    """Key of the encoder."""
    digest: str = field(default="", metadata=_SPARSE)
    """Digest of the encoder that wrote them."""
    n_views: int = field(default=0, metadata=_SPARSE)
    """Views that the array has room for, the canonical one included."""
    dim: int = field(default=0, metadata=_SPARSE)
    """Width of a feature."""
    shards: Mapping[str, ShardRecord] = field(default_factory=dict)
    """The completion records, by `Shard.name`."""
    complete: bool = False
    """Whether every shard of every view is recorded."""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "FeatureFacts":
        """Read the facts of a features array."""
        shards = {name: ShardRecord.from_json(record) for name, record in stored.get("shards", {}).items()}
        return super().from_json({**stored, "shards": shards})


@dataclass(frozen=True, kw_only=True)
class SlideFacts(Facts):
    """One slide, or one set of patch images. A failed one has only `source`, `status` and `reason`."""

    slide_id: str = field(default="", metadata=_SPARSE)
    """Its id, so that the document of another slide is noticed. Empty in format 1."""
    kind: str = field(default="", metadata=_SPARSE)
    """`slide`, or `patches` for a set of patch images."""
    fingerprint: str = field(default="", metadata=_SPARSE)
    """Tells whether the file is still the one that was cached."""
    file_state: tuple[int, int] | None = field(default=None, metadata=_SPARSE)
    """Bytes and modification time (ns) of the file when its fingerprint was taken: while both stay, it is not read
    again."""
    mpp: float | None = field(default=None, metadata=_SPARSE)
    """Micrometers per level-0 pixel; None where it is not known."""
    mpp_source: str = field(default="", metadata=_SPARSE)
    """Where `mpp` comes from: `header: KEY`, `manifest` or `override`."""
    level0_size: tuple[int, int] = field(default=(0, 0), metadata=_SPARSE)
    """Width and height in level-0 pixels."""
    tissue_file: str = field(default="", metadata=_SPARSE)
    """The annotation that the tissue came from, or the file of the patches' coordinates, if any."""
    tissue_sha256: str = field(default="", metadata=_SPARSE)
    patch_px_level0: int = field(default=0, metadata=_SPARSE)
    """Side of a patch in level-0 pixels."""
    source: str
    """The file or folder that it is read from."""
    labels: Mapping[str, str] = field(default_factory=dict, metadata=_SPARSE)
    """What the manifest says about the whole slide."""
    n_patches: int = field(default=0, metadata=_SPARSE)
    n_views: int = field(default=0, metadata=_SPARSE)
    """Views whose parameters are stored, the canonical one included."""
    status: str = OK
    """`OK` or `FAILED`."""
    reason: str = field(default="", metadata=_SPARSE)
    """Why stage one could not use it."""
    notes: tuple[str, ...] = field(default=(), metadata=_SPARSE)
    """What was not as expected about the slide, or about its images; it was used all the same."""
    unreadable: Mapping[str, str] = field(default_factory=dict, metadata=_SPARSE)
    """Why patches could not be read, by row."""
    tables: Mapping[str, Mapping[str, int]] = field(default_factory=dict, metadata=_SPARSE)
    """crc32c of each block of the arrays other than the features, by array and block, see `tables.block_names`."""
    features: Mapping[str, FeatureFacts] = field(default_factory=dict, metadata=_SPARSE)
    """What has been written of each encoder's features, by its key."""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "SlideFacts":
        """Read the facts of a slide."""
        features = {key: FeatureFacts.from_json(facts) for key, facts in stored.get("features", {}).items()}
        return super().from_json({**stored, "features": features})

    def to_json(self) -> dict[str, Any]:
        """The facts as plain values; a slide with patches always says its scale and its labels."""
        always = {"mpp": self.mpp, "labels": dict(self.labels)} if self.status == OK else {}
        return {**super().to_json(), **always}
