"""The guard of one machine: starts its ranks, and ends them when its launcher is gone or says so.

Runs as `python -m shoal.launcher.guard`, by ssh or beside the launcher, or calls it (`calls`), and
speaks JSON lines: on standard input first a `Task`, then words (`port N`, `beat`, `stop`, `kill`);
on the control descriptor that it has started, the port it holds (first machine only), a word for
each beat, how many of its ranks have met the others, then how it ended. Whatever the ranks print
goes to standard error, so that ssh keeps the two apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from shoal.configs.errors import NotMetError, PreflightError
from shoal.launcher.calls import Call
from shoal.launcher.endings import Ending
from shoal.launcher.hosts import is_loopback
from shoal.launcher.inspection import answer, describe_installation
from shoal.launcher.outcomes import Outcome, describe
from shoal.launcher.output import drop_old_logs
from shoal.launcher.processes import (
    ALONE,
    INTERFACE_VARIABLES,
    LOOPBACK,
    Advice,
    Place,
    run_ranks,
)
from shoal.launcher.watchdog import WHY_NOT_MET
from shoal.launcher.world import caught_signals
from shoal.trainer.storage import write_text

SILENCE_SECONDS = 30.0
"""When the launcher has had no word of ours for so long, it or the way to it is lost."""
REACH_SECONDS = 20.0
"""How long the first machine may take to answer another one."""
AGENT_SECONDS = 5.0
"""What torchrun's agent gets to notice that its ranks were killed."""


@dataclass(frozen=True)
class Task:
    """What a guard is to do; one line of JSON, so that nothing of it stands in a command line."""

    argv: list[str]
    ranks: int
    first_rank: int
    host: int
    num_hosts: int
    address: str
    """Name of the first machine, as the hostfile gives it."""
    name: str = ""
    """Of this machine, likewise."""
    logs: str | None = None
    """Folder that keeps what its ranks print."""
    threads: Literal["auto"] | int = "auto"
    timeout: float = 600
    save_seconds: float = 20
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Path -> text of what its ranks read, where machines do not share the run's folder."""

    @property
    def global_ranks(self) -> list[int]:
        """Global ranks of this machine."""
        return list(range(self.first_rank, self.first_rank + self.ranks))


class Orders:
    """What the launcher last said, and what its silence means."""

    def __init__(
        self,
        lines: Iterable[str],
        save_seconds: float,
        caught: Sequence[int],
        answer: Callable[[], object],
    ) -> None:
        """Listen to `lines` from now on, and `answer` each beat; `caught` holds stop signals."""
        self._lines, self._save_seconds = lines, save_seconds
        self._caught, self._answer = caught, answer
        self._port: int | None = None
        self._heard = self._answered = time.monotonic()
        self._advice: Advice = "go"
        self.lost_at: float | None = None
        """When it became clear that the launcher, or the way to it, is lost."""
        self._killed_at: float | None = None
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def _listen(self) -> None:
        for line in self._lines:
            word = line.strip()
            if word == "beat":
                # It asks again once it has our answer. So from the last one that it has it knows
                # when we end at the latest, however late a word of its own reaches us.
                self._heard, self._answered = self._answered, time.monotonic()
                self._answer()
            elif word.startswith("port "):
                self._port = int(word.split()[1])
            elif word == "kill" or (word == "stop" and self._advice == "go"):
                self._advice = word  # type: ignore[assignment]
        self._heard = -SILENCE_SECONDS  # end of file

    def await_port(self) -> int | None:
        """Return where the machines meet; None if the job is called off before that is known."""
        while self._port is None:
            if (
                self._advice != "go"
                or self._caught
                or time.monotonic() - self._heard > SILENCE_SECONDS
            ):
                return None
            time.sleep(0.1)
        return self._port

    def advise(self) -> Advice:
        """Return what is to be done with the ranks now."""
        now = time.monotonic()
        if self.lost_at is None and now - self._heard > SILENCE_SECONDS:
            self.lost_at = now
            # Not from here: with the launcher went who would read it, and ranks wait for us.
            threading.Thread(target=_say_launcher_is_gone, name="word", daemon=True).start()
        if self.lost_at is not None:
            return "stop" if now - self.lost_at < self._save_seconds else self._kill(now)
        return self._kill(now) if self._advice == "kill" else self._advice

    def _kill(self, now: float) -> Advice:
        """The ranks are killed; if torchrun's agent still waits for somebody, so are we.

        The ranks die with this process (`outcomes.die_with_parent`).
        """
        self._killed_at = self._killed_at or now
        if now - self._killed_at > AGENT_SECONDS:
            os._exit(128 + signal.SIGKILL)
        return "kill"


