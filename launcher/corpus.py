"""The corpus of a run: prepared once, opened by every rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.corpus import PrepareConfig
from shoal.configs.data import DataConfig, is_url
from shoal.configs.errors import DataError
from shoal.configs.load import load_config
from shoal.configs.schema import RunConfig
from shoal.launcher.runs import run_folder

if TYPE_CHECKING:
    from shoal.data_pipeline.clusters import Clusters
    from shoal.data_pipeline.manifest import Manifest
    from shoal.data_pipeline.mixture import Mixture
    from shoal.data_pipeline.rows import Rows
    from shoal.data_pipeline.sampling import SampledOrder
    from shoal.data_pipeline.shards import Prepared
    from shoal.launcher.tables import Progress
    from shoal.launcher.world import World

WAIT_SECONDS = 1.0
WAIT_REMOTE_SECONDS = 5.0
"""Object storage is asked less often: every rank asks."""


@dataclass(frozen=True)
class Corpus:
    """The shards of a run, opened."""

    train: list[tuple[Rows, float]]
    validations: dict[str, Rows]
    data: DataConfig
    clusters: dict[int, Clusters] = field(default_factory=dict)
    """Of the streams that are resampled, by number."""
    run_rows: int = 0
    """Rows of the whole run, over which `repeat` and `choose` are spread."""

    @property
    def manifest(self) -> Manifest:
        """Manifest of the first training stream; the others agree on tokenizer and row length."""
        return self.train[0][0].manifest

    @property
    def validation(self) -> Rows | None:
        """The first of the splits to validate on."""
        return next(iter(self.validations.values()), None)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of its data: the rows, how much of each, and their order."""
        from shoal.data_pipeline.order import ORDER_VERSION

        order: dict[str, Any] = {"version": ORDER_VERSION}
        if any(stream.is_counted for stream in self.data.train):
            order["run_rows"] = self.run_rows  # another length moves every position
        if self.data.shuffle_block_rows:
            order["block_rows"] = self.data.shuffle_block_rows
        if self.data.schedule:
            numbers = {stream.label: n for n, stream in enumerate(self.data.train)}
            order["schedule"] = [
                [change.from_tokens, {str(numbers[k]): w for k, w in change.weights.items()}]
                for change in self.data.schedule
            ]
        if self.clusters:
            order["sampled"] = {
                str(number): [clusters.manifest.clusters_hash, sample.domain, sample.temper]
                for number, clusters in self.clusters.items()
                if (sample := self.data.train[number].sample)
            }
        streams = zip(self.train, self.data.train, strict=True)
        measured = [[rows.manifest.shards_hash, stream.measure] for (rows, _), stream in streams]
        return {"streams": measured, "order": order}

    def orders(self, seed: int) -> dict[int, SampledOrder]:
        """Return the orders of the streams that are resampled, by number."""
        orders = {}
        for number, clusters in self.clusters.items():
            sample = self.data.train[number].sample
            assert sample is not None  # or it would have no clusters
            orders[number] = clusters.order(
                sample.domain,
                (seed, number),
                shards_hash=self.train[number][0].manifest.shards_hash,
                temper=sample.temper,
            )
        return orders

    def mixture(self, config: RunConfig) -> Mixture:
        """Return which stream is read where in the run.

        Raises:
            ConfigError: the streams do not give the rows the run takes.
        """
        from shoal.data_pipeline.mixture import plan_mixture

        sizes = [len(rows) for rows, _ in self.train]
        context, batch_rows = self.manifest.context, config.train.batch_rows
        return plan_mixture(
            self.data,
            sizes,
            context,
            count_rows(config),
            batch_rows,
            is_trial=config.ledger.kind == "tune",
        )

    def count_rows(self, config: RunConfig, batches: int) -> dict[str, int]:
        """Return the rows of each stream in the first batches of a run, by its name."""
        rows = self.mixture(config).count_rows(batches * config.train.batch_rows)
        labels = (stream.label for stream in self.data.train)
        return dict(zip(labels, rows.tolist(), strict=True))


def count_rows(config: RunConfig) -> int:
    """Return the rows of a whole run."""
    return config.steps * config.train.batch_rows


def ensure_prepared(config: RunConfig) -> None:
    """Prepare the run's corpus if its config names one and the shards are absent."""
    if config.prepare and not _is_under_way(config):
        from shoal.launcher.tables import progress_bars

        with progress_bars() as progress:
            prepare_corpus(load_config(PrepareConfig, config.prepare), progress)


