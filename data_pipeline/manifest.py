"""The manifest: what a folder of shards holds and what it was made from."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.tokenizer import Tokenizer

MANIFEST = "manifest.json"
INDEX = "index.json"
COUNTS = "counts.npy"
DROPPED = "dropped.jsonl"
REMOVED = "removed.jsonl"
"""Documents that cleaning took out, with reason and match; where there was cleaning."""
TOKENIZER = "tokenizer"
"""The folder beside the splits."""

SCHEMA: Literal[2] = 2
"""Of manifests and rows: 1 had rows of tokens alone, whose documents were found by end of text."""

_Number = Annotated[int, Field(ge=0)]

REMAKE = "prepare the corpus again, or take the folder from a good copy"


class Facts(BaseModel):
    """What a manifest says; nothing else may stand in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceFacts(Facts):
    """One source, as read."""

    path: str
    files: int
    sha256: str
    """Over names and contents of its files; of a `datasets` source over what was read."""
    documents: int
    """Documents taken from it into this split."""
    bytes: int
    """UTF-8 bytes of their text."""
    dropped: int
    """Records of it that were broken."""
    unwanted: int = 0
    """Records of it that were of other domains than it is read for."""


class DroppedFacts(Facts):
    """Records that were left out of the sources of this split; all are in dropped.jsonl."""

    total: int
    reasons: dict[str, int]
    examples: tuple[str, ...]


class ShardFacts(Facts):
    """One shard: the file on disk, and its content once unpacked."""

    file: str
    bytes: _Number
    sha256: str
    rows: _Number
    raw_bytes: _Number
    raw_sha256: str


class PackingFacts(Facts):
    """How documents became rows, and what that wastes."""

    method: Literal["concatenate", "best_fit", "window"]
    separator: str
    rows: _Number
    tokens: _Number
    """Targets in all rows."""
    padding_tokens: _Number
    """Inputs of all rows that are filling."""
    cut_documents: int | None
    """Documents whose inputs lie in more than one row; None where that is not known."""

    @property
    def padding_share(self) -> float:
        """Share of what a model is given that is filling."""
        inputs = self.padding_tokens + self.tokens
        return self.padding_tokens / inputs if inputs else 0.0


class CleaningFacts(Facts):
    """What was done to the documents before they were tokenised; see removed.jsonl."""

    documents_read: int
    bytes_read: int
    documents_kept: int
    bytes_kept: int
    removed: dict[str, int]
    """Documents by the reason they were removed for."""
    changed: dict[str, int]
    """What was changed in those that stayed, by kind."""
    evaluation_sets: dict[str, str]
    """SHA-256 of what the documents were compared with, by its path."""


class Manifest(Facts):
    """What one split of prepared shards is."""

    schema_version: Literal[2] = SCHEMA
    prepare_key: str
    """Of everything that determines these bytes; see `shards.prepare`."""
    rows: int
    tokens: int
    """Targets in all rows: tokens of every document, and one end of text each."""
    text_bytes: int
    """UTF-8 bytes of all documents."""
    documents: int
    context: int
    tokenizer_fingerprint: str
    tokenizer_files: dict[str, str] = {}
    """SHA-256 of the files of the tokenizer's folder as prepared. Loading a tokenizer takes most of
    a second, so one whose files are these is taken for the one of the fingerprint."""
    vocab_size: int
    eot_id: int
    dtype: Literal["uint16", "uint32"]
    compression: Literal["zstd"] | None
    config: dict[str, Any]
    sources: tuple[SourceFacts, ...]
    dropped: DroppedFacts
    packing: PackingFacts
    cleaning: CleaningFacts | None = None
    domains: dict[str, int]
    """Documents of each domain label; empty where a part of other shards was taken."""
    lengths: dict[str, int] = {}
    """Documents by tokens: 64 stands for 64 to 127; of whole documents, however they were cut."""
    derived_from: tuple[str, ...] = ()
    """`shards_hash` of the shards whose rows these are, where they were not packed anew."""
    shards: tuple[ShardFacts, ...]
    files: dict[str, str]
    """SHA-256 of every other file of the folder."""
    shards_hash: str
    """Identity of the rows: SHA-256 over the shards' unpacked contents, in order."""

    def to_json(self) -> str:
        """Return the text of manifest.json: the facts, and a hash that makes changes show."""
        tree = self.model_dump(mode="json")
        tree["manifest_sha256"] = hash_tree(tree)
        return json.dumps(tree, indent=1, sort_keys=True) + "\n"


def hash_shards(raw_hashes: list[str]) -> str:
    """Return the identity of rows stored in shards of these contents."""
    return hashlib.sha256("\n".join(raw_hashes).encode()).hexdigest()


