"""What is minimised: next-token loss, optionally a teacher's distribution, and router losses.

Everything is a sum over tokens; the engine divides by the one global token count, so a dense run
means the same on any number of ranks and with ragged batches. The router's losses are not linear in
the tokens: they are taken over each micro-batch, as usual, and so depend a little on how a batch is
cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.configs.schema import TeacherConfig
from shoal.data_pipeline.batch import IGNORE
from shoal.kernels.loss import chunked_loss
from shoal.trainer.model import Transformer
from shoal.trainer.moe import balance_loss, expert_load, z_loss

NUM_SUMS = (
    4  # cross-entropy, distillation, balance, z-loss; loads of experts; nats, tokens a stream
)


@dataclass(frozen=True)
class LossSums:
    """Sums over the real tokens of one or many micro-batches, as plain numbers."""

    cross_entropy: float
    distillation: float
    balance: float
    router_z: float
    expert_load: tuple[float, ...]
    streams: tuple[tuple[float, float], ...] = ()
    """Cross-entropy and targets of every stream, where they are told apart."""

    @classmethod
    def from_vector(cls, vector: Tensor, num_streams: int = 0) -> LossSums:
        """Read the vector that `Objective.forward` returns, after summing over ranks."""
        values = vector.tolist()
        cross_entropy, distillation, balance, router_z = values[:NUM_SUMS]
        first = len(values) - 2 * num_streams
        nats, tokens = values[first : first + num_streams], values[first + num_streams :]
        streams = tuple(zip(nats, tokens, strict=True))
        load = tuple(values[NUM_SUMS:first])
        return cls(cross_entropy, distillation, balance, router_z, load, streams)


class Teacher:
    """A frozen model whose distribution the student is drawn to; never a submodule.

    Kept out of `nn.Module` registration, so that no engine shards, saves or trains it.
    """

    def __init__(self, model: Transformer, config: TeacherConfig) -> None:
        self.model = model.eval().requires_grad_(False)
        self.temperature = config.temperature
        self.share = config.weight

    @torch.no_grad()
    def hidden(self, inputs: Tensor, segments: Tensor) -> Tensor:
        """Return final states, (rows x context, width)."""
        return self.model(inputs, segments).states.flatten(0, 1)


class Objective(nn.Module):
    """The model together with its loss: what the engine trains.

    The loss is computed inside `forward`, where ZeRO-3 has the head's weight gathered.
    """

    def __init__(
        self, model: Transformer, teacher: Teacher | None = None, num_streams: int = 0
    ) -> None:
        """Train `model`, alone or after a teacher; losses of several streams are told apart."""
        super().__init__()
        self.model = model
        self.num_streams = num_streams if num_streams > 1 else 0
        self._teacher = [teacher] if teacher else []

    @property
    def teacher(self) -> Teacher | None:
        """The frozen teacher, if there is one."""
        return self._teacher[0] if self._teacher else None

    def forward(
        self, inputs: Tensor, targets: Tensor, segments: Tensor, streams: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the objective (0-d, with gradient) and the detached sums behind it.

        The sums are (cross-entropy, distillation, balance, z-loss, load of each expert, then
        cross-entropy and targets of each stream where rows' `streams` are given), fp32; router
        terms are means over layers times the real tokens. Plain tensors in and out: ZeRO-3's hooks
        rebuild anything richer.
        """
        hidden = self.model(inputs, segments)
        teacher = self.teacher if self.training else None
        sums = chunked_loss(
            hidden.states.flatten(0, 1),
            self.model.head_weight,
            targets.flatten(),
            self.model.kernels.loss_chunk_tokens,
            **self._teacher_terms(teacher, inputs, segments),
        )
        parts = [sums.cross_entropy.detach()[None], sums.distillation.detach()[None]]
        of_streams = self._sum_streams(sums.per_token, targets, streams)
        moe = self.model.config.moe
        if not (moe and hidden.router):
            return sums.total, torch.cat(
                [*parts, sums.total.new_zeros(NUM_SUMS - 2).detach(), *of_streams]
            )
        mask = targets.flatten() != IGNORE
        tokens = mask.sum() / len(hidden.router)
        balance = tokens * sum(balance_loss(r, mask, moe.num_experts) for r in hidden.router)
        router_z = tokens * sum(z_loss(r, mask) for r in hidden.router)
        load = tokens * sum(expert_load(r, mask) for r in hidden.router)
        objective = sums.total + moe.balance_weight * balance + moe.z_weight * router_z
        router = torch.stack([balance, router_z]).detach()
        return objective, torch.cat([*parts, router, load.detach(), *of_streams])

    def _sum_streams(
        self, per_token: Tensor, targets: Tensor, streams: Tensor | None
    ) -> list[Tensor]:
        """Return cross-entropy and targets of each stream; padded rows have none of either."""
        if not self.num_streams or streams is None:
            return []
        counts = torch.stack([per_token.view_as(targets), targets != IGNORE]).sum(-1)  # (2, rows)
        sums = counts.new_zeros(2, self.num_streams)
        return [sums.index_add_(1, streams.clamp(min=0), counts).flatten()]

    @staticmethod
    def _teacher_terms(teacher: Teacher | None, inputs: Tensor, segments: Tensor) -> dict:
        if teacher is None:
            return {}
        return {
            "teacher_hidden": teacher.hidden(inputs, segments),
            "teacher_weight": teacher.model.head_weight,
            "temperature": teacher.temperature,
            "teacher_share": teacher.share,
        }
