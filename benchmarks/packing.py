"""Rows: what writing them adds to tokenising, and taking them apart to reading."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import samples
from benchmarks.claims import (
    Claim,
    Target,
    check_equal,
    make_parser,
    print_claim,
    take_turns,
    time_call,
)

CONTEXTS = (2048, 512)
GATHERED_ROWS = 256
SECONDS = 0.3


def main() -> None:
    """Print a line for every claim."""
    quick = make_parser(__doc__).parse_args().quick
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as name:
        folder = Path(name)
        tokenizer: Path | None = None
        for method in ("concatenate", "best_fit", "window"):
            for context in CONTEXTS[:1] if quick else CONTEXTS:
                output = folder / f"{method}-{context}"
                train = _prepare(output, method, context, tokenizer)
                tokenizer = output / "tokenizer"
                print_claim(measure_writing(folder, train, method, context, 2 if quick else 5))
                print_claim(measure_gather(folder, train, 7 if quick else 21))


def _prepare(output: Path, method: str, context: int, tokenizer: Path | None) -> Path:
    from shoal.data_pipeline.shards import prepare

    config = samples.make_config(output, context, tokenizer=tokenizer)
    packing = config.packing.model_copy(update={"method": method})
    return prepare(config.model_copy(update={"packing": packing})).train


def measure_writing(folder: Path, train: Path, method: str, context: int, rounds: int) -> Claim:
    """Compare planning and writing the shards with making their tokens, one process each."""
    from shoal.data_pipeline.layout import WriteShards, plan_split
    from shoal.data_pipeline.manifest import read_manifest
    from shoal.data_pipeline.tokenizer import Tokenizer
    from shoal.data_pipeline.tokens import Split, encode_chunk

    beside = train.parent / "tokenizer"
    tokenizer = Tokenizer.load(beside)
    config = samples.make_config(train.parent, context, tokenizer=beside)
    packing = config.packing.model_copy(update={"method": method})
    config = config.model_copy(update={"packing": packing})
    texts, work = _cut_texts(), folder / "work"
    chunks = [work / f"train-{number}" for number in range(len(texts))]

    def tokenise() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for part, chunk in zip(texts, chunks, strict=True):
            encode_chunk(beside, part, chunk)

    def write() -> None:
        shutil.rmtree(folder / "plan", ignore_errors=True)
        plan = plan_split(config, Split("train", chunks=chunks), tokenizer, folder / "plan")
        stage = WriteShards(plan)
        for task in range(stage.tasks):
            stage.run(task)

    tokenise()
    turns = take_turns(lambda: time_call(write), lambda: time_call(tokenise), rounds)
    facts = read_manifest(train).packing
    setup = {"context": context, "method": method, "padding_share": facts.padding_share}
    name = f"writing shards against tokenising, {method}, context {context}"
    return Claim.from_turns(name, "s", turns, Target("<=", 0.15), setup)


def _cut_texts() -> list[list[str]]:
    """Return the sample corpus in parts of 500 documents."""
    from shoal.configs.corpus import SourceConfig
    from shoal.data_pipeline.sources import DroppedLog, read_documents

    texts = [
        document.text
        for source in samples.SOURCES
        for document in read_documents(SourceConfig(path=source), DroppedLog())
    ]
    return [texts[low : low + 500] for low in range(0, len(texts), 500)]


def measure_gather(folder: Path, train: Path, rounds: int) -> Claim:
    """Compare rows, segments and targets included, with a bare gather of their tokens."""
    import numpy as np

    from shoal.data_pipeline.rows import Rows

    rows = Rows.open(train)
    flat = folder / "flat.npy"
    whole = rows.gather(np.arange(len(rows))).tokens
    np.save(flat, whole.astype(rows.manifest.dtype))
    matrix = np.load(flat, mmap_mode="r")  # (rows, context + 1)
    numbers = np.random.default_rng(0).integers(0, len(rows), GATHERED_ROWS)
    check_equal("tokens of a gather", rows.gather(numbers).tokens, matrix[numbers])
    turns = take_turns(
        lambda: _rate(lambda: rows.gather(numbers), numbers.size),
        lambda: _rate(lambda: matrix[numbers].astype(np.int64), numbers.size),
        rounds,
    )
    packing = rows.manifest.packing.method
    setup = {"context": rows.manifest.context, "method": packing, "gathered_rows": GATHERED_ROWS}
    name = f"rows with segments against a bare gather, {packing}, context {rows.manifest.context}"
    return Claim.from_turns(name, "rows/s", turns, Target(">=", 0.5), setup)


def _rate(read: Callable[[], Any], rows: int) -> float:
    """Return rows/s of a call that reads so many."""
    calls, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < SECONDS:
        read()
        calls += 1
    return rows * calls / seconds


if __name__ == "__main__":
    main()
