"""A run under trial: started as often as needed, watched from outside, and judged at its end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.faults.lab import Host, LabHost, ThisMachine

RUN_PY = str(Path(__file__).resolve().parents[2] / "launcher" / "run.py")
INJECTED = str(Path(__file__).with_name("injected"))
STEPS, ROWS, CONTEXT = 120, 4, 64
END_SECONDS = 240
CORPUS: dict[str, Any] = {
    "name": "small",
    "output": "data/small",
    "train": [{"path": "{samples}/domain_train.jsonl.gz", "max_bytes": 200_000}],
    "tokenizer": {"vocab_size": 400},
    "context": CONTEXT,
}
RUN: dict[str, Any] = {
    "name": "run",
    "prepare": "corpus.yaml",
    "model": {"context": CONTEXT, "num_layers": 2, "width": 32, "num_heads": 2},
    "data": {"train": [{"path": "data/small/train"}]},
    "optim": {"lr": 2e-3},
    "train": {"tokens": STEPS * ROWS * CONTEXT, "batch_rows": ROWS, "precision": "fp32"},
    "checkpoint": {"every_steps": 10, "keep": 3},
    # One thread a rank: on any machine the same sums in the same order.
    "world": {"timeout_seconds": 40, "save_seconds": 5, "threads": 1},
}
PYTHON = (sys.executable, RUN_PY)


class Job:
    """A run in a folder of its own, on one machine or on hosts of a lab."""

    def __init__(
        self,
        folder: Path,
        ranks: Sequence[int] = (2,),
        hosts: Sequence[LabHost] = (),
        at: int = 0,
        run: dict[str, Any] = RUN,
        corpus: Path | None = None,
    ) -> None:
        """Write what it needs.

        Args:
            folder: New.
            ranks: Of each host, in the order of the hostfile.
            hosts: Of a lab; none: this machine.
            at: Which of them the launcher is started on.
            run: The config.
            corpus: Shards that are there already.
        """
        folder.mkdir(parents=True)
        self.folder = folder
        self.hosts: list[Any] = list(hosts) or [ThisMachine(folder)]
        self.home: Host = self.hosts[at]
        self.lost: set[str] = set()
        """Names of hosts that have not come back."""
        self.run = folder / "runs" / run["name"]
        self.process: subprocess.Popen[bytes]
        (folder / "corpus.yaml").write_text(yaml.safe_dump(CORPUS))
        (folder / "run.yaml").write_text(yaml.safe_dump(run))
        lines = [f"{h.name} slots={n}\n" for h, n in zip(self.hosts, ranks, strict=True)]
        (folder / "hosts").write_text("".join(lines))
        if corpus:
            (folder / "data").symlink_to(corpus)

    def set_plan(self, **plan: Any) -> None:
        """Say what is to happen inside its ranks, see `injected`."""
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def start(self, *words: str, program: Sequence[str] = PYTHON, hostfile: bool = True) -> None:
        """Start it; it goes on where it was."""
        command = [*program, *(["--hostfile", "hosts"] if hostfile else []), "run.yaml", *words]
        path = os.pathsep.join([INJECTED, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = self.home.start(
            command, self.folder, self.folder / "output", {"PYTHONPATH": path}
        )

    def wait(self, seconds: float = END_SECONDS) -> int:
        """Return its exit code."""
        return self.process.wait(seconds)

    def wait_until(self, what: str, happened: Callable[[], bool]) -> None:
        """Look again and again; an end of the command is the end of waiting.

        Raises:
            RuntimeError: it has not happened.
        """
        deadline = time.monotonic() + END_SECONDS
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not reached\n{self.output()[-3000:]}")
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step has been taken."""
        self.wait_until(f"step {step}", lambda: self.count("train") >= step)

    def count(self, kind: str) -> int:
        """Return how many records of a kind there are."""
        with contextlib.suppress(OSError):
            return (self.run / "metrics.jsonl").read_text().count(f'"kind": "{kind}"')
        return 0

    def attempts(self) -> int:
        """Return how many starts of the ranks have trained."""
        files = [file for file in self.folder.glob("rows/*") if file.stat().st_size]
        return len({file.name.split("-")[1] for file in files})

    def last_ranks(self) -> list[int]:
        """Return the ranks of its newest start that have trained."""
        names = sorted(file.stem for file in self.folder.glob("rows/*") if file.stat().st_size)
        newest = names[-1].split("-")[1] if names else ""
        return sorted(int(name.split("-")[2]) for name in names if name.split("-")[1] == newest)

    def output(self) -> str:
        """Return all it has said."""
        return (self.folder / "output").read_text(errors="replace")

    # What runs.

    def processes(self, host: Host | None = None) -> list[psutil.Process]:
        """Return all of the job, on all hosts or on one."""
        return [p for h in ([host] if host else self.hosts) for p in h.processes()]

    def find(self, *words: str, host: Host | None = None) -> list[psutil.Process]:
        """Return the processes whose command holds all the words, and only ranks and the like."""
        found = []
        for process in self.processes(host):
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if all(word in command for word in words) and "--greet" not in " ".join(command):
                    found.append(process)
        return found

    def ranks(self, host: Host | None = None) -> list[psutil.Process]:
        """Return its ranks."""
        return self.find("--worker", host=host)

    def guards(self, host: Host | None = None) -> list[psutil.Process]:
        """Return its guards, of which a job of this machine has none."""
        return self.find("shoal.launcher.guard", host=host)

    def clients(self) -> list[psutil.Process]:
        """Return the ssh processes that lead to guards."""
        return self.find("ssh", "-T", host=self.home)

    def launcher(self) -> psutil.Process:
        """Return the process that the command is."""
        (found,) = [p for p in self.find(RUN_PY, host=self.home) if "--worker" not in p.cmdline()]
        return found

    def leftovers(self) -> list[str]:
        """Return what lies about on hosts that are not lost."""
        return [entry for h in self.hosts if h.name not in self.lost for entry in h.leftovers()]

    def checkpoints(self) -> list[Path]:
        """Return its checkpoints, oldest first."""
        return sorted((self.run / "checkpoints").glob("step-*"))

    # What it has done.

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Return its records of a kind, as they are now: those of steps done again are gone."""
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [record for line in lines if (record := json.loads(line))["kind"] == kind]

    def rows(self) -> dict[int, list[int]]:
        """Return step -> rows of all ranks, of what led to the end: without steps done again.

        Taken from what the ranks wrote down while they trained. A start that goes on from step N
        has forgotten all steps from N on.
        """
        starts: dict[str, dict[int, list[int]]] = {}
        for file in sorted(self.folder.glob("rows/*")):
            steps = starts.setdefault(file.name.split("-")[1], {})
            for line in file.read_text().splitlines():
                record = json.loads(line)
                steps.setdefault(record["step"], []).extend(record["rows"])
        kept: dict[int, list[int]] = {}
        for steps in starts.values():
            if steps:
                kept = {step: rows for step, rows in kept.items() if step < min(steps)} | steps
        return {step: sorted(rows) for step, rows in sorted(kept.items())}
