"""Processes that die by SIGKILL at every point of saving a checkpoint.

Each saves step 1 whole, then dies while it saves step 2. They are forked from one interpreter,
because importing torch costs more than all of them.

usage: killed_savers.py FOLDER    saves into FOLDER/POINT/checkpoints for every POINT
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal.trainer import saver, storage

STATES = ("weight", "exp_avg", "exp_avg_sq")

POINTS = (
    "half a file",
    "file unsynced",
    "manifest unsynced",
    "folder unsynced",
    "not renamed",
    "renamed, parent unsynced",
)


class StateOnly:
    """As much of an engine as saving needs."""

    def __init__(self, step: int) -> None:
        self.step = step

    device = torch.device("cpu")
    parameter_shapes = {"a": (3, 5), "b": (7,), "empty gain": (1,)}
    parameter_states = {"a": STATES, "b": STATES, "empty gain": STATES}

    def read_slices(self):
        generator = torch.Generator().manual_seed(self.step)
        for name, shape in self.parameter_shapes.items():
            for state in self.parameter_states[name]:
                yield name, state, 0, torch.randn(shape, generator=generator)


def save(root: Path, step: int) -> Path:
    return saver.save_checkpoint(
        StateOnly(step), root, step=step, position={"streams": [["x", 1.0]]}, run={"seed": 1}
    )


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(calls: int, function: Callable) -> Callable:
    """Let so many calls through to `function`, then die."""
    left = [calls]

    def counted(*arguments: Any) -> Any:
        left[0] -= 1
        return die() if left[0] < 0 else function(*arguments)

    return counted


def save_and_die(root: Path, point: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    save(root, 1)
    if point == "half a file":
        storage.SYNC_BYTES = 64
        os.fsync = after(2, os.fsync)
    elif point == "not renamed":
        Path.rename = die  # type: ignore[method-assign, assignment]
    else:
        syncs = [p for p in POINTS if p.endswith("unsynced")]
        os.fsync = after(syncs.index(point), os.fsync)
    save(root, 2)


def main() -> None:
    for point in POINTS:
        child = os.fork()
        if child == 0:
            save_and_die(Path(sys.argv[1]) / point / "checkpoints", point)
            os._exit(0)  # not reached: the parent expects a signal
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"{point}: ended with {status}, not by SIGKILL")


if __name__ == "__main__":
    main()
