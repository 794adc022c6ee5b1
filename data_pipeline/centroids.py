"""k-means: centroids of one or two levels, and the nearest of them; the door to scikit-learn's."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.configs.clusters import ClusterConfig
from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.embedding import one_thread
from shoal.data_pipeline.tokens import save_array

FLAT_CLUSTERS = 1024
"""More than these are made in two levels."""

POINTS = "centroids.npy"
COARSE = "coarse.npy"
STARTS = "starts.npy"

_LLOYD_WORK = 10_000_000
_BATCH_ROWS = 4096
_ITERATIONS = 100
_CHUNK_ROWS = 512


@dataclass(frozen=True)
class Centroids:
    """Cluster c is around `points[c]`.

    In two levels, a vector belongs to the nearest coarse centroid, and then to the nearest of its
    points `starts[i]` to `starts[i + 1]`. With one level there is one coarse centroid, which holds
    them all.
    """

    points: np.ndarray  # (k, dims) float32
    coarse: np.ndarray  # (groups, dims) float32
    starts: np.ndarray  # (groups + 1,) int64

    def __len__(self) -> int:
        return len(self.points)

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """Return the cluster of each vector; of equal distances the first.  # (n,) int64

        Args:
            vectors: (n, dims) float32.
        """
        with one_thread():
            if len(self.coarse) == 1:
                return _nearest(vectors, self.points)
            groups = _nearest(vectors, self.coarse)
            found = np.empty(len(vectors), dtype=np.int64)
            for group in np.unique(groups):
                here = np.flatnonzero(groups == group)
                first, last = self.starts[group], self.starts[group + 1]
                found[here] = first + _nearest(vectors[here], self.points[first:last])
            return found

    def save(self, folder: Path) -> None:
        """Write three arrays; the one that counts as the sign of all comes last."""
        save_array(folder / COARSE, self.coarse)
        save_array(folder / STARTS, self.starts)
        save_array(folder / POINTS, self.points)

    @classmethod
    def load(cls, folder: Path) -> Centroids:
        """Read what `save` wrote.

        Raises:
            DataError: missing, or not arrays.
        """
        try:
            arrays = [np.load(folder / n, allow_pickle=False) for n in (POINTS, COARSE, STARTS)]
        except (OSError, ValueError) as error:
            raise DataError(f"the centroids cannot be read: {error}", where=folder) from None
        return cls(*arrays)


def _nearest(vectors: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the number of the nearest point, by squared distance.  # (n,) int64"""
    # Padded to whole chunks: the sum of a product depends on the shape it is computed in.
    lengths = np.einsum("kd,kd->k", points, points)
    found = np.empty(len(vectors), dtype=np.int64)
    padded = np.zeros((_CHUNK_ROWS, points.shape[1]), dtype=np.float32)
    for first in range(0, len(vectors), _CHUNK_ROWS):
        chunk = vectors[first : first + _CHUNK_ROWS]
        padded[: len(chunk)] = chunk
        distances = lengths - 2 * (padded @ points.T)
        found[first : first + len(chunk)] = distances[: len(chunk)].argmin(axis=1)
    return found


def fit_centroids(vectors: np.ndarray, config: ClusterConfig) -> Centroids:
    """Find the centroids of a sample.

    Args:
        vectors: (n, dims) float32, of length one.
        config: Clusters, restarts, method, seed.

    Raises:
        ConfigError: more clusters than vectors.
    """
    if config.clusters > len(vectors):
        raise ConfigError(
            f"{config.clusters} clusters of {len(vectors):,} sampled rows",
            where="clusters",
            fix="lower clusters=, raise sample_rows=, or prepare more text",
        )
    with one_thread(), warnings.catch_warnings():
        # Fewer different vectors than clusters: some stay empty, which the manifest counts.
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        method = choose_method(config, len(vectors))
        if config.clusters <= FLAT_CLUSTERS:
            points = _fit_flat(vectors, config.clusters, config, config.seed, method)
            everything = np.asarray([0, len(points)], dtype=np.int64)
            return Centroids(points, points.mean(axis=0, keepdims=True), everything)
        return _fit_two_levels(vectors, config, method)


def _fit_flat(
    vectors: np.ndarray, count: int, config: ClusterConfig, seed: int, method: str
) -> np.ndarray:
    """Return the centroids of one k-means.  # (count, dims) float32"""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if count == 1:
        return vectors.mean(axis=0, keepdims=True)
    options = {
        "n_clusters": count,
        "n_init": config.restarts,
        "max_iter": _ITERATIONS,
        "random_state": seed % 2**32,
    }
    if method == "lloyd":
        model = KMeans(**options, algorithm="lloyd")
    else:
        model = MiniBatchKMeans(**options, batch_size=_BATCH_ROWS)
    points: np.ndarray = model.fit(vectors).cluster_centers_
    return points.astype(np.float32)


def choose_method(config: ClusterConfig, rows: int) -> str:
    """Return `lloyd` or `minibatch` (Sculley 2010), as asked or by the distances of one round."""
    if config.method != "auto":
        return config.method
    one_level = config.clusters <= FLAT_CLUSTERS
    near = config.clusters if one_level else 2 * math.isqrt(config.clusters)
    return "lloyd" if rows * near < _LLOYD_WORK else "minibatch"


def _fit_two_levels(vectors: np.ndarray, config: ClusterConfig, method: str) -> Centroids:
    """Divide the vectors into groups, and each into clusters by how many vectors it has."""
    coarse = _fit_flat(vectors, math.isqrt(config.clusters), config, config.seed, method)
    groups = _nearest(vectors, coarse)
    sizes = np.bincount(groups, minlength=len(coarse))
    coarse, sizes, groups = _drop_empty(coarse, sizes, groups)
    counts = share_out(config.clusters, sizes)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    points = np.empty((config.clusters, vectors.shape[1]), dtype=np.float32)
    for group, count in enumerate(counts):
        inside = vectors[groups == group]
        points[starts[group] : starts[group + 1]] = _fit_flat(
            inside, int(count), config, config.seed + 1 + group, method
        )
    return Centroids(points, coarse, starts)


def _drop_empty(
    coarse: np.ndarray, sizes: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    held = np.flatnonzero(sizes)
    numbers = np.zeros(len(sizes), dtype=np.int64)
    numbers[held] = np.arange(len(held))
    return coarse[held], sizes[held], numbers[groups]


def share_out(total: int, sizes: np.ndarray) -> np.ndarray:
    """Share a number out in proportion to sizes: at least 1 each, at most the size.

    Args:
        total: From the number of sizes to their sum.
        sizes: (groups,) int64, at least 1 each.

    Returns:
        (groups,) int64, with sum `total`.
    """
    shares = np.ones(len(sizes), dtype=np.int64)
    while (left := total - int(shares.sum())) > 0:
        room = sizes - shares
        exact = left * room / room.sum()  # never beyond the room: left is at most its sum
        whole = np.floor(exact).astype(np.int64)
        if not whole.any():
            order = np.argsort(-exact, kind="stable")[:left]
            whole[order] = 1
        shares += whole
    return shares
