"""One attempt of a job over several machines: a guard on each, over ssh or beside us.

Ranks are started once. Whatever goes wrong anywhere ends the attempt everywhere; the next one, if
there is one, starts afresh with another port.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.configs.errors import ShoalError
from shoal.configs.schema import WorldConfig
from shoal.launcher.endings import Ending, raise_failure
from shoal.launcher.guard import SAVE_SECONDS, Task, unpack_ending
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.world import STOP_SIGNALS

BEAT_SECONDS = 5.0
LOOK_SECONDS = 0.2
GRACE_SECONDS = 3.0
"""What the machines get, after one has failed, to say what they saw of it."""
START_SECONDS = 120.0
"""What a guard may take until its first word: ssh, and a Python on a slow file system."""
KILL_SECONDS = 15.0
"""How long killed guards may take to be gone before their connection is cut."""
LAST_LINES = 20
# Of our environment, what steers libraries reaches other machines; secrets and devices do not.
FORWARDED = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "PYTORCH_", "HF_HUB_OFFLINE",
             "HF_DATASETS_OFFLINE", "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM")  # fmt: skip
# No shared connection: it would outlive a cut link without a word.
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5",
       "-o", "ServerAliveCountMax=3", "-o", "ControlPath=none", "-o", "ClearAllForwardings=yes",
       )  # fmt: skip
# Who ends a job (DeepSpeed, systemd) ends all its processes; ssh must carry the last word.
DEAF = ("sh", "-c", 'trap "" TERM INT HUP; exec "$@"', "sh")


class HostLostError(ShoalError):
    """A machine, or the connection to it, was gone before its ranks had ended."""


class Guard:
    """The guard of one machine, seen from the launcher."""

    def __init__(self, host: Host, task: Task, log: Path) -> None:
        self.host, self.task, self.log = host, task, log
        self.ending: Ending | None = None
        self.port: int | None = None
        self.has_started = False
        self.last_lines: list[str] = []
        self._buffer = b""
        self._copying = threading.Thread(target=self._copy_output, name=host.name, daemon=True)
        read, write = os.pipe()
        self.process: subprocess.Popen[bytes]
        if is_local(host.name):
            self.process = subprocess.Popen(
                guard_command(str(write)),
                stdin=subprocess.PIPE,
                pass_fds=(write,),
                start_new_session=True,
            )
        else:
            self.process = subprocess.Popen(
                [*DEAF, *SSH, "--", host.name, remote_command(Path.cwd())],
                stdin=subprocess.PIPE,
                stdout=write,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            self._copying.start()
        os.close(write)
        os.set_blocking(read, False)
        self.control = read
        self.say(json.dumps(asdict(task)))

    @property
    def ranks(self) -> list[int]:
        """Global ranks of this machine."""
        return list(range(self.task.first_rank, self.task.first_rank + self.task.ranks))

    def say(self, line: str) -> None:
        """Send one line; a guard that is gone does not hear it."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def hear(self) -> bool:
        """Take in what it says; False when it has hung up."""
        try:
            data = os.read(self.control, 1 << 16)
        except BlockingIOError:
            return True
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):  # a login script that prints
                self._take(json.loads(line))
        return bool(data)

    def _take(self, message: Mapping[str, Any]) -> None:
        self.has_started = True
        if "port" in message:
            self.port = int(message["port"])
        elif "ending" in message:
            self.ending = unpack_ending(message["ending"])

    def _copy_output(self) -> None:
        """Show and keep what a machine elsewhere prints, every line under its name."""
        assert self.process.stderr is not None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        for line in self.process.stderr:  # to its end, whatever happens: a full pipe stops ranks
            text = line.decode(errors="replace").rstrip("\n")
            self.last_lines = [*self.last_lines, text][-LAST_LINES:]
            with contextlib.suppress(OSError), self.log.open("ab") as file:
                file.write(line)
            with contextlib.suppress(OSError):
                print(f"[{self.host.name}] {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Cut the connection; the guard on its other end then stops by itself."""
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._copying.is_alive():
            self._copying.join(GRACE_SECONDS)
        os.close(self.control)

    def lost(self) -> HostLostError:
        """Return the error for a guard that hung up without a word."""
        code = self.process.wait()
        how = "its guard ended without a word" if is_local(self.host.name) else "ssh ended"
        words = [line for line in self.last_lines if line][-1:]
        return HostLostError(
            f"{how} (exit code {code}){': ' + words[0] if words else ''}",
            where=self.host.name,
            fix=f"see that `ssh -o BatchMode=yes {self.host.name} true` works from here, that this "
            f"folder and {sys.executable} are there too; its output is in {self.log}",
        )


def guard_command(*words: str) -> list[str]:
    """Return the command of a guard; -P keeps the current folder off its import path."""
    return [sys.executable, "-P", "-m", "shoal.launcher.guard", *words]


def remote_command(folder: Path, *words: str) -> str:
    """Return what the shell of another machine runs; it has the same folders as this one."""
    path = os.environ.get("PYTHONPATH")  # needed before there is anybody to tell
    env = ["env", f"PYTHONPATH={path}"] if path else []
    return f"cd {shlex.quote(str(folder))} && exec {shlex.join([*env, *guard_command(*words)])}"


def make_tasks(
    hosts: Sequence[Host], argv: Sequence[str], world: WorldConfig, environment: Mapping[str, str]
) -> list[Task]:
    """Return what each machine is to do; ranks are numbered in the order of the hostfile."""
    forwarded = {n: value for n, value in environment.items() if n.startswith(FORWARDED)}
    if environment.get("CUDA_VISIBLE_DEVICES") == "":  # all on CPU, or none
        forwarded["CUDA_VISIBLE_DEVICES"] = ""
    first, tasks = 0, []
    for index, host in enumerate(hosts):
        tasks.append(
            Task(
                list(argv),
                host.slots,
                first,
                index,
                len(hosts),
                hosts[0].name,
                world.threads,
                world.timeout_seconds,
                {} if is_local(host.name) else forwarded,
            )
        )
        first += host.slots
    return tasks


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended; no error: the run is done."""

    error: ShoalError | None
    cut_off: bool = False
    """Whether ranks of a machine that was lost may still be alive."""


def run_attempt(
    hosts: Sequence[Host],
    argv: Sequence[str],
    world: WorldConfig,
    logs: Path,
    caught: list[int],
    gone: Callable[[], bool],
) -> AttemptEnd:
    """Start the ranks of all `hosts` once, and return when all have ended.

    A signal that appears in `caught` reaches every rank, which saves; a second SIGINT kills. So
    does `gone`: nobody is left who wants this.
    """
    tasks = make_tasks(hosts, argv, world, os.environ)
    guards: list[Guard] = []
    try:
        for host, task in zip(hosts, tasks, strict=True):
            guards.append(Guard(host, task, logs / f"{host.name}.log"))
        course = _Course(guards, caught, gone)
        course.follow()
    finally:
        for guard in guards:
            guard.close()
    cut_off = any(guard.ending is None for guard in guards)
    try:
        raise_failure(_join_endings(guards, caught), course.lost[0].lost() if course.lost else None)
    except ShoalError as error:
        return AttemptEnd(error, cut_off)
    return AttemptEnd(None)


class _Course:
    """From the start of an attempt to the last word of its guards."""

    def __init__(
        self, guards: Sequence[Guard], caught: list[int], gone: Callable[[], bool]
    ) -> None:
        self.guards, self.caught, self.gone = guards, caught, gone
        self.lost: list[Guard] = []
        """Those that hung up, or never spoke, before anything was killed: causes, in order."""
        self._begun = time.monotonic()
        self._failed_at: float | None = None
        self._killed_at: float | None = None
        self._port_told = len(guards) == 1
        self._stop_told = False

    def follow(self) -> None:
        """Carry words both ways until every guard has ended or is given up."""
        with selectors.DefaultSelector() as selector:
            for guard in self.guards:
                selector.register(guard.control, selectors.EVENT_READ, guard)
            beat = 0.0
            while selector.get_map():
                for key, _ in selector.select(LOOK_SECONDS):
                    hung_up = not key.data.hear()
                    if hung_up or key.data.ending:
                        selector.unregister(key.fd)
                    if hung_up and key.data.ending is None and self._killed_at is None:
                        self.lost.append(key.data)
                now = time.monotonic()
                if now - beat > BEAT_SECONDS:
                    beat = now
                    self._tell("beat")
                self._steer(now)
                if self._killed_at and now - self._killed_at > KILL_SECONDS:
                    break

    def _steer(self, now: float) -> None:
        """Pass on what has happened: the port, a request to stop, a failure."""
        if not self._port_told and self.guards[0].port:
            self._port_told = True
            self._tell(f"port {self.guards[0].port}")
        if not self.caught and self.gone():
            self.caught.append(signal.SIGTERM)
        if self.caught and not self._stop_told:
            self._stop_told = True
            self._tell("stop")
        if now - self._begun > START_SECONDS and not self._failed_at:
            self.lost += [g for g in self.guards if not g.has_started and g not in self.lost]
        if self._failed_at is None and (self.lost or any(map(_has_failed, self.guards))):
            self._failed_at = now
        grace = SAVE_SECONDS if self.caught else GRACE_SECONDS
        failed_long_ago = self._failed_at is not None and now - self._failed_at > grace
        impatient = self.caught.count(signal.SIGINT) > 1
        if self._killed_at is None and (failed_long_ago or impatient):
            self._killed_at = now
            self._tell("kill")

    def _tell(self, line: str) -> None:
        for guard in self.guards:
            if guard.ending is None:
                guard.say(line)


def _has_failed(guard: Guard) -> bool:
    """Whether a machine has ended otherwise than done or stopped on request."""
    if guard.ending is None:
        return False
    outcomes = guard.ending.outcomes
    return len(outcomes) < len(guard.ranks) or any(o.is_failure for o in outcomes.values())


def _join_endings(guards: Sequence[Guard], caught: Sequence[int]) -> Ending:
    """Return how the ranks of all machines ended; those of a guard without a word are silent."""
    whole = Ending(signal=caught[0] if caught else None)
    for guard in guards:
        whole.ranks += guard.ranks
        whole.hosts |= dict.fromkeys(guard.ranks, guard.host.name)
        if guard.ending is None:
            whole.ended_by_us |= set(guard.ranks)
            continue
        whole.outcomes |= guard.ending.outcomes
        whole.exit_codes |= guard.ending.exit_codes
        whole.ended_by_us |= guard.ending.ended_by_us
    return whole


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Give a list that grows with every signal that asks for a stop."""
    caught: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, lambda n, _: caught.append(n))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
