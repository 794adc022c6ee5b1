"""Who am I among the ranks: read from the environment once, at the top of a worker."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from shoal.configs.errors import ConfigError, PreflightError
from shoal.launcher.watchdog import Watchdog

if TYPE_CHECKING:
    import torch

    from shoal.configs.schema import WorldConfig

# What DeepSpeed's launcher and torchrun tell their ranks. A launcher that runs as such a rank
# removes these before it starts ranks of its own, or they would join the wrong job.
RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK",
    "GROUP_WORLD_SIZE", "NODE_RANK", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "CROSS_RANK",
    "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_ERROR_FILE",
)  # fmt: skip
CPU_RANKS = 2
# Slurm warns with one of the last two, as it is asked to.
STOP_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
)  # fmt: skip


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Give a list that grows with every signal that asks for a stop."""
    caught: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, lambda n, _: caught.append(n))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seconds_to_train(config: WorldConfig) -> float:
    """Return how long after its start a command is to stop: what it may take, less a save."""
    limit = config.time_limit_minutes
    return math.inf if limit is None else limit * 60 - config.save_seconds


def command_age() -> float:
    """Return the seconds since this rank's command began: that of torchrun, which restarts ranks.

    For other launchers it is the rank's own: they start their ranks once.
    """
    import psutil

    own = psutil.Process()
    parent = own.parent() if "TORCHELASTIC_RUN_ID" in os.environ else None
    return max(0.0, time.time() - (parent or own).create_time())


class StopRequest:
    """Set by a signal, polled by the training loop: finish the step, save, stop."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._polled = False
        self._then: Callable[[], None] = lambda: None

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        self._polled = True
        return self._event.is_set()

    def request(self) -> None:
        """Ask for a stop."""
        self._event.set()
        self._then()

    def on_request(self, then: Callable[[], None]) -> None:
        """Call `then` as soon as a stop was asked for."""
        self._then = then
        if self._event.is_set():
            then()

    def install(self, signals: tuple[signal.Signals, ...]) -> None:
        """Turn `signals` into a request; before anybody polls they end the process at once."""
        for number in signals:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP: keep it so
                signal.signal(number, self._handle)

    def request_when_gone(self, processes: Sequence[int]) -> None:
        """Ask for a stop as soon as one of `processes` has ended, however it ended."""
        descriptors = []
        for process in processes:
            try:
                descriptors.append(os.pidfd_open(process))
            except ProcessLookupError:
                self.request()

        def wait() -> None:
            select.select(descriptors, [], [])
            self.request()

        if descriptors:
            threading.Thread(target=wait, name="ancestors", daemon=True).start()

    def request_in(self, seconds: float) -> None:
        """Ask for a stop after so long; never, if that is infinite."""
        if seconds < math.inf:
            timer = threading.Timer(max(0.0, seconds), self.request)
            timer.daemon = True
            timer.start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request()
        if not self._polled:
            raise SystemExit(128 + number)


@dataclass(frozen=True)
class World:
    """The place of this process in the job."""

    rank: int
    num_ranks: int
    local_rank: int
    local_ranks: int
    device: torch.device
    device_name: str
    stop: StopRequest = field(default_factory=StopRequest)
    watchdog: Watchdog = field(default_factory=Watchdog)

    @classmethod
    def detect(cls, stop: StopRequest | None = None, watchdog: Watchdog | None = None) -> World:
        """Read RANK and its companions once; without them this is the only rank.

        Libraries that look for LOCAL_WORLD_SIZE (mosaicml-streaming) find it afterwards.

        Raises:
            ConfigError: the variables contradict each other.
            PreflightError: more ranks than GPUs on this machine.
        """
        rank, (num_ranks, local_ranks) = read_number("RANK", 0), foreign_ranks()
        local_rank = read_number("LOCAL_RANK", rank)
        if not (rank < num_ranks and local_rank < local_ranks <= num_ranks):
            raise ConfigError(
                f"rank {rank} of {num_ranks}, local rank {local_rank} of {local_ranks} cannot be",
                where="environment",
                fix="unset RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, or start the job with "
                "`python launcher/run.py --hostfile hosts`",
            )
        os.environ["LOCAL_WORLD_SIZE"] = str(local_ranks)
        # torchrun says GROUP_RANK, DeepSpeed CROSS_RANK.
        node = os.environ.get("GROUP_RANK") or os.environ.get("CROSS_RANK") or "0"
        os.environ.setdefault("NODE_RANK", node)
        device, name = _device(local_rank, local_ranks)
        return cls(
            rank=rank,
            num_ranks=num_ranks,
            local_rank=local_rank,
            local_ranks=local_ranks,
            device=device,
            device_name=name,
            stop=stop or StopRequest(),
            watchdog=watchdog or Watchdog(),
        )

    def setup(self, config: WorldConfig) -> None:
        """Give this rank its share of the cores and its device; call before training."""
        import torch

        self.watchdog.limit = config.timeout_seconds
        self.stop.on_request(partial(self.watchdog.hurry, config.save_seconds))
        torch.set_num_threads(resolve_threads(config.threads, self.local_ranks))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"


def under_foreign_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether DeepSpeed's launcher, torchrun, srun or the like started this process."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def foreign_ranks(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return what another launcher says: ranks of the job, and ranks on this machine.

    DeepSpeed's launcher says LOCAL_SIZE where torchrun says LOCAL_WORLD_SIZE.

    Raises:
        ConfigError: a variable is no number.
    """
    num_ranks = read_number("WORLD_SIZE", 1, environment)
    local_ranks = read_number("LOCAL_SIZE", num_ranks, environment)
    return num_ranks, read_number("LOCAL_WORLD_SIZE", local_ranks, environment)


