"""Stage one's encoding on dask workers: processes of this machine, or those of a scheduler that runs already.

The unit of work is a group of slides. A worker encodes it as a single process would, into the same store. A worker
that dies costs only time: dask gives its group to another, which goes on after the last recorded shard. If several die
of one group, its slides are tried one by one, so that only the slide that kills them is lost.

A lock on every slide keeps a worker that the scheduler has lost, but that still lives, from writing while its successor
does. A worker whose caller has gone stops at the next block of patches.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from g2l_core.encoders.loading import LoadedEncoder, load_encoder
from g2l_core.encoders.resolve import spec_from_json
from g2l_core.encoders.trust import code_of, with_trusted_code
from g2l_core.errors import EncoderError, G2LError, UsageError
from g2l_core.extraction.extract import ExtractionProgress, missing_patches
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore
from pipeline.extract import encode_slides
from pipeline.settings import ExtractionSettings
from pipeline.slide_locks import locked_slides

if TYPE_CHECKING:
    from distributed import Client, Future

GROUPS_PER_WORKER = 6
"""Smaller groups idle less at the end, larger ones fill more batches."""

DEATHS = 3
"""How many workers may die of a group of this machine before its slides are tried one by one; other schedulers have
their own setting, `distributed.scheduler.allowed-failures`."""

CONNECT_S = 10
POLL_S = 2.0
"""How often the scheduler is asked whether it has workers, while none of them reports."""

NO_WORKER_S = 120.0
"""How long a scheduler may have no worker before the run ends."""

SHORTEST_TTL_S = 30.0
"""How long a worker of this machine may be silent at least: it is while it imports torch."""


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
        own = {code_of(e.spec).partition(":")[0] for e in encoders} - {""}  # loaded here, so typed or trusted
        settings = replace(settings, trust_code=tuple(own))
        for group, outcome in _run(client, groups, store, facts, settings):
            _add(total, group, outcome, missing, workers)
            total.elapsed = perf_counter() - begin
            report(total)
    lost = [slide_id for slide_id in total.failed_slides if missing.get(slide_id)]
    still = missing_patches(store, lost, keys, 1 + settings.views, retry_unreadable=again)
    total.patches_done = total.patches_total - still
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
    """Yield each group with its progress, as they end; then each slide of the groups whose workers died, one by one.

    A reason in place of the progress says why workers died of a slide.

    Raises:
        G2LError: A worker met what stops the whole run, or there is no scheduler or no worker any more.
    """
    path, where = store.path.resolve(), settings.scheduler or "of this machine"

    def submit(group: Sequence[str], priority: int = 0) -> "Future[Any]":
        return client.submit(encode_group, path, group, facts, settings, pure=False, priority=priority)

    waiting = {submit(group, -place): group for place, group in enumerate(groups)}
    suspects: deque[str] = deque()
    is_alone = False
    while waiting or suspects:
        if not waiting:  # a worker that dies takes all tasks with it that it was given: nothing else may be under way
            alone, is_alone = [suspects.popleft()], True
            waiting = {submit(alone): alone}
        for future in _ended(client, list(waiting), where):
            group = waiting.pop(future)
            outcome, fatal = _outcome(future, where)
            if fatal:
                raise G2LError(fatal)
            if isinstance(outcome, str) and not is_alone:
                suspects += group
            else:
                yield group, outcome


def _outcome(future: "Future[Any]", where: str) -> tuple["ExtractionProgress | str", str]:
    """What became of a group, or why it failed; and why everything must stop, empty if it need not.

    Raises:
        G2LError: The scheduler is lost.
    """
    from distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker:
        return "workers died of it, for want of memory perhaps: start fewer of them, or with more memory each", ""
    except Exception as error:
        if future.cancelled():
            raise _no_scheduler(where) from error
        return f"{type(error).__name__} in a worker: {error}", ""


def _ended(client: "Client", futures: Sequence["Future[Any]"], where: str) -> list["Future[Any]"]:
    """The futures that have ended, at least one.

    Raises:
        G2LError: The scheduler is lost, or has had no worker that takes tasks for `NO_WORKER_S`.
    """
    from concurrent.futures import CancelledError

    from distributed import wait

    alone_since: float | None = None
    while True:
        try:
            return list(wait(futures, timeout=POLL_S, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            pass
        except CancelledError as error:
            raise _no_scheduler(where) from error
        try:
            has_workers = client.status == "running" and _has_workers(client)
        except (OSError, CancelledError, TimeoutError) as error:
            raise _no_scheduler(where) from error
        if client.status != "running":
            raise _no_scheduler(where)
        alone_since = None if has_workers else alone_since or perf_counter()
        if alone_since and perf_counter() - alone_since > NO_WORKER_S:
            raise G2LError(
                f"the dask scheduler {where} has had no worker for {NO_WORKER_S:.0f} s: all of them died, were "
                f"ended, or pause for want of memory. Start new ones and {_AGAIN}"
            )


def _has_workers(client: "Client") -> bool:
    """Whether some worker takes tasks, or is at one: those that pause for want of memory take none."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any(worker["status"] == "running" or worker["metrics"].get("executing") for worker in workers)


