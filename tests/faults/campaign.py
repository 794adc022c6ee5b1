"""Faults drawn at random moments of short runs, and whether anything was lost.

Every run is brought to its end, by itself or by the same command again, and must then hold the very
weights and losses of a run that nothing befell. See `python -m tests.faults --help`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

RUN_PY = str(Path(__file__).resolve().parents[2] / "launcher" / "run.py")
STEPS, ROWS, CONTEXT = 150, 4, 64
END_SECONDS = 150
CORPUS = {
    "name": "small",
    "output": "data/small",
    "train": [{"path": "{samples}/domain_train.jsonl.gz", "max_bytes": 200_000}],
    "tokenizer": {"vocab_size": 400},
    "context": CONTEXT,
}
RUN = {
    "name": "run",
    "prepare": "corpus.yaml",
    "model": {"context": CONTEXT, "num_layers": 2, "width": 32, "num_heads": 2},
    "data": {"train": [{"path": "data/small/train"}]},
    "optim": {"lr": 5e-3},
    "train": {"tokens": STEPS * ROWS * CONTEXT, "batch_rows": ROWS, "precision": "fp32"},
    "checkpoint": {"every_steps": 15, "keep": 3},
    "world": {"timeout_seconds": 12},
}


@dataclass
class Trial:
    """One fault and what came of it."""

    fault: str
    step: int
    codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    problem: str | None = None


class Job:
    """A run in a folder of its own, started as often as needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "corpus.yaml").write_text(yaml.safe_dump(CORPUS))
        (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
        (folder / "hosts").write_text("localhost slots=2\n")
        self.run = folder / "runs/run"
        self.process: subprocess.Popen[bytes]

    def start(self, *words: str) -> None:
        command = [sys.executable, RUN_PY, "--hostfile", "hosts", "run.yaml", *words]
        with (self.folder / "output").open("a") as output:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=output, stderr=output, start_new_session=True
            )

    def wait(self) -> int:
        """Return the exit code, once nothing of the job is alive."""
        code = self.process.wait(END_SECONDS)
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return code

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + END_SECONDS
        while self.count("train") < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"step {step} was not reached:\n{self.output()[-3000:]}")
            time.sleep(0.01)

    def count(self, kind: str) -> int:
        with contextlib.suppress(OSError):
            return (self.run / "metrics.jsonl").read_text().count(f'"kind": "{kind}"')
        return 0

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def processes(self) -> list[psutil.Process]:
        """All that belongs to this job, the launcher excepted."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.cwd() == str(self.folder) and process.pid != self.process.pid
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        return [p for p in self.processes() if "--worker" in p.cmdline()]

    def checkpoints(self) -> list[Path]:
        return sorted((self.run / "checkpoints").glob("step-*"))

    def result(self) -> tuple[list[float], str]:
        """Losses of all steps, and the files of the last checkpoint with their hashes."""
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        records = [r for line in lines if (r := json.loads(line))["kind"] == "train"]
        assert [r["step"] for r in records] == list(range(1, STEPS + 1)), "steps lost or repeated"
        manifest = json.loads((self.checkpoints()[-1] / "manifest.json").read_text())
        assert manifest["step"] == STEPS
        return [r["loss"] for r in records], json.dumps(manifest["files"], sort_keys=True)


Fault = Callable[[Job, random.Random], Iterator[set[int]]]
"""Does it; yields the exit codes that may follow, and after each end what is to be mended."""


def kill_rank(job: Job, draw: random.Random) -> Iterator[set[int]]:
    draw.choice(job.ranks()).kill()
    yield {0}


def freeze_rank(job: Job, draw: random.Random) -> Iterator[set[int]]:
    draw.choice(job.ranks()).suspend()
    yield {0}


def terminate_rank(job: Job, draw: random.Random) -> Iterator[set[int]]:
    draw.choice(job.ranks()).terminate()
    yield {5}


def kill_launcher(job: Job, draw: random.Random) -> Iterator[set[int]]:
    job.process.kill()
    yield {-signal.SIGKILL}


def pause_launcher(job: Job, draw: random.Random) -> Iterator[set[int]]:
    job.process.send_signal(signal.SIGSTOP)
    time.sleep(draw.uniform(0.1, 3.0))
    job.process.send_signal(signal.SIGCONT)
    yield {0}


def terminate_launcher(job: Job, draw: random.Random) -> Iterator[set[int]]:
    job.process.send_signal(draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
    yield {5}


def kill_while_saving(job: Job, draw: random.Random) -> Iterator[set[int]]:
    """SIGKILL of all ranks, or of the launcher, at a random moment of writing a checkpoint."""
    deadline = time.monotonic() + END_SECONDS
    while not list(job.run.glob("checkpoints/.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    assert list(job.run.glob("checkpoints/.partial-*")), "nothing was being saved"
    time.sleep(draw.uniform(0.0, 0.03))
    if draw.random() < 0.5:
        job.process.kill()
        yield {-signal.SIGKILL}
    else:
        for rank in job.ranks():
            rank.kill()
        yield {0}


def damage_checkpoint(job: Job, draw: random.Random) -> Iterator[set[int]]:
    """The newest checkpoint of a stopped run is cut, altered or loses a file."""
    job.process.terminate()
    yield {5}
    file = draw.choice(sorted(job.checkpoints()[-1].iterdir()))
    damage(file, draw)


def damage_all_checkpoints(job: Job, draw: random.Random) -> Iterator[set[int]]:
    """All checkpoints of a stopped run are broken: it is refused, and goes on once one is back."""
    job.process.terminate()
    yield {5}
    kept = job.folder / "kept"
    shutil.copytree(job.run / "checkpoints", kept)
    for folder in job.checkpoints():
        damage(draw.choice(sorted(folder.iterdir())), draw)
    yield {3}
    shutil.rmtree(job.run / "checkpoints")
    kept.rename(job.run / "checkpoints")


def change_config(job: Job, draw: random.Random) -> Iterator[set[int]]:
    """The run is started again with another rate: refused, and nothing of it is touched."""
    job.process.terminate()
    yield {5}
    text = (job.folder / "run.yaml").read_text()
    (job.folder / "run.yaml").write_text(text.replace("lr: 0.005", "lr: 0.006"))
    yield {2}
    (job.folder / "run.yaml").write_text(text)


def break_shard(job: Job, draw: random.Random) -> Iterator[set[int]]:
    """A shard of a stopped run is cut or altered: refused by name, and goes on once it is back."""
    job.process.terminate()
    yield {5}
    shard = draw.choice(sorted((job.folder / "data/small/train").glob("shard.*")))
    kept = shard.read_bytes()
    damage(shard, draw)
    yield {3}
    shard.write_bytes(kept)


def fill_disk(job: Job, draw: random.Random) -> Iterator[set[int]]:
    """The disk is full when a checkpoint is to be written."""
    filler = job.run / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    yield {4}
    filler.unlink()


def make_read_only(job: Job, draw: random.Random) -> Iterator[set[int]]:
    """The run's file system has become read-only when it is started again."""
    job.process.terminate()
    yield {5}
    subprocess.run(["mount", "-o", "remount,ro", job.folder / "runs"], check=True)
    yield {4}
    subprocess.run(["mount", "-o", "remount,rw", job.folder / "runs"], check=True)


