"""Layouts in which other tools read features: one function each, listed in `store.export.FORMATS`."""
