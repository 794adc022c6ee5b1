"""Proof of a folder of shards: every byte of it against its manifest, every row for its form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from shoal.configs.errors import DataError
from shoal.data_pipeline.layout import count_targets
from shoal.data_pipeline.manifest import (
    COUNTS,
    INDEX,
    MANIFEST,
    REMAKE,
    Manifest,
    ShardFacts,
    check_shard,
    check_tokenizer,
    hash_file,
    hash_shards,
    read_manifest,
    token_counts,
)
from shoal.data_pipeline.mds import describe_shard, open_mds, row_type, token_type

_CHECKED_ROWS = 4096


def verify(folder: str | Path) -> Manifest:
    """Read every byte of a folder of shards and check it against the manifest.

    Beyond hashes, which a forger can compute, every shard must be of our three columns, its rows
    must be possible ones, and index.json must say what the manifest says.

    Returns:
        The manifest, now proven.

    Raises:
        DataError: names the first file that is missing, cut, altered, or not listed, or the
            tokenizer beside the shards where it is another one.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_counts(folder, manifest)
    for shard in manifest.shards:
        check_shard(folder, shard)
    _check_others(folder, manifest)
    _check_index(folder / INDEX, manifest)
    _check_rows(folder, manifest)
    check_tokenizer(folder, manifest)
    return manifest


def _check_counts(folder: Path, manifest: Manifest) -> None:
    """Check that the numbers of a manifest agree with each other."""
    rows = sum(shard.rows for shard in manifest.shards)
    hashes = [shard.raw_sha256 for shard in manifest.shards]
    agree = (
        rows == manifest.rows == manifest.packing.rows
        and manifest.tokens == manifest.packing.tokens
        and hash_shards(hashes) == manifest.shards_hash
        and manifest.dtype == token_type(manifest.vocab_size).name
        and 0 <= manifest.eot_id < manifest.vocab_size
        and manifest.context > 0
        and {INDEX, COUNTS} <= set(manifest.files)
    )
    if not agree:
        raise DataError(
            "its counts do not agree with its shards", where=folder / MANIFEST, fix=REMAKE
        )


def _check_others(folder: Path, manifest: Manifest) -> None:
    """Check the files beside the shards, and that there are no more."""
    for name, expected in manifest.files.items():
        file = folder / name
        if file.is_symlink():
            raise DataError("is a link, not a file", where=file, fix=REMAKE)
        if not file.is_file():
            raise DataError("is missing", where=file, fix=REMAKE)
        if hash_file(file) != expected:
            raise DataError("was altered after it was written", where=file, fix=REMAKE)
    listed = {shard.file for shard in manifest.shards} | {MANIFEST} | set(manifest.files)
    for file in sorted(folder.iterdir()):
        if file.name not in listed:
            raise DataError("is in the folder but not in its manifest", where=file)


def index_entry(manifest: Manifest, shard: ShardFacts) -> dict[str, Any]:
    """Return what index.json must say of a shard."""
    described = describe_shard(manifest.context, np.dtype(manifest.dtype), manifest.compression)
    stored = {
        "basename": shard.file,
        "bytes": shard.bytes,
        "hashes": {"sha256": shard.sha256},
    }
    raw = stored
    if manifest.compression is not None:
        raw = {
            "basename": shard.file.removesuffix(f".{manifest.compression}"),
            "bytes": shard.raw_bytes,
            "hashes": {"sha256": shard.raw_sha256},
        }
    zipped = None if manifest.compression is None else stored
    return {**described, "raw_data": raw, "zip_data": zipped, "samples": shard.rows}


def make_index(entries: list[dict[str, Any]]) -> str:
    """Return the text of index.json."""
    return json.dumps({"version": 2, "shards": entries}, sort_keys=True)


def _check_index(file: Path, manifest: Manifest) -> None:
    """Check that streaming would read the shards that the manifest names, as what they are."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no index of MDS: {error!r}", where=file, fix=REMAKE) from None
    expected = [index_entry(manifest, shard) for shard in manifest.shards]
    if index != {"version": 2, "shards": expected}:
        raise DataError("does not agree with the manifest", where=file, fix=REMAKE)


def _check_rows(folder: Path, manifest: Manifest) -> None:
    """Check the rows of all shards, and that they add up to the counts."""
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for shard in manifest.shards:
        counts += prove_shard(folder, manifest, shard)
    if int(counts.sum()) != manifest.tokens:
        raise DataError("holds other counts than its rows", where=folder / MANIFEST, fix=REMAKE)
    if not np.array_equal(counts, token_counts(folder)):
        raise DataError("holds other counts than the rows", where=folder / COUNTS, fix=REMAKE)


def prove_shard(folder: Path, manifest: Manifest, shard: ShardFacts) -> np.ndarray:
    """Check the content of one shard whose file is as written.

    Returns:
        How often each token is a target in it.  # (vocab,) int64

    Raises:
        DataError: names the shard.
    """
    file = folder / shard.file
    dtype = np.dtype(manifest.dtype)
    matrix = open_mds(
        file,
        shard.rows,
        shard.raw_bytes,
        manifest.context,
        dtype,
        manifest.compression,
        shard.raw_sha256,
    )
    rows = matrix.view(row_type(manifest.context, dtype))[:, 0]
    for first in range(0, len(rows), _CHECKED_ROWS):
        if not _are_possible(rows[first : first + _CHECKED_ROWS], manifest):
            raise DataError("shard has rows that no packing gives", where=file, fix=REMAKE)
    return count_targets(rows, manifest.vocab_size)


def _are_possible(rows: np.ndarray, manifest: Manifest) -> bool:
    """Whether lengths, ids and padding are what packing could have written."""
    tokens, lengths = rows["tokens"], rows["length"]
    width = manifest.context + 1
    if lengths.min() < 1 or lengths.max() > width or tokens.max() >= manifest.vocab_size:
        return False
    short = lengths < width
    padding = np.arange(width) >= lengths[short, None]
    return bool(np.all(tokens[short][padding] == manifest.eot_id))
