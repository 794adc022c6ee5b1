"""Corpus to shards: `prepare`, the door to mosaicml-streaming, whose MDS format they are in.

Everything is done in a folder aside, of which each finished piece is kept over a kill; it is
verified and renamed into place in one step, so that shards are either absent or whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.configs.corpus import PrepareConfig
from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.layout import ShardPlan, plan_split, write_shard
from shoal.data_pipeline.manifest import (
    COUNTS,
    DROPPED,
    INDEX,
    MANIFEST,
    TOKENIZER,
    Manifest,
    check_context,
    check_tokenizer,
    read_manifest,
    token_counts,
)
from shoal.data_pipeline.proof import verify
from shoal.data_pipeline.provenance import (
    STATS,
    Origin,
    SourceHashes,
    corpus_bytes,
    make_manifest,
    prepare_key,
    settled_config,
    stored_file,
)
from shoal.data_pipeline.rows import Rows, check_alike
from shoal.data_pipeline.sources import DroppedLog, resolve_path
from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.data_pipeline.tokens import (
    Progress,
    Split,
    choose_texts,
    encode_corpus,
    save_array,
    training_texts,
)
from shoal.data_pipeline.workers import Pool, choose_processes

__all__ = [
    "Manifest",
    "Prepared",
    "Rows",
    "check_alike",
    "check_context",
    "prepare",
    "read_manifest",
    "token_counts",
    "training_texts",
    "verify",
]

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Prepared:
    """Where a prepared corpus lies."""

    output: Path
    tokenizer: Path
    train: Path
    validation: Path | None
    built: bool = False
    """Whether this call made it; False: it was there."""


def prepare(config: PrepareConfig, progress: Progress | None = None) -> Prepared:
    """Turn a corpus into a tokenizer and shards, unless that is done already.

    The same corpus and config give the same bytes, by however many processes, and also when the
    work was interrupted: started again, it goes on with what is there.

    Args:
        config: Sources, tokenizer, row length.
        progress: Told (what, done, total) now and then; total None where it is unknown.

    Raises:
        DataError: sources missing, empty or broken beyond `max_dropped_share`.
        ConfigError: the output folder holds something else.
        PreflightError: a worker was killed.
        OSError: the disk is full; names `output`. What is done is kept.
    """
    report = progress or _silent
    output = Path(config.output)
    hashes = SourceHashes(output / STATS)
    key = prepare_key(config, hashes)
    if _is_done(config, output, key):
        return _prepared(config, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _hold_lock(output, report), _name_output(output):
        built = not _is_done(config, output, key)
        if built:
            work = output.parent / f".partial-{output.name}-{key[:16]}"
            _remove_stale(output, work)
            work.mkdir(exist_ok=True)
            processes = choose_processes(config.processes, corpus_bytes(config, hashes))
            with Pool(processes) as pool:
                _build(config, Origin(key, hashes), work, pool, report)
            hashes.save(work / STATS)
            _publish(work, output)
    return _prepared(config, output, built)


def _silent(what: str, done: int, total: int | None) -> None:
    """Report progress to nobody."""


def _prepared(config: PrepareConfig, output: Path, built: bool = False) -> Prepared:
    validation = output / VALIDATION if config.validation or config.validation_share else None
    return Prepared(output, output / TOKENIZER, output / TRAIN, validation, built)


def _is_done(config: PrepareConfig, output: Path, key: str) -> bool:
    """Whether `output` holds what the config asks for; anything else there is refused."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / TRAIN / MANIFEST).is_file():
        raise ConfigError(
            "exists and holds no prepared corpus",
            where=output,
            fix="choose another output=..., or remove it",
        )
    found = read_manifest(output / TRAIN)
    if found.prepare_key == key:
        _check_complete(config, output)
        return True
    old, new = found.config, settled_config(config)
    files = "the files of the tokenizer or a source" if config.tokenizer.path else "a source file"
    changed = [name for name in new if old.get(name) != new[name]] or [files]
    raise ConfigError(
        f"holds shards of another corpus: {', '.join(changed)} changed since",
        where=output,
        fix=f"choose another output=..., or remove the old one: rm -r {output}",
    )


def _check_complete(config: PrepareConfig, output: Path) -> None:
    """Refuse a corpus with a folder removed or its tokenizer replaced.

    Preparing again would find it done and not bring them back.
    """
    prepared = _prepared(config, output)
    for folder in (prepared.tokenizer, prepared.train, prepared.validation):
        if folder is not None and not folder.is_dir():
            raise DataError(
                "is missing from a corpus that was prepared",
                where=folder,
                fix=f"remove the rest and prepare it again: rm -r {output}",
            )
    check_tokenizer(prepared.train, read_manifest(prepared.train))


