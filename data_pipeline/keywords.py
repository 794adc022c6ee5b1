"""Words that tell a person what a cluster is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from shoal.data_pipeline.embedding import read_words
from shoal.data_pipeline.row_texts import read_row_texts, sample_rows

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
    corpora: Sequence[tuple[str, np.ndarray, np.ndarray]], words: int, seed: int
) -> dict[int, tuple[str, ...]]:
    """Return words for the largest clusters of each corpus.

    Args:
        corpora: Path of the shards, cluster of every row (rows,), rows of each cluster (k,); the
            first is the one that others are compared with.
        words: That name a cluster.
        seed: Of the rows that stand for the corpus.
    """
    if not words:
        return {}
    background = sample_rows(corpora[0][0], _BACKGROUND_ROWS, seed)
    outside = count_rows_with(read_row_texts(corpora[0][0], background))
    named: dict[int, tuple[str, ...]] = {}
    for path, assignments, histogram in corpora:
        largest = np.argsort(-histogram, kind="stable")[:SHOWN_CLUSTERS]
        for cluster in largest[histogram[largest] > 0].tolist():
            if cluster not in named:
                members = np.flatnonzero(assignments == cluster)
                evenly = np.linspace(0, len(members) - 1, min(_CLUSTER_ROWS, len(members)))
                chosen = members[evenly.round().astype(np.int64)]
                inside = count_rows_with(read_row_texts(path, chosen))
                ranked = rank_words(inside, len(chosen), outside, len(background))
                named[cluster] = tuple(ranked[:words])
    return named
