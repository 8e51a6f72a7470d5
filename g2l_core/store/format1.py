"""Format version 1, which this version reads: facts of features beside their arrays, a folder for every chunk index.

`upgrade` makes a store of the present format out of it. Nothing is written into a store of format 1.
"""

import json
from dataclasses import replace
from pathlib import Path

from g2l_core.errors import StoreError
from g2l_core.store import schema
from g2l_core.store.facts import FeatureFacts, SlideFacts

FORMAT = 1


def refuse_writing(store_format: int, where: object) -> None:
    """Refuse to write into a store of format 1.

    Raises:
        StoreError: It is one.
    """
    if store_format == FORMAT:
        raise StoreError(
            f"{where}: the store has format {FORMAT}, which this version only reads. Run g2l store upgrade once: it "
            "takes seconds, and features are not computed again"
        )


def with_features(facts: SlideFacts, folder: Path) -> SlideFacts:
    """The facts of a slide, with those of its features, which format 1 keeps with their arrays.

    Raises:
        OSError: They cannot be read.
        ValueError: They are damaged.
    """
    group = folder / schema.FEATURES
    arrays = [path for path in sorted(group.iterdir()) if (path / "zarr.json").is_file()] if group.is_dir() else []
    return replace(facts, features={path.name: _feature_facts(path) for path in arrays})


def _feature_facts(array: Path) -> FeatureFacts:
    document = json.loads((array / "zarr.json").read_bytes())
    _, n_views, dim = document["shape"]
    facts = FeatureFacts.from_json(document["attributes"].get(schema.ATTRIBUTE, {}))
    return replace(facts, n_views=n_views, dim=dim)


def shard_path(features: Path, block: int, view: int) -> Path:
    """The file of a shard."""
    return features / "c" / str(block) / str(view) / "0"
