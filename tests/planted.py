"""Small stores with planted features, for tasks."""

import csv

import numpy as np

from g2l_core.store.facts import EncoderFacts, SlideFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.writer import FeatureWriter

PATIENTS, PATCHES = 8, 40


SPEC = {"architecture": "none", "mean": [0.5] * 3, "std": [0.5] * 3, "pooling": "cls", "precision": "fp32", "dim": 12}


def make_store(path, strength, *, duplicates=(), patients=PATIENTS, weights="file:none", mpp=None, kind="slide"):
    """A store whose features say a patch's class, its center and its slide's class as strongly as asked.

    Patient p has one slide; its center is p % 2, its slide's class (p // 2) % 2, and its patches' classes alternate.
    """
    rng = np.random.default_rng(0)
    store = FeatureStore.create(path, grid={"patch_px": 16}, views={"seed": 0})
    for key in strength:
        encoder = {**SPEC, "digest": key, "weights_digest": key, "name": key, "weights": weights}
        store.add_encoder(key, EncoderFacts.from_json(encoder))
    directions = np.concatenate([rng.normal(size=(2, 12)), np.random.default_rng(1).normal(size=(1, 12))])
    for p in range(patients):
        kinds = np.arange(PATCHES) % 2
        coords = np.stack([np.arange(PATCHES) * 16, np.zeros(PATCHES)], axis=1).astype(np.int32)
        facts = SlideFacts(
            kind=kind,
            source="none",
            mpp=mpp,
            patch_px_level0=16,
            level0_size=(PATCHES * 16, 16),
            labels={
                "patient_id": f"p{p}",
                "medical_center": "north" if p % 2 else "south",
                "split": "test" if p >= patients // 2 else "train",
            },
        )
        params = np.zeros((PATCHES, 1, 2), np.float32)
        slide = store.add_slide(f"s{p}", facts, coords=coords, view_params=params, columns=["a", "b"], patch_ids=None)
        hashes = (1 + p * PATCHES + np.arange(PATCHES)).astype(np.uint64)
        for mine, theirs in duplicates:
            if mine[0] == p:
                hashes[mine[1]] = 1 + theirs[0] * PATCHES + theirs[1]
        noise = rng.normal(size=(PATCHES, 12))
        for more, (key, (of_class, of_center, *of_slide)) in enumerate(strength.items()):
            features = noise + of_class * directions[0] * (2 * kinds[:, None] - 1)
            features = features + of_center * directions[1] * (2 * (p % 2) - 1)
            features = features + sum(of_slide) * directions[2] * (2 * (p // 2 % 2) - 1)
            features = np.pad(features, ((0, 0), (0, more)))  # encoders have features of different sizes
            writer = FeatureWriter.open(slide, key, digest=key, dim=12 + more, n_views=1)
            (shard,) = writer.missing([0])
            writer.write(shard, features.astype(np.float32), hashes, np.zeros(PATCHES, np.uint8))
    return store


def write_labels(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def patch_labels(patients=PATIENTS):
    return [
        {"slide_id": f"s{p}", "x": str(i * 16), "y": "0", "kind": "ab"[i % 2]}
        for p in range(patients)
        for i in range(PATCHES)
    ]
