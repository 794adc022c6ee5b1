"""A short job that only talks: whether an all-reduce over the ranks is right, and how fast."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

from shoal.configs.errors import PreflightError
from shoal.trainer.engine import start_process_group, stop_process_group
from shoal.trainer.storage import write_text

VALUES = 1 << 22
"""16 MiB in fp32: large enough that bandwidth counts, small enough for a slow network."""
ROUNDS = 5
TIMEOUT_SECONDS = 120


def measure_all_reduce(device: torch.device, out: Path) -> None:
    """All-reduce a known tensor on every rank; rank 0 writes what was found to `out`.

    The figure is bus bandwidth as nccl-tests define it: bytes * 2 (n - 1) / n / seconds, which for
    a ring is what the slowest link carried.

    Raises:
        PreflightError: a sum is wrong.
    """
    start_process_group(device, TIMEOUT_SECONDS)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    values = torch.arange(VALUES, dtype=torch.float32, device=device).remainder(97)
    seconds = []
    for _ in range(ROUNDS):
        mine = values * (rank + 1)
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(mine)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
        # Whole numbers below 2^24: any order of summation gives the same.
        if not torch.equal(mine, values * (ranks * (ranks + 1) / 2)):
            raise PreflightError(
                "an all-reduce over the ranks gives a wrong sum",
                fix="leave out hosts one by one to find the faulty link or device",
            )
    if rank == 0:
        carried = 4 * VALUES * 2 * (ranks - 1) / ranks
        found = {"ranks": ranks, "bytes_per_second": carried / min(seconds[1:])}
        write_text(out, json.dumps(found | {"backend": dist.get_backend()}))
    stop_process_group()
