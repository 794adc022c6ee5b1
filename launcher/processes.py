"""Start the ranks of one job on this machine, watch them, and end as they end.

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
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from shoal.configs.errors import PreflightError, ShoalError, StoppedOnRequest
from shoal.launcher.outcomes import (
    FOLDER_VARIABLE,
    PARENT_VARIABLE,
    read_outcomes,
    read_pids,
)
from shoal.launcher.world import (
    RANK_VARIABLES,
    STOP_SIGNALS,
    check_devices,
    resolve_ranks,
    resolve_threads,
)

if TYPE_CHECKING:
    from shoal.configs.schema import RunConfig

# -P: the current folder stays off the import path; a checkout holds folders named eval, trainer...
WORKER = (sys.executable, "-P", "-m", "shoal.launcher.run", "--worker")
LOOPBACK = "127.0.0.1"
WATCH_SECONDS = 0.1
FAILURE_GRACE_SECONDS = 3.0

logger = logging.getLogger(__name__)


class Interrupted(ShoalError):
    """A signal ended the job before there was anything to save; exits with 128 + signal."""


def launch_ranks(
    num_ranks: int,
    argv: Sequence[str],
    *,
    threads: Literal["auto"] | int = "auto",
    timeout: float = 600,
    command: Sequence[str] = WORKER,
    watch: Sequence[int] = (),
) -> None:
    """Run `command` + `argv` as `num_ranks` ranks on this machine; return when all are done.

    SIGTERM, SIGINT and SIGHUP are passed on, and the ranks take the time they need to save; a
    second SIGINT kills them. `timeout` is how many seconds the ranks may take to start. When one of
    the processes in `watch` is gone, the ranks are asked to stop.

    Raises:
        StoppedOnRequest: a signal arrived and the ranks saved a checkpoint.
        ShoalError: the first failure of a rank, as the rank raised it; a note names rank and host.
    """
    device = check_devices(num_ranks)
    with tempfile.TemporaryDirectory(prefix="shoal-", ignore_cleanup_errors=True) as folder:
        outcomes = Path(folder)
        added = {
            FOLDER_VARIABLE: folder,
            PARENT_VARIABLE: str(os.getpid()),
            "OMP_NUM_THREADS": str(resolve_threads(threads, num_ranks)),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        if device == "cpu":
            added["DS_ACCELERATOR"] = "cpu"
        watcher = _Watcher(outcomes, watch)
        with _environment(added), watcher:
            exit_codes = _run_agent(num_ranks, [*command, *argv], outcomes, timeout)
        _raise_failure(outcomes, num_ranks, exit_codes, watcher)


def train_configs(configs: Sequence[RunConfig]) -> None:
    """Train runs one after another in one start of the ranks; the first says how many.

    Raises:
        ShoalError: as `launch_ranks`.
    """
    from shoal.configs.load import dump_config

    world = configs[0].world
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        files = [Path(folder) / f"{index:03d}-{c.name}.yaml" for index, c in enumerate(configs)]
        for file, config in zip(files, configs, strict=True):
            file.write_text(dump_config(config), encoding="utf-8")
        launch_ranks(
            resolve_ranks(world.ranks),
            [str(file) for file in files],
            threads=world.threads,
            timeout=world.timeout_seconds,
        )


def _run_agent(
    num_ranks: int, command: Sequence[str], folder: Path, timeout: float
) -> dict[int, int]:
    """Let torchrun's agent run the ranks; return the exit codes of those that failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent's own reports repeat, less clearly, what _raise_failure says.
    _quieten("torch.distributed.elastic", "torch.distributed.launcher")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0",
        rdzv_configs={"timeout": int(timeout)},
        max_restarts=0,
        local_addr=LOOPBACK,
        # No redirection: the progress bar of rank 0 must see the terminal.
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "agent")),
        # The agent's handlers would cut a save off after 30 s; ours (_Watcher) take its signals.
        signals_to_handle="SIGUSR2",
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


