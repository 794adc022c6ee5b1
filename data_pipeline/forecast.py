"""What a corpus will take: preparation time, bytes, downloads, and whether GPUs would stall.

Arithmetic on a probe; every figure scales with the text, but for what is said otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.configs.corpus import PrepareConfig
from shoal.data_pipeline.probing import Probe

_ONCE = "start"
"""What does not grow with the corpus."""
_ALONE = {_ONCE, "train tokenizer: find merges", "find exact duplicates", "merge candidates",
          "choose duplicates"}  # fmt: skip
"""Steps that one process does."""
_SCALES_AS_SORTING = ("duplicates", "candidates")
_KEY_BYTES = 272
"""Of a document, while near duplicates are looked for."""


@dataclass(frozen=True)
class Feed:
    """Who reads the shards."""

    gpus: int
    tokens_per_second: float
    """Of one GPU."""
    hosts: int
    bandwidth: float | None
    """Bytes per second from the remote to one host; None: shards are on its own disk."""


@dataclass(frozen=True)
class StageTime:
    """One step of preparing."""

    name: str
    seconds: float
    """On so many processes as were asked for."""


@dataclass(frozen=True)
class FeedForecast:
    """Whether a loader keeps up."""

    demand_tokens: float
    """Tokens per second that the GPUs of one host take."""
    loader_tokens: float
    """Tokens per second that one host's ranks gather from shards at hand."""
    demand_bytes: float
    """Bytes per second one host downloads while rows are seen for the first time."""
    bandwidth: float | None
    download_bytes: int
    """Of one host, over one epoch."""
    cache_bytes: int
    """That one host keeps if it downloads nothing twice."""

    @property
    def stalled_share(self) -> float:
        """Share of the time GPUs wait in the first epoch; 0: never."""
        slowest = self.loader_tokens / self.demand_tokens
        if self.bandwidth is not None:
            slowest = min(slowest, self.bandwidth / self.demand_bytes)
        return max(0.0, 1.0 - slowest)

    @property
    def cause(self) -> str:
        """What GPUs would wait for."""
        if self.stalled_share == 0:
            return "nothing"
        fed = self.loader_tokens / self.demand_tokens
        by_download = self.bandwidth is not None and self.bandwidth / self.demand_bytes < fed
        return "downloads" if by_download else "gathering rows"


@dataclass(frozen=True)
class Forecast:
    """What preparing a corpus comes to."""

    text_bytes: int
    kept_bytes: int
    documents: int
    tokens: int
    rows: int
    shard_bytes: int
    """As stored, held-out text included."""
    work_bytes: int
    """Most that lies beside the output while it is prepared."""
    stages: tuple[StageTime, ...]

    @property
    def seconds(self) -> float:
        """All steps one after the other."""
        return sum(stage.seconds for stage in self.stages)


def forecast_corpus(config: PrepareConfig, probe: Probe, processes: int) -> Forecast:
    """Scale a probe to its corpus.

    Args:
        config: As it will be prepared.
        probe: Of the same config.
        processes: Tasks at a time, over all hosts.
    """
    facts = probe.train
    assert facts is not None
    scale = probe.text_bytes / max(1, probe.sample_bytes)
    stages = [
        StageTime(name, _scale_stage(name, seconds, scale, config, probe) / _share(name, processes))
        for name, seconds in probe.stages.items()
    ]
    stored = sum(shard.bytes for shard in facts.shards)
    kept, tokens = facts.text_bytes * scale, facts.tokens * scale
    token_bytes = 2 if facts.dtype == "uint16" else 4
    for name, size in (("hash sources", probe.disk_bytes), ("prove shards", stored * scale)):
        stages.append(StageTime(name, size / probe.hash_bytes_per_second))
    # Read pieces and cleaned ones are packed to about half; tokens and shards lie beside them.
    text_copies = 1.0 if config.clean else 0.5
    work = text_copies * probe.text_bytes + tokens * token_bytes + stored * scale
    if config.clean and config.clean.near_duplicates:
        work += _KEY_BYTES * facts.documents * scale
    return Forecast(
        text_bytes=probe.text_bytes,
        kept_bytes=round(kept),
        documents=round(facts.documents * scale),
        tokens=round(tokens),
        rows=math.ceil(facts.rows * scale),
        shard_bytes=round(stored * scale),
        work_bytes=round(work),
        stages=tuple(stages),
    )


def _share(name: str, processes: int) -> int:
    return 1 if name in _ALONE else processes


def _scale_stage(
    name: str, seconds: float, scale: float, config: PrepareConfig, probe: Probe
) -> float:
    """Return the seconds of one step over the whole corpus, in one process."""
    if name == _ONCE:
        return seconds
    if name in ("train tokenizer: find merges", "train tokenizer: read text"):
        return seconds * min(scale, config.tokenizer.max_train_bytes / probe.sample_bytes)
    if name.endswith(_SCALES_AS_SORTING) and probe.train is not None:
        few = max(2, probe.train.documents)
        return seconds * scale * math.log(few * max(scale, 1)) / math.log(few)
    return seconds * scale


def forecast_feed(forecast: Forecast, probe: Probe, feed: Feed) -> FeedForecast:
    """Say what one host of a run reads, and whether it comes in time."""
    facts = probe.train
    assert facts is not None
    on_host = feed.gpus / feed.hosts
    demand = on_host * feed.tokens_per_second
    bytes_per_token = forecast.shard_bytes / max(1, forecast.rows * facts.context)
    of_host = math.ceil(forecast.shard_bytes / feed.hosts)
    return FeedForecast(
        demand_tokens=demand,
        loader_tokens=on_host * probe.gather_tokens_per_second,
        demand_bytes=demand * bytes_per_token,
        bandwidth=feed.bandwidth,
        download_bytes=of_host if feed.bandwidth is not None else 0,
        cache_bytes=of_host if feed.bandwidth is not None else 0,
    )
