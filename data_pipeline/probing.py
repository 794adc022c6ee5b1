"""A short probe of a corpus: some of its documents, prepared for real, with the time of each stage.

What a forecast says of the whole corpus is what preparing this sample came to.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shoal.configs.corpus import PrepareConfig, SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.documents import Document, DroppedLog
from shoal.data_pipeline.formats import find_packing
from shoal.data_pipeline.manifest import Manifest
from shoal.data_pipeline.parts import Part, list_parts, read_part

SAMPLE_BYTES = 8_000_000
"""Text that is prepared: enough for rates that hold, a matter of seconds."""
_PARTS = 8
_WHOLE_PART_BYTES = 4_000_000

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
    reading_seconds: float
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

    Documents are taken from parts spread evenly over each source, of every source as much as its
    share of the whole.

    Raises:
        DataError: as `prepare` does; also a source whose size is not known before it is read.
    """
    probe = _write_sample(config, folder / "sample.jsonl", sample_bytes, progress)
    small = _sample_config(config, folder)
    clock = _StageClock(progress)
    _prepare_sample(small, clock)
    probe.stages = clock.close()
    _look_at_rows(probe, folder / "shards" / "train")
    return probe


def _write_sample(
    config: PrepareConfig, file: Path, sample_bytes: int, progress: Progress
) -> Probe:
    """Write documents of all sources to one file; note how large the sources are."""
    listed = [(source, list_parts(source, n)) for n, source in enumerate(config.train)]
    total = sum(part.bytes for _, parts in listed for part in parts)
    if not total:
        raise DataError(
            "the size of the corpus is not known before it is read",
            where=", ".join(source.path for source in config.train),
            fix="forecasts are for files; save the dataset to disk first",
        )
    sizes, taken, begun = [], 0, time.perf_counter()
    with file.open("w", encoding="utf-8") as out:
        for number, (source, parts) in enumerate(listed):
            progress("read a sample", number, len(listed))
            of_source = sum(part.bytes for part in parts)
            quota = max(1, sample_bytes * of_source // total)
            size, text = _sample_source(source, parts, quota, out.write)
            sizes.append(size)
            taken += text
    return Probe(sizes, taken, time.perf_counter() - begun)


def _sample_source(
    source: SourceConfig, parts: list[Part], quota: int, write: Callable[[str], object]
) -> tuple[SourceSize, int]:
    """Take about `quota` bytes of text from parts spread evenly over a source; count them."""
    chosen = [parts[i * len(parts) // _PARTS] for i in range(_PARTS)]
    chosen = list(dict.fromkeys(chosen))
    each = -(-quota // len(chosen))
    text = disk = taken = 0
    whole = len(chosen) == len(parts)
    for part in chosen:
        documents = read_part(source, part, DroppedLog())
        of_part, ended = 0, True
        lines: list[str] = []
        for document in documents:
            if of_part >= each and part.bytes > _WHOLE_PART_BYTES:
                ended = False
                break
            size = len(document.text.encode())
            if of_part < each:
                lines.append(_to_line(document))
                taken += size
            of_part += size
        write("".join(lines))
        text += of_part
        disk += part.bytes if ended else _estimate_disk(part, lines)
        whole = whole and ended
    of_source = sum(part.bytes for part in parts)
    expected = round(of_source * text / disk) if disk else 0
    if source.max_bytes is not None:
        expected = min(expected, source.max_bytes)
    return SourceSize(source.path, of_source, expected, whole), taken


def _to_line(document: Document) -> str:
    tree = {"id": document.id, "text": document.text, "domain": document.domain}
    return json.dumps(tree, ensure_ascii=False) + "\n"


def _estimate_disk(part: Part, lines: list[str]) -> int:
    """Return what the documents read take on disk where their part was not read to its end."""
    data = "".join(lines).encode()
    files = [stretch.file for stretch in part.stretches]
    packed = any(find_packing(file.name) or file.format == "parquet" for file in files)
    return len(gzip.compress(data, 6)) if packed else len(data)


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
