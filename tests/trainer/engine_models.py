"""The engines that ranks of tests train: odd shapes, made-up rows, broken gradients."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.configs.schema import ModelConfig, MoEConfig, OptimConfig, TrainConfig
from shoal.data_pipeline.batch import IGNORE, PADDING_ROW, Batch
from shoal.data_pipeline.loader import Loader
from shoal.data_pipeline.packing import RowBatch
from shoal.kernels.backend import Kernels
from shoal.trainer.engine import Engine
from shoal.trainer.model import Transformer
from shoal.trainer.moe import MixtureOfExperts, RouterStats
from shoal.trainer.objective import Objective
from shoal.trainer.optim import Judged, build_optimizer, group_parameters

ROWS, CONTEXT, VOCAB = 4, 16, 64
OPTIM = OptimConfig(lr=1e-2, warmup_share=0.2, clip_norm=0.5)
KERNELS = Kernels(attention="sdpa", experts="grouped_mm", loss_chunk_tokens=8)
FLOPS_PER_TOKEN = 100.0


def shape(kind: str) -> ModelConfig:
    """Return a model of which no matrix, gain or bias divides evenly over 3 ranks."""
    hidden = {"moe": 24, "wide moe": 32}.get(kind)
    moe = MoEConfig(num_experts=4, active_experts=2, hidden=hidden) if hidden else None
    return ModelConfig(
        family="gpt2" if kind == "gpt2" else "llama",
        vocab_size=VOCAB,
        context=CONTEXT,
        num_layers=2,
        width=32,
        num_heads=4,
        qk_norm=moe is not None,
        tie_embeddings=moe is None,
        hidden=None if moe else 40,
        dropout=0.2 if kind == "dropout" else 0.0,
        moe=moe,
    )


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Learnable rows: every token determines most of the next one; some targets are ignored."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows = torch.randint(0, VOCAB, (ROWS, CONTEXT + 1), generator=generator)
    for place in range(1, CONTEXT + 1):
        keep = torch.rand(ROWS, generator=generator) < 0.8
        rows[:, place] = torch.where(keep, (rows[:, place - 1] * 5 + 1) % VOCAB, rows[:, place])
    targets = rows[:, 1:].clone()
    targets[0, : step % 7] = IGNORE  # ragged: ranks hold different numbers of real targets
    return rows[:, :-1], targets


def microbatches(step: int, rank: int, ranks: int, micro: int = 1) -> list[Batch]:
    """Return a rank's share; on 3 ranks the last one has nothing but padding."""
    inputs, targets = global_batch(step)
    share = -(-ROWS // (ranks * micro)) * micro
    batches = []
    for first in range(rank * share, (rank + 1) * share, micro):
        places = torch.arange(first, first + micro)
        real, safe = places < ROWS, places.clamp(max=ROWS - 1)
        batches.append(
            Batch(
                inputs=torch.where(real[:, None], inputs[safe], 0),
                targets=torch.where(real[:, None], targets[safe], IGNORE),
                segments=torch.zeros(micro, CONTEXT, dtype=torch.int32),
                row_ids=torch.where(real, step * ROWS + places, PADDING_ROW),
            )
        )
    return batches


def count_tokens(step: int) -> int:
    return int((global_batch(step)[1] != IGNORE).sum())


def build(kind: str, seed: int = 0, kernels: Kernels = KERNELS) -> Objective:
    model = Transformer(shape(kind), kernels)
    model.initialize(seed)
    return Objective(model)


def build_engine(case: dict[str, Any], ranks: int) -> Engine:
    micro = case.get("micro", 1)
    train = TrainConfig(
        tokens=1,
        batch_rows=ROWS,
        micro_batch_rows=micro,
        precision=case.get("precision", "fp32"),
        zero_stage=case["stage"],
    )
    objective = build(case["kind"], seed=case.get("seed", 0))
    objective.model.activation_checkpointing = case.get("activation_checkpointing", False)
    if "broken" in case:
        objective.model.final_norm.register_forward_hook(_gradient_breaker(**case["broken"]))
    _make_odd(objective.model, case)
    optim = OPTIM.model_copy(update=case.get("optim", {}))
    return Engine(
        objective,
        optim,
        train,
        accumulation=-(-ROWS // (ranks * micro)),
        device=torch.device(case.get("device", "cpu")),
        make_optimizer=make_mixed if case.get("optimizer") == "mixed" else build_optimizer,
    )


def _make_odd(model: Transformer, case: dict[str, Any]) -> None:
    """Freeze all but the `trained` parts; let an expert idle; add a parameter that nothing uses."""
    if "unused" in case:
        model.unused = nn.Parameter(torch.linspace(1, 2, 5))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(case.get("trained", [""]))))
    for module in model.modules():
        if "idle_expert" in case and isinstance(module, MixtureOfExperts):
            module.route = partial(_route_past, module, case["idle_expert"])  # type: ignore[method-assign]


