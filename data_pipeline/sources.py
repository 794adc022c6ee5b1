"""Where documents come from: JSON lines, Parquet, text files, `datasets`; and what was left out.

A record that cannot be used is counted and listed with its place; a file that cannot be read at
all, or a corpus that holds nothing, stops everything.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from shoal.configs.corpus import SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.documents import EXAMPLES, Document, DroppedLog

__all__ = ["EXAMPLES", "Document", "DroppedLog", "SourceFile", "list_files", "read_documents"]

SAMPLES = "{samples}"

_TEXT = (".txt", ".md", ".text")
_LINES = (".jsonl", ".ndjson", ".json")
_PACKED = {".gz": "gzip", ".zst": "zstd"}
_FORMATS = {".parquet": "parquet", **dict.fromkeys(_LINES, "jsonl"), **dict.fromkeys(_TEXT, "text")}


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, and the name it goes by in ids and logs."""

    path: Path
    name: str
    format: str


def resolve_path(path: str) -> str:
    """Put the folder of the shipped samples in place of a leading `{samples}`."""
    if path.startswith(SAMPLES):
        return str(Path(__file__).parent / "samples") + path[len(SAMPLES) :]
    return path


def list_files(source: SourceConfig) -> list[SourceFile]:
    """Return the files of a source, sorted by name; of a `datasets` source those it lies in.

    Raises:
        DataError: nothing there, or nothing of a known format.
    """
    given = Path(resolve_path(source.path)).expanduser()
    if source.format == "datasets":
        files = sorted(p for p in given.rglob("*") if p.is_file()) if given.is_dir() else []
        return [SourceFile(file, str(file.relative_to(given)), "datasets") for file in files]
    if given.is_file():
        paths, base = [given], given.parent
    elif given.is_dir():
        paths, base = [p for p in given.rglob("*") if _wanted(p, source, given)], given
    else:
        paths, base = _glob(given)
    if not paths:
        raise DataError(
            "no documents there",
            where=source.path,
            fix="name a file, a folder or a glob of "
            ".jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt or .md files",
        )
    found = [SourceFile(p, p.relative_to(base).as_posix(), _format_of(p, source)) for p in paths]
    for file in found:
        if any("\ud800" <= character <= "\udfff" for character in file.name):
            raise DataError(
                f"a file's name is not UTF-8: {file.name!a}",
                where=source.path,
                fix="rename it: ids and logs name files",
            )
    return sorted(found, key=lambda file: file.name)


def _wanted(path: Path, source: SourceConfig, base: Path) -> bool:
    """Whether a file in a folder is meant: of the given or a known format, and not hidden."""
    if not path.is_file() or any(p.startswith(".") for p in path.relative_to(base).parts):
        return False
    known = _FORMATS.get(_suffix(path))
    return known is not None if source.format == "auto" else known == source.format


def _glob(pattern: Path) -> tuple[list[Path], Path]:
    """Expand a glob; the base is the longest folder before the first wildcard."""
    parts = pattern.parts
    wild = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
    base = Path(*parts[:wild])
    if wild == len(parts) or not base.is_dir():
        return [], base
    return [p for p in base.glob(str(Path(*parts[wild:]))) if p.is_file()], base


