"""The errors Shoal raises on purpose, each with the exit code its command ends with.

An error says what is wrong (`cause`), where (`where`: a file, key or host) and what to do (`fix`).
Commands print exactly that and exit; anything else that escapes is a bug and exits 1.
"""

from __future__ import annotations

import errno
import os


class ShoalError(Exception):
    """Base of every deliberate error; `exit_code` is what the process returns."""

    exit_code = 1
    origin: str | None = None
    """Rank and host it came from, where other ranks raise it as well."""

    def __init__(self, cause: str, *, where: object = None, fix: str | None = None) -> None:
        self.cause = cause
        self.where = None if where is None else str(where)
        self.fix = fix
        super().__init__(cause)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f"\n  fix: {self.fix}" if self.fix else ""
        return f"{place}{self.cause}{remedy}"

    def __reduce__(self) -> tuple:
        """Keep the keyword fields when an error crosses a process border."""
        return _rebuild, (type(self), self.cause, self.where, self.fix, self.origin)


def _rebuild(
    kind: type[ShoalError], cause: str, where: str | None, fix: str | None, origin: str | None
) -> ShoalError:
    error = kind(cause, where=where, fix=fix)
    error.origin = origin
    return error


class ConfigError(ShoalError):
    """Usage or configuration: found before anything starts."""

    exit_code = 2


class DataError(ShoalError):
    """Corpus, shards, tokenizer, checkpoint or export that is missing, broken or altered."""

    exit_code = 3


class PreflightError(ShoalError):
    """The machine or a host cannot run this: library absent, port taken, disk too small."""

    exit_code = 4


MACHINE_ERRORS = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some of your quota, or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "check who owns it",
    errno.EPERM: "check who owns it",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
}


def explain_machine_error(error: BaseException) -> PreflightError | None:
    """Return what a full disk, a missing permission or the like means; None for other errors.

    Libraries that write files in other languages raise classes of their own: those are told by
    the operating system's words in their text.
    """
    if isinstance(error, ShoalError):
        return None
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        text = str(error)
        number = next((n for n in MACHINE_ERRORS if f"(os error {n})" in text), None)
    if number not in MACHINE_ERRORS:
        return None
    where = getattr(error, "filename", None)
    cause = os.strerror(number) if where else str(error)
    return PreflightError(cause, where=where, fix=MACHINE_ERRORS[number])


class NonFiniteLossError(ShoalError):
    """No step can be taken any more: losses or gradients are no numbers, or far off their past."""


class StoppedOnRequest(ShoalError):
    """A signal asked the run to stop; a checkpoint is saved, start it again to go on."""

    exit_code = 5


class ReplicaError(ShoalError):
    """Ranks that must hold the same weights do not: memory or a device has altered them."""


class NotMetError(ShoalError):
    """Ranks that are there did not find each other."""

    exit_code = 4


class HangError(ShoalError):
    """A rank made no progress for longer than any work takes."""


class RetriesExhausted(ShoalError):
    """Every allowed attempt failed."""

    exit_code = 6