def _is_under_way(config: RunConfig) -> bool:
    """Whether a run has been started on shards that are still there.

    Its checkpoints know those by their hash, so the text they were made from may be gone.
    """
    from shoal.trainer.checkpoint import list_checkpoints

    folders = [Path(path) for path in config.data.local_folders]
    started = bool(list_checkpoints(run_folder(config) / "checkpoints"))
    return started and all((folder / "manifest.json").is_file() for folder in folders)


def prepare_corpus(config: PrepareConfig, progress: Progress | None = None) -> Prepared:
    """Prepare a corpus, and book what that cost beside it; nothing is done twice."""
    from shoal.data_pipeline.shards import prepare, read_manifest
    from shoal.trainer.ledger import LedgerEntry, append_entry, now

    started, begun = now(), time.monotonic()
    prepared = prepare(config, progress)
    if prepared.built:
        entry = LedgerEntry(
            kind="prepare",
            stage=config.name,
            scope="generic",
            started=started,
            seconds=time.monotonic() - begun,
            tokens=read_manifest(prepared.train).tokens,
        )
        append_entry(prepared.output / "ledger.jsonl", entry)
    return prepared


def wait_for_corpus(config: RunConfig, world: World) -> None:
    """Rank 0 of every machine prepares what is absent; the others wait for it.

    What goes to a URL is the same for all machines: rank 0 of the first one prepares it alone.
    Happens before the process group exists, so that no collective times out on a large corpus.

    Raises:
        DataError: the run names shards that this does not prepare, and that are not there; or
            their storage does not answer.
    """
    if world.local_rank == 0 and (world.rank == 0 or not _prepares_remotely(config)):
        ensure_prepared(config)
    elif config.prepare:
        _wait_for_shards(config)
    if world.local_rank == 0:
        open_corpus(config)


def _prepares_remotely(config: RunConfig) -> bool:
    named = config.prepare
    return named is not None and is_url(load_config(PrepareConfig, named).output)


def _wait_for_shards(config: RunConfig) -> None:
    """Return once every manifest that a run reads is there, which is what is written last."""
    from shoal.data_pipeline.files import exists

    data = config.data
    for path in (*(stream.path for stream in data.train), *data.validations.values()):
        seconds = WAIT_REMOTE_SECONDS if is_url(path) else WAIT_SECONDS
        while not exists(f"{path.rstrip('/')}/manifest.json"):
            time.sleep(seconds)


def open_corpus(config: RunConfig) -> Corpus:
    """Open the shards a run names and check that they belong together.

    Raises:
        DataError: missing or altered shards, a tokenizer that is not theirs, streams that do not
            belong together, or nothing to validate on in a split for that.
        ConfigError: the model's context is not that of the rows.
    """
    from shoal.data_pipeline.cache import ShardCache
    from shoal.data_pipeline.manifest import check_context
    from shoal.data_pipeline.rows import Rows, check_alike

    data = config.data
    cache = ShardCache.choose(data.cache, data.cache_bytes, data.download_seconds)
    opened: dict[str, Rows] = {}

    def open_once(path: str) -> Rows:
        """Open a split; several streams of one share what they map, check and need of a cache."""
        key = path.rstrip("/") if is_url(path) else str(Path(path).resolve())
        if key not in opened:
            opened[key] = Rows.open(path, cache)
        return opened[key]

    streams = [(open_once(stream.path), stream.share) for stream in data.train]
    validations = {name: open_once(path) for name, path in data.validations.items()}
    for name, rows in validations.items():
        if not (rows.manifest.rows and rows.manifest.tokens):
            raise DataError(
                f"the validation split {name!r} holds nothing to score: {rows.manifest.rows} rows, "
                f"{rows.manifest.tokens} tokens",
                where=rows.where,
                fix="prepare it with a larger validation_share, or leave it out of data.validation",
            )
    check_alike([*(rows for rows, _ in streams), *validations.values()])
    check_context(streams[0][0].manifest, config.model.context)
    clusters = open_clusters(data, [rows for rows, _ in streams])
    return Corpus(streams, validations, data, clusters, count_rows(config))


def open_clusters(data: DataConfig, streams: Sequence[Rows]) -> dict[int, Clusters]:
    """Open the clusters of the streams that are resampled, by number of the stream.

    Raises:
        DataError: clusters missing or altered, or of other shards than the stream reads.
        ConfigError: there is no such domain.
    """
    from shoal.data_pipeline.clusters import load_clusters

    opened = {}
    for number, (stream, rows) in enumerate(zip(data.train, streams, strict=True)):
        if stream.sample:
            opened[number] = load_clusters(stream.sample.clusters)
            opened[number].facts(stream.sample.domain)
            opened[number].check_shards(rows.manifest.shards_hash)
    return opened
