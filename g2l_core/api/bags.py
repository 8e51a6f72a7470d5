"""Bags of patches for multiple-instance learning: one item a slide, a patient, or whatever a column names."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch.utils.data import Dataset

from g2l_core.api.selection import Part, whole_parts
from g2l_core.errors import ManifestError
from g2l_core.rng import keyed_generator
from g2l_core.store.schema import STATUS


@dataclass(frozen=True, kw_only=True)
class BagOptions:
    """What the bags of a cohort are; see `Cohort.bags`."""

    by: str = "slide_id"
    label: str = ""
    view: int = 0
    max_patches: int | None = None
    seed: int = 0
    missing: str = "refuse"


@dataclass(frozen=True, kw_only=True)
class _Member:
    """The patches of one slide in a bag."""

    part: Part
    first: int
    """The place of the slide's first patch in the cohort's table of patches."""
    places: Int64[np.ndarray, "_"] | None = None
    """Which of the slide's patches in the cohort they are; None is all."""

    @property
    def index(self) -> Int64[np.ndarray, "_"]:
        """Their places in the cohort's table of patches."""
        return self.first + (np.arange(len(self.part)) if self.places is None else self.places)

    def at(self, places: Int64[np.ndarray, "_"]) -> "_Member":
        """Some of them."""
        if len(places) == len(self.part):
            return self
        known = places if self.places is None else self.places[places]
        return replace(self, part=replace(self.part, chosen=self.part.rows[places]), places=known)


