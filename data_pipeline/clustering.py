"""Corpora to clusters: `make_clusters` embeds, finds centroids, assigns every row, and publishes.

Everything is done in a folder aside, of which each finished piece is kept over a kill.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from shoal.configs.clusters import ClusterConfig, ClusterCorpus
from shoal.configs.errors import ConfigError
from shoal.data_pipeline.assignment import AssignRows, EmbedSample, cluster_type, read_in_batches
from shoal.data_pipeline.cache import ShardCache
from shoal.data_pipeline.centroids import POINTS, Centroids, choose_method, fit_centroids
from shoal.data_pipeline.clusters import (
    EMBEDDER,
    Clusters,
    ClustersManifest,
    CorpusFacts,
    assignments_file,
    histogram_file,
    list_files,
    load_clusters,
    read_clusters_manifest,
)
from shoal.data_pipeline.embedding import (
    FACTS,
    Embed,
    TfidfEmbed,
    fit_tfidf,
    hash_folder,
    open_sentence_model,
)
from shoal.data_pipeline.executors import open_executor
from shoal.data_pipeline.keywords import name_clusters
from shoal.data_pipeline.manifest import MANIFEST, hash_tree
from shoal.data_pipeline.order import ORDER_VERSION
from shoal.data_pipeline.publishing import hold_lock, name_output, remove_stale, sync_folder
from shoal.data_pipeline.row_texts import Split, open_rows, open_split, sample_rows
from shoal.data_pipeline.sampling import entropy_bits, total_variation
from shoal.data_pipeline.stages import Progress, Run
from shoal.data_pipeline.store import write_whole
from shoal.data_pipeline.tokens import save_array
from shoal.data_pipeline.workers import choose_processes

_VERSION = 1
_NOT_IN_KEY = {
    "name", "output", "processes", "executor", "cache", "cache_bytes", "download_seconds",
}  # fmt: skip
_NUMBERS, _VECTORS, _ASSIGNED, _LOGS = "numbers.npy", "vectors", "assigned", "logs"


@dataclass(frozen=True)
class Model:
    """A model that embeds, and what it is known by."""

    embed: Embed
    hash: str


def make_clusters(
    config: ClusterConfig, progress: Progress | None = None, model: Model | None = None
) -> Clusters:
    """Put every row of a generic corpus and of domains in clusters, unless that is done already.

    The same shards and config give the same bytes, by however many processes, and also when the
    work was interrupted: started again, it goes on with what is there. Memory does not grow with
    the corpus but for 10 bytes a row.

    Args:
        config: Corpora, embedding, clusters.
        progress: Told (what, done, total) now and then; total None where it is unknown.
        model: For the embedding method `export`.

    Raises:
        ConfigError: more clusters than rows, an output that holds something else, no such model.
        DataError: shards missing or corrupt; the model's folder holds pickles or code.
        PreflightError: a worker was killed, or a library is missing.
    """
    report = progress or (lambda what, done, total: None)
    output = Path(config.output)
    if model is None and config.embedding.path is not None:
        model = _open_model(config)
    cache = ShardCache.choose(config.cache, config.cache_bytes, config.download_seconds)
    splits = {corpus.name: open_split(corpus.path, cache) for corpus in config.corpora}
    key = find_key(config, splits, model)
    built = False
    if not _is_done(config, output, key):
        output.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(output, report), name_output(output):
            built = not _is_done(config, output, key)
            if built:
                work = output.absolute().parent / f".partial-{output.name}-{key[:16]}"
                remove_stale(output, work)
                work.mkdir(exist_ok=True)
                _Making(config, splits, key, model, work, report).run()
                _publish(work, output)
    return replace(load_clusters(output), built=built)


def _open_model(config: ClusterConfig) -> Model:
    assert config.embedding.path is not None
    if config.embedding.method == "export":
        raise ConfigError("the launcher opens exports: none was handed down", where="embedding")
    embed = open_sentence_model(config.embedding.path)
    return Model(embed, hash_folder(embed.folder))


def find_key(config: ClusterConfig, splits: Mapping[str, Split], model: Model | None) -> str:
    """Return the hash of what determines the clusters: shards by their content, not their place."""
    manifests = [open_rows(splits[corpus.name]).manifest for corpus in config.corpora]
    return hash_tree(
        {
            "version": [_VERSION, ORDER_VERSION],
            "config": _settled(config),
            "corpora": [manifest.shards_hash for manifest in manifests],
            "tokenizers": [manifest.tokenizer_fingerprint for manifest in manifests],
            "model": model and model.hash,
        }
    )


def _settled(config: ClusterConfig) -> dict[str, Any]:
    """Return what of a config determines the clusters, without paths."""
    tree = config.model_dump(mode="json", exclude=_NOT_IN_KEY)
    for section in (tree["generic"], *tree["domains"], tree["embedding"]):
        del section["path"]
    return tree


def _is_done(config: ClusterConfig, output: Path, key: str) -> bool:
    """Whether `output` holds what the config asks for; anything else there is refused."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST).is_file():
        raise ConfigError(
            "exists and holds no clusters",
            where=output,
            fix="choose another output=..., or remove it",
        )
    found = read_clusters_manifest(output)
    if found.cluster_key == key:
        return True
    new = _settled(config)
    changed = [name for name in new if found.config.get(name) != new[name]] or ["the shards"]
    raise ConfigError(
        f"holds other clusters: {', '.join(changed)} changed since",
        where=output,
        fix=f"choose another output=..., or remove the old ones: rm -r {output}",
    )


