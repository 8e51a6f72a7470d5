"""Make a store of the present format out of one of format 1. Features are linked, and never computed again."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from g2l_core.errors import StoreError
from g2l_core.store import format1, schema
from g2l_core.store.boundary import writing
from g2l_core.store.documents import write_group
from g2l_core.store.facts import FeatureFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.location import folder_of
from g2l_core.store.slide import StoredSlide
from g2l_core.store.tables import Shard


@dataclass(frozen=True)
class UpgradePaths:
    """Where an upgrade happens."""

    store: Path
    """The store; after the upgrade, the new one."""

    @property
    def old(self) -> Path:
        """Where the old store is after the upgrade."""
        return self.store.with_name(f"{self.store.name}.format1")

    @property
    def aside(self) -> Path:
        """Where the new store is made."""
        return self.store.with_name(f"{self.store.name}.upgrade{schema.LEFTOVER}")


def upgrade(path: Path) -> Iterator[str]:
    """Upgrade a store, slide by slide; the last step lets the new store take the place of the old one.

    The old store is left untouched and stands beside it as `NAME.format1`, to be deleted by who has looked at the new
    one. It shares the bytes of features with it where the disk has hard links. An upgrade that was interrupted begins
    anew.

    Args:
        path: The store's folder.

    Yields:
        The id of each slide that is done.

    Raises:
        StoreError: The store has the present format already, or its neighbors cannot be written to.
        StoreCorruptError: A table of a slide cannot be read. Nothing has been changed.
    """
    paths = UpgradePaths(path)
    if not path.exists() and paths.old.exists() and paths.aside.exists():  # interrupted between the last two steps
        paths.aside.rename(path)
        return
    old = FeatureStore.open(path)
    if old.facts.format != format1.FORMAT:
        raise StoreError(f"{path} has format {old.facts.format} already")
    if paths.old.exists():
        raise StoreError(f"{paths.old} is in the way: it is the old store of an earlier upgrade; delete or move it")
    with writing(str(paths.aside)):
        shutil.rmtree(paths.aside, ignore_errors=True)
        paths.aside.mkdir()
        write_group(paths.aside, replace(old.facts, format=schema.FORMAT).to_json())
    new = FeatureStore.open(paths.aside, writable=True)
    old.require_undamaged()
    failed = old.failed_slides()
    for slide_id in old.slide_ids():
        slide = old.slide(slide_id)
        if slide_id in failed:
            new.fail_slide(slide_id, slide.facts.source, slide.facts.reason)
        else:
            _upgrade_slide(slide, new)
        yield slide_id
    new.save_catalogue()
    with writing(str(paths.store)):
        path.rename(paths.old)
        paths.aside.rename(path)


def _upgrade_slide(old: StoredSlide, new: FeatureStore) -> None:
    ids, columns = old.patch_ids, list(old.array("view_params").attrs["columns"])
    features = {key: _recorded_files(old, key) for key in old.encoder_keys}
    slide = new.add_slide(
        old.slide_id,
        replace(old.facts, features={}),
        coords=old.coords,
        view_params=old.view_params,
        columns=columns,
        patch_ids=ids,
    )
    slide.put_table("patch_status", old.patch_status)
    slide.put_table("pixel_hash", old.pixel_hash)
    for encoder, shards in features.items():
        facts = old.feature_facts(encoder)
        slide.require_features(encoder, digest=facts.digest, n_views=facts.n_views, dim=facts.dim)
        with writing(f"features of slide {old.slide_id}"):
            sizes = {
                shard.name: _link(source, folder_of(slide.shard_path(encoder, shard)))
                for shard, source in shards.items()
            }
        slide.put_records(encoder, _with_sizes(facts, sizes))


def _recorded_files(old: StoredSlide, encoder: str) -> Mapping[Shard, Path]:
    """The files of the recorded shards of an encoder."""
    records = old.records(encoder)
    shards = [s for s in old.shards(range(old.feature_facts(encoder).n_views)) if s.name in records]
    return {shard: folder_of(old.shard_path(encoder, shard)) for shard in shards}


def _link(source: Path, target: Path) -> int:
    """Link a file, or copy it where the disk has no links; returns its size, 0 where there is none."""
    if not source.exists():
        return 0
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target.stat().st_size


def _with_sizes(facts: FeatureFacts, sizes: Mapping[str, int]) -> FeatureFacts:
    """The facts with the records of those shards whose file was there."""
    shards = {name: replace(record, size=sizes[name]) for name, record in facts.shards.items() if name in sizes}
    return replace(facts, shards=shards, complete=facts.complete and len(shards) == len(facts.shards))
