"""`g2l store verify --recompute N`: encode random rows again, and compare them with what the store holds."""

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from g2l_core.encoders.loading import LoadedEncoder, encode_all, load_encoder
from g2l_core.encoders.resolve import spec_from_json
from g2l_core.encoders.trust import with_trusted_code
from g2l_core.errors import SlideError, StoreMismatchError
from g2l_core.extraction.proof import prove
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.identity import require_same_slide
from g2l_core.patches.render import open_patches, render_block
from g2l_core.patches.views import ViewSpec
from g2l_core.rng import keyed_generator
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.location import Location, folder_of
from g2l_core.store.locks import LOCKS, locked
from g2l_core.store.schema import STATUS, UNKNOWN_HASH
from g2l_core.store.verify import Problem

MIN_COSINE = 0.9999
"""Another batch size, thread count or device stays above it; another network does not."""


Pairs = np.ndarray
"""int64 (n, 2): stored row and view."""


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """A comparison of the recomputed features of one encoder with the stored ones."""

    encoder: str
    compared: int
    min_cosine: float
    """NaN where nothing could be compared."""
    problems: tuple[Problem, ...]
    verdict: str = ""
    """Of an imported encoder: whether its features are proved, or what is the likeliest cause if they differ."""
    agrees: bool = False
    """Of an imported encoder: whether its features are proved."""


def recompute(
    store: FeatureStore, n: int, *, seed: int, device: str, batch_size: int = 32, trusted: Collection[str] = ()
) -> Iterator[Recomputed]:
    """Encode `n` random stored (patch, view) pairs of every encoder again, from pixels that are read again.

    Args:
        store: The store.
        n: Pairs an encoder; fewer where the store has fewer.
        seed: Random seed.
        device: auto, cpu or cuda.
        batch_size: Views encoded together.
        trusted: Modules whose code may run if the store names it.

    Raises:
        EncoderError: The encoder's weights are no longer available, or the store names code that is not trusted.
    """
    for key, facts in store.encoders.items():
        if facts.imported:
            yield _prove(store, key, n, seed, device, batch_size, trusted)
            continue
        spec = with_trusted_code(spec_from_json(facts.to_json(), str(store.path / "zarr.json")), trusted)
        encoder = load_encoder(spec, device=device, precision=facts.precision)
        if encoder.digest != facts.digest:
            what = f"its digest is {encoder.digest[:12]} now, {facts.digest[:12]} in the store: other weights"
            problem = Problem(kind="damaged", encoder=key, what=what)
            yield Recomputed(encoder=key, compared=0, min_cosine=np.nan, problems=(problem,))
            continue
        cosines: list[float] = []
        problems: list[Problem] = []
        for slide_id, pairs in _draw(store, key, n, seed).items():
            try:
                agreeing, wrong = _compare(store, store.slide(slide_id), pairs, encoder, batch_size)
            except SlideError as error:
                problems.append(Problem(kind="damaged", slide_id=slide_id, encoder=key, what=str(error)))
                continue
            cosines += agreeing
            problems += [Problem(kind="damaged", slide_id=slide_id, encoder=key, what=what) for what in wrong]
        lowest = min(cosines, default=np.nan)
        yield Recomputed(encoder=key, compared=len(cosines), min_cosine=lowest, problems=tuple(problems))


def _prove(
    store: FeatureStore, key: str, n: int, seed: int, device: str, batch_size: int, trusted: Collection[str]
) -> Recomputed:
    """Compare the features of an imported encoder with what it gives, and look for the cause where they differ."""
    facts = store.encoders[key]
    if "architecture" not in facts.extra:
        verdict = f"cannot be proved: G2L does not know {facts.name or key}"
        return Recomputed(encoder=key, compared=0, min_cosine=np.nan, problems=(), verdict=verdict)
    spec = with_trusted_code(spec_from_json(facts.to_json(), str(store.path / "zarr.json")), trusted)
    rows = {slide_id: np.sort(pairs[:, 0]) for slide_id, pairs in _draw(store, key, n, seed, at_hand=True).items()}
    proof = prove(store, key, spec, rows, device=device, batch_size=batch_size)
    problems = [Problem(kind="damaged", slide_id=i, what=reason) for i, reason in proof.failed.items()]
    if proof.compared and not proof.agrees:
        problems.append(Problem(kind="unproved", encoder=key, what=proof.verdict))
    return Recomputed(
        encoder=key,
        compared=proof.compared,
        min_cosine=proof.min_cosine,
        problems=tuple(problems),
        verdict=proof.verdict,
        agrees=proof.agrees,
    )


