"""Preparing a corpus, against the usual converters; reading it is in loading.py.

A peer is never given more to do than ours: it checks no hashes and syncs no files.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import samples
from benchmarks.claims import (
    Claim,
    Target,
    check_equal,
    make_parser,
    print_claim,
    take_turns,
    time_call,
    use_all_cores,
)

if TYPE_CHECKING:
    from shoal.data_pipeline.rows import Rows

PREPARE_CONTEXT = 1024


def main() -> None:
    """Print a line for every claim."""
    quick = make_parser(__doc__).parse_args().quick
    cores = use_all_cores()
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as name:
        folder = Path(name)
        tokenizer = prepare_once(folder / "tokenizing", PREPARE_CONTEXT).parent / "tokenizer"
        text = folder / "text.jsonl"
        size = samples.write_text(text, copies=1 if quick else 4)
        corpus = Corpus(folder, text, size, tokenizer)
        rounds = 2 if quick else 5
        print_claim(measure_converter(corpus, rounds))
        print_claim(measure_datasets(corpus, rounds, processes=cores))


def prepare_once(output: Path, context: int) -> Path:
    """Prepare the sample corpus; return the folder of its training rows."""
    from shoal.data_pipeline.shards import prepare

    return prepare(samples.make_config(output, context)).train


def rate(read: Callable[[], int]) -> float:
    """Return tokens/s of a call that returns how many tokens it handled."""
    tokens = 0

    def work() -> None:
        nonlocal tokens
        tokens = read()

    seconds = time_call(work)
    return tokens / seconds


# Preparing


class Corpus:
    """One text, prepared again and again in folders of their own."""

    def __init__(self, folder: Path, text: Path, size: int, tokenizer: Path) -> None:
        self.folder, self.text, self.size, self.tokenizer = folder, text, size, tokenizer

    def time_ours(self, processes: int) -> float:
        """Return tokens/s of `prepare`."""
        output = self.fresh("ours")
        config = samples.make_config(
            output,
            PREPARE_CONTEXT,
            sources=(str(self.text),),
            tokenizer=self.tokenizer,
            processes=processes,
        )

        def work() -> int:
            from shoal.data_pipeline.shards import prepare, read_manifest

            return read_manifest(prepare(config).train).tokens

        return rate(work)

    def open_ours(self) -> Rows:
        """Return the rows that `time_ours` wrote last."""
        from shoal.data_pipeline.rows import Rows

        return Rows.open(self.folder / "ours" / "train")

    def fresh(self, name: str) -> Path:
        """Return a path where nothing is."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def describe(self, processes: int) -> dict[str, Any]:
        """Return what the figures depend on."""
        return {
            "text_bytes": self.size,
            "context": PREPARE_CONTEXT,
            "vocab_size": samples.VOCAB_SIZE,
            "processes": processes,
        }


def measure_converter(corpus: Corpus, rounds: int) -> Claim:
    """Compare with the usual converter: encode a document, append, write the rows that are full."""
    import numpy as np

    from benchmarks.converters import convert_documents, read_mds
    from shoal.data_pipeline.mds import import_streaming

    import_streaming()  # takes seconds, once

    def time_peer() -> float:
        out = corpus.fresh("converted")
        return rate(lambda: convert_documents(corpus.text, corpus.tokenizer, out, PREPARE_CONTEXT))

    turns = take_turns(lambda: corpus.time_ours(1), time_peer, rounds, warm_up=0)
    rows = corpus.open_ours()
    theirs = read_mds(corpus.folder / "converted")
    check_equal("rows of the converter", theirs, rows.gather(np.arange(len(rows))).tokens)
    name = "prepare against a per-document converter, one process each"
    return Claim.from_turns(name, "tokens/s", turns, Target(">=", 10), corpus.describe(1))


def measure_datasets(corpus: Corpus, rounds: int, processes: int) -> Claim:
    """Compare with `datasets.map`, tokenising and grouping, in as many processes."""
    from benchmarks.converters import map_documents

    made: list[int] = []

    def time_peer() -> float:
        out = corpus.fresh("mapped")

        def map_once() -> int:
            made.append(
                map_documents(corpus.text, corpus.tokenizer, out, PREPARE_CONTEXT, processes)
            )
            return made[-1]

        return rate(map_once)

    turns = take_turns(lambda: corpus.time_ours(processes), time_peer, rounds, warm_up=0)
    expected = corpus.open_ours().manifest.tokens
    check_equal("tokens of datasets.map", made, [expected] * len(made))
    name = "prepare against datasets.map, the same number of processes"
    return Claim.from_turns(name, "tokens/s", turns, Target(">=", 5), corpus.describe(processes))


if __name__ == "__main__":
    main()
