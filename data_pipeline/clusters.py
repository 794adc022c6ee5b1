"""Clusters of corpora: the folder they are in, what it says of itself, and proof of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.manifest import MANIFEST, Facts, hash_file, hash_tree
from shoal.data_pipeline.sampling import SampledOrder, SampleFacts, describe_sample, make_target

LEDGER = "ledger.jsonl"
"""What the clusters cost; written beside them by the launcher, and no part of them."""

EMBEDDER = "embedder"
"""The folder of a fitted embedder, within that of the clusters."""

_REMAKE = "make the clusters again, or take the folder from a good copy"


class CorpusFacts(Facts):
    """One corpus: its rows, and how they are spread over the clusters."""

    name: str
    rows: int
    shards_hash: str
    """Of the shards whose rows were assigned."""
    tokenizer_fingerprint: str
    entropy_bits: float
    """Of the histogram; at most log2 of the number of clusters."""
    top_cluster: int
    top_share: float
    """Of the rows, in the cluster that holds most."""
    total_variation: float
    """Between this histogram and the generic one, 0 (alike) to 1."""


class ClustersManifest(Facts):
    """What a folder of clusters is."""

    schema_version: Literal[1] = 1
    cluster_key: str
    """Of everything that determines these bytes."""
    config: dict[str, Any]
    model_hash: str | None
    """Of the model that embeds; None: the embedder was fitted and lies here."""
    clusters: int
    dimensions: int
    sampled_rows: int
    """Rows that k-means saw."""
    method: str
    """Of k-means."""
    inertia: float
    """Mean squared distance of sampled rows to their centroids; vectors have length one."""
    empty_clusters: int
    """Without a row of any corpus."""
    corpora: tuple[CorpusFacts, ...]
    """The generic one, then the domains."""
    words: dict[int, tuple[str, ...]]
    """Frequent in a cluster and rare elsewhere, for the largest clusters of each corpus."""
    versions: dict[str, str]
    files: dict[str, str]
    """SHA-256 of every other file of the folder."""
    clusters_hash: str
    """Identity of centroids and assignments: SHA-256 over `files`."""

    def to_json(self) -> str:
        """Return the text of manifest.json: the facts, and a hash that makes changes show."""
        tree = self.model_dump(mode="json")
        tree["manifest_sha256"] = hash_tree(tree)
        return json.dumps(tree, indent=1, sort_keys=True) + "\n"


def assignments_file(name: str) -> str:
    """Return the file of the cluster of every row of a corpus."""
    return f"assignments-{name}.npy"


def histogram_file(name: str) -> str:
    """Return the file of the rows of a corpus in every cluster."""
    return f"histogram-{name}.npy"


def list_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder of clusters but its manifest."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    names = {str(file.relative_to(folder)): file for file in files}
    return {name: hash_file(file) for name, file in names.items() if name not in (MANIFEST, LEDGER)}


@dataclass(frozen=True)
class Clusters:
    """A folder of clusters, proven to be as written."""

    folder: Path
    manifest: ClustersManifest
    built: bool = False
    """Whether this call made it; False: it was there."""

    @property
    def generic(self) -> CorpusFacts:
        """The corpus that was clustered."""
        return self.manifest.corpora[0]

    def facts(self, name: str) -> CorpusFacts:
        """Return what is known of a corpus.

        Raises:
            ConfigError: there is none of that name.
        """
        for corpus in self.manifest.corpora:
            if corpus.name == name:
                return corpus
        names = ", ".join(corpus.name for corpus in self.manifest.corpora)
        raise ConfigError(f"has no corpus {name!r}", where=self.folder, fix=f"one of {names}")

    def assignments(self, name: str) -> np.ndarray:
        """Return the cluster of every row of a corpus, mapped.  # (rows,) uint16 or uint32"""
        self.facts(name)
        array: np.ndarray = np.load(
            self.folder / assignments_file(name), mmap_mode="r", allow_pickle=False
        )
        return array

    def histogram(self, name: str) -> np.ndarray:
        """Return the rows of a corpus in every cluster.  # (clusters,) int64"""
        self.facts(name)
        array: np.ndarray = np.load(self.folder / histogram_file(name), allow_pickle=False)
        return array

    def order(
        self, domain: str, key: tuple[int | str, ...], *, shards_hash: str, temper: float = 1.0
    ) -> SampledOrder:
        """Return the order in which generic rows are drawn for a domain.

        Args:
            domain: Whose histogram the stream takes.
            key: Seed and stream.
            shards_hash: Of the shards that are read; they must be those that were assigned.
            temper: See `sampling.make_target`.

        Raises:
            ConfigError: no such domain, or nothing to draw from.
            DataError: the shards are not the clustered ones.
        """
        self.check_shards(shards_hash)
        target = make_target(self.histogram(self.generic.name), self.histogram(domain), temper)
        return SampledOrder(self.assignments(self.generic.name), target, key)

    def check_shards(self, shards_hash: str) -> None:
        """Check that a stream reads the rows that were clustered.

        Raises:
            DataError: they are others.
        """
        if shards_hash != self.generic.shards_hash:
            raise DataError(
                "the clusters are of other shards than the stream reads",
                where=self.folder,
                fix=f"sample from the shards of {self.generic.name!r}, or make the clusters again",
            )

    def describe(self, domain: str, draws: int, temper: float = 1.0) -> SampleFacts:
        """Return what so many rows drawn for a domain would be like."""
        generic, histogram = self.histogram(self.generic.name), self.histogram(domain)
        return describe_sample(generic, histogram, temper, draws)


def read_clusters_manifest(folder: str | Path) -> ClustersManifest:
    """Read and check the manifest of a folder of clusters; no other file is touched.

    Raises:
        DataError: no manifest, not one of clusters, altered, or of another version.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise DataError(
            "no clusters there: manifest.json is missing", where=folder, fix="shoal cluster CONFIG"
        )
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        stated = tree.pop("manifest_sha256")
        if hash_tree(tree) != stated:
            raise DataError("was altered after it was written", where=file, fix=_REMAKE)
        return ClustersManifest.model_validate(tree)
    except (ValueError, KeyError, AttributeError, TypeError, ValidationError) as error:
        raise DataError(f"not a manifest of clusters: {error!r}", where=file) from None


def load_clusters(folder: str | Path) -> Clusters:
    """Open a folder of clusters; every file is read and compared with the manifest.

    Raises:
        DataError: names the first file that is missing, altered, or not listed.
    """
    folder = Path(folder)
    manifest = read_clusters_manifest(folder)
    found = list_files(folder)
    for name, expected in manifest.files.items():
        if name not in found:
            raise DataError("is missing", where=folder / name, fix=_REMAKE)
        if found[name] != expected:
            raise DataError("was altered after it was written", where=folder / name, fix=_REMAKE)
    for name in sorted(set(found) - set(manifest.files)):
        raise DataError("is in the folder but not in its manifest", where=folder / name)
    return Clusters(folder, manifest)
