"""Rows: what planning and writing them adds to tokenising."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks import samples
from benchmarks.claims import (
    Claim,
    Target,
    make_parser,
    print_claim,
    take_turns,
    time_call,
)

CONTEXTS = (2048, 512)


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


def _prepare(output: Path, method: str, context: int, tokenizer: Path | None) -> Path:
    from shoal.data_pipeline.shards import prepare

    config = samples.make_config(output, context, tokenizer=tokenizer)
    packing = config.packing.model_copy(update={"method": method})
    return prepare(config.model_copy(update={"packing": packing})).train


def measure_writing(folder: Path, train: Path, method: str, context: int, rounds: int) -> Claim:
    """Compare planning and writing the shards with making their tokens, one process each."""
    import numpy as np

    from shoal.data_pipeline.layout import WriteShards, plan_split
    from shoal.data_pipeline.manifest import read_manifest
    from shoal.data_pipeline.mds import token_type
    from shoal.data_pipeline.tokenizer import Tokenizer
    from shoal.data_pipeline.tokens import Split, chunk_files, save_array

    beside = train.parent / "tokenizer"
    tokenizer = Tokenizer.load(beside)
    vocab_size = tokenizer.vocab_size
    config = samples.make_config(train.parent, context, tokenizer=beside)
    packing = config.packing.model_copy(update={"method": method})
    config = config.model_copy(update={"packing": packing})
    texts, work = _cut_texts(), folder / "work"
    chunks = [work / f"train-{number}" for number in range(len(texts))]

    def tokenise() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for part, chunk in zip(texts, chunks, strict=True):
            encoded = tokenizer.encode_batch(part)
            lengths_file, tokens_file = chunk_files(chunk)
            save_array(lengths_file, np.asarray([len(ids) for ids in encoded], dtype=np.int64))
            save_array(tokens_file, np.concatenate(encoded).astype(token_type(vocab_size)))

    def write() -> None:
        shutil.rmtree(folder / "plan", ignore_errors=True)
        plan = plan_split(config, Split("train", chunks=chunks), tokenizer, folder / "plan")
        stage = WriteShards(plan, "write shards")
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


if __name__ == "__main__":
    main()
