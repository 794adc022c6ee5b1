"""Worker processes that cannot outlive their parent, fed no faster than they work."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Self

from shoal.configs.errors import PreflightError

_PR_SET_PDEATHSIG = 1


class Pool:
    """Calls a function for many tasks in several processes; one process means in this one."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[..., Any], tasks: Iterable[tuple]) -> Iterator[Any]:
        """Yield `function(*task)` in the order of the tasks, a few of them ahead.

        Raises:
            PreflightError: a worker was killed, as when memory runs out.
        """
        if self.processes == 1:
            for task in tasks:
                yield function(*task)
            return
        waiting: deque[Future] = deque()
        try:
            for task in tasks:
                waiting.append(self._start().submit(function, *task))
                if len(waiting) > 2 * self.processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise PreflightError(
                "a worker process ended abruptly; most often memory ran out",
                fix="run the same command again with a smaller processes=: what is done is kept",
            ) from None

    def _start(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self.processes,
                # Not fork: the parent may hold threads and locks of torch and tokenizers.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(os.getpid(),),
            )
        return self._executor


def _begin(parent: int) -> None:
    """Set a worker up: one thread, and the end of the parent is its own."""
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def choose_processes(asked: int | str, source_bytes: int | None) -> int:
    """Return the number of workers; small corpora are done before workers have started.

    Args:
        asked: A number, or `auto`.
        source_bytes: Size of the corpus on disk; None where that is unknown.
    """
    if isinstance(asked, int):
        return asked
    if source_bytes is not None and source_bytes < 16_000_000:
        return 1
    return len(os.sched_getaffinity(0))
