"""Start the ranks of one machine, watch them, and end as they end.

torchrun's agent (`torch.distributed.launcher.api`) starts the ranks, once: it never restarts them.
What is ours is the end: signals reach the ranks and give them the time to save, a failed rank ends
the others within seconds, nothing outlives this process, and the first failure is raised here as
the same error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shoal.configs.errors import HangError, PreflightError
from shoal.launcher.endings import Ending, raise_failure
from shoal.launcher.outcomes import (
    FOLDER_VARIABLE,
    PARENT_VARIABLE,
    count_marks,
    read_outcomes,
    read_pids,
    scratch_folder,
)
from shoal.launcher.output import ERR, OUT, RankOutput, next_log_folder
from shoal.launcher.runs import run_folder
from shoal.launcher.world import (
    RANK_VARIABLES,
    caught_signals,
    check_devices,
    resolve_ranks,
    resolve_threads,
    seconds_to_train,
)

if TYPE_CHECKING:
    from shoal.configs.schema import RunConfig

# -P: the current folder stays off the import path; a checkout holds folders named eval, trainer...
WORKER = (sys.executable, "-P", "-m", "shoal.launcher.run", "--worker")
LOOPBACK = "127.0.0.1"
WATCH_SECONDS = 0.1
FAILURE_GRACE_SECONDS = 3.0
HANG_GRACE_SECONDS = 8.0
"""Until the watchdogs of the other ranks have spoken, too: who says nothing then is named."""
Advice = Literal["go", "stop", "kill"]
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where the ranks of one machine stand in their job; by default they are all of it."""

    first_rank: int = 0
    host: int = 0
    num_hosts: int = 1
    endpoint: str = f"{LOOPBACK}:0"
    """Where the job's machines meet; port 0: any free one."""
    interface: str = "lo"
    """Network interface that leads to the other machines."""
    name: str = ""
    """Of this machine, as the hostfile gives it."""


ALONE = Place()


def launch_ranks(
    num_ranks: int,
    argv: Sequence[str],
    *,
    threads: Literal["auto"] | int = "auto",
    timeout: float = 600,
    command: Sequence[str] = WORKER,
    environment: Mapping[str, str] = {},
    gone: Callable[[], bool] = lambda: False,
    caught: list[int] | None = None,
    logs: Path | None = None,
) -> None:
    """Run `command` + `argv` as `num_ranks` ranks on this machine; return when all are done.

    Signals that ask for a stop are passed on, and the ranks take the time they need to save; a
    second SIGINT kills them. `timeout` is how many seconds the ranks may take to start. When
    `gone` says that nobody is left who wants this, the ranks are asked to stop. A caller that
    catches signals itself hands over its list of those. What the ranks print is shown, and kept in
    `logs`.

    Raises:
        StoppedOnRequest: a signal arrived and the ranks saved a checkpoint.
        ShoalError: the first failure of a rank, as the rank raised it; a note names rank and host.
    """
    with contextlib.nullcontext(caught) if caught is not None else caught_signals() as signals:
        ending = run_ranks(
            num_ranks,
            argv,
            threads=threads,
            timeout=timeout,
            command=command,
            environment=environment,
            advise=lambda: "stop" if gone() else "go",
            caught=signals,
            logs=logs,
        )
    raise_failure(ending)


