"""The feature store: a Zarr hierarchy of slides, their patches, and every encoder's features of them.

`features.FeatureStore` opens it and finds slides, `slide.StoredSlide` reads one, `writer.FeatureWriter` writes
features shard by shard. `verify` checks what is stored, `export`, `arrays` and `torch_dataset` hand it to other
programs.
"""
