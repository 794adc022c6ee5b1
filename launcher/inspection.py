"""What one machine says of itself when a check asks; see `check`."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from shoal.configs.errors import ShoalError
from shoal.launcher.outcomes import find_leftovers

PACKAGES = ("torch", "deepspeed", "numpy", "mosaicml-streaming", "transformers", "safetensors")
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Request:
    """What a machine is asked; one line of JSON."""

    run: str
    """Folder of the run; its checkpoints go there."""
    token: str
    """A file in it that the one who asks has just made."""
    first: str
    """Name of the first machine, where all will meet."""
    shards: list[str]
    full: bool = False
    """Whether every byte of the shards is read, or only the manifest and one shard."""


def inspect(request: Request) -> dict[str, Any]:
    """Return what is there, as JSON values; what cannot be found out is an `error` in its place."""
    return {
        "time": time.time(),
        "versions": describe_installation(),
        "devices": _find_devices(),
        "shares": Path(request.token).exists(),
        "free_bytes": _free_bytes(Path(request.run)),
        "shared_memory": _describe_shared_memory(),
        "leftovers": [str(folder) for folder in find_leftovers()],
        "shards": {folder: _check_shards(Path(folder), request.full) for folder in request.shards},
        "interface": _find_interface(request.first),
    }


@cache  # as it was when the job began: a checkout may change meanwhile
def describe_installation() -> dict[str, str]:
    """Return what must be the same on all machines of a job: versions, and Shoal's own code."""
    versions = {name: metadata.version(name) for name in ("shoal", *PACKAGES)}
    return {"python": platform.python_version(), **versions, "code": hash_code()}


def hash_code() -> str:
    """Return a short SHA-256 over Shoal's Python files: two checkouts of one version may differ."""
    rooms = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for room in ("configs", "data_pipeline", "eval", "kernels", "launcher", "trainer"):
        for file in sorted((rooms / room).rglob("*.py")):
            total.update(f"{file.relative_to(rooms)}\n".encode() + file.read_bytes())
    return total.hexdigest()[:12]


def _find_devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"count": 0, "names": [], "error": None, "cores": os.cpu_count()}
    try:
        if torch.cuda.is_available():
            found["count"] = torch.cuda.device_count()
            found["names"] = [torch.cuda.get_device_name(i) for i in range(found["count"])]
            torch.zeros(1, device="cuda").add_(1).item()  # a driver that is there may yet fail
        elif torch.version.cuda and Path("/dev/nvidiactl").exists():
            found["error"] = "there are NVIDIA devices, and PyTorch finds none: driver too old?"
    except RuntimeError as error:
        found["error"] = str(error).splitlines()[0]
    return found


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _describe_shared_memory() -> dict[str, int]:
    if not SHARED_MEMORY.is_dir():
        return {"total": 0, "free": 0}
    usage = shutil.disk_usage(SHARED_MEMORY)
    return {"total": usage.total, "free": usage.free}


def _check_shards(folder: Path, full: bool) -> str | None:
    """Return what is wrong with shards; None: nothing, or they are not made yet."""
    from shoal.data_pipeline.shards import Rows, verify

    if not (folder / "manifest.json").exists():
        return None
    try:
        if full:
            verify(folder)
        else:
            Rows.open(folder).gather(np.zeros(1, np.int64))
    except ShoalError as error:
        return str(error).splitlines()[0]
    return None


def _find_interface(first: str) -> dict[str, str]:
    from shoal.launcher.guard import find_interface

    try:
        return {"name": find_interface(first)}
    except ShoalError as error:
        return {"error": error.cause, "fix": error.fix or ""}
