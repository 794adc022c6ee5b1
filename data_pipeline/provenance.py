"""What shards are made from: source hashes, the key they add up to, and the manifest of it all."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from shoal.configs.corpus import PrepareConfig, SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.files import hash_file as hash_contents
from shoal.data_pipeline.files import is_url
from shoal.data_pipeline.layout import ShardPlan
from shoal.data_pipeline.manifest import (
    COUNTS,
    DROPPED,
    INDEX,
    REMOVED,
    TOKENIZER,
    CleaningFacts,
    DroppedFacts,
    Manifest,
    ShardFacts,
    SourceFacts,
    hash_file,
    hash_shards,
)
from shoal.data_pipeline.mds import token_type
from shoal.data_pipeline.pieces import Read
from shoal.data_pipeline.sources import EXAMPLES, SourceFile, list_files, resolve_path
from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.data_pipeline.tokens import Split

STATS = ".sources.json"

_FORMAT = 2  # raise it when the same corpus and config would give other bytes
_CHANGES_NOTHING = {"name", "output", "processes", "executor", "max_dropped_share"}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "encoder.json",
    "vocab.bpe",
)  # fmt: skip


class SourceHashes:
    """SHA-256 of the files of a corpus; a file of known size and time is not read again."""

    def __init__(self, known: Path | None = None) -> None:
        self._known = {} if known is None else _read_known(known)
        self._seen: dict[str, list] = {}

    def hash_source(self, source: SourceConfig) -> tuple[str, int, int]:
        """Return the hash over names and contents of a source's files, their number and size."""
        total = hashlib.sha256()
        found = list_files(source)
        size = 0
        for file in found:
            total.update(f"{file.name}\n{self._hash_file(file)}\n".encode())
            size += file.bytes
        return total.hexdigest(), len(found), size

    def _hash_file(self, file: SourceFile) -> str:
        name = file.path if is_url(file.path) else str(Path(file.path).resolve())
        if not file.stamp or self._known.get(name, [])[:-1] != [file.stamp]:
            self._known[name] = [file.stamp, hash_contents(file.path)]
        self._seen[name] = self._known[name]
        return str(self._known[name][1])

    def save(self, file: Path) -> None:
        """Remember what was hashed."""
        file.write_text(json.dumps(self._seen), encoding="utf-8")


def _read_known(file: Path) -> dict[str, list]:
    """Read what was hashed before; nothing where that is absent or damaged: it only saves time."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = tree if isinstance(tree, dict) else {}
    return {name: facts for name, facts in found.items() if isinstance(facts, list)}


def settled_config(config: PrepareConfig) -> dict[str, Any]:
    """Return the part of a config that determines the bytes of tokenizer and shards."""
    tree = config.model_dump(mode="json")
    return {key: value for key, value in tree.items() if key not in _CHANGES_NOTHING}


def corpus_bytes(config: PrepareConfig, hashes: SourceHashes) -> int | None:
    """Return the size of the sources on disk; None if some are not files here."""
    sources = [*config.train, *config.validation]
    found = [hashes.hash_source(source) for source in sources]
    return sum(size for _, _, size in found) if all(count for _, count, _ in found) else None


def prepare_key(config: PrepareConfig, hashes: SourceHashes) -> str:
    """Return a hash of everything that determines what `prepare` writes.

    A `datasets` source that is not a folder on this machine counts by its name alone.

    Raises:
        DataError: a source or the given tokenizer is missing.
    """
    facts = {
        "format": _FORMAT,
        "config": settled_config(config),
        "sources": [hashes.hash_source(s)[0] for s in (*config.train, *config.validation)],
        "tokenizer": _hash_tokenizer(config.tokenizer.path),
        "evaluation_sets": _hash_evaluation_sets(config),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hash_tokenizer(path: str | None) -> list[str]:
    if path is None:
        return []
    given = Path(resolve_path(path)).expanduser()
    if given.is_file():
        files = [given, given.parent / "tokenizer_config.json"]
    else:
        files = [given / name for name in _TOKENIZER_FILES]
    hashes = [f"{file.name} {hash_file(file)}" for file in files if file.is_file()]
    if not hashes:
        raise DataError("no tokenizer there", where=path)
    return hashes


@dataclass(frozen=True)
class Origin:
    """What a corpus is prepared from, by hash."""

    key: str
    hashes: SourceHashes


def stored_file(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what an entry of MDS's index says of the file on disk."""
    stored: dict[str, Any] = entry["zip_data"] or entry["raw_data"]
    return stored


