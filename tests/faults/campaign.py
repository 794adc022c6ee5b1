"""Faults drawn at random moments of short runs, and whether anything was lost.

Every run is brought to its end, by itself or by the same command again, and must then have read the
very rows, and hold the very weights and losses, of a run that nothing befell. See
`python -m tests.faults --help`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.faults.faults import FAULTS, Ends, Fault
from tests.faults.job import RUN, STEPS, Job
from tests.faults.judgement import LostError, check_same, count_lost
from tests.faults.lab import LabHost

LAYOUTS = {(1, 1): 4, (1, 1, 1): 3, (2, 2): 2, (2, 2, 2): 1}
"""Ranks of each host -> how often it is drawn."""
LAST_STEP = STEPS - 40
"""Of a fault: later ones might meet a run that has ended."""
MOST_SECONDS = {"stop": 5 * 20.0, "rank": 5 * 30.0, "host": 5 * 90.0}
"""Five times what is asked for: others use the machine, too."""
HOST_FAULTS = ("lose", "cut", "pause")


@dataclass
class Trial:
    """One fault and what came of it."""

    number: int
    fault: str
    place: str = "machine"
    """Or ranks of each host, and where the launcher is: `1+1 at n1`."""
    step: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    codes: list[int] = field(default_factory=list)
    again: float | None = None
    """Seconds from the fault until it trained again by itself."""
    ended: float | None = None
    """Seconds from the fault to the end of a command that it has stopped."""
    seconds: float = 0.0
    """Of the whole trial."""
    lost: int = 0
    repeated: int = 0
    """Rows."""
    problem: str | None = None


def draw_faults(seed: int, count: int, kinds: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (fault, place) of each trial: every kind once before any twice."""
    draw, drawn, left = random.Random(seed), [], list[tuple[str, str]]()
    for _ in range(count):
        if not left:
            left = list(kinds)
            draw.shuffle(left)
        drawn.append(left.pop())
    return drawn


