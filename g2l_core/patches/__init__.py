"""From a slide to the pixels of patches and of their augmented views.

A `spec.GridSpec` decides which squares of a slide become patches, a `spec.ViewSpec` which augmented views each patch
gets. `render.render_block` reads patches and renders their views: the one path that extraction and distillation share.
It leaves out patches that show `artifacts`. `identity` refuses slides whose files have changed since they were cached;
`reader_pool` and `pixel_cache` make repeated reading fast. `relocate` finds the slides of a store in another folder.

Public names: `spec.GridSpec`, `spec.ViewSpec`, `grid.grid_coords`, `grid.blocks`, `views.sample_views`,
`views.apply_views`, `render.open_patches`, `render.render_block`, `artifacts.ArtifactSpec`,
`identity.require_same_slide`, `reader_pool.ReaderPool`, `pixel_cache.PixelCache`, `relocate.relocate`.
"""

__all__ = (
    "artifacts", "color", "grid", "identity", "pixel_cache", "reader_pool", "relocate", "render",
    "spec", "views",
)  # fmt: skip
