"""How the records of a file are read: JSON lines, Parquet, CSV and plain text, whole or in part.

A record is the place it stands at (`file:line`) and its fields. One that cannot be read is dropped
with its place; a file that cannot be read at all is an error.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from shoal.configs.corpus import SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.documents import DroppedLog
from shoal.data_pipeline.files import BUFFER_BYTES, is_url, open_file

KNOWN = ".jsonl, .ndjson, .json, .parquet, .csv, .tsv, .txt or .md files (.gz and .zst too)"

MAX_FIELD = 1 << 30
"""Characters of one CSV field; a quote that is never closed must not fill the memory."""

_CLOSING = re.compile(rb'(?:[^"]|"")*+"')
"""The rest of a quoted field, with the quote that closes it."""

_PACKED = {".gz": "gzip", ".zst": "zstd"}
_FORMATS = {
    ".parquet": "parquet",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".txt", ".md", ".text"), "text"),
}

Record = tuple[str, dict[str, Any]]
"""The place of a record (file:line), and its fields."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, and the name it goes by in ids and logs."""

    path: str
    """Local path or URL."""
    name: str
    format: str
    bytes: int
    """Size on disk."""
    stamp: str
    """Changes with the contents; empty where the storage tells nothing of the kind."""


@dataclass(frozen=True)
class Stretch:
    """Records of a file that follow each other; by default all of them."""

    file: SourceFile
    first: int = 0
    """First byte (JSON lines) or row group (Parquet)."""
    last: int | None = None
    """One after its last byte or row group; None: the end."""
    first_line: int = 1
    """Number of its first record, as places tell it."""
    size: int | None = None
    """Bytes on disk; None: all of the file's."""

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.file.bytes if self.size is None else self.size


def find_format(name: str) -> str | None:
    """Return the format that a file's name tells, looking through compression; None: unknown."""
    return _FORMATS.get(_plain_suffix(name))


def find_packing(name: str) -> str | None:
    """Return how a file is compressed, by its name; None: it is not."""
    return _PACKED.get(Path(name).suffix.lower())


def _plain_suffix(name: str) -> str:
    name = name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def text_keys(source: SourceConfig) -> tuple[str, ...]:
    """Return the fields that make up the text of a document."""
    return (source.text_key,) if isinstance(source.text_key, str) else source.text_key


def read_records(stretch: Stretch, source: SourceConfig, dropped: DroppedLog) -> Iterator[Record]:
    """Yield the records of a stretch in order.

    Raises:
        DataError: the file cannot be read, or lacks a column of the text.
    """
    if stretch.file.format == "jsonl":
        return _read_jsonl(stretch, dropped)
    if stretch.file.format == "parquet":
        return _read_parquet(stretch, source, dropped)
    if stretch.file.format == "csv":
        return _read_csv(stretch.file, source, dropped)
    return _read_text(stretch.file, source, dropped)


def _read_jsonl(stretch: Stretch, dropped: DroppedLog) -> Iterator[Record]:
    file = stretch.file
    for number, line in enumerate(_cut_lines(stretch), stretch.first_line):
        place = f"{file.name}:{number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            record = _parse_json(line)
        except UnicodeDecodeError:
            dropped.add(place, "not UTF-8")
            continue
        except (ValueError, RecursionError):
            dropped.add(place, "not JSON")
            continue
        if isinstance(record, dict):
            yield place, record
        else:
            dropped.add(place, "not a JSON object")


def _parse_json(line: bytes) -> Any:
    """Return the value of a line: by pydantic's parser, which takes half the time of `json`.

    What it refuses is given to `json`, which tells bad UTF-8 from bad JSON and takes lone
    surrogates, so that the reason of a drop says what is wrong.
    """
    try:
        return from_json(line)
    except ValueError:
        return json.loads(line.decode("utf-8"))


def _cut_lines(stretch: Stretch) -> Iterator[bytes]:
    """Yield the lines of a stretch, which begins and ends where lines do."""
    path = stretch.file.path
    if stretch.first == 0 and stretch.last is None:
        yield from read_lines(path)
        return
    with _name_damage(path), open_file(path) as raw:
        raw.seek(stretch.first)
        left = (stretch.file.bytes if stretch.last is None else stretch.last) - stretch.first
        for line in raw:
            yield line
            left -= len(line)
            if left <= 0:
                return
    if left > 0:
        raise DataError("is shorter than it was when it was first looked at", where=path)


def read_lines(path: str | Path) -> Iterator[bytes]:
    """Yield the lines of any file, unpacked by its suffix; an archive may have several parts.

    Args:
        path: Local path or URL.

    Raises:
        DataError: it cannot be read to its end; also an archive that is damaged or cut short.
    """
    kind = find_packing(str(path))
    with _name_damage(path), open_file(path) as raw:
        yield from _unpack(raw, kind) if kind else raw


@contextlib.contextmanager
def _name_damage(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: damaged or cut short: {error}", where=path) from None
    except OSError as error:
        damage = "" if error.errno else "damaged or cut short: "  # pyarrow gives no number
        raise DataError(f"cannot be read: {damage}{error}", where=path) from None


def _unpack(raw: BinaryIO, kind: str) -> Iterable[bytes]:
    if kind == "gzip":  # pyarrow's reader takes the zero bytes that may follow for damage
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BUFFER_BYTES)
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, kind), buffer_size=BUFFER_BYTES)


