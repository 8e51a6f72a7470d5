"""Stage one: from slides to stored features.

`patching` finds the patches of a slide and stores them. `extract` renders their views, gathers them into batches
over slides (`batching`), runs the encoders and writes shards; its first lines show the whole flow. `repair` decides
whether a slide that was copied again is the one that was cached.

Public names: `patching.patch_sources`, `patching.store_patched`, `patching.refresh_stored`,
`extract.extract_features`, `extract.missing_patches`, `extract.ExtractionProgress`, `repair.adopt_repaired`.
"""

__all__ = ("batching", "extract", "patching", "repair")
