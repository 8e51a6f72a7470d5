"""One store of several: `g2l.merge`."""

from collections.abc import Sequence
from pathlib import Path

from g2l_core.api.cohort import Cohort, open_cohort
from g2l_core.errors import UsageError


def merge(cohorts: Sequence[Cohort | Path | str], out: Path | str) -> Cohort:
    """Write several stores of the same grid and views into a new one.

    A slide that several of them have, with the same patches, is taken once, with the features of all of them; so
    encoders that were stored apart come together.

    Args:
        cohorts: Stores, or parts of them that have whole slides.
        out: The folder of the new store, which must not be there.

    Raises:
        StoreMismatchError: Grid, views or encoders of one name differ, or slides of one id do; names what.
        StoreError: There is something at `out`, or it cannot be written.
        UsageError: There is nothing to merge, or a cohort has parts of slides.
    """
    from g2l_core.api.copies import Kept, write_store

    opened = [cohort if isinstance(cohort, Cohort) else open_cohort(cohort) for cohort in cohorts]
    if not opened:
        raise UsageError("name at least one store to merge")
    write_store([cohort._selection for cohort in opened], Path(out), Kept())
    return open_cohort(out)
