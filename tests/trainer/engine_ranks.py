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
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_models import (
    CONTEXT,
    FLOPS_PER_TOKEN,
    KERNELS,
    OPTIM,
    ROWS,
    LoaderSource,
    Source,
    build,
    build_engine,
    count_tokens,
    microbatches,
    shape,
)
from torch import Tensor

from shoal.configs.errors import DataError, ShoalError
from shoal.configs.schema import RunConfig
from shoal.data_pipeline.batch import PADDING_ROW
from shoal.trainer import checkpoint, disks, loop, resumption, saver, segment, teamwork
from shoal.trainer.anomaly import AnomalyDetector
from shoal.trainer.disks import write_at
from shoal.trainer.engine import Engine, start_process_group, stop_process_group
from shoal.trainer.identity import check_same_on_ranks
from shoal.trainer.optim import group_parameters, learning_rate
from shoal.trainer.storage import write_pieces


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


def read_forward(engine: Engine) -> Iterator[tuple[str, str, Tensor]]:
    """Yield what a forward pass computes with; a copy of this rank's own, up to stage 2."""
    from deepspeed import zero

    for name, parameter in engine._state.parameters():
        with zero.GatheredParameters([parameter], enabled=engine.stage == 3):
            yield name, f"forward {parameter.dtype}", parameter.detach().clone()


def run_watched(case: dict[str, Any]) -> dict[str, Any]:
    """Take the steps of `taken`; return of each what every rank did, and held after it."""
    engine, detector = build_engine(case, dist.get_world_size()), AnomalyDetector(0)
    seen = []
    for step in case["taken"]:
        Source.step = step
        batches = microbatches(step, dist.get_rank(), engine.num_ranks)
        lr = learning_rate(OPTIM, step, case["steps"])
        result = engine.train_step(batches, lr, count_tokens(step), detector.accepts)
        held = fingerprints(chain(read_state(engine), read_forward(engine)))
        did = {"taken": result.taken, "sums": result.sums.cross_entropy, "norm": result.grad_norm}
        seen.append(teamwork.gather(did | {"held": held}))
    engine.close()
    return {"seen": seen}


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
        saver.write_pieces = partial(refuse_to_write, case["full"][1])
    if case.get("refuse_part") == rank:
        disks.write_at = refuse_part
    befall = flip_bit if "flip" in case else None
    source = more.pop("source", None)
    if source is None:
        source = LoaderSource(rank, ranks) if "loader" in case else Source(rank, ranks, befall)
    folder = Path(case["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    facts = segment.RunFacts(
        folder,
        rank,
        ranks,
        device="cpu",
        training_flops_per_token=FLOPS_PER_TOKEN,
        streams=("all",),
        count_rows=lambda batches: {"all": batches * ROWS},
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
        saver.write_pieces, disks.write_at = write_pieces, write_at
    answer = {"error": error, "loss": loss, "rows": source.rows}
    return answer | ({"keys": gather_rows(source)} if "loader" in case else {})


def refuse_part(file: Path, first: int, chunk: Tensor) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(file))


def refuse_to_write(step: int, file: Path, *rest: Any) -> str:
    if checkpoint.checkpoint_name(step) in str(file):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))
    return write_pieces(file, *rest)


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
    "watched": run_watched,
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
