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
from shoal.launcher.fanout import SSH, START_SECONDS, remote_command
from shoal.launcher.guard import describe_installation
from shoal.launcher.hosts import Host, is_local


def find_reachable(hosts: Sequence[Host], least: int, run: Path) -> list[Host]:
    """Return the machines that answer.

    Raises:
        PreflightError: fewer than the job is to have.
    """
    problems = greet(hosts, run)
    found = [host for host in hosts if host.name not in problems]
    if len(found) < least:
        raise PreflightError(
            f"{len(found)} of {len(hosts)} hosts answer, {least} are needed; "
            + "; ".join(f"{name}: {problem}" for name, problem in problems.items()),
            fix="bring them back, or lower world.min_hosts; the same command goes on from the "
            "newest checkpoint",
        )
    return found


def check_all_answer(hosts: Sequence[Host], least: int, run: Path) -> None:
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
    problems = greet(hosts, run)
    if problems:
        name = next(iter(problems))
        others = f" ({len(problems) - 1} more: {', '.join([*problems][1:])})"
        raise PreflightError(
            problems[name] + (others if len(problems) > 1 else ""),
            where=name,
            fix=f"`ssh -o BatchMode=yes {name} true` must work from here, and this folder, the run "
            f"folder and {sys.executable} must be there too, with the same packages",
        )


def greet(hosts: Sequence[Host], run: Path) -> dict[str, str]:
    """Ask the other machines who they are; return what is wrong, by name.

    `run` gets a file for a moment, which a machine that shares the folder sees.
    """
    others = [host for host in hosts if not is_local(host.name)]
    if not others:
        return {}
    run.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.NamedTemporaryFile(prefix=".greeting-", dir=run) as token,
        ThreadPoolExecutor(len(others)) as pool,
    ):
        answers = pool.map(lambda host: _greet(host, Path(token.name)), others)
        return {h.name: problem for h, problem in zip(others, answers, strict=True) if problem}


def is_guard_gone(name: str, pid: int) -> bool:
    """Return whether a machine answers, and the guard that had this process id there is gone."""
    try:
        return pid not in _ask(name, "--greet", "/", str(pid))["guards"]
    except _NoAnswerError:
        return False


class _NoAnswerError(Exception):
    """A machine gave no answer; the text says what came instead."""


def _ask(name: str, *words: str) -> dict[str, Any]:
    """Return what a machine says of itself."""
    command = [*SSH, "--", name, remote_command(Path.cwd(), *words)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=START_SECONDS, check=False,
            start_new_session=True,  # Ctrl-C is for us: an ssh that it ends is no lost machine
        )  # fmt: skip
    except FileNotFoundError:
        raise PreflightError("there is no ssh here", fix="install an ssh client") from None
    except subprocess.TimeoutExpired:
        raise _NoAnswerError(f"did not answer within {START_SECONDS:.0f} s") from None
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        words_of_ssh = done.stderr.strip().splitlines()[-1:] or ["no answer"]
        raise _NoAnswerError(f"{words_of_ssh[0]} (exit code {done.returncode})") from None


def _greet(host: Host, token: Path) -> str | None:
    try:
        theirs = _ask(host.name, "--greet", str(token.absolute()))
    except _NoAnswerError as error:
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