def _say_launcher_is_gone() -> None:
    with contextlib.suppress(OSError):
        print("the launcher is gone: saving and stopping", file=sys.stderr, flush=True)


def find_interface(address: str) -> str:
    """Return the network interface that leads to a machine, or that has its address.

    Raises:
        PreflightError: the name is unknown here, or means this machine alone.
    """
    import psutil

    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            own = str(probe.getsockname()[0]).partition("%")[0]
    except OSError as error:
        raise PreflightError(
            f"cannot reach {address}, the first machine: {error}",
            where=socket.gethostname(),
            fix="name the machines as all of them know each other",
        ) from None
    if is_loopback(own):
        raise PreflightError(
            f"{address} is a loopback address ({own}) here, which others cannot reach",
            where=socket.gethostname(),
            fix="give the first machine a name that stands for its network address on all of them; "
            "on Debian that is a line of its /etc/hosts",
        )
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address.partition("%")[0] == own for item in addresses):
            return name
    raise PreflightError(f"no interface has the address {own}", where=socket.gethostname())


def serve(
    orders: Iterator[str], tell: Callable[[bytes], object], caught: Sequence[int] = ()
) -> None:
    """Do the task that `orders` begins with, and `tell` how it ended; `caught` grows by signals."""
    task = Task(**json.loads(next(orders)))
    os.environ.update(task.environment)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of names it need not know

    one_at_a_time = threading.Lock()

    def say(**message: Any) -> None:
        with one_at_a_time, contextlib.suppress(OSError):  # the launcher is gone
            tell(json.dumps(message).encode() + b"\n")

    heard = Orders(orders, task.save_seconds, caught, lambda: say(alive=True))
    say(started=os.getpid())
    try:
        _write_files(task)
        ending = _run(task, heard, say, caught)
        say(ending=pack_ending(ending), lost=heard.lost_at is not None)
    except Exception as error:  # the other ranks, if there are any yet, die with this process
        outcome = describe(error, task.first_rank)
        none = Ending(outcomes={outcome.rank: outcome}, ended_by_us=set(task.global_ranks))
        say(ending=pack_ending(none), refused=True)


def _run(task: Task, heard: Orders, say: Callable[..., None], caught: Sequence[int]) -> Ending:
    """Run the ranks of a task, once all machines know where they meet; return how they ended."""
    place = replace(ALONE, name=task.name)
    if task.num_hosts > 1:
        interface = _chosen_interface() or find_interface(task.address)
        if task.host == 0:
            store = _open_store(task.num_hosts, task.timeout)  # for as long as the agent runs
            say(port=store.port)
        port = heard.await_port()
        if port is None:
            return Ending(ended_by_us=set(task.global_ranks), signal=caught[0] if caught else None)
        _check_way(task.address, port)
        endpoint = f"{task.address}:{port}"
        place = Place(task.first_rank, task.host, task.num_hosts, endpoint, interface, task.name)
    return run_ranks(
        task.ranks,
        task.argv,
        place=place,
        threads=task.threads,
        timeout=task.timeout,
        advise=heard.advise,
        caught=caught,
        logs=Path(task.logs) if task.logs else None,
        tell_marks=lambda meeting, met: say(meeting=meeting, met=met),
    )


