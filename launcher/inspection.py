"""What one machine says of itself when a check asks; see `check`."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from shoal.configs.errors import ShoalError
from shoal.configs.load import build_config, config_hash, read_tree
from shoal.configs.schema import RunConfig
from shoal.launcher.drivers import read_driver
from shoal.launcher.meeting import listen, try_meeting
from shoal.launcher.outcomes import find_leftovers

PACKAGES = ("torch", "deepspeed", "numpy", "mosaicml-streaming", "transformers", "safetensors")
SHARED_MEMORY = Path("/dev/shm")
LIBRARIES_THERE = ("nccl-", "torch_")
SAMPLED_SHARDS = 3
OLD_SECONDS = 600
"""What lies in shared memory for so long, and nobody has mapped, nobody waits for."""


@dataclass(frozen=True)
class Request:
    """What a machine is asked; one line of JSON."""

    run: str
    """Folder of the run; its checkpoints go there."""
    token: str
    """A file in it that the one who asks has just made: the config of the run."""
    first: str
    """Name of the first machine, where all will meet."""
    shards: list[str]
    full: bool = False
    """Whether every byte of the shards is read, or only the manifest and a few shards."""
    quick: bool = False
    """Whether only that is looked at which takes no time."""
    mark: str | None = None
    """A file that this machine is to make beside the token."""
    own_disk: bool = False
    """Whether the folder of the run is one on a disk of its own."""
    meeting: tuple[int, str] | None = None
    """Port where the first machine listens now, and what it says to who connects."""


def answer(text: str) -> None:
    """Print what this machine says to a request, or listen, if that is what is asked for."""
    tree = json.loads(text)
    if "listen" in tree:
        listen(tree["listen"])
    else:
        print(json.dumps(inspect(Request(**tree))))


def inspect(request: Request) -> dict[str, Any]:
    """Return what is there, as JSON values; what cannot be found out is an `error` in its place."""
    moment, token = time.time(), Path(request.token)
    found = {
        "time": moment,
        "versions": describe_installation() | _describe_cuda(),
        "devices": _find_devices(touch=not request.quick),
        "shares": token.exists(),
        "writes": _make_mark(request.mark, own_disk=request.own_disk),
        "config": _hash_config(token),
        "free_bytes": _free_bytes(Path(request.run)),
        "shards": {folder: _check_shards(Path(folder), request) for folder in request.shards},
    }
    if request.quick:
        return found
    driver = read_driver()
    return found | {
        "driver": asdict(driver) if driver else None,
        "shared_memory": _describe_shared_memory(),
        "leftovers": [str(path) for path in [*find_leftovers(), *find_shared_leftovers()]],
        "interface": _find_interface(request),
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


def _describe_cuda() -> dict[str, str]:
    """Return what PyTorch was built with; all ranks must speak the same NCCL."""
    import torch

    nccl = "none"
    with suppress(AttributeError, RuntimeError, TypeError):  # a build without it
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"CUDA": torch.version.cuda or "none", "NCCL": nccl}


def _find_devices(*, touch: bool) -> dict[str, Any]:
    """Count the GPUs; with `touch` use one, since a driver that is there may yet fail."""
    import torch

    found: dict[str, Any] = {"count": 0, "names": [], "error": None, "cores": os.cpu_count()}
    try:
        if torch.cuda.is_available():
            found["count"] = torch.cuda.device_count()
            if touch:
                found["names"] = [torch.cuda.get_device_name(i) for i in range(found["count"])]
                for number in range(found["count"]):
                    torch.zeros(1, device=f"cuda:{number}").add_(1).item()
        elif torch.version.cuda and Path("/dev/nvidiactl").exists() and _wants_devices():
            found["error"] = "there are NVIDIA devices, and PyTorch finds none: driver too old?"
    except RuntimeError as error:
        found["error"] = str(error).splitlines()[0]
    return found


def _wants_devices() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def _make_mark(mark: str | None, *, own_disk: bool) -> str | None:
    """Write the file that proves that this machine may write there; return why it cannot.

    On a disk of its own nobody else looks for it, and the folder may be new.
    """
    if mark is None:
        return None
    try:
        if own_disk:
            Path(mark).parent.mkdir(parents=True, exist_ok=True)
        Path(mark).write_text(mark, encoding="utf-8")
        if own_disk:
            Path(mark).unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _hash_config(token: Path) -> str | None:
    """Return the hash of the config as a rank here would read it; or the reason why it cannot."""
    if not token.exists():
        return None
    try:
        return config_hash(build_config(RunConfig, read_tree(token), where=token))
    except ShoalError as error:
        return error.cause.splitlines()[-1].strip()


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _describe_shared_memory() -> dict[str, int]:
    if not SHARED_MEMORY.is_dir():
        return {"total": 0, "free": 0}
    usage = shutil.disk_usage(SHARED_MEMORY)
    return {"total": usage.total, "free": usage.free}


def find_shared_leftovers() -> list[Path]:
    """Return what killed ranks of this user left in shared memory: old, and mapped by nobody."""
    mapped = set(_mapped_files())
    found = []
    for path in SHARED_MEMORY.glob("*"):
        with suppress(OSError):
            facts = path.stat()
            ours = facts.st_uid == os.getuid() and path.name.startswith(LIBRARIES_THERE)
            old = time.time() - facts.st_mtime > OLD_SECONDS
            if ours and old and str(path) not in mapped:
                found.append(path)
    return sorted(found)


def _mapped_files() -> Iterator[str]:
    """Yield what the processes that this user may look into have mapped of shared memory."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            for line in maps.read_text(errors="replace").splitlines():
                if f" {SHARED_MEMORY}/" in line:
                    yield line[line.index(f"{SHARED_MEMORY}/") :].removesuffix(" (deleted)")


def _check_shards(folder: Path, request: Request) -> dict[str, Any]:
    """Return what is wrong with shards, what was read of them, and their identity.

    `is_there` is false where they are not made yet.
    """
    from shoal.data_pipeline.manifest import MANIFEST, check_shard, read_manifest
    from shoal.data_pipeline.proof import verify

    facts: dict[str, Any] = {"is_there": False, "problem": None, "identity": None, "read": ""}
    try:
        if not (folder / MANIFEST).exists():
            return facts
        facts["is_there"] = True
        manifest = verify(folder) if request.full else read_manifest(folder)
        facts["identity"] = manifest.shards_hash[:12]
        count = len(manifest.shards)
        # Others each time, and on each machine: what one look misses the next one may find.
        sample = [] if request.full or request.quick else random.sample(
            manifest.shards, min(SAMPLED_SHARDS, count)
        )  # fmt: skip
        for shard in sample:
            check_shard(folder, shard)
        facts["read"] = f"{count if request.full else len(sample)} of {count} shards"
    except ShoalError as error:
        facts["problem"] = str(error).splitlines()[0]
    except OSError as error:
        facts["problem"] = f"{folder} cannot be read: {error.strerror}"
    return facts


def _find_interface(request: Request) -> dict[str, str]:
    """Return the way to the first machine, after a connection to it where it listens."""
    from shoal.launcher.guard import find_interface

    try:
        name = find_interface(request.first)
    except ShoalError as error:
        return {"error": error.cause, "fix": error.fix or ""}
    if request.meeting is None:
        return {"name": name}
    problem = try_meeting(request.first, *request.meeting)
    return {"name": name} | ({"error": problem} if problem else {"port": str(request.meeting[0])})
