"""Documents on their way, in Arrow files: what one stage of preparing writes and the next reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shoal.data_pipeline.documents import Document

_COLUMNS = ("id", "text", "domain", "source")
_BATCH_DOCUMENTS = 512


def write_documents(file: Path, documents: Iterable[Document]) -> None:
    """Write documents in their order; the file is there whole or not at all."""
    import pyarrow
    import pyarrow.ipc

    schema = pyarrow.schema([(name, pyarrow.large_string()) for name in _COLUMNS])
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
    aside = name_aside(file)
    with aside.open("wb") as raw:
        with pyarrow.ipc.new_file(raw, schema, options=options) as writer:
            for batch in _in_batches(documents):
                writer.write_batch(_to_arrow(batch, schema))
        raw.flush()
        os.fsync(raw.fileno())
    aside.rename(file)


def name_aside(file: Path) -> Path:
    """Return the name that a file is written under before it has its own; no process shares it."""
    return file.with_name(f".{file.name}.{os.uname().nodename}.{os.getpid()}")


def _in_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _to_arrow(batch: list[Document], schema: Any) -> Any:
    import pyarrow

    columns = [[getattr(document, name) for document in batch] for name in _COLUMNS]
    arrays = [pyarrow.array(column, pyarrow.large_string()) for column in columns]
    return pyarrow.record_batch(arrays, schema=schema)


def read_documents(file: Path) -> Iterator[Document]:
    """Yield the documents of a file, in order."""
    import pyarrow.ipc

    with pyarrow.ipc.open_file(str(file)) as reader:
        for number in range(reader.num_record_batches):
            rows = reader.get_batch(number).to_pydict()
            for values in zip(*(rows[name] for name in _COLUMNS), strict=True):
                yield Document(*values)


def read_columns(file: Path, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield some columns of a file, a pyarrow array each, some hundreds of documents at a time."""
    import pyarrow.ipc

    with pyarrow.ipc.open_file(str(file)) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            yield tuple(batch.column(name) for name in names)


def write_whole(file: Path, data: str | bytes) -> None:
    """Write a small file, durably; it is there whole or not at all."""
    aside = name_aside(file)
    with aside.open("wb") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(file)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; another disk, or one that has no links, gets a copy."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise  # a copy would write into what is there
    except OSError:
        shutil.copyfile(source, target)


def read_labels(file: Path, rows: Sequence[int]) -> list[tuple[str, str, str]]:
    """Return id, domain and source of some documents of a file, by number, in the order asked for.

    The texts are not read.
    """
    import pyarrow
    import pyarrow.ipc

    names = ("id", "domain", "source")
    fields = sorted(_COLUMNS.index(name) for name in names)
    options = pyarrow.ipc.IpcReadOptions(included_fields=fields)
    with pyarrow.memory_map(str(file)) as raw:
        table = pyarrow.ipc.open_file(raw, options=options).read_all().take(list(rows))
        columns = [table.column(name).to_pylist() for name in names]
    return list(zip(*columns, strict=True))
