"""Stage three: tasks, the rows that they are about, and their metrics.

A task file becomes `TaskSpec`s (`task_file`, `spec`), `rows` joins stored patches with labels, the `families`
compute metric values, and `evaluate` puts intervals around them.
"""
