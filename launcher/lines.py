"""Lines to the guards of machines: pipes to one beside us, ssh to one elsewhere (or `calls`).

A line takes our words, gives theirs on the descriptor `control`, and ends when they are gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Protocol

from shoal.configs.errors import PreflightError
from shoal.launcher.calls import CallLine, Switchboard, address_towards
from shoal.launcher.commands import DEAF, Way, call_commands, guard_command, ssh_command
from shoal.trainer.ledger import now

SSH_FAILED = 255
LAST_LINES = 20
KEY_FILE = ".call-key"
COPY_SECONDS = 3.0
PROGRAMS: dict[Way, str] = {"pdsh": "pdsh", "slurm": "srun"}


class Line(Protocol):
    """What a guard is spoken to through."""

    control: int

    def send(self, line: bytes) -> None:
        """Send one line; a guard that is gone does not hear it."""

    def hang_up(self) -> None:
        """Say no more; a guard that still runs stops by itself."""

    def close(self, deadline: float) -> None:
        """Wait until the guard is gone; at the deadline end what leads to it."""

    def describe_end(self) -> str:
        """Return how it ended, with the last that was printed there."""

    @property
    def is_cut(self) -> bool:
        """Whether, once closed, the way to the guard is gone and perhaps not the guard itself."""


class ProcessLine:
    """A guard beside us, or the ssh that leads to one, as a process of ours."""

    def __init__(self, name: str | None, log: Path) -> None:
        """Start it: by ssh on the machine `name`, or here without one."""
        self.name = name
        self.control, write = os.pipe()
        self.output: Output | None = None
        if name is None:
            self.process = subprocess.Popen(
                guard_command(str(write)),
                stdin=subprocess.PIPE,
                pass_fds=(write,),
                start_new_session=True,
            )
        else:
            self.process = subprocess.Popen(
                [*DEAF, *ssh_command(name)],
                stdin=subprocess.PIPE,
                stdout=write,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            self.output = Output(self.process.stderr, log, name)
        os.close(write)
        os.set_blocking(self.control, False)

    def send(self, line: bytes) -> None:
        """Send one line."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def hang_up(self) -> None:
        """Close its standard input."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def close(self, deadline: float) -> None:
        """Wait until it has ended; at the deadline end it."""
        _end(self.process, deadline)
        if self.output:
            self.output.join()
        os.close(self.control)

    def describe_end(self) -> str:
        """Return its exit code and the last that was printed there."""
        what = "ssh" if self.name else "its guard"
        try:
            how = f"{what} ended (exit code {self.process.wait(COPY_SECONDS)})"
        except subprocess.TimeoutExpired:
            how = "its guard hung up"
        return how + (self.output.quote_last() if self.output else "")

    @property
    def is_cut(self) -> bool:
        """Whether ssh failed, or was ended, rather than what it leads to."""
        code = self.process.returncode
        return self.name is not None and (code < 0 or code == SSH_FAILED)


class Callers:
    """The guards of machines that call us, and what was started so that they do."""

    def __init__(self, way: Way, names: Sequence[str], logs: Path) -> None:
        """Start them, or show what somebody has to type; the key lies in `logs` meanwhile.

        Raises:
            PreflightError: pdsh or srun is not installed, or a machine cannot be found.
        """
        if way in PROGRAMS and shutil.which(PROGRAMS[way]) is None:
            raise PreflightError(
                "is not installed here", where=PROGRAMS[way], fix="install it, or give "
                "world.launcher=ssh"
            )  # fmt: skip
        try:
            address = address_towards(names[0])
        except OSError as error:
            raise PreflightError(f"cannot be found: {error}", where=names[0]) from None
        self.switchboard = Switchboard(names, logs / KEY_FILE)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.outputs: list[Output] = []
        endpoint = f"{address}:{self.switchboard.port}"
        commands = call_commands(way, names, endpoint, self.switchboard.key_file)
        if way == "none":
            for name, words in zip(names, commands, strict=True):
                print(f"type on {name}:\n  {words[-1]}", file=sys.stderr, flush=True)
            return
        for command in commands:
            self._start(command, logs / f"{way}.log")
        threading.Thread(target=self._give_up_late_ones, daemon=True).start()

    @property
    def lines(self) -> dict[str, CallLine]:
        """Name -> line."""
        return self.switchboard.lines

    def close(self, deadline: float) -> None:
        """Take no more calls, and end what was started."""
        self.switchboard.close()
        for process in self.processes:
            _end(process, deadline)
        for output in self.outputs:
            output.join()

    def _start(self, command: Sequence[str], log: Path) -> None:
        process = subprocess.Popen(
            [*DEAF, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.processes.append(process)
        self.outputs.append(Output(process.stdout, log))
        for line in self.lines.values():
            line.last_words = self.outputs[-1].quote_last

    def _give_up_late_ones(self) -> None:
        """What has not called by the time its starter ends will not call."""
        for process in self.processes:
            process.wait()
        for line in self.lines.values():
            if not line.has_called:
                line.hang_up()


class Output:
    """Shows and keeps what other machines print."""

    def __init__(self, stream: Iterable[bytes] | None, log: Path, name: str = "") -> None:
        """Copy `stream` to our standard error, behind the machine's name, and to `log`.

        Lines of ranks come named, and their guard keeps them.
        """
        assert stream is not None
        self._stream, self._log, self._name = stream, log, name
        self._last: list[str] = []
        self._thread = threading.Thread(target=self._copy, name=log.stem, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait a moment for what is still on its way."""
        self._thread.join(COPY_SECONDS)

    def quote_last(self) -> str:
        """Return the last line that says something, to be put behind a sentence."""
        words = [line for line in self._last if line.strip()][-1:]
        return (f": {words[0]}" if words else "") + f" (its output is in {self._log})"

    def _copy(self) -> None:
        file: IO[bytes] | None = None
        with contextlib.suppress(OSError):
            self._log.parent.mkdir(parents=True, exist_ok=True)
            file = self._log.open("ab", buffering=0)
            file.write(f"--- {now()}\n".encode())
        for line in self._stream:  # to its end, whatever happens: a full pipe stops ranks
            text = line.decode(errors="replace").rstrip("\n")
            self._last = [*self._last, text][-LAST_LINES:]
            is_of_rank = bool(self._name) and text.startswith(f"[{self._name} rank ")
            with contextlib.suppress(OSError):
                if file and not is_of_rank:
                    file.write(line)
            prefix = f"[{self._name}] " if self._name and not is_of_rank else ""
            with contextlib.suppress(OSError):
                print(f"{prefix}{text}", file=sys.stderr, flush=True)
        if file:
            file.close()


def _end(process: subprocess.Popen[bytes], deadline: float) -> None:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a session of its own; pdsh has children
        process.wait()
