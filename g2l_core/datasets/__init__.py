"""Public pathology datasets: facts about each, and readers of their folders.

`table` reads the facts from datasets.toml. `manifest.write_manifest` lets a dataset's reader (`breast`, `prostate`,
`others`) find its slides, images and labels in the folder as published, and writes the manifest that `g2l
cache-teacher` takes and the label file that `g2l bench` takes. `layout` and `pixels` are what the readers share.
`page` writes docs/datasets.md.

Public names: `table.DATASETS`, `spec.Dataset`, `spec.Record`, `spec.Reading`, `manifest.write_manifest`,
`page.describe`.
"""

__all__ = ("breast", "layout", "manifest", "others", "page", "pixels", "prostate", "spec", "table")
