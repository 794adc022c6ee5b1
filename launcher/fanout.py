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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from shoal.configs.errors import ShoalError, StoppedOnRequest
from shoal.configs.schema import WorldConfig
from shoal.launcher.endings import Ending, raise_failure
from shoal.launcher.guard import SILENCE_SECONDS, Task, unpack_ending
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.world import STOP_SIGNALS
from shoal.trainer.ledger import now

BEAT_SECONDS = 5.0
LOOK_SECONDS = 0.2
GRACE_SECONDS = 3.0
"""What the machines get, after one has failed, to say what they saw of it."""
START_SECONDS = 120.0
"""What a guard may take until its first word: ssh, and a Python on a slow file system."""
CLOSE_SECONDS = 15.0
"""How long killed guards may take to be gone before their connection is cut."""
SSH_FAILED = 255
LAST_LINES = 20
# Of our environment, what steers libraries reaches other machines; secrets and devices do not.
FORWARDED = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_",
             "CUBLAS_", "NVIDIA_TF32_OVERRIDE", "CUDA_LAUNCH_BLOCKING",
             "CUDA_DEVICE_MAX_CONNECTIONS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE",
             "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM")  # fmt: skip
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
        self.is_local = is_local(host.name)
        self.ending: Ending | None = None
        self.port: int | None = None
        self.pid: int | None = None
        """Its process id on its machine; None until it has spoken."""
        self.stopped_itself = False
        """Whether it ended its ranks because it did not hear from us."""
        self.last_lines: list[str] = []
        self._buffer = b""
        self._copying = threading.Thread(target=self._copy_output, name=host.name, daemon=True)
        read, write = os.pipe()
        self.process: subprocess.Popen[bytes]
        if self.is_local:
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
        if "started" in message:
            self.pid = int(message["started"])
        elif "port" in message:
            self.port = int(message["port"])
        elif "ending" in message:
            self.stopped_itself = bool(message.get("lost"))
            self.ending = unpack_ending(message["ending"])

    def _copy_output(self) -> None:
        """Show and keep what a machine elsewhere prints, every line under its name."""
        assert self.process.stderr is not None
        file: IO[bytes] | None = None
        with contextlib.suppress(OSError):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            file = self.log.open("ab", buffering=0)
            file.write(f"--- {now()}, ranks {self.task.global_ranks}\n".encode())
        for line in self.process.stderr:  # to its end, whatever happens: a full pipe stops ranks
            text = line.decode(errors="replace").rstrip("\n")
            self.last_lines = [*self.last_lines, text][-LAST_LINES:]
            with contextlib.suppress(OSError):
                if file:
                    file.write(line)
            with contextlib.suppress(OSError):
                print(f"[{self.host.name}] {text}", file=sys.stderr, flush=True)
        if file:
            file.close()

    def hang_up(self) -> None:
        """Say no more; a guard that still runs stops by itself."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def close(self, deadline: float) -> None:
        """Wait until it is gone; at the deadline cut the connection, or end a guard beside us."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._copying.is_alive():
            self._copying.join(GRACE_SECONDS)
        os.close(self.control)

    @property
    def is_cut_off(self) -> bool:
        """Whether its ranks may still be alive: gone is the way to it, not surely itself."""
        cut = self.process.returncode < 0 or self.process.returncode == SSH_FAILED
        return self.ending is None and not self.is_local and cut

    def lost(self, how: str) -> HostLostError:
        """Return the error for a guard without a last word; `how` it was lost."""
        words = [line for line in self.last_lines if line][-1:]
        fix = f"see that `ssh -o BatchMode=yes {self.host.name} true` works from here, that this "
        fix += f"folder and {sys.executable} are there too; its output is in {self.log}"
        return HostLostError(
            f"{how}{': ' + words[0] if words else ''}",
            where=self.host.name,
            fix=None if self.is_local else fix,
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
        task = Task(
            argv=list(argv),
            ranks=host.slots,
            first_rank=first,
            host=index,
            num_hosts=len(hosts),
            address=hosts[0].name,
            threads=world.threads,
            timeout=world.timeout_seconds,
            save_seconds=world.save_seconds,
            environment={} if is_local(host.name) else forwarded,
        )
        tasks.append(task)
        first += host.slots
    return tasks


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended; no error: the run is done."""

    error: ShoalError | None
    cut_off: Mapping[str, int | None] = field(default_factory=dict)
    """Machines whose ranks may still be alive -> the process id of their guard there, if known."""


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
        course = _Course(guards, world.save_seconds, caught, gone)
        course.follow()
    finally:
        for guard in guards:
            guard.hang_up()
        deadline = time.monotonic() + CLOSE_SECONDS
        for guard in guards:
            guard.close(deadline)
    cut_off = {guard.host.name: guard.pid for guard in guards if guard.is_cut_off}
    try:
        raise_failure(_join_endings(guards, caught), course.lost[0] if course.lost else None)
    except StoppedOnRequest as error:
        unheard = [guard for guard in guards if guard.stopped_itself]
        if not caught and unheard:  # nobody has asked for it
            how = f"did not hear from the launcher for {SILENCE_SECONDS:.0f} s; its ranks saved"
            return AttemptEnd(HostLostError(how, where=unheard[0].host.name), cut_off)
        return AttemptEnd(error, cut_off)
    except ShoalError as error:
        return AttemptEnd(error, cut_off)
    return AttemptEnd(None)


class _Course:
    """From the start of an attempt to the last word of its guards."""

    def __init__(
        self,
        guards: Sequence[Guard],
        save_seconds: float,
        caught: list[int],
        gone: Callable[[], bool],
    ) -> None:
        self.guards, self.caught, self.gone = guards, caught, gone
        self.save_seconds = save_seconds
        self.lost: list[HostLostError] = []
        """For guards that hung up, or never spoke, before anything was killed: in order."""
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
                        self._lose_hung_up(key.data)
                moment = time.monotonic()
                if moment - beat > BEAT_SECONDS:
                    beat = moment
                    self._tell("beat")
                self._steer(moment)
                if self._killed_at and moment - self._killed_at > CLOSE_SECONDS:
                    break

    def _steer(self, moment: float) -> None:
        """Pass on what has happened: the port, a request to stop, a failure."""
        if not self._port_told and self.guards[0].port:
            self._port_told = True
            self._tell(f"port {self.guards[0].port}")
        if not self.caught and self.gone():
            self.caught.append(signal.SIGTERM)
        if self.caught and not self._stop_told:
            self._stop_told = True
            self._tell("stop")
        if moment - self._begun > START_SECONDS and self._failed_at is None:
            how = f"its guard said nothing for {START_SECONDS:.0f} s"
            self.lost += [guard.lost(how) for guard in self.guards if guard.pid is None]
        if self._failed_at is None and (self.lost or any(map(_has_failed, self.guards))):
            self._failed_at = moment
        grace = self.save_seconds if self.caught else GRACE_SECONDS
        failed_long_ago = self._failed_at is not None and moment - self._failed_at > grace
        impatient = self.caught.count(signal.SIGINT) > 1
        if self._killed_at is None and (failed_long_ago or impatient):
            self._killed_at = moment
            self._tell("kill")

    def _lose_hung_up(self, guard: Guard) -> None:
        try:
            code = guard.process.wait(GRACE_SECONDS)
            how = f"{'its guard' if guard.is_local else 'ssh'} ended (exit code {code})"
        except subprocess.TimeoutExpired:
            how = "its guard hung up"
        self.lost.append(guard.lost(how))

    def _tell(self, line: str) -> None:
        for guard in self.guards:
            if guard.ending is None:
                guard.say(line)


def _has_failed(guard: Guard) -> bool:
    """Whether a machine has ended otherwise than done or stopped on request."""
    if guard.ending is None:
        return False
    outcomes = guard.ending.outcomes
    return len(outcomes) < guard.task.ranks or any(o.is_failure for o in outcomes.values())


def _join_endings(guards: Sequence[Guard], caught: Sequence[int]) -> Ending:
    """Return how the ranks of all machines ended; those of a guard without a word are silent."""
    whole = Ending(signal=caught[0] if caught else None)
    for guard in guards:
        ranks = guard.task.global_ranks
        whole.ranks += ranks
        whole.hosts |= dict.fromkeys(ranks, guard.host.name)
        if guard.ending is None:
            whole.ended_by_us |= set(ranks)
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
