"""What people prepare corpora with: a per-document MDS converter, and `datasets.map`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def convert_documents(text: Path, tokenizer: Path, out: Path, context: int) -> int:
    """Encode one document after the other, append, and write every row as soon as it is full.

    Documents come in the order that ours packs them in, so that the rows must be equal.

    Args:
        text: JSON lines.
        tokenizer: Folder of the tokenizer.
        out: Folder to make; receives MDS shards.
        context: Tokens a row gives to the model; it holds one more.

    Returns:
        Targets in all rows.
    """
    import numpy as np

    from shoal.data_pipeline.mds import import_streaming
    from shoal.data_pipeline.order import permute

    backend, eot = _load_tokenizer(tokenizer)
    texts = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    order = permute(np.arange(len(texts)), len(texts), "documents", 0, "train")
    columns = {"tokens": f"ndarray:uint16:{context + 1}"}
    tokens, stream = 0, []
    with import_streaming().MDSWriter(out=str(out), columns=columns) as writer:
        for number in order:
            ids = backend.encode(texts[number], add_special_tokens=False).ids
            stream += [eot, *ids]
            tokens += 1 + len(ids)
            while len(stream) > context:
                writer.write({"tokens": np.asarray(stream[: context + 1], np.uint16)})
                del stream[:context]
        stream += [eot] * (context + 1 - len(stream))
        writer.write({"tokens": np.asarray(stream, np.uint16)})
    return tokens


def _load_tokenizer(folder: Path) -> tuple[Any, int]:
    import tokenizers

    from shoal.data_pipeline.tokenizer import END_OF_TEXT

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    return backend, backend.token_to_id(END_OF_TEXT)


def read_mds(folder: Path) -> np.ndarray:
    """Return all rows of MDS shards, in order, without shared memory.  # (rows, context + 1)"""
    import numpy as np

    from shoal.data_pipeline.mds import import_streaming

    dataset = import_streaming().LocalDataset(local=str(folder))
    return np.stack([dataset[number]["tokens"] for number in range(len(dataset))])


def map_documents(text: Path, tokenizer: Path, out: Path, context: int, processes: int) -> int:
    """Tokenise with `datasets.map`, then join and cut with a second one, as example scripts do.

    Args:
        text: JSON lines.
        tokenizer: Folder of the tokenizer.
        out: Cache to make; receives Arrow files.
        context: Tokens of a row.
        processes: Workers of either map.

    Returns:
        Tokens that the first map made, those that end a document included.
    """
    import datasets
    import pyarrow.compute
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    encoder = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    eot = encoder.eos_token_id

    def encode(batch: dict[str, list]) -> dict[str, list]:
        ids = encoder(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"input_ids": [[eot, *document] for document in ids["input_ids"]]}

    def group(batch: dict[str, list]) -> dict[str, list]:
        stream = [token for document in batch["input_ids"] for token in document]
        ends = range(context, len(stream) + 1, context)
        return {"input_ids": [stream[end - context : end] for end in ends]}

    rows = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(out))
    options = {"batched": True, "num_proc": processes}
    encoded = rows.map(encode, remove_columns=rows.column_names, **options)
    encoded.map(group, **options)
    lengths = pyarrow.compute.list_value_length(encoded.data.column("input_ids"))
    return int(pyarrow.compute.sum(lengths).as_py())
