"""Linear layer and cross-entropy in one, chunk by chunk: the logits never exist as a whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


class LossSums(NamedTuple):
    """Sums over the targets that count, as 0-d fp32 tensors; only `total` carries a gradient."""

    total: Tensor
    """(1 - teacher_share) x cross_entropy + teacher_share x distillation."""
    cross_entropy: Tensor
    """Negative log-likelihood of the targets, nats."""
    distillation: Tensor
    """temperature^2 x KL(teacher || student) at that temperature, nats."""
    per_token: Tensor
    """The summands of the cross-entropy.  # (tokens,) fp32"""


class _Terms(NamedTuple):
    """The part of the loss that is not the student: constants and the teacher's side."""

    targets: Tensor  # (tokens,)
    chunk_tokens: int
    teacher_hidden: Tensor | None  # (tokens, teacher_width)
    teacher_weight: Tensor | None  # (vocab, teacher_width)
    temperature: float
    teacher_share: float


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_share: float = 0.0,
) -> LossSums:
    """Return the summed loss of `hidden @ weight^T` against `targets`, and its parts.

    The teacher's term is Hinton et al. 2015, section 2: T^2 KL(softmax(teacher / T) ||
    softmax(student / T)). Softmax is fp32 whatever the dtype. Gradients are made chunk by chunk in
    the forward pass, so the backward pass needs neither logits nor `weight` (which ZeRO-3 has
    given back by then). No gradient reaches the teacher.

    Args:
        hidden: (tokens, width), the student's final states.
        weight: (vocab, width), its output matrix.
        targets: (tokens,) int64; `IGNORE` where nothing is to be predicted.
        chunk_tokens: Tokens whose logits exist at one time.
        teacher_hidden: (tokens, teacher_width), or None for no teacher.
        teacher_weight: (vocab, teacher_width).
        temperature: T above.
        teacher_share: Weight of the teacher's term, in [0, 1].

    Raises:
        ValueError: one of the teacher's tensors is missing, or its vocabulary is another.
    """
    _check_teacher(weight, teacher_hidden, teacher_weight)
    if teacher_hidden is None:
        teacher_share = 0.0
    else:
        teacher_hidden = teacher_hidden.detach()
        assert teacher_weight is not None
        teacher_weight = teacher_weight.detach()
    terms = _Terms(
        targets, chunk_tokens, teacher_hidden, teacher_weight, temperature, teacher_share
    )
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return LossSums(*_ChunkedLoss.apply(hidden, weight, terms))
    sums, _, _ = _sum_chunks(hidden, weight, terms, (False, False))
    return sums


def reference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_share: float = 0.0,
) -> LossSums:
    """Compute what `chunked_loss` computes, with whole logits and torch's own gradients."""
    _check_teacher(weight, teacher_hidden, teacher_weight)
    logits = F.linear(hidden, weight).float()  # (tokens, vocab)
    each = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    cross_entropy, per_token = each.sum(), each.detach()
    if teacher_hidden is None or teacher_weight is None:
        nothing = torch.zeros_like(cross_entropy)
        return LossSums(cross_entropy, cross_entropy.detach(), nothing, per_token)
    student = F.log_softmax(logits / temperature, dim=-1)
    with torch.no_grad():
        teacher_logits = F.linear(teacher_hidden, teacher_weight).float()
        teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    distillation = temperature**2 * divergence[targets != IGNORE].sum()
    total = (1 - teacher_share) * cross_entropy + teacher_share * distillation
    return LossSums(total, cross_entropy.detach(), distillation.detach(), per_token)


class _ChunkedLoss(torch.autograd.Function):
    """Keeps the finished gradients; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, terms: _Terms
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:2]
        sums, grad_hidden, grad_weight = _sum_chunks(hidden, weight, terms, wanted)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(sums.cross_entropy, sums.distillation, sums.per_token)
        return sums.total, sums.cross_entropy, sums.distillation, sums.per_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        scaled = [None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors]
        return scaled[0], scaled[1], None


def _sum_chunks(
    hidden: Tensor, weight: Tensor, terms: _Terms, wanted: tuple[bool, bool]
) -> tuple[LossSums, Tensor | None, Tensor | None]:
    """Return the sums, and the gradients of `total` for hidden and weight where wanted."""
    sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
    per_token = torch.empty(len(terms.targets), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    # Summed over chunks in fp32: bf16 would lose the small ones.
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
    for start in range(0, terms.targets.shape[0], terms.chunk_tokens):
        part = slice(start, start + terms.chunk_tokens)
        states = hidden[part]
        per_token[part], distillation, grad_logits = _sum_chunk(
            states, weight, terms, part, any(wanted)
        )
        sums += torch.stack([per_token[part].sum(), distillation])
        if grad_logits is None:
            continue
        grad_logits = grad_logits.to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(grad_logits, weight, out=grad_hidden[part])
        if grad_weight is not None:
            _add_product(grad_weight, grad_logits, states)
    share = terms.teacher_share
    total = (1 - share) * sums[0] + share * sums[1]
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    found = LossSums(total, sums[0].clone(), sums[1].clone(), per_token)
    return found, grad_hidden, grad_weight


def _sum_chunk(
    states: Tensor, weight: Tensor, terms: _Terms, part: slice, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return one chunk's cross-entropy a token, its distillation, and the gradient of its logits.

    All in fp32.
    """
    targets = terms.targets[part]
    counts = targets != IGNORE
    safe = torch.where(counts, targets, 0)[:, None]
    logits = F.linear(states, weight).float()  # (chunk, vocab)
    log_probabilities = F.log_softmax(logits, dim=-1)
    likelihoods = log_probabilities.gather(-1, safe)[:, 0]
    cross_entropy = -torch.where(counts, likelihoods, 0.0)
    distillation = cross_entropy.new_zeros(())
    gradient = None
    if with_gradient:
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(-1, safe, torch.full_like(safe, -1, dtype=torch.float32))
        gradient.mul_(((1 - terms.teacher_share) * counts)[:, None])
    if terms.teacher_hidden is not None and terms.teacher_weight is not None:
        teacher_logits = F.linear(terms.teacher_hidden[part], terms.teacher_weight).float()
        temperature = terms.temperature
        student = F.log_softmax(logits / temperature, dim=-1)
        teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
        divergence = (teacher.exp() * (teacher - student)).sum(-1)
        distillation = temperature**2 * torch.where(counts, divergence, 0.0).sum()
        if gradient is not None:
            # d(T^2 KL)/dlogits = T (student - teacher), both at temperature T.
            pull = student.exp_().sub_(teacher.exp_())
            gradient.add_(pull.mul_((terms.teacher_share * temperature * counts)[:, None]))
    return cross_entropy, distillation, gradient


def _add_product(total: Tensor, grad_logits: Tensor, states: Tensor) -> None:
    """Add grad_logits^T @ states to the fp32 `total`, in place."""
    if grad_logits.dtype == total.dtype:
        total.addmm_(grad_logits.T, states)
    else:
        total.add_(grad_logits.T @ states)


def _check_teacher(weight: Tensor, hidden: Tensor | None, teacher_weight: Tensor | None) -> None:
    if (hidden is None) != (teacher_weight is None):
        raise ValueError("a teacher needs both teacher_hidden and teacher_weight")
    if teacher_weight is not None and teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"the teacher's vocabulary has {teacher_weight.shape[0]} entries, "
            f"the student's {weight.shape[0]}"
        )