def run_ranks(
    num_ranks: int,
    argv: Sequence[str],
    *,
    place: Place = ALONE,
    threads: Literal["auto"] | int = "auto",
    timeout: float = 600,
    command: Sequence[str] = WORKER,
    environment: Mapping[str, str] = {},
    advise: Callable[[], Advice] = lambda: "go",
    caught: Sequence[int] = (),
    tell_marks: Callable[[int, int], None] = lambda meeting, met: None,
    logs: Path | None = None,
) -> Ending:
    """Run this machine's ranks of a job and return how they ended.

    Args:
        num_ranks: Ranks on this machine.
        argv: What `command` is given.
        place: Where they stand among the machines of the job.
        threads: CPU threads of a rank.
        timeout: Seconds the ranks may take to start.
        command: Program of a rank.
        environment: Further variables of the ranks.
        advise: Asked several times a second whether to go on, to stop (the ranks save), or to kill.
        caught: Grows with every signal that asks for a stop, see `caught_signals`.
        tell_marks: Told how many ranks look for the others, and have found them, as that changes.
        logs: Folder that keeps what they print.
    """
    with scratch_folder() as outcomes, changed_environment(environment):
        device = check_devices(num_ranks)
        added = {
            FOLDER_VARIABLE: str(outcomes),
            PARENT_VARIABLE: str(os.getpid()),
            "OMP_NUM_THREADS": str(resolve_threads(threads, num_ranks)),
            "GLOO_SOCKET_IFNAME": place.interface,
            "NODE_RANK": str(place.host),
            "PYTHONUNBUFFERED": "1",  # a rank that is killed has said what it had to say
        }
        if place.num_hosts > 1:  # where the user has not chosen
            for name in INTERFACE_VARIABLES:
                added[name] = os.environ.get(name) or place.interface
        if device == "cpu":
            added["DS_ACCELERATOR"] = "cpu"
        watcher = _Watcher(outcomes, advise, caught, tell_marks)
        ranks = list(range(place.first_rank, place.first_rank + num_ranks))
        output = RankOutput(outcomes, ranks, partial(_name_rank, place, num_ranks), logs)
        with changed_environment(added, RANK_VARIABLES), output, watcher:
            exit_codes = _run_agent(place, [*command, *argv], outcomes, timeout, output)
        return Ending(
            ranks,
            read_outcomes(outcomes),
            exit_codes,
            watcher.ended_by_us,
            watcher.asked_by,
        )


def train_configs(configs: Sequence[RunConfig]) -> None:
    """Train runs one after another in one start of the ranks; the first says how many.

    Raises:
        ShoalError: as `launch_ranks`.
    """
    from shoal.configs.load import dump_config

    world = configs[0].world
    stop_at = time.monotonic() + seconds_to_train(world)
    with scratch_folder() as folder:
        files = [folder / f"{index:03d}-{c.name}.yaml" for index, c in enumerate(configs)]
        for file, config in zip(files, configs, strict=True):
            file.write_text(dump_config(config), encoding="utf-8")
        launch_ranks(
            resolve_ranks(world.ranks),
            [str(file) for file in files],
            threads=world.threads,
            timeout=world.timeout_seconds,
            gone=lambda: time.monotonic() > stop_at,
            logs=next_log_folder(run_folder(configs[0])),
        )


def _name_rank(place: Place, num_ranks: int, rank: int) -> str:
    """Return what stands before the lines of a rank; nothing where it is the only one."""
    host = f"{place.name} " if place.name else ""
    return f"[{host}rank {rank}] " if num_ranks > 1 or place.num_hosts > 1 else ""