def hash_tree(tree: Any) -> str:
    """Return the SHA-256 of plain values."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of a folder of shards; the shards are not touched.

    Raises:
        DataError: no manifest, not ours, altered, or of another schema version.
    """
    file = Path(folder) / MANIFEST
    if file.is_symlink():
        raise DataError("is a link, not a file", where=file, fix=REMAKE)
    if not file.is_file():
        raise DataError(
            "no shards there: manifest.json is missing",
            where=folder,
            fix="name the folder of one split, such as data/corpus/train; shoal prepare writes it",
        )
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        stated = tree.pop("manifest_sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"not a manifest of shards: {error!r}", where=file, fix=REMAKE) from None
    if tree.get("schema_version") != SCHEMA:
        raise DataError(
            f"has schema version {tree.get('schema_version')!r}; this Shoal reads {SCHEMA}",
            where=file,
            fix="prepare the corpus again with this version, into another output",
        )
    if hash_tree(tree) != stated:
        raise DataError("was altered after it was written", where=file, fix=REMAKE)
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        raise DataError(f"not a manifest of shards: {error}", where=file) from None
    _check_names(manifest, file)
    return manifest


def _check_names(manifest: Manifest, where: Path) -> None:
    """Refuse names that lead out of the folder, or stand for two files."""
    names = [shard.file for shard in manifest.shards]
    for name in (*names, *manifest.files):
        if Path(name).name != name or name.startswith(".") or "\\" in name or "\0" in name:
            raise DataError(f"names a file outside its folder: {name!r}", where=where)
    if len({*names, *manifest.files, MANIFEST}) != len(names) + len(manifest.files) + 1:
        raise DataError("names a file twice", where=where)


def check_shard(folder: Path, shard: ShardFacts) -> None:
    """Check that a shard is there, whole and as written.

    Raises:
        DataError: names the shard.
    """
    file = folder / shard.file
    try:
        found = file.lstat()
    except OSError:
        raise DataError("shard is missing", where=file, fix=REMAKE) from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError("shard is a link or a folder, not a file", where=file, fix=REMAKE)
    size = found.st_size
    if size != shard.bytes:
        raise DataError(f"shard has {size} bytes instead of {shard.bytes}", where=file, fix=REMAKE)
    if hash_file(file) != shard.sha256:
        raise DataError(
            "shard is corrupt: its SHA-256 is not the manifest's", where=file, fix=REMAKE
        )


def check_context(manifest: Manifest, context: int) -> None:
    """Check that the rows are of the model's context, neither longer nor shorter.

    Raises:
        ConfigError: they are not.
    """
    if context != manifest.context:
        raise ConfigError(
            f"context {context} does not fit the rows, which hold {manifest.context} tokens",
            where="model.context",
            fix=f"set model.context={manifest.context}, "
            f"or prepare the corpus with context={context}",
        )


def tokenizer_beside(folder: Path) -> Path:
    """Return where the tokenizer of a split lies; the split may be given as `.` or be a link."""
    beside = folder.absolute().parent / TOKENIZER
    return beside if beside.is_dir() else folder.resolve().parent / TOKENIZER


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """Check that the tokenizer beside a split is the one its rows were written with.

    Raises:
        DataError: it is missing, broken, or another one; names its folder.
    """
    beside = tokenizer_beside(folder)
    files = {file.name: hash_file(file) for file in beside.glob("*") if file.is_file()}
    if files and files == manifest.tokenizer_files:
        return
    # Files were added or saved anew, or the shards are older than the note of them: ids decide.
    try:
        found = Tokenizer.load(beside).fingerprint
    except DataError as error:
        cause = f"the tokenizer of the shards cannot be loaded: {error.cause}"
    else:
        if found == manifest.tokenizer_fingerprint:
            return
        cause = (
            f"the tokenizer is not the one the shards were written with (fingerprint "
            f"{found[:12]}, the shards have {manifest.tokenizer_fingerprint[:12]})"
        )
    fix = "put the tokenizer of the shards back, or remove the corpus and prepare it again"
    raise DataError(cause, where=beside, fix=fix)


def token_counts(folder: str | Path) -> np.ndarray:
    """Return how often each token is a target in a split: unigram counts.  # (vocab,) int64

    Raises:
        DataError: missing or altered.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    file = folder / COUNTS
    if not file.is_file() or hash_file(file) != manifest.files.get(COUNTS):
        raise DataError("token counts are missing or were altered", where=file, fix=REMAKE)
    counts: np.ndarray = np.load(file, allow_pickle=False)
    return counts
