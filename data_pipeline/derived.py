"""Shards made of other shards: several merged into one set, and chosen rows taken out of one."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.layout import count_targets
from shoal.data_pipeline.manifest import (
    COUNTS,
    DROPPED,
    INDEX,
    MANIFEST,
    REMOVED,
    TOKENIZER,
    DroppedFacts,
    Manifest,
    ShardFacts,
    check_shard,
    check_tokenizer,
    hash_file,
    hash_shards,
    read_manifest,
    token_counts,
    tokenizer_beside,
)
from shoal.data_pipeline.mds import open_mds, row_type, write_mds
from shoal.data_pipeline.order import permute
from shoal.data_pipeline.proof import index_entry, make_index, verify
from shoal.data_pipeline.provenance import shard_facts
from shoal.data_pipeline.publishing import sync_folder
from shoal.data_pipeline.store import link_or_copy
from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.data_pipeline.tokens import save_array

_EXAMPLES = 10


def merge(out: str | Path, folders: Sequence[str | Path]) -> Manifest:
    """Make one set of shards out of several; their files are linked, or copied to another disk.

    Args:
        out: Folder to make; the tokenizer comes beside it.
        folders: Sets of shards, whose rows follow each other in this order.

    Raises:
        ConfigError: `out` is there already, or a set is named twice.
        DataError: a set is damaged, or they do not go together; names it.
    """
    sources = [(Path(folder), verify(folder)) for folder in folders]
    _check_together(sources)
    with _make_aside(Path(out), sources[0][0], sources[0][1]) as aside:
        shards: list[ShardFacts] = []
        for folder, manifest in sources:
            for shard in manifest.shards:
                name = f"shard.{len(shards):05d}.{shard.file.split('.', 2)[2]}"
                link_or_copy(folder / shard.file, aside / name)
                shards.append(shard.model_copy(update={"file": name}))
        counts = np.sum([token_counts(folder) for folder, _ in sources], axis=0)
        manifests = [manifest for _, manifest in sources]
        facts = _sum_facts(manifests)
        facts["config"] = {
            "packing": manifests[0].config.get("packing"),
            "merged": [manifest.prepare_key for manifest in manifests],
        }
        for name in (DROPPED, REMOVED):
            parts = [folder / name for folder, m in sources if name in m.files]
            if parts:
                (aside / name).write_bytes(b"".join(part.read_bytes() for part in parts))
        return _complete(aside, manifests, shards, counts, facts)


def sample(out: str | Path, folder: str | Path, rows: int, seed: int) -> Manifest:
    """Take `rows` rows at random, each at most once; they stay in their order.

    Raises:
        ConfigError: `out` is there already, or there are not so many rows.
        DataError: the shards are damaged.
    """
    total = read_manifest(folder).rows
    if not 0 < rows <= total:
        raise ConfigError(f"{rows} rows cannot be taken of {total}", where=folder, fix="--rows N")
    numbers = np.sort(permute(np.arange(rows), total, "sample", seed))
    return take_rows(out, folder, numbers, {"sample": {"rows": rows, "seed": seed}})


def take_rows(
    out: str | Path, folder: str | Path, numbers: np.ndarray, how: dict[str, Any]
) -> Manifest:
    """Write chosen rows of a set of shards as a set of their own.

    Args:
        out: Folder to make; the tokenizer comes beside it.
        folder: The set.
        numbers: Of the rows, in the order wanted; repeats are allowed.  # (n,) int64
        how: What chose them: goes into the manifest's config.

    Raises:
        ConfigError: `out` is there already.
        DataError: the shards are damaged.
    """
    folder, manifest = Path(folder), verify(folder)
    beside = tokenizer_beside(folder)
    overlap = int((manifest.config.get("packing") or {}).get("overlap", True))
    with _make_aside(Path(out), folder, manifest) as aside:
        reader = _RawRows(folder, manifest)
        shard_rows = max(shard.rows for shard in manifest.shards)
        counts = np.zeros(manifest.vocab_size, dtype=np.int64)
        shards: list[ShardFacts] = []
        padding = documents = 0
        for low in range(0, len(numbers), shard_rows):
            rows = reader.take(numbers[low : low + shard_rows])
            counts += count_targets(rows, manifest.vocab_size)
            padding += int((manifest.context + overlap - rows["length"].astype(np.int64)).sum())
            documents += count_documents(rows, manifest.packing.separator, overlap)
            entry = write_mds(aside, len(shards), rows, manifest.compression)
            shards.append(shard_facts(entry))
        for name in {DROPPED, REMOVED} & set(manifest.files):
            shutil.copyfile(folder / name, aside / name)
        packing = {"padding_tokens": padding, "cut_documents": None}
        facts = {
            "packing": manifest.packing.model_copy(update=packing),
            "documents": documents,
            "text_bytes": int(counts @ Tokenizer.load(beside).token_bytes),
            "domains": {},
            "lengths": {},
            "config": {"packing": manifest.config.get("packing"), **how},
        }
        return _complete(aside, [manifest], shards, counts, facts)


def count_documents(rows: np.ndarray, separator: str, overlap: int) -> int:
    """Return how many documents end in these rows, each once.

    Args:
        rows: (rows,) of `mds.row_type`.
        separator: `end_of_text` stands before each document, and so before padding as well.
        overlap: Tokens that a row shares with the one before it.
    """
    width = rows["tokens"].shape[1]
    ends = np.unpackbits(rows["ends"], axis=1)[:, overlap:width]
    padded = np.count_nonzero(rows["length"] < width - 1)
    return int(np.count_nonzero(ends)) - (int(padded) if separator == "end_of_text" else 0)


class _RawRows:
    """Rows of a proven set as they are stored."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._ends = np.cumsum([shard.rows for shard in manifest.shards])
        self._type = row_type(manifest.context, np.dtype(manifest.dtype))
        self._mapped: dict[int, np.ndarray] = {}

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Return rows by number.  # (n,) of `mds.row_type`"""
        rows = np.empty(len(numbers), dtype=self._type)
        raw = rows.view(np.uint8).reshape(len(numbers), self._type.itemsize)
        shards = np.searchsorted(self._ends, numbers, side="right")
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            first = self._ends[shard] - self._manifest.shards[shard].rows
            raw[here] = self._map(int(shard))[numbers[here] - first]
        return rows

    def _map(self, number: int) -> np.ndarray:
        if number not in self._mapped:
            manifest, shard = self._manifest, self._manifest.shards[number]
            check_shard(self._folder, shard)
            self._mapped[number] = open_mds(
                self._folder / shard.file,
                shard.rows,
                shard.raw_bytes,
                manifest.context,
                np.dtype(manifest.dtype),
                manifest.compression,
            )
        return self._mapped[number]


