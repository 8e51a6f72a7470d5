"""Exact nearest neighbors by cosine or Euclidean distance.

An exact search among 100,000 patches is one large matrix product and a selection among 10^10 scores. This package does
both in low precision, and decides in high precision:

1. `normalized` divides and centers the features, so that the Euclidean distance of rows ranks pairs as the metric does.
2. `candidates`, the first pass, multiplies all rows in bfloat16 (or float32). Each product is an upper bound of its
   pair's score, and its error is bounded too, so that a pair is dropped only if k others are certainly nearer. A few
   dozen candidates a query are left.
3. `neighbors`, the second pass, measures the candidates in float64 from the differences of rows. Those distances
   decide, and between equal ones the row number does. No pair that could win was dropped, so the result is exact. No
   product decides anything, so it is the same on every machine.

Queries whose surroundings are too dense for the low precision (clusters of near-equal rows) go through the first pass
again in float32, and then through a full ranking. Small searches begin with the full ranking. Decision 15
(docs/decisions/15-exact-neighbours.md) has the reasons, and `reference` the same search in a few lines of NumPy.

Public names: neighbors.nearest, neighbors.Neighbors, neighbors.knn_vote, neighbors.knn_predict, neighbors.Vote,
reference.nearest_by_definition.
"""

__all__ = ["candidates", "neighbors", "normalized", "reference"]
