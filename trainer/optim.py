"""Parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shoal.configs.schema import OptimConfig

ADAM_STATES = ("exp_avg", "exp_avg_sq")


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the rate of step `step` (0-based) of a run of `steps`.

    Linear warm-up to the peak, then cosine or linear decay to `min_lr_share` of it, or a plateau
    whose last `decay_share` falls linearly (warm-up, stable, decay), or no decay at all. The last
    step takes the lowest rate; nothing here is state, so nothing has to be saved.
    """
    warmup = math.ceil(config.warmup_share * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    start = steps - math.ceil(config.decay_share * steps) if config.schedule == "wsd" else warmup
    start = max(start, warmup)
    done = min(max(0.0, (step - start + 1) / max(1, steps - start)), 1.0)
    lowest = config.min_lr_share
    share = {
        "constant": 1.0,
        "linear": 1.0 - (1.0 - lowest) * done,
        "wsd": 1.0 - (1.0 - lowest) * done,
        "cosine": lowest + (1.0 - lowest) * 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.schedule]
    return config.lr * share


class Judged:
    """Put before an optimiser: updates nothing where `accepts` says so.

    Every group of it names under `states` what it keeps of a parameter, in tensors of its shape.
    """

    accepts: Callable[[], bool] = staticmethod(lambda: True)

    def step(self, closure: Any = None) -> Any:
        """Take a step of one group or of all, if the step as a whole is accepted."""
        return super().step(closure) if self.accepts() else None  # type: ignore[misc]


class JudgedAdamW(Judged, torch.optim.AdamW):
    """AdamW; ZeRO goes through its motions as ever where a step is left out."""


def build_optimizer(module: nn.Module, config: OptimConfig) -> JudgedAdamW:
    """Return the optimiser of a module's trainable parameters."""
    return JudgedAdamW(
        group_parameters(module, config),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def group_parameters(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split trainable parameters: matrices decay, gains and biases do not."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group | {"states": ADAM_STATES} for group in groups if group["params"]]
