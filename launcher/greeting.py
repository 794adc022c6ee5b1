"""What other machines say of themselves before, and between, the attempts of a job."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shoal.configs.errors import ConfigError, PreflightError
from shoal.launcher.commands import Way, ask_command
from shoal.launcher.fanout import START_SECONDS
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.inspection import describe_installation


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


def check_all_answer(hosts: Sequence[Host], way: Way, least: int, run: Path) -> None:
    """Refuse to begin on fewer machines than were asked for, or on ones that differ.

    Raises:
        ConfigError: more are asked for than are named.
        PreflightError: a machine does not answer, has other versions, or other files.
    """
    if len(hosts) < least:
        raise ConfigError(
            f"{least} hosts are to be left at least, and {len(hosts)} are named",
            where="world.min_hosts",
        )
    problems = greet(hosts, way, run)
    if problems:
        name = next(iter(problems))
        others = f" ({len(problems) - 1} more: {', '.join([*problems][1:])})"
        raise PreflightError(
            problems[name] + (others if len(problems) > 1 else ""),
            where=name,
            fix=f"`ssh -o BatchMode=yes {name} true` must work from here, and this folder, the run "
            f"folder and {sys.executable} must be there too, with the same packages",
        )


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
    """A machine gave no answer; the text says what came instead."""


def ask_host(name: str, way: Way, *words: str) -> dict[str, Any]:
    """Return what a machine says of itself.

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
            timeout=START_SECONDS, check=False,
            start_new_session=True,  # Ctrl-C is for us: an ssh that it ends is no lost machine
        )  # fmt: skip
    except FileNotFoundError:
        raise PreflightError(f"there is no {command[0]} here", fix="install it") from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"did not answer within {START_SECONDS:.0f} s") from None
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        words_of_ssh = done.stderr.strip().splitlines()[-1:] or ["no answer"]
        raise NoAnswerError(f"{words_of_ssh[0]} (exit code {done.returncode})") from None


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
