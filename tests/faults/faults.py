"""What may befall a job: each fault does it, and says how the command may end.

A fault is a generator. It yields the exit codes that may follow; what comes after the `yield` is
done once the command has ended, and then the same command is started again.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from shoal.launcher.guard import AGENT_SECONDS, SILENCE_SECONDS
from tests.faults.job import RUN, STEPS, Job

LEAVE_SECONDS = 10.0
"""What a job gets, after its command has ended, until nothing of it runs."""
CUT_OFF_SECONDS = SILENCE_SECONDS + RUN["world"]["save_seconds"] + AGENT_SECONDS + LEAVE_SECONDS
"""The same where a machine cannot know at once that it is alone."""


@dataclass(frozen=True)
class Ends:
    """How a command may end, and by when nothing of it may run any more."""

    codes: frozenset[int]
    leave_seconds: float = LEAVE_SECONDS


def ends(*codes: int, leave_seconds: float = LEAVE_SECONDS) -> Ends:
    """Return what a fault yields."""
    return Ends(frozenset(codes), leave_seconds)


Act = Callable[[Job, random.Random], Iterator[Ends]]


@dataclass(frozen=True)
class Fault:
    """One kind of fault, and what it needs."""

    act: Act
    places: tuple[str, ...] = ("machine", "hosts")
    own_disk: bool = False
    """Needs a file system of its own, so root."""
    plan: Callable[[random.Random, int], dict[str, Any]] | None = None
    """Of (draw, ranks): what is done inside a rank, see `injected`; otherwise it comes from
    outside, at a random step."""
    launcher_aside: bool = False
    """Whether the launcher is to run on another host than the first of the hostfile."""
    skips: bool = False
    """Whether the planned step is to be left out."""
    needs: dict[str, Any] = field(default_factory=dict)
    """`section.key` -> value of the run's config."""

    @property
    def name(self) -> str:
        """What a report calls it."""
        return self.act.__name__.replace("_", " ")


# Ranks, guards, launcher.


def kill_rank(job: Job, draw: random.Random) -> Iterator[Ends]:
    draw.choice(job.ranks()).kill()
    yield ends(0)


def freeze_rank(job: Job, draw: random.Random) -> Iterator[Ends]:
    draw.choice(job.ranks()).suspend()
    yield ends(0)


def terminate_rank(job: Job, draw: random.Random) -> Iterator[Ends]:
    draw.choice(job.ranks()).terminate()
    yield ends(5)


def kill_guard(job: Job, draw: random.Random) -> Iterator[Ends]:
    draw.choice(job.guards()).kill()
    yield ends(0)


def freeze_guard(job: Job, draw: random.Random) -> Iterator[Ends]:
    draw.choice(job.guards()).suspend()
    yield ends(0)


def terminate_guard(job: Job, draw: random.Random) -> Iterator[Ends]:
    draw.choice(job.guards()).terminate()
    yield ends(5)


def end_ssh_client(job: Job, draw: random.Random) -> Iterator[Ends]:
    draw.choice(job.clients()).send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
    yield ends(0)


def kill_launcher(job: Job, draw: random.Random) -> Iterator[Ends]:
    job.launcher().kill()
    yield ends(-signal.SIGKILL, leave_seconds=CUT_OFF_SECONDS)


def pause_launcher(job: Job, draw: random.Random) -> Iterator[Ends]:
    """SIGSTOP; it goes on soon, or when its guards must think it dead."""
    seconds = [draw.uniform(0.1, 3.0)]
    if len(job.hosts) > 1:
        seconds.append(SILENCE_SECONDS + draw.uniform(-5.0, 10.0))
    launcher = job.launcher()
    launcher.suspend()
    time.sleep(draw.choice(seconds))
    for process in (launcher, psutil.Process(job.process.pid)):  # what entered has stopped with it
        process.resume()
    yield ends(0)


