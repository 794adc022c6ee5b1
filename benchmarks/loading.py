"""Reading rows: against StreamingDataset, LitData and a bare numpy gather; resuming far in.

A peer is never given more to do than ours: it makes no targets, checks no hashes, packs no batches.
Every claim takes both in turns in one process, over rows in the page cache.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from benchmarks.data import prepare_once, rate

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from shoal.data_pipeline.loader import Loader
    from shoal.data_pipeline.rows import Rows

BATCH_ROWS, MICRO_BATCH_ROWS = 32, 8
OUR_EPOCHS = 8  # one is over in milliseconds
MANY_ROWS = 10_000_000


def main() -> None:
    """Print a line for every claim."""
    quick = make_parser(__doc__).parse_args().quick
    use_all_cores()
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as name:
        folder = Path(name)
        for context in (2048,) if quick else (2048, 512):
            train = prepare_once(folder / f"context-{context}", context)
            print_claim(measure_streaming(train, folder, rounds=3 if quick else 7))
            print_claim(measure_litdata(train, folder, rounds=3 if quick else 7))
            print_claim(measure_gather(train, folder, rounds=7 if quick else 21))
        print_claim(measure_resume(train, folder / "many", rounds=5 if quick else 21))


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
            lambda: rate(lambda: read_epochs(loader, steps)),
            lambda: rate(peer.read_epoch),
            rounds,
        )
    name = f"loader against iterating StreamingDataset, context {rows.manifest.context}"
    return Claim.from_turns(name, "tokens/s", turns, Target(">=", 15), _describe_rows(rows))


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


# Loading, against LitData


class LitPeer:
    """A shuffled StreamingDataset of LitData over the same rows, as it stores tokens."""

    def __init__(self, rows: Rows, folder: Path) -> None:
        import numpy as np
        import torch
        from litdata import StreamingDataset
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter

        length = rows.manifest.context + 1
        writer = BinaryWriter(str(folder), chunk_bytes=64 << 20, item_loader=TokensLoader(length))
        for number, tokens in enumerate(rows.gather(np.arange(len(rows))).tokens):
            writer.add_item(number, torch.from_numpy(tokens.astype(np.int32)))
        writer.done()
        writer.merge()
        self.dataset = StreamingDataset(
            str(folder), item_loader=TokensLoader(block_size=length), shuffle=True, seed=0
        )

    def read_epoch(self) -> int:
        """Iterate one epoch; return the tokens that are inputs."""
        return sum(len(tokens) - 1 for tokens in self.dataset)


def measure_litdata(train: Path, folder: Path, rounds: int) -> Claim:
    """Compare our loader with iterating LitData's StreamingDataset, both shuffled."""
    import numpy as np

    from shoal.data_pipeline.rows import Rows

    rows = Rows.open(train)
    loader = _make_loader(rows)
    steps = OUR_EPOCHS * len(rows) // BATCH_ROWS
    peer = LitPeer(rows, folder / f"litdata-{rows.manifest.context}")
    stored = rows.gather(np.arange(len(rows))).tokens
    theirs = np.stack([tokens.numpy() for tokens in peer.dataset])
    check_equal("rows of LitData", _sort_rows(theirs), _sort_rows(stored))
    turns = take_turns(
        lambda: rate(lambda: read_epochs(loader, steps)), lambda: rate(peer.read_epoch), rounds
    )
    name = f"loader against iterating LitData, context {rows.manifest.context}"
    return Claim.from_turns(name, "tokens/s", turns, Target(">=", 1.0), _describe_rows(rows))


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
        lambda: rate(lambda: read_epochs(loader, steps)),
        lambda: rate(lambda: sum(gather(matrix, order)[0].numel() for order in orders)),
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


def multiply_rows(train: Path, folder: Path) -> Path:
    """Make a split of MANY_ROWS rows or more: one shard under as many names as that takes."""
    import shutil

    from shoal.data_pipeline.manifest import MANIFEST, hash_shards, read_manifest

    manifest = read_manifest(train)
    shard = manifest.shards[0]
    (folder / "train").mkdir(parents=True)
    shutil.copytree(train.parent / "tokenizer", folder / "tokenizer")
    count = -(-MANY_ROWS // shard.rows)
    shards = []
    for number in range(count):
        name = f"shard.{number:05d}.mds"
        (folder / "train" / name).hardlink_to(train / shard.file)
        shards.append(shard.model_copy(update={"file": name}))
    many = {
        "rows": count * shard.rows,
        "shards": tuple(shards),
        "shards_hash": hash_shards([shard.raw_sha256] * count),
        "files": {},
    }
    (folder / "train" / MANIFEST).write_text(manifest.model_copy(update=many).to_json())
    return folder / "train"


def measure_resume(train: Path, folder: Path, rounds: int) -> Claim:
    """Time what a resume at 90 % of ten million rows adds to opened shards; against step 0.

    The rows are looked up and read by a loader made anew; shards are mapped and checked before, as
    that takes the same at any step.
    """
    import numpy as np

    from shoal.data_pipeline.rows import Rows

    rows = Rows.open(multiply_rows(train, folder))
    rows.gather(np.arange(0, len(rows), rows.manifest.shards[0].rows))
    far = 9 * len(rows) // 10 // BATCH_ROWS

    def read(step: int) -> Any:
        return _make_loader(rows).microbatches(step)

    for batch in read(far):
        check_equal("inputs", batch.inputs, rows.gather(np.asarray(batch.row_ids)).tokens[:, :-1])
    turns = take_turns(
        lambda: 1e3 * time_call(lambda: read(far)), lambda: 1e3 * time_call(lambda: read(0)), rounds
    )
    setup = {**_describe_rows(rows), "step": far, "shards": len(rows.manifest.shards)}
    name = "resume at 90 % of ten million rows against step 0"
    return Claim.from_turns(name, "ms", turns, Target("<=", 50, of="ours"), setup)


if __name__ == "__main__":
    main()
