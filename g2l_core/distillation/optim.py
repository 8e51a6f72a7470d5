"""The optimizer, its schedule, and the rule that stops a run early."""

from collections import deque
from dataclasses import dataclass, field
from math import cos, pi
from typing import Any

import torch

from g2l_core.distillation.distiller import Distiller
from g2l_core.distillation.spec import OptimSpec
from g2l_core.encoders.timm_compat import import_timm


def build_optimizer(distiller: Distiller, spec: OptimSpec) -> torch.optim.AdamW:
    """AdamW over student and projector. Each parameter group's `share` is the factor of its learning rate."""
    return torch.optim.AdamW(_groups(distiller, spec), lr=spec.lr, weight_decay=spec.weight_decay)


def _groups(distiller: Distiller, spec: OptimSpec) -> list[dict[str, Any]]:
    if spec.layer_decay == 1:
        return [{"params": [p for p in distiller.parameters() if p.requires_grad], "share": 1.0}]
    import_timm()
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    layers = param_groups_layer_decay(distiller.student.network, layer_decay=spec.layer_decay)
    groups = [{"params": layer["params"], "share": layer["lr_scale"]} for layer in layers]
    return [*groups, {"params": list(distiller.projector.parameters()), "share": 1.0}]


def cosine(step: int, steps: int) -> float:
    """The annealing factor of a step: 1 at the first, close to 0 at the last."""
    return 0.5 * (1 + cos(pi * step / steps))


def anneal(optimizer: torch.optim.Optimizer, spec: OptimSpec, step: int, steps: int) -> tuple[float, float]:
    """Set learning rate and weight decay, both cosine-annealed (paper, 6); warm-up scales the learning rate alone.

    Returns:
        Learning rate (of a group whose share is 1) and weight decay of this step.
    """
    factor = cosine(step, steps)
    lr = spec.lr * factor * min(1.0, (step + 1) / spec.warmup if spec.warmup else 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
        group["weight_decay"] = spec.weight_decay * factor
    return lr, spec.weight_decay * factor


@dataclass
class EarlyStop:
    """The paper's rule: the loss above the mean of the last `window` steps, more than `patience` times in a row."""

    window: int
    patience: int
    recent: deque[float] = field(default_factory=deque)
    above: int = 0

    def update(self, loss: float) -> bool:
        """Add a step's loss, and return whether training should stop."""
        if self.patience and len(self.recent) == self.window:
            self.above = self.above + 1 if loss > sum(self.recent) / self.window else 0
        self.recent.append(loss)
        if len(self.recent) > self.window:
            self.recent.popleft()
        return bool(self.patience) and self.above > self.patience
