"""What a cluster is proven to do, claim by claim: over its own ranks, devices and disks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.configs.errors import ShoalError
from shoal.configs.schema import KernelConfig, ModelConfig, TrainConfig
from shoal.data_pipeline.batch import Batch
from shoal.kernels.backend import resolve
from shoal.trainer.engine import Engine
from shoal.trainer.model import Transformer
from shoal.trainer.objective import Objective
from shoal.trainer.plain import OPTIM, Case, train_plain, train_sharded
from shoal.trainer.probe import time_all_reduce
from shoal.trainer.resumption import find_checkpoint, load_checkpoint
from shoal.trainer.saver import save_checkpoint
from shoal.trainer.stores import SharedFolder

LIMITS = {
    ("fp32", "cpu"): 1e-5,
    ("fp32", "cuda"): 1e-4,
    ("bf16", "cpu"): 1e-2,
    ("bf16", "cuda"): 1e-2,
}
"""Nats a token. Ranks sum in another order than one device, which bf16 rounds."""
STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3)}
STEPS = 6
MOST_ROWS = 32
SIZES = {"cpu": (1 << 16, 1 << 20, 1 << 24), "cuda": (1 << 20, 1 << 24, 1 << 28, 1 << 30)}
"""Bytes of an all-reduce."""
SHAPES = {
    "cpu": ModelConfig(vocab_size=4096, width=256, num_heads=4, num_layers=2, context=64),
    "cuda": ModelConfig(vocab_size=16384, width=1024, num_heads=16, num_layers=4, context=64),
}
"""Of the model whose checkpoint is timed: 31 and 830 MB."""


@dataclass(frozen=True)
class Claim:
    """One thing that is proven, or not."""

    claim: str
    holds: bool
    text: str
    figure: float = 0.0
    unit: str = ""
    limit: float | None = None
    """What the figure must not be above; None: it is for information."""


def prove_claims(device: torch.device, kernels: KernelConfig, folder: Path) -> Iterator[Claim]:
    """Yield what can be proven in one start of the ranks; collective, the same on all ranks.

    Args:
        device: Of this rank.
        kernels: As a training would have them.
        folder: On the file system of the runs; a checkpoint is left there.
    """
    yield from prove_links(device)
    yield from prove_stages(device, kernels)
    yield from prove_checkpoints(device, kernels, folder)


def prove_links(device: torch.device) -> Iterator[Claim]:
    """Yield a claim for each size of an all-reduce."""
    ranks, backend = dist.get_world_size(), dist.get_backend()
    for size in SIZES[device.type]:
        found = time_all_reduce(device, size)
        rate = found.bytes_per_second / 1e9
        verdict = "right" if found.is_right else "WRONG SUMS: leave out hosts one by one"
        text = f"{verdict}, {found.seconds * 1e3:.2f} ms on {ranks} ranks over {backend}"
        name = f"all-reduce of {_describe_size(size)}"
        yield Claim(name, found.is_right, text, rate, "GB/s bus bandwidth")


def _describe_size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def prove_stages(device: torch.device, kernels: KernelConfig) -> Iterator[Claim]:
    """Yield a claim for each ZeRO stage, precision and kind of model.

    Every rank does the plain loop on its own device: one that computes otherwise is found, too.
    """
    ranks = dist.get_world_size()
    rows = 2 * ranks + 1 if ranks <= MOST_ROWS // 2 else ranks
    for kind in ("dense", "moe"):
        for precision, stages in STAGES.items():
            case = Case(kind, precision, rows, STEPS)
            expected = train_plain(case, device)
            for stage in stages:
                found = train_sharded(case, stage, device, kernels)
                limit = LIMITS[precision, device.type]
                yield _compare(case, stage, limit, expected, found)


def _compare(
    case: Case, stage: int, limit: float, expected: list[float], found: list[float]
) -> Claim:
    gaps: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(gaps, find_gap(expected, found))
    worst = max(gaps)
    text = f"losses of {case.steps} steps are those of a plain loop"
    if not worst <= limit:
        text = f"losses are not those of a plain loop, worst on rank {gaps.index(worst)}"
        text += f": {_shorten(found)} instead of {_shorten(expected)} here"
    name = f"ZeRO {stage}, {case.precision}, {case.kind}"
    return Claim(name, worst <= limit, text, worst, "nats off at most", limit)


def find_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the largest difference of two series; infinite where one holds no number."""
    gaps = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    return max(gap if gap == gap else float("inf") for gap in gaps)


