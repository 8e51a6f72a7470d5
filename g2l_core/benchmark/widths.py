"""The first features of a nested student, read from its stored features: `KEY+256` beside `KEY`."""

import re
from collections.abc import Container

from g2l_core.errors import StoreMissingError, UnknownNameError
from g2l_core.store.features import StoredSlide
from g2l_core.types import Features

_WIDTH = re.compile(r"(.+)\+([1-9][0-9]{0,8})")


def width_key(key: str, width: int) -> str:
    """The name of an encoder's first so many features, among the keys of encoders."""
    return f"{key}+{width}"


def stored_key(encoder: str, stored: Container[str]) -> str:
    """The key under which a store has an encoder whose first features may be meant."""
    found = None if encoder in stored else _WIDTH.fullmatch(encoder)
    return found[1] if found else encoder


def parted(slide: StoredSlide, encoder: str) -> tuple[str, int | None]:
    """The stored key of an encoder, and how many of its first features are meant; None is all."""
    found = None if encoder in slide.facts.features else _WIDTH.fullmatch(encoder)
    return (found[1], int(found[2])) if found else (encoder, None)


def canonical_features(slide: StoredSlide, encoder: str) -> Features:
    """The features of the canonical view, float16 (n, dim), of a stored encoder or of its first features.

    Raises:
        UnknownNameError: The encoder has no features of this slide.
        StoreMissingError: They are not complete, or fewer than are asked for.
        StoreCorruptError: They are not what was written.
    """
    key, width = parted(slide, encoder)
    if width is not None and key not in slide.facts.features:
        raise UnknownNameError("encoder", encoder, slide.encoder_keys, f"Asked of slide {slide.slide_id}.")
    features = slide.features(key)
    if width is not None and features.shape[1] < width:
        raise StoreMissingError(f"slide {slide.slide_id}: {key} has {features.shape[1]} features, not {width}")
    return features[:, :width]
