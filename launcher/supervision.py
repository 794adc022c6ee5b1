"""A job is a series of attempts: what was lost ends one, the next starts on what is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal.configs.errors import (
    ConfigError,
    DataError,
    NonFiniteLossError,
    NotMetError,
    PreflightError,
    RetriesExhausted,
    ShoalError,
    StoppedOnRequest,
)
from shoal.configs.load import dump_config
from shoal.configs.schema import RunConfig
from shoal.launcher.check import check_before_start
from shoal.launcher.endings import Interrupted, interrupted
from shoal.launcher.fanout import AttemptEnd, CutOff, HostLostError, run_attempt
from shoal.launcher.greeting import find_guards, find_reachable
from shoal.launcher.guard import AGENT_SECONDS, SILENCE_SECONDS
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.output import LAUNCH_FILE, next_log_folder
from shoal.launcher.processes import any_gone, changed_environment, launch_ranks, open_process
from shoal.launcher.runs import run_folder
from shoal.launcher.screen import newest_checkpoint, newest_checkpoint_note, show_error
from shoal.launcher.world import caught_signals, seconds_to_train
from shoal.trainer.aside import (
    ELSEWHERE,
    JOB_VARIABLE,
    REFUSED_VARIABLE,
    forget_resumed,
    read_resumed,
)
from shoal.trainer.storage import write_text

FINAL = (
    ConfigError, DataError, PreflightError, NonFiniteLossError, StoppedOnRequest, Interrupted
)  # fmt: skip
"""Ends that another attempt would only repeat, or that were asked for."""
ASK_SECONDS = 10.0
"""What a machine may take to say whether its guard is gone."""
GONE_MARGIN_SECONDS = 2.0


def supervise(hosts: Sequence[Host], config: RunConfig, watch: Sequence[int] = ()) -> None:
    """Train on `hosts` until the run is done, starting again after what can be got over.

    Args:
        hosts: Machines of the job, first the one that holds rank 0.
        config: The run; also how many attempts, and on how many machines.
        watch: Processes whose end asks for a stop.

    Raises:
        PreflightError: a machine does not answer before anything began, or too few do later.
        RetriesExhausted: every attempt failed.
        ShoalError: what no further attempt would change.
    """
    _check_way(hosts, config)
    descriptors = [open_process(pid) for pid in watch]
    try:
        job = {JOB_VARIABLE: uuid.uuid4().hex}
        with caught_signals() as caught, changed_environment(job):
            _Job(hosts, config, descriptors, caught).run()
    finally:
        for descriptor in descriptors:
            if descriptor is not None:
                os.close(descriptor)


def _check_way(hosts: Sequence[Host], config: RunConfig) -> None:
    """Refuse what cannot work where hosts have disks of their own.

    Raises:
        ConfigError: guards would not find the key to call back, or this machine would not see
            the checkpoints that decide what a further attempt does.
    """
    way, copies = config.world.launcher, config.checkpoint.copies
    if way != "ssh" and copies != "shared" and not all(is_local(host.name) for host in hosts):
        raise ConfigError(
            f"{way} needs a run folder that all hosts share, and checkpoint.copies={copies} says "
            "that there is none",
            where="world.launcher",
            fix="world.launcher=ssh; or let Slurm start the ranks: `srun python launcher/run.py`",
        )
    keepers = {"shared": (), "first": hosts[:1], "every": hosts}[copies]
    if keepers and not any(is_local(host.name) for host in keepers):
        raise ConfigError(
            f"checkpoint.copies={copies}, and this machine keeps none of the checkpoints",
            where=socket.gethostname(),
            fix=f"give the command on {keepers[0].name}, or a folder that all share",
        )


class _Job:
    """The attempts of one command."""

    def __init__(
        self,
        hosts: Sequence[Host],
        config: RunConfig,
        watched: Sequence[int | None],
        caught: list[int],
    ) -> None:
        self.hosts = self.all_hosts = hosts
        self.config, self.world = config, config.world
        self.folder, self.way = run_folder(config), config.world.launcher
        self.own_disks = config.checkpoint.copies != "shared"
        """Whether no other machine sees the folder of the run."""
        self.watched, self.caught = watched, caught
        self._stop_at = time.monotonic() + seconds_to_train(self.world)
        self._is_late = False
        self._left_out: set[str] = set()
        """Machines that failed again and again, while the others were well."""
        self._checkpoints = self.folder / "checkpoints"
        self._refusal: dict[str, str] = {}
        """Tells ranks which checkpoint to leave out."""
        self._refused_at: list[tuple[str, int]] = []

    def run(self) -> None:
        """Make attempts until one succeeds."""
        try:
            self._run()
        except Interrupted as error:
            if newest := newest_checkpoint(self.folder):
                stopped = StoppedOnRequest(
                    f"{error.cause}; {newest} is the newest that there is",
                    where=self.folder,
                    fix="run the same command again: it goes on from there",
                )
                for note in getattr(error, "__notes__", ()):
                    stopped.add_note(note)
                raise stopped from None
            raise

    def _run(self) -> None:
        attempts = self.world.max_restarts + 1
        try:
            check_before_start(self.hosts, self.config, self._is_called_off)
        finally:
            self._heed_request()
        seen = set()
        for attempt in range(1, attempts + 1):
            end = self._attempt()
            if end.error is None:
                return
            sign = self._sign(end.error)
            unfit = self._find_unfit(end, sign in seen) if attempt > 1 else set()
            if attempts == 1 or (isinstance(end.error, FINAL) and not unfit):
                raise end.error
            end.error.add_note(newest_checkpoint_note(self.folder))
            show_error(end.error)
            if unfit:
                self._left_out |= unfit
                self._say(f"{', '.join(sorted(unfit))}: left out from now on")
            elif sign in seen and not self._go_back(end.error):
                raise self._exhausted("the same failure twice, and no checkpoint in between")
            seen |= {sign, self._sign(end.error)}
            if attempt < attempts:
                self._gather(end)
                names = ", ".join(host.name for host in self.hosts)
                self._say(f"attempt {attempt + 1} of {attempts}, on {names}")
        raise self._exhausted(f"{attempts} attempts failed")

    def _find_unfit(self, end: AttemptEnd, again: bool) -> set[str]:
        """Return the machines that keep the others from training, where those are enough.

        That is one that was lost twice without any progress; and one whose guard refuses what was
        possible when the job began, such as one that is back with fewer GPUs.
        """
        unfit = set(end.refused) if again or isinstance(end.error, PreflightError) else set()
        if isinstance(end.error, NotMetError) and len(unfit) >= len(self.hosts) - 1:
            unfit = set()  # nobody reaches the first one: that is no fault of theirs
        if again and isinstance(end.error, HostLostError):
            unfit.add(end.error.where or "")
        unfit &= {host.name for host in self.hosts}
        return unfit if len(self.hosts) - len(unfit) >= self.world.min_hosts else set()

    def _go_back(self, error: ShoalError) -> bool:
        """Leave out the checkpoint that failed; return whether there is an older one to go on from.

        Once, until training has got past it. Not for hosts that are lost or do not find each
        other: that is none of its doing. Where this machine does not see what the ranks went on
        from, there is nothing to tell them.
        """
        if isinstance(error, (HostLostError, NotMetError)) or self._refusal:
            return False
        failed = read_resumed(self._checkpoints)
        older = [name for name in self._list_saved() if name < failed]
        if not older:
            return False
        self._refusal, self._refused_at = {REFUSED_VARIABLE: failed}, self._last_save()
        self._say(f"the same failure twice from {failed}: it is left out, {older[-1]} is next")
        return True

    def _list_saved(self) -> list[str]:
        """Return the names of the checkpoints of the run, oldest first."""
        from shoal.trainer.checkpoint import list_checkpoints
        from shoal.trainer.objects import list_published

        kept = self.config.checkpoint
        if not kept.folder:
            return [folder.name for folder in list_checkpoints(self._checkpoints)]
        try:
            return list_published(f"{kept.folder.rstrip('/')}/{self.config.name}")
        except Exception as error:  # every driver has its own
            self._say(f"{kept.folder} cannot be read: {type(error).__name__}: {error}")
            return []

    def _last_save(self) -> list[tuple[str, int]]:
        """Return what is another as soon as the ranks have saved again."""
        found = sorted(self._checkpoints.glob("step-*/manifest.json"))[-1:]
        if self.config.checkpoint.folder:  # what is here was only brought here
            found = list(self._checkpoints.glob(ELSEWHERE))
        return [(str(file), file.stat().st_mtime_ns) for file in found]

    def _sign(self, error: ShoalError) -> tuple[object, ...]:
        """Return what is equal for a failure that happens again without any progress."""
        cause = re.sub(r"\d+", "", error.cause)  # ports and ranks may differ
        return cause, error.where, tuple(self.hosts), newest_checkpoint(self.folder)

    def _exhausted(self, how: str) -> RetriesExhausted:
        return RetriesExhausted(
            f"{how}; the last failure is shown above",
            where=self.folder,
            fix="see to its cause; the same command goes on from the newest checkpoint",
        )

    def _attempt(self) -> AttemptEnd:
        """Start the ranks once; a job of this machine alone needs no guard."""
        # One text for all machines and attempts: the user's own file may change meanwhile.
        # In a folder of its own: another command for this run is refused later than here.
        logs = next_log_folder(self.folder)
        write_text(logs / LAUNCH_FILE, dump_config(self.config))
        forget_resumed(self._checkpoints)
        if self._last_save() != self._refused_at:
            self._refusal = {}
        with changed_environment(self._refusal):
            return self._start(logs)

    def _start(self, logs: Path) -> AttemptEnd:
        file = logs / LAUNCH_FILE
        files = {str(file): file.read_text(encoding="utf-8")} if self.own_disks else {}
        if len(self.hosts) > 1 or not is_local(self.hosts[0].name):
            return run_attempt(
                self.hosts, [str(file)], self.world, logs, self.caught, self._gone, files
            )
        try:
            launch_ranks(
                self.hosts[0].slots,
                [str(file)],
                threads=self.world.threads,
                timeout=self.world.timeout_seconds,
                environment=self.hosts[0].device_variables,
                gone=self._gone,
                caught=self.caught,
                logs=logs,
            )
        except ShoalError as error:
            return AttemptEnd(error)
        return AttemptEnd(None)

    def _gather(self, end: AttemptEnd) -> None:
        """Find the machines that answer, once nothing of the last attempt can be alive."""
        lost = self._await_end(end.cut_off)
        self._heed_request()
        try:
            # Of all: what was lost may have come back.
            least = self.world.min_hosts
            folder = None if self.own_disks else self.folder
            found = find_reachable(
                self.all_hosts, self.way, least, folder, lost, self._is_called_off
            )
        finally:
            self._heed_request()
        fit = [host for host in found if host.name not in self._left_out]
        if len(fit) < least:  # better those than none
            self._left_out, fit = set(), found
        self.hosts = fit

    def _await_end(self, cut_off: Mapping[str, CutOff]) -> set[str]:
        """Wait until no guard that is cut off can have ranks; return who did not answer at last."""
        left, silent, is_asked = dict(cut_off), set[str](), False
        if left:
            self._say(f"waiting until nothing of this can run on {', '.join(left)} any more")
        while left:
            self._heed_request()
            seconds = max(one.since for one in left.values()) + self._gone_seconds
            seconds -= time.monotonic()
            if seconds <= 0 and is_asked:
                break
            pids = {name: one.pid for name, one in left.items() if one.pid}
            # Once in any case: whoever asks ends a guard that is stopped, and its ranks with it.
            if pids and (not is_asked or seconds > ASK_SECONDS / 2):
                limit = min(ASK_SECONDS, seconds) if is_asked else ASK_SECONDS
                found = find_guards(pids, self.way, limit, self._is_called_off)
                silent = set(pids) - set(found) if self.way != "none" else set()
                left = {name: one for name, one in left.items() if found.get(name, True)}
            is_asked = True
            time.sleep(max(0.0, min(1.0, seconds)) if left else 0)
        return silent

    @property
    def _gone_seconds(self) -> float:
        """After that the guard of a lost machine has ended its ranks, if the machine runs."""
        return SILENCE_SECONDS + self.world.save_seconds + AGENT_SECONDS + GONE_MARGIN_SECONDS

    def _heed_request(self) -> None:
        """Stop here if somebody has asked for it.

        Raises:
            Interrupted: so it is.
        """
        if self._is_called_off():
            raise interrupted(self.caught[0] if self.caught else signal.SIGTERM)

    def _is_called_off(self) -> bool:
        return bool(self.caught) or self._gone()

    def _gone(self) -> bool:
        """Whether one of the processes that want this job has ended, or its time is over."""
        if time.monotonic() > self._stop_at and not self._is_late:
            self._is_late = True
            self._say(f"{self.world.time_limit_minutes:g} minutes are nearly over: saving")
        if self._is_late:
            return True
        alive = [descriptor for descriptor in self.watched if descriptor is not None]
        return len(alive) < len(self.watched) or bool(alive and any_gone(alive))

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
