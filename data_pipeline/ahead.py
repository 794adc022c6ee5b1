"""Reading ahead: a thread prepares the next steps while the present one is computed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Tick = Callable[[], None]

CLOSE_SECONDS = 5.0


class ReadingStopped(Exception):
    """Nobody waits any more for what was being read."""


class ReadAhead(Generic[Item]):
    """Results of a function of the step, begun before they are asked for.

    An error is kept and raised by the call for its step, and by no other. Steps are expected in
    order; whoever asks for another one waits for that, and the thread goes on from there.

    Args:
        read: Returns the result of a step; calls what it is given now and then, which ends it by an
            error once this is closed.
        steps: How many are prepared beyond the present one.
        end: The first step that is not prepared unless it is asked for; None: there is none.
    """

    def __init__(
        self, read: Callable[[int, Tick], Item], steps: int, end: int | None = None
    ) -> None:
        self._read, self._steps, self._end = read, steps, end
        self._wake = threading.Condition()
        self._ready: dict[int, Future[Item]] = {}
        self._closed = False
        self._thread: threading.Thread | None = None

    def get(self, step: int) -> Item:
        """Return the result of a step, or raise its error.

        Raises:
            RuntimeError: closed already.
        """
        with self._wake:
            if self._closed:
                raise RuntimeError("reading ahead was closed")
            last = step + self._steps
            if self._end is not None:
                last = max(step, min(last, self._end - 1))
            wanted = range(step, last + 1)
            # A future that is being worked on and no longer wanted finishes, for nobody.
            self._ready = {n: future for n, future in self._ready.items() if n in wanted}
            for number in wanted:
                self._ready.setdefault(number, Future())
            future = self._ready[step]
            self._wake.notify()
        if self._thread is None:
            # Daemon: a read that hangs must not keep a process from ending.
            self._thread = threading.Thread(target=self._work, name="shoal-ahead", daemon=True)
            self._thread.start()
        return future.result()

    def close(self) -> None:
        """Stop; waits a little for the shard that is being read, and no longer."""
        with self._wake:
            self._closed = True
            self._ready.clear()
            self._wake.notify()
        if self._thread:
            self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        while True:
            with self._wake:
                while (found := self._choose()) is None:
                    if self._closed:
                        return
                    self._wake.wait()
            number, future = found
            try:
                future.set_result(self._read(number, self._check_open))
            except BaseException as error:
                future.set_exception(error)

    def _check_open(self) -> None:
        if self._closed:
            raise ReadingStopped

    def _choose(self) -> tuple[int, Future[Item]] | None:
        """Return the next step that is not begun, and take it."""
        for number, future in sorted(self._ready.items()):
            if not (future.running() or future.done()):
                future.set_running_or_notify_cancel()
                return number, future
        return None