def keep_proof(place: Location, result: Recomputed) -> None:
    """Keep in the store what came of a comparison of imported features, so that reports say it.

    Raises:
        StoreError: The store cannot be written to, or another command writes into it.
    """
    if not result.compared:
        return
    path = folder_of(place)
    with locked(path / LOCKS / "writer", wait_s=0, holder="another g2l command writes into it"):
        note = () if result.agrees else (f"imported: it {result.verdict}",)
        proof = result.verdict if result.agrees else ""
        FeatureStore.open(path, writable=True).set_proof(result.encoder, proof, note)


def _draw(store: FeatureStore, key: str, n: int, seed: int, *, at_hand: bool = False) -> dict[str, Pairs]:
    """Random (row, view) pairs with recorded features of readable patches, by slide; of slides at hand if asked."""
    slides, pairs = [], []
    for slide in store.slides():
        if key not in slide.encoder_keys or (at_hand and not slide.facts.fingerprint):
            continue
        good, records = slide.patch_status == STATUS["ok"], slide.records(key)
        shards = [s for s in slide.shards(range(slide.features_array(key).shape[1])) if s.name in records]
        for shard in shards:
            rows = shard.start + np.flatnonzero(good[shard.start : shard.stop])
            pairs.append(np.stack([rows, np.full(len(rows), shard.view)], axis=1))
            slides += [slide.slide_id] * len(rows)
    order = keyed_generator("recompute", seed, key).permutation(len(slides))[:n]
    all_pairs, names = np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64), np.array(slides)
    chosen = names[order] if len(order) else names
    return {str(name): all_pairs[order[chosen == name]] for name in np.unique(chosen)}


def _compare(
    store: FeatureStore, slide: StoredSlide, pairs: Pairs, encoder: LoadedEncoder, batch_size: int
) -> tuple[list[float], list[str]]:
    """Cosines of stored and recomputed features of one slide's pairs, and a sentence for everything that is wrong."""
    grid, views = GridSpec.from_json(store.grid), ViewSpec.from_json(store.views)
    with suppress(StoreMismatchError):  # a file that is not the same may still show the same pixels
        require_same_slide(slide, Path(slide.facts.source))
    reader, params, hashes = open_patches(slide, grid), slide.view_params, slide.pixel_hash
    pixels, wrong = [], []
    for row, view in pairs.tolist():
        block = render_block(reader, [row], params[[row]][:, [view]], np.zeros(1, np.uint8), views)
        if block.status[0] != STATUS["ok"]:
            wrong.append(f"{next(iter(block.reasons.values()), f'row {row} is filtered')} now")
        elif block.hashes[0, 0] != hashes[row, view] != UNKNOWN_HASH:
            wrong.append(f"row {row}, view {view}: the pixels are not those that were encoded")
        pixels.append(block.pixels[0, 0])
    stored = np.stack([slide.read_rows(encoder.key, row, row + 1, view=view)[0] for row, view in pairs.tolist()])
    cosines = _cosines(encode_all(encoder, np.stack(pixels), batch_size), stored.astype(np.float32))
    for (row, view), cosine in zip(pairs.tolist(), cosines.tolist(), strict=True):
        if not cosine >= MIN_COSINE:
            wrong.append(f"row {row}, view {view}: cosine {cosine:.5f} to the stored features, expected {MIN_COSINE}")
    return cosines.tolist(), wrong


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