def _raise_failure(
    folder: Path, num_ranks: int, exit_codes: Mapping[int, int], watcher: _Watcher
) -> None:
    """Raise what the job ended with; nothing if every rank finished its work.

    A rank that was killed comes before any error of another rank: those lost their peer. Among
    errors the earliest counts, for the same reason.
    """
    outcomes = read_outcomes(folder)
    failures = sorted((o for o in outcomes.values() if o.is_failure), key=lambda o: o.ended)
    silent = [rank for rank in range(num_ranks) if rank not in outcomes]
    stops = [o for o in outcomes.values() if o.kind == StoppedOnRequest.__name__]
    if watcher.signal and (silent or failures) and not stops:
        raise _interrupted(watcher.signal)
    silent = [rank for rank in silent if rank not in watcher.ended_by_us] or silent
    for rank in silent:
        code = exit_codes.get(rank, 0)
        if code < 0 and code != -signal.SIGTERM and rank not in watcher.ended_by_us:
            raise _explain_silence(rank, code)
    if failures or stops:
        raise (failures or stops)[0].to_error()
    if silent:  # the agent itself ends the peers of a failed rank, with SIGTERM
        first = min(silent, key=lambda rank: exit_codes.get(rank, 0) in (0, -signal.SIGTERM))
        raise _explain_silence(first, exit_codes.get(first))
    if watcher.signal:  # the caller may have more to do, and was asked not to
        raise StoppedOnRequest("stopped on request; what was running is finished and saved")


def _interrupted(number: int) -> Interrupted:
    error = Interrupted(
        f"stopped by {signal.Signals(number).name} before a checkpoint could be saved",
        fix="run the same command again: it goes on from the newest checkpoint there is",
    )
    error.exit_code = 128 + number
    return error


def _explain_silence(rank: int, code: int | None) -> ShoalError:
    """Return the error for a rank that ended without a word."""
    fix = "the lines above, if any, are the rank's own last words"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            fix = (
                "most likely memory ran out (`dmesg` tells): train.activation_checkpointing=true, "
                "or a lower train.micro_batch_rows (under another name= for a mixture of experts "
                "or with dropout, where the result depends on it)"
            )
    else:
        how = f"ended without a word (exit code {code})"
    error = ShoalError(f"rank {rank} {how}", fix=fix)
    error.add_note(f"failed first: rank {rank} on {socket.gethostname()}")
    return error


class _Watcher:
    """A thread that passes signals on to the ranks and ends them all when one has failed."""

    def __init__(self, folder: Path, watch: Sequence[int]) -> None:
        self.signal: int | None = None
        self.ended_by_us: set[int] = set()
        self._folder = folder
        self._interrupts = 0
        self._told: set[int] = set()
        self._ranks: dict[int, int] = {}  # rank -> pidfd: a process id alone may be reused
        self._gone: set[int] = set()
        self._failed_at: float | None = None
        self._ancestors = [fd for pid in watch if (fd := _open_process(pid)) is not None]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Watcher:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._previous[number] = signal.signal(number, self._remember)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        for descriptor in (*self._ranks.values(), *self._ancestors):
            os.close(descriptor)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self._interrupts += number == signal.SIGINT
        if not read_pids(self._folder) and self._interrupts > 1:
            raise _interrupted(number)

    def _watch(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            if self._ancestors and _any_gone(self._ancestors):
                self.signal = self.signal or signal.SIGTERM
            for rank, pid in read_pids(self._folder).items():
                if rank not in self._ranks and rank not in self._gone:
                    if (descriptor := _open_process(pid)) is None:
                        self._gone.add(rank)
                    else:
                        self._ranks[rank] = descriptor
            if self.signal:
                self._send(signal.SIGTERM, self._ranks.keys() - self._told)
                self._told |= self._ranks.keys()
            if self._interrupts > 1 or self._failed_long_ago():
                self._kill()

    def _failed_long_ago(self) -> bool:
        """Whether some rank failed, and the others had time to notice by themselves."""
        self._gone |= {rank for rank, fd in self._ranks.items() if _any_gone([fd])}
        outcomes = read_outcomes(self._folder)  # after that: a rank leaves word before it goes
        failed = bool(self._gone - outcomes.keys()) or any(
            outcome.is_failure for outcome in outcomes.values()
        )
        if failed and self._failed_at is None:
            self._failed_at = time.monotonic()
        return failed and time.monotonic() - (self._failed_at or 0) > FAILURE_GRACE_SECONDS

    def _kill(self) -> None:
        alive = {rank for rank, fd in self._ranks.items() if not _any_gone([fd])}
        self.ended_by_us |= alive - read_outcomes(self._folder).keys()
        self._send(signal.SIGKILL, alive)

    def _send(self, number: signal.Signals, ranks: set[int]) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._ranks[rank], number)


def _open_process(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process is gone; None if it is."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        raise PreflightError(
            f"this kernel cannot watch processes ({error})", fix="Linux 5.3 or newer is needed"
        ) from None


def _any_gone(descriptors: Sequence[int]) -> bool:
    return bool(select.select(descriptors, [], [], 0)[0])


@contextlib.contextmanager
def _environment(added: Mapping[str, str]) -> Iterator[None]:
    """Replace what another launcher said about ranks by what the ranks started here need."""
    before = dict(os.environ)
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
