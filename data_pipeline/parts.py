"""Parts of a source: what one task reads, so that many files and one huge file alike are shared.

Parts depend on the files alone, never on how many processes there are. Read one after the other
they give what the whole source gives: the same documents, ids and dropped records, in its order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shoal.configs.corpus import SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.documents import Document, DroppedLog
from shoal.data_pipeline.files import open_file
from shoal.data_pipeline.formats import SourceFile, Stretch, find_packing, open_parquet
from shoal.data_pipeline.sources import list_files, read_stretches

PART_BYTES = 64_000_000
"""Size on disk at which a part is full."""

_MAX_FILES = 10_000  # in one part: a list of millions is no task to send
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Part:
    """What one task reads of a source."""

    source: int
    """Number of the source, as its caller counts."""
    number: int
    """Of the part within its source, from 0."""
    stretches: tuple[Stretch, ...]
    """Empty for a `datasets` source that is not a folder here."""

    @property
    def bytes(self) -> int:
        """Size on disk; 0 where that is unknown."""
        return sum(stretch.bytes for stretch in self.stretches)


def list_parts(source: SourceConfig, number: int, part_bytes: int = PART_BYTES) -> list[Part]:
    """Cut a source into parts, in the order of its documents.

    An uncompressed JSON lines file larger than a part is cut at line ends, which takes one pass
    over it; a Parquet file between row groups. Small files share a part. What must be read in one
    go (`datasets`, `max_bytes`) is one part.

    Args:
        source: What to cut.
        number: Of the source, noted in its parts.
        part_bytes: Size on disk at which a part is full.

    Raises:
        DataError: nothing there, or a file that cannot be read.
        ConfigError, PreflightError: as `list_files`.
    """
    files = list_files(source)
    if source.format == "datasets" or source.max_bytes is not None:
        return [Part(number, 0, tuple(Stretch(file) for file in files))]
    groups: list[list[Stretch]] = []
    filled = 0
    for stretch in (stretch for file in files for stretch in _cut_file(file, part_bytes)):
        if not groups or filled + stretch.bytes > part_bytes or len(groups[-1]) == _MAX_FILES:
            groups.append([])
            filled = 0
        groups[-1].append(stretch)
        filled += stretch.bytes
    return [Part(number, place, tuple(group)) for place, group in enumerate(groups)]


def read_part(source: SourceConfig, part: Part, dropped: DroppedLog) -> Iterator[Document]:
    """Yield the documents of a part, in order.

    Args:
        source: The source that was cut.
        part: What to read of it.
        dropped: Receives every record that is left out because it is broken, and counts the rest.

    Raises:
        DataError: a file is missing, was cut short since, or cannot be read at all.
    """
    yield from read_stretches(source, part.stretches, dropped)


def _cut_file(file: SourceFile, part_bytes: int) -> Iterator[Stretch]:
    if file.bytes <= part_bytes or find_packing(file.name):
        yield Stretch(file)
    elif file.format == "jsonl":
        yield from _cut_lines(file, part_bytes)
    elif file.format == "parquet":
        yield from cut_row_groups(file, part_bytes)
    else:
        yield Stretch(file)


def _cut_lines(file: SourceFile, part_bytes: int) -> Iterator[Stretch]:
    """Cut a file after every `part_bytes`, at the end of the line that stands there."""
    start, line = 0, 1
    try:
        with open_file(file.path) as raw:
            while True:
                end, lines = start, 0
                while end - start < part_bytes:
                    block = raw.read(min(_BLOCK_BYTES, part_bytes - (end - start)))
                    if not block:
                        break
                    end += len(block)
                    lines += block.count(b"\n")
                rest = raw.readline()
                end += len(rest)
                lines += rest.endswith(b"\n")
                if end == start:
                    return
                yield Stretch(file, start, end, line, end - start)
                start, line = end, line + lines
    except OSError as error:
        raise DataError(f"cannot be read: {error}", where=file.path) from None


def cut_row_groups(file: SourceFile, part_bytes: int) -> Iterator[Stretch]:
    """Cut a file before each row group with which a part would be too large."""
    import pyarrow

    try:
        with open_parquet(file.path) as table:
            facts = [_weigh_group(table.metadata.row_group(i)) for i in range(table.num_row_groups)]
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot be read as Parquet: {error}", where=file.path) from None
    if not facts:
        yield Stretch(file)
        return
    first, line, rows, size = 0, 1, 0, 0
    for number, (group_rows, group_bytes) in enumerate(facts):
        if number > first and size + group_bytes > part_bytes:
            yield Stretch(file, first, number, line, size)
            first, line, rows, size = number, line + rows, 0, 0
        rows, size = rows + group_rows, size + group_bytes
    yield Stretch(file, first, len(facts), line, size)


def _weigh_group(group: Any) -> tuple[int, int]:
    """Return the rows of a row group, and its bytes on disk."""
    columns = [group.column(i) for i in range(group.num_columns)]
    return group.num_rows, sum(c.total_compressed_size for c in columns)