def _read_parquet(stretch: Stretch, source: SourceConfig, dropped: DroppedLog) -> Iterator[Record]:
    import pyarrow

    file = stretch.file
    try:
        with open_parquet(file.path) as table:
            keys = (*text_keys(source), source.id_key, source.domain_key)
            known = table.schema_arrow.names
            _check_columns(known, source, file.path)
            columns = [key for key in dict.fromkeys(keys) if key in known]
            last = table.num_row_groups if stretch.last is None else stretch.last
            batches = (table.iter_batches(256, [i], columns) for i in range(stretch.first, last))
            number = stretch.first_line - 1
            for batch in chain.from_iterable(batches):  # all at once would be fetched ahead at once
                for record in _to_records(batch):
                    number += 1
                    place = f"{file.name}:{number}"
                    if record is None:
                        dropped.add(place, "not UTF-8")
                    else:
                        yield place, record
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot be read as Parquet: {error}", where=file.path) from None


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """Open a Parquet file, here or by URL, as a `pyarrow.parquet.ParquetFile`.

    Raises:
        OSError, pyarrow.ArrowException: it is none; DataError for a URL that cannot be reached.
    """
    import pyarrow.parquet

    # Fetched ahead, a row group costs memory but no second request; a disk needs neither.
    settings = {"pre_buffer": is_url(path), "buffer_size": BUFFER_BYTES}
    with open_file(path) as raw, pyarrow.parquet.ParquetFile(raw, **settings) as table:
        yield table


def _check_columns(known: list[str], source: SourceConfig, path: str) -> None:
    """Refuse a table that lacks a column of the text, or has two of one that is asked for."""
    for key in text_keys(source):
        if key not in known:
            there = ", ".join(sorted(set(known)))
            raise DataError(f"no column {key!r}; there are {there}", where=path, fix="set text_key")
    for key in (*text_keys(source), source.id_key, source.domain_key):
        if known.count(key) > 1:
            raise DataError(f"several columns are called {key!r}", where=path)


def _to_records(batch: Any) -> list[dict[str, Any] | None]:
    """Return the rows of a table; None for those whose bytes are not the text they claim to be."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:  # Parquet readers do not look into strings
        if batch.num_rows == 1:
            return [None]
        return [row for i in range(batch.num_rows) for row in _to_records(batch.slice(i, 1))]


def _read_csv(file: SourceFile, source: SourceConfig, dropped: DroppedLog) -> Iterator[Record]:
    """Yield the rows of a CSV or TSV file whose first line names the columns.

    The place of a row is the line it begins at, since quoted fields may hold line breaks. Of one
    that is no CSV every line is dropped: a stray quote may have swallowed good rows.

    Raises:
        DataError: no such columns, or a quote that is not closed up to the end of the file.
    """
    csv.field_size_limit(MAX_FIELD)
    lines = _TextLines(read_lines(file.path))
    separator = "\t" if _plain_suffix(file.name) == ".tsv" else ","
    rows = csv.reader(lines, delimiter=separator, strict=True)
    names = _read_header(rows, file)
    _check_columns(names, source, file.path)
    while True:
        first = rows.line_num + 1
        place = f"{file.name}:{first}"
        lines.start_row()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            if lines.ended:
                raise DataError(
                    f"a quote that opens in line {lines.opened} is never closed",
                    where=f"{file.path}:{lines.opened}",
                    fix='close it, or double it where it is text: ""',
                ) from None
            for number in range(first, rows.line_num + 1):
                dropped.add(f"{file.name}:{number}", "not CSV")
            continue
        if lines.spoiled:
            dropped.add(place, "not UTF-8")
        elif row and len(row) != len(names):
            dropped.add(place, f"{len(row)} fields, {len(names)} in the header")
        elif row:
            yield place, dict(zip(names, row, strict=True))


class _TextLines:
    """Lines as text, and what the reader of rows does not tell of those of the present row."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._number = 0
        self.ended = False
        """Whether more lines were asked for than there are."""
        self.start_row()

    def start_row(self) -> None:
        """Forget the lines of the last row."""
        self.spoiled = False
        """Whether one was no UTF-8, which spoils only its row."""
        self.opened = 0
        """The line in which the last quote of a row of several lines opened."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            self.ended = True
            raise
        self._number += 1
        # A row goes on with a second line only inside quotes: what closes them opens others.
        if not self.opened or _CLOSING.match(line):
            self.opened = self._number
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError:
            self.spoiled = True
            return line.decode("utf-8", "replace")


def _read_header(rows: Any, file: SourceFile) -> list[str]:
    try:
        names = next(rows)
        return [names[0].removeprefix("\ufeff"), *names[1:]]
    except (StopIteration, IndexError, csv.Error):
        raise DataError("its first line names no columns", where=file.path) from None


def _read_text(file: SourceFile, source: SourceConfig, dropped: DroppedLog) -> Iterator[Record]:
    """Yield a whole file as one document, named by its path."""
    data = b"".join(read_lines(file.path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        dropped.add(file.name, "not UTF-8")
        return
    yield file.name, {source.id_key: file.name, text_keys(source)[0]: text}
