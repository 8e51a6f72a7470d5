"""What notebooks and programs do with stores: the names that `import g2l_core as g2l` offers.

`cohort.Cohort` is a store as a whole, or a part of it with labels; everything else is reached through it. `selection`
says which patches take part, `labels` reads label files, and `frames` gives the patches as a table. `arrays` gives
their features as one array, `bags` patient by patient or slide by slide, `row_blocks` block by block, in torch too
(`batches`), and `scverse` as AnnData or SpatialData. `parquet` and `export_scverse` write them for other programs.
`packs` keeps them in one file for random access. `copies` writes stores from stores, `merging` one of several,
`archive` smaller ones, `publish` what others may have; `user_columns` adds columns to one.

docs/python.md shows it all. Nothing here is imported before it is used.
"""

__all__ = (
    "archive", "arrays", "bags", "batches", "cohort", "copies", "export_scverse", "frames", "labels", "merging",
    "optional", "packs", "parquet", "publish", "row_blocks", "scverse", "selection", "user_columns",
)  # fmt: skip
