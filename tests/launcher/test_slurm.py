"""What Slurm says of a task and of an allocation, in our words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.configs.errors import ConfigError, PreflightError
from shoal.launcher.hosts import Host
from shoal.launcher.slurm import adopt_step, allocated_hosts, list_names, tasks_per_node

STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "n1,n2,n3",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_a_task_of_srun_learns_its_rank() -> None:
    environment = dict(STEP)
    adopt_step(environment)
    added = {name: value for name, value in environment.items() if name not in STEP}
    assert added == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "1",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "20087",
    }


def test_what_others_have_said_is_kept() -> None:
    chosen = {"MASTER_ADDR": "head", "MASTER_PORT": "7"}
    environment = STEP | chosen
    adopt_step(environment)
    assert chosen.items() <= environment.items()
    batch, shell = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}, STEP | {"SLURM_STEP_NUM_TASKS": "1"}
    for other in ({**STEP, "RANK": "0"}, batch, shell, {}):
        environment = dict(other)
        adopt_step(environment)
        assert environment == other, "torchrun in a step; a batch script; srun --pty; no Slurm"


def test_machines_of_an_allocation() -> None:
    job = {"SLURM_JOB_NODELIST": "n1,n2", "SLURM_TASKS_PER_NODE": "4,2"}
    assert allocated_hosts(job) == [Host("n1", 4), Host("n2", 2)]
    assert allocated_hosts(job, slots=3) == [Host("n1", 3), Host("n2", 3)]
    for said in ({"SLURM_GPUS_ON_NODE": "8"}, {"SLURM_GPUS_PER_NODE": "a100:8"}):
        assert allocated_hosts(job | said) == [Host("n1", 8), Host("n2", 8)]
    with pytest.raises(ConfigError, match="no Slurm allocation"):
        allocated_hosts({})


def test_short_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigError, match="no list of tasks"):
        tasks_per_node("2(x")
    script = '#!/bin/sh\n[ "$3" = "n[1-2],m" ] && echo n1 n2 m\n'
    (tmp_path / "scontrol").write_text(script)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert list_names("n[1-2],m") == ["n1", "n2", "m"]
    with pytest.raises(PreflightError, match="cannot list the machines"):
        list_names("x[1-")
