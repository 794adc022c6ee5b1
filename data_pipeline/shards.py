"""Corpus to shards: `prepare`, the door to mosaicml-streaming, whose MDS format they are in.

Everything is done in a folder aside, of which each finished piece is kept over a kill; it is
verified and renamed into place in one step, so that shards are either absent or whole.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.configs.corpus import PrepareConfig
from shoal.data_pipeline.excerpt import choose_texts
from shoal.data_pipeline.executors import open_executor
from shoal.data_pipeline.layout import ShardPlan, open_layout, open_tokens, plan_split
from shoal.data_pipeline.manifest import (
    COUNTS,
    DROPPED,
    INDEX,
    MANIFEST,
    TOKENIZER,
    Manifest,
    check_context,
    read_manifest,
    token_counts,
    verify,
)
from shoal.data_pipeline.mds import import_streaming, token_type
from shoal.data_pipeline.packing import find_targets
from shoal.data_pipeline.pieces import Reading, read_sources
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
    output_folder,
    publish,
    remove_stale,
    split_names,
    sync_folder,
)
from shoal.data_pipeline.rows import Rows, check_alike
from shoal.data_pipeline.sources import resolve_path
from shoal.data_pipeline.stages import Progress, Run
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
    if is_done(config, output, key):
        return locate(config, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(output, report), name_output(output):
        built = not is_done(config, output, key)
        if built:
            work = output.absolute().parent / f".partial-{output.name}-{key[:16]}"
            remove_stale(output, work)
            work.mkdir(exist_ok=True)
            processes = choose_processes(config.processes, corpus_bytes(config, hashes))
            with open_executor(config.executor, processes, work / "logs", report) as run:
                _build(config, Origin(key, hashes), work, run, report)
            hashes.save(work / STATS)
            publish(config, work, output, report)
    return locate(config, output, built)


def _silent(what: str, done: int, total: int | None) -> None:
    """Report progress to nobody."""


def _build(config: PrepareConfig, origin: Origin, work: Path, run: Run, progress: Progress) -> None:
    """Make what is missing of tokenizer and splits in the folder aside."""
    if all((work / name / MANIFEST).is_file() for name in split_names(config)):
        return
    if config.tokenizer.path is not None:  # a bad one is found before anything is read
        _save_tokenizer(_load_given(config.tokenizer.path), work / TOKENIZER)
    reading = read_sources(config, corpus_bytes(config, origin.hashes), work / "read", run)
    if config.tokenizer.path is None:
        _train_tokenizer(config, reading, work, run, progress)
    splits = encode_pieces(reading, work / TOKENIZER, work, run)
    tokenizer = Tokenizer.load(work / TOKENIZER)
    for split in splits.values():
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
        os.link(plan.folder / name, folder / name)
    _write_side_files(plan, split, entries, folder)
    manifest = make_manifest(config, origin, split, tokenizer, plan, entries, folder)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    sync_folder(folder)
    folder.rename(work / split.name)


@dataclass(frozen=True)
class WriteShards:
    """Writes rows as shards, one task a shard."""

    plan: ShardPlan
    name: str

    @property
    def tasks(self) -> int:
        """One a shard."""
        return self.plan.shards

    def is_done(self, task: int) -> bool:
        """Whether its index entry is there."""
        return self.plan.part_file(task).is_file()

    def run(self, task: int) -> None:
        """Write a shard."""
        write_shard(self.plan, task)


def write_shard(plan: ShardPlan, number: int) -> None:
    """Write one MDS shard, its index entry and its token counts, unless they are there."""
    part = plan.part_file(number)
    if part.is_file():
        return
    first = number * plan.shard_rows
    last = min(first + plan.shard_rows, plan.rows)
    dtype = token_type(plan.vocab_size)
    tokens = open_layout(plan).fill(first, last, plan.eot, open_tokens(plan).read, dtype)
    counts = np.zeros(plan.vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), 4096):
        targets = find_targets(tokens[start : start + 4096].astype(np.int64), plan.eot)
        counts += np.bincount(targets[targets >= 0], minlength=plan.vocab_size)
    save_array(part.with_suffix(".npy"), counts)
    entry = _write_mds(plan, number, tokens)
    aside = part.with_suffix(".new")
    with aside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(entry))
        file.flush()
        os.fsync(file.fileno())
    aside.rename(part)


def _write_mds(plan: ShardPlan, number: int, tokens: np.ndarray) -> dict[str, Any]:
    """Write rows as shard `number` of the plan's folder; return its entry for index.json."""
    aside = plan.folder / f"{number:05d}.mds"
    if aside.is_dir():
        shutil.rmtree(aside)
    writer = import_streaming().MDSWriter(
        columns={"tokens": f"ndarray:{tokens.dtype.name}:{plan.context + 1}"},
        out=str(aside),
        compression=plan.compression,
        hashes=["sha256"],
        size_limit=None,
    )
    for row in tokens:
        writer.write({"tokens": row})
    writer.finish()
    (entry,) = json.loads((aside / INDEX).read_text())["shards"]
    written = aside / stored_file(entry)["basename"]
    for data in (entry["raw_data"], entry["zip_data"]):
        if data:
            data["basename"] = data["basename"].replace("00000", f"{number:05d}", 1)
    sync_folder(aside)
    written.rename(plan.folder / stored_file(entry)["basename"])
    shutil.rmtree(aside)
    return dict(entry)


def _write_side_files(
    plan: ShardPlan, split: Split, entries: list[dict[str, Any]], folder: Path
) -> None:
    """Write the index of MDS, the token counts, and the list of what was dropped."""
    index = {"version": 2, "shards": entries}
    (folder / INDEX).write_text(json.dumps(index, sort_keys=True), encoding="utf-8")
    parts = [np.load(plan.part_file(n).with_suffix(".npy")) for n in range(plan.shards)]
    save_array(folder / COUNTS, np.sum(parts, axis=0))
    with (folder / DROPPED).open("wb") as file:
        for part in (part for read in split.sources for part in read.dropped_files):
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, file)
