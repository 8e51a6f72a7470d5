"""Find tissue on a slide, and draw what was found.

`methods.resolve_tissue` gives a method by its name: a threshold on color (`thresholds`), a segmentation network
(`network`), or areas drawn by people (`annotations`, read by `geojson`; `classes` says which of them count). A method
gives a mask, from which the patches of the slide are chosen. Or the patches themselves are given, by another tool's
files (`coordinates`, read by `coord_files`), and nothing is looked for. `glass` judges the background's color.
`overview` draws mask and patches as a picture, and writes the mask as GeoJSON for QuPath.

Public names: `methods.resolve_tissue`, `methods.resolve_coords`, `methods.TissueMethod`, `methods.FoundTissue`,
`thresholds.otsu_tissue`, `thresholds.color_tissue`, `network.load_network`, `network.NetworkSettings`,
`annotations.read_annotation`, `overview.SlideOverview`, `overview.write_overview`, `overview.overview_folder`.
"""

__all__ = (
    "annotations",
    "classes",
    "coord_files",
    "coordinates",
    "geojson",
    "glass",
    "methods",
    "network",
    "overview",
    "thresholds",
)
