"""The DeepSpeed door: one verb per optimiser step, and the full state by parameter name.

Leans on internals of DeepSpeed 0.19 (pinned): where it keeps fp32 masters at each ZeRO stage, and
how they reach the forward weights. `tests/trainer/test_checkpoint.py` is what holds this up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.configs.errors import PreflightError
from shoal.configs.schema import OptimConfig, TrainConfig
from shoal.data_pipeline.batch import Batch
from shoal.trainer.objective import LossSums, Objective
from shoal.trainer.optim import group_parameters

STATES = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, over all ranks."""

    sums: LossSums
    tokens: int
    grad_norm: float
    taken: bool = True
    """Whether the weights were updated."""


def resolve_zero_stage(config: TrainConfig, num_ranks: int) -> int:
    """Return the ZeRO stage: `auto` is 1, or 0 for one rank in fp32 (nothing to shard)."""
    if config.zero_stage != "auto":
        return int(config.zero_stage)
    return 0 if num_ranks == 1 and config.precision == "fp32" else 1


class _JudgedAdamW(torch.optim.AdamW):
    """AdamW that updates nothing where `accepts` says so; ZeRO goes through its motions as ever."""

    accepts: Callable[[], bool] = staticmethod(lambda: True)

    def step(self, closure: Any = None) -> Any:
        """Take a step of one group or of all, if the step as a whole is accepted."""
        return super().step(closure) if self.accepts() else None


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
    ) -> None:
        """Shard `objective` over the ranks of the running process group.

        Raises:
            PreflightError: DeepSpeed is not installed.
        """
        self.device = device
        self.num_ranks = dist.get_world_size()
        self.stage = resolve_zero_stage(train, self.num_ranks)
        self.clip_norm = optim.clip_norm
        self._shapes = {n: tuple(p.shape) for n, p in objective.model.named_parameters()}
        self._norm = torch.zeros(())
        self._engine = _initialize(
            objective, optim, _deepspeed_config(objective, optim, train, self.stage, accumulation)
        )
        self._ensure_states()

    @property
    def parameter_names(self) -> list[str]:
        """Names of the model's parameters, in the one order every rank uses."""
        return list(self._shapes)

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
        sums: Tensor | None = None
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            batch = batch.to(self.device)
            objective, parts = self._engine(batch.inputs, batch.targets, batch.segments)
            self._engine.backward(objective * (self.num_ranks / tokens), scale_wrt_gas=False)
            sums = parts if sums is None else sums + parts
        assert sums is not None
        dist.all_reduce(sums)
        totals = LossSums.from_vector(sums)
        answers: list[bool] = []

        def judge() -> bool:
            if not answers:  # ZeRO takes a step group by group
                answers.append(accepts(totals.cross_entropy / tokens, self._grad_norm()))
            return answers[0]

        self._basic_optimizer.accepts = judge
        if self.stage == 0:
            limit = self.clip_norm or float("inf")
            self._norm = nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit)
        self._engine.step()
        return StepResult(totals, tokens, self._grad_norm(), taken=any(answers))

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
        for master in self._masters():
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
        held = [parameter.data for parameter in self._engine.module.parameters()]
        if self.stage == 0:
            held += [state[key] for state in self._basic_optimizer.state.values()
                     for key in STATES[1:]]  # fmt: skip
        own = torch.zeros(1, dtype=torch.int64, device=self.device)
        for tensor in held:
            bits = torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32
            own += tensor.contiguous().view(bits).sum(dtype=torch.int64)
        sums = [torch.zeros_like(own) for _ in range(self.num_ranks)]
        dist.all_gather(sums, own)
        found = [int(value) for value in sums]
        most = max(found, key=lambda value: (found.count(value), value == found[0]))
        return [rank for rank, value in enumerate(found) if value != most]

    # State by name. Writes are collective: every rank calls them, in the same order.

    def read_slices(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """Yield (parameter, state, offset, values) of what this rank holds, flat and in fp32.

        Not collective. The slices of all ranks make up every parameter and state exactly once; what
        every rank holds alike (stage 0) is dealt out, parameter by parameter.
        """
        self._link_states()
        rank = dist.get_rank()
        for number, (name, parameter) in enumerate(self._parameters()):
            if self.stage == 0 and number % self.num_ranks != rank:
                continue
            for state in STATES:
                offset, values = self._own_slice(parameter, state)
                if values.numel():
                    yield name, state, offset, values

    def _own_slice(self, parameter: nn.Parameter, state: str) -> tuple[int, Tensor]:
        """Return where this rank's part of a parameter's state begins, and the part."""
        if self.stage == 0:
            plain = self._engine.optimizer.state[parameter]
            return 0, (parameter.detach() if state == "weight" else plain[state]).flatten()
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            is_weight = state == "weight"
            part = safe_get_local_fp32_param(parameter) if is_weight else (
                safe_get_local_optimizer_state(parameter, state)
            )  # fmt: skip
            offset = dist.get_rank() * part.numel()
            whole = int(parameter.ds_numel)  # type: ignore[attr-defined]  # of DeepSpeed
            return offset, part.flatten()[: max(0, whole - offset)]  # the last one is padded
        held = getattr(parameter, "_hp_mapping", None)
        if held is None:  # all of it is on other ranks
            return 0, torch.empty(0)
        values = held.hp_fragment if state == "weight" else held.optim_fragment[state]
        return int(held.lp_fragment_address.start), values

    def write_state(self, name: str, state: str, value: Tensor) -> None:
        """Set one full fp32 tensor; call `finish_writing` when all are set."""
        parameter = dict(self._parameters())[name]
        value = value.to(self.device)
        if self.stage == 0:
            plain = self._engine.optimizer.state[parameter]
            target = parameter.data if state == "weight" else plain[state]
            target.copy_(value)
        elif self.stage == 3:
            self._write_partition(parameter, state, value)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            if state == "weight":
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, state)

    def finish_writing(self, step: int) -> None:
        """Set the optimiser's step count and push the masters into the forward weights."""
        for state in self._basic_optimizer.state.values():
            state["step"].fill_(float(step))
        self._engine.global_steps = step
        if self.stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self._engine.optimizer.fp16_partitioned_groups_flat)):
                self._engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            # Small parameters stay gathered between steps: gather them again from what was set.
            if persistent := self._engine.optimizer.persistent_parameters:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()

    @property
    def _basic_optimizer(self) -> _JudgedAdamW:
        return self._engine.basic_optimizer  # type: ignore[no-any-return]

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        by_name = dict(self._engine.module.model.named_parameters())
        return [(name, by_name[name]) for name in self._shapes]

    def _masters(self) -> list[Tensor]:
        """The tensors the optimiser updates on this rank."""
        if self.stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._basic_optimizer.param_groups for p in group["params"]]

    def _ensure_states(self) -> None:
        """Create zero moments now, so that a fresh run and a resumed one hold the same state."""
        for master in self._masters():
            self._basic_optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        self._link_states()

    def _link_states(self) -> None:
        """Let DeepSpeed's fragments point at the moments; it does so for group 0 alone."""
        if self.stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _write_partition(self, parameter: nn.Parameter, state: str, value: Tensor) -> None:
        """Write this rank's slice at stage 3; DeepSpeed's own full setter fails on a ragged end."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # of DeepSpeed
        flat = torch.zeros(length * self.num_ranks, device=value.device)
        flat[: value.numel()] = value.flatten()
        mine = flat.narrow(0, dist.get_rank() * length, length)
        if state == "weight":
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, state)


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


def _initialize(objective: Objective, optim: OptimConfig, config: dict[str, Any]) -> Any:
    deepspeed = _import_deepspeed()
    optimizer = _JudgedAdamW(
        group_parameters(objective, optim),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    return engine


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