def usable_cores() -> int:
    """Return the cores this process may use: its affinity, less a container's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def resolve_threads(threads: Literal["auto"] | int, local_ranks: int) -> int:
    """Return CPU threads of one rank; `auto` shares the cores out evenly."""
    return max(1, usable_cores() // local_ranks) if threads == "auto" else threads


def resolve_ranks(ranks: Literal["auto"] | int) -> int:
    """Return how many ranks to start here; `auto`: one a GPU, or 2 where there is none."""
    return (count_gpus() or CPU_RANKS) if ranks == "auto" else ranks


def count_gpus() -> int:
    """Return the GPUs PyTorch may use; CUDA_VISIBLE_DEVICES= (empty) hides them all."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_devices(local_ranks: int) -> str:
    """Return what the ranks will run on, `cpu` or `cuda`.

    Raises:
        PreflightError: there are GPUs, but fewer than ranks.
    """
    gpus = count_gpus()
    if gpus and local_ranks > gpus:
        raise PreflightError(
            f"{local_ranks} ranks on this machine, but it has {gpus} GPU{'s' * (gpus > 1)}",
            where=socket.gethostname(),
            fix=f"ask for at most {gpus} (slots={gpus} in the hostfile, or world.ranks={gpus}), or "
            "set CUDA_VISIBLE_DEVICES= to train on CPU",
        )
    return "cuda" if gpus else "cpu"


def _device(local_rank: int, local_ranks: int) -> tuple[torch.device, str]:
    import torch

    if "SLURM_LOCALID" in os.environ and local_ranks > count_gpus() == 1:
        local_ranks, local_rank = 1, 0  # `srun --gpus-per-task=1` shows each task its own alone
    if check_devices(local_ranks) == "cpu":
        return torch.device("cpu"), "cpu"
    return torch.device("cuda", local_rank), torch.cuda.get_device_name(local_rank)


def read_number(name: str, default: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return what a variable says; the default where it is absent or empty.

    Raises:
        ConfigError: it is no number.
    """
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} is not a number", where="environment")
    return int(text)