def _run_agent(
    place: Place, command: Sequence[str], folder: Path, timeout: float, output: RankOutput
) -> dict[int, int]:
    """Let torchrun's agent run the ranks; return the exit codes of those that failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    class Pipes(DefaultLogsSpecs):
        """Every rank prints where `output` says."""

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            return replace(
                super().reify(envs), stdouts=output.paths[OUT], stderrs=output.paths[ERR]
            )

    # The agent's own reports repeat, less clearly, what `endings.raise_failure` says.
    _quieten("torch.distributed.elastic", "torch.distributed.launcher")
    alone = place.num_hosts == 1
    config = LaunchConfig(
        min_nodes=place.num_hosts,
        max_nodes=place.num_hosts,
        nproc_per_node=len(output.paths[OUT]),
        # Common to all machines of an attempt, and of this attempt alone: its port is new.
        run_id=uuid.uuid4().hex if alone else place.endpoint,
        # Among several machines the first one in the hostfile holds rank 0, and so on.
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint=place.endpoint,
        rdzv_configs={"timeout": int(timeout)} | ({} if alone else {"rank": place.host}),
        max_restarts=0,
        local_addr=LOOPBACK if alone else None,
        logs_specs=Pipes(log_dir=str(folder / "agent")),
        # The agent's handlers would cut a save off after 30 s; ours (_Watcher) take its signals.
        signals_to_handle="",
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


def _quieten(*names: str) -> None:
    for name in logging.root.manager.loggerDict:
        if name.startswith(names):
            logging.getLogger(name).setLevel(logging.CRITICAL)


class _Watcher:
    """A thread that passes signals on to the ranks and ends them all when one has failed."""

    def __init__(
        self,
        folder: Path,
        advise: Callable[[], Advice],
        caught: Sequence[int],
        tell_marks: Callable[[int, int], None],
    ) -> None:
        self.ended_by_us: set[int] = set()
        self._folder, self._advise, self._caught = folder, advise, caught
        self._tell_marks, self._marks = tell_marks, (0, 0)
        self._stopped = False
        self._told: set[int] = set()
        self._ranks: dict[int, int] = {}  # rank -> pidfd: a process id alone may be reused
        self._gone: set[int] = set()
        self._failed_at: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for descriptor in self._ranks.values():
            os.close(descriptor)

    @property
    def asked_by(self) -> int | None:
        """What asked the ranks to stop, if anything did."""
        return self._caught[0] if self._caught else signal.SIGTERM if self._stopped else None

    def _watch(self) -> None:
        try:
            self._look_after()
        except BaseException:  # nobody would look after the ranks any more
            self._kill()
            raise

    def _look_after(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            advice = self._advise()
            self._stopped = self._stopped or advice == "stop"
            for rank, pid in read_pids(self._folder).items():
                if rank not in self._ranks and rank not in self._gone:
                    if (descriptor := open_process(pid)) is None:
                        self._gone.add(rank)
                    else:
                        self._ranks[rank] = descriptor
            if (marks := count_marks(self._folder)) != self._marks:
                self._marks = marks
                self._tell_marks(*marks)
            if self.asked_by:
                self._send(signal.SIGTERM, self._ranks.keys() - self._told)
                self._told |= self._ranks.keys()
            impatient = self._caught.count(signal.SIGINT) > 1
            if advice == "kill" or impatient or self._failed_long_ago():
                self._kill()

    def _failed_long_ago(self) -> bool:
        """Whether some rank failed, and the others had time to notice by themselves."""
        self._gone |= {rank for rank, fd in self._ranks.items() if any_gone([fd])}
        outcomes = read_outcomes(self._folder)  # after that: a rank leaves word before it goes
        failed = bool(self._gone - outcomes.keys()) or any(
            outcome.is_failure for outcome in outcomes.values()
        )
        if failed and self._failed_at is None:
            self._failed_at = time.monotonic()
        hung = any(outcome.kind == HangError.__name__ for outcome in outcomes.values())
        grace = HANG_GRACE_SECONDS if hung else FAILURE_GRACE_SECONDS
        return failed and time.monotonic() - (self._failed_at or 0) > grace

    def _kill(self) -> None:
        alive = {rank for rank, fd in self._ranks.items() if not any_gone([fd])}
        self.ended_by_us |= alive - read_outcomes(self._folder).keys()
        self._send(signal.SIGKILL, alive)

    def _send(self, number: signal.Signals, ranks: set[int]) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._ranks[rank], number)


def open_process(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process is gone; None if it is."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        raise PreflightError(
            f"this kernel cannot watch processes ({error})", fix="Linux 5.3 or newer is needed"
        ) from None


def any_gone(descriptors: Sequence[int]) -> bool:
    """Return whether one of the processes that `open_process` opened has ended."""
    return bool(select.select(descriptors, [], [], 0)[0])


@contextlib.contextmanager
def changed_environment(added: Mapping[str, str], removed: Sequence[str] = ()) -> Iterator[None]:
    """Change our environment for a while.

    Before ranks are started that is: what another launcher said about ranks goes, what ours need
    comes.
    """
    before = dict(os.environ)
    for name in removed:
        os.environ.pop(name, None)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