def make_manifest(
    config: PrepareConfig,
    origin: Origin,
    split: Split,
    tokenizer: Tokenizer,
    plan: ShardPlan,
    entries: list[dict[str, Any]],
    folder: Path,
) -> Manifest:
    """State what a split holds.

    Its other files lie in `folder`, the tokenizer beside that; its shards are `entries`.
    """
    shards = tuple(shard_facts(entry) for entry in entries)
    names = [COUNTS, DROPPED, INDEX] + ([REMOVED] if split.removals is not None else [])
    beside = folder.parent / TOKENIZER
    return Manifest(
        prepare_key=origin.key,
        rows=plan.rows,
        tokens=plan.packing.tokens,
        text_bytes=split.bytes,
        documents=split.documents,
        context=plan.context,
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_files={f.name: hash_file(f) for f in sorted(beside.iterdir())},
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        dtype=cast(Literal["uint16", "uint32"], token_type(tokenizer.vocab_size).name),
        compression=config.compression,
        config=settled_config(config),
        sources=tuple(_source_facts(read, origin.hashes) for read in split.sources),
        dropped=_dropped_facts(split),
        packing=plan.packing,
        cleaning=_cleaning_facts(config, split),
        domains=dict(sorted(split.domains.items())),
        lengths=plan.lengths,
        shards=shards,
        files={name: hash_file(folder / name) for name in names},
        shards_hash=hash_shards([shard.raw_sha256 for shard in shards]),
    )


def shard_facts(entry: dict[str, Any]) -> ShardFacts:
    """Return what a manifest says of a shard, from its entry in index.json."""
    stored, raw = stored_file(entry), entry["raw_data"]
    return ShardFacts(
        file=stored["basename"],
        bytes=stored["bytes"],
        sha256=stored["hashes"]["sha256"],
        rows=entry["samples"],
        raw_bytes=raw["bytes"],
        raw_sha256=raw["hashes"]["sha256"],
    )


def _source_facts(read: Read, hashes: SourceHashes) -> SourceFacts:
    sha256, files, _ = hashes.hash_source(read.source)
    return SourceFacts(
        path=read.source.path,
        files=files,
        sha256=sha256 if files else read.content,
        documents=read.documents,
        bytes=read.bytes,
        dropped=read.dropped.total,
        unwanted=read.dropped.unwanted,
    )


def _cleaning_facts(config: PrepareConfig, split: Split) -> CleaningFacts | None:
    done = split.removals
    if done is None:
        return None
    return CleaningFacts(
        documents_read=done.documents_read,
        bytes_read=done.bytes_read,
        documents_kept=split.documents,
        bytes_kept=split.bytes,
        removed=dict(sorted(done.removed.items())),
        changed=dict(sorted(done.changed.items())),
        evaluation_sets=_hash_evaluation_sets(config),
    )


def _hash_evaluation_sets(config: PrepareConfig) -> dict[str, str]:
    """Return the SHA-256 of what documents are compared with, by its path in the config."""
    if config.clean is None or config.clean.decontaminate is None:
        return {}
    found = {}
    for path in config.clean.decontaminate.against:
        file = Path(resolve_path(path)).expanduser()
        if not file.is_file():
            raise DataError("no evaluation set there", where=path, fix="set clean.decontaminate")
        found[path] = hash_file(file)
    return found


def _dropped_facts(split: Split) -> DroppedFacts:
    reasons = sum((read.dropped.reasons for read in split.sources), Counter[str]())
    examples = [example for read in split.sources for example in read.dropped.examples]
    return DroppedFacts(
        total=reasons.total(),
        reasons=dict(sorted(reasons.items())),
        examples=tuple(examples[:EXAMPLES]),
    )
