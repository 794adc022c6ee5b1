"""Words that tell a person what a cluster is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from shoal.data_pipeline.embedding import read_words
from shoal.data_pipeline.row_texts import Split, read_row_texts, sample_rows

SHOWN_CLUSTERS = 8
"""Clusters of each corpus that are named, by their rows."""

_CLUSTER_ROWS = 32
_BACKGROUND_ROWS = 512
_MIN_LETTERS = 3


def count_rows_with(texts: Sequence[str]) -> Counter[str]:
    """Return in how many texts each word occurs; numbers and words of two letters do not count."""
    split = read_words()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update({w for w in split(text) if len(w) >= _MIN_LETTERS and w.isalpha()})
    return counts


def rank_words(inside: Counter[str], rows: int, outside: Counter[str], others: int) -> list[str]:
    """Return words by p ln(p / q): frequent within, rare elsewhere; equal ones by the alphabet.

    Args:
        inside: Rows of the cluster with each word.
        rows: How many rows were looked at.
        outside: Rows of the corpus with each word.
        others: How many of those were looked at.
    """
    scores = {
        word: count / rows * float(np.log(count / rows * (others + 1) / (outside[word] + 1)))
        for word, count in inside.items()
    }
    return sorted(scores, key=lambda word: (-scores[word], word))


def name_clusters(
    corpora: Sequence[tuple[Split, np.ndarray, np.ndarray]], words: int, seed: int
) -> dict[int, tuple[str, ...]]:
    """Return words for the largest clusters of each corpus, from rows of all corpora in it.

    Args:
        corpora: The shards, cluster of every row (rows,), rows of each cluster (k,).
        words: That name a cluster.
        seed: Of the rows that stand for everything else.
    """
    if not words:
        return {}
    outside: Counter[str] = Counter()
    others = 0
    for split, _, _ in corpora:
        background = sample_rows(split, _BACKGROUND_ROWS, seed)
        outside += count_rows_with(read_row_texts(split, background))
        others += len(background)
    shown: set[int] = set()
    for _, _, histogram in corpora:
        largest = np.argsort(-histogram, kind="stable")[:SHOWN_CLUSTERS]
        shown.update(largest[histogram[largest] > 0].tolist())
    named: dict[int, tuple[str, ...]] = {}
    for cluster in sorted(shown):
        texts = _read_members(corpora, cluster)
        ranked = rank_words(count_rows_with(texts), len(texts), outside, others)
        named[cluster] = tuple(ranked[:words])
    return named


def _read_members(
    corpora: Sequence[tuple[Split, np.ndarray, np.ndarray]], cluster: int
) -> list[str]:
    """Return texts of a cluster, each corpus by its part in it, evenly over its rows."""
    members = [np.flatnonzero(assignments == cluster) for _, assignments, _ in corpora]
    edges = np.cumsum([0, *map(len, members)])
    total = int(edges[-1])
    chosen = np.linspace(0, total - 1, min(_CLUSTER_ROWS, total)).round().astype(np.int64)
    texts: list[str] = []
    for number, (split, _, _) in enumerate(corpora):
        here = chosen[(chosen >= edges[number]) & (chosen < edges[number + 1])] - edges[number]
        texts += read_row_texts(split, members[number][here])
    return texts
