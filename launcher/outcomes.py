"""How a rank tells the process that started it that it lives, and how it ended.

Every rank writes `rank-N.pid` when it starts and `rank-N.json` when it ends, into the folder that
`SHOAL_OUTCOMES` names. A rank that is gone without the second file was killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from shoal.configs import errors
from shoal.configs.errors import (
    ConfigError,
    HangError,
    ShoalError,
    StoppedOnRequest,
    explain_machine_error,
)
from shoal.trainer.storage import write_text

FOLDER_VARIABLE = "SHOAL_OUTCOMES"
FOLDER_PREFIX = "shoal-"
ALIVE = "alive.lock"
PARENT_VARIABLE = "SHOAL_LAUNCHER"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """The end of one rank: `done`, the name of a `ShoalError`, or of another exception."""

    kind: str
    rank: int
    host: str
    ended: float
    exit_code: int = 0
    cause: str = ""
    where: str | None = None
    fix: str | None = None
    trace: str | None = None
    progress: int = 0
    """Of a rank that hung: how often it had got further."""
    origin: str | None = None
    """Rank and host that it befell, where this one only heard of it."""

    @property
    def is_failure(self) -> bool:
        """Whether the rank neither finished nor stopped because it was asked to."""
        return self.kind not in ("done", StoppedOnRequest.__name__)

    def to_error(self) -> ShoalError:
        """Return the error the rank raised: same class, same text, a note on where it happened."""
        kind = getattr(errors, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, ShoalError)):
            kind = ShoalError
        error = kind(self.cause, where=self.where, fix=self.fix)
        if self.trace:
            error.add_note(self.trace.rstrip())
        if self.is_failure:
            error.add_note(f"failed first: {self.origin or f'rank {self.rank} on {self.host}'}")
        return error


def describe(error: BaseException, rank: int) -> Outcome:
    """Return the outcome of a rank that ends with `error`; bugs keep their traceback."""
    error = explain_machine_error(error) or error
    kind, host, ended = type(error).__name__, socket.gethostname(), time.time()
    if isinstance(error, ShoalError):
        facts = (error.exit_code, error.cause, error.where, error.fix)
        return Outcome(kind, rank, host, ended, *facts, origin=error.origin)
    trace = "".join(traceback.format_exception(error))
    return Outcome(kind, rank, host, ended, 1, f"{kind}: {error}", trace=trace)


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it is gone, however it went."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.get(PARENT_VARIABLE)
    if parent and int(parent) != os.getppid():  # it was gone before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def report_outcome(work: Callable[[], None]) -> int:
    """Do a rank's `work`, leave word of how it ended, and return the exit code.

    Raises:
        ConfigError: this process was not started by the launcher.
    """
    if FOLDER_VARIABLE not in os.environ or "RANK" not in os.environ:
        raise ConfigError(
            "ranks are started by the launcher only",
            where="--worker",
            fix="run the same without --worker: python launcher/run.py [--hostfile FILE] "
            "[CONFIG] [key=value ...]",
        )
    folder, rank = Path(os.environ[FOLDER_VARIABLE]), int(os.environ["RANK"])
    write_text(folder / f"rank-{rank}.pid", str(os.getpid()))
    try:
        work()
        outcome = Outcome("done", rank, socket.gethostname(), time.time())
    except (Exception, KeyboardInterrupt) as error:
        outcome = describe(error, rank)
    _write_outcome(folder, outcome)
    return outcome.exit_code


def report_hang(error: HangError, progress: int) -> None:
    """Leave word that this rank hangs, and how far it was."""
    rank = int(os.environ["RANK"])
    outcome = replace(describe(error, rank), progress=progress)
    _write_outcome(Path(os.environ[FOLDER_VARIABLE]), outcome)


def report_mark(state: str) -> None:
    """Leave word that this rank is `meeting` the others, or has `met` them."""
    write_text(Path(os.environ[FOLDER_VARIABLE]) / f"rank-{os.environ['RANK']}.{state}", "")


def count_marks(folder: Path) -> tuple[int, int]:
    """Return how many ranks have looked for the others, and how many have found them."""
    return len(list(folder.glob("rank-*.meeting"))), len(list(folder.glob("rank-*.met")))


def _write_outcome(folder: Path, outcome: Outcome) -> None:
    write_text(folder / f"rank-{outcome.rank}.json", json.dumps(asdict(outcome)))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a folder for a while; those that launchers left when they were killed are removed."""
    for leftover in find_leftovers():
        shutil.rmtree(leftover, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, ignore_cleanup_errors=True) as name,
        (Path(name) / "new").open("w") as file,
    ):
        fcntl.flock(file, fcntl.LOCK_EX)
        (Path(name) / "new").rename(Path(name) / ALIVE)  # it never is there without its lock
        yield Path(name)


def find_leftovers() -> list[Path]:
    """Return such folders of ours whose owner is gone.

    Told by a lock and not by a process id: in a container that shares the folder, ids differ.
    """
    found = []
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*/{ALIVE}"):
        with suppress(OSError), path.open() as file:  # locked, another user's, or on its way out
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(path.parent)
    return sorted(found)


def read_pids(folder: Path) -> dict[int, int]:
    """Return rank -> process id of every rank that has started."""
    return {_rank_of(file): int(file.read_text()) for file in sorted(folder.glob("rank-*.pid"))}


def read_outcomes(folder: Path) -> dict[int, Outcome]:
    """Return rank -> outcome of every rank that has ended by itself."""
    return {
        _rank_of(file): Outcome(**json.loads(file.read_text()))
        for file in sorted(folder.glob("rank-*.json"))
    }


def _rank_of(file: Path) -> int:
    return int(file.stem.removeprefix("rank-"))