_AGAIN = "run the same command again: what is recorded is kept"


def _no_scheduler(where: str) -> G2LError:
    return G2LError(f"the dask scheduler {where} is gone. Start it again and {_AGAIN}")


def _add(
    total: ExtractionProgress,
    group: Sequence[str],
    outcome: "ExtractionProgress | str",
    missing: Mapping[str, int],
    workers: int,
) -> None:
    """Add what a group did to the total. Seconds are divided by the workers, so that utilization stays below 1.

    What a dead worker recorded is not in the progress of its successor, so patches are counted by what was missing.
    """
    if isinstance(outcome, str):
        total.failed_slides |= dict.fromkeys(group, outcome)
        return
    total.patches_done += sum(missing[slide_id] for slide_id in group if slide_id not in outcome.failed_slides)
    total.patches_kept = total.patches_done
    total.failed_slides |= outcome.failed_slides
    total.unreadable |= outcome.unreadable
    total.turned |= outcome.turned
    total.unprofiled |= outcome.unprofiled
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
        with locked_slides(path, slide_ids, settings.slide_timeout) as (ready, held_back):
            store = FeatureStore.open(path, writable=True)  # behind the locks, so that what is recorded stays so
            progress = encode_slides(store, ready, encoders, settings, _stop_if_unwanted)
    except G2LError as error:
        return ExtractionProgress(), str(error)  # errors of other processes do not all survive pickling
    progress.failed_slides |= held_back
    return progress, ""


def _stop_if_unwanted(_: ExtractionProgress) -> None:
    """End the task if it is no longer wanted: its caller or the scheduler has died, or another worker was given it.

    A worker that pauses for want of memory takes no further task, but ends the one that it has.

    Raises:
        G2LError: Nobody wants it.
    """
    from distributed import Status, get_worker

    worker, at_work = get_worker(), {Status.running, Status.paused}
    task = worker.state.tasks.get(worker.get_current_task())
    if worker.status not in at_work or task is None or task.state == "cancelled":
        raise G2LError("the run that asked for these slides is gone")


_RESIDENT: dict[str, LoadedEncoder] = {}
"""The encoders of this worker process, by digest: each is loaded once, and dropped when no longer asked for."""


def _resident(facts: Sequence[EncoderFacts], settings: ExtractionSettings) -> list[LoadedEncoder]:
    for digest in set(_RESIDENT) - {wanted.digest for wanted in facts}:
        del _RESIDENT[digest]
    for wanted in facts:
        if wanted.digest not in _RESIDENT:
            spec = spec_from_json(wanted.to_json(), "the calling process")
            spec, device = with_trusted_code(spec, settings.trust_code), _own_device(settings.device)
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
    for name in (
        "distributed",
        "distributed.client",
        "asyncio",
    ):  # whose tracebacks say less than the one line that ends the run
        logging.getLogger(name).setLevel(logging.CRITICAL)
    own: dict[str, float] = {"distributed.scheduler.allowed-failures": DEATHS - 1}
    if settings.slide_timeout is not None:
        own["distributed.scheduler.worker-ttl"] = max(settings.slide_timeout, SHORTEST_TTL_S)
    with dask.config.set(own):
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
                scheduler_kwargs={
                    "dashboard_address": "127.0.0.1:0"
                },  # else its port is 8787, which a second run warns of
                silence_logs=logging.ERROR,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
