"""The data path: loading against StreamingDataset and numpy, resuming, preparing a corpus.

A peer is never given more to do than ours: it makes no targets, checks no hashes, syncs no files.
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
    WrongResultError,
    check_equal,
    make_parser,
    print_claim,
    take_turns,
    time_call,
    use_all_cores,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from shoal.data_pipeline.loader import Loader
    from shoal.data_pipeline.rows import Rows

BATCH_ROWS, MICRO_BATCH_ROWS = 32, 8
OUR_EPOCHS = 8  # one is over in milliseconds
FAR_STEP = 10_000_000
PREPARE_CONTEXT = 1024


def main() -> None:
    """Print a line for every claim."""
    quick = make_parser(__doc__).parse_args().quick
    cores = use_all_cores()
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as name:
        folder = Path(name)
        for context in (2048,) if quick else (2048, 512):
            train = _prepare_once(folder / f"context-{context}", context)
            print_claim(measure_streaming(train, folder, rounds=3 if quick else 7))
            print_claim(measure_gather(train, folder, rounds=7 if quick else 21))
            print_claim(measure_resume(train, rounds=7 if quick else 21))
        text = folder / "text.jsonl"
        size = samples.write_text(text, copies=1 if quick else 4)
        tokenizer = folder / "context-2048" / "tokenizer"
        corpus = Corpus(folder, text, size, tokenizer)
        rounds = 2 if quick else 5
        print_claim(measure_converter(corpus, rounds))
        print_claim(measure_datasets(corpus, rounds, processes=cores))


def _prepare_once(output: Path, context: int) -> Path:
    from shoal.data_pipeline.shards import prepare

    return prepare(samples.make_config(output, context)).train


def _make_loader(rows: Rows) -> Loader:
    from shoal.data_pipeline.loader import Loader

    return Loader([(rows, 1.0)], seed=0, batch_rows=BATCH_ROWS, micro_batch_rows=MICRO_BATCH_ROWS)


def _describe_rows(rows: Rows) -> dict[str, Any]:
    return {
        "context": rows.manifest.context,
        "rows": len(rows),
        "batch_rows": BATCH_ROWS,
        "micro_batch_rows": MICRO_BATCH_ROWS,
    }


def read_epochs(loader: Loader, steps: int) -> int:
    """Read `steps` steps as training does; return the tokens."""
    return sum(batch.inputs.numel() for step in range(steps) for batch in loader.microbatches(step))


# Loading, against StreamingDataset


def measure_streaming(train: Path, folder: Path, rounds: int) -> Claim:
    """Compare our loader with iterating StreamingDataset, both shuffled."""
    from shoal.data_pipeline.rows import Rows

    rows = Rows.open(train)
    loader = _make_loader(rows)
    steps = OUR_EPOCHS * len(rows) // BATCH_ROWS
    with StreamingPeer(train, folder) as peer:
        _check_same_rows(rows, loader, peer)
        turns = take_turns(
            lambda: _rate(lambda: read_epochs(loader, steps)),
            lambda: _rate(peer.read_epoch),
            rounds,
        )
    name = f"loader against iterating StreamingDataset, context {rows.manifest.context}"
    return Claim.from_turns(name, "tokens/s", turns, Target(">=", 15), _describe_rows(rows))


def _rate(read: Callable[[], int]) -> float:
    """Return tokens/s of a call that returns how many tokens it handled."""
    tokens = 0

    def work() -> None:
        nonlocal tokens
        tokens = read()

    seconds = time_call(work)
    return tokens / seconds


class StreamingPeer:
    """A shuffled StreamingDataset over local shards, whose shared memory goes with it.

    The library finds names for its shared memory that no live job has. Its lock files lie in the
    folder for temporary files, here one of its own: those of a job that was killed would shift the
    names.
    """

    def __init__(self, train: Path, folder: Path) -> None:
        self._train, self._scratch = train, folder / "streaming"

    def __enter__(self) -> StreamingPeer:
        from shoal.data_pipeline.mds import import_streaming

        self._scratch.mkdir(exist_ok=True)
        self._usual, tempfile.tempdir = tempfile.tempdir, str(self._scratch)
        self.dataset = import_streaming().StreamingDataset(
            local=str(self._train), batch_size=MICRO_BATCH_ROWS, shuffle=True, shuffle_seed=0
        )
        self._prefix = f"{self.dataset._shm_prefix_int:06}_"
        return self

    def __exit__(self, *_: object) -> None:
        from multiprocessing import resource_tracker

        del self.dataset
        tempfile.tempdir = self._usual
        for left in Path("/dev/shm").glob(f"{self._prefix}*"):
            left.unlink(missing_ok=True)
            resource_tracker.unregister(f"/{left.name}", "shared_memory")

    def read_epoch(self) -> int:
        """Iterate one epoch; return the tokens that are inputs."""
        return sum(len(sample["tokens"]) - 1 for sample in self.dataset)


def _check_same_rows(rows: Rows, loader: Loader, peer: StreamingPeer) -> None:
    """Check that an epoch of either holds the rows of the shards, each once."""
    import numpy as np

    stored = rows.gather(np.arange(len(rows))).tokens.astype(np.uint32)
    theirs = np.stack([sample["tokens"] for sample in peer.dataset]).astype(np.uint32)
    check_equal("rows of StreamingDataset", _sort_rows(theirs), _sort_rows(stored))
    steps = len(rows) // BATCH_ROWS
    batches = [batch for step in range(steps) for batch in loader.microbatches(step)]
    numbers = np.concatenate([batch.row_ids.numpy() for batch in batches])
    if len(np.unique(numbers)) != steps * BATCH_ROWS:
        raise WrongResultError("our epoch holds a row twice")
    inputs = np.concatenate([batch.inputs.numpy() for batch in batches])
    check_equal("rows of our loader", inputs, stored[numbers, :-1])


def _sort_rows(rows: np.ndarray) -> np.ndarray:
    import numpy as np

    return rows[np.lexsort(rows.T[::-1])]


# Loading, against numpy


def measure_gather(train: Path, folder: Path, rounds: int) -> Claim:
    """Compare our loader with a gather from a flat file, given the order for free."""
    import numpy as np

    from shoal.data_pipeline.rows import Rows

    rows = Rows.open(train)
    loader = _make_loader(rows)
    steps = OUR_EPOCHS * len(rows) // BATCH_ROWS
    flat = folder / "flat.npy"
    np.save(flat, rows.gather(np.arange(len(rows))).tokens.astype(rows.manifest.dtype))
    matrix = np.load(flat, mmap_mode="r")  # (rows, context + 1)
    orders = [
        order
        for step in range(steps)
        for order in np.split(loader.row_ids(step), BATCH_ROWS // MICRO_BATCH_ROWS)
    ]
    for order, batch in zip(orders, loader.microbatches(0), strict=False):
        check_equal("inputs of a gather", batch.inputs, gather(matrix, order)[0])
    turns = take_turns(
        lambda: _rate(lambda: read_epochs(loader, steps)),
        lambda: _rate(lambda: sum(gather(matrix, order)[0].numel() for order in orders)),
        rounds,
    )
    name = f"loader against a bare numpy gather, context {rows.manifest.context}"
    return Claim.from_turns(name, "tokens/s", turns, Target(">=", 0.5), _describe_rows(rows))


def gather(matrix: np.ndarray, order: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return inputs and next tokens, as views of one gather."""
    import numpy as np
    import torch

    tokens = torch.from_numpy(matrix[order].astype(np.int64))
    return tokens[:, :-1], tokens[:, 1:]


