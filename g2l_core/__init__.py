"""G2L's library: from slides to stored features to a distilled student to metric values.

`open` gives a store to a notebook; docs/python.md shows what can be done with it. Below these names, the packages are
rooms on floors. Each imports only from floors below its own:

    api
    extraction  distillation  benchmark  datasets
    patches  tissue  encoders  heads
    slides  store  metrics  report  synthetic
    errors  types  options  results  rng  concurrency  files  version

docs/architecture.md follows one patch through them. Importing this package imports none of them: each name is imported
when it is used for the first time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from g2l_core.version import __version__

if TYPE_CHECKING:
    from g2l_core.api.bags import PatchBags, collate_bags
    from g2l_core.api.batches import PatchBatches
    from g2l_core.api.cohort import Cohort
    from g2l_core.api.cohort import open_cohort as open
    from g2l_core.api.merging import merge
    from g2l_core.api.row_blocks import Block, RowBlocks
    from g2l_core.distillation.losses import logsum
    from g2l_core.encoders.loading import load_encoder
    from g2l_core.errors import G2LError
    from g2l_core.metrics.similarity import linear_cka
    from g2l_core.report.write import read_report
    from g2l_core.slides.slide import open_slide

__all__ = [
    "Block", "Cohort", "G2LError", "PatchBags", "PatchBatches", "RowBlocks", "__version__", "collate_bags",
    "linear_cka", "load_encoder", "logsum", "merge", "open", "open_slide", "read_report",
]  # fmt: skip

_HOMES = {
    "Block": "g2l_core.api.row_blocks",
    "Cohort": "g2l_core.api.cohort",
    "G2LError": "g2l_core.errors",
    "PatchBags": "g2l_core.api.bags",
    "PatchBatches": "g2l_core.api.batches",
    "RowBlocks": "g2l_core.api.row_blocks",
    "collate_bags": "g2l_core.api.bags",
    "linear_cka": "g2l_core.metrics.similarity",
    "load_encoder": "g2l_core.encoders.loading",
    "logsum": "g2l_core.distillation.losses",
    "merge": "g2l_core.api.merging",
    "open": "g2l_core.api.cohort:open_cohort",
    "open_slide": "g2l_core.slides.slide",
    "read_report": "g2l_core.report.write",
}
"""The module of each name, and its name there if that is another."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, other = _HOMES[name].partition(":")
    value = globals()[name] = getattr(import_module(module), other or name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
