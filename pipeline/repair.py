"""`g2l store verify --repair`: derive damaged tables again, and drop what else is damaged, for stage one to compute."""

from collections.abc import Iterator, Sequence

from g2l_core.extraction.repair import repair_tables
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import Problem, repair_all


def repair_store(store: FeatureStore, problems: Sequence[Problem]) -> Iterator[tuple[Problem, str]]:
    """Repair one problem after another; yields each with what was done about it, empty where nothing was.

    Args:
        store: Opened for writing, and locked by the caller.
        problems: What `verify` has found.
    """
    yield from repair_all(store, [problem for problem in problems if not problem.table])
    yield from repair_tables(store, problems)
