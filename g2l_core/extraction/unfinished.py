"""What is encoded of shards that are not whole yet, so that a killed run loses seconds and not a shard.

A shard counts in the store once all of its rows are there, which for a set of patch images, in random order one by
one, may be hours. Until then its features are appended to a file beside the store, in `.<store name>.unfinished`, one
for each encoder and block of rows. The store's format knows nothing of it: without the files, the rows are encoded
again, and they may be deleted at any time. The first line says what the rows belong to; a file of anything else is
not used.
"""

import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float16, UInt64

from g2l_core.store.features import FeatureStore, Shard, StoredSlide
from g2l_core.store.location import folder_of
from g2l_core.store.tables import block_name

SAVE_EVERY_S = 3.0
"""How often what is new is appended: a kill loses what was encoded since."""


class UnfinishedShard:
    """The file of one encoder's features for the rows of one shard. Where it cannot be written, there is none."""

    def __init__(
        self, store: FeatureStore, slide: StoredSlide, encoder: str, digest: str, dim: int, start: int
    ) -> None:
        name = sha256(f"{slide.slide_id}\n{encoder}\n{start}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.path = folder(folder_of(store.path)) / f"{name}.rows"
        self._row = np.dtype(
            [("view", "<u4"), ("row", "<u4"), ("hash", "<u8"), ("features", "<f2", (dim,)), ("crc", "<u4")]
        )
        facts = {"grid": store.grid, "views": store.views, **_identity(slide, encoder, digest, start)}
        self._head = json.dumps(facts, sort_keys=True).encode() + b"\n"

    def read(
        self, shards: Sequence[Shard], features: Float16[np.ndarray, "view row dim"], hashes: UInt64[np.ndarray, "v r"]
    ) -> Bool[np.ndarray, "view row"]:
        """Put what is kept into the features and hashes of a shard's rows, and return which views of which rows.

        Of a shard of which every view of every row is kept, one is left out: encoding it makes the shard whole.
        """
        kept = np.zeros(hashes.shape, bool)
        content = b""
        with suppress(OSError):
            content = self.path.read_bytes()
        if not content.startswith(self._head):
            self.forget()
            return kept
        body = content[len(self._head) :]
        rows = np.frombuffer(body[: len(body) // self._row.itemsize * self._row.itemsize], self._row)
        rows = rows[: self._whole(rows)]
        if len(rows) * self._row.itemsize < len(body):
            with suppress(OSError), self.path.open("r+b") as file:  # so that rows are appended behind whole ones
                file.truncate(len(self._head) + len(rows) * self._row.itemsize)
        views = {shard.view: i for i, shard in enumerate(shards)}
        for row in rows:
            view = views.get(int(row["view"]))
            if view is not None and row["row"] < hashes.shape[1]:
                features[view, row["row"]], hashes[view, row["row"]] = row["features"], row["hash"]
                kept[view, row["row"]] = True
        if kept.all():  # as where the killed run wanted more views
            kept[-1, -1] = False
        return kept

    def _whole(self, rows: np.ndarray) -> int:
        """How many rows from the first on are as they were written."""
        bad = (i for i, row in enumerate(rows) if zlib.crc32(row.tobytes()[:-4]) != row["crc"])
        return next(bad, len(rows))

    def append(
        self,
        shards: Sequence[Shard],
        features: Float16[np.ndarray, "view row dim"],
        hashes: UInt64[np.ndarray, "view row"],
        new: Bool[np.ndarray, "view row"],
    ) -> bool:
        """Append the views of rows that are `new`; whether they are kept now."""
        places = np.argwhere(new)
        rows = np.zeros(len(places), self._row)
        for kept, (view, row) in zip(rows, places, strict=True):
            kept["view"], kept["row"] = shards[view].view, row
            kept["hash"], kept["features"] = hashes[view, row], features[view, row]
            kept["crc"] = zlib.crc32(kept.tobytes()[:-4])
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("ab") as file:
                file.write((b"" if file.tell() else self._head) + rows.tobytes())
        except OSError:
            return False
        return True

    def forget(self) -> None:
        """Delete the file, and the folder with the last one."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
            self.path.parent.rmdir()


def _identity(slide: StoredSlide, encoder: str, digest: str, start: int) -> dict[str, Any]:
    """What features belong to: the encoder, and the patches and views by the checksums of their tables."""
    facts = slide.facts
    tables = {
        name: {block: crc for block, crc in facts.tables.get(name, {}).items() if _is_of(block, start)}
        for name in ("coords", "view_params", "patch_id")
    }
    return {
        "slide": slide.slide_id, "fingerprint": facts.fingerprint, "patch_px_level0": facts.patch_px_level0,
        "n": facts.n_patches, "encoder": encoder, "digest": digest, "start": start, "tables": tables,
    }  # fmt: skip


def _is_of(block: str, start: int) -> bool:
    return block.partition(".")[0] == block_name(start, 0).partition(".")[0]


def folder(store: Path) -> Path:
    """Where the files of a store are, which need not exist."""
    path = store.resolve()
    return path.with_name(f".{path.name}.unfinished")
