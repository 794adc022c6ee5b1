"""Slurm: which rank a task of `srun` is, and which machines an allocation has."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, MutableMapping

from shoal.configs.errors import ConfigError, PreflightError
from shoal.launcher.hosts import Host

FIRST_PORT, PORTS = 20_000, 30_000


def adopt_step(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say in torchrun's words what `srun` says of this task; nothing where srun did not start it.

    A batch script is no task of a step, and an interactive shell is the only one of its own: a
    single task is a launcher like any other. Chosen MASTER_ADDR and MASTER_PORT are kept.

    Raises:
        ConfigError: a variable is not what Slurm writes.
        PreflightError: the machines cannot be listed.
    """
    names = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if "RANK" in environment or not all(name in environment for name in names):
        return
    if environment["SLURM_STEP_NUM_TASKS"] == "1":
        return
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = int(environment.get("SLURM_NODEID", "0"))
    job = int(environment.get("SLURM_JOB_ID", "0")) * 7 + int(environment["SLURM_STEP_ID"])
    if not environment.get("MASTER_ADDR"):
        environment["MASTER_ADDR"] = list_names(environment["SLURM_STEP_NODELIST"])[0]
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + job % PORTS))
    said = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks[node]),
        "NODE_RANK": str(node),
        "GROUP_RANK": str(node),
    }
    environment.update(said)


def in_allocation(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process runs in an allocation."""
    return "SLURM_JOB_NODELIST" in environment


def allocated_hosts(
    environment: Mapping[str, str] = os.environ, slots: int | None = None
) -> list[Host]:
    """Return the machines of the allocation this process runs in.

    Args:
        environment: Slurm's variables.
        slots: Ranks a machine; None: its GPUs, or else the tasks that were asked for.

    Raises:
        ConfigError: there is no allocation.
    """
    if not in_allocation(environment):
        raise ConfigError(
            "there is no Slurm allocation here",
            where="world.launcher=slurm",
            fix="start this inside `salloc --no-kill` or `sbatch --no-kill`",
        )
    names = list_names(environment["SLURM_JOB_NODELIST"])
    tasks = tasks_per_node(environment.get("SLURM_TASKS_PER_NODE", f"1(x{len(names)})"))
    slots = slots or _count_gpus(environment)
    return [Host(name, slots or count) for name, count in zip(names, tasks, strict=True)]


def _count_gpus(environment: Mapping[str, str]) -> int:
    """Return GPUs of a node: sbatch says how many, salloc what was asked for (8, or a100:8)."""
    said = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_GPUS_PER_NODE") or "0"
    number = said.rpartition(":")[2]
    return int(number) if number.isdigit() else 0


def tasks_per_node(text: str) -> list[int]:
    """Read Slurm's short form: `2(x3),1` means 2, 2, 2, 1.

    Raises:
        ConfigError: it is not of that form.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise ConfigError(f"{text!r} is no list of tasks per node", where="environment")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def list_names(nodes: str) -> list[str]:
    """Return the names behind Slurm's short form: `n[1-3],m` means n1, n2, n3, m.

    Raises:
        PreflightError: the form needs Slurm's own reader, and that does not answer.
    """
    if "[" not in nodes:
        return nodes.split(",")
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise PreflightError(
            f"cannot list the machines {nodes}: {error}",
            where="scontrol",
            fix="name the first one in MASTER_ADDR",
        ) from None
    return done.stdout.split()