@contextlib.contextmanager
def _hold_lock(output: Path, progress: Progress) -> Iterator[None]:
    """Let one process prepare an output at a time; the others wait and find it done."""
    with (output.parent / f".{output.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait for another process that prepares this corpus", 0, None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _name_output(output: Path) -> Iterator[None]:
    """Name the output in system errors that name no file, as a write to a full disk does."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(output)
        raise


def _remove_stale(output: Path, work: Path) -> None:
    """Remove unfinished work on other versions of this output."""
    for folder in output.parent.glob(f".partial-{output.name}-" + "[0-9a-f]" * 16):
        if folder != work:
            shutil.rmtree(folder)


def _build(
    config: PrepareConfig, origin: Origin, work: Path, pool: Pool, progress: Progress
) -> None:
    """Make what is missing of tokenizer and splits in the folder aside."""
    tokenizer = _settle_tokenizer(config, work / TOKENIZER, progress)
    names = [TRAIN, VALIDATION] if config.validation or config.validation_share else [TRAIN]
    if all((work / name / MANIFEST).is_file() for name in names):
        return
    splits = encode_corpus(config, work / TOKENIZER, work / "tokens", pool, progress)
    for split in splits:
        if not (work / split.name / MANIFEST).is_file():
            _write_split(config, origin, split, tokenizer, work, pool, progress)


def _publish(work: Path, output: Path) -> None:
    """Prove the finished folder, make it durable, and give it its name."""
    for name in (TRAIN, VALIDATION):
        if (work / name).is_dir():
            verify(work / name)
    for folder in work.iterdir():
        if folder.is_dir() and folder.name not in (TOKENIZER, TRAIN, VALIDATION):
            shutil.rmtree(folder)
    for folder in (*(f for f in work.iterdir() if f.is_dir()), work):
        _sync_folder(folder)
    work.rename(output)
    _sync_folder(output.parent)


def _sync_folder(folder: Path) -> None:
    for path in (*(p for p in folder.iterdir() if p.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _settle_tokenizer(config: PrepareConfig, folder: Path, progress: Progress) -> Tokenizer:
    """Load the given tokenizer or train one; it is saved in `folder`, whole or not at all."""
    if folder.is_dir():
        return Tokenizer.load(folder)
    if config.tokenizer.path is not None:
        tokenizer = Tokenizer.load(Path(resolve_path(config.tokenizer.path)).expanduser())
    else:
        assert config.tokenizer.vocab_size is not None
        progress("train tokenizer: read text", 0, None)
        dropped = DroppedLog()
        texts = choose_texts(training_texts(config, dropped), config.tokenizer.max_train_bytes)
        if not texts:
            cause = ["the corpus holds no documents", *dropped.examples[:10]]
            raise DataError("\n  ".join(cause), where=", ".join(s.path for s in config.train))
        progress("train tokenizer: find merges", 0, None)
        tokenizer = Tokenizer.train(texts, config.tokenizer.vocab_size)
        progress("train tokenizer: find merges", 1, 1)
    aside = folder.with_name(f"{folder.name}.new")
    tokenizer.save(aside)
    _sync_folder(aside)
    aside.rename(folder)
    return Tokenizer.load(folder)


def _write_split(
    config: PrepareConfig,
    origin: Origin,
    split: Split,
    tokenizer: Tokenizer,
    work: Path,
    pool: Pool,
    progress: Progress,
) -> None:
    """Pack the tokens of a split into shards, and write its manifest last."""
    plan = plan_split(config, split, tokenizer, work / f"{split.name}.{split.identity}")
    # A worker takes seconds to import streaming: not for a single shard.
    writers = pool if plan.shards > 1 else Pool(1)
    written = writers.map(write_shard, ((plan, number) for number in range(plan.shards)))
    for done, _ in enumerate(written, 1):
        progress(f"write {split.name} shards", done, plan.shards)
    folder = work / f"{split.name}.new"
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir()
    entries = [json.loads(plan.part_file(n).read_text()) for n in range(plan.shards)]
    for entry in entries:
        name = stored_file(entry)["basename"]
        os.link(plan.folder / name, folder / name)
    _write_side_files(plan, split, entries, folder)
    manifest = make_manifest(config, origin, split, tokenizer, plan, entries, folder)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    _sync_folder(folder)
    folder.rename(work / split.name)


def _write_side_files(
    plan: ShardPlan, split: Split, entries: list[dict[str, Any]], folder: Path
) -> None:
    """Write the index of MDS, the token counts, and the list of what was dropped."""
    index = {"version": 2, "shards": entries}
    (folder / INDEX).write_text(json.dumps(index, sort_keys=True), encoding="utf-8")
    parts = [np.load(plan.part_file(n).with_suffix(".npy")) for n in range(plan.shards)]
    save_array(folder / COUNTS, np.sum(parts, axis=0))
    with (folder / DROPPED).open("w", encoding="utf-8") as file:
        for read in split.sources:
            for place, reason in read.dropped.places:
                record = {"source": read.source.path, "place": place, "reason": reason}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
