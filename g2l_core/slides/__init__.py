"""Open whole-slide images and read pixels from them.

A manifest names slides (`manifest`), a reader opens each (`readers`, `ome_zarr`, `tiff_tiles`), its header
gives the scale (`mpp`), and `slide.Slide` reads squares of it at a wanted scale. `staging` copies slides to a
fast disk ahead of their turn.
"""