def _route_past(moe: MixtureOfExperts, idle: int, tokens: Tensor) -> tuple[RouterStats, Tensor]:
    """Choose experts as ever, but never one of them."""
    logits = F.linear(tokens.float(), moe.router.float())
    logits = logits.index_fill(1, torch.tensor([idle]), -1e4)
    probabilities = logits.softmax(-1)
    gates, expert_ids = probabilities.topk(moe.active_experts, dim=-1)
    return RouterStats(probabilities, logits, expert_ids), gates / gates.sum(-1, keepdim=True)


class _Mixed(torch.optim.Optimizer):
    """Momentum alone for matrices, two moments for the rest: as Muon beside AdamW."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for master in group["params"]:
                state, gradient = self.state[master], master.grad
                if "momentum" in state:
                    update = state["momentum"].mul_(0.9).add_(gradient)
                else:
                    state["step"] += 1
                    first = state["exp_avg"].lerp_(gradient, 0.1)
                    second = state["exp_avg_sq"].lerp_(gradient.square(), 0.05)
                    share = (1 - 0.95 ** float(state["step"])) ** 0.5 / (
                        1 - 0.9 ** float(state["step"])
                    )
                    update = share * first / (second.sqrt() + 1e-8)
                master.sub_(update, alpha=group["lr"])


class Mixed(Judged, _Mixed):
    pass


def make_mixed(module: nn.Module, config: OptimConfig) -> Mixed:
    groups = group_parameters(module, config)
    for group in groups:
        if group["params"][0].ndim >= 2:
            group["states"] = ("momentum",)
    return Mixed(groups, {"lr": config.lr})


class Source:
    """A loader over the synthetic rows that remembers what it was asked for."""

    step = -1
    """The last that was asked for."""

    def __init__(self, rank: int, ranks: int, befall: Callable[[int], None] | None = None) -> None:
        self.rank, self.ranks, self.befall = rank, ranks, befall
        self.rows: dict[int, list[int]] = {}

    def microbatches(self, step: int) -> list[Batch]:
        Source.step = step
        if self.befall:
            self.befall(step)
        batches = microbatches(step, self.rank, self.ranks)
        self.rows[step] = [int(row) for batch in batches for row in batch.row_ids]
        return batches


class TokenRows:
    """Shards as a loader sees them, made up: every token determines most of the next one."""

    is_remote = False

    def __init__(self, count: int) -> None:
        facts = {"rows": count, "context": CONTEXT, "eot_id": 0, "tokenizer_fingerprint": "none"}
        self.manifest = SimpleNamespace(**facts)
        self._tokens = torch.cat(
            [torch.cat([x, t[:, -1:].clamp(min=0)], 1) for x, t in map(global_batch, range(count))]
        ).numpy()[:count]

    def __len__(self) -> int:
        return len(self._tokens)

    def gather(self, numbers: np.ndarray, tick: object = None) -> RowBatch:
        tokens = self._tokens[numbers]
        segments = np.zeros((len(numbers), CONTEXT), dtype=np.int32)
        return RowBatch(tokens, segments, tokens[:, 1:])


class LoaderSource(Source):
    """The loader of real runs, over two streams, that remembers what it was asked for."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__(rank, ranks)
        self.loader = Loader(
            [(TokenRows(13), 2.0), (TokenRows(7), 1.0)],  # type: ignore[list-item]
            seed=3,
            batch_rows=ROWS,
            micro_batch_rows=1,
            rank=rank,
            num_ranks=ranks,
        )

    def microbatches(self, step: int) -> list[Batch]:
        batches = self.loader.microbatches(step)
        self.rows[step] = [int(row) for batch in batches for row in batch.row_ids]
        return batches


def _gradient_breaker(steps: list[int], rank: int = 0) -> Callable[..., Tensor]:
    """Return a hook: in some steps of a loop one rank's loss is finite and its gradient is not."""

    def break_gradient(module: Any, inputs: Any, output: Tensor) -> Tensor:
        if output.requires_grad and Source.step in steps and dist.get_rank() == rank:
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    return break_gradient