def _check_together(sources: list[tuple[Path, Manifest]]) -> None:
    """Check that the rows of several sets may be read as those of one."""
    if not sources:
        raise ConfigError("there is nothing to merge", fix="name at least one folder of shards")
    first = sources[0][1]
    alike: dict[str, Callable[[Manifest], object]] = {
        "tokenizer": lambda m: (m.tokenizer_fingerprint, m.vocab_size, m.eot_id, m.dtype),
        "context": lambda m: m.context,
        "packing": lambda m: (m.packing.method, m.packing.separator, m.config.get("packing")),
        "compression": lambda m: m.compression,
    }
    seen: set[str] = set()
    for folder, manifest in sources:
        for name, fact in alike.items():
            if fact(manifest) != fact(first):
                raise DataError(
                    f"has another {name} than {sources[0][0]}",
                    where=folder,
                    fix="prepare them alike, or train on both: data.train takes several",
                )
        if manifest.shards_hash in seen:
            raise ConfigError("holds the rows of another one named", where=folder)
        seen.add(manifest.shards_hash)


def _sum_facts(manifests: list[Manifest]) -> dict[str, Any]:
    """Return the facts of all that is in several sets."""
    first = manifests[0]
    cut = [manifest.packing.cut_documents for manifest in manifests]
    known = [count for count in cut if count is not None]
    padding = sum(manifest.packing.padding_tokens for manifest in manifests)
    packing = {
        "padding_tokens": padding,
        "cut_documents": sum(known) if len(known) == len(cut) else None,
    }
    examples = [text for manifest in manifests for text in manifest.dropped.examples]
    return {
        "packing": first.packing.model_copy(update=packing),
        "documents": sum(manifest.documents for manifest in manifests),
        "text_bytes": sum(manifest.text_bytes for manifest in manifests),
        "sources": tuple(source for manifest in manifests for source in manifest.sources),
        "dropped": DroppedFacts(
            total=sum(manifest.dropped.total for manifest in manifests),
            reasons=_add([manifest.dropped.reasons for manifest in manifests]),
            examples=tuple(examples[:_EXAMPLES]),
        ),
        "cleaning": _sum_cleaning(manifests),
        "domains": _add([manifest.domains for manifest in manifests]),
        "lengths": _add([manifest.lengths for manifest in manifests]),
    }


