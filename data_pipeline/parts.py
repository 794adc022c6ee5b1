"""Parts of a source that are read apart from each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shoal.configs.corpus import SourceConfig
from shoal.data_pipeline.documents import Document, DroppedLog
from shoal.data_pipeline.sources import list_files, read_documents


@dataclass(frozen=True)
class Part:
    """A share of a source."""

    number: int
    bytes: int
    """On disk."""


def list_parts(source: SourceConfig, number: int) -> list[Part]:
    """Return the parts of a source."""
    return [Part(number, sum(file.path.stat().st_size for file in list_files(source)))]


def read_part(source: SourceConfig, part: Part, dropped: DroppedLog) -> Iterator[Document]:
    """Yield the documents of a part."""
    yield from read_documents(source, dropped)
