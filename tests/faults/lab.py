"""Machines for a job, seen and disturbed from outside it: this one, or hosts of network namespaces.

A host of a lab has its own processes, network, sshd, /dev/shm and temporary folder, and shares the
rest of the disk. `netlab.sh` makes them; all of them are gone with the process that asked for them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import psutil

NETLAB = Path(__file__).with_name("netlab.sh")
# What is started from a shell's background ignores some, and so would all that it starts.
LISTENING = ("env", "--default-signal=INT,TERM,HUP")
SHARED_MEMORY = Path("/dev/shm")
CACHES = ("torchinductor_",)
"""Folders that torch keeps for its next start, whichever job that is."""


class Unavailable(RuntimeError):
    """There can be no namespaces here; says why."""


class Host(Protocol):
    """A machine on which a part of a job runs."""

    name: str

    def start(
        self, command: Sequence[str], folder: Path, output: Path, env: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command of ours in `folder`; its output is appended to a file."""

    def processes(self) -> list[psutil.Process]:
        """Return what runs on it of the job."""

    def leftovers(self) -> list[str]:
        """Return what lies in its shared memory and temporary folder."""


class ThisMachine:
    """Where all ranks run beside us; what belongs to the job is told by its folder."""

    name = "localhost"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / "tmp"  # other jobs of this machine have the usual one
        self._shared_before = set(_list_folder(SHARED_MEMORY))

    def start(
        self, command: Sequence[str], folder: Path, output: Path, env: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own."""
        self.scratch.mkdir(exist_ok=True)
        environment = {**os.environ, **env, "TMPDIR": str(self.scratch)}
        with output.open("a") as file:
            return subprocess.Popen(
                [*LISTENING, *command], cwd=folder, stdout=file, stderr=file, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Return what has the job's folder as its own."""
        return find_processes("cwd", str(self.folder))

    def leftovers(self) -> list[str]:
        """Return what is there, of shared memory only what is new and in nobody's use."""
        new = set(_list_folder(SHARED_MEMORY)) - self._shared_before
        used = _mapped_files() if new else set()
        return sorted(new - used) + _list_folder(self.scratch)


class LabHost:
    """One host of a lab. Process ids are those of outside; a signal needs no ssh."""

    def __init__(self, name: str, sshd: psutil.Process) -> None:
        self.name, self.sshd = name, sshd
        self.space = str(Path(f"/proc/{sshd.pid}/ns/pid").readlink())
        self._lab = str(sshd.parents()[1].pid)
        self._end = f"v{name.removeprefix('n')}"
        self._before = {process.pid for process in find_processes("ns/pid", self.space)}

    def start(
        self, command: Sequence[str], folder: Path, output: Path, env: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command there; what is returned is what entered, and ends as it ends."""
        environment = {**os.environ, **env, "TMPDIR": "/run/tmp"}
        enter = ["nsenter", "-t", str(self.sshd.pid), "-a", f"--wdns={folder}", *LISTENING]
        with output.open("a") as file:
            return subprocess.Popen(
                [*enter, *command], cwd=folder, stdout=file, stderr=file, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Return all that runs there and did not when it was made, but for what is sshd's own.

        A session of sshd whose link was cut waits for its client as long as TCP does.
        """
        found = []
        for process in find_processes("ns/pid", self.space):
            with contextlib.suppress(psutil.Error):
                if process.pid not in self._before and process.name() != "sshd":
                    found.append(process)
        return found

    def leftovers(self) -> list[str]:
        """Return what is there."""
        root = f"/proc/{self.sshd.pid}/root"
        return _list_folder(Path(root + "/dev/shm")) + _list_folder(Path(root + "/run/tmp"))

    def cut(self) -> None:
        """Take its network away, as one who pulls the cable."""
        self._set_link("down")

    def mend(self) -> None:
        """Give its network back."""
        self._set_link("up")

    def lose(self) -> None:
        """Let it go as by a loss of power: no last word leaves it, and nothing runs there."""
        self.cut()
        for process in find_processes("ns/pid", self.space):
            if process.pid not in self._before:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def clear(self) -> None:
        """Empty its memory and temporary folder, as a start of the machine does."""
        root = f"/proc/{self.sshd.pid}/root"
        for folder in ("/dev/shm", "/run/tmp"):
            subprocess.run(["find", root + folder, "-mindepth", "1", "-delete"], check=True)

    def _set_link(self, state: str) -> None:
        enter = ["nsenter", "-t", self._lab, "-n"]
        subprocess.run([*enter, "ip", "link", "set", self._end, state], check=True)


def why_not() -> str | None:
    """Return why there can be no lab here; None where there can."""
    done = subprocess.run([NETLAB, "0"], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None


@contextlib.contextmanager
def open_lab(count: int) -> Iterator[list[LabHost]]:
    """Give hosts n1, n2, ... which reach each other by ssh.

    Raises:
        Unavailable: there can be none here.
    """
    if reason := why_not():
        raise Unavailable(reason)
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        # --pdeathsig: nothing of it outlives this process, however that ends.
        netlab = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", str(NETLAB), str(count),
             "sh", "-c", "echo ready; exec sleep infinity"],
            env={**os.environ, "TMPDIR": folder}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert netlab.stdout is not None and netlab.stderr is not None
            if not netlab.stdout.readline():
                raise RuntimeError(netlab.stderr.read().decode())
            yield [LabHost(name, sshd) for name, sshd in sorted(_find_daemons(netlab.pid))]
        finally:
            netlab.send_signal(signal.SIGTERM)
            netlab.communicate()


def _find_daemons(netlab: int) -> Iterator[tuple[str, psutil.Process]]:
    """Yield (name of the host, its first process, which is its sshd)."""
    for process in psutil.Process(netlab).children(recursive=True):
        command = process.cmdline()
        if command[:1] == ["sshd:"] or "/usr/sbin/sshd -D" in " ".join(command):
            enter = ["nsenter", "-t", str(process.pid), "-u", "hostname"]
            yield subprocess.check_output(enter, text=True).strip(), process


def find_processes(link: str, target: str) -> list[psutil.Process]:
    """Return the processes of which a link in /proc leads to a target; zombies have none."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            if str(Path(f"/proc/{pid}/{link}").readlink()) == target:
                found.append(psutil.Process(pid))
    return found


def _list_folder(folder: Path) -> list[str]:
    found = folder.iterdir() if folder.is_dir() else ()
    return [str(entry) for entry in found if not entry.name.startswith(CACHES)]


def _mapped_files() -> set[str]:
    """Return the files that some process has mapped into its memory."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            found |= {mapped.path for mapped in process.memory_maps()}
    return found
