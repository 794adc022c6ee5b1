"""Corpus to shards: `prepare`, the door to mosaicml-streaming, whose MDS format they are in.

Everything is done in a folder aside, of which each finished piece is kept over a kill; it is
verified and renamed into place in one step, so that shards are either absent or whole.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from shoal.configs.corpus import PrepareConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.cleaned import Removals, clean_reading
from shoal.data_pipeline.cleaner import load_cleaner
from shoal.data_pipeline.excerpt import choose_texts
from shoal.data_pipeline.executors import open_executor
from shoal.data_pipeline.files import is_url
from shoal.data_pipeline.layout import ShardPlan, WriteShards, plan_split
from shoal.data_pipeline.manifest import (
    COUNTS,
    DROPPED,
    INDEX,
    MANIFEST,
    REMOVED,
    TOKENIZER,
    Manifest,
    check_context,
    read_manifest,
    token_counts,
)
from shoal.data_pipeline.pieces import Reading, read_sources
from shoal.data_pipeline.proof import make_index, verify
from shoal.data_pipeline.provenance import (
    STATS,
    Origin,
    SourceHashes,
    corpus_bytes,
    make_manifest,
    prepare_key,
    stored_file,
)
from shoal.data_pipeline.publishing import (
    Prepared,
    hold_lock,
    is_done,
    locate,
    name_output,
    name_stale,
    output_folder,
    publish,
    remove_stale,
    split_names,
    sync_folder,
)
from shoal.data_pipeline.rows import Rows, check_alike
from shoal.data_pipeline.sources import resolve_path
from shoal.data_pipeline.stages import Progress, Run
from shoal.data_pipeline.store import link_or_copy
from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.data_pipeline.tokens import Split, encode_pieces, save_array, training_texts
from shoal.data_pipeline.workers import choose_processes

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
    output = output_folder(config)
    hashes = SourceHashes(output / STATS)
    key = prepare_key(config, hashes)
    # Looking behind a URL may renew its receipt, which is for who holds the lock alone.
    if not is_url(config.output) and is_done(config, output, key):
        return locate(config, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(output, report), name_output(output):
        built = not is_done(config, output, key)
        work = output.absolute().parent / f".partial-{output.name}-{key[:16]}"
        if not built and work.is_dir():  # killed between upload and rename
            shutil.rmtree(work)
        if built:
            remove_stale(output, work)
            work.mkdir(exist_ok=True)
            processes = choose_processes(config.processes, corpus_bytes(config, hashes))
            with open_executor(config.executor, processes, work / "logs", report) as run:
                _build(config, Origin(key, hashes), work, run, report)
            _check_unchanged(config, Origin(key, hashes), work)
            hashes.save(work / STATS)
            publish(config, work, output, report)
    return locate(config, output, built)


def _check_unchanged(config: PrepareConfig, origin: Origin, work: Path) -> None:
    """Refuse what was read while it was being written to: no key tells what that is.

    The work gets the name of a stale one: were the old contents put back, it would pass for theirs.

    Raises:
        DataError: they are not what they were.
    """
    if prepare_key(config, origin.hashes) == origin.key:
        return
    work.rename(work.with_name(name_stale(work.name)))
    raise DataError(
        "a source, an evaluation set or the tokenizer changed while it was read",
        where=", ".join(source.path for source in (*config.train, *config.validation)),
        fix="prepare again when nothing writes to it any more",
    )


def _silent(what: str, done: int, total: int | None) -> None:
    """Report progress to nobody."""


def _build(config: PrepareConfig, origin: Origin, work: Path, run: Run, progress: Progress) -> None:
    """Make what is missing of tokenizer and splits in the folder aside."""
    splits_done = all((work / name / MANIFEST).is_file() for name in split_names(config))
    if splits_done and (work / TOKENIZER).is_dir():
        return
    if config.tokenizer.path is not None:  # a bad one is found before anything is read
        _save_tokenizer(_load_given(config.tokenizer.path), work / TOKENIZER)
    if config.clean is not None:  # likewise an evaluation set
        load_cleaner(config.clean)
    reading = read_sources(config, corpus_bytes(config, origin.hashes), work / "read", run)
    removals: dict[str, Removals] = {}
    if config.clean is not None:
        reading, removals = clean_reading(reading, config.clean, work, run)
    if config.tokenizer.path is None:
        _train_tokenizer(config, reading, work, run, progress)
    splits = encode_pieces(reading, work / TOKENIZER, work, run)
    tokenizer = Tokenizer.load(work / TOKENIZER)
    for split in splits.values():
        split.removals = removals.get(split.name)
        if not (work / split.name / MANIFEST).is_file():
            _write_split(config, origin, split, tokenizer, work, run)


def _load_given(path: str) -> Tokenizer:
    return Tokenizer.load(Path(resolve_path(path)).expanduser())


def _train_tokenizer(
    config: PrepareConfig, reading: Reading, work: Path, run: Run, progress: Progress
) -> None:
    """Train a tokenizer on the training documents, unless that is done."""
    if (work / TOKENIZER).is_dir():
        return
    assert config.tokenizer.vocab_size is not None
    texts = choose_texts(reading, config.tokenizer.max_train_bytes, work, run)
    progress("train tokenizer: find merges", 0, None)
    tokenizer = Tokenizer.train(texts, config.tokenizer.vocab_size)
    progress("train tokenizer: find merges", 1, 1)
    _save_tokenizer(tokenizer, work / TOKENIZER)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save a tokenizer, whole or not at all, unless it is there."""
    if folder.is_dir():
        return
    aside = folder.with_name(f"{folder.name}.new")
    tokenizer.save(aside)
    sync_folder(aside)
    aside.rename(folder)


def _write_split(
    config: PrepareConfig, origin: Origin, split: Split, tokenizer: Tokenizer, work: Path, run: Run
) -> None:
    """Pack the tokens of a split into shards, and write its manifest last."""
    plan = plan_split(config, split, tokenizer, work / f"{split.name}.plan")
    run(WriteShards(plan, f"write {split.name} shards"))
    folder = work / f"{split.name}.new"
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir()
    entries = [json.loads(plan.part_file(n).read_text()) for n in range(plan.shards)]
    for entry in entries:
        name = stored_file(entry)["basename"]
        link_or_copy(plan.folder / name, folder / name)
    _write_side_files(plan, split, entries, folder)
    manifest = make_manifest(config, origin, split, tokenizer, plan, entries, folder)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    sync_folder(folder)
    folder.rename(work / split.name)


def _write_side_files(
    plan: ShardPlan, split: Split, entries: list[dict[str, Any]], folder: Path
) -> None:
    """Write the index of MDS, the token counts, and the list of what was dropped."""
    (folder / INDEX).write_text(make_index(entries), encoding="utf-8")
    parts = [np.load(plan.part_file(n).with_suffix(".npy")) for n in range(plan.shards)]
    save_array(folder / COUNTS, np.sum(parts, axis=0))
    _join(folder / DROPPED, [part for read in split.sources for part in read.dropped_files])
    if split.removals is not None:
        _join(folder / REMOVED, split.removals.files)


def _join(file: Path, parts: list[Path]) -> None:
    """Write one file of many."""
    with file.open("wb") as whole:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, whole)
