"""The plain PyTorch loop that training must agree with: one device, autograd, torch's AdamW.

Nothing of the engine, the chunked loss or the fast kernels is used here. Both sides read the same
synthetic rows, which anybody can make again from the number of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shoal.configs.schema import KernelConfig, ModelConfig, MoEConfig, OptimConfig, TrainConfig
from shoal.data_pipeline.batch import IGNORE, Batch
from shoal.kernels.backend import Kernels, resolve
from shoal.trainer.engine import Engine
from shoal.trainer.model import Transformer
from shoal.trainer.moe import balance_loss, z_loss
from shoal.trainer.objective import Objective
from shoal.trainer.optim import group_parameters, learning_rate

CONTEXT, VOCAB = 32, 64
OPTIM = OptimConfig(lr=1e-2, warmup_share=0.2, clip_norm=0.5)
REFERENCE = Kernels(attention="reference", experts="loop", loss_chunk_tokens=1)


@dataclass(frozen=True)
class Case:
    """One short training, done both ways."""

    kind: str
    """`dense` or `moe`."""
    precision: str
    rows: int
    """Of one step, over all ranks; each is a micro-batch of its own."""
    steps: int

    @property
    def shape(self) -> ModelConfig:
        """A model of which hardly any tensor divides evenly over the ranks."""
        moe = MoEConfig(num_experts=4, active_experts=2, hidden=24) if self.kind == "moe" else None
        return ModelConfig(
            vocab_size=VOCAB,
            context=CONTEXT,
            num_layers=2,
            width=40,
            num_heads=4,
            head_dim=8,
            tie_embeddings=moe is None,
            hidden=None if moe else 56,
            moe=moe,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward pass."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def make_rows(case: Case, step: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a step, (rows, context) int64; every token tells of the next.

    Rows hold different numbers of targets, so that a mean over ranks is not the mean over tokens.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    rows = torch.randint(0, VOCAB, (case.rows, CONTEXT + 1), generator=generator)
    for place in range(1, CONTEXT + 1):
        keep = torch.rand(case.rows, generator=generator) < 0.8
        rows[:, place] = torch.where(keep, (rows[:, place - 1] * 5 + 1) % VOCAB, rows[:, place])
    targets = rows[:, 1:].clone()
    for number in range(case.rows):
        targets[number, : (step + 3 * number) % (CONTEXT // 2)] = IGNORE
    return rows[:, :-1], targets


def make_batches(case: Case, step: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
    """Return a rank's part of a step, a row each, padded where the ranks do not divide it."""
    inputs, targets = make_rows(case, step)
    share = -(-case.rows // ranks)
    batches = []
    for row in range(rank * share, (rank + 1) * share):
        real = row < case.rows
        batches.append(
            Batch(
                inputs=inputs[row : row + 1] if real else torch.zeros_like(inputs[:1]),
                targets=targets[row : row + 1] if real else torch.full_like(targets[:1], IGNORE),
                segments=torch.zeros(1, CONTEXT, dtype=torch.int32),
                row_ids=torch.tensor([row if real else -1]),
            )
        )
    return batches


def count_targets(case: Case, step: int) -> int:
    """Return the targets of a step, over all ranks."""
    return int((make_rows(case, step)[1] != IGNORE).sum())


def train_plain(case: Case, device: torch.device) -> list[float]:
    """Train on one device; return the mean cross-entropy of every step.

    In bf16 the forward pass reads rounded copies of fp32 weights.
    """
    masters, worker = (Transformer(case.shape, REFERENCE) for _ in range(2))
    masters.initialize(seed=0)
    worker.initialize(seed=0)
    masters, worker = masters.to(device), worker.to(device, case.dtype)
    optimizer = torch.optim.AdamW(
        group_parameters(masters, OPTIM), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps
    )
    pairs = list(zip(masters.parameters(), worker.parameters(), strict=True))
    losses = []
    for step in range(case.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, case.steps)
        tokens, total = count_targets(case, step), 0.0
        for batch in make_batches(case, step):
            loss, cross_entropy = _sum_losses(worker, batch.to(device))
            (loss / tokens).backward()
            total += float(cross_entropy)
        for master, copy in pairs:
            assert copy.grad is not None
            master.grad, copy.grad = copy.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.parameters(), OPTIM.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for master, copy in pairs:
                copy.copy_(master)
        losses.append(total / tokens)
    return losses


def _sum_losses(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the objective of a batch with its gradient, and the cross-entropy in it: sums."""
    hidden = model(batch.inputs, batch.segments)
    logits = F.linear(hidden.states, model.head_weight).float().flatten(0, 1)
    targets = batch.targets.flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    total, moe, mask = loss, model.config.moe, targets != IGNORE
    for stats in hidden.router if moe else ():
        assert moe is not None
        balance = moe.balance_weight * balance_loss(stats, mask, moe.num_experts)
        total = total + mask.sum() / len(hidden.router) * (
            balance + moe.z_weight * z_loss(stats, mask)
        )
    return total, loss.detach()


def train_sharded(
    case: Case, stage: int, device: torch.device, kernels: KernelConfig
) -> list[float]:
    """Train over the ranks of the process group; return the mean cross-entropy of every step."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Transformer(case.shape, resolve(kernels, device, case.dtype))
    model.initialize(seed=0)
    train = TrainConfig.model_validate(
        {
            "tokens": case.steps * case.rows * CONTEXT,
            "batch_rows": case.rows,
            "micro_batch_rows": 1,
            "precision": case.precision,
            "zero_stage": stage,
        }
    )
    engine = Engine(
        Objective(model), OPTIM, train, accumulation=-(-case.rows // ranks), device=device
    )
    losses = []
    for step in range(case.steps):
        batches, tokens = make_batches(case, step, rank, ranks), count_targets(case, step)
        result = engine.train_step(batches, learning_rate(OPTIM, step, case.steps), tokens)
        losses.append(result.sums.cross_entropy / result.tokens)
    engine.close()
    return losses
