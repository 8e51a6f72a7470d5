"""Public datasets as manifests: each folder is read exactly as its authors publish it.

`table.DATASETS` holds the facts (where from, licence, classes, layout and where the layout is documented) with one
reader function each; `manifest.write_manifest` turns what a reader finds into what stage one and stage three take.
"""
