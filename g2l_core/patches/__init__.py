"""From a slide to the pixels of patches and of their augmented views.

A `grid.GridSpec` decides which squares of a slide become patches, a `views.ViewSpec` which augmented views each patch
gets. `render.render_block` reads patches and renders their views: the one path that extraction and distillation share.
"""
