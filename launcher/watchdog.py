"""The watchdog of a rank: ends it, with its stacks and a word, when it makes no progress.

A collective that waits for a rank that hangs has no end of its own (gloo) or a silent one; here
every rank of a stalled job ends by itself and says how far it was. The one that hangs is the one
that was least far, or that says nothing at all (`endings.raise_failure`).
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from shoal.configs.errors import HangError, NotMetError

EXIT_CODE = 1
WHY_NOT_MET = (
    "let TCP through between the hosts on all ports above 1023 (a firewall drops it), or name the "
    "interface that leads to the others: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
)


class Watchdog:
    """Watches from `with` to its end; every `touch` is progress."""

    def __init__(
        self,
        report: Callable[[HangError, int], None] | None = None,
        mark: Callable[[str], None] = lambda state: None,
    ) -> None:
        """Tell `report` of a hang (the error, and how often this rank made progress), `mark` of
        `meeting` and `met`, when this rank looks for the others and when it has found them.
        """
        self.limit = float("inf")
        """Seconds without progress that are too long."""
        self._key = "world.timeout_seconds"
        """Of the config: what to raise for a longer limit."""
        self._report, self._mark = report, mark
        self._count, self._doing, self._touched = 0, "starting", time.monotonic()
        self._longest = 0.0
        self._over = threading.Event()

    def touch(self, doing: str) -> None:
        """Note progress, and what comes now."""
        before, self._touched = self._touched, time.monotonic()
        self._count, self._doing = self._count + 1, doing
        self._longest = max(self._longest, self._touched - before)

    def hurry(self, seconds: float) -> None:
        """Wait from now on only for `seconds` more than any progress has taken so far.

        Of a job that is to stop: who saves gets further, and for a rank that hangs nobody waits.
        """
        if seconds + self._longest < self.limit:
            self.limit, self._key = seconds + self._longest, "world.save_seconds"

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Find the other ranks.

        Raises:
            NotMetError: they could not be reached, or did not come in time.
        """
        self._mark("meeting")
        try:
            yield
        except RuntimeError as error:  # of torch, in many words
            where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            why = str(error).strip().splitlines()[:1]
            raise NotMetError(
                f"the ranks did not find each other: {' '.join(why)}", where=where, fix=WHY_NOT_MET
            ) from error
        self._mark("met")

    def __enter__(self) -> Watchdog:
        self._touched = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.limit / 10)):
            if time.monotonic() - self._touched > self.limit:
                self._bark()

    def _bark(self) -> None:
        """End this rank; nothing in it can be waited for any more."""
        faulthandler.dump_traceback(sys.stderr)
        error = HangError(
            f"no progress for {self.limit:.0f} s while {self._doing}",
            fix="the stacks above say where its ranks stood; if that was work and no fault, raise "
            f"{self._key}",
        )
        try:
            if self._report:
                self._report(error, self._count)
            sys.stderr.flush()
        finally:
            os._exit(EXIT_CODE)
