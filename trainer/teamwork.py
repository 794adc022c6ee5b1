"""Work that takes long on some ranks: the others wait, see that it moves, and learn of errors.

A rank that waited inside one collective could not be told from one that hangs (launcher.watchdog).
"""

from __future__ import annotations

import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shoal.configs.errors import ShoalError, explain_machine_error

Result = TypeVar("Result")
Progress = Callable[[str], None]
Tick = Callable[[], None]
LOOK_SECONDS = 0.05


def do_together(
    work: Callable[[Tick], Result], doing: str, progress: Progress, device: torch.device
) -> Result:
    """Do this rank's part of a work aside; return its result when all ranks have done theirs.

    Collective. `progress` is told `doing` on every rank for as long as any rank gets further.

    Args:
        work: Calls what it is given whenever it has got further.
        doing: What it is.
        progress: Of the watchdog.
        device: Of the ranks' collectives.

    Raises:
        Exception: what was raised by the work of the first rank that failed; on all ranks.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    ticks = [0]

    def tick() -> None:
        ticks[0] += 1

    def run() -> None:
        try:
            results.append(work(tick))
        except BaseException as error:  # raised below, on every rank
            errors.append(error)

    thread = threading.Thread(target=run, name=doing)
    thread.start()
    _wait_for_all(thread, ticks, lambda: progress(doing), device)
    raise_together(errors[0] if errors else None)
    return results[0]


def _wait_for_all(
    thread: threading.Thread, ticks: Sequence[int], tell: Tick, device: torch.device
) -> None:
    """Wait until no rank's thread is at work any more; `tell` whenever any got further."""
    last, busy = -1, True
    while busy:
        thread.join(LOOK_SECONDS)
        state = torch.tensor([int(thread.is_alive()), ticks[0]], device=device)
        dist.all_reduce(state)
        busy = bool(state[0])
        if int(state[1]) != last:
            last = int(state[1])
            tell()


def raise_together(error: BaseException | None) -> None:
    """Raise on all ranks what has befallen the first of them, if anything; collective.

    Raises:
        ShoalError: it names the rank and host (`origin`) it came from.
        RuntimeError: on the others, of an error that is not deliberate; holds its traceback.
    """
    for rank, found in enumerate(gather(_make_portable(error))):
        if found is None:
            continue
        if rank == dist.get_rank() and error is not None and not isinstance(found, ShoalError):
            raise error
        raise found


def _make_portable(error: BaseException | None) -> Exception | None:
    """Return an error as other ranks can have it: not every class can be sent."""
    if error is None:
        return None
    origin = f"rank {dist.get_rank()} on {socket.gethostname()}"
    known = error if isinstance(error, ShoalError) else explain_machine_error(error)
    if known is None:
        trace = "".join(traceback.format_exception(error))
        return RuntimeError(f"{origin} failed:\n{trace}")
    known.origin = known.origin or origin
    return known


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks; collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
