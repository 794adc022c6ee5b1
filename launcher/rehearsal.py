"""What ranks do when a check has started them instead of a training.

The order lies in a JSON file; where that is absent the ranks sum a tensor and write it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.launcher.world import StopRequest
from shoal.trainer.storage import write_text

if TYPE_CHECKING:
    from shoal.launcher.world import World
    from shoal.trainer.qualification import Claim

TIMEOUT_SECONDS = 300
PUBLISH_SECONDS = 60.0
"""What a checkpoint may take until another host sees it."""


@dataclass(frozen=True)
class Doom:
    """Which rank kills itself, and when."""

    rank: int
    polls: int
    """After it has asked so often whether it is to stop, which it does at every step."""
    seconds: float
    """And so much later."""
    checkpoints: str
    """Once there is one in this folder."""
    marker: str
    """A file that says what was done."""


@dataclass(frozen=True)
class Rehearsal:
    """What the ranks are to do, in this order."""

    configs: list[str]
    """Runs to train."""
    claims: str | None = None
    """File for what is proven before that, a line of JSON each."""
    folder: str = ""
    """Where a checkpoint may be written for it."""
    kernels: dict[str, Any] = field(default_factory=dict)
    doom: dict[str, Any] | None = None


def rehearse(world: World, file: Path) -> None:
    """Do as `file` says; where it is absent, sum a tensor and write what was found to it.

    Raises:
        ShoalError: as a training would.
    """
    if not file.exists():
        from shoal.trainer.probe import measure_all_reduce

        measure_all_reduce(world.device, file)
        return
    import torch

    from shoal.configs.load import load_config
    from shoal.configs.schema import RunConfig
    from shoal.launcher.training import train

    order = Rehearsal(**json.loads(file.read_text(encoding="utf-8")))
    with Path(os.devnull).open("w") as nowhere:  # progress bars; a check prints its own lines
        os.dup2(nowhere.fileno(), 1)
    torch.set_num_threads(1)  # more of them make models this small slower
    if order.claims:
        _prove(world, order)
    if order.doom and order.doom["rank"] == world.rank:
        world = replace(world, stop=DoomedStop(world.stop, Doom(**order.doom)))
    if order.configs:
        train([load_config(RunConfig, config) for config in order.configs], world)


def _prove(world: World, order: Rehearsal) -> None:
    """Write down every claim as soon as it is settled: the next one may end this rank."""
    from shoal.configs.schema import KernelConfig
    from shoal.trainer.engine import start_process_group
    from shoal.trainer.qualification import prove_claims

    start_process_group(world.device, TIMEOUT_SECONDS)
    kernels = KernelConfig.model_validate(order.kernels)
    for claim in prove_claims(world.device, kernels, Path(order.folder)):
        if world.rank == 0:
            with Path(order.claims or "").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(claim)) + "\n")
            mark = "holds" if claim.holds else "FAILS"
            print(f"  {mark}: {claim.claim}, {claim.text}", file=sys.stderr, flush=True)


def read_claims(file: Path) -> Iterator[Claim]:
    """Yield the claims that ranks have settled; a line torn by a kill is dropped."""
    from shoal.trainer.qualification import Claim

    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in lines:
        with suppress(ValueError):
            yield Claim(**json.loads(line))


class DoomedStop(StopRequest):
    """The stop request of a rank that is to die by SIGKILL in the middle of its work."""

    def __init__(self, stop: StopRequest, doom: Doom) -> None:
        super().__init__()
        self._stop, self._doom, self._left = stop, doom, doom.polls

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for; the rank does not live long after the fatal question."""
        self._left -= 1
        if self._left == 0:
            self._await_checkpoint()
            timer = threading.Timer(self._doom.seconds, self._die)
            timer.daemon = True
            timer.start()
        return self._stop.requested

    def _await_checkpoint(self) -> None:
        deadline = time.monotonic() + PUBLISH_SECONDS
        while time.monotonic() < deadline:
            if list(Path(self._doom.checkpoints).glob("step-*")):
                return
            time.sleep(0.01)

    def _die(self) -> None:
        facts = {"rank": self._doom.rank, "host": socket.gethostname()}
        write_text(Path(self._doom.marker), json.dumps(facts))
        os.kill(os.getpid(), signal.SIGKILL)
