"""A spool: the folder in which a store at an address is worked on, by whatever works on stores in folders.

It has everything of the store but the features that are at the address already: of these it keeps hollow files, see
`store.hollow`. `prepare` makes it so, from the address where the folder is new or behind. `send_slide` sends a slide
whose features are whole, and has its shards hollow from then on. What is at the address in the end is what
`store.upload` would put there.
"""

import json
import shutil
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import md5
from pathlib import Path

from g2l_core.concurrency import run_ahead
from g2l_core.errors import StoreMismatchError
from g2l_core.files import sync_tree, write_bytes, write_text
from g2l_core.store import schema
from g2l_core.store.boundary import writing
from g2l_core.store.documents import GROUP_FILE, write_group
from g2l_core.store.facts import FAILED, SlideFacts
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.hollow import MARK, is_hollow, is_shard, write_hollow
from g2l_core.store.location import REQUESTS, SHARD_REQUESTS, folder_of, sizes_below
from g2l_core.store.remote import Connection, Listing, RemoteObject, RemotePath
from g2l_core.store.tables import Shard
from g2l_core.store.upload import FIRST, require_same_store, send

ASIDE = ".catalogue/hollow"
"""Where a hollow file is made, below the spool, before it takes a shard's place."""


def prepare(folder: Path, target: RemotePath, there: Listing) -> Iterator[tuple[int, int]]:
    """Bring a folder to what is at an address, without its features. Only for the one who holds the locks of both.

    A slide of which the folder has more than the address stays as it is. A hollow file that is not at the address any
    more goes, so that its shard is computed again.

    Args:
        folder: Of the spool; made where it is missing and there is something to put into it.
        target: The address.
        there: What is there.

    Yields:
        How many slides were fetched, and of how many.

    Raises:
        StoreMismatchError: The folder holds another store than the address, or the address something else.
        StoreError: The address cannot be read, or the folder cannot be written to.
    """
    with writing(str(folder)):
        (folder / MARK).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / MARK, json.dumps({"address": str(target)}))
    if (folder / GROUP_FILE).exists():
        _require_same(folder, target, there)
        _drop_absent(FeatureStore.open(folder, writable=True), there)
    elif there.objects and GROUP_FILE not in there.objects:
        raise StoreMismatchError(
            f"{target} holds no whole store: was an upload to it interrupted? Run that again, or give another address"
        )
    if GROUP_FILE not in there.objects:
        return
    remote = FeatureStore.open(target)
    local = _with_facts_of(remote, folder)
    wanted = _behind(local, remote)
    with writing(str(folder)):
        for group in {g: None for slide_id in wanted for g in _groups_around(folder, folder / "slides" / slide_id)}:
            if not (group / GROUP_FILE).exists():
                write_group(group)
    keys = sorted(there.objects)

    def fetched(slide_id: str) -> None:
        with writing(f"slide {slide_id}"):
            _fetch(folder, slide_id, _below(f"slides/{slide_id}/", keys), target.connection, there)

    for done, _ in enumerate(run_ahead(fetched, wanted, workers=REQUESTS, lookahead=REQUESTS), start=1):
        yield done, len(wanted)


def _with_facts_of(remote: FeatureStore, folder: Path) -> FeatureStore:
    """The store in a folder, with the encoders and runs of the one at the address."""
    if not (folder / GROUP_FILE).exists():
        with writing(str(folder)):
            write_bytes(folder / GROUP_FILE, (remote.path / GROUP_FILE).read_bytes())
    local = FeatureStore.open(folder, writable=True)
    for key, encoder in remote.encoders.items():
        local.add_encoder(key, encoder)
    for run in remote.facts.runs:
        if run not in local.facts.runs:
            local.add_run(run)
    return local


def _behind(local: FeatureStore, remote: FeatureStore) -> list[str]:
    """The slides of which the address has something that the folder does not have."""
    known = local.entries
    return [
        slide_id
        for slide_id, entry in remote.entries.items()
        if entry.facts and (slide_id not in known or not _has_all_of(known[slide_id].facts, entry.facts))
    ]


def _require_same(folder: Path, target: RemotePath, there: Listing) -> None:
    try:
        require_same_store(FeatureStore.open(folder), target, there)
    except StoreMismatchError as error:
        raise StoreMismatchError(f"{error}. The spool is {folder}: give another --spool, or delete this one") from error


def _has_all_of(local: SlideFacts | None, remote: SlideFacts) -> bool:
    """Whether the facts of a slide in the folder have everything that those at the address have."""
    if local is None or (local.status == FAILED and remote.status != FAILED):
        return False
    return local.n_views >= remote.n_views and all(
        key in local.features and known.shards.items() <= local.features[key].shards.items()
        for key, known in remote.features.items()
    )


def _drop_absent(store: FeatureStore, there: Listing) -> None:
    """Drop the hollow shards of a store that are not at the address."""
    for slide in store.slides():
        for encoder, shard, path in _shards(slide):
            if path.relative_to(str(store.path)).as_posix() not in there.objects and is_hollow(path):
                slide.drop(encoder, shard)


