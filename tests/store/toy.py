"""Stores that are written without slides and networks: what a store keeps does not depend on where it came from."""

from dataclasses import replace

import numpy as np

from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import COLUMNS, ViewSpec, sample_views
from g2l_core.store.facts import EncoderFacts, SlideFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.tables import checksum
from g2l_core.store.writer import FeatureWriter

ENCODER, DIM = "toy", 6


def create(path, **grid):
    store = FeatureStore.create(path, grid=GridSpec(**grid).to_json(), views=ViewSpec().to_json())
    store.add_encoder(ENCODER, EncoderFacts(digest="0" * 64, dim=DIM))
    return store


def facts(**changes):
    known = {"kind": "slide", "source": "/s.svs", "fingerprint": "f", "mpp": 0.499, "level0_size": (4000, 3000)}
    known |= {"patch_px_level0": 257, "labels": {"patient_id": "p1"}}
    return SlideFacts(**{**known, **changes})


def lay(store, slide_id, n=20, n_views=2, **changes):
    coords = np.stack([np.arange(n) % 7, np.arange(n) // 7], axis=1).astype(np.int32) * 257
    params = sample_views(ViewSpec(), slide_id, coords, range(n_views))
    return store.add_slide(
        slide_id, facts(**changes), coords=coords, view_params=params, columns=COLUMNS, patch_ids=None
    )


def features_of(slide_id, n, n_views, dim=DIM):
    rng = np.random.default_rng(list(slide_id.encode()))
    return rng.normal(size=(n, n_views, dim)).astype(np.float16)


def hashes_of(n, n_views):
    return np.arange(1, n * n_views + 1, dtype=np.uint64).reshape(n, n_views)


def fill(slide, n_views=2, encoder=ENCODER, status=None):
    """Write every missing shard of the first views; rows of bad status get NaN. Returns what was to be written."""
    n = len(slide)
    status = np.zeros(n, np.uint8) if status is None else status
    features = features_of(slide.slide_id, n, n_views)
    features[status != 0] = np.nan
    writer = FeatureWriter.open(slide, encoder, digest="0" * 64, dim=DIM, n_views=n_views)
    for s in writer.missing(range(n_views)):
        rows = slice(s.start, s.stop)
        writer.write(s, features[rows, s.view], hashes_of(n, 9)[rows, s.view], status[rows])
    return features


def change_facts(slide, **changes):
    """Change what the store says of a slide, with a fitting checksum."""
    slide._update(lambda facts: replace(facts, **changes))


def change_features(slide, encoder, **changes):
    """Change what the store says of an encoder's features of a slide."""
    changed = replace(slide.facts.features[encoder], **changes)
    change_facts(slide, features={**slide.facts.features, encoder: changed})


def put_features(slide, encoder, values, view=0):
    """Replace one view's features of an encoder, with fitting completion records."""
    slide.features_array(encoder)[:, view] = values
    shards = dict(slide.facts.features[encoder].shards)
    for shard in slide.shards([view]):
        shards[shard.name] = replace(shards[shard.name], crc32c=checksum(values[shard.start : shard.stop]))
    change_features(slide, encoder, shards=shards)


def work(folder, slide_ids, encoder=ENCODER):
    """Write what a store misses of some slides, and return the shards that were written."""
    store, written = create(folder), list[str]()
    store.add_encoder(encoder, EncoderFacts(digest="0" * 64, dim=DIM))
    known = {slide.slide_id for slide in store.slides()}
    for slide_id in slide_ids:
        slide = store.slide(slide_id) if slide_id in known else lay(store, slide_id, n=40)
        writer = FeatureWriter.open(slide, encoder, digest="0" * 64, dim=DIM, n_views=2)
        written += [f"{slide_id} {shard.name}" for shard in writer.missing([0, 1])]
        fill(slide, encoder=encoder)
    store.save_catalogue()
    return written
