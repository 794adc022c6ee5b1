"""Mixture-of-experts feed-forward: router, expert weights, and what is asked of the routing."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.configs.schema import ModelConfig
from shoal.kernels.backend import Kernels
from shoal.kernels.experts import run_experts


class RouterStats(NamedTuple):
    """What one layer's router decided; a plain tuple of tensors, so that ZeRO-3's hooks see it."""

    probabilities: Tensor
    """(tokens, experts) fp32, softmax over all experts."""
    logits: Tensor
    """(tokens, experts) fp32."""
    expert_ids: Tensor
    """(tokens, k) int64, the chosen experts, best first."""


class MixtureOfExperts(nn.Module):
    """Dropless SwiGLU experts, k per token (Shazeer et al. 2017), as Mixtral and Qwen3-MoE do.

    Every matrix of all experts is one parameter, so the number of tensors does not grow with them.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        """Make zero weights; `Transformer.initialize` fills them.

        Raises:
            ValueError: `config.moe` is None.
        """
        super().__init__()
        if config.moe is None:
            raise ValueError("a mixture of experts needs config.moe")
        experts, hidden, width = config.moe.num_experts, config.feed_forward, config.width
        self.active_experts = config.moe.active_experts
        self.normalize_gates = config.moe.normalize_gates
        self.backend = kernels.experts
        self.router = nn.Parameter(torch.zeros(experts, width))
        self.gate_up = nn.Parameter(torch.zeros(experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.zeros(experts, width, hidden))

    def forward(self, states: Tensor) -> tuple[Tensor, RouterStats]:
        """Map (rows, context, width) to the same shape, and say where the tokens went."""
        tokens = states.flatten(0, 1)
        stats, gates = self.route(tokens)
        mixed = run_experts(
            tokens, stats.expert_ids, gates, self.gate_up, self.down, backend=self.backend
        )
        return mixed.view_as(states), stats

    def route(self, tokens: Tensor) -> tuple[RouterStats, Tensor]:
        """Choose k experts for every token, in fp32 whatever the weights are.

        Args:
            tokens: (tokens, width).

        Returns:
            The statistics, and the gates, (tokens, k) fp32.
        """
        logits = F.linear(tokens.float(), self.router.float())  # (tokens, experts)
        probabilities = logits.softmax(-1)
        gates, expert_ids = probabilities.topk(self.active_experts, dim=-1)
        if self.normalize_gates:
            gates = gates / gates.sum(-1, keepdim=True)
        return RouterStats(probabilities, logits, expert_ids), gates


def balance_loss(stats: RouterStats, mask: Tensor, num_experts: int) -> Tensor:
    """Return num_experts x sum_e load_e x mean probability_e: 1 when even, more when not.

    Switch Transformer (Fedus et al. 2022), equations 4 to 6, with the load counted over all k
    choices as in GShard (Lepikhin et al. 2021). The gradient flows through the probabilities.

    Args:
        stats: One layer's routing.
        mask: (tokens,) bool, False for padding, which counts nowhere.
        num_experts: Experts of the layer.

    Returns:
        0-d fp32; 0 where no token is real.
    """
    weights = mask.to(stats.probabilities.dtype)
    mean_probabilities = weights @ stats.probabilities / weights.sum().clamp(min=1)
    return num_experts * (expert_load(stats, mask) * mean_probabilities).sum()


def z_loss(stats: RouterStats, mask: Tensor) -> Tensor:
    """Return the mean of logsumexp(logits)^2 over real tokens (ST-MoE, Zoph et al. 2022, eq. 5).

    Args:
        stats: One layer's routing.
        mask: (tokens,) bool, False for padding.

    Returns:
        0-d fp32; 0 where no token is real.
    """
    weights = mask.to(stats.logits.dtype)
    return weights @ stats.logits.logsumexp(-1).square() / weights.sum().clamp(min=1)


@torch.no_grad()
def expert_load(stats: RouterStats, mask: Tensor) -> Tensor:
    """Return each expert's share of the routed (token, choice) pairs of real tokens.

    Returns:
        (experts,) fp32, summing to 1; all 0 where no token is real.
    """
    weights = mask.to(torch.float32)[:, None].expand_as(stats.expert_ids).flatten()
    load = weights.new_zeros(stats.probabilities.shape[1])
    load.index_add_(0, stats.expert_ids.flatten(), weights)  # whole numbers: exact in any order
    return load / load.sum().clamp(min=1)