def _shards(slide: StoredSlide) -> list[tuple[str, Shard, Path]]:
    """The recorded shards of a slide that have a file, with their encoders and files."""
    found = [
        (encoder, shard, folder_of(slide.shard_path(encoder, shard)))
        for encoder in slide.encoder_keys
        for records in [slide.records(encoder)]
        for shard in slide.shards(range(slide.feature_facts(encoder).n_views))
        if shard.name in records
    ]
    return [(encoder, shard, path) for encoder, shard, path in found if path.exists()]


def _below(start: str, keys: Sequence[str]) -> Sequence[str]:
    """Those of sorted keys that begin so."""
    return keys[bisect_left(keys, start) : bisect_left(keys, f"{start}\U0010ffff")]


def _fetch(folder: Path, slide_id: str, keys: Sequence[str], connection: Connection, there: Listing) -> None:
    """Put a slide of the address into the folder, in the place of one that is there, with hollow shards."""
    place, start = folder / "slides" / slide_id, f"slides/{slide_id}/"
    aside = folder / "slides" / f"{slide_id.replace('/', '%')}-fetched{schema.LEFTOVER}"
    shutil.rmtree(aside, ignore_errors=True)
    for key in keys:
        path = aside / key[len(start) :]
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_shard(path.relative_to(aside).parts):
            write_hollow(path, there.objects[key].size, path.with_name(f".{path.name}"))
        else:
            path.write_bytes(connection.read(key))
    sync_tree(aside)
    if place.exists():
        gone = aside.with_name(f"{slide_id.replace('/', '%')}-replaced{schema.LEFTOVER}")
        shutil.rmtree(gone, ignore_errors=True)
        place.rename(gone)
        shutil.rmtree(gone)
    aside.rename(place)


def _groups_around(folder: Path, place: Path) -> list[Path]:
    """The folders of slides around a slide's own, outermost first."""
    return [group for group in reversed(place.parents) if group != folder and group.is_relative_to(folder)]


def fetch_shards(store: FeatureStore, slides: Iterable[StoredSlide], connection: Connection) -> None:
    """Put the content of hollow shards back, for work that reads features again.

    Raises:
        StoreError: They cannot be read, or the disk is full or cannot be written to.
    """
    hollow = [path for slide in slides for _, _, path in _shards(slide) if is_hollow(path)]

    def fetched(path: Path) -> None:
        with writing(str(path)):
            write_bytes(path, connection.read(path.relative_to(str(store.path)).as_posix()))

    for _ in run_ahead(fetched, hollow, workers=SHARD_REQUESTS, lookahead=SHARD_REQUESTS):
        pass


def is_whole(facts: SlideFacts | None) -> bool:
    """Whether a slide has features, all of them complete; a slide that could not be used is whole too."""
    if facts is None or facts.status == FAILED:
        return facts is not None
    return bool(facts.features) and all(known.complete for known in facts.features.values())


def send_slide(
    folder: Path, slide: StoredSlide, connection: Connection, objects: dict[str, RemoteObject], *, keep: bool
) -> bool:
    """Have a whole slide at the address: its files, then its document.

    Every shard is compared with its completion record before it is sent, and what the server has with what was sent.

    Args:
        folder: The spool.
        slide: The slide, as its document is now.
        connection: The address.
        objects: What is there; gains what is sent.
        keep: Whether the shards keep their content in the folder.

    Returns:
        Whether it is there; False where it was changed meanwhile.

    Raises:
        StoreCorruptError: A shard is not what was written.
        StoreError: A file cannot be read, or the address cannot be written to.
    """
    place = folder_of(slide.folder)
    document = (place / GROUP_FILE).read_bytes()
    slide.reload()
    if not is_whole(slide.facts) or (place / GROUP_FILE).read_bytes() != document:
        return False
    shards = _shards(slide)
    names = ["/".join(parts) for parts, _ in sizes_below(place) if not parts[-1].endswith(schema.LEFTOVER)]
    start = f"slides/{slide.slide_id}/"
    known = objects.get(f"{start}{GROUP_FILE}")
    if known is None or known.tag != md5(document, usedforsecurity=False).hexdigest():
        for encoder, shard, path in shards:
            if not is_hollow(path):
                slide.read_rows(encoder, shard.start, shard.stop, view=shard.view)
        groups = [(group / GROUP_FILE).relative_to(folder).as_posix() for group in _groups_around(folder, place)]
        first = [f"{start}{name}" for name in names if name == FIRST]
        files = [f"{start}{name}" for name in names if name not in {GROUP_FILE, FIRST}]

        def sent(key: str) -> None:
            objects[key], _ = send(folder, key, connection, Listing(objects))

        for key in [*groups, *first]:
            sent(key)
        for _ in run_ahead(sent, files, workers=SHARD_REQUESTS, lookahead=SHARD_REQUESTS):
            pass
        if (place / GROUP_FILE).read_bytes() != document:
            return False
        sent(f"{start}{GROUP_FILE}")
    if not keep:
        free_shards(folder, slide, objects.keys())
    return True


def free_shards(folder: Path, slide: StoredSlide, there: Collection[str]) -> None:
    """Make the shards of a slide hollow that are at the address.

    Args:
        folder: The spool.
        slide: The slide.
        there: The keys of what is at the address as it is in the folder.

    Raises:
        StoreError: The disk is full, or cannot be written to.
    """
    for _, _, path in _shards(slide):
        with writing(str(path)):
            if path.relative_to(folder).as_posix() in there and not is_hollow(path):
                write_hollow(path, path.stat().st_size, folder / ASIDE)
