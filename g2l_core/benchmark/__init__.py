"""Stage three: tasks, the rows that they are about, and their metrics.

A task file becomes `TaskSpec`s (`task_file`, `spec`). `rows` joins stored patches with their `labels` and splits them.
The `metric_groups` compute metric values from the features of these rows, and `evaluate` puts intervals around them.
`plots` and `projections` make what the report plots, `notes` what its reader must know of the rows. Everything comes
out as the plain values of `g2l_core.results`.

Public names: `evaluate.evaluate_task`, `evaluate.BenchSpec`, `evaluate.TaskOutcome`, `evaluate.adjusted_over_tasks`,
`metric_groups.METRIC_GROUPS`, `rows.gather`, `rows.TaskRows`, `spec.TaskSpec` and its option classes,
`task_file.read_tasks`.
"""

__all__ = ("evaluate", "metric_groups", "rows", "spec", "task_file")
