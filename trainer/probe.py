"""Whether an all-reduce over the ranks is right, and how fast."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from shoal.configs.errors import PreflightError
from shoal.trainer.engine import start_process_group, stop_process_group
from shoal.trainer.storage import write_text

BYTES = 1 << 24
"""16 MiB: large enough that bandwidth counts, small enough for a slow network."""
ROUNDS = 5
TIMEOUT_SECONDS = 120
WEIGHTS = 7


@dataclass(frozen=True)
class Transfer:
    """All-reduces of one size, as the slowest rank saw them."""

    bytes: int
    seconds: float
    """Of the fastest round but the first, which connects."""
    bytes_per_second: float
    """Bus bandwidth as nccl-tests define it: bytes x 2 (n - 1) / n / seconds, which for a ring is
    what the slowest link carried."""
    is_right: bool
    """Whether every round gave the right sums on every rank."""


def time_all_reduce(device: torch.device, size: int) -> Transfer:
    """All-reduce a tensor of `size` bytes whose sums are known; collective, same on all ranks."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    # Whole numbers, whose sum stays below 2^24: any order of summation gives the same.
    values = torch.arange(size // 4, dtype=torch.float32, device=device).remainder(97)
    weights = [1 + number % WEIGHTS for number in range(ranks)]
    expected = values * sum(weights)
    seconds, wrong = [], 0
    for _ in range(ROUNDS):
        mine = values * weights[rank]
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(mine)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
        wrong += not torch.equal(mine, expected)
    slowest = torch.tensor([min(seconds[1:]), wrong], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    best = float(slowest[0])
    return Transfer(size, best, size * 2 * (ranks - 1) / ranks / best, not int(slowest[1]))


def measure_all_reduce(device: torch.device, out: Path) -> None:
    """All-reduce a known tensor on every rank; rank 0 writes what was found to `out`.

    Raises:
        PreflightError: a sum is wrong.
    """
    start_process_group(device, TIMEOUT_SECONDS)
    found = time_all_reduce(device, BYTES)
    if not found.is_right:
        raise PreflightError(
            "an all-reduce over the ranks gives a wrong sum",
            fix="leave out hosts one by one to find the faulty link or device",
        )
    if dist.get_rank() == 0:
        facts = {"ranks": dist.get_world_size(), "bytes_per_second": found.bytes_per_second}
        write_text(out, json.dumps(facts | {"backend": dist.get_backend()}))
    stop_process_group()
