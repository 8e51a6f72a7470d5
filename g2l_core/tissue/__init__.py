"""Find tissue on a slide, and show what was found.

`methods.resolve_tissue` gives a method by its name: a threshold on color (`thresholds`), a segmentation network
(`network`), or outlines drawn by people (`annotations`, `geojson`). `overview` draws the result for people and QuPath.
"""
