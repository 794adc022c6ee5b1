"""Runs on the first host of a lab: starts a job, does one thing to it, prints how it ended as JSON.

python lab_driver.py EVENT COMMAND ...
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

METRICS = Path("runs/lab/metrics.jsonl")
EVENT_STEP = 40
RANKS = "shoal.launcher.run --worke[r]"  # not the shell that looks for it
OURS = f"{RANKS}|shoal.launcher.guar[d]|ssh -[T]"


def main() -> None:
    """Start, disturb, wait, look around."""
    event, *command = sys.argv[1:]
    os.chdir(os.environ["PWD"])  # entered from outside, it belongs to the mounts of outside
    with Path("output").open("w") as output:
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        idle = 0.0
        if event != "none":
            wait_for("train", EVENT_STEP, job)
            happened = time.monotonic()
            EVENTS[event](job)
            if event in RECOVERED:
                wait_for("start", 2, job)
                idle = time.monotonic() - happened
        code = job.wait(timeout=240)
    time.sleep(1)
    left = [len(find(OURS, name)) for name in hosts() if event != "link_down"]
    print(json.dumps({"code": code, "idle": idle, "left": left}))


def wait_for(kind: str, count: int, job: subprocess.Popen[bytes]) -> None:
    """Wait until there are so many records of a kind."""
    deadline = time.monotonic() + 120
    while not METRICS.is_file() or METRICS.read_text().count(f'"kind": "{kind}"') < count:
        if job.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"no {count}. {kind} record:\n{Path('output').read_text()}")
        time.sleep(0.02)


def hosts() -> list[str]:
    """Return the names in the hostfile."""
    return [line.split()[0] for line in Path("hosts").read_text().splitlines()]


def on(host: str, command: str) -> str:
    """Run a shell command on a host."""
    done = subprocess.run(["ssh", host, command], capture_output=True, text=True, check=False)
    return done.stdout


def find(pattern: str, host: str) -> list[int]:
    """Return the process ids of what runs on a host, as it numbers them."""
    return [int(pid) for pid in on(host, f"pgrep -f '{pattern}'").split()]


def kill_rank(job: subprocess.Popen[bytes]) -> None:
    """SIGKILL a rank of the last host."""
    name = hosts()[-1]
    on(name, f"kill -9 {find(RANKS, name)[0]}")


def freeze_rank(job: subprocess.Popen[bytes]) -> None:
    """SIGSTOP a rank of the last host."""
    name = hosts()[-1]
    on(name, f"kill -STOP {find(RANKS, name)[0]}")


def kill_guard(job: subprocess.Popen[bytes]) -> None:
    """SIGKILL the guard of the last host."""
    on(hosts()[-1], "pkill -9 -f 'shoal.launcher.guar[d]'")


def link_down(job: subprocess.Popen[bytes]) -> None:
    """Take the last host's network away."""
    on(hosts()[-1], "(sleep 0.5; ip link set eth0 down) >/dev/null 2>&1 &")


def terminate(job: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the launcher."""
    os.kill(job.pid, signal.SIGTERM)


def kill_launcher(job: subprocess.Popen[bytes]) -> None:
    """SIGKILL the launcher; give the guards their time."""
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + 60
    while any(find(OURS, name) for name in hosts()) and time.monotonic() < deadline:
        time.sleep(0.2)


RECOVERED = ("kill_rank", "freeze_rank", "kill_guard", "link_down")
EVENTS = {
    event.__name__: event
    for event in (kill_rank, freeze_rank, kill_guard, link_down, terminate, kill_launcher)
}

if __name__ == "__main__":
    main()
