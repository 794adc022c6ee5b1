"""What every rank finds in its environment, whoever has started it."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from shoal.configs.errors import ConfigError
from shoal.configs.schema import WorldConfig
from shoal.launcher import slurm
from shoal.launcher.adoption import Pod, adopt_rank, complete_environment, find_pod, run_pod
from shoal.launcher.world import RANK_VARIABLES, usable_cores

CONTRACT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR",
            "MASTER_PORT", "OMP_NUM_THREADS")  # fmt: skip
MEET = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
# The second rank of the second of two machines with two each, as each launcher says it.
FOREIGN = {
    "torchrun": {
        **MEET, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "x",
    },
    "deepspeed": {
        **MEET, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2",
        "CROSS_RANK": "1", "CROSS_SIZE": "2",
    },
    "srun": {
        "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n1,n2", "SLURM_NODEID": "1",
        "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    },
    "mpirun": {**MEET, **OPEN_MPI},
    "hydra": {
        **MEET, "PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2",
    },
}  # fmt: skip


@pytest.mark.parametrize("launcher", FOREIGN)
def test_ranks_of_others_are_told_what_ours_are(launcher: str) -> None:
    environment = dict(FOREIGN[launcher])
    assert adopt_rank(environment)
    assert find_pod(environment) is None, "a rank is no machine"
    complete_environment("auto", environment)
    told = {name: environment[name] for name in CONTRACT}
    port = str(slurm.FIRST_PORT + 12 * 7 + 3) if launcher == "srun" else "29500"
    assert told == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": str(max(1, usable_cores() // 2)),
    }
    before = dict(environment)
    complete_environment("auto", environment)
    assert environment == before


def test_what_users_have_chosen_is_kept() -> None:
    environment = FOREIGN["torchrun"] | {"OMP_NUM_THREADS": "7", "NODE_RANK": "5"}
    complete_environment("auto", environment)
    assert (environment["OMP_NUM_THREADS"], environment["NODE_RANK"]) == ("7", "5")


def test_a_single_rank_needs_nobody_to_meet() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1"}
    complete_environment(1, environment)
    assert set(CONTRACT) <= environment.keys()
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_mpirun_on_one_machine_meets_there() -> None:
    environment = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    assert adopt_rank(environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert int(environment["MASTER_PORT"]) == slurm.FIRST_PORT + os.getppid() % slurm.PORTS
    alone = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}
    assert not adopt_rank(alone), "mpirun -n 1: a launcher like any other"


def test_ranks_that_nobody_told_where_to_meet_are_refused() -> None:
    environment = dict(OPEN_MPI)
    assert adopt_rank(environment)
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set, and 4 ranks") as caught:
        complete_environment("auto", environment)
    assert "mpirun -x MASTER_ADDR=NAME" in (caught.value.fix or "")


# Pods: an operator says which machine this is.

K8S = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
PYTORCHJOB = {**K8S, "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


@pytest.mark.parametrize(
    ("environment", "pod"),
    [
        ({**PYTORCHJOB, "RANK": "1", "WORLD_SIZE": "2"}, Pod(1, 2, 1, "job-master-0", 23456)),
        (
            {**PYTORCHJOB, "RANK": "1", "WORLD_SIZE": "16", "PET_NPROC_PER_NODE": "8",
             "PET_NNODES": "2", "PET_NODE_RANK": "1"},
            Pod(1, 2, 8, "job-master-0", 23456),
        ),
        (
            {"PET_NNODES": "3", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "2",
             "PET_MASTER_ADDR": "node-0-0", "PET_MASTER_PORT": "29400"},
            Pod(2, 3, "auto", "node-0-0", 29400),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEET}, Pod(1, 2, 1, "n1", 29500)),
        ({**PYTORCHJOB, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", **K8S, **MEET}, None),
        ({"MASTER_ADDR": "n1"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_a_pod_learns_which_one_it_is(environment: dict[str, str], pod: Pod | None) -> None:
    assert find_pod(environment) == pod


@pytest.mark.parametrize("said", [{"PET_NNODES": "1:3"}, {"PET_RDZV_BACKEND": "c10d"}])
def test_pods_that_come_and_go_are_for_torchrun(said: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="is started by torchrun"):
        find_pod(PYTORCHJOB | said)


TELL = """
import json, os, sys
from shoal.launcher.outcomes import report_outcome
names = sys.argv[2].split(",")
out = os.path.join(sys.argv[1], os.environ["RANK"])
code = report_outcome(lambda: open(out, "w").write(" ".join(os.environ[n] for n in names)) and None)
os._exit(code)
"""


def test_the_ranks_of_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "tell.py").write_text(TELL)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-P", str(tmp_path / "tell.py")]
    pod = Pod(0, 1, 2, socket.gethostname(), 23456)
    run_pod(pod, [str(tmp_path / "out"), ",".join(CONTRACT)], WorldConfig(threads=3), command)
    told = {file.name: file.read_text().split() for file in (tmp_path / "out").iterdir()}
    assert told.keys() == {"0", "1"}
    for rank, words in told.items():
        assert words[:6] == [rank, rank, "2", "2", "0", "127.0.0.1"]
        assert words[7] == "3"
