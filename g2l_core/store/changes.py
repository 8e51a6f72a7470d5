"""Facts of a slide with something changed: values from values, nothing is written."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from g2l_core.store.facts import FeatureFacts, SlideFacts


def merged(tables: Mapping[str, Mapping[str, int]], new: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Checksums of tables, with further ones of some blocks."""
    return {
        name: {**tables.get(name, {}), **new.get(name, {})} for name in [*tables, *(n for n in new if n not in tables)]
    }


def without(tables: Mapping[str, Mapping[str, int]], name: str, blocks: Sequence[str]) -> dict[str, Mapping[str, int]]:
    """Checksums of tables, without those of some blocks of one."""
    return {**tables, name: {block: crc for block, crc in tables.get(name, {}).items() if block not in blocks}}


def dropped(facts: FeatureFacts, shards: set[str]) -> FeatureFacts:
    """Without the records of some shards."""
    kept = {name: record for name, record in facts.shards.items() if name not in shards}
    return replace(facts, shards=kept, complete=facts.complete and len(kept) == len(facts.shards))


def with_features(facts: SlideFacts, encoder: str, of_encoder: FeatureFacts) -> SlideFacts:
    """The facts of a slide, with those of one encoder's features replaced."""
    return replace(facts, features={**facts.features, encoder: of_encoder})
