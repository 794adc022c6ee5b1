"""One attempt of a job over several machines: a guard on each, over ssh or beside us.

Ranks are started once. Whatever goes wrong anywhere ends the attempt everywhere; the next one, if
there is one, starts afresh with another port.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoal.configs.errors import HangError, NotMetError, ShoalError, StoppedOnRequest
from shoal.configs.schema import WorldConfig
from shoal.launcher.endings import Ending, raise_failure
from shoal.launcher.guard import SILENCE_SECONDS, Task, unpack_ending
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.lines import Callers, Line, ProcessLine
from shoal.launcher.processes import HANG_GRACE_SECONDS
from shoal.launcher.watchdog import WHY_NOT_MET
from shoal.trainer.aside import JOB_VARIABLE, REFUSED_VARIABLE

BEAT_SECONDS = 5.0
LOOK_SECONDS = 0.2
GRACE_SECONDS = 3.0
"""What the machines get, after one has failed, to say what they saw of it."""
START_SECONDS = 120.0
"""What a guard may take until its first word: ssh, and a Python on a slow file system."""
CLOSE_SECONDS = 15.0
"""How long killed guards may take to be gone before their connection is cut."""
# Of our environment, what steers libraries reaches other machines; secrets and devices do not.
FORWARDED = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_",
             "CUBLAS_", "NVIDIA_TF32_OVERRIDE", "CUDA_LAUNCH_BLOCKING",
             "CUDA_DEVICE_MAX_CONNECTIONS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE",
             "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM", JOB_VARIABLE,
             REFUSED_VARIABLE)  # fmt: skip


class HostLostError(ShoalError):
    """A machine, or the connection to it, was gone before its ranks had ended."""


class Guard:
    """The guard of one machine, seen from the launcher."""

    def __init__(self, host: Host, task: Task, line: Line) -> None:
        self.host, self.task, self.line = host, task, line
        self.ending: Ending | None = None
        self.port: int | None = None
        self.pid: int | None = None
        """Its process id on its machine; None until it has spoken."""
        self.meeting = self.met = 0
        """How many of its ranks look for the others, and have found them."""
        self.stopped_itself = False
        """Whether it ended its ranks because it did not hear from us."""
        self.refused = False
        """Whether it could not even start them."""
        self.asked_at: float | None = None
        """When it was asked for a word that it still owes us."""
        self.heard_at = time.monotonic()
        """When it last said something."""
        self._buffer = b""
        self.say(json.dumps(asdict(task)))

    def say(self, line: str) -> None:
        """Send one line; a guard that is gone does not hear it."""
        self.line.send(line.encode() + b"\n")

    def ask(self, moment: float) -> None:
        """Let it know that we are here and have its last word, and see that it is."""
        if self.asked_at is None:
            self.asked_at = moment
            self.say("beat")

    def is_silent(self, moment: float) -> bool:
        """Whether it owes a word for too long: stopped, or on a machine that is."""
        asked = self.pid is not None and self.asked_at is not None
        return asked and moment - (self.asked_at or moment) > SILENCE_SECONDS

    def hear(self) -> bool:
        """Take in what it says; False when it has hung up."""
        try:
            data = os.read(self.line.control, 1 << 16)
        except BlockingIOError:
            return True
        if data:
            self.heard_at = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):  # a login script that prints
                self._take(json.loads(line))
        return bool(data)

    def _take(self, message: Mapping[str, Any]) -> None:
        if "alive" in message:
            self.asked_at = None
        elif "started" in message:
            self.pid = int(message["started"])
            self.asked_at = self.asked_at and time.monotonic()  # until now nobody was there
        elif "port" in message:
            self.port = int(message["port"])
        elif "met" in message:
            self.meeting, self.met = int(message["meeting"]), int(message["met"])
        elif "ending" in message:
            self.stopped_itself = bool(message.get("lost"))
            self.refused = bool(message.get("refused"))
            self.ending = unpack_ending(message["ending"])

    def lost(self, how: str) -> HostLostError:
        """Return the error for a guard without a last word; `how` it was lost."""
        there = not is_local(self.host.name)
        fix = f"see that `ssh -o BatchMode=yes {self.host.name} true` works from here, and that "
        fix += f"this folder and {sys.executable} are there too"
        return HostLostError(how, where=self.host.name, fix=fix if there else None)


def make_tasks(
    hosts: Sequence[Host],
    argv: Sequence[str],
    world: WorldConfig,
    environment: Mapping[str, str],
    logs: Path | None = None,
    files: Mapping[str, str] = {},
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
            name=host.name,
            logs=str(logs) if logs else None,
            threads=world.threads,
            timeout=world.timeout_seconds,
            save_seconds=world.save_seconds,
            files=dict(files),
            environment=({} if is_local(host.name) else forwarded) | host.device_variables,
        )
        tasks.append(task)
        first += host.slots
    return tasks


@dataclass(frozen=True)
class CutOff:
    """A guard that may still run, and cannot be spoken to."""

    pid: int | None
    """Its process id on its machine, if it has said it."""
    since: float
    """From this moment of our monotonic clock on it has heard nothing of us."""


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended; no error: the run is done."""

    error: ShoalError | None
    cut_off: Mapping[str, CutOff] = field(default_factory=dict)
    """Machines whose ranks may still be alive."""
    refused: Sequence[str] = ()
    """Machines whose guard could not even start its ranks."""


