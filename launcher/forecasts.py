"""`shoal plan DATA.yaml`: what preparing a corpus and feeding GPUs from it will take."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.configs.corpus import PrepareConfig
from shoal.configs.errors import ConfigError
from shoal.configs.load import find_config, load_config, read_tree
from shoal.launcher.budgets import parse_quantity
from shoal.launcher.history import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from shoal.data_pipeline.forecast import Feed, FeedForecast, Forecast
    from shoal.data_pipeline.probing import Probe


def is_corpus(config: str) -> bool:
    """Whether a config describes a corpus, and not a run."""
    tree = read_tree(find_config(config))
    return "tokenizer" in tree and "model" not in tree


def parse_feed(gpus: int, tokens_per_second: str, hosts: int, bandwidth: str | None) -> Feed:
    """Return who reads the shards, as given on the command line.

    Raises:
        ConfigError: a quantity that is none, or more hosts than GPUs.
    """
    from shoal.data_pipeline.forecast import Feed

    if hosts > gpus:
        raise ConfigError(f"{hosts} hosts for {gpus} GPUs", where="--hosts")
    rate = parse_quantity(tokens_per_second, "--tokens-per-second")
    limit = None if bandwidth is None else parse_quantity(bandwidth, "--bandwidth")
    if rate <= 0 or limit == 0:
        raise ConfigError("must be more than nothing", where="--tokens-per-second, --bandwidth")
    return Feed(gpus, rate, hosts, limit)


def plan_corpus(
    config: str, overrides: Sequence[str], feed: Feed, processes: int | None
) -> list[Table]:
    """Probe a corpus and return what is to be shown of its forecast.

    Raises:
        DataError: sources missing or unreadable.
    """
    from shoal.data_pipeline.forecast import forecast_corpus, forecast_feed
    from shoal.data_pipeline.probing import probe_corpus
    from shoal.data_pipeline.workers import choose_processes
    from shoal.launcher.tables import progress_bars

    loaded = load_config(PrepareConfig, config, overrides)
    with (
        tempfile.TemporaryDirectory(prefix="shoal-forecast-") as folder,
        progress_bars() as progress,
    ):
        probe = probe_corpus(loaded, Path(folder), progress)
    tasks = processes or choose_processes(loaded.processes, probe.disk_bytes)
    forecast = forecast_corpus(loaded, probe, tasks)
    fed = forecast_feed(forecast, probe, feed)
    return [
        _sources_table(probe),
        _corpus_table(loaded, forecast, tasks),
        _feed_table(feed, fed),
        _assumptions_table(loaded, probe),
    ]


def _sources_table(probe: Probe) -> Table:
    from shoal.launcher.tables import facts_table

    return facts_table(
        "sources",
        {
            source.path: f"{format_bytes(source.disk_bytes)} on disk, "
            f"{'' if source.exact else 'about '}{format_bytes(source.text_bytes)} of text"
            for source in probe.sources
        },
    )


def _corpus_table(config: PrepareConfig, forecast: Forecast, processes: int) -> Table:
    from shoal.launcher.tables import facts_table

    kept = forecast.kept_bytes / max(1, forecast.text_bytes)
    facts: dict[str, object] = {
        "documents kept": forecast.documents,
        "text kept": f"{format_bytes(forecast.kept_bytes)} ({kept:.1%})",
        "tokens": forecast.tokens,
        "bytes per token": f"{forecast.kept_bytes / max(1, forecast.tokens):.2f}",
        f"rows of {config.context}": forecast.rows,
        "shards": format_bytes(forecast.shard_bytes),
        "disk beside them meanwhile": format_bytes(forecast.work_bytes),
        f"time, {count(processes, 'process', 'processes')}": format_seconds(forecast.seconds),
    }
    for stage in forecast.stages:
        if stage.seconds >= 0.01 * forecast.seconds:
            facts[f"  {stage.name}"] = format_seconds(stage.seconds)
    return facts_table(f"to prepare {config.name}", facts)


def _feed_table(feed: Feed, fed: FeedForecast) -> Table:
    from shoal.launcher.tables import facts_table

    if fed.stalled_share == 0:
        verdict = "never: rows come faster than they are taken"
    else:
        verdict = f"{fed.stalled_share:.0%} of the first epoch, for {fed.cause}"
    facts: dict[str, object] = {
        "tokens a host takes": f"{fed.demand_tokens:,.0f} a second",
        "tokens its ranks gather": f"{fed.loader_tokens:,.0f} a second, shards at hand",
    }
    if fed.bandwidth is not None:
        facts["download a host needs"] = f"{format_bytes(round(fed.demand_bytes))} a second"
        facts["download it has"] = f"{format_bytes(round(fed.bandwidth))} a second"
        facts["downloaded by a host"] = format_bytes(fed.download_bytes)
        facts["cache that keeps it"] = format_bytes(fed.cache_bytes)
    facts["GPUs wait"] = verdict
    return facts_table(f"to feed {count(feed.gpus, 'GPU')} on {count(feed.hosts, 'host')}", facts)


def _assumptions_table(config: PrepareConfig, probe: Probe) -> Table:
    from shoal.launcher.tables import facts_table

    facts: dict[str, object] = {
        "sample": f"{format_bytes(probe.sample_bytes)} of text, prepared in one process",
        "processes": "tasks scale with them, up to the cores and disks there are",
        "cache": "the page cache holds what is read",
    }
    if config.tokenizer.path is None:
        facts["tokens"] = "of a tokenizer trained on the sample: the final one may need more"
    if config.clean and (config.clean.near_duplicates or config.clean.exact_duplicates):
        facts["duplicates"] = "of the sample alone: a whole corpus has more, so less will be kept"
    return facts_table("assumed", facts)


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: 1 GPU, 8 GPUs."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: 12 s, 3 min, 5.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
