"""Stage one's encoding on dask workers: processes of this machine, or those of a scheduler that runs already.

The unit of work is a group of slides. A worker encodes it as a single process would, into the same store. A worker
that dies costs only time: dask gives its group to another, which goes on after the last recorded shard. A lock on
every slide keeps a worker that the scheduler has lost, but that still lives, from writing while its successor does.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from g2l_core.encoders.loading import LoadedEncoder, load_encoder
from g2l_core.encoders.resolve import spec_from_json
from g2l_core.errors import EncoderError, G2LError, UsageError
from g2l_core.extraction.extract import ExtractionProgress, missing_patches
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import LOCKS, locked
from pipeline.extract import encode_slides
from pipeline.settings import ExtractionSettings

if TYPE_CHECKING:
    from distributed import Client

GROUPS_PER_WORKER = 6
"""Smaller groups idle less at the end, larger ones fill more batches."""

DEATHS = 3
"""How many workers may die of a group before its slides count as failed."""

CONNECT_S = 10
LOST_WORKER_S = 600.0
"""How long a group waits for a slide that a lost worker still writes."""


def encode_on_workers(
    store: FeatureStore,
    slide_ids: Sequence[str],
    encoders: Sequence[LoadedEncoder],
    settings: ExtractionSettings,
    report: Callable[[ExtractionProgress], None],
) -> ExtractionProgress:
    """Encode what the slides still miss on workers; the arguments are those of `encode_slides`.

    Raises:
        UsageError: dask.distributed is not installed, or no scheduler answers.
        G2LError: A worker met what stops the whole run: a full disk, other weights.
    """
    keys, again = [encoder.key for encoder in encoders], settings.retry_failed
    missing = {i: missing_patches(store, [i], keys, 1 + settings.views, retry_unreadable=again) for i in slide_ids}
    total = ExtractionProgress(patches_total=sum(missing.values()))
    if not total.patches_total:
        return total
    begin = perf_counter()
    with _client(settings) as client:
        workers = max(1, len(client.nthreads()))
        groups = make_groups(missing, workers * GROUPS_PER_WORKER, 4 * settings.batch_size)
        facts = [encoder.facts for encoder in encoders]
        for group, outcome in _run(client, groups, store, facts, settings):
            _add(total, group, outcome, workers)
            total.elapsed = perf_counter() - begin
            report(total)
    return total


def make_groups(missing: dict[str, int], count: int, min_patches: int) -> list[list[str]]:
    """Slides that miss something in about `count` groups, the largest first, each of at least `min_patches` patches."""
    target = max(min_patches, sum(missing.values()) / count)
    groups: list[list[str]] = []
    filled = target
    for slide_id, patches in sorted(missing.items(), key=lambda item: (-item[1], item[0])):
        if not patches:
            continue
        if filled >= target:
            groups.append([])
            filled = 0
        groups[-1].append(slide_id)
        filled += patches
    return groups


def _run(
    client: "Client",
    groups: Sequence[Sequence[str]],
    store: FeatureStore,
    facts: Sequence[EncoderFacts],
    settings: ExtractionSettings,
) -> Iterator[tuple[Sequence[str], "ExtractionProgress | str"]]:
    """Yield each group with its progress, or with the reason why its workers died, as they end."""
    from distributed import KilledWorker, as_completed

    path = store.path.resolve()
    futures = {
        client.submit(encode_group, path, group, facts, settings, pure=False, priority=-place): group
        for place, group in enumerate(groups)
    }
    for future in as_completed(list(futures)):
        group = futures[future]
        try:
            outcome, fatal = future.result()
        except KilledWorker:
            yield group, f"{DEATHS} workers died of it, for want of memory perhaps; see the scheduler's logs"
            continue
        if fatal:
            raise G2LError(fatal)
        yield group, outcome


def _add(total: ExtractionProgress, group: Sequence[str], outcome: "ExtractionProgress | str", workers: int) -> None:
    """Add what a group did to the total. Seconds are divided by the workers, so that utilization stays below 1."""
    if isinstance(outcome, str):
        total.failed_slides |= dict.fromkeys(group, outcome)
        return
    total.patches_done += outcome.patches_done
    total.failed_slides |= outcome.failed_slides
    total.unreadable |= outcome.unreadable
    for part, seconds in outcome.seconds.items():
        total.seconds[part] += seconds / workers


def encode_group(
    path: Path, slide_ids: Sequence[str], facts: Sequence[EncoderFacts], settings: ExtractionSettings
) -> tuple[ExtractionProgress, str]:
    """Encode a group of slides in this process, which is a worker's.

    Args:
        path: The store.
        slide_ids: The group.
        facts: What the store keeps of each encoder.
        settings: The settings of the run.

    Returns:
        What was done, and why everything must stop, empty if it need not.
    """
    try:
        encoders = _resident(facts, settings)
        store = FeatureStore.open(path, writable=True)
        with ExitStack() as held:
            for slide_id in sorted(slide_ids):
                name = sha256(slide_id.encode()).hexdigest()[:16]
                holder = f"a lost worker still writes slide {slide_id}"
                held.enter_context(locked(path / LOCKS / name, wait_s=LOST_WORKER_S, holder=holder))
            return encode_slides(store, slide_ids, encoders, settings, lambda _: None), ""
    except G2LError as error:
        return ExtractionProgress(), str(error)  # errors of other processes do not all survive pickling


_RESIDENT: dict[str, LoadedEncoder] = {}
"""The encoders of this worker process, by digest: each is loaded once, and dropped when no longer asked for."""


def _resident(facts: Sequence[EncoderFacts], settings: ExtractionSettings) -> list[LoadedEncoder]:
    for digest in set(_RESIDENT) - {wanted.digest for wanted in facts}:
        del _RESIDENT[digest]
    for wanted in facts:
        if wanted.digest not in _RESIDENT:
            spec, device = spec_from_json(wanted.to_json()), _own_device(settings.device)
            encoder = load_encoder(spec, device=device, precision=wanted.precision)
            if encoder.digest != wanted.digest:
                raise EncoderError(f"a worker has other weights of {wanted.name} than the calling process")
            _RESIDENT[wanted.digest] = encoder
    return [_RESIDENT[wanted.digest] for wanted in facts]


def _own_device(device: str) -> str:
    """The GPU with this worker's number, if there are several; else the device that was asked for."""
    import torch
    from distributed import get_worker

    count = torch.cuda.device_count()
    number = str(get_worker().name)
    spread = device in {"auto", "cuda"} and count > 1 and number.isdecimal()
    return f"cuda:{int(number) % count}" if spread else device


@contextmanager
def _client(settings: ExtractionSettings) -> "Iterator[Client]":
    """A client of the given scheduler, or of new processes on this machine."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise UsageError("--local-workers and --scheduler need dask.distributed: pip install 'g2l[cluster]'") from error
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with dask.config.set({"distributed.scheduler.allowed-failures": DEATHS - 1}):
        if settings.scheduler:
            try:
                client = Client(settings.scheduler, timeout=CONNECT_S)
            except (OSError, ValueError) as error:
                raise UsageError(f"--scheduler {settings.scheduler}: no dask scheduler answers there") from error
            with client:
                yield client
            return
        threads = str(max(1, (os.cpu_count() or 1) // settings.local_workers))
        with (
            dask.config.set({"distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": threads}}),
            LocalCluster(
                n_workers=settings.local_workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                silence_logs=logging.ERROR,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