def run_attempt(
    hosts: Sequence[Host],
    argv: Sequence[str],
    world: WorldConfig,
    logs: Path,
    caught: list[int],
    gone: Callable[[], bool],
    files: Mapping[str, str] = {},
) -> AttemptEnd:
    """Start the ranks of all `hosts` once, and return when all have ended.

    A signal that appears in `caught` reaches every rank, which saves; a second SIGINT kills. So
    does `gone`: nobody is left who wants this. What ranks and machines print is kept in `logs`, and
    the key of callers for a while. `files` are written on every machine first.
    """
    tasks = make_tasks(hosts, argv, world, os.environ, logs, files)
    others = [host.name for host in hosts if not is_local(host.name)]
    guards: list[Guard] = []
    callers: Callers | None = None
    try:
        if others and world.launcher != "ssh":
            callers = Callers(world.launcher, others, logs)
        for host, task in zip(hosts, tasks, strict=True):
            guards.append(Guard(host, task, _open_line(host.name, logs, callers)))
        course = _Course(guards, world, caught, gone)
        course.follow()
    finally:
        for guard in guards:
            guard.line.hang_up()
        ended = time.monotonic()
        deadline = ended + CLOSE_SECONDS
        for guard in guards:
            guard.line.close(deadline)
        if callers:
            callers.close(deadline)
    cut_off = {guard.host.name: CutOff(guard.pid, guard.heard_at if guard.pid else ended)
               for guard in guards if guard.ending is None and guard.line.is_cut}  # fmt: skip
    return _judge(guards, course.lost, caught, cut_off)


def _judge(
    guards: Sequence[Guard],
    lost: Sequence[ShoalError],
    caught: Sequence[int],
    cut_off: Mapping[str, CutOff],
) -> AttemptEnd:
    """Return how an attempt ended, from what its guards have said and who was lost."""
    try:
        raise_failure(_join_endings(guards, caught), lost[0] if lost else None)
    except StoppedOnRequest as error:
        unheard = [guard for guard in guards if guard.stopped_itself]
        if not caught and unheard:  # nobody has asked for it
            how = f"did not hear from the launcher for {SILENCE_SECONDS:.0f} s; its ranks saved"
            return AttemptEnd(HostLostError(how, where=unheard[0].host.name), cut_off)
        return AttemptEnd(error, cut_off)
    except ShoalError as error:
        return AttemptEnd(error, cut_off, [guard.host.name for guard in guards if guard.refused])
    return AttemptEnd(None)


def _open_line(name: str, logs: Path, callers: Callers | None) -> Line:
    """Return the line to a machine's guard, which is started unless others do so."""
    if is_local(name):
        return ProcessLine(None, logs)
    return callers.lines[name] if callers else ProcessLine(name, logs / f"{name}.log")


