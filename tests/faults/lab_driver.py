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
PATTERN = "shoal.launcher.run --worke[r]"  # not the shell that looks for it


def main() -> None:
    """Start, disturb, wait, look around."""
    event, *command = sys.argv[1:]
    os.chdir(os.environ["PWD"])  # entered from outside, it belongs to the mounts of outside
    with Path("output").open("w") as output:
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        happened = time.monotonic()
        if event != "none":
            wait_for_step(EVENT_STEP, job)
            happened = time.monotonic()
            EVENTS[event](job)
        code = job.wait(timeout=240)
    ended = time.monotonic()
    time.sleep(1)
    print(
        json.dumps(
            {
                "code": code,
                "seconds": ended - happened,
                "left": [len(find_ranks(name)) for name in hosts() if event != "link_down"],
            }
        )
    )


def wait_for_step(step: int, job: subprocess.Popen[bytes]) -> None:
    """Wait until so many steps are recorded."""
    deadline = time.monotonic() + 120
    while not METRICS.is_file() or METRICS.read_text().count('"kind": "train"') < step:
        if job.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"step {step} was not reached:\n{Path('output').read_text()}")
        time.sleep(0.02)


def hosts() -> list[str]:
    """Return the names in the hostfile."""
    return [line.split()[0] for line in Path("hosts").read_text().splitlines()]


def on(host: str, command: str) -> str:
    """Run a shell command on a host."""
    done = subprocess.run(["ssh", host, command], capture_output=True, text=True, check=False)
    return done.stdout


def find_ranks(host: str) -> list[int]:
    """Return the process ids of ranks on a host, as it numbers them."""
    return [int(pid) for pid in on(host, f"pgrep -f '{PATTERN}'").split()]


def kill_rank(job: subprocess.Popen[bytes]) -> None:
    """SIGKILL a rank of the last host."""
    name = hosts()[-1]
    on(name, f"kill -9 {find_ranks(name)[0]}")


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
    deadline = time.monotonic() + 40
    while any(find_ranks(name) for name in hosts()) and time.monotonic() < deadline:
        time.sleep(0.2)


EVENTS = {
    event.__name__: event for event in (kill_rank, kill_guard, link_down, terminate, kill_launcher)
}

if __name__ == "__main__":
    main()
