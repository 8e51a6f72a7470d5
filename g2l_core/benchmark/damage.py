"""Slides that a task goes on without, because what is stored of them is damaged."""

from collections.abc import Iterable, Sequence

from g2l_core.benchmark.widths import parted
from g2l_core.errors import StoreCorruptError, StoreMissingError, UnknownNameError
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.location import Location, below

Damages = dict[Location, str]
"""What is wrong with each damaged slide, by its folder."""


def damaged_documents(stores: Sequence[FeatureStore]) -> Damages:
    """The slides whose document cannot be used. Nobody knows whether they would take part."""
    return {store.path / "slides" / slide_id: why for store in stores for slide_id, why in store.damaged.items()}


def damaged_features(slides: Iterable[StoredSlide], encoders: Sequence[str]) -> Damages:
    """The slides whose canonical features of some encoder are not what was written, or whose file is gone."""
    return {slide.folder: why for slide in slides for encoder in encoders if (why := _damage(slide, encoder))}


def _damage(slide: StoredSlide, encoder: str) -> str:
    encoder, _ = parted(slide, encoder)
    try:
        slide.features(encoder)
    except UnknownNameError:
        return ""
    except StoreCorruptError as error:
        return str(error)
    except StoreMissingError:
        recorded, present = slide.feature_facts(encoder).shards, slide.records(encoder, [0])
        gone = [shard for shard in slide.shards([0]) if shard.name in recorded and shard.name not in present]
        if gone:
            return f"{slide.shard_path(encoder, gone[0])} is absent, or of another size than was written"
    return ""


def describe(damages: Damages) -> list[str]:
    """One sentence for each damaged slide, with its place and what to do."""
    return [
        f"slide {below(folder, _slides_of(folder))} is damaged and left out: {why}"
        + ("" if "--repair" in why else ". g2l store verify --repair mends or drops it")
        for folder, why in damages.items()
    ]


def _slides_of(folder: Location) -> Location:
    """The folder of a store's slides that a slide lies in."""
    return next(parent for parent in folder.parents if parent.name == "slides" and (parent / "zarr.json").exists())
