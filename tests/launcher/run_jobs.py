"""Jobs whose training is pretence, each a process of its own: how they are started and watched."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

# Stands in for shoal.launcher.training in the ranks, by way of sitecustomize: what is tested here
# is who is started, how, and how it ends.
FAKE_TRAINING = """
import json, os, sys, time, types

def train(configs, world):
    facts = {
        "names": [config.name for config in configs],
        "steps": configs[0].steps,
        "rank": [world.rank, world.num_ranks, world.local_rank, world.local_ranks],
        "device": str(world.device),
        "port": os.environ["MASTER_PORT"],
        "threads": os.environ["OMP_NUM_THREADS"],
        "pid": os.getpid(),
        "path": sys.path[0],
    }
    with open(os.path.join(os.environ["RECORDS"], f"{os.getpid()}.json"), "w") as file:
        json.dump(facts, file)
    mode = os.environ.get("FAKE", "")
    from shoal.configs.errors import DataError, StoppedOnRequest
    if mode == "data" and world.rank == 1:
        raise DataError("shard is corrupt", where="shard.00001.mds", fix="shoal shards verify")
    while mode in ("stop", "data"):
        if world.stop.requested and mode == "stop":
            raise StoppedOnRequest("step 7 of 9 is saved")
        time.sleep(0.05)

module = types.ModuleType("shoal.launcher.training")
module.train = train
module.needed_bytes = lambda folder, config, is_first: 0
sys.modules["shoal.launcher.training"] = module
"""


def hostfile(tmp_path: Path, slots: int = 2) -> str:
    file = tmp_path / "hosts"
    file.write_text(f"localhost slots={slots}\n")
    return str(file)


def records(stage: dict[str, str]) -> list[dict[str, object]]:
    found = [json.loads(file.read_text()) for file in Path(stage["RECORDS"]).glob("*.json")]
    return sorted(found, key=lambda record: record["rank"])


def wait_for_records(stage: dict[str, str], count: int) -> list[dict[str, object]]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if len(found := records(stage)) == count:
                return found
        except ValueError:  # one is being written
            pass
        time.sleep(0.1)
    raise AssertionError(f"{len(records(stage))} ranks instead of {count}")


def wait_until_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "ranks outlived their job"
        time.sleep(0.05)


def run(command: list[str], stage: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=stage, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def start(command: list[str], stage: dict[str, str], cwd: Path) -> subprocess.Popen[str]:
    # A suite started in the background ignores SIGINT, and so would what it starts.
    return subprocess.Popen(
        command, env=stage, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
