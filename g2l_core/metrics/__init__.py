"""Metrics of features, as pure functions on arrays. Nothing here knows of stores, tasks or reports.

`statistics` resamples clusters (patients) and draws the intervals that every metric shares.
"""
