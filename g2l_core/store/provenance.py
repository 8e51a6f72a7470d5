"""Specs as canonical JSON, their digest, what differs between two, and which software is installed when."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata

from g2l_core.version import __version__

PACKAGES = ("torch", "timm", "zarr", "numcodecs", "numpy", "openslide-python", "opencv-python-headless")


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no white space, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """sha256, in hexadecimal, of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def differences(
    stored: Mapping[str, object], asked: Mapping[str, object], prefix: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Yield (field, stored value, asked value) for every field that differs; nested fields are joined by dots."""
    for key in sorted({*stored, *asked}):
        there, now = stored.get(key), asked.get(key)
        if isinstance(there, Mapping) and isinstance(now, Mapping):
            yield from differences(there, now, f"{prefix}{key}.")
        elif canonical_json(there) != canonical_json(now):
            yield f"{prefix}{key}", there, now


def utc_now() -> str:
    """The time as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def software() -> dict[str, str]:
    """Versions of what can change a result."""
    versions = {"g2l": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
