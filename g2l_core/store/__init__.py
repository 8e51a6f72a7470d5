"""The feature store: a Zarr hierarchy of slides, their patches, and every encoder's features of them.

`features.FeatureStore` opens a store and finds its slides, `slide.StoredSlide` reads one, and `writer.FeatureWriter`
writes its features shard by shard. `facts` are the JSON objects that it keeps about itself, its slides, encoders and
runs; `documents` reads and writes them with their checksums, and `changes` derives one from another. `schema`
describes the arrays, and `tables` their checksums; `columns` are arrays that users have added. `rows` reads some rows
of features, and `quick_tables` the small tables of many slides. `catalogue` is an index of the slides, `ids` says which
slide ids can be stored. `boundary` translates the errors of other libraries. `verify` checks what is stored and drops
what is damaged; `format1` and `upgrade` are for stores of version 0.1. `export`, `arrays` and `torch_dataset` give a
store to other programs. `locks` let one command write at a time.

Public names: `features.FeatureStore`, `slide.StoredSlide`, `tables.Shard`, `writer.FeatureWriter`, everything in
`facts`, `verify.verify`, `verify.repair_all`, `upgrade.upgrade`, `export.export_trident`, `arrays.dask_features`,
`arrays.dask_rows`, `torch_dataset.SlideFeatures`, `locks.locked`, `schema.FORMAT`, `schema.STATUS`.
"""

__all__ = (
    "arrays", "boundary", "catalogue", "changes", "columns", "documents", "export", "facts", "features", "format1",
    "ids", "json_schema", "locks", "provenance", "quick_tables", "rows", "schema", "slide", "tables", "torch_dataset",
    "upgrade", "verify", "writer", "zarr_files",
)  # fmt: skip
