"""The stages of clustering: vectors of sampled rows, and the cluster of every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from shoal.data_pipeline.centroids import Centroids
from shoal.data_pipeline.embedding import EMBED_ROWS, Embed, embed_batches
from shoal.data_pipeline.row_texts import Split, read_row_texts
from shoal.data_pipeline.tokens import save_array

SAMPLE_TASK_ROWS = 8192


@dataclass(frozen=True)
class EmbedSample:
    """Embeds sampled rows; task n leaves n.npy, (rows, dims) float32.

    Args:
        shards: Of one split.
        numbers: File of the numbers of the sampled rows.
        rows: How many there are.
        embed: Texts to vectors.
        folder: Receives the vectors.
    """

    shards: Split
    numbers: Path
    rows: int
    embed: Embed
    folder: Path
    name: str = "embed a sample of rows"

    @property
    def tasks(self) -> int:
        """One for some thousand rows."""
        return -(-self.rows // SAMPLE_TASK_ROWS)

    def result(self, task: int) -> Path:
        """Return the file a task leaves."""
        return self.folder / f"{task:06d}.npy"

    def is_done(self, task: int) -> bool:
        """Whether the vectors are there."""
        return self.result(task).is_file()

    def run(self, task: int) -> None:
        """Embed some of the rows."""
        numbers = np.load(self.numbers, allow_pickle=False)
        mine = numbers[task * SAMPLE_TASK_ROWS : (task + 1) * SAMPLE_TASK_ROWS]
        batches = embed_batches(self.embed, read_in_batches(self.shards, mine))
        save_array(self.result(task), np.concatenate(list(batches)))


@dataclass(frozen=True)
class AssignRows:
    """Finds the cluster of every row of one split; task n leaves n.npy, (rows,) of `dtype`.

    Args:
        name: As in `assign rows of law`.
        shards: Of the split.
        rows: Of the split.
        task_rows: Rows of one task.
        embed: Texts to vectors.
        centroids: Folder of the centroids.
        folder: Receives the clusters.
        dtype: Smallest type that holds the number of any cluster.
    """

    name: str
    shards: Split
    rows: int
    task_rows: int
    embed: Embed
    centroids: Path
    folder: Path
    dtype: str

    @property
    def tasks(self) -> int:
        """One for `task_rows` rows."""
        return -(-self.rows // self.task_rows)

    def result(self, task: int) -> Path:
        """Return the file a task leaves."""
        return self.folder / f"{task:06d}.npy"

    def is_done(self, task: int) -> bool:
        """Whether the clusters of its rows are there."""
        return self.result(task).is_file()

    def run(self, task: int) -> None:
        """Assign a stretch of rows."""
        centroids = _load_centroids(self.centroids)
        first = task * self.task_rows
        numbers = np.arange(first, min(first + self.task_rows, self.rows), dtype=np.int64)
        batches = embed_batches(self.embed, read_in_batches(self.shards, numbers))
        found = [centroids.assign(vectors) for vectors in batches]
        save_array(self.result(task), np.concatenate(found).astype(self.dtype))

    def collect(self) -> np.ndarray:
        """Return what all tasks found.  # (rows,) of `dtype`"""
        parts = [np.load(self.result(task), allow_pickle=False) for task in range(self.tasks)]
        return np.concatenate(parts)


@lru_cache(maxsize=2)
def _load_centroids(folder: Path) -> Centroids:
    return Centroids.load(folder)


def read_in_batches(shards: Split, numbers: np.ndarray) -> Iterator[list[str]]:
    """Yield the texts of rows, `EMBED_ROWS` at a time."""
    for first in range(0, len(numbers), EMBED_ROWS):
        yield read_row_texts(shards, numbers[first : first + EMBED_ROWS])


def cluster_type(clusters: int) -> str:
    """Return the smallest type that holds the numbers of so many clusters."""
    return "<u2" if clusters <= 2**16 else "<u4"
