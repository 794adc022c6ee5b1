"""What other machines say of themselves before, and between, the attempts of a job."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shoal.configs.errors import PreflightError
from shoal.launcher.commands import Way, ask_command
from shoal.launcher.fanout import START_SECONDS
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.inspection import describe_installation
from shoal.launcher.refusals import Refusal, explain_refusal


def find_reachable(hosts: Sequence[Host], way: Way, least: int, run: Path) -> list[Host]:
    """Return the machines that answer; all of them where nothing but a guard can be asked.

    Raises:
        PreflightError: fewer than the job is to have.
    """
    problems = greet(hosts, way, run)
    found = [host for host in hosts if host.name not in problems]
    if len(found) < least:
        raise PreflightError(
            f"{len(found)} of {len(hosts)} hosts answer, {least} are needed; "
            + "; ".join(f"{name}: {problem}" for name, problem in problems.items()),
            fix="bring them back, or lower world.min_hosts; the same command goes on from the "
            "newest checkpoint",
        )
    return found


def greet(hosts: Sequence[Host], way: Way, run: Path) -> dict[str, str]:
    """Ask the other machines who they are; return what is wrong, by name.

    `run` gets a file for a moment, which a machine that shares the folder sees.
    """
    others = [host for host in hosts if not is_local(host.name)]
    if not others or way == "none":
        return {}
    run.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.NamedTemporaryFile(prefix=".greeting-", dir=run) as token,
        ThreadPoolExecutor(len(others)) as pool,
    ):
        answers = pool.map(lambda host: _greet(host, way, Path(token.name)), others)
        return {h.name: problem for h, problem in zip(others, answers, strict=True) if problem}


def is_guard_gone(name: str, way: Way, pid: int) -> bool:
    """Return whether a machine answers, and the guard that had this process id there is gone."""
    try:
        return pid not in ask_host(name, way, "--greet", "/", str(pid))["guards"]
    except NoAnswerError:
        return False


class NoAnswerError(Exception):
    """A machine gave no answer; the text says what came instead, `refusal` what that means."""

    def __init__(self, text: str, refusal: Refusal | None = None) -> None:
        super().__init__(text)
        self.refusal = refusal


def ask_host(name: str, way: Way, *words: str, seconds: float = START_SECONDS) -> dict[str, Any]:
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
        theirs = ask_host(host.name, way, "--greet", str(token.absolute()))
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
