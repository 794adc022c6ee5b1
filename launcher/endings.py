"""How the ranks of a job ended, and the one error that tells why."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shoal.configs.errors import HangError, NotMetError, ShoalError, StoppedOnRequest
from shoal.launcher.outcomes import Outcome

WAITED = (HangError.__name__, NotMetError.__name__)
"""What ranks say that waited for others in vain."""


class Interrupted(ShoalError):
    """A signal ended the job before there was anything to save; exits with 128 + signal."""


@dataclass
class Ending:
    """How the ranks of one machine ended, or of several, put together."""

    ranks: list[int] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    exit_codes: dict[int, int] = field(default_factory=dict)
    ended_by_us: set[int] = field(default_factory=set)
    signal: int | None = None
    """The signal that asked them to stop."""
    hosts: dict[int, str] = field(default_factory=dict)
    """Rank -> the machine it ran on; this one where absent."""


def raise_failure(ending: Ending, lost: ShoalError | None = None) -> None:
    """Raise what the job ended with; nothing if every rank finished its work.

    A deliberate error comes before a stop that saved nothing, that before the loss of a machine
    (`lost`), that before a rank that hangs or was killed, and that before ranks that did not find
    others, and errors with a traceback: those of ranks that lost their peer.
    """
    outcomes, exit_codes = ending.outcomes, ending.exit_codes
    failures = sorted(  # the earliest counts, as far as the machines' clocks agree
        (o for o in outcomes.values() if o.is_failure),
        key=lambda o: (bool(o.trace), o.kind in WAITED, o.kind == HangError.__name__, o.ended),
    )
    silent = [rank for rank in ending.ranks if rank not in outcomes]
    stops = [o for o in outcomes.values() if o.kind == StoppedOnRequest.__name__]
    if ending.signal and stops:
        raise stops[0].to_error()
    if failures and not failures[0].trace and failures[0].kind not in WAITED:
        raise failures[0].to_error()
    hung = [o for o in failures if o.kind == HangError.__name__]
    if ending.signal and (silent or failures or lost):
        error = interrupted(ending.signal)
        if hung:  # nobody could save because of it
            error.add_note(str(_explain_hang(hung, silent, ending)))
        raise error
    if lost:
        raise lost
    if hung:
        raise _explain_hang(hung, silent, ending)
    silent = [rank for rank in silent if rank not in ending.ended_by_us] or silent
    for rank in silent:
        code = exit_codes.get(rank, 0)
        if code < 0 and code != -signal.SIGTERM and rank not in ending.ended_by_us:
            raise _explain_silence(rank, code, ending)
    if failures and failures[0].kind == NotMetError.__name__:
        raise _explain_not_met(failures, silent, ending)
    if failures or stops:
        raise (failures or stops)[0].to_error()
    if silent:  # the agent itself ends the peers of a failed rank, with SIGTERM
        first = min(silent, key=lambda rank: exit_codes.get(rank, 0) in (0, -signal.SIGTERM))
        raise _explain_silence(first, exit_codes.get(first), ending)
    if ending.signal:  # the caller may have more to do, and was asked not to
        raise StoppedOnRequest("stopped on request; what was running is finished and saved")


def interrupted(number: int) -> Interrupted:
    """Return the error of a job that a signal ended before anything was saved."""
    error = Interrupted(
        f"stopped by {signal.Signals(number).name} before a checkpoint could be saved",
        fix="run the same command again: it goes on from the newest checkpoint there is",
    )
    error.exit_code = 128 + number
    return error


def _explain_hang(hung: Sequence[Outcome], silent: Sequence[int], ending: Ending) -> ShoalError:
    """Return the error for ranks that wait for one that is stuck, and name that one."""
    least = min(hung, key=lambda outcome: outcome.progress)
    if silent:  # those ended by themselves; this one could not even do that
        where = ending.hosts.get(silent[0], socket.gethostname())
        error = HangError(
            f"rank {silent[0]} stands still (stopped, or stuck in a call): {least.cause}",
            fix=least.fix,
        )
        error.add_note(f"failed first: rank {silent[0]} on {where}")
        return error
    if all(outcome.progress == least.progress for outcome in hung):
        least = replace(least, cause=f"every rank: {least.cause}")
    return least.to_error()


def _explain_not_met(
    failures: Sequence[Outcome], silent: Sequence[int], ending: Ending
) -> ShoalError:
    """Return the error for ranks that did not find the others: where they are, and who is silent.

    Those that look in vain say so; who says nothing may be the one that stands still.
    """
    alone = [outcome for outcome in failures if outcome.kind == NotMetError.__name__]
    hosts = dict.fromkeys(ending.hosts.get(outcome.rank, outcome.host) for outcome in alone)
    error = alone[0].to_error()
    error.where = f"{', '.join(hosts)}, at {error.where}"
    if silent:
        places = [f"{rank} on {ending.hosts.get(rank, socket.gethostname())}" for rank in silent]
        error.add_note(f"not a word of rank {', '.join(places)}: stopped, or stuck in a call?")
    return error


def _explain_silence(rank: int, code: int | None, ending: Ending) -> ShoalError:
    """Return the error for a rank that ended without a word."""
    fix = "the lines above, if any, are the rank's own last words"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            fix = (
                "most likely memory ran out (`dmesg` tells): train.activation_checkpointing=true, "
                "or a lower train.micro_batch_rows (under another name= for a mixture of experts "
                "or with dropout, where the result depends on it)"
            )
    else:
        how = f"ended without a word (exit code {code})"
    error = ShoalError(f"rank {rank} {how}", fix=fix)
    error.add_note(f"failed first: rank {rank} on {ending.hosts.get(rank, socket.gethostname())}")
    return error
