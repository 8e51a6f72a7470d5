"""The feature store: a Zarr hierarchy of slides, their patches, and every encoder's features of them.

`features.FeatureStore` opens a store and finds its slides, `slide.StoredSlide` reads one, and `writer.FeatureWriter`
writes its features shard by shard. `facts` are the JSON objects that it keeps about itself, its slides, encoders and
runs, `schema` its arrays. `verify` checks what is stored; `export`, `arrays` and `torch_dataset` give it to other
programs. `locks` let one command write at a time.

Public names: `features.FeatureStore`, `slide.StoredSlide`, `slide.Shard`, `writer.FeatureWriter`, everything in
`facts`, `verify.verify`, `export.export_trident`, `arrays.dask_features`, `arrays.dask_rows`,
`torch_dataset.SlideFeatures`, `locks.locked`, `schema.FORMAT`, `schema.STATUS`.
"""

__all__ = (
    "arrays", "export", "facts", "features", "locks", "provenance", "schema", "slide", "torch_dataset", "verify",
    "writer",
)  # fmt: skip