def terminate_launcher(job: Job, draw: random.Random) -> Iterator[Ends]:
    job.launcher().send_signal(draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
    yield ends(5)


def kill_while_saving(job: Job, draw: random.Random) -> Iterator[Ends]:
    """SIGKILL of all ranks, of a guard or of the launcher, while a checkpoint is being written."""
    partial = "checkpoints/.partial-*"
    job.wait_until("a save", lambda: any(job.run.glob(partial)))
    time.sleep(draw.uniform(0.0, 0.03))
    victims = [job.ranks(), [job.launcher()], *([job.guards()[-1:]] if job.guards() else [])]
    chosen = draw.randrange(len(victims))
    for process in victims[chosen]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if chosen == 1:
        yield ends(-signal.SIGKILL, leave_seconds=CUT_OFF_SECONDS)
    else:
        yield ends(0)


# Hosts and links.


def lose_host(job: Job, draw: random.Random) -> Iterator[Ends]:
    """All its processes are gone and so is its network; with the launcher's host, the launcher."""
    yield from _lose(job, draw.choice(job.hosts))


def lose_rendezvous_host(job: Job, draw: random.Random) -> Iterator[Ends]:
    """The first host of the hostfile, where the ranks meet; the launcher runs on another."""
    yield from _lose(job, job.hosts[0])


def _lose(job: Job, host: Any) -> Iterator[Ends]:
    host.lose()
    job.lost.add(host.name)
    if host is job.home:
        yield ends(-signal.SIGKILL, leave_seconds=CUT_OFF_SECONDS)
    else:
        yield ends(0)
    host.clear()
    host.mend()
    job.lost.discard(host.name)


def cut_link(job: Job, draw: random.Random) -> Iterator[Ends]:
    """For as long as the job runs."""
    host = draw.choice(job.hosts)
    host.cut()
    yield ends(0, leave_seconds=CUT_OFF_SECONDS)
    host.mend()


def cut_link_for_a_while(job: Job, draw: random.Random) -> Iterator[Ends]:
    """Until it is hardly noticed, or until the job has gone on without the host, or in between."""
    host = draw.choice(job.hosts)
    host.cut()
    time.sleep(draw.choice([draw.uniform(0.2, 4.0), draw.uniform(5.0, 50.0)]))
    host.mend()
    yield ends(0, leave_seconds=CUT_OFF_SECONDS)


# Files.


def damage_checkpoint(job: Job, draw: random.Random) -> Iterator[Ends]:
    """The newest checkpoint of a stopped run is cut, altered or loses a file."""
    job.launcher().terminate()
    yield ends(5)
    damage(draw.choice(sorted(job.checkpoints()[-1].iterdir())), draw)


def damage_all_checkpoints(job: Job, draw: random.Random) -> Iterator[Ends]:
    """All checkpoints of a stopped run are broken: it is refused, and goes on once one is back."""
    job.launcher().terminate()
    yield ends(5)
    kept = job.folder / "kept"
    shutil.copytree(job.run / "checkpoints", kept)
    for folder in job.checkpoints():
        damage(draw.choice(sorted(folder.iterdir())), draw)
    yield ends(3)
    shutil.rmtree(job.run / "checkpoints")
    kept.rename(job.run / "checkpoints")


def change_config(job: Job, draw: random.Random) -> Iterator[Ends]:
    """The run is started again with another rate: refused, and nothing of it is touched."""
    job.launcher().terminate()
    yield ends(5)
    text = (job.folder / "run.yaml").read_text()
    (job.folder / "run.yaml").write_text(text.replace("lr: 0.002", "lr: 0.003"))
    yield ends(2)
    (job.folder / "run.yaml").write_text(text)


def break_shard(job: Job, draw: random.Random) -> Iterator[Ends]:
    """A shard of a stopped run is cut or altered: refused by name, and goes on once it is back."""
    job.launcher().terminate()
    yield ends(5)
    shared = job.folder / "data"
    own = shutil.copytree(shared.resolve(), job.folder / "own")
    shared.unlink()
    own.rename(shared)
    shard = draw.choice(sorted((shared / "small/train").glob("shard.*")))
    kept = shard.read_bytes()
    damage(shard, draw)
    yield ends(3)
    shard.write_bytes(kept)


def fill_disk(job: Job, draw: random.Random) -> Iterator[Ends]:
    """The disk is full when a checkpoint is to be written."""
    filler = job.run / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    yield ends(4)
    filler.unlink()


def make_read_only(job: Job, draw: random.Random) -> Iterator[Ends]:
    """The run's file system has become read-only when it is started again."""
    job.launcher().terminate()
    yield ends(5)
    subprocess.run(["mount", "-o", "remount,ro", job.folder / "runs"], check=True)
    yield ends(4)
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


# Inside a rank, by `injected`.


def spoil_gradient(job: Job, draw: random.Random) -> Iterator[Ends]:
    """The gradient of one rank is no number in one step, which all leave out."""
    yield ends(0)


def plan_gradient(draw: random.Random, ranks: int) -> dict[str, Any]:
    step = draw.choice([11, 34, 57])
    return {"kind": "nan", "rank": draw.randrange(ranks), "step": step,
            "parameter": draw.randrange(1000)}  # fmt: skip


def flip_weight(job: Job, draw: random.Random) -> Iterator[Ends]:
    """One bit of one rank's copy of the weights; at stage 0, where every rank has one to keep."""
    yield ends(0)


def plan_flip(draw: random.Random, ranks: int) -> dict[str, Any]:
    return {"kind": "flip", "rank": draw.randrange(ranks), "step": draw.randrange(1, STEPS - 30),
            "parameter": draw.randrange(1000), "element": draw.randrange(1 << 20),
            "bit": draw.randrange(32)}  # fmt: skip


def alter_config_of_a_rank(job: Job, draw: random.Random) -> Iterator[Ends]:
    """One rank has another learning rate than the others: refused before it trains."""
    yield ends(2)


def plan_config(draw: random.Random, ranks: int) -> dict[str, Any]:
    return {"kind": "config", "rank": draw.randrange(ranks)}


def take_port(job: Job, draw: random.Random) -> Iterator[Ends]:
    """Somebody takes the port where the hosts are to meet, just before they do."""
    yield ends(0)


def plan_port(draw: random.Random, ranks: int) -> dict[str, Any]:
    return {"kind": "port"}


ONE, MANY = ("machine",), ("hosts",)
STAGE_0 = {"train.zero_stage": 0}
FAULTS = {
    fault.name: fault
    for fault in (
        Fault(kill_rank),
        Fault(freeze_rank),
        Fault(terminate_rank),
        Fault(kill_guard, MANY),
        Fault(freeze_guard, MANY),
        Fault(terminate_guard, MANY),
        Fault(end_ssh_client, MANY),
        Fault(kill_launcher),
        Fault(pause_launcher),
        Fault(terminate_launcher),
        Fault(kill_while_saving),
        Fault(lose_host, MANY),
        Fault(lose_rendezvous_host, MANY, launcher_aside=True),
        Fault(cut_link, MANY),
        Fault(cut_link_for_a_while, MANY),
        Fault(damage_checkpoint, ONE),
        Fault(damage_all_checkpoints, ONE),
        Fault(change_config, ONE),
        Fault(break_shard, ONE),
        Fault(fill_disk, ONE, own_disk=True),
        Fault(make_read_only, ONE, own_disk=True),
        Fault(spoil_gradient, plan=plan_gradient, skips=True),
        Fault(flip_weight, plan=plan_flip, needs=STAGE_0),
        Fault(alter_config_of_a_rank, plan=plan_config),
        Fault(take_port, MANY, plan=plan_port),
    )
}
