"""A rank of the trainer's tests: runs cases that it is sent, until there are no more.

A case trains small models on synthetic rows and answers with what it saw. One start serves many
cases of many tests (see rank_groups.py), because importing DeepSpeed costs more than
training does. The tests import the same functions for what they compare with.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.configs.errors import DataError, ShoalError
from shoal.configs.schema import ModelConfig, MoEConfig, OptimConfig, RunConfig, TrainConfig
from shoal.data_pipeline.batch import IGNORE, PADDING_ROW, Batch
from shoal.data_pipeline.loader import Loader
from shoal.kernels.backend import Kernels
from shoal.trainer import checkpoint, loop, resumption, saver, segment, teamwork
from shoal.trainer.engine import Engine, start_process_group, stop_process_group
from shoal.trainer.identity import check_same_on_ranks
from shoal.trainer.model import Transformer
from shoal.trainer.moe import MixtureOfExperts, RouterStats
from shoal.trainer.objective import Objective
from shoal.trainer.optim import Judged, build_optimizer, group_parameters, learning_rate
from shoal.trainer.storage import sync

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


def _gradient_breaker(steps: list[int], rank: int = 0) -> Callable[..., Tensor]:
    """Return a hook: in some steps of a loop one rank's loss is finite and its gradient is not."""

    def break_gradient(module: Any, inputs: Any, output: Tensor) -> Tensor:
        if output.requires_grad and Source.step in steps and dist.get_rank() == rank:
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    return break_gradient


def train_plain(case: dict[str, Any]) -> dict[str, list[float]]:
    """The plain PyTorch loop that the engine must agree with; in bf16 with fp32 masters."""
    device = case.get("device", "cpu")
    bf16 = case.get("precision") == "bf16"
    masters = build(case["kind"]).to(device)
    # On CUDA grouped_mm is for bf16.
    kernels = KERNELS if bf16 or device == "cpu" else replace(KERNELS, experts="loop")
    objective = build(case["kind"], kernels=kernels).to(device, torch.bfloat16 if bf16 else None)
    optim = OPTIM.model_copy(update=case.get("optim", {}))
    optimizer = torch.optim.AdamW(
        group_parameters(masters, optim), lr=optim.lr, betas=optim.betas, eps=optim.eps
    )
    losses, norms = [], []
    for step in range(case["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, case["steps"])
        tokens, total = count_tokens(step), 0.0
        for batch in microbatches(step, 0, 1, case.get("micro", 1)):
            batch = batch.to(device)
            loss, sums = objective(batch.inputs, batch.targets, batch.segments)
            (loss / tokens).backward()
            total += float(sums[0])
        for master, worker in zip(masters.parameters(), objective.parameters(), strict=True):
            master.grad, worker.grad = worker.grad.float(), None
        limit = optim.clip_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.parameters(), limit)))
        if step not in case.get("left_out", ()):
            optimizer.step()
        with torch.no_grad():
            for master, worker in zip(masters.parameters(), objective.parameters(), strict=True):
                worker.copy_(master)
        losses.append(total / tokens)
    return {"losses": losses, "norms": norms}


def take_steps(engine: Engine, case: dict, start: int, stop: int) -> tuple[list, list]:
    """Train steps [start, stop) of a run of `schedule_steps`; return losses and gradient norms."""
    losses, norms = [], []
    optim = OPTIM.model_copy(update=case.get("optim", {}))
    for step in range(start, stop):
        Source.step = step
        lr = learning_rate(optim, step, case.get("schedule_steps", case["steps"]))
        batches = microbatches(step, dist.get_rank(), engine.num_ranks, case.get("micro", 1))
        result = engine.train_step([b.to(engine.device) for b in batches], lr, count_tokens(step))
        losses.append(result.sums.cross_entropy / result.tokens)
        norms.append(result.grad_norm)
    return losses, norms