# Resuming


def measure_resume(train: Path, rounds: int) -> Claim:
    """Compare a far step with step 0, both from shards opened afresh and so checked again."""
    import numpy as np

    from shoal.data_pipeline.rows import Rows

    def read(step: int) -> Any:
        return _make_loader(Rows.open(train)).microbatches(step)

    rows = Rows.open(train)
    for batch in read(FAR_STEP):
        tokens = rows.gather(np.asarray(batch.row_ids)).tokens
        check_equal("inputs at a far step", batch.inputs, tokens[:, :-1])
    turns = take_turns(
        lambda: 1e3 * time_call(lambda: read(FAR_STEP)),
        lambda: 1e3 * time_call(lambda: read(0)),
        rounds,
    )
    setup = {**_describe_rows(rows), "step": FAR_STEP, "shards": len(rows.manifest.shards)}
    name = f"resume at a far step against step 0, context {rows.manifest.context}"
    return Claim.from_turns(name, "ms", turns, Target("<=", 50, of="ours"), setup)


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

        return _rate(work)

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
        return _rate(lambda: convert_documents(corpus.text, corpus.tokenizer, out, PREPARE_CONTEXT))

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

        return _rate(map_once)

    turns = take_turns(lambda: corpus.time_ours(processes), time_peer, rounds, warm_up=0)
    expected = corpus.open_ours().manifest.tokens
    check_equal("tokens of datasets.map", made, [expected] * len(made))
    name = "prepare against datasets.map, the same number of processes"
    return Claim.from_turns(name, "tokens/s", turns, Target(">=", 5), corpus.describe(processes))


if __name__ == "__main__":
    main()