def _write_files(task: Task) -> None:
    """Write what a machine without a share in the run's folder lacks."""
    if task.files and task.logs and not Path(task.logs).exists():
        drop_old_logs(Path(task.logs).parent)
        Path(task.logs).mkdir(parents=True, exist_ok=True)  # a guard beside us may be as quick
    for name, text in task.files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(name), text)


def _chosen_interface() -> str | None:
    """Return what the user has chosen for both libraries that ask, if so."""
    gloo, nccl = map(os.environ.get, INTERFACE_VARIABLES)
    return gloo if gloo and nccl else None


def pack_ending(ending: Ending) -> dict[str, Any]:
    """Return an ending as JSON values."""
    return asdict(ending) | {
        "outcomes": [asdict(outcome) for outcome in ending.outcomes.values()],
        "exit_codes": list(ending.exit_codes.items()),
        "ended_by_us": sorted(ending.ended_by_us),
    }


def unpack_ending(tree: dict[str, Any]) -> Ending:
    """Return what `pack_ending` was given."""
    outcomes = [Outcome(**outcome) for outcome in tree["outcomes"]]
    return Ending(
        tree["ranks"],
        {outcome.rank: outcome for outcome in outcomes},
        dict(tree["exit_codes"]),
        set(tree["ended_by_us"]),
        tree["signal"],
    )


def _open_store(num_hosts: int, timeout: float) -> Any:
    """Return the store the machines meet at, on a port that from now on nobody else can take.

    torchrun's agent finds it by its port: stores of one process that share a port share a server.
    """
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        LOOPBACK,
        0,
        num_hosts,
        is_master=True,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _check_way(address: str, port: int) -> None:
    """Refuse to start ranks that could not reach the first machine.

    Raises:
        NotMetError: it does not answer where all are to meet.
    """
    try:
        socket.create_connection((address, port), REACH_SECONDS).close()
    except OSError as error:
        raise NotMetError(
            f"cannot reach {address}:{port}, where all ranks meet: {error}",
            where=socket.gethostname(),
            fix=WHY_NOT_MET,
        ) from None


def is_guard(pid: int) -> bool:
    """Return whether a process of that number is a guard; one that is stopped is ended.

    It hears nothing, its ranks live as long as it does, and its launcher has given it up.
    """
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if "shoal.launcher.guard" not in process.cmdline():
            return False
        if process.status() != psutil.STATUS_STOPPED:
            return True
        process.kill()
    return False


def main() -> None:
    """Serve one launcher; the control descriptor is the argument, or standard output.

    With `--call ENDPOINT KEY NAME` call it instead of being called. With `--greet FILE [PID]` only
    say who is here, whether FILE is seen, and whether an earlier guard still runs under that
    number; with `--inspect REQUEST` say more.
    """
    if sys.argv[1:2] == ["--greet"]:
        pids = [int(word) for word in sys.argv[3:]]
        facts = {"sees": Path(sys.argv[2]).exists(), "guards": [p for p in pids if is_guard(p)]}
        print(json.dumps(describe_installation() | facts))
        return
    if sys.argv[1:2] == ["--inspect"]:
        answer(sys.argv[2])
        return
    try:
        with caught_signals() as caught:
            if sys.argv[1:2] == ["--call"]:
                endpoint, key, name = sys.argv[2:]
                call = Call(endpoint, Path(key), name)
                serve(iter(call), call.send, caught)
            else:
                control = int(sys.argv[1]) if len(sys.argv) > 1 else os.dup(1)
                if len(sys.argv) == 1:
                    os.dup2(2, 1)  # what the ranks print is no message
                serve(iter(sys.stdin), partial(os.write, control), caught)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)  # a rank that hangs must not keep us


if __name__ == "__main__":
    main()
