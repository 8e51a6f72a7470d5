"""Tests of g2l_core.metrics.knn."""
