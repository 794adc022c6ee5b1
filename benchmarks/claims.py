"""A claim: ours against a peer, measured in turns, as a ratio with a target; one JSON line each."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

PACKAGES = (
    "torch", "deepspeed", "mosaicml-streaming", "transformers", "tokenizers", "tiktoken",
    "datasets", "numpy",
)  # fmt: skip


class WrongResultError(RuntimeError):
    """Ours and the peer do not compute the same: how fast they do it says nothing."""


@dataclass(frozen=True)
class Target:
    """The limit a claim must keep."""

    bound: Literal[">=", "<="]
    limit: float
    of: Literal["ratio", "ours"] = "ratio"
    """The ratio, or our own figure in its unit where a target is absolute."""

    def met(self, ours: float, ratio: float) -> bool:
        """Whether the figures keep the limit."""
        value = ratio if self.of == "ratio" else ours
        return value >= self.limit if self.bound == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.of} {self.bound} {self.limit:g}"


@dataclass(frozen=True)
class Turns:
    """Figures of the rounds, ours and the peer's, all in one unit."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Ours over the peer's, of each round."""
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]


def take_turns(
    ours: Callable[[], float], peer: Callable[[], float], rounds: int, *, warm_up: int = 1
) -> Turns:
    """Let ours and the peer work in turns, so that a busy neighbour slows both.

    Who begins changes every round.

    Args:
        ours: Does its work once and returns its figure, such as seconds or tokens/s.
        peer: The same for what it is compared with.
        rounds: Rounds that count, at least 2.
        warm_up: Rounds before, whose figures are dropped.
    """
    figures: dict[Callable[[], float], list[float]] = {ours: [], peer: []}
    for number in range(warm_up + rounds):
        for work in (ours, peer) if number % 2 else (peer, ours):
            figures[work].append(work())
    return Turns(tuple(figures[ours][warm_up:]), tuple(figures[peer][warm_up:]))


@dataclass(frozen=True)
class Claim:
    """What was measured and whether it is enough; the keys of a line that a benchmark prints."""

    name: str
    ours: float
    """Median of the rounds, in `unit`."""
    peer: float
    unit: str
    ratio: float
    """Median of ours / peer within each round: above 1 is good for rates, bad for times."""
    target: str
    met: bool
    spread: tuple[float, float]
    """First and third quartile of the rounds' ratios."""
    versions: dict[str, str]
    hardware: dict[str, Any]
    setup: dict[str, Any] = field(default_factory=dict)
    """What else the figures depend on: sizes, precision, kernels, rounds."""

    @classmethod
    def from_turns(
        cls, name: str, unit: str, turns: Turns, target: Target, setup: dict[str, Any]
    ) -> Claim:
        """Judge what was measured.

        Raises:
            ValueError: fewer than two rounds, or a figure that is not positive and finite.
        """
        if len(turns.ours) < 2:
            raise ValueError(f"{name}: a spread needs two rounds or more")
        if not all(0 < figure < math.inf for figure in (*turns.ours, *turns.peer)):
            raise ValueError(f"{name}: figures must be positive and finite, got {turns}")
        ours, ratio = statistics.median(turns.ours), statistics.median(turns.ratios)
        low, _, high = statistics.quantiles(turns.ratios, n=4, method="inclusive")
        return cls(
            name=name,
            ours=ours,
            peer=statistics.median(turns.peer),
            unit=unit,
            ratio=ratio,
            target=str(target),
            met=target.met(ours, ratio),
            spread=(low, high),
            versions=list_versions(),
            hardware=describe_hardware(),
            setup={"rounds": len(turns.ours), **setup},
        )

    def to_json(self) -> str:
        """Return one line; figures are rounded to four digits after `met` was decided."""
        return json.dumps(_round(asdict(self)), allow_nan=False)


def _round(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _round(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_round(value) for value in tree]
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


def check_equal(what: str, ours: Any, peer: Any, tolerance: float = 0.0) -> None:
    """Compare arrays or numbers, element by element.

    Raises:
        WrongResultError: other shapes, or a difference above `tolerance` or not a number.
    """
    import numpy as np

    left, right = np.asarray(ours), np.asarray(peer)
    if left.shape != right.shape:
        raise WrongResultError(f"{what}: shapes {left.shape} and {right.shape}")
    worst = float(np.max(np.abs(left.astype(np.float64) - right), initial=0.0))
    if not worst <= tolerance:  # not >: NaN must fail too
        raise WrongResultError(f"{what}: differ by {worst:.3g}, more than {tolerance:g}")


def time_call(work: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@lru_cache(maxsize=1)
def list_versions() -> dict[str, str]:
    """Return the versions of what is compared."""
    from importlib.metadata import version

    return {name: version(name) for name in PACKAGES}


def describe_hardware() -> dict[str, Any]:
    """Return processor, cores, threads, GPU, and how busy the machine is at this moment."""
    import torch

    from shoal.eval.latency import processor_name
    from shoal.launcher.world import usable_cores

    return {
        "cpu": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
    }


def use_all_cores() -> int:
    """Give torch as many threads as there are usable cores; return how many."""
    import torch

    from shoal.launcher.world import usable_cores

    torch.set_num_threads(usable_cores())
    return usable_cores()


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the command line that all benchmarks share; asks no hub from here on."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    os.environ["USE_HUB_KERNELS"] = "NO"
    # Peers work in as many processes as ours; threads of tokenizers would be on top of those.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    return parser


def print_claim(claim: Claim) -> None:
    """Print the line of a claim, at once."""
    print(claim.to_json(), flush=True)
