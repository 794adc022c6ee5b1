"""The DeepSpeed door: one verb per optimiser step, and the state by parameter name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.configs.errors import PreflightError
from shoal.configs.schema import OptimConfig, TrainConfig
from shoal.data_pipeline.batch import Batch
from shoal.trainer.objective import LossSums, Objective
from shoal.trainer.optim import build_optimizer
from shoal.trainer.state import ShardedState, name_states

MakeOptimizer = Callable[[nn.Module, OptimConfig], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, over all ranks."""

    sums: LossSums
    tokens: int
    grad_norm: float
    taken: bool = True
    """Whether the weights were updated."""

    def describe(
        self, *, distils: bool, routes: bool, streams: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return what there is beside the cross-entropy, a token, by the name of its metric."""
        sums, found = self.sums, dict[str, Any]()
        if distils:
            found["distillation"] = sums.distillation / self.tokens
        if routes:
            found |= {
                "balance": sums.balance / self.tokens,
                "router_z": sums.router_z / self.tokens,
            }
            found["expert_load"] = [load / self.tokens for load in sums.expert_load]
        if sums.streams:
            each = zip(streams, sums.streams, strict=True)
            found["streams"] = {name: nats / tokens for name, (nats, tokens) in each if tokens}
        return found


def resolve_zero_stage(config: TrainConfig, num_ranks: int) -> int:
    """Return the ZeRO stage: `auto` is 1, or 0 for one rank in fp32 (nothing to shard)."""
    if config.zero_stage != "auto":
        return int(config.zero_stage)
    return 0 if num_ranks == 1 and config.precision == "fp32" else 1


class Engine:
    """DeepSpeed around an `Objective`; the same object on every ZeRO stage and device."""

    def __init__(
        self,
        objective: Objective,
        optim: OptimConfig,
        train: TrainConfig,
        *,
        accumulation: int,
        device: torch.device,
        make_optimizer: MakeOptimizer = build_optimizer,
    ) -> None:
        """Shard `objective` over the ranks of the running process group.

        Args:
            objective: What is trained; its parameters may be frozen in part.
            optim: Of the optimiser and the clipping.
            train: Precision, portions, sharding.
            accumulation: Micro-batches of a step.
            device: Of this rank.
            make_optimizer: Returns a `Judged` one of the trainable parameters.

        Raises:
            PreflightError: DeepSpeed is not installed.
        """
        self.device = device
        self.num_ranks = dist.get_world_size()
        self.stage = resolve_zero_stage(train, self.num_ranks)
        self.clip_norm = optim.clip_norm
        self._shapes = {n: tuple(p.shape) for n, p in objective.model.named_parameters()}
        self._norm = torch.zeros(())
        self._num_streams = objective.num_streams
        optimizer = make_optimizer(objective, optim)
        states = name_states(objective.model, optimizer.param_groups)
        config = _deepspeed_config(objective, optim, train, self.stage, accumulation)
        self._engine, *_ = _import_deepspeed().initialize(
            model=objective, optimizer=optimizer, config=config
        )
        self._state = ShardedState(self._engine, self.stage, states)

    @property
    def parameter_states(self) -> Mapping[str, tuple[str, ...]]:
        """What there is of every parameter: `weight`, and what the optimiser keeps of it."""
        return self._state.states

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shapes of the model's parameters, however they are sharded."""
        return self._shapes

    @property
    def objective(self) -> nn.Module:
        """The module in training, wrapped or not."""
        return self._engine.module

    def train_step(
        self,
        batches: Sequence[Batch],
        lr: float,
        tokens: int,
        accepts: Callable[[float, float], bool] = lambda loss, norm: True,
    ) -> StepResult:
        """Take one optimiser step over this rank's micro-batches.

        The gradient is that of (sum of losses over all ranks) / `tokens`: DeepSpeed averages over
        ranks, so each sum is scaled by ranks / tokens.

        Args:
            batches: This rank's share.
            lr: Learning rate.
            tokens: Global count of targets.
            accepts: Asked with loss and gradient norm, which are the same on all ranks, before any
                weight changes; must answer alike everywhere. Not asked where DeepSpeed itself
                leaves a step out: at a norm that is no number.
        """
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        totals = self._accumulate(batches, tokens)
        answers: list[bool] = []

        def judge() -> bool:
            if not answers:  # ZeRO takes a step group by group
                answers.append(accepts(totals.cross_entropy / tokens, self._grad_norm()))
            return answers[0]

        self._engine.basic_optimizer.accepts = judge
        if self.stage == 0:
            limit = self.clip_norm or float("inf")
            self._norm = nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit)
        self._engine.step()
        return StepResult(totals, tokens, self._grad_norm(), taken=any(answers))

    def _accumulate(self, batches: Sequence[Batch], tokens: int) -> LossSums:
        """Add up the gradients of the micro-batches; return the sums of their losses."""
        sums: Tensor | None = None
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            batch = batch.to(self.device)
            objective, parts = self._engine(
                batch.inputs, batch.targets, batch.segments, batch.streams
            )
            self._engine.backward(objective * (self.num_ranks / tokens), scale_wrt_gas=False)
            sums = parts if sums is None else sums + parts
        assert sums is not None
        dist.all_reduce(sums)
        return LossSums.from_vector(sums, self._num_streams)

    def _grad_norm(self) -> float:
        """Norm of the gradient before clipping, known once a step has begun."""
        norm = self._norm if self.stage == 0 else self._engine.optimizer._global_grad_norm
        return float(norm or 0.0)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Return the summed cross-entropy (nats) and the count of targets, over all ranks.

        Every rank must bring the same number of batches: under ZeRO-3 a forward pass is collective.
        """
        self._engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            sums[1] += batch.real_tokens
            batch = batch.to(self.device)
            _, parts = self._engine(batch.inputs, batch.targets, batch.segments)
            sums[0] += parts[0]
        dist.all_reduce(sums)
        self._engine.train()
        return float(sums[0]), int(sums[1])

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Return whether every weight on every rank is a number; collective."""
        broken = torch.zeros(1, dtype=torch.int64, device=self.device)
        for master in self._state.masters():
            broken += (~torch.isfinite(master)).sum()
        dist.all_reduce(broken)
        return not int(broken)

    @torch.no_grad()
    def compare_replicas(self) -> list[int]:
        """Return the ranks whose copy of what all must hold alike is another than most ranks'.

        Compared are sums over the bits. All ranks hold the forward weights alike at stages 0 to 2,
        and at stage 0 the moments too; what is sharded has no copy to be compared with. Where no
        copy is held by most, all that differ from the first are returned.
        """
        if self.stage == 3:
            return []
        own = torch.zeros(1, dtype=torch.int64, device=self.device)
        for tensor in self._state.replicas():
            bits = torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32
            own += tensor.contiguous().view(bits).sum(dtype=torch.int64)
        sums = [torch.zeros_like(own) for _ in range(self.num_ranks)]
        dist.all_gather(sums, own)
        found = [int(value) for value in sums]
        most = max(found, key=lambda value: (found.count(value), value == found[0]))
        return [rank for rank, value in enumerate(found) if value != most]

    def read_slices(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """Yield (parameter, state, offset, values) of what this rank is to save, flat.

        Not collective. The slices of all ranks make up every parameter and state exactly once.
        """
        return self._state.slices(dealt=True)

    def held_slices(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """Yield all this rank holds, to be written into; then call `finish_writing`."""
        return self._state.slices(dealt=False)

    def finish_writing(self, step: int) -> None:
        """Set the optimiser's step count, and bring what was written to the forward weights.

        Collective.
        """
        self._state.finish_writing(step)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()


def start_process_group(device: torch.device, timeout_seconds: int) -> None:
    """Join the ranks named by the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    On CPU, DeepSpeed's shared-memory op is switched off first: only inference uses it, compiling
    it takes a minute and a compiler, and it leaves 69 MB a rank in /dev/shm.
    """
    from datetime import timedelta

    if dist.is_initialized():
        return
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _import_deepspeed()
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        verbose=False,
    )


def stop_process_group() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _import_deepspeed() -> Any:
    import logging

    try:
        import deepspeed
    except ImportError as error:
        raise PreflightError(
            f"DeepSpeed cannot be imported ({error}); Shoal trains through it at every stage",
            fix="pip install 'deepspeed>=0.19.8,<0.20'",
        ) from None
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    return deepspeed


def _deepspeed_config(
    objective: Objective, optim: OptimConfig, train: TrainConfig, stage: int, accumulation: int
) -> dict[str, Any]:
    """Translate our config into DeepSpeed's dictionary."""
    parameters = sum(p.numel() for p in objective.model.parameters())
    # A quarter of the model a bucket lets the first ones overlap with the backward pass; the
    # default of 5e8 elements would be allocated whole.
    bucket = max(parameters // 4, 1_000_000)
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "bf16": {"enabled": train.precision == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": torch.cuda.is_available() and stage > 0,
        },
    }
