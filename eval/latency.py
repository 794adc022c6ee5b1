"""Measured latency: prefill and decode of every arm on this machine, arms taking turns.

Turns, because a machine's speed drifts: whatever disturbs one round disturbs all arms alike.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.eval.candidate import Candidate
from shoal.eval.inputs import Progress

REPEATS = 20
WARM_UP = 2
DECODE_STEPS = 8
UNSTABLE_SHARE = 0.25  # quartile distance over median above which a timing is marked


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of a timing, in ms."""

    median: float
    low: float
    high: float
    repeats: int

    @property
    def unstable(self) -> bool:
        """Whether the quartiles are too far apart to lean on the median."""
        return (self.high - self.low) / self.median > UNSTABLE_SHARE

    def as_tree(self) -> dict[str, Any]:
        """Return a tree for JSON."""
        return asdict(self) | {"unstable": self.unstable}


@dataclass(frozen=True)
class Latency:
    """How long a model takes at one precision, context and batch."""

    prefill_ms: Timing
    """Reading a context of `context` - `decode_steps` tokens, all rows of the batch."""
    decode_ms: Timing
    """One more token for every row of the batch."""
    prefill_tokens: int
    batch: int

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens made in a second, all rows together."""
        return 1000 * self.batch / self.decode_ms.median

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens read in a second, all rows together."""
        return 1000 * self.batch * self.prefill_tokens / self.prefill_ms.median

    @property
    def unstable(self) -> bool:
        """Whether either timing is."""
        return self.prefill_ms.unstable or self.decode_ms.unstable

    def as_tree(self) -> dict[str, Any]:
        """Return a tree for JSON."""
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Latency:
        """Read back what `as_tree` wrote."""
        timings = {key: Timing(**tree[key]) for key in ("prefill_ms", "decode_ms")}
        return cls(**{**tree, **timings})


def measure_latencies(
    candidates: Mapping[str, Candidate],
    *,
    precision: str,
    context: int,
    batch: int,
    progress: Progress | None = None,
) -> dict[str, Latency]:
    """Time all candidates in turns, as plain `transformers` runs them (no CUDA graphs).

    Args:
        candidates: By name.
        precision: fp32 or bf16, weights and arithmetic.
        context: Tokens in context when the last token is decoded, at least 4.
        batch: Rows decoded together.
        progress: Called with (label, rounds done, rounds in all).

    Raises:
        ConfigError: the context is longer than a model's.
    """
    steps = min(DECODE_STEPS, context // 2)
    for candidate in candidates.values():
        candidate.check_context(context)
    models = {name: candidate.model(precision) for name, candidate in candidates.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(WARM_UP + REPEATS):
        for name, model in models.items():
            times[name].append(_time_once(model, batch, context - steps, steps))
        if progress:
            progress("latency", turn + 1, WARM_UP + REPEATS)
    found = {}
    for name, measured in times.items():
        prefills, decodes = zip(*measured[WARM_UP:], strict=True)
        found[name] = Latency(_summary(prefills), _summary(decodes), context - steps, batch)
    return found


@torch.inference_mode()
def _time_once(model: torch.nn.Module, batch: int, prefill: int, steps: int) -> tuple[float, float]:
    """Return ms of one prefill, and the median ms of the decode steps after it."""
    device = next(model.parameters()).device
    vocab = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = torch.arange(batch * prefill, device=device).remainder(vocab).view(batch, prefill)
    _wait(device)
    begun = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    _wait(device)
    read = (time.perf_counter() - begun) * 1000
    times = []
    for _ in range(steps):
        chosen = output.logits[:, -1:].argmax(dim=-1)
        _wait(device)
        begun = time.perf_counter()
        output = model(
            input_ids=chosen,
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
        _wait(device)
        times.append((time.perf_counter() - begun) * 1000)
    return read, float(np.median(times[1:]))  # the first one still pays for the prefill's caches


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(times: Sequence[float]) -> Timing:
    low, median, high = np.percentile(times, [25, 50, 75])
    return Timing(float(median), float(low), float(high), len(times))


def describe_machine() -> dict[str, Any]:
    """Return what timings depend on: device, threads, versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
    }


def processor_name() -> str:
    """Return the processor's model, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
