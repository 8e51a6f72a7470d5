"""Metrics of features, as pure functions on arrays. Nothing here depends on stores, tasks or reports.

Features of patches (row, dim), their labels and their patients go in. Each metric turns them into sums or pairs over
patients, and `statistics` resamples whole patients for the intervals that all metrics share.

Public modules: `probe`, `knn`, `fewshot`, `mil`, `bags`, `survival` and `ridge` predict labels from features;
`calibration` scores probabilities; `similarity`, `alignment`, `moments` and `cohort` compare encoders; `robustness`,
`center_bias` and `consistency` measure the influence of centers and scanners; `statistics`, `folds` and `rows` serve
them all.
"""
