"""SwiGLU experts over routed tokens, dropless: a loop, and torch's grouped matrix product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("loop", "grouped_mm")
ALIGNMENT_BYTES = 16  # what grouped_mm asks of every row of its operands


def run_experts(
    hidden: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    backend: str,
) -> Tensor:
    """Send every token through its experts and add the results, weighted by the gates.

    An expert is down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU). Its gate value scales the
    inner activation, which equals scaling the output and touches fewer numbers. No token is
    dropped, and experts without tokens are allowed.

    Args:
        hidden: (tokens, width).
        expert_ids: (tokens, k) int64, which experts a token visits.
        gates: (tokens, k), how much each counts; any float dtype.
        gate_up: (experts, 2 x expert_hidden, width); the first half is the gate.
        down: (experts, width, expert_hidden).
        backend: `loop` visits one expert after the other and synchronises with the host;
            `grouped_mm` sorts the tokens by expert and never synchronises.

    Returns:
        (tokens, width), in the dtype of `hidden`.

    Raises:
        ValueError: unknown backend.
    """
    if backend == "grouped_mm":
        return _run_grouped(hidden, expert_ids, gates, gate_up, down)
    if backend == "loop":
        return _run_loop(hidden, expert_ids, gates, gate_up, down)
    raise ValueError(f"unknown experts backend {backend!r}; there are {BACKENDS}")


def _run_loop(
    hidden: Tensor, expert_ids: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    result = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for expert in range(gate_up.shape[0]):
        tokens, slots = torch.where(expert_ids == expert)
        inner = F.linear(hidden[tokens], gate_up[expert])
        inner = _activate(inner, gates[tokens, slots])
        output = F.linear(inner, down[expert])
        result = result.index_add(0, tokens, output.to(result.dtype))
    return result.to(hidden.dtype)


def _run_grouped(
    hidden: Tensor, expert_ids: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    active = expert_ids.shape[1]
    sorted_ids, order = expert_ids.flatten().sort(stable=True)
    # Where each expert's tokens end. Counting by search, because bincount waits for the device.
    experts = torch.arange(gate_up.shape[0], device=hidden.device)
    ends = torch.searchsorted(sorted_ids, experts, right=True).to(torch.int32)
    places = torch.empty_like(order).scatter_(0, order, _positions(order))
    rows = _Dispatch.apply(hidden, order, places, active)  # (tokens x k, width)
    inner = _grouped_linear(rows, gate_up, ends)
    inner = _activate(inner, _Permute.apply(gates.flatten(), order, places))
    outputs = _grouped_linear(inner, down, ends)
    outputs = _Permute.apply(outputs, places, order)  # back in the order of the tokens
    if active == 1:
        return outputs
    return outputs.view(-1, active, hidden.shape[1]).sum(1)


def _activate(inner: Tensor, gates: Tensor) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up * gates[:, None].to(inner.dtype)


def _positions(like: Tensor) -> Tensor:
    return torch.arange(like.shape[0], device=like.device)


def _grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return rows @ weight[expert]^T for rows sorted by expert.

    Args:
        rows: (places, inputs).
        weight: (experts, outputs, inputs).
        ends: (experts,) int32, where each expert's rows end.
    """
    multiple = ALIGNMENT_BYTES // rows.element_size()
    outputs, inputs = weight.shape[1:]
    spare_in, spare_out = -inputs % multiple, -outputs % multiple
    if spare_in or spare_out:  # zeros change nothing but the alignment
        rows = F.pad(rows, (0, spare_in))
        weight = F.pad(weight, (0, spare_in, 0, spare_out))
    product = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return product[:, :outputs] if spare_out else product


class _Dispatch(torch.autograd.Function):
    """Copy each token once per expert it visits, sorted by expert.

    The gradient gathers by the inverse order and adds k neighbours: no atomic adds, so the result
    does not depend on the schedule of a device.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, places: Tensor, active: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.active = active
        return hidden.index_select(0, order // active)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        per_slot = grad.index_select(0, places).view(-1, ctx.active, grad.shape[1])
        return per_slot.sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """Reorder rows by a permutation whose inverse is known; the gradient is a plain gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
