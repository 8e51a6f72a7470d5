"""What notebooks and programs do with stores: the names that `import g2l_core as g2l` offers.

`cohort.Cohort` is a store as a whole, or a part of it with labels; everything else is reached through it. `selection`
says which patches take part, `labels` reads label files, and `frames` gives the patches as a table. `arrays` gives
their features as one array, `bags` patient by patient or slide by slide, `row_blocks` block by block, in torch too
(`batches`), and `scverse` as AnnData. `parquet` writes them for other programs. `copies` writes stores from stores, and
`user_columns` adds columns to one.

docs/python.md shows it all. Nothing here is imported before it is used.
"""

__all__ = (
    "arrays", "bags", "batches", "cohort", "copies", "frames", "labels", "optional", "parquet", "row_blocks", "scverse",
    "selection", "user_columns",
)  # fmt: skip
