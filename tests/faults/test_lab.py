"""Jobs over two and three hosts with an sshd each: every command, and what befalls them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.faults.job import PYTHON, RUN, RUN_PY, Job
from tests.faults.judgement import check_same
from tests.faults.lab import LabHost, Unavailable, open_lab

pytestmark = pytest.mark.slow

SLURM_LAB = str(Path(__file__).with_name("slurm_lab.sh"))
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
OURS = (DEEPSPEED, RUN_PY)
"""With the hostfile behind it: DeepSpeed starts a launcher of ours."""

LEG_STEPS = 3
PACE = 0.15
"""Seconds that a step takes at least: it takes some until a signal has reached all ranks."""


@pytest.fixture(scope="module")
def lab() -> Iterator[list[LabHost]]:
    try:
        with open_lab(3) as hosts:
            yield hosts
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def swept(lab: list[LabHost]) -> Iterator[None]:
    """Whatever a test leaves is not there for the next."""
    yield
    for host in lab:
        for process in host.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        host.clear()
        host.mend()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of this machine, which makes the shards of all."""
    job = Job(tmp_path_factory.mktemp("undisturbed") / "job")
    job.start()
    assert job.wait() == 0, job.output()
    return job


@pytest.fixture(scope="module")
def relay(lab: list[LabHost], undisturbed: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """One run, which every leg goes on with."""
    folder = tmp_path_factory.mktemp("relay") / "job"
    job = Job(folder, [1, 1, 1], lab, corpus=undisturbed.folder / "data")
    job.set_plan(kind=None, pace=PACE)
    return job


def make_job(
    folder: Path, lab: Sequence[LabHost], undisturbed: Job, ranks: Sequence[int] = (1, 1)
) -> Job:
    hosts = lab[: len(ranks)]
    return Job(folder / "job", ranks, hosts, corpus=undisturbed.folder / "data")


# What a signal is sent to.


def the_launcher(job: Job) -> psutil.Process:
    return job.launcher()


def outer_deepspeed(job: Job) -> psutil.Process:
    found = [p for p in job.processes(job.home) if any(w == DEEPSPEED for w in p.cmdline())]
    return min(found, key=lambda process: process.create_time())


def its_launch_py(job: Job) -> psutil.Process:
    return job.find("deepspeed.launcher.launch", host=job.home)[0]


def theirs(port: int) -> tuple[str, ...]:
    """In the orthodox order: DeepSpeed starts the ranks."""
    return (DEEPSPEED, "--hostfile", "hosts", "--master_port", str(port), RUN_PY)


@dataclass(frozen=True)
class Leg:
    """A command, the hosts it is given, and how it is stopped."""

    program: tuple[str, ...]
    hosts: str
    words: tuple[str, ...] = ()
    whom: Callable[[Job], psutil.Process] = the_launcher
    number: signal.Signals = signal.SIGTERM
    code: int | None = 5
    """Its exit code; None: DeepSpeed's own."""


LEGS = {
    "deepspeed, two hosts, SIGINT": Leg(
        OURS, "n1 slots=1\nn2 slots=1\n", (), outer_deepspeed, signal.SIGINT, None
    ),
    "deepspeed, two ranks a host, SIGTERM to launch.py": Leg(
        OURS, "n1 slots=2\nn2 slots=2\n", (), its_launch_py, signal.SIGTERM, None
    ),
    "deepspeed, another host alone, SIGTERM": Leg(
        OURS, "n2 slots=2\n", (), outer_deepspeed, signal.SIGTERM, None
    ),
    "python, three hosts, SIGTERM": Leg(PYTHON, "n1 slots=1\nn2 slots=1\nn3 slots=1\n"),
    "pdsh, the launcher's host last, SIGKILL": Leg(
        PYTHON,
        "n3 slots=1\nn2 slots=1\nn1 slots=1\n",
        ("world.launcher=pdsh",),
        number=signal.SIGKILL,
        code=-9,
    ),
    "orthodox, two hosts, SIGTERM": Leg(
        theirs(29511), "n1 slots=1\nn2 slots=1\n", (), outer_deepspeed, signal.SIGTERM, None
    ),
    "orthodox, two ranks a host, SIGINT": Leg(
        theirs(29512), "n1 slots=2\nn2 slots=2\n", (), outer_deepspeed, signal.SIGINT, None
    ),
}


@pytest.mark.parametrize("name", LEGS)
def test_every_command_goes_on_with_the_run_and_a_stop_leaves_nothing_behind(
    name: str, relay: Job
) -> None:
    leg = LEGS[name]
    orthodox = "--master_port" in leg.program
    if "pdsh" in name or orthodox:
        needs("pdsh")
    before = last_step(relay)
    (relay.folder / "hosts").write_text(leg.hosts)
    said = len(relay.output()) if before else 0
    relay.start(*leg.words, program=leg.program, hostfile=not orthodox)
    relay.wait_until("some steps", lambda: newest_train_step(relay) >= before + LEG_STEPS)
    ranks = sum(int(line[-1]) for line in leg.hosts.splitlines())
    relay.wait_until("all ranks", lambda: relay.last_ranks() == list(range(ranks)))
    begun = time.monotonic()
    leg.whom(relay).send_signal(leg.number)
    code = relay.wait()
    ended = time.monotonic()
    assert code == leg.code if leg.code is not None else code != 0, relay.output()[said:]
    assert ended - begun < 5 * 20, "five times what is asked for"
    while (left := relay.processes()) and time.monotonic() < ended + 5 * 10:
        time.sleep(0.1)
    assert not left, [process.cmdline() for process in left]
    output = relay.output()[said:]
    assert last_step(relay) >= before + LEG_STEPS, f"saved nothing\n{output}"
    if leg.number != signal.SIGKILL and not orthodox:  # what DeepSpeed's pdsh carried is gone
        assert "stopped on request after step" in output


def test_a_run_of_many_hands_is_the_run_of_one(relay: Job, undisturbed: Job) -> None:
    (relay.folder / "hosts").write_text("n1 slots=2\nn2 slots=1\n")
    relay.set_plan(kind=None)
    relay.start()
    assert relay.wait() == 0, relay.output()
    check_same(relay, undisturbed)
    assert relay.rows() == undisturbed.rows()
    assert list((relay.run / "logs").glob("attempt-*/n2.log"))


def last_step(job: Job) -> int:
    """Return the step of the newest checkpoint."""
    return max((int(folder.name[5:]) for folder in job.checkpoints()), default=0)


def newest_train_step(job: Job) -> int:
    if not (job.run / "metrics.jsonl").is_file():
        return 0
    return max((record["step"] for record in job.records("train")), default=0)


def needs(program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"no {program}")


def test_what_is_killed_or_cut_off_ends_an_attempt_and_not_the_job(
    lab: list[LabHost], undisturbed: Job, tmp_path: Path
) -> None:
    job = make_job(tmp_path, lab, undisturbed)
    job.set_plan(kind=None, pace=PACE / 3)
    job.start("world.max_restarts=4")
    n2 = job.hosts[1]
    faults: dict[str, tuple[Callable[[], None], int]] = {
        "rank 1 was killed by SIGKILL": (lambda: job.ranks(n2)[0].kill(), 30),
        "n2: ssh ended (exit code 255)": (lambda: job.guards(n2)[0].kill(), 30),
        "n2: ssh ended (exit code -9)": (lambda: job.clients()[0].kill(), 30),
        "n2: ": (n2.cut, 90),
    }
    for number, (cause, (befall, seconds)) in enumerate(faults.items(), 1):
        job.wait_until("a few steps", lambda n=number: steps_of_attempt(job, n) >= 5)
        said, begun = len(job.output()), time.monotonic()
        befall()
        job.wait_until("another attempt", lambda n=number: steps_of_attempt(job, n + 1) > 0)
        assert time.monotonic() - begun < 5 * seconds, "five times what is asked for"
        assert cause in job.output()[said:]
        on = "n1, n2" if seconds < 90 else "n1\n"
        assert f"attempt {number + 1} of 5, on {on}" in job.output()[said:]
    assert job.wait() == 0, job.output()
    assert not job.processes(job.hosts[0])
    check_same(job, undisturbed)
    assert job.rows() == undisturbed.rows()


def steps_of_attempt(job: Job, number: int) -> int:
    """Return how many steps rank 0 has taken in one of the attempts, counted from 1."""
    files = sorted(job.folder.glob("rows/*-0.jsonl"))
    files = [file for file in files if file.stat().st_size]
    return len(files[number - 1].read_text().splitlines()) if len(files) >= number else 0


NODES = ["--nodes=2", "--ntasks-per-node=1"]


@pytest.mark.parametrize(
    "command",
    [
        (SLURM_LAB, "salloc", *NODES, sys.executable, RUN_PY, "world.launcher=slurm",
         "world.ranks=1"),
        (SLURM_LAB, "srun", *NODES, "--cpu-bind=none", sys.executable, RUN_PY),
    ],
    ids=["inside an allocation", "ranks of srun"],
)  # fmt: skip
def test_slurm_may_start_the_guards_or_the_ranks(
    command: tuple[str, ...], lab: list[LabHost], undisturbed: Job, tmp_path: Path
) -> None:
    needs("slurmctld")
    job = make_job(tmp_path, lab, undisturbed)
    job.start(program=command, hostfile=False)
    assert job.wait() == 0, job.output()
    assert [record["ranks"] for record in job.records("start")] == [2]
    check_same(job, undisturbed)


def test_a_host_that_does_not_answer_is_named(
    lab: list[LabHost], undisturbed: Job, tmp_path: Path
) -> None:
    job = make_job(tmp_path, lab, undisturbed)
    (job.folder / "hosts").write_text("n1 slots=1\nn7 slots=1\n")
    job.start()
    assert job.wait() == 4, job.output()
    assert "error: n7: " in job.output()
    assert "fix: correct it in the hostfile" in job.output()
    assert "Traceback" not in job.output()


def test_a_run_folder_that_is_not_shared_is_named(
    lab: list[LabHost], undisturbed: Job, tmp_path: Path
) -> None:
    job = make_job(tmp_path, lab, undisturbed)
    job.start("output=/run")  # a file system of each host's own
    assert job.wait() == 4, job.output()
    assert f"n2: does not share the run folder /run/{RUN['name']}" in job.output()


def test_hosts_may_have_disks_of_their_own(
    lab: list[LabHost], undisturbed: Job, tmp_path: Path
) -> None:
    """Each keeps all that is saved, so that one of them can go on alone."""
    job = make_job(tmp_path, lab, undisturbed)
    words = ("output=/run/disk", "checkpoint.copies=every")  # a file system of each host's own
    roots = [Path(f"/proc/{host.sshd.pid}/root") for host in lab[:2]]
    disks = [root / "run" / "disk" / RUN["name"] for root in roots]
    job.run = disks[0]
    job.set_plan(kind=None, pace=PACE)
    job.start(*words)
    job.wait_for_step(12)
    the_launcher(job).send_signal(signal.SIGTERM)
    assert job.wait() == 5, job.output()
    saved = [sorted(folder.name for folder in disk.glob("checkpoints/step-*")) for disk in disks]
    assert saved[0] == saved[1] and len(saved[0]) > 1
    logs = [list(disk.glob("logs/attempt-00001/rank-*.log")) for disk in disks]
    assert [[log.name for log in one] for one in logs] == [["rank-00000.log"], ["rank-00001.log"]]
    job.set_plan(kind=None)
    job.run, job.home = disks[1], lab[1]
    (job.folder / "hosts").write_text("n2 slots=1\n")
    job.start(*words)
    assert job.wait() == 0, job.output()
    assert job.rows() == undisturbed.rows()
