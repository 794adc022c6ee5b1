"""What other machines say of themselves before, and between, the attempts of a job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.configs.errors import PreflightError
from shoal.launcher.commands import Way, ask_command
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.inspection import describe_installation
from shoal.launcher.refusals import Refusal, explain_refusal

LOOK_SECONDS = 0.5
GREET_SECONDS = 30.0
"""What a machine may take to say who it is, between attempts: it has done so before."""


def find_reachable(
    hosts: Sequence[Host],
    way: Way,
    least: int,
    run: Path | None,
    lost: Collection[str] = (),
    called_off: Callable[[], bool] = lambda: False,
) -> list[Host]:
    """Return the machines that answer; all of them where nothing but a guard can be asked.

    Args:
        hosts: All of the job.
        way: How they are asked.
        least: How many it is to have.
        run: The folder that they share, if they do.
        lost: Names of those that did not answer a moment ago.
        called_off: Whether nobody wants to know any more.

    Raises:
        PreflightError: fewer than the job is to have.
    """
    problems = dict.fromkeys(lost, "does not answer")
    problems |= greet([host for host in hosts if host.name not in lost], way, run, called_off)
    found = [host for host in hosts if host.name not in problems]
    if len(found) < least:
        raise PreflightError(
            f"{len(found)} of {len(hosts)} hosts answer, {least} are needed; "
            + "; ".join(f"{name}: {problem}" for name, problem in problems.items()),
            fix="bring them back, or lower world.min_hosts; the same command goes on from the "
            "newest checkpoint",
        )
    return found


def greet(
    hosts: Sequence[Host],
    way: Way,
    run: Path | None,
    called_off: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Ask the other machines who they are; return what is wrong, by name.

    `run` gets a file for a moment, which a machine that shares the folder sees.
    """
    others = [host for host in hosts if not is_local(host.name)]
    if not others or way == "none":
        return {}
    with _open_token(run) as token, ThreadPoolExecutor(len(others)) as pool:
        answers = pool.map(lambda host: _greet(host, way, token, called_off), others)
        return {h.name: problem for h, problem in zip(others, answers, strict=True) if problem}


@contextmanager
def _open_token(run: Path | None) -> Iterator[Path]:
    """Give a new file in a folder for a while; without one, what every machine sees."""
    if run is None:
        yield Path("/")
        return
    run.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".greeting-", dir=run) as file:
        yield Path(file.name)


def find_guards(
    pids: Mapping[str, int],
    way: Way,
    seconds: float,
    called_off: Callable[[], bool] = lambda: False,
) -> dict[str, bool]:
    """Return whether the guards that had these process ids still run, by name of their machine.

    All are asked side by side; those that do not answer in time are left out.
    """

    def ask(name: str) -> bool | None:
        try:
            words = ("--greet", "/", str(pids[name]))
            told = ask_host(name, way, *words, seconds=seconds, called_off=called_off)
            return pids[name] in told["guards"]
        except NoAnswerError:
            return None

    with ThreadPoolExecutor(len(pids)) as pool:
        answers = zip(pids, pool.map(ask, pids), strict=True)
        return {name: runs for name, runs in answers if runs is not None}


class NoAnswerError(Exception):
    """A machine gave no answer; the text says what came instead, `refusal` what that means."""

    def __init__(self, text: str, refusal: Refusal | None = None) -> None:
        super().__init__(text)
        self.refusal = refusal


def ask_host(
    name: str,
    way: Way,
    *words: str,
    seconds: float,
    called_off: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Return what a machine says of itself, within so many seconds.

    Raises:
        NoAnswerError: it says nothing, or not what was asked for, or nobody waits for it any more.
        PreflightError: what reaches it is not installed here.
    """
    command = ask_command(way, name, *words)
    if command is None:
        raise NoAnswerError("there is no way to ask it")
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us: an ssh that it ends is no lost machine
        )  # fmt: skip
    except FileNotFoundError:
        raise PreflightError(f"there is no {command[0]} here", fix="install it") from None
    with process:
        said = _hear_out(process, time.monotonic() + seconds, called_off)
    if said is None:
        text = f"did not answer within {seconds:.0f} s"
        raise NoAnswerError(text, explain_refusal(name, text, None))
    try:
        return dict(json.loads(said[0].splitlines()[-1]))
    except (ValueError, IndexError):
        refusal = explain_refusal(name, said[1], process.returncode)
        raise NoAnswerError(refusal.cause, refusal) from None


def _hear_out(
    process: subprocess.Popen[str], deadline: float, called_off: Callable[[], bool]
) -> tuple[str, str] | None:
    """Return what a process prints on both streams; None where that is late, and it is ended."""
    while True:
        try:
            return process.communicate(timeout=LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline or called_off():
                os.killpg(process.pid, signal.SIGKILL)  # a session of its own: pdsh has children
                process.communicate()
                return None


def _greet(host: Host, way: Way, token: Path, called_off: Callable[[], bool]) -> str | None:
    try:
        words = ("--greet", str(token.absolute()))
        theirs = ask_host(host.name, way, *words, seconds=GREET_SECONDS, called_off=called_off)
    except NoAnswerError as error:
        return str(error)
    if not theirs["sees"]:
        return f"does not share the run folder {token.parent}: no checkpoint would be whole"
    ours = describe_installation()
    return (
        "; ".join(
            f"{name} {theirs.get(name)}, here {version}"
            for name, version in ours.items()
            if theirs.get(name) != version
        )
        or None
    )