class PatchBags(Dataset[dict[str, Any]]):
    """Bags of patches, a torch Dataset. `Cohort.bags` makes it.

    An item is a dict: `features` float32 (n, dim), `coords` int32 (n, 2) in level-0 pixels, `index` int64 (n,), the
    places in the cohort's table of patches, `bag`, its name, and with a label `label` and `target`, the place of the
    label among `classes`. Unreadable patches are left out. Bags differ in n: give a DataLoader `collate_bags`, or
    `batch_size=None`. Workers may be processes of any start method.

    Attributes:
        names: The bags in the order of the items, sorted.
        labels: The label of each bag by its name; empty where none was asked for.
        classes: The different labels, sorted.
        skipped: Why slides and bags were left out, by name.
    """

    def __init__(self, parts: Sequence[Part], encoder: str, options: BagOptions) -> None:
        self._encoder, self._options, self._epoch = encoder, options, 0
        firsts = dict(zip((part.slide_id for part in parts), np.cumsum([0, *map(len, parts)]).tolist(), strict=False))
        whole, skipped = whole_parts(parts, encoder, options.view, options.missing)
        self.skipped = dict(skipped)
        self._bags: dict[str, list[_Member]] = defaultdict(list)
        labels: dict[str, set[str]] = defaultdict(set)
        for part in whole:
            for name, places in self._groups(part):
                member = _Member(part=part, first=firsts[part.slide_id]).at(places)
                self._bags[name].append(member)
                if options.label:
                    labels[name] |= set(part.columns.column(options.label, member.part.rows))
        self._settle_labels(labels)
        self.names = tuple(sorted(self._bags))
        self.classes = tuple(sorted(set(self.labels.values())))
        if not self.names:
            why = next(iter(self.skipped.items()), ("", "it has no patches"))
            raise ManifestError(f"no bag is left; {why[0]}: {why[1]}")

    def _groups(self, part: Part) -> Iterator[tuple[str, Int64[np.ndarray, "_"]]]:
        """The bags that a slide's patches are of, with the places of these among them."""
        by = self._options.by
        names = part.columns.column(by, part.rows)
        for name in dict.fromkeys(names.tolist()):
            if name:
                yield name, np.flatnonzero(names == name)
            else:
                self._refuse(part.slide_id, f"patches without {by}")

    def _settle_labels(self, labels: Mapping[str, set[str]]) -> None:
        self.labels: dict[str, str] = {}
        for name in list(self._bags) if self._options.label else ():
            given = sorted(labels[name] - {""})
            if len(given) > 1:
                raise ManifestError(
                    f"each bag has one {self._options.label}, but {name} has {' and '.join(given[:3])}; bags by "
                    f"{self._options.by} cannot have this label"
                )
            if given:
                self.labels[name] = given[0]
            else:
                self._refuse(name, f"no {self._options.label}")
                del self._bags[name]

    def _refuse(self, name: str, why: str) -> None:
        """Take note that a slide or a bag is left out.

        Raises:
            ManifestError: Nothing may be left out.
        """
        if self._options.missing == "refuse":
            raise ManifestError(f'{name}: {why}. Give it with with_labels, or leave it out with missing="skip"')
        self.skipped[name] = why

    def set_epoch(self, epoch: int) -> None:
        """Draw other patches of the bags that have more than `max_patches`."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: int) -> dict[str, Any]:
        name = self.names[item]
        members = self._drawn(name, [m.at(np.flatnonzero(m.part.status == STATUS["ok"])) for m in self._bags[name]])
        features = [m.part.features(self._encoder, self._options.view).astype(np.float32) for m in members]
        bag: dict[str, Any] = {
            "features": torch.from_numpy(np.concatenate(features)),
            "coords": torch.from_numpy(np.concatenate([m.part.coords for m in members])),
            "index": torch.from_numpy(np.concatenate([m.index for m in members])),
            "bag": name,
        }
        if not self._options.label:
            return bag
        return bag | {"label": self.labels[name], "target": self.classes.index(self.labels[name])}

    def _drawn(self, name: str, members: list[_Member]) -> list[_Member]:
        """At most `max_patches` of a bag, drawn by the seed, the epoch and the bag alone."""
        sizes, limit = [len(member.part) for member in members], self._options.max_patches
        if limit is None or sum(sizes) <= limit:
            return members
        generator = keyed_generator("bag", self._options.seed, self._epoch, name)
        drawn = np.sort(generator.choice(sum(sizes), limit, replace=False))
        starts = np.cumsum([0, *sizes])
        places = [drawn[(a <= drawn) & (drawn < b)] - a for a, b in pairwise(starts)]
        return [member.at(inside) for member, inside in zip(members, places, strict=True) if len(inside)]

    def __repr__(self) -> str:
        options, counts = self._options, Counter(self.labels.values())
        classes = f", {options.label}: " + ", ".join(f"{counts[c]:,} {c}" for c in self.classes) if counts else ""
        drawn = f", at most {options.max_patches:,} patches each" if options.max_patches else ""
        skipped = f", {len(self.skipped):,} skipped" if self.skipped else ""
        return f"<PatchBags: {len(self):,} by {options.by} of {self._encoder}{classes}{drawn}{skipped}>"


def collate_bags(bags: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put bags of different sizes into one batch, for a DataLoader.

    Args:
        bags: Items of `PatchBags`.

    Returns:
        `features` float32 (bag, n, dim) and `coords` int32 (bag, n, 2) with zeros behind the patches of the smaller
        bags, `index` int64 (bag, n) with -1 there, `mask` bool (bag, n), true where there is a patch, `bag`, a list of
        names, and where they have labels `label`, a list, and `target` int64 (bag,).
    """
    pad = torch.nn.utils.rnn.pad_sequence
    sizes = torch.tensor([len(bag["features"]) for bag in bags])
    batch: dict[str, Any] = {
        "features": pad([bag["features"] for bag in bags], batch_first=True),
        "coords": pad([bag["coords"] for bag in bags], batch_first=True),
        "index": pad([bag["index"] for bag in bags], batch_first=True, padding_value=-1),
        "mask": torch.arange(int(sizes.max()))[None] < sizes[:, None],
        "bag": [bag["bag"] for bag in bags],
    }
    if "label" in bags[0]:
        batch |= {"label": [bag["label"] for bag in bags], "target": torch.tensor([bag["target"] for bag in bags])}
    return batch
