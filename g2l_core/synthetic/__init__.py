"""Drawn slides and cohorts for demos and tests. Nothing here is a model of real tissue."""
