"""Windows of a source: a few stretches of its files, spread evenly, whose size on disk is known.

What a small part of a huge corpus holds tells what the rest does; nothing is read but the windows.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.configs.errors import DataError
from shoal.data_pipeline.files import open_file
from shoal.data_pipeline.formats import SourceFile, Stretch, find_packing
from shoal.data_pipeline.parts import cut_row_groups

WINDOW_BYTES = 1_000_000
"""On disk; a file no larger is taken whole."""


def choose_windows(files: list[SourceFile], count: int, folder: Path) -> Iterator[Stretch]:
    """Yield about `count` stretches, spread evenly over the bytes of the files.

    Args:
        files: Of one source; none of format `datasets`.
        count: Windows; of a single large file as many are taken from within it.
        folder: Receives the unpacked beginnings of compressed files.
    """
    total = sum(file.bytes for file in files)
    wanted = [(2 * number + 1) * total // (2 * count) for number in range(count)]
    begin = 0
    for number, file in enumerate(files):
        inside = [place - begin for place in wanted if begin <= place < begin + file.bytes]
        begin += file.bytes
        if not inside:
            continue
        if file.bytes <= WINDOW_BYTES or file.format == "text":
            yield Stretch(file)
        elif find_packing(file.name) or file.format == "csv":
            yield _take_head(file, folder / f"head-{number}")
        elif file.format == "parquet":
            yield from _take_row_groups(file, inside)
        else:
            yield from _take_lines(file, inside)


def _take_lines(file: SourceFile, places: list[int]) -> Iterator[Stretch]:
    """Cut windows of whole lines out of JSON lines."""
    taken = 0
    with open_file(file.path) as raw:
        for place in places:
            start = max(taken, place - WINDOW_BYTES // 2)
            raw.seek(start)
            if start > taken or start:
                start += len(raw.readline())  # it began before
            raw.seek(min(start + WINDOW_BYTES, file.bytes))
            end = min(raw.tell() + len(raw.readline()), file.bytes)
            if end > start:
                yield Stretch(file, start, end, 2, end - start)
            taken = end


def _take_row_groups(file: SourceFile, places: list[int]) -> Iterator[Stretch]:
    """Take the row groups that lie at some places."""
    groups = list(cut_row_groups(file, 1))
    chosen = {place * len(groups) // max(1, file.bytes) for place in places}
    yield from (groups[number] for number in sorted(chosen))


def _take_head(file: SourceFile, target: Path) -> Stretch:
    """Unpack the beginning of a file, up to its last whole line, into a file of its own.

    Raises:
        DataError: it is damaged, or its first line is longer than what is read.
    """
    with open_file(file.path) as raw:
        packed = raw.read(WINDOW_BYTES)
    kind = find_packing(file.name)
    data = packed if kind is None else _unpack_start(packed, kind, file)
    whole = len(packed) == file.bytes
    end = len(data) if whole else data.rfind(b"\n") + 1
    if not end:
        raise DataError(
            f"no line ends within its first {WINDOW_BYTES:,} bytes",
            where=file.path,
            fix="look at the file: one record a line is expected",
        )
    target.write_bytes(data[:end])
    size = round(len(packed) * end / len(data))
    plain = file.name.removesuffix(Path(file.name).suffix) if kind else file.name
    copy = replace(file, path=str(target), name=plain, bytes=end, stamp="")
    return Stretch(copy, size=size)


def _unpack_start(packed: bytes, kind: str, file: SourceFile) -> bytes:
    """Return what the beginning of an archive holds, however many members it has."""
    import zstandard

    out = io.BytesIO()
    rest = packed
    try:
        while rest:
            member: Any = (
                zlib.decompressobj(wbits=31)
                if kind == "gzip"
                else zstandard.ZstdDecompressor().decompressobj()
            )
            out.write(member.decompress(rest))
            rest = member.unused_data.lstrip(b"\0") if member.unused_data else b""
    except (zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"cannot be read: damaged: {error}", where=file.path) from None
    return out.getvalue()