@dataclass(frozen=True)
class _Making:
    """One call of `make_clusters` that has work to do."""

    config: ClusterConfig
    splits: Mapping[str, Split]
    """By name of the corpus."""
    key: str
    model: Model | None
    work: Path
    progress: Progress

    def run(self) -> None:
        """Leave all files in the folder aside, the manifest last."""
        if (self.work / MANIFEST).is_file():
            return
        opened = [open_rows(split) for split in self.splits.values()]
        shards = [shard for rows in opened for shard in rows.manifest.shards]
        size = sum(shard.raw_bytes for shard in shards)
        processes = choose_processes(self.config.processes, size)
        logs = self.work / _LOGS
        with open_executor(self.config.executor, processes, logs, self.progress) as run:
            embed = self.model.embed if self.model else self._fit_embedder()
            inertia = self._find_centroids(embed, run)
            for corpus in self.config.corpora:
                self._assign(corpus, embed, run)
        for name in (_VECTORS, _ASSIGNED, _LOGS):
            shutil.rmtree(self.work / name, ignore_errors=True)
        for file in self.work.rglob(".*"):  # what a killed process was writing
            file.unlink()
        write_whole(self.work / MANIFEST, self._describe(inertia).to_json())

    @property
    def _generic(self) -> Split:
        return self.splits[self.config.generic.name]

    def _fit_embedder(self) -> Embed:
        folder = self.work / EMBEDDER
        if not (folder / FACTS).is_file():
            config = self.config.embedding
            split = self._generic
            self.progress("fit the embedding", 0, None)
            numbers = sample_rows(split, config.sample_rows, self.config.seed)
            fit_tfidf(read_in_batches(split, numbers), config, self.config.seed, folder)
        return TfidfEmbed(folder)

    def _find_centroids(self, embed: Embed, run: Run) -> float:
        """Leave the centroids, and return the mean squared distance to them."""
        numbers = sample_rows(self._generic, self.config.sample_rows, self.config.seed)
        file, folder = self.work / _NUMBERS, self.work / _VECTORS
        if self.config.clusters > len(numbers):
            fit_centroids(np.empty((len(numbers), 1)), self.config)  # says what is wrong
        folder.mkdir(exist_ok=True)
        save_array(file, numbers)
        stage = EmbedSample(self._generic, file, len(numbers), embed, folder)
        run(stage)
        vectors = np.concatenate([np.load(stage.result(n)) for n in range(stage.tasks)])
        if not (self.work / POINTS).is_file():
            self.progress("find clusters", 0, None)
            fit_centroids(vectors, self.config).save(self.work)
        centroids = Centroids.load(self.work)
        far = vectors - centroids.points[centroids.assign(vectors)]
        return float(np.einsum("nd,nd->", far, far, dtype=np.float64) / len(vectors))

    def _assign(self, corpus: ClusterCorpus, embed: Embed, run: Run) -> None:
        """Leave the assignments and the histogram of a corpus."""
        if (self.work / histogram_file(corpus.name)).is_file():
            return
        split, folder = self.splits[corpus.name], self.work / _ASSIGNED / corpus.name
        folder.mkdir(parents=True, exist_ok=True)
        stage = AssignRows(
            name=f"assign rows of {corpus.name}",
            shards=split,
            rows=len(open_rows(split)),
            task_rows=self.config.task_rows,
            embed=embed,
            centroids=self.work,
            folder=folder,
            dtype=cluster_type(self.config.clusters),
        )
        if stage.rows == 0:
            raise ConfigError("holds no rows", where=corpus.path)
        run(stage)
        found = stage.collect()
        save_array(self.work / assignments_file(corpus.name), found)
        counts = np.bincount(found, minlength=self.config.clusters).astype(np.int64)
        save_array(self.work / histogram_file(corpus.name), counts)

    def _describe(self, inertia: float) -> ClustersManifest:
        numbers = self.work / _NUMBERS
        sampled = len(np.load(numbers))
        numbers.unlink()
        corpora = []
        for corpus in self.config.corpora:
            assigned = np.load(self.work / assignments_file(corpus.name), mmap_mode="r")
            counts = np.load(self.work / histogram_file(corpus.name))
            corpora.append((corpus, assigned, counts))
        generic = corpora[0][2]
        files = list_files(self.work)
        return ClustersManifest(
            cluster_key=self.key,
            config=_settled(self.config),
            model_hash=self.model.hash if self.model else None,
            clusters=self.config.clusters,
            dimensions=Centroids.load(self.work).points.shape[1],
            sampled_rows=sampled,
            method=choose_method(self.config, sampled),
            inertia=inertia,
            empty_clusters=int(np.count_nonzero(sum(counts for *_, counts in corpora) == 0)),
            corpora=tuple(
                _describe_corpus(c.name, self.splits[c.name], counts, generic)
                for c, _, counts in corpora
            ),
            words=name_clusters(
                [(self.splits[c.name], assigned, counts) for c, assigned, counts in corpora],
                self.config.words,
                self.config.seed,
            ),
            versions={name: version(name) for name in ("numpy", "scikit-learn")},
            files=files,
            clusters_hash=hash_tree(files),
        )


def _describe_corpus(
    name: str, split: Split, counts: np.ndarray, generic: np.ndarray
) -> CorpusFacts:
    manifest = open_rows(split).manifest
    return CorpusFacts(
        name=name,
        rows=manifest.rows,
        shards_hash=manifest.shards_hash,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        entropy_bits=entropy_bits(counts),
        top_cluster=int(counts.argmax()),
        top_share=float(counts.max() / counts.sum()),
        total_variation=total_variation(counts, generic),
    )


def _publish(work: Path, output: Path) -> None:
    """Prove the finished folder, make it durable, and give it its name."""
    load_clusters(work)
    for folder in (*(f for f in work.iterdir() if f.is_dir()), work):
        sync_folder(folder)
    work.rename(output)
    sync_folder(output.parent)