def damage(file: Path, draw: random.Random) -> None:
    """Cut a file, alter one bit of it, or take it away."""
    how = draw.choice(["cut", "alter", "remove"])
    data = bytearray(file.read_bytes())
    if how == "remove":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[: draw.randrange(len(data))])
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)


OWN_DISK: tuple[Fault, ...] = (fill_disk, make_read_only)
"""These need a file system of their own, so root."""
FAULTS: tuple[Fault, ...] = (
    kill_rank, freeze_rank, terminate_rank, kill_launcher, pause_launcher, terminate_launcher,
    kill_while_saving, damage_checkpoint, damage_all_checkpoints, change_config, break_shard,
    *OWN_DISK,
)  # fmt: skip


class Campaign:
    """A reference run, and trials beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        reference = Job(folder / "reference")
        reference.start()
        if code := reference.wait():
            raise RuntimeError(f"the undisturbed run ended with {code}:\n{reference.output()}")
        self.corpus, self.expected = reference.folder / "data", reference.result()

    def try_fault(self, fault: Fault, seed: int) -> Trial:
        """Let one fault befall a fresh run, and bring that to its end."""
        draw = random.Random(f"{fault.__name__} {seed}")
        trial = Trial(fault.__name__, draw.randrange(1, STEPS - 30))
        job = Job(self.folder / f"{seed:04d}-{fault.__name__}")
        shutil.copytree(self.corpus, job.folder / "data")
        before = _leftovers()
        with _own_disk(job) if fault in OWN_DISK else contextlib.nullcontext():
            try:
                self._run(job, fault, draw, trial)
            except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
                trial.problem = f"{error}\n{job.output()[-2000:]}"
            finally:
                for process in [*job.processes(), psutil.Process()]:
                    if process.pid != os.getpid():
                        trial.problem = trial.problem or f"orphan: {process.cmdline()}"
                        process.kill()
        if left := _leftovers() - before:
            trial.problem = trial.problem or f"left behind: {left}"
        if trial.problem is None:
            shutil.rmtree(job.folder)
        return trial

    def _run(self, job: Job, fault: Fault, draw: random.Random, trial: Trial) -> None:
        job.start()
        job.wait_for_step(trial.step)
        begun = time.monotonic()
        for allowed in fault(job, draw):
            said = len(job.output()) if trial.codes else 0
            if trial.codes:
                job.start()
            code = job.wait()
            trial.codes.append(code)
            trial.seconds = trial.seconds or time.monotonic() - begun
            assert code in allowed, f"ended with {code}, not {allowed}"
            if code:
                text = job.output()[said:]
                assert code < 0 or "error: " in text or "stopped: " in text, "ended in silence"
        if trial.codes[-1] != 0:
            job.start()
            code = job.wait()
            trial.codes.append(code)
            assert code == 0, f"started again it ended with {code}"
        assert job.result() == self.expected, "other losses or weights than undisturbed"


@contextlib.contextmanager
def _own_disk(job: Job) -> Iterator[None]:
    folder = job.folder / "runs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def _leftovers() -> set[str]:
    return {
        str(entry)
        for folder in (Path("/dev/shm"), Path(tempfile.gettempdir()))
        for entry in folder.iterdir()
        if entry.name.startswith(("shoal-", "torch", "sem.", "psm_"))
    }
