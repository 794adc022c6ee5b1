"""A stage for jobs over several hosts that stay on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from shoal.launcher import lines

sys.path.append(str(Path(__file__).parent))  # the tests import the helpers beside them

TRAINING = """
import os, sys, time, types
from pathlib import Path
from shoal.configs.errors import DataError, StoppedOnRequest

def train(configs, world):
    file = Path(os.environ["RECORDS"], str(world.rank))
    file.write_text(f"{world.num_ranks} {os.environ['LOCAL_RANK']} {os.getpid()}")
    mode = os.environ["FAKE"]
    if mode == "apart":  # all look for each other; those of the second host in vain
        with world.watchdog.meeting():
            time.sleep(60 if world.rank in (1, 2) else 0)
        time.sleep(60)
    if mode == "data" and world.rank == 1:
        raise DataError("shard is corrupt", where="shard.00001.mds")
    while mode in ("wait", "data"):
        if world.stop.requested:
            raise StoppedOnRequest("step 7 of 9 is saved")
        time.sleep(0.05)

module = types.ModuleType("shoal.launcher.training")
module.train = train
module.needed_bytes = lambda folder, config, is_first: 0
sys.modules["shoal.launcher.training"] = module
"""
# ssh ... -- NAME COMMAND; a real one would not hand the signals it ignores to the other machine.
SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
exec env --default-signal=TERM,INT,HUP,USR1,USR2 sh -c "$3"
"""
# pdsh ... -w NAMES COMMAND, and srun ... --nodelist=NAMES ... sh -c COMMAND
PDSH = """#!/bin/sh
while [ "$1" != -w ]; do shift; done
for name in $(echo "$2" | tr , " "); do
    env --default-signal=TERM,INT,HUP,USR1,USR2 sh -c "$(echo "$3" | sed "s/%h/$name/")" &
done
wait
"""
SRUN = """#!/bin/sh
while [ "$1" != sh ]; do
    case "$1" in --nodelist=*) names="${1#--nodelist=}";; esac
    shift
done
for name in $(echo "$names" | tr , " "); do
    SLURMD_NODENAME="$name" env --default-signal=TERM,INT,HUP,USR1,USR2 "$@" &
done
wait
"""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an ssh of its own, where training is a file that each rank writes."""
    (tmp_path / "sitecustomize.py").write_text(TRAINING)
    for name, text in {"ssh": SSH, "pdsh": PDSH, "srun": SRUN}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(lines, "address_towards", lambda name: "127.0.0.1")
    (tmp_path / "run.yaml").write_text("data: {train: [{path: x}]}\ntrain: {tokens: 1}\n")
    (tmp_path / "records").mkdir()
    for name, value in {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "RECORDS": str(tmp_path / "records"),
        "FAKE": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path