class _Course:
    """From the start of an attempt to the last word of its guards."""

    def __init__(
        self,
        guards: Sequence[Guard],
        world: WorldConfig,
        caught: list[int],
        gone: Callable[[], bool],
    ) -> None:
        self.guards, self.caught, self.gone = guards, caught, gone
        self.save_seconds = world.save_seconds
        # Somebody may have to go and type.
        self.start_seconds = max(
            START_SECONDS, world.timeout_seconds if world.launcher == "none" else 0
        )
        self.meet_seconds = world.start_seconds
        self.lost: list[ShoalError] = []
        """For guards that hung up, or never spoke, before anything was killed, in order; or for
        ranks that do not find each other.
        """
        self._meeting_since: float | None = None
        self._begun = time.monotonic()
        self._failed_at: float | None = None
        self._killed_at: float | None = None
        self._port_told = len(guards) == 1
        self._stop_told = False

    def follow(self) -> None:
        """Carry words both ways until every guard has ended or is given up."""
        with selectors.DefaultSelector() as selector:
            for guard in self.guards:
                selector.register(guard.line.control, selectors.EVENT_READ, guard)
            beat = 0.0
            while selector.get_map():
                moment = time.monotonic()  # before: what we have missed meanwhile is read first
                for key, _ in selector.select(LOOK_SECONDS):
                    hung_up = not key.data.hear()
                    if hung_up or key.data.ending:
                        selector.unregister(key.fd)
                    if hung_up and key.data.ending is None and self._killed_at is None:
                        self.lost.append(key.data.lost(key.data.line.describe_end()))
                if moment - beat > BEAT_SECONDS:
                    beat = moment
                    self._ask_all(selector, moment)
                self._steer(moment)
                if self._killed_at and moment - self._killed_at > CLOSE_SECONDS:
                    break

    def _ask_all(self, selector: selectors.BaseSelector, moment: float) -> None:
        """Ask every guard for a word, and give up those that owe us one for too long."""
        for guard in [key.data for key in selector.get_map().values()]:
            if not guard.is_silent(moment):
                guard.ask(moment)
                continue
            selector.unregister(guard.line.control)
            if self._killed_at is None:
                how = f"its guard stands still: no word for {SILENCE_SECONDS:.0f} s"
                self.lost.append(guard.lost(how))

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
        if moment - self._begun > self.start_seconds and self._failed_at is None:
            how = f"its guard said nothing for {self.start_seconds:.0f} s"
            self.lost += [guard.lost(how) for guard in self.guards if guard.pid is None]
        self._watch_meeting(moment)
        if self._failed_at is None and (self.lost or any(map(_has_failed, self.guards))):
            self._failed_at = moment
        grace = HANG_GRACE_SECONDS if any(map(_has_hung, self.guards)) else GRACE_SECONDS
        grace = self.save_seconds if self.caught else grace
        failed_long_ago = self._failed_at is not None and moment - self._failed_at > grace
        impatient = self.caught.count(signal.SIGINT) > 1
        if self._killed_at is None and (failed_long_ago or impatient):
            self._killed_at = moment
            self._tell("kill")

    def _watch_meeting(self, moment: float) -> None:
        """Give up ranks that all look for each other, and do not find each other in time."""
        if self._meeting_since is None:
            if all(guard.meeting == guard.task.ranks for guard in self.guards):
                self._meeting_since = moment
            return
        late = [guard for guard in self.guards if guard.met < guard.task.ranks]
        if late and not self.lost and moment - self._meeting_since > self.meet_seconds:
            self.lost.append(
                NotMetError(
                    f"their ranks did not find all others within {self.meet_seconds} s",
                    where=", ".join(guard.host.name for guard in late),
                    fix=f"{WHY_NOT_MET}; on a slow network raise world.start_seconds",
                )
            )

    def _tell(self, line: str) -> None:
        for guard in self.guards:
            if guard.ending is None:
                guard.say(line)


def _has_hung(guard: Guard) -> bool:
    """Whether a rank of a machine got no further."""
    outcomes = guard.ending.outcomes.values() if guard.ending else ()
    return any(outcome.kind == HangError.__name__ for outcome in outcomes)


def _has_failed(guard: Guard) -> bool:
    """Whether a machine has ended otherwise than done or stopped on request."""
    if guard.ending is None:
        return False
    outcomes = guard.ending.outcomes
    return len(outcomes) < guard.task.ranks or any(o.is_failure for o in outcomes.values())


def _join_endings(guards: Sequence[Guard], caught: Sequence[int]) -> Ending:
    """Return how the ranks of all machines ended; those of a guard without a word are silent.

    A signal may reach a guard alone: it stops the ranks of its machine, and so all.
    """
    told = [guard.ending.signal for guard in guards if guard.ending and not guard.stopped_itself]
    whole = Ending(signal=next(filter(None, [*caught, *told]), None))
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