def _suffix(path: Path) -> str:
    """Return the suffix that tells the format, looking through compression."""
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _format_of(path: Path, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    known = _FORMATS.get(_suffix(path))
    if known is None:
        raise DataError(
            f"unknown format {path.suffix or path.name!r}",
            where=path,
            fix="set format: jsonl, parquet, text or datasets",
        )
    return known


def read_documents(source: SourceConfig, dropped: DroppedLog) -> Iterator[Document]:
    """Yield the documents of a source, in an order that depends on its files alone.

    Args:
        source: What to read.
        dropped: Receives every record that is left out because it is broken. Records of other
            domains than `source.domains` are not wanted, and are not counted.

    Raises:
        DataError: a file is missing or cannot be read at all.
    """
    files = list_files(source)
    readers: dict[str, Callable[[SourceFile], Iterator[Record]]] = {
        "jsonl": lambda file: _read_jsonl(file, dropped),
        "parquet": lambda file: _read_parquet(file, source, dropped),
        "text": lambda file: _read_text(file, source, dropped),
    }
    if source.format == "datasets":
        records = _read_datasets(source)
    else:
        records = chain.from_iterable(readers[file.format](file) for file in files)
    size = 0
    for place, record in records:
        document = _make_document(place, record, source, dropped)
        if document is None:
            continue
        size += len(document.text.encode())
        if source.max_bytes is not None and size > source.max_bytes:
            return
        yield document


Record = tuple[str, dict[str, Any]]
"""The place of a record (file:line), and its fields."""


def _make_document(
    place: str, record: dict[str, Any], source: SourceConfig, dropped: DroppedLog
) -> Document | None:
    domain = record.get(source.domain_key)
    label = "" if domain is None else str(domain)
    if source.domains is not None and label not in source.domains:
        return None
    text = record.get(source.text_key)
    if not isinstance(text, str):
        dropped.add(place, f"no text under key {source.text_key!r}")
        return None
    if not text.strip():
        dropped.add(place, "empty text")
        return None
    given = record.get(source.id_key)
    name = place if given is None else str(given)
    try:
        for part in (text, name, label):
            part.encode()
    except UnicodeEncodeError:
        dropped.add(place, "not Unicode text: lone surrogates")
        return None
    return Document(name, text, label, source.path)


def _read_jsonl(file: SourceFile, dropped: DroppedLog) -> Iterator[Record]:
    for number, line in enumerate(read_lines(file.path), 1):
        place = f"{file.name}:{number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
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


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of any file, unpacked by its suffix; an archive may have several parts.

    Raises:
        DataError: it cannot be read to its end; also an archive that is damaged or cut short.
    """
    kind = _PACKED.get(path.suffix.lower())
    try:
        with path.open("rb") as raw:
            yield from _unpack(raw, kind) if kind else raw
    except (EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: damaged or cut short: {error}", where=path) from None
    except OSError as error:
        damage = "" if error.errno else "damaged or cut short: "  # pyarrow gives no number
        raise DataError(f"cannot be read: {damage}{error}", where=path) from None


def _unpack(raw: BinaryIO, kind: str) -> Iterable[bytes]:
    if kind == "gzip":  # pyarrow's reader takes the zero bytes that may follow for damage
        return gzip.GzipFile(fileobj=raw)
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, kind), buffer_size=1 << 20)


def _read_parquet(file: SourceFile, source: SourceConfig, dropped: DroppedLog) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            known = set(table.schema_arrow.names)
            if source.text_key not in known:
                raise DataError(
                    f"no column {source.text_key!r}; there are {', '.join(sorted(known))}",
                    where=file.path,
                    fix="set text_key",
                )
            keys = [source.text_key, source.id_key, source.domain_key]
            columns = [key for key in dict.fromkeys(keys) if key in known]
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for record in _to_records(batch):
                    number += 1
                    place = f"{file.name}:{number}"
                    if record is None:
                        dropped.add(place, "not UTF-8")
                    else:
                        yield place, record
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot be read as Parquet: {error}", where=file.path) from None


def _to_records(batch: Any) -> list[dict[str, Any] | None]:
    """Return the rows of a table; None for those whose bytes are not the text they claim to be."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:  # Parquet readers do not look into strings
        if batch.num_rows == 1:
            return [None]
        return [row for i in range(batch.num_rows) for row in _to_records(batch.slice(i, 1))]


def _read_text(file: SourceFile, source: SourceConfig, dropped: DroppedLog) -> Iterator[Record]:
    """Yield a whole file as one document, named by its path."""
    data = b"".join(read_lines(file.path))
    try:
        yield file.name, {source.id_key: file.name, source.text_key: data.decode("utf-8-sig")}
    except UnicodeDecodeError:
        dropped.add(file.name, "not UTF-8")


def _read_datasets(source: SourceConfig) -> Iterator[Record]:
    """Yield the rows of a `datasets` source: a saved dataset, a folder of files, or a Hub name."""
    import datasets

    path = Path(resolve_path(source.path)).expanduser()
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            rows = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            name = str(path) if path.exists() else source.path
            rows = datasets.load_dataset(
                name, name=source.subset, split=source.split, streaming=True
            )
        for number, record in enumerate(rows, 1):
            yield f"{source.path}[{source.split}]:{number}", record
    except DataError:
        raise
    except Exception as error:  # the library raises its own, fsspec's and pyarrow's errors
        raise DataError(
            f"datasets cannot load it: {type(error).__name__}: {error}", where=source.path
        ) from error
