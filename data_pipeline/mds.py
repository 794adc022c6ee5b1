"""The form of a row in an MDS shard, and whole shards to and from arrays; a door to streaming.

A row is three columns of fixed size, so that a mapped shard is a matrix. Shards are laid out here
as mosaicml-streaming's MDSWriter does, byte for byte, since it takes rows one by one: longer than
tokenising them. Reading them never unpickles anything: any other column is refused.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from shoal.configs.errors import DataError

MAX_SHARD_BYTES = 2**32 - 2**24
"""Offsets within a shard are 32 bits wide."""

_HASH = "sha256"
_ZSTD_LEVEL = 3


def token_type(vocab_size: int) -> np.dtype:
    """Return the smallest type that holds every id, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@lru_cache(maxsize=64)
def row_type(context: int, dtype: np.dtype) -> np.dtype:
    """Return the bytes of a row as MDS lays them out: columns by name, without gaps.

    - ends: one bit for each of the context + 1 tokens (numpy's packbits, big bit order), set where
      a token is the last of its document within the row;
    - length: tokens that are text, from the first; what follows is padding (end-of-text tokens);
    - tokens: context + 1 ids, the last of which is a target only.
    """
    return np.dtype(
        [
            ("ends", "u1", (-(-(context + 1) // 8),)),
            ("length", "<u4"),
            ("tokens", dtype.newbyteorder("<"), (context + 1,)),
        ]
    )


def import_streaming() -> types.ModuleType:
    """Import mosaicml-streaming without its image and video parts, which need torchvision."""
    for name in ("multimodal", "text", "vision"):
        module = f"streaming.{name}"
        sys.modules.setdefault(module, types.ModuleType(module))
    import streaming

    return streaming


def row_columns(context: int, dtype: np.dtype) -> dict[str, str]:
    """Return the columns of a row, as MDSWriter takes them."""
    row = row_type(context, dtype)
    return {
        "ends": f"ndarray:uint8:{row['ends'].shape[0]}",
        "length": "uint32",
        "tokens": f"ndarray:{dtype.name}:{context + 1}",
    }


def describe_shard(context: int, dtype: np.dtype, compression: str | None) -> dict[str, Any]:
    """Return what a shard says of itself, in its header and in index.json."""
    columns = row_columns(context, dtype)
    row = row_type(context, dtype)
    return {
        "version": 2,
        "format": "mds",
        "compression": compression,
        "hashes": [_HASH],
        "size_limit": None,
        "column_names": list(columns),
        "column_encodings": list(columns.values()),
        "column_sizes": [row[name].itemsize for name in columns],
    }


def write_mds(
    folder: Path, number: int, rows: np.ndarray, compression: str | None
) -> dict[str, Any]:
    """Write rows as shard `number` of a folder, whole or not at all.

    Args:
        folder: Receives `shard.NNNNN.mds`, or `.mds.zstd`.
        number: Of the shard.
        rows: (rows,) of `row_type`.
        compression: None or `zstd`.

    Returns:
        The entry of the shard in index.json.
    """
    context, dtype = rows["tokens"].shape[1] - 1, rows.dtype["tokens"].base
    described = describe_shard(context, dtype, compression)
    head = _make_head(len(rows), rows.dtype.itemsize, described)
    data = np.ascontiguousarray(rows).view(np.uint8).data
    name = f"shard.{number:05d}.mds"
    raw_hash = hashlib.sha256(head)
    raw_hash.update(data)
    raw = {
        "basename": name,
        "bytes": len(head) + data.nbytes,
        "hashes": {_HASH: raw_hash.hexdigest()},
    }
    if compression is None:
        _write_whole(folder / name, head, data)
        return {**described, "raw_data": raw, "zip_data": None, "samples": len(rows)}
    packed = _pack(head, data)
    _write_whole(folder / f"{name}.zstd", packed)
    zipped = {
        "basename": f"{name}.zstd",
        "bytes": len(packed),
        "hashes": {_HASH: hashlib.sha256(packed).hexdigest()},
    }
    return {**described, "raw_data": raw, "zip_data": zipped, "samples": len(rows)}


def _make_head(count: int, row_bytes: int, described: dict[str, Any]) -> bytes:
    """Return what stands before the rows: their count, their offsets, and the description."""
    text = json.dumps(described, sort_keys=True).encode()
    begin = 4 + 4 * (count + 1) + len(text)
    offsets = begin + row_bytes * np.arange(count + 1, dtype=np.int64)
    return np.uint32(count).tobytes() + offsets.astype("<u4").tobytes() + text


def _pack(head: bytes, data: memoryview) -> bytes:
    import zstandard

    packer = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj(len(head) + data.nbytes)
    return packer.compress(head) + packer.compress(data) + packer.flush()


def _write_whole(file: Path, *parts: bytes | memoryview) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("wb") as stream:
        for part in parts:
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(file)


def open_mds(
    file: Path,
    count: int,
    raw_bytes: int,
    context: int,
    dtype: np.dtype,
    compression: str | None,
    raw_sha256: str | None = None,
) -> np.ndarray:
    """Map a shard as a matrix of bytes; a compressed one is unpacked into a nameless file.

    The hash of the file is not looked at here; the header is: a shard must be of our columns alone.

    Args:
        file: The shard.
        count: Rows it is to hold.
        raw_bytes: Its size, unpacked.
        context: Tokens a row gives to the model.
        dtype: Of a token.
        compression: None or `zstd`.
        raw_sha256: Of the content; None: not checked.

    Returns:
        (rows, bytes of a row) uint8.

    Raises:
        DataError: it is anything else; names the file.
    """
    head_of = describe_shard(context, dtype, compression)
    row_bytes = row_type(context, dtype).itemsize
    with file.open("rb") as stream:
        if compression is None:
            data = _map(stream, file)
        else:
            with tempfile.TemporaryFile(prefix="shoal-") as unpacked:
                _unpack(stream, unpacked, raw_bytes, file)
                data = _map(unpacked, file)
    if len(data) >= 4 and (held := int.from_bytes(data[:4], "little")) != count:
        raise DataError(f"shard holds {held} rows, not {count}", where=file)
    head = _make_head(count, row_bytes, head_of)
    if data[: len(head)] != head or len(data) != len(head) + count * row_bytes:
        raise DataError("shard has rows of another size or form than its manifest says", where=file)
    if raw_sha256 is not None and hashlib.sha256(data).hexdigest() != raw_sha256:
        raise DataError("shard has another content than its manifest says", where=file)
    rows = np.frombuffer(data, np.uint8, count * row_bytes, len(head))
    return rows.reshape(count, row_bytes)


def _map(stream: IO[bytes], file: Path) -> mmap.mmap:
    try:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # nothing in it
        raise DataError("shard is empty", where=file) from None


def _unpack(packed: IO[bytes], unpacked: IO[bytes], size: int, file: Path) -> None:
    """Unpack one shard; no more than was promised is ever written."""
    import zstandard

    written = 0
    try:
        for block in _read_unpacked(zstandard.ZstdDecompressor(), packed):
            written += len(block)
            if written > size:
                break
            unpacked.write(block)
    except zstandard.ZstdError as error:
        raise DataError(f"shard does not unpack: {error}", where=file) from None
    unpacked.flush()
    if written != size:
        raise DataError("shard unpacks to another size than stated", where=file)


def _read_unpacked(unpacker: Any, packed: IO[bytes]) -> Iterator[bytes]:
    with unpacker.stream_reader(packed, closefd=False) as reader:
        while block := reader.read(1 << 20):
            yield block
