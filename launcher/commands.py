"""The commands that reach other machines, one for each way of starting guards; none is run here.

`ssh` holds one connection a machine, which carries the guard's words. Under `pdsh`, `slurm` and
`none` (somebody types) the guards call back instead, see `calls`.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Way = Literal["ssh", "pdsh", "slurm", "none"]
Shown = Literal["ssh", "pdsh", "slurm", "none", "deepspeed", "sbatch", "all"]
"""Ways of starting that a dry run can show; see `ways`."""

# No shared connection: it would outlive a cut link without a word.
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5",
       "-o", "ServerAliveCountMax=3", "-o", "ControlPath=none", "-o", "ClearAllForwardings=yes",
       )  # fmt: skip
# What the allocation was asked for as a whole is not for one task a machine.
ASKED = ("SLURM_GPUS", "SLURM_GPUS_PER_TASK", "SLURM_NTASKS", "SLURM_NPROCS",
         "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK")  # fmt: skip
SRUN = (
    "env", *(word for name in ASKED for word in ("-u", name)),
    # --overlap: the step that this process runs in, if it does, has taken the machine already.
    "srun", "--overlap", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0",
)  # fmt: skip
# Who ends a job (DeepSpeed, systemd) ends all its processes; these must carry the last word.
DEAF = ("sh", "-c", 'trap "" TERM INT HUP USR1 USR2; exec "$@"', "sh")


def guard_command(*words: str) -> list[str]:
    """Return the command of a guard; -P keeps the current folder off its import path."""
    return [sys.executable, "-P", "-m", "shoal.launcher.guard", *words]


def remote_command(folder: Path, *words: str) -> str:
    """Return what the shell of another machine runs; it has the same folders as this one."""
    path = os.environ.get("PYTHONPATH")  # needed before there is anybody to tell
    said = {"PYTHONPATH": path} if path else {}
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # CPU ranks are wanted
        said["CUDA_VISIBLE_DEVICES"] = ""
    env = ["env", *(f"{name}={value}" for name, value in said.items())] if said else []
    return f"cd {shlex.quote(str(folder))} && exec {shlex.join([*env, *guard_command(*words)])}"


def ssh_command(name: str, *words: str) -> list[str]:
    """Return what starts a guard on one machine by ssh, with its words on stdin and stdout."""
    return [*SSH, "--", name, remote_command(Path.cwd(), *words)]


def ask_command(way: Way, name: str, *words: str) -> list[str] | None:
    """Return what lets a machine answer a question of `greeting`; None where nothing can."""
    if way == "none":
        return None
    if way == "slurm":
        asked = remote_command(Path.cwd(), *words)
        return [*SRUN, "--nodes=1", "--ntasks=1", f"--nodelist={name}", "sh", "-c", asked]
    return ssh_command(name, *words)


def call_commands(way: Way, names: Sequence[str], endpoint: str, key: Path) -> list[list[str]]:
    """Return what makes the guards of `names` call `endpoint`: one command for all, or one each."""
    call = remote_command(Path.cwd(), "--call", endpoint, str(key))
    if way == "pdsh":
        listed = ",".join(names)
        return [["pdsh", "-R", "ssh", "-S", "-f", str(len(names)), "-w", listed, f"{call} %h"]]
    if way == "slurm":
        count = len(names)
        some = [f"--nodes={count}", f"--ntasks={count}", f"--nodelist={','.join(names)}"]
        return [[*SRUN, *some, "--label", "sh", "-c", f'{call} "$SLURMD_NODENAME"']]
    return [["sh", "-c", f"{call} {name}"] for name in names]