def _shorten(losses: list[float]) -> str:
    return ", ".join(f"{loss:.5f}" for loss in losses[:3]) + " ..."


def prove_checkpoints(device: torch.device, kernels: KernelConfig, folder: Path) -> Iterator[Claim]:
    """Yield how fast a checkpoint is written and read, and whether it comes back bit for bit."""
    engine = _build_engine(device, kernels, seed=0)
    kept = _clone_slices(engine)
    dist.barrier()
    begun = time.perf_counter()
    written = save_checkpoint(engine, folder, step=1, position={}, run={})
    dist.barrier()
    seconds = time.perf_counter() - begun
    engine.close()
    size = sum(file.stat().st_size for file in written.iterdir())
    text = f"{size / 1e6:.0f} MB in {seconds:.1f} s, hashed and on disk"
    yield Claim("checkpoint written", True, text, size / seconds / 1e9, "GB/s")
    _forget_pages(written)
    engine = _build_engine(device, kernels, seed=1)
    dist.barrier()
    begun = time.perf_counter()
    problem = _load(engine, folder, kept)
    dist.barrier()
    seconds = time.perf_counter() - begun
    engine.close()
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    problem = next(filter(None, problems), None)
    text = f"verified, and every bit as before on every rank, in {seconds:.1f} s"
    yield Claim("checkpoint read", not problem, problem or text, size / seconds / 1e9, "GB/s")


def _build_engine(device: torch.device, kernels: KernelConfig, seed: int) -> Engine:
    """Return an engine that has taken a step, so that no state of it is zero."""
    shape, ranks = SHAPES[device.type], dist.get_world_size()
    model = Transformer(shape, resolve(kernels, device, torch.float32))
    model.initialize(seed)
    train = TrainConfig(tokens=1, batch_rows=ranks, micro_batch_rows=1, precision="fp32")
    engine = Engine(Objective(model), OPTIM, train, accumulation=1, device=device)
    rows = torch.arange(shape.context + 1).remainder(97)[None] + dist.get_rank()
    segments = torch.zeros(1, shape.context, dtype=torch.int32)
    batch = Batch(rows[:, :-1], rows[:, 1:], segments, torch.tensor([dist.get_rank()]))
    engine.train_step([batch], OPTIM.lr, ranks * shape.context)
    return engine


def _clone_slices(engine: Engine) -> dict[tuple[str, str, int], Tensor]:
    return {(name, state, offset): values.detach().cpu().clone()
            for name, state, offset, values in engine.read_slices()}  # fmt: skip


def _load(engine: Engine, folder: Path, kept: dict[tuple[str, str, int], Tensor]) -> str | None:
    """Load the checkpoint; return what is wrong with it; collective."""
    try:
        found = find_checkpoint(SharedFolder(folder), device=engine.device)
    except ShoalError as error:  # the same on all ranks
        return str(error).splitlines()[0]
    if found is None:
        return f"{folder} holds no checkpoint any more"
    load_checkpoint(engine, *found)
    for key, values in _clone_slices(engine).items():
        if not torch.equal(values, kept[key]):
            return f"{key[1]} of {key[0]} is not what was written, on rank {dist.get_rank()}"
    return None


def _forget_pages(folder: Path) -> None:
    """Let the kernel drop what it keeps of the files: they are to come from the disk."""
    for file in folder.iterdir():
        with suppress(OSError):
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
