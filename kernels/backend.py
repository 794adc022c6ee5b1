"""The one place that chooses kernels, once, when a model is built."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shoal.configs.errors import PreflightError
from shoal.configs.schema import KernelConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """Resolved names, recorded in the metrics of every run; never `auto`."""

    attention: str
    experts: str
    loss_chunk_tokens: int


def resolve(config: KernelConfig, device: torch.device, dtype: torch.dtype) -> Kernels:
    """Choose what `auto` leaves open, and check what was asked for by name.

    Raises:
        PreflightError: a kernel named in the config does not run on this machine.
    """
    attention = "sdpa" if config.attention == "auto" else config.attention
    experts: str = config.experts
    if experts != "loop":
        problem = _try_grouped_mm(device, dtype)
        if problem is None:
            experts = "grouped_mm"
        elif experts == "auto":
            logger.warning("grouped_mm does not run here (%s): experts run in a loop", problem)
            experts = "loop"
        else:
            raise PreflightError(
                f"torch {torch.__version__} cannot run grouped_mm in {dtype} on {device}: "
                f"{problem}",
                where="kernels.experts",
                fix="kernels.experts=loop, or pip install --upgrade 'torch>=2.11'",
            )
    return Kernels(attention, experts, config.loss_chunk_tokens)


def _try_grouped_mm(device: torch.device, dtype: torch.dtype) -> str | None:
    """Run grouped_mm forward and backward on a few numbers; return what went wrong, if anything."""
    if not hasattr(F, "grouped_mm"):
        return "torch.nn.functional has no grouped_mm"
    try:
        rows = torch.ones(8, 16, device=device, dtype=dtype, requires_grad=True)
        weight = torch.ones(2, 16, 16, device=device, dtype=dtype, requires_grad=True)
        ends = torch.tensor([3, 8], device=device, dtype=torch.int32)
        product = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        product.backward(torch.ones_like(product))
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None
