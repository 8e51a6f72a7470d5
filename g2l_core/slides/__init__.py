"""Open whole-slide images and read pixels from them.

`manifest` finds the slides that a command is given, `readers` opens each (`ome_zarr` is one of the formats, `images`
the plain ones, `tiff_slide` the TIFF files that OpenSlide does not read, OME-TIFF among them; `tiff_tiles` decodes TIFF
files faster than OpenSlide, and `color_space` holds their tags against their tiles), `mpp` takes the scale from the
header, and `slide.Slide` reads squares at a wanted scale. `staging` copies slides to a fast disk before they are read,
`fingerprint` notices a slide that has changed.

Public names: `manifest.read_sources`, `manifest.Source`, `manifest.read_table`, `slide.open_slide`, `slide.Slide`,
`slide.read_scale`, `readers.SlideReader`, `readers.SlideHandle`, `mpp.find_scale`, `mpp.audit_scale`,
`staging.Stage`, `fingerprint.fingerprint`.
"""

__all__ = (
    "color_space",
    "fingerprint",
    "images",
    "manifest",
    "mpp",
    "notes",
    "ome_zarr",
    "readers",
    "slide",
    "staging",
    "tiff_slide",
    "tiff_tiles",
)