class Campaign:
    """Trials, and the undisturbed runs they are judged by."""

    def __init__(self, folder: Path, hosts: Sequence[LabHost] = ()) -> None:
        """Train the first undisturbed run, which makes the shards of all.

        Args:
            folder: For everything; what went wrong stays there.
            hosts: Of a lab, one for each of the most that a trial has.
        """
        self.folder, self.hosts = folder, hosts
        self._references: dict[str, Job] = {}
        self._one_reference, self._one_lab = threading.Lock(), threading.Lock()
        self.corpus: Path | None = None
        self.corpus = self.reference(2).folder / "data"

    def reference(
        self, ranks: int, skipped: int | None = None, needs: dict[str, Any] | None = None
    ) -> Job:
        """Return the undisturbed run of so many ranks, with one step left out if so."""
        key = f"{ranks}-{skipped}-{json.dumps(needs or {})}"
        with self._one_reference:
            if key not in self._references:
                folder = self.folder / f"reference-{len(self._references)}"
                job = Job(folder, [ranks], run=make_run(needs or {}), corpus=self.corpus)
                if skipped is not None:
                    job.set_plan(kind="skip", step=skipped)
                job.start()
                if code := job.wait():
                    raise RuntimeError(f"the undisturbed run ended with {code}:\n{job.output()}")
                self._references[key] = job
        return self._references[key]

    def try_fault(self, number: int, name: str, place: str, seed: int) -> Trial:
        """Let one fault befall a fresh run, and bring that to its end."""
        fault, draw = FAULTS[name], random.Random(f"{seed} {number} {name} {place}")
        trial, begun = Trial(number, name, step=draw.randrange(1, LAST_STEP)), time.monotonic()
        folder = self.folder / f"{number:04d}-{name.replace(' ', '-')}"
        shutil.rmtree(folder, ignore_errors=True)
        with self._one_lab if place == "hosts" else contextlib.nullcontext():
            job = self._make_job(fault, place, draw, trial, folder)
            with _own_disk(job) if fault.own_disk else contextlib.nullcontext():
                try:
                    self._run(job, fault, draw, trial)
                except Exception as error:  # whatever it is, it is this trial's and not the others'
                    trial.problem = f"{type(error).__name__}: {error}\n{job.output()[-6000:]}"
                finally:
                    self._clean_up(job, trial)
        trial.seconds = time.monotonic() - begun
        if trial.problem is None:
            shutil.rmtree(job.folder)
        return trial

    def _make_job(
        self, fault: Fault, place: str, draw: random.Random, trial: Trial, folder: Path
    ) -> Job:
        run = make_run(fault.needs)
        if place == "machine":
            job = Job(folder, [2], run=run, corpus=self.corpus)
            layout: Sequence[int] = (2,)
        else:
            choices = [layout for layout in LAYOUTS if len(layout) <= len(self.hosts)]
            (layout,) = draw.choices(choices, [LAYOUTS[choice] for choice in choices])
            at = draw.randrange(1 if fault.launcher_aside else 0, len(layout))
            hosts = self.hosts[: len(layout)]
            job = Job(folder, layout, hosts, at, run, self.corpus)
            trial.place = f"{'+'.join(map(str, layout))} at {job.home.name}"
        if fault.plan:
            trial.plan = fault.plan(draw, sum(layout))
            job.set_plan(**trial.plan)
        return job

    def _run(self, job: Job, fault: Fault, draw: random.Random, trial: Trial) -> None:
        ranks = sum(map(int, trial.place.split()[0].split("+"))) if job.hosts[1:] else 2
        reference = self.reference(
            ranks, trial.plan["step"] if fault.skips else None, fault.needs
        )  # fmt: skip
        job.start()
        if fault.plan:
            job.wait_until("the planned fault", (job.folder / "done").exists)
        else:
            job.wait_for_step(trial.step)
        begun, attempts = time.monotonic(), job.attempts()
        for expected in fault.act(job, draw):
            said = 0
            if trial.codes:
                said = len(job.output())
                job.start()
            again = self._follow(job, expected, said, trial, attempts)
            if len(trial.codes) == 1:
                stopped = bool(trial.codes[0]) and trial.codes[0] > 0
                trial.again = again - begun if again else None
                trial.ended = time.monotonic() - begun if stopped else None
        if trial.codes[-1] != 0:
            job.start()
            self._follow(job, Ends(frozenset({0})), 0, trial, attempts)
        _check_times(trial)
        trial.lost, trial.repeated = count_lost(job, reference)
        if trial.lost or trial.repeated:
            raise LostError(f"{trial.lost} rows lost, {trial.repeated} repeated")
        check_same(job, reference)

    def _follow(
        self, job: Job, expected: Ends, said: int, trial: Trial, attempts: int
    ) -> float | None:
        """Wait for the end and look at it; return when another attempt began to train, if so."""
        again = None
        deadline = time.monotonic() + MOST_SECONDS["host"] + STEPS
        while (code := job.process.poll()) is None:
            if again is None and job.attempts() > attempts:
                again = time.monotonic()
            if time.monotonic() > deadline:
                raise LostError("it goes on for ever")
            time.sleep(0.05)
        trial.codes.append(code)
        ended = time.monotonic()
        while left := job.processes():
            if time.monotonic() > ended + expected.leave_seconds:
                raise LostError(f"orphans: {_describe(left)}")
            time.sleep(0.1)
        if code not in expected.codes:
            raise LostError(f"ended with {code}, not {sorted(expected.codes)}")
        text = job.output()[said:]
        if code > 0 and not ("error: " in text or "stopped: " in text):
            raise LostError("ended in silence")
        return again

    def _clean_up(self, job: Job, trial: Trial) -> None:
        """Look for what is left, and leave a clean stage for the next trial, whatever happened."""
        if left := job.processes():
            trial.problem = trial.problem or f"orphans: {_describe(left)}"
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        job.process.kill()  # what entered a host may be stopped with what it started
        job.process.wait()
        if lying := job.leftovers():
            trial.problem = trial.problem or f"left behind: {lying}"
        for host in job.hosts:
            if isinstance(host, LabHost):
                host.clear()
                host.mend()


def make_run(needs: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a run, with some values replaced."""
    run = copy.deepcopy(RUN)
    for key, value in needs.items():
        section, name = key.split(".")
        run[section][name] = value
    return run


def _check_times(trial: Trial) -> None:
    kind = "host" if trial.fault.startswith(HOST_FAULTS) else "rank"
    if trial.again and trial.again > MOST_SECONDS[kind]:
        raise LostError(f"trained again after {trial.again:.0f} s only")
    if trial.ended and trial.ended > MOST_SECONDS["stop"]:
        raise LostError(f"stopped after {trial.ended:.0f} s only")


def _describe(processes: Sequence[psutil.Process]) -> str:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())[-120:]}")
    return "; ".join(found)


@contextlib.contextmanager
def _own_disk(job: Job) -> Iterator[None]:
    folder = job.folder / "runs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
