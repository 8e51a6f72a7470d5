"""Exact nearest neighbors by cosine or Euclidean distance."""
