"""Where documents come from: files here or by URL, or `datasets`; and what was left out.

A record that cannot be used is counted and listed with its place; a file that cannot be read at
all, or a corpus that holds nothing, stops everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shoal.configs.corpus import SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.documents import EXAMPLES, Document, DroppedLog
from shoal.data_pipeline.files import (
    FileFacts,
    check_url,
    find_files,
    is_changed,
    is_url,
    local_path,
    redact,
)
from shoal.data_pipeline.formats import (
    KNOWN,
    Record,
    SourceFile,
    Stretch,
    find_format,
    read_lines,
    read_records,
    text_keys,
)

__all__ = [
    "EXAMPLES",
    "Document",
    "DroppedLog",
    "SourceFile",
    "list_files",
    "read_documents",
    "read_lines",
    "read_stretches",
    "resolve_path",
]

SAMPLES = "{samples}"
_ROWS_AT_ONCE = 256


def resolve_path(path: str) -> str:
    """Put the folder of the shipped samples in place of a leading `{samples}`."""
    if path.startswith(SAMPLES):
        return str(Path(__file__).parent / "samples") + path[len(SAMPLES) :]
    return path


def list_files(source: SourceConfig) -> list[SourceFile]:
    """Return the files of a source, sorted by name; of a `datasets` source those it lies in.

    Raises:
        DataError: nothing there, nothing of a known format, or a URL that cannot be reached.
        ConfigError: no such kind of URL, or a secret in it.
        PreflightError: the driver of this kind of URL is not installed.
    """
    path = resolve_path(source.path)
    if is_url(path):
        check_url(path)
    if source.format == "datasets":
        found = find_files(path) if not is_url(path) and local_path(path).is_dir() else None
        return [_describe(file, "datasets") for file in found.files] if found else []
    given = find_files(path)
    files = [f for f in given.files if given.kind != "folder" or _wanted(f.name, source)]
    if not files:
        raise DataError(
            "no documents there",
            where=redact(source.path),
            fix=f"name a file, a folder or a glob of {KNOWN}",
        )
    for file in files:
        if any("\ud800" <= character <= "\udfff" for character in file.name):
            raise DataError(
                f"a file's name is not UTF-8: {file.name!a}",
                where=source.path,
                fix="rename it: ids and logs name files",
            )
    return [_describe(file, _format_of(file, source)) for file in files]


def _describe(file: FileFacts, kind: str) -> SourceFile:
    return SourceFile(file.path, file.name, kind, file.bytes, file.stamp)


def _wanted(name: str, source: SourceConfig) -> bool:
    """Whether a file in a folder is meant: of the given or a known format, and not hidden."""
    if any(part.startswith(".") for part in name.split("/")):
        return False
    known = find_format(name)
    return known is not None if source.format == "auto" else known == source.format


def _format_of(file: FileFacts, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    known = find_format(file.name)
    if known is None:
        raise DataError(
            f"unknown format {Path(file.name).suffix or file.name!r}",
            where=file.path,
            fix="set format: jsonl, parquet, csv, text or datasets",
        )
    return known


def read_documents(source: SourceConfig, dropped: DroppedLog) -> Iterator[Document]:
    """Yield the documents of a source, in an order that depends on its files alone.

    Args:
        source: What to read.
        dropped: Receives every record that is left out because it is broken, and counts the rest.
            Records of other domains than `source.domains` are not wanted, and not broken.

    Raises:
        DataError: a file is missing or cannot be read at all.
    """
    yield from read_stretches(source, [Stretch(file) for file in list_files(source)], dropped)


def read_stretches(
    source: SourceConfig, stretches: Iterable[Stretch], dropped: DroppedLog
) -> Iterator[Document]:
    """Yield the documents of some stretches of a source's files, one after the other.

    Of a `datasets` source it is always the whole. `max_bytes` counts from the first stretch on.

    Raises:
        DataError: a file is missing or cannot be read at all.
    """
    size = 0
    for file, records in _open_stretches(source, stretches, dropped):
        for place, record in records:
            document = _make_document(place, record, source, dropped)
            if document is None:
                continue
            if source.max_bytes is not None:
                size += len(document.text.encode())
                if size > source.max_bytes:
                    return
            dropped.taken[file] += 1
            yield document


def _open_stretches(
    source: SourceConfig, stretches: Iterable[Stretch], dropped: DroppedLog
) -> Iterator[tuple[str, Iterator[Record]]]:
    """Yield the records of each stretch, and the name they are counted under."""
    if source.format == "datasets":
        yield source.path, _read_datasets(source)
        return
    for stretch in stretches:
        name = "" if stretch.file.format == "text" else stretch.file.name
        yield name, read_records(stretch, source, dropped)
        if is_changed(stretch.file.path, stretch.file.stamp):
            raise DataError(
                "was changed while the corpus was read",
                where=stretch.file.path,
                fix="run the same command again when nothing writes to it",
            )


def _make_document(
    place: str, record: dict[str, Any], source: SourceConfig, dropped: DroppedLog
) -> Document | None:
    domain = record.get(source.domain_key)
    label = "" if domain is None else str(domain)
    if source.domains is not None and label not in source.domains:
        dropped.pass_over([label])
        return None
    text = _join_text(place, record, source, dropped)
    if text is None:
        return None
    given = record.get(source.id_key)
    name = place if given is None or given == "" else str(given)
    if source.domain is not None:
        label = source.domain
    try:
        for part in (text, name, label):
            if not part.isascii():
                part.encode()
    except UnicodeEncodeError:
        dropped.add(place, "not Unicode text: lone surrogates")
        return None
    return Document(name, text, label, source.path)


def _join_text(
    place: str, record: dict[str, Any], source: SourceConfig, dropped: DroppedLog
) -> str | None:
    """Return the text of a record, of one field or of several; None if it has none, noted."""
    if isinstance(source.text_key, str):
        text = record.get(source.text_key)
        if not isinstance(text, str):
            dropped.add(place, f"no text under key {source.text_key!r}")
            return None
    else:
        parts = {key: record.get(key) for key in text_keys(source)}
        there = {key: part for key, part in parts.items() if part is not None}
        wrong = next((key for key, part in there.items() if not isinstance(part, str)), None)
        if wrong is not None or not there:
            keys = repr(wrong) if wrong else ", ".join(map(repr, parts))
            dropped.add(place, f"no text under key {keys}")
            return None
        text = "\n".join(part for part in there.values() if part.strip())
    if not text.strip():
        dropped.add(place, "empty text")
        return None
    return text


def _read_datasets(source: SourceConfig) -> Iterator[Record]:
    """Yield the rows of a `datasets` source: a saved dataset, a folder of files, or a Hub name."""
    import datasets

    path = local_path(resolve_path(source.path))
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            rows = _choose_split(loaded, source) if isinstance(loaded, dict) else loaded
        else:
            name = str(path) if path.exists() else source.path
            rows = datasets.load_dataset(
                name, name=source.subset, split=source.split, streaming=True
            )
        number = 0
        for batch in rows.iter(batch_size=_ROWS_AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield (
                    f"{source.path}[{source.split}]:{number}",
                    dict(zip(batch, values, strict=True)),
                )
    except DataError:
        raise
    except Exception as error:  # the library raises its own, fsspec's and pyarrow's errors
        cause = redact(f"{type(error).__name__}: {error}")
        raise DataError(
            f"datasets cannot load it: {cause}",
            where=redact(source.path),
            fix="check path, subset and split; of a URL or a Hub name also network and rights",
        ) from error


def _choose_split(splits: dict[str, Any], source: SourceConfig) -> Any:
    """Return one of the splits that were saved together."""
    if source.split not in splits:
        raise DataError(
            f"datasets cannot load it: no split {source.split!r}",
            where=source.path,
            fix=f"set split: {' or '.join(map(str, splits))}",
        )
    return splits[source.split]
