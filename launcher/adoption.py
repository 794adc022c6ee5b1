"""Ranks, and machines of ranks, that others start: what they say of them, in torchrun's words.

srun and mpirun start every rank. A Kubernetes operator starts a pod a machine and says which one
it is: the pod then starts its own ranks.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.configs.errors import ConfigError
from shoal.configs.schema import WorldConfig
from shoal.launcher.endings import raise_failure
from shoal.launcher.guard import find_interface
from shoal.launcher.hosts import is_loopback
from shoal.launcher.processes import ALONE, WORKER, Place, run_ranks
from shoal.launcher.slurm import FIRST_PORT, PORTS, adopt_step
from shoal.launcher.world import (
    caught_signals,
    foreign_ranks,
    read_number,
    resolve_ranks,
    resolve_threads,
    seconds_to_train,
    under_foreign_launcher,
)

# Rank, ranks, local rank and local ranks, as Open MPI, MVAPICH and Hydra (MPICH, Intel) say it.
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
     "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE",
     "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)  # fmt: skip
ANY_DEVICE_WORDS = ("auto", "gpu", "cpu", "xpu")


def adopt_rank(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Say in torchrun's words what others say of this process; return whether it is their rank."""
    adopt_step(environment)
    _adopt_mpi(environment)
    return under_foreign_launcher(environment)


def _adopt_mpi(environment: MutableMapping[str, str]) -> None:
    """Do so for a process of mpirun; a single one is a launcher like any other."""
    found = next((names for names in MPI if all(name in environment for name in names)), None)
    if "RANK" in environment or found is None or environment[found[1]] == "1":
        return
    rank, ranks, local_rank, local_ranks = (environment[name] for name in found)
    said = {
        "RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_ranks,
        "GROUP_RANK": str(int(rank) // int(local_ranks)),
    }
    environment.update(said)
    if ranks == local_ranks:  # all on this machine, with one parent
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(FIRST_PORT + os.getppid() % PORTS))


def complete_environment(
    threads: Literal["auto"] | int, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Add to what a rank of others was told what ours are told.

    Raises:
        ConfigError: nobody has said where the ranks meet.
    """
    num_ranks, local_ranks = foreign_ranks(environment)
    # torchrun says GROUP_RANK, DeepSpeed CROSS_RANK.
    node = environment.get("GROUP_RANK") or environment.get("CROSS_RANK") or "0"
    added = {
        "LOCAL_RANK": environment["RANK"],
        "LOCAL_WORLD_SIZE": str(local_ranks),
        "NODE_RANK": node,
        "OMP_NUM_THREADS": str(resolve_threads(threads, local_ranks)),
    }
    if num_ranks == 1:
        added |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if local_ranks == num_ranks:  # a machine need not know its own name
        added["GLOO_SOCKET_IFNAME"] = "lo"
    for name, value in added.items():
        environment.setdefault(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ConfigError(
                f"{name} is not set, and {num_ranks} ranks are to meet there",
                where="environment",
                fix="give all of them the first machine's name and a free port of it: "
                "mpirun -x MASTER_ADDR=NAME -x MASTER_PORT=29500 ...",
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Pod:
    """This machine among those that an operator has started alike."""

    host: int
    num_hosts: int
    slots: Literal["auto"] | int
    address: str
    """Of the first machine."""
    port: int


def find_pod(environment: Mapping[str, str] = os.environ) -> Pod | None:
    """Return what Kubernetes' training operators say; None where no such one started this.

    They set RANK and WORLD_SIZE for pods, and no LOCAL_RANK; or what torchrun reads (PET_...).

    Raises:
        ConfigError: the number of pods may change, which is torchrun's business; no numbers.
    """
    if "LOCAL_RANK" in environment or "TORCHELASTIC_RUN_ID" in environment:
        return None
    address = environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR")
    hosts = environment.get("PET_NNODES", "")
    elastic = environment.get("PET_RDZV_BACKEND", "static") != "static"
    least, _, most = hosts.partition(":")
    if elastic or (most and most != least):
        raise ConfigError(
            "a job whose number of pods may change is started by torchrun",
            where="PET_NNODES or PET_RDZV_BACKEND",
            fix="make it the pod's command: torchrun launcher/run.py [CONFIG] [key=value ...]",
        )
    if not address or not (hosts or _are_pods(environment, address)):
        return None
    said = environment.get("PET_NPROC_PER_NODE", "1")
    slots: Literal["auto"] | int = "auto"
    if said not in ANY_DEVICE_WORDS:
        slots = read_number("PET_NPROC_PER_NODE", 1, environment)
    pods = read_number("WORLD_SIZE", 1, environment) // (1 if slots == "auto" else slots)
    return Pod(
        host=read_number("PET_NODE_RANK", read_number("RANK", 0, environment), environment),
        num_hosts=int(least) if least.isdigit() else pods,
        slots=slots,
        address=address,
        port=read_number("PET_MASTER_PORT", read_number("MASTER_PORT", 29500, environment),
                         environment),
    )  # fmt: skip


def _are_pods(environment: Mapping[str, str], address: str) -> bool:
    """Whether RANK counts machines: in Kubernetes, or where the first one is elsewhere."""
    if not under_foreign_launcher(environment) or environment["WORLD_SIZE"] == "1":
        return False
    return "KUBERNETES_SERVICE_HOST" in environment or not (
        address == "localhost" or is_loopback(address)
    )


def run_pod(
    pod: Pod, argv: Sequence[str], world: WorldConfig, command: Sequence[str] = WORKER
) -> None:
    """Start this pod's ranks, once, and wait for them; new attempts are the operator's.

    Raises:
        ShoalError: as `processes.launch_ranks`.
    """
    slots = resolve_ranks(world.ranks) if pod.slots == "auto" else pod.slots
    place, stop_at = ALONE, time.monotonic() + seconds_to_train(world)
    if pod.num_hosts > 1:
        here = pod.address == "localhost" or is_loopback(pod.address)
        interface = find_interface(socket.gethostname() if here else pod.address)
        endpoint = f"{pod.address}:{pod.port}"
        place = Place(pod.host * slots, pod.host, pod.num_hosts, endpoint, interface)
    with caught_signals() as caught:
        ending = run_ranks(
            slots,
            argv,
            place=place,
            threads=world.threads,
            timeout=world.timeout_seconds,
            command=command,
            advise=lambda: "stop" if time.monotonic() > stop_at else "go",
            caught=caught,
        )
    raise_failure(ending)
