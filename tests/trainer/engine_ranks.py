"""A rank of the engine tests: trains small models on synthetic rows, writes what it saw as JSON.

Started by torchrun-like environment variables; one start serves many cases, because importing
DeepSpeed costs more than training does.

usage: engine_ranks.py CASES.json OUT.json
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from shoal.configs.schema import ModelConfig, MoEConfig, OptimConfig, TrainConfig
from shoal.data_pipeline.batch import IGNORE, Batch
from shoal.kernels.backend import Kernels
from shoal.trainer import checkpoint
from shoal.trainer.engine import Engine, start_process_group, stop_process_group
from shoal.trainer.model import Transformer
from shoal.trainer.objective import Objective
from shoal.trainer.optim import group_parameters, learning_rate

ROWS, MICRO, CONTEXT, VOCAB = 4, 1, 16, 64
OPTIM = OptimConfig(lr=1e-2, warmup_share=0.2, clip_norm=0.5)


def shape(kind: str) -> ModelConfig:
    moe = MoEConfig(num_experts=4, active_experts=2, hidden=24) if kind == "moe" else None
    return ModelConfig(
        family="gpt2" if kind == "gpt2" else "llama",
        vocab_size=VOCAB,
        context=CONTEXT,
        num_layers=2,
        width=32,
        num_heads=4,
        qk_norm=kind == "moe",
        # A ragged size: no parameter but the embeddings divides evenly over 3 ranks.
        hidden=None if kind == "moe" else 40,
        dropout=0.1 if kind == "dropout" else 0.0,
        moe=moe,
    )


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Learnable rows: every token determines most of the next one; some targets are ignored."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows = torch.randint(0, VOCAB, (ROWS, CONTEXT + 1), generator=generator)
    for place in range(1, CONTEXT + 1):
        keep = torch.rand(ROWS, generator=generator) < 0.8
        rows[:, place] = torch.where(keep, (rows[:, place - 1] * 5 + 1) % VOCAB, rows[:, place])
    targets = rows[:, 1:].clone()
    targets[0, : step % 7] = IGNORE  # ragged: ranks hold different numbers of real targets
    return rows[:, :-1], targets


def microbatches(step: int, rank: int, ranks: int) -> list[Batch]:
    inputs, targets = global_batch(step)
    share = -(-ROWS // ranks)
    batches = []
    for row in range(rank * share, (rank + 1) * share):
        real = row < ROWS
        batches.append(
            Batch(
                inputs=inputs[row : row + 1] if real else torch.zeros_like(inputs[:1]),
                targets=targets[row : row + 1] if real else torch.full_like(targets[:1], IGNORE),
                segments=torch.zeros(1, CONTEXT, dtype=torch.int32),
                row_ids=torch.tensor([row if real else -1]),
            )
        )
    return batches


def build(kind: str, seed: int = 0) -> Objective:
    model = Transformer(shape(kind), Kernels(attention="sdpa", experts="loop", loss_chunk_tokens=8))
    model.initialize(seed)
    return Objective(model, loss_chunk_tokens=8, moe=shape(kind).moe)


def count_tokens(step: int) -> int:
    return int((global_batch(step)[1] != IGNORE).sum())


def train_plain(kind: str, steps: int) -> list[float]:
    """The plain PyTorch loop that the engine must agree with."""
    objective = build(kind)
    optimizer = torch.optim.AdamW(
        group_parameters(objective, OPTIM), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps
    )
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, steps)
        tokens, total = count_tokens(step), 0.0
        for batch in microbatches(step, 0, 1):
            loss, sums = objective(batch.inputs, batch.targets, batch.segments)
            (loss / tokens).backward()
            total += float(sums[0])
        torch.nn.utils.clip_grad_norm_(objective.parameters(), OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / tokens)
    return losses


def train_engine(case: dict, rank: int, ranks: int) -> dict:
    """Train one case; with `save` or `load` keep or take the state at its first step."""
    train = TrainConfig(
        tokens=1,
        batch_rows=ROWS,
        micro_batch_rows=MICRO,
        precision=case.get("precision", "fp32"),
        zero_stage=case["stage"],
    )
    objective = build(case["kind"], seed=case.get("seed", 0))
    engine = Engine(
        objective, OPTIM, train, accumulation=-(-ROWS // ranks), device=torch.device("cpu")
    )
    start = 0
    if "load" in case:
        folder, manifest = checkpoint.newest_checkpoint(Path(case["load"]))
        checkpoint.load_checkpoint(engine, folder, manifest)
        start = manifest.step
    losses, norms = [], []
    for step in range(start, case["steps"]):
        lr = learning_rate(OPTIM, step, case.get("schedule_steps", case["steps"]))
        result = engine.train_step(microbatches(step, rank, ranks), lr, count_tokens(step))
        losses.append(result.sums.cross_entropy / result.tokens)
        norms.append(result.grad_norm)
    if "save" in case:
        root = Path(case["save"])
        checkpoint.save_checkpoint(engine, root, step=case["steps"], position={}, run={"a": 1})
    state = {f"{s}/{n}": v.double().sum().item() for n, s, v in engine.read_state()}
    nats, tokens = engine.evaluate(microbatches(0, rank, ranks))
    engine.close()
    return {"losses": losses, "norms": norms, "state": state, "evaluated": nats / tokens}


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    start_process_group(torch.device("cpu"), timeout_seconds=120)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        results[name] = train_engine(case, rank, ranks)
    shm = [f for f in os.listdir("/dev/shm") if f.startswith("deepspeed_allreduce")]
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps({"cases": results, "shm": shm}))
    stop_process_group()


if __name__ == "__main__":
    main()