def _sum_cleaning(manifests: list[Manifest]) -> Any:
    """Return what cleaning did to all; None unless all were cleaned."""
    facts = [manifest.cleaning for manifest in manifests if manifest.cleaning is not None]
    if len(facts) < len(manifests):
        return None
    numbers = ("documents_read", "bytes_read", "documents_kept", "bytes_kept")
    update: dict[str, Any] = {name: sum(getattr(part, name) for part in facts) for name in numbers}
    update |= {
        name: _add([getattr(part, name) for part in facts]) for name in ("removed", "changed")
    }
    sets = {name: sha for part in facts for name, sha in part.evaluation_sets.items()}
    return facts[0].model_copy(update={**update, "evaluation_sets": sets})


def _add(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    total = sum((Counter(part) for part in counts), Counter[str]())
    return dict(sorted(total.items()))


@contextlib.contextmanager
def _make_aside(out: Path, source: Path, manifest: Manifest) -> Iterator[Path]:
    """Give a folder to fill, with the tokenizer beside it; proven, it gets the name `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists() or out.is_symlink():
            raise ConfigError("is there already", where=out, fix="name a folder that is not there")
        aside = out.parent / f".partial-{out.name}-derived"
        if aside.is_dir():
            shutil.rmtree(aside)
        aside.mkdir()
        try:
            _put_tokenizer(out.parent / TOKENIZER, tokenizer_beside(source))
            check_tokenizer(aside, manifest)
            yield aside
            verify(aside)
        except BaseException:
            shutil.rmtree(aside)
            raise
        sync_folder(aside)
        aside.rename(out)
        sync_folder(out.parent)


def _put_tokenizer(wanted: Path, given: Path) -> None:
    """Copy a tokenizer, unless there is one already."""
    if wanted.exists():
        return
    aside = wanted.with_name(f".{wanted.name}.{os.getpid()}")
    shutil.copytree(given, aside)
    sync_folder(aside)
    aside.rename(wanted)


def _complete(
    aside: Path,
    sources: list[Manifest],
    shards: list[ShardFacts],
    counts: np.ndarray,
    facts: dict[str, Any],
) -> Manifest:
    """Write the files beside the shards, and the manifest last."""
    first = sources[0]
    save_array(aside / COUNTS, counts)
    index = make_index([index_entry(first, shard) for shard in shards])
    (aside / INDEX).write_text(index, encoding="utf-8")
    rows, tokens = sum(shard.rows for shard in shards), int(counts.sum())
    hashes = hash_shards([shard.raw_sha256 for shard in shards])
    origin = [hashes, facts["config"], [manifest.prepare_key for manifest in sources]]
    files = (path for path in sorted(aside.iterdir()) if path.suffix not in (".mds", ".zstd"))
    beside = tokenizer_beside(aside)
    manifest = first.model_copy(
        update={
            **facts,
            "packing": facts["packing"].model_copy(update={"rows": rows, "tokens": tokens}),
            "prepare_key": hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest(),
            "rows": rows,
            "tokens": tokens,
            "tokenizer_files": {f.name: hash_file(f) for f in sorted(beside.iterdir())},
            "derived_from": tuple(manifest.shards_hash for manifest in sources),
            "shards": tuple(shards),
            "shards_hash": hashes,
            "files": {file.name: hash_file(file) for file in files},
        }
    )
    (aside / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
