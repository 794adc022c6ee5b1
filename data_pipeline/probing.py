"""A short probe of a corpus: some of its documents, prepared for real, with the time of each stage.

What a forecast says of the whole corpus is what preparing this sample came to.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from shoal.configs.corpus import PrepareConfig, SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.documents import Document, DroppedLog
from shoal.data_pipeline.manifest import Manifest
from shoal.data_pipeline.sources import list_files, read_documents, read_stretches
from shoal.data_pipeline.windows import choose_windows

SAMPLE_BYTES = 8_000_000
"""Text that is prepared: enough for rates that hold, a matter of seconds."""
_WINDOWS, _ALL_WINDOWS = 8, 64  # of one source, and of all: each is read whole

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class SourceSize:
    """How much text a source holds, by its size on disk and what a sample of it expands to."""

    path: str
    disk_bytes: int
    text_bytes: int
    exact: bool
    """Whether all of it was read."""


@dataclass
class Probe:
    """A sample, what it is a sample of, and what preparing it took in one process."""

    sources: list[SourceSize]
    sample_bytes: int
    """Text of the sample before cleaning."""
    hash_bytes_per_second: float = 1e9
    """Of files, in one process."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by the name that `prepare` gives each step."""
    train: Manifest | None = None
    gather_tokens_per_second: float = 0.0
    """Of the loader, from local shards in memory."""

    @property
    def text_bytes(self) -> int:
        """Text of the whole corpus."""
        return sum(source.text_bytes for source in self.sources)

    @property
    def disk_bytes(self) -> int:
        """Size of its files."""
        return sum(source.disk_bytes for source in self.sources)


def probe_corpus(
    config: PrepareConfig, folder: Path, progress: Progress, sample_bytes: int = SAMPLE_BYTES
) -> Probe:
    """Prepare a sample of a corpus in `folder`.

    Documents are taken from windows spread evenly over each source, of every source as much as its
    share of the text.

    Raises:
        DataError: as `prepare` does; also a source whose size is not known before it is read.
    """
    sizes, taken = _write_sample(config, folder, sample_bytes, progress)
    probe = Probe(sizes, taken)
    probe.hash_bytes_per_second = _time_hashing()
    clock = _StageClock(progress)
    _prepare_sample(_sample_config(config, folder), clock)
    probe.stages = clock.close()
    _look_at_rows(probe, folder / "shards" / "train")
    return probe


def _write_sample(
    config: PrepareConfig, folder: Path, sample_bytes: int, progress: Progress
) -> tuple[list[SourceSize], int]:
    """Write documents of all sources to folder/sample.jsonl; note how large the sources are."""
    sources = [*config.train, *config.validation]
    count = max(1, min(_WINDOWS, _ALL_WINDOWS // len(sources)))
    sizes, documents = [], []
    for number, source in enumerate(sources):
        progress("read a sample", number, len(sources))
        heads = folder / f"source-{number}"
        heads.mkdir()
        size, found = _look_into(source, count, sample_bytes, heads)
        sizes.append(size)
        documents.append(found)
    total = sum(size.text_bytes for size in sizes)
    if not total:
        raise DataError(
            "the size of the corpus is not known before it is read",
            where=", ".join(source.path for source in sources),
            fix="forecasts are for files that hold text; save a dataset of a hub to disk first",
        )
    taken = 0
    with (folder / "sample.jsonl").open("w", encoding="utf-8") as out:
        for size, found in zip(sizes, documents, strict=True):
            quota = sample_bytes * size.text_bytes // total
            for document in found:
                if quota <= 0:
                    break
                text_bytes = len(document.text.encode())
                quota -= text_bytes
                taken += text_bytes
                out.write(_to_line(document))
    return sizes, taken


def _look_into(
    source: SourceConfig, count: int, most: int, folder: Path
) -> tuple[SourceSize, list[Document]]:
    """Read windows of a source; return how much text it holds, and documents of them in turn."""
    files = list_files(source)
    disk = sum(file.bytes for file in files)
    if source.format == "datasets":  # its files are tables of plain text, or there are none here
        found = list(_take(read_documents(source, DroppedLog()), most))
        return SourceSize(source.path, disk, disk, exact=False), found
    seen = text = 0
    windows: list[list[Document]] = []
    unlimited = source.model_copy(update={"max_bytes": None})
    for window in choose_windows(files, count, folder):
        documents = list(read_stretches(unlimited, [window], DroppedLog()))
        seen += window.bytes
        text += sum(len(document.text.encode()) for document in documents)
        windows.append(documents)
    expected = round(disk * text / seen) if seen else 0
    if source.max_bytes is not None:
        expected = min(expected, source.max_bytes)
    mixed = [d for turn in zip_longest(*windows) for d in turn if d is not None]
    return SourceSize(source.path, disk, expected, exact=seen == disk), mixed


def _take(documents: Iterator[Document], most: int) -> Iterator[Document]:
    """Yield documents until they have so many bytes."""
    size = 0
    for document in documents:
        yield document
        size += len(document.text.encode())
        if size >= most:
            return


def _to_line(document: Document) -> str:
    tree = {"id": document.id, "text": document.text, "domain": document.domain}
    return json.dumps(tree, ensure_ascii=False) + "\n"


def _sample_config(config: PrepareConfig, folder: Path) -> PrepareConfig:
    from shoal.configs.corpus import ExecutorConfig

    return config.model_copy(
        update={
            "output": str(folder / "shards"),
            "train": (SourceConfig(path=str(folder / "sample.jsonl")),),
            "validation": (),
            "validation_share": 0.0,
            "executor": ExecutorConfig(),
            "processes": 1,
        }
    )


def _prepare_sample(config: PrepareConfig, clock: _StageClock) -> None:
    from shoal.data_pipeline.mds import import_streaming
    from shoal.data_pipeline.shards import prepare

    import_streaming()  # takes seconds, once: not what a shard takes
    clock.start()
    prepare(config, clock)


def _time_hashing() -> float:
    """Return the bytes per second that are hashed."""
    block = bytes(16_000_000)
    begun = time.perf_counter()
    hashlib.sha256(block)
    return len(block) / (time.perf_counter() - begun)


class _StageClock:
    """Times what `prepare` reports: from one step's first word to the next one's."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._label: str | None = None
        self._since = time.perf_counter()

    def start(self) -> None:
        """Count from now on."""
        self._since = time.perf_counter()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        label = what.removesuffix(" (bytes)")
        if label != self._label:
            self._book()
            self._label = label
        self._progress(what, done, total)

    def _book(self) -> None:
        now = time.perf_counter()
        label = self._label or "start"
        self._seconds[label] = self._seconds.get(label, 0.0) + now - self._since
        self._since = now

    def close(self) -> dict[str, float]:
        """End the last step; return the seconds of all."""
        self._book()
        return self._seconds


def _look_at_rows(probe: Probe, train: Path) -> None:
    """Note the manifest of the sample's shards, and how fast rows are gathered from them."""
    import numpy as np

    from shoal.data_pipeline.rows import Rows

    rows = Rows.open(train)
    probe.train = rows.manifest
    numbers = np.random.default_rng(0).integers(0, len(rows), (16, 64))
    rows.gather(numbers[0])  # maps and checks the shards
    begun = time.perf_counter()
    for batch in numbers:
        rows.gather(batch)
    elapsed = time.perf_counter() - begun
    probe.gather_tokens_per_second = numbers.size * rows.manifest.context / elapsed
