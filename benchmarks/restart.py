"""Restart: how soon a job trains again after a loss, and how soon it has saved and gone when asked.

CPU ranks, default limits. Hosts are network namespaces with an sshd each, where there can be such.
The peer is the start of the same command, from its call to its first step: what it takes to do it
by hand, once somebody has noticed.
"""

from __future__ import annotations

import copy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.claims import Claim, Target, Turns, WrongResultError, make_parser, print_claim
from tests.faults.job import RUN, Job
from tests.faults.lab import LabHost, open_lab, why_not

ROUNDS, QUICK_ROUNDS = 5, 2
FEW_STEPS = 5
TARGETS = {
    "training again after SIGKILL of a rank": 30.0,
    "training on after the loss of a host": 90.0,
    "saved and ended after SIGTERM": 20.0,
    "no process left after SIGTERM": 10.0,
}
Figures = dict[str, list[tuple[float, float]]]
"""Claim -> (ours, the start before it) of each round."""


def main() -> None:
    """Print a line for every claim."""
    quick = make_parser(__doc__).parse_args().quick
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        machine = make_job(Path(folder) / "machine", (2,))
        figures: Figures = {}
        for _ in range(rounds):
            befall_machine(machine, figures)
        for claim in judge(figures, "one machine, 2 ranks"):
            print_claim(claim)
        if quick:
            return
        if reason := why_not():
            sys.exit(f"hosts are left out: {reason}")
        with open_lab(2) as hosts:
            figures = {}
            job = make_job(Path(folder) / "hosts", (1, 1), hosts, machine.folder / "data")
            for _ in range(rounds):
                befall_hosts(job, figures)
        for claim in judge(figures, "two hosts, 1 rank each"):
            print_claim(claim)


def make_job(
    folder: Path,
    ranks: Sequence[int],
    hosts: Sequence[LabHost] = (),
    corpus: Path | None = None,
) -> Job:
    """Return a run with more steps than it will ever take, at the default limits."""
    run: dict[str, Any] = copy.deepcopy(RUN)
    run["train"]["tokens"] *= 10_000
    run["checkpoint"] = {"every_steps": 200}
    run["world"] = {"threads": 1}
    return Job(folder, ranks, hosts, run=run, corpus=corpus)


def befall_machine(job: Job, figures: Figures) -> None:
    """One round on one machine."""
    started = start(job)
    note(figures, "training again after SIGKILL of a rank", restart(job, kill_rank), started)
    stop(job, "launcher", lambda: job.launcher(), figures, started)
    started = start(job)
    stop(job, "a rank", lambda: job.ranks()[-1], figures, started)


def befall_hosts(job: Job, figures: Figures) -> None:
    """One round on hosts."""
    started = start(job)
    note(figures, "training again after SIGKILL of a rank", restart(job, kill_rank), started)
    stop(job, "launcher", lambda: job.launcher(), figures, started)
    levels: dict[str, Callable[[], psutil.Process]] = {
        "a rank": lambda: job.ranks(job.hosts[1])[0],
        "a guard": lambda: job.guards(job.hosts[1])[0],
    }
    for level, find in levels.items():
        started = start(job)
        stop(job, level, find, figures, started)
    started = start(job)
    lost = job.hosts[1]
    seconds = restart(job, lambda job: lost.lose())
    note(figures, "training on after the loss of a host", seconds, started)
    job.launcher().terminate()
    job.wait()
    lost.clear()
    lost.mend()


def start(job: Job) -> float:
    """Start it and return the seconds until it has taken a few steps."""
    return seconds_until_training(job, job.start)


def restart(job: Job, befall: Callable[[Job], None]) -> float:
    """Let something befall it; return the seconds until ranks started anew have taken steps."""
    return seconds_until_training(job, lambda: befall(job))


def kill_rank(job: Job) -> None:
    """SIGKILL the last rank."""
    job.ranks()[-1].kill()


def seconds_until_training(job: Job, cause: Callable[[], object]) -> float:
    """Return the seconds from a cause to the first step after it; wait for some more."""
    before, begun = job.attempts(), time.perf_counter()
    cause()
    job.wait_until("the first step", lambda: job.attempts() > before)
    seconds = time.perf_counter() - begun
    job.wait_until("a few steps", lambda: last_steps(job) >= FEW_STEPS)
    return seconds


def last_steps(job: Job) -> int:
    """Return how many steps the newest attempt has taken."""
    return len(sorted(job.folder.glob("rows/*"))[-1].read_text().splitlines())


def stop(
    job: Job, level: str, find: Callable[[], psutil.Process], figures: Figures, started: float
) -> None:
    """SIGTERM one process of it, and wait until it has saved and is gone.

    Raises:
        WrongResultError: it ended otherwise.
    """
    victim, begun = find(), time.perf_counter()
    victim.send_signal(signal.SIGTERM)
    code = job.wait()
    ended = time.perf_counter()
    if code != 5:
        raise WrongResultError(f"SIGTERM to {level}: exit code {code}\n{job.output()[-2000:]}")
    while job.processes():
        time.sleep(0.01)
    left = time.perf_counter() - ended
    note(figures, f"saved and ended after SIGTERM to {level}", ended - begun, started)
    note(figures, f"no process left after SIGTERM to {level}", left, started)


def note(figures: Figures, claim: str, ours: float, started: float) -> None:
    """Keep a figure with the start that it is compared with."""
    figures.setdefault(claim, []).append((ours, started))


def judge(figures: Figures, where: str) -> Iterator[Claim]:
    """Yield the claims."""
    for name, pairs in figures.items():
        limit = next(limit for prefix, limit in TARGETS.items() if name.startswith(prefix))
        turns = Turns(tuple(ours for ours, _ in pairs), tuple(peer for _, peer in pairs))
        target = Target("<=", limit, of="ours")
        setup = {"device": "cpu", "peer": "start of the same command"}
        yield Claim.from_turns(f"{name}, {where}", "s", turns, target, setup)


if __name__ == "__main__":
    main()
