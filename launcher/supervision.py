"""A job is a series of attempts: what was lost ends one, the next starts on what is left."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shoal.configs.errors import (
    ConfigError,
    DataError,
    PreflightError,
    RetriesExhausted,
    ShoalError,
    StoppedOnRequest,
)
from shoal.configs.load import dump_config
from shoal.configs.schema import RunConfig
from shoal.launcher.endings import Interrupted, interrupted
from shoal.launcher.fanout import AttemptEnd, caught_signals, run_attempt
from shoal.launcher.greeting import check_all_answer, find_reachable
from shoal.launcher.guard import KILL_SECONDS, SAVE_SECONDS, SILENCE_SECONDS
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.processes import any_gone, launch_ranks, open_process
from shoal.launcher.screen import newest_checkpoint, newest_checkpoint_note, show_error
from shoal.trainer.storage import write_text

FINAL = (ConfigError, DataError, PreflightError, StoppedOnRequest, Interrupted)
"""Ends that another attempt would only repeat, or that were asked for."""
GONE_SECONDS = SILENCE_SECONDS + SAVE_SECONDS + KILL_SECONDS
"""After that the guard of a lost machine has ended its ranks, if the machine runs at all."""


def supervise(
    hosts: Sequence[Host], argv: Sequence[str], config: RunConfig, watch: Sequence[int] = ()
) -> None:
    """Train on `hosts` until the run is done, starting again after what can be got over.

    Args:
        hosts: Machines of the job, first the one that holds rank 0.
        argv: Config and overrides for the ranks of this machine; others get `config` itself.
        config: What they come to: how many attempts, on how many machines, where the run is.
        watch: Processes whose end asks for a stop.

    Raises:
        PreflightError: a machine does not answer before anything began, or too few do later.
        RetriesExhausted: every attempt failed.
        ShoalError: what no further attempt would change.
    """
    descriptors = [open_process(pid) for pid in watch]
    try:
        with caught_signals() as caught:
            _Job(hosts, argv, config, descriptors, caught).run()
    finally:
        for descriptor in descriptors:
            if descriptor is not None:
                os.close(descriptor)


class _Job:
    """The attempts of one command."""

    def __init__(
        self,
        hosts: Sequence[Host],
        argv: Sequence[str],
        config: RunConfig,
        watched: Sequence[int | None],
        caught: list[int],
    ) -> None:
        self.hosts, self.argv, self.world = hosts, argv, config.world
        self.config, self.folder = config, Path(config.output) / config.name
        self.watched, self.caught = watched, caught

    def run(self) -> None:
        check_all_answer(self.hosts, self.world.min_hosts, self.folder)
        seen = set()
        for attempt in range(self.world.max_restarts + 1):
            end = self._attempt()
            if end.error is None:
                return
            if isinstance(end.error, FINAL):
                raise end.error
            end.error.add_note(newest_checkpoint_note(self.folder))
            # The same once more, and no further than before: ports and ranks may differ.
            sign = (re.sub(r"\d+", "", end.error.cause), newest_checkpoint(self.folder))
            if sign in seen or self.world.max_restarts == 0:
                raise end.error
            seen.add(sign)
            show_error(end.error)
            if attempt < self.world.max_restarts:
                self._gather(end)
                names = ", ".join(host.name for host in self.hosts)
                self._say(f"attempt {attempt + 2} of {self.world.max_restarts + 1}, on {names}")
        raise RetriesExhausted(
            f"{self.world.max_restarts + 1} attempts failed; the last failure is shown above",
            where=self.folder,
            fix="see to its cause; the same command goes on from the newest checkpoint",
        )

    def _attempt(self) -> AttemptEnd:
        """Start the ranks once; a job of this machine alone needs no guard."""
        if len(self.hosts) > 1 or not is_local(self.hosts[0].name):
            file = self.folder / "launch.yaml"  # one text for all: their checkouts may differ
            write_text(file, dump_config(self.config))
            return run_attempt(
                self.hosts, [str(file)], self.world, self.folder / "logs", self.caught, self._gone
            )
        try:
            launch_ranks(
                self.hosts[0].slots,
                self.argv,
                threads=self.world.threads,
                timeout=self.world.timeout_seconds,
                gone=self._gone,
            )
        except ShoalError as error:
            return AttemptEnd(error)
        return AttemptEnd(None)

    def _gather(self, end: AttemptEnd) -> None:
        """Wait until nothing of the last attempt can be alive; keep the machines that answer."""
        if end.cut_off:
            self._say("waiting until what is cut off has ended by itself")
        deadline = time.monotonic() + (GONE_SECONDS if end.cut_off else 0.0)
        while not self.caught and time.monotonic() < deadline and not self._gone():
            time.sleep(0.2)
        if not self.caught and not self._gone():
            self.hosts = find_reachable(self.hosts, self.world.min_hosts, self.folder)
        if self.caught or self._gone():
            if newest_checkpoint(self.folder):
                raise StoppedOnRequest(
                    "stopped on request between two attempts",
                    where=self.folder,
                    fix="run the same command again to continue",
                )
            raise interrupted(self.caught[0] if self.caught else signal.SIGTERM)

    def _gone(self) -> bool:
        """Whether one of the processes that want this job has ended."""
        alive = [descriptor for descriptor in self.watched if descriptor is not None]
        return len(alive) < len(self.watched) or bool(alive and any_gone(alive))

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
