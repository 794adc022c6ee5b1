"""What other machines say of themselves before, and between, the attempts of a job."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.configs.errors import PreflightError
from shoal.launcher.commands import Way, ask_command
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.inspection import describe_installation
from shoal.launcher.refusals import Refusal, explain_refusal

GREET_SECONDS = 30.0
"""What a machine may take to say who it is, between attempts: it has done so before."""


def find_reachable(
    hosts: Sequence[Host], way: Way, least: int, run: Path | None, lost: Collection[str] = ()
) -> list[Host]:
    """Return the machines that answer; all of them where nothing but a guard can be asked.

    Args:
        hosts: All of the job.
        way: How they are asked.
        least: How many it is to have.
        run: The folder that they share, if they do.
        lost: Names of those that did not answer a moment ago.

    Raises:
        PreflightError: fewer than the job is to have.
    """
    problems = dict.fromkeys(lost, "does not answer")
    problems |= greet([host for host in hosts if host.name not in lost], way, run)
    found = [host for host in hosts if host.name not in problems]
    if len(found) < least:
        raise PreflightError(
            f"{len(found)} of {len(hosts)} hosts answer, {least} are needed; "
            + "; ".join(f"{name}: {problem}" for name, problem in problems.items()),
            fix="bring them back, or lower world.min_hosts; the same command goes on from the "
            "newest checkpoint",
        )
    return found


def greet(hosts: Sequence[Host], way: Way, run: Path | None) -> dict[str, str]:
    """Ask the other machines who they are; return what is wrong, by name.

    `run` gets a file for a moment, which a machine that shares the folder sees.
    """
    others = [host for host in hosts if not is_local(host.name)]
    if not others or way == "none":
        return {}
    with _open_token(run) as token, ThreadPoolExecutor(len(others)) as pool:
        answers = pool.map(lambda host: _greet(host, way, token), others)
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


def find_guards(pids: Mapping[str, int], way: Way, seconds: float) -> dict[str, bool]:
    """Return whether the guards that had these process ids still run, by name of their machine.

    All are asked side by side; those that do not answer in time are left out.
    """

    def ask(name: str) -> bool | None:
        try:
            words = ("--greet", "/", str(pids[name]))
            return pids[name] in ask_host(name, way, *words, seconds=seconds)["guards"]
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


def ask_host(name: str, way: Way, *words: str, seconds: float) -> dict[str, Any]:
    """Return what a machine says of itself, within so many seconds.

    Raises:
        NoAnswerError: it says nothing, or not what was asked for.
        PreflightError: what reaches it is not installed here.
    """
    command = ask_command(way, name, *words)
    if command is None:
        raise NoAnswerError("there is no way to ask it")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=seconds, check=False,
            start_new_session=True,  # Ctrl-C is for us: an ssh that it ends is no lost machine
        )  # fmt: skip
    except FileNotFoundError:
        raise PreflightError(f"there is no {command[0]} here", fix="install it") from None
    except subprocess.TimeoutExpired:
        text = f"did not answer within {seconds:.0f} s"
        raise NoAnswerError(text, explain_refusal(name, text, None)) from None
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        refusal = explain_refusal(name, done.stderr, done.returncode)
        raise NoAnswerError(refusal.cause, refusal) from None


def _greet(host: Host, way: Way, token: Path) -> str | None:
    try:
        words = ("--greet", str(token.absolute()))
        theirs = ask_host(host.name, way, *words, seconds=GREET_SECONDS)
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
