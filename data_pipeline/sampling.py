"""Importance sampling: the rows of a generic corpus in the proportions of a domain's clusters.

With a hidden cluster c and P(x | c, domain) = P(x | c), the weight of a row x is
P(c(x) | domain) / P(c(x) | generic) (Grangier et al. 2024, arXiv:2402.01093, section 3.3): draw a
cluster from the domain's histogram, then a row uniformly among the generic rows of that cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.configs.errors import ConfigError
from shoal.data_pipeline.order import PARTITIONS, make_keys, scramble

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_KEYS = 4


def make_target(generic: np.ndarray, domain: np.ndarray, temper: float = 1.0) -> np.ndarray:
    """Return the share of each cluster in the resampled stream.  # (k,) float64

    The weights P(c | domain) / P(c | generic) are raised to `temper`: 1 is the paper's, 0 leaves
    the generic corpus as it is, between them fewer rows are repeated. Mass of clusters that have no
    generic row goes to the others in proportion.

    Args:
        generic: Rows of the generic corpus in each cluster.  # (k,) int64
        domain: Rows of the domain's training split in each cluster.  # (k,) int64
        temper: At least 0.

    Raises:
        ConfigError: no cluster holds rows of both.
    """
    held = np.flatnonzero(generic if temper == 0 else (generic > 0) & (domain > 0))
    if not len(held):
        raise ConfigError(
            "no cluster holds rows of the domain and of the generic corpus",
            where="clusters",
            fix="make fewer clusters, or lower temper",
        )
    shares = generic[held] / generic.sum()
    if temper in (0, 1):  # exact on every machine, and a weight of 0 counts as 1 where temper is 0
        mass = domain[held] / domain.sum() if temper else shares
    else:  # as logarithms: powers leave the range of a number
        logs = temper * np.log(domain[held] / domain.sum() / shares) + np.log(shares)
        mass = np.exp(logs - logs.max())
    target = np.zeros(len(generic))
    target[held] = mass / mass.sum()
    return target


def row_number_type(rows: int) -> np.dtype:
    """Return the smallest type that holds the number of any of so many rows."""
    return np.dtype(np.uint32 if rows <= 2**32 else np.int64)


class SampledOrder:
    """The endless order of a resampled stream: position p draws a cluster, then a row of it.

    Both draws are hashes of seed and position, so that any position is found in constant time and
    draws are independent of each other: rows come again before all have been seen. Takes 4 bytes of
    memory a generic row, 8 from 2^32 rows on.

    Args:
        clusters: The cluster of every generic row.  # (rows,)
        target: Share of each cluster; 0 where it has no row.  # (k,) float64
        key: Seed and stream.
    """

    def __init__(
        self, clusters: np.ndarray, target: np.ndarray, key: tuple[int | str, ...]
    ) -> None:
        counts = np.bincount(clusters, minlength=len(target))
        if len(counts) > len(target) or np.any((target > 0) & (counts == 0)):
            raise ConfigError("the target names clusters that have no row", where="sample")
        self.size = len(clusters)
        # Held by every rank, so of the smallest type; freed at once, the sort takes 8 bytes a row.
        self._rows = np.argsort(clusters, kind="stable").astype(row_number_type(self.size))
        self._counts = counts
        self._firsts = np.cumsum(counts) - counts
        self._edges = np.cumsum(target / target.sum())
        self._edges[np.flatnonzero(target)[-1] :] = np.inf  # rounding leaves the last below 1
        self._keys = make_keys(_KEYS, *key, "sampled")

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Return the generic rows at positions of the stream.  # (n,) int64

        Args:
            positions: (n,) int64, at least 0.
        """
        words = np.asarray(positions).astype(np.uint64) * _GOLDEN
        clusters = np.searchsorted(self._edges, _hash_to_unit(words, self._keys[:2]), side="right")
        sizes = self._counts[clusters]
        places = (_hash_to_unit(words, self._keys[2:]) * sizes).astype(np.int64)
        found = self._rows[self._firsts[clusters] + np.minimum(places, sizes - 1)]
        return found.astype(np.int64)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows at positions, and the stretch of the shards each is from.

        A batch that is sorted by stretch lets every rank read nearly the same shards all along.

        Args:
            positions: (n,) int64, at least 0.

        Returns:
            Row numbers, (n,) int64; numbers of stretches, (n,) int64, below PARTITIONS.
        """
        rows = self.rows(positions)
        return rows, rows * PARTITIONS // self.size


def _hash_to_unit(words: np.ndarray, keys: tuple[np.uint64, ...]) -> np.ndarray:
    """Hash words to numbers from 0 to below 1, 53 bits each.  # (n,) float64"""
    for key in keys:
        words = scramble(words, key)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class SampleFacts:
    """What a resampled stream is like; of a stream of independent draws, in expectation."""

    draws: int
    """Rows drawn, to which the following facts belong."""
    effective_rows: float
    """Generic rows that would, weighted alike, estimate as well: (sum w)^2 / sum w^2 (Kish)."""
    distinct_rows: float
    """Different rows among the draws."""
    most_repeats: float
    """How often a row of the cluster with the largest weight is drawn."""
    lost_share: float
    """Domain rows in clusters that have no generic row, which cannot be sampled."""

    @property
    def unique_fraction(self) -> float:
        """Different rows per draw."""
        return self.distinct_rows / self.draws


def describe_sample(
    generic: np.ndarray, domain: np.ndarray, temper: float, draws: int
) -> SampleFacts:
    """Return what so many draws would be like.

    Args:
        generic: Rows of the generic corpus in each cluster.  # (k,) int64
        domain: Rows of the domain in each cluster.  # (k,) int64
        temper: As in `make_target`.
        draws: Rows drawn.
    """
    held = generic > 0
    chances = make_target(generic, domain, temper)[held] / generic[held]  # of one row in one draw
    # 1 - (1 - chance)^draws, exact also where chances are tiny
    seen = -np.expm1(draws * np.log1p(-np.minimum(chances, 1 - 1e-15)))
    return SampleFacts(
        draws=draws,
        effective_rows=float(1 / (generic[held] * chances**2).sum()),
        distinct_rows=float((generic[held] * seen).sum()),
        most_repeats=float(draws * chances.max()),
        lost_share=float(domain[~held].sum() / domain.sum()),
    )


def entropy_bits(counts: np.ndarray) -> float:
    """Return the entropy of a histogram in bits."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def total_variation(left: np.ndarray, right: np.ndarray) -> float:
    """Return half the summed difference of two histograms' shares, 0 to 1."""
    return float(np.abs(left / left.sum() - right / right.sum()).sum() / 2)