def read_state(engine: Engine) -> Iterator[tuple[str, str, Tensor]]:
    """Gather every parameter and state by DeepSpeed's own functions: another way than a save's."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine._state._link()
    for name, parameter in engine._state.parameters():
        for state in engine.parameter_states[name]:
            if not parameter.requires_grad:
                with zero.GatheredParameters([parameter], enabled=engine.stage == 3):
                    value = parameter.detach().clone()
            elif engine.stage == 0:
                plain = engine._engine.optimizer.state[parameter]
                value = parameter.detach() if state == "weight" else plain[state]
            elif state == "weight":
                value = safe_get_full_fp32_param(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, state)
            yield name, state, value.reshape(engine.parameter_shapes[name])


def fingerprints(state: Iterator[tuple[str, str, Tensor]]) -> dict[str, str]:
    """Hash the bits of every (parameter, state)."""
    found = {}
    for name, kind, value in state:
        # The one freedom: stages 1 and 2 gather by adding, which turns -0.0 into +0.0.
        data = (value.detach().float().cpu().contiguous() + 0.0).numpy().tobytes()
        found[f"{kind}/{name}"] = hashlib.sha256(data).hexdigest()[:16]
    return found


def run_train(case: dict[str, Any]) -> dict[str, Any]:
    """Train one engine; with `save`, write a checkpoint at its last step and go on for `more`."""
    began = time.perf_counter()
    ranks = dist.get_world_size()
    engine = build_engine(case, ranks)
    steps, more = case["steps"], case.get("more", 0)
    losses, norms = take_steps(engine, case, 0, steps)
    answer: dict[str, Any] = {"losses": losses, "norms": norms, "stage": engine.stage}
    if "save" in case:
        saver.save_checkpoint(engine, Path(case["save"]), step=steps, position={}, run={})
        answer["state"] = fingerprints(read_state(engine))
        answer["more"] = take_steps(engine, case, steps, steps + more)[0]
    batches = microbatches(0, dist.get_rank(), ranks)
    nats, tokens = engine.evaluate([batch.to(engine.device) for batch in batches])
    engine.close()
    return answer | {"evaluated": nats / tokens, "seconds": time.perf_counter() - began}


def run_load(case: dict[str, Any]) -> dict[str, Any]:
    """Load every source into one engine, the first into a fresh one; train each on for `more`."""
    began = time.perf_counter()
    engine = build_engine({**case, "seed": 1}, dist.get_world_size())
    answer: dict[str, Any] = {}
    for name, folder in case["sources"].items():
        found = checkpoint.newest_checkpoint(Path(folder))
        assert found is not None
        resumption.load_checkpoint(engine, *found)
        step = found[1].step
        state = fingerprints(read_state(engine))
        losses, _ = take_steps(engine, case, step, step + case["more"])
        answer[name] = {"state": state, "more": losses}
    engine.close()
    return {"loads": answer, "seconds": time.perf_counter() - began}


def run_refused(case: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint that does not belong to the model."""
    engine = build_engine(case, dist.get_world_size())
    before = fingerprints(read_state(engine))
    found = checkpoint.newest_checkpoint(Path(case["source"]))
    assert found is not None
    error = None
    try:
        resumption.load_checkpoint(engine, *found)
    except ShoalError as raised:
        error = [type(raised).__name__, str(raised)]
    untouched = fingerprints(read_state(engine)) == before
    engine.close()
    return {"error": error, "untouched": untouched}


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

    def __init__(self, count: int) -> None:
        facts = {"rows": count, "context": CONTEXT, "eot_id": 0, "tokenizer_fingerprint": "none"}
        self.manifest = SimpleNamespace(**facts)
        self._tokens = torch.cat(
            [torch.cat([x, t[:, -1:].clamp(min=0)], 1) for x, t in map(global_batch, range(count))]
        ).numpy()[:count]

    def __len__(self) -> int:
        return len(self._tokens)

    def gather(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._tokens[numbers], np.zeros((len(numbers), CONTEXT), dtype=np.int32)


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


def gather_rows(source: Source) -> dict[int, list[int]]:
    """Return the keys of the rows that all ranks took of every step, in the order of ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, source.rows)
    return {
        step: [row for rows in found for row in rows[step] if row != PADDING_ROW]
        for step in source.rows
    }


def run_config(case: dict[str, Any]) -> RunConfig:
    """Return the config of a `loop` case: `folder` is where it lives, `steps` its length."""
    folder = Path(case["folder"])
    return RunConfig.model_validate(
        {
            "name": folder.name,
            "output": str(folder.parent),
            "model": shape(case["kind"]).model_dump(),
            "data": {"train": [{"path": "unused"}], "validation": "unused"},
            "optim": OPTIM.model_dump() | case.get("optim", {}),
            "train": {
                "tokens": case["steps"] * ROWS * CONTEXT,
                "batch_rows": ROWS,
                "micro_batch_rows": 1,
                "precision": case.get("precision", "fp32"),
                "zero_stage": case["stage"],
                "max_skipped_steps": 3,
            },
            "checkpoint": {
                "every_steps": case.get("every_steps", 100),
                "keep": 2,
                "resume": case.get("resume", "auto"),
                "compare_every": case.get("compare_every", 100),
                "milestone_every": case.get("milestone_every"),
                "folder": case.get("bucket"),
                "copies": case.get("copies", "shared"),
                "keep_best": case.get("keep_best", False),
                "allow_changes": case.get("allow_changes", []),
            },
            "validation": {"every_steps": case.get("validate_every", 100)},
        }
    )


def run_loop(case: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Run the training loop; with `stop_after`, a stop is requested after so many of its steps."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ |= case.get("environment", {})
    if "disks" in case:  # as many as that, dealt to the ranks; none sees another's
        case = case | {"folder": str(Path(case["folder"]) / f"disk-{rank % case['disks']}" / "run")}
    config = run_config(case)
    engine = more.pop("engine", None) or build_engine({**case, "seed": config.seed}, ranks)

    def flip_bit(step: int) -> None:
        if (step, rank) == case["flip"]:
            weight = next(iter(engine.objective.parameters())).data.view(torch.int32).view(-1)
            weight[3] ^= 1 << case.get("bit", 20)

    if case.get("full", (None, 0))[0] == rank:
        saver.sync = partial(refuse_to_write, case["full"][1])
    befall = flip_bit if "flip" in case else None
    source = more.pop("source", None)
    if source is None:
        source = LoaderSource(rank, ranks) if "loader" in case else Source(rank, ranks, befall)
    folder = Path(case["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    facts = segment.RunFacts(
        folder, rank, ranks, device="cpu", training_flops_per_token=FLOPS_PER_TOKEN
    )
    limit = case.get("stop_after", 10**9)
    error, loss = None, None
    try:
        loss = loop.train(
            engine, source, config, facts, stop_requested=lambda: len(source.rows) > limit, **more
        )
    except ShoalError as raised:
        error = [type(raised).__name__, str(raised)]
    finally:
        engine.close()
        saver.sync = sync
    answer = {"error": error, "loss": loss, "rows": source.rows}
    return answer | ({"keys": gather_rows(source)} if "loader" in case else {})


def refuse_to_write(step: int, path: Path) -> None:
    if checkpoint.checkpoint_name(step) in str(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    sync(path)


def run_teamwork(case: dict[str, Any]) -> dict[str, Any]:
    """Let rank 1 work for long while the others have nothing to do."""
    told: list[str] = []

    def work(tick: Callable[[], None]) -> int:
        if dist.get_rank() == 1:
            for _ in range(case["ticks"]):
                time.sleep(0.15)
                tick()
            time.sleep(case.get("silent", 0))
            if "error" in case:
                raise DataError(case["error"], where="there")
        return dist.get_rank()

    try:
        return {
            "result": teamwork.do_together(work, "working", told.append, torch.device("cpu")),
            "told": told,
        }
    except DataError as error:
        return {"error": str(error), "told": told}


def run_alike(case: dict[str, Any]) -> dict[str, Any]:
    """Compare configs and inputs of the ranks, of which rank 1 may have been given others."""
    own = case["rank 1"] if dist.get_rank() == 1 else {}
    config = run_config({**case, "optim": own.get("optim", {})})
    try:
        check_same_on_ranks(config, {"streams": own.get("streams", "a")})
    except ShoalError as raised:
        return {"error": [type(raised).__name__, str(raised)]}
    return {"error": None}


RUNNERS = {
    "teamwork": run_teamwork,
    "train": run_train,
    "load": run_load,
    "refused": run_refused,
    "loop": run_loop,
    "alike": run_alike,
}


def serve(environment: dict[str, str], requests: Connection, log: str) -> None:
    """Be a rank: run the cases of every request, answer with what they saw; None ends it."""
    os.environ.update(environment)
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    start_process_group(torch.device("cpu"), timeout_seconds=120)
    while (cases := requests.recv()) is not None:
        answers = {}
        for name, case in cases.items():
            torch.manual_seed(0)
            answers[name] = RUNNERS[case.get("run", "train")](case)
        dist.barrier()
        requests.send(answers)
    stop_process_group()
