"""Stage two: a student learns a teacher's stored features of the very pixels that it sees.

A batch flows through the modules in this order. `sampling` decides its rows, `replay` renders their views and reads the
teacher's features of them, and `loader.ReplayDataset` joins them. `training.train` passes them through
`distiller.Distiller`, the student and its projector, to `objective.Objective`, which compares projected and teacher
features by one of the `losses`, and updates the weights by `optim`. `validation` measures the student on the
`held_out` patches; `checkpoints` and `logs` write the run folder. `spec` has the settings of all this, without torch.

Public names: `losses.LOSSES` and each loss, `objective.Objective`, `loader.ReplayDataset`, `replay.ReplaySpec`,
`held_out.read_held_out`, `distiller.Distiller`, `training.train`, `training.TrainerHooks`,
`validation.held_out_metrics`, `distributed.init_distributed`, `spec.TrainSettings`.
"""

__all__ = (
    "checkpoints", "distiller", "distributed", "held_out", "loader", "logs", "losses", "objective", "optim", "replay",
    "sampling", "spec", "target_statistics", "tensorboard", "training", "validation",
)  # fmt: skip
