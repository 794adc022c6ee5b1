"""Held-out documents: bits per byte, with perplexity per token beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shoal.eval.candidate import Candidate
from shoal.eval.scoring import Request
from shoal.eval.tasks.items import locate, read_items
from shoal.eval.tasks.task import ItemScores, document_request, hash_files


class PerplexityTask:
    """Documents scored whole, each from its start token; one item a document.

    Bits per byte = nats / ln 2 / UTF-8 bytes, so that models with different tokenizers compare;
    perplexity is per token of the model's own tokenizer and does not.
    """

    kind = "perplexity"
    version = 1
    metric = "bits_per_byte"
    higher_is_better = False

    def __init__(self, name: str, path: str, max_items: int | None = None) -> None:
        self.name = name
        file = locate(path)
        records = read_items(file, {"text": str}, max_items)
        self._texts = [record["text"] for _, record in records]
        self._ids = [str(record.get("id", place)) for place, record in records]
        self.file_hash = hash_files([file], max_items)

    def item_ids(self) -> list[str]:
        """Name every document."""
        return self._ids

    def texts(self) -> list[str]:
        """Return the documents."""
        return self._texts

    def requests(self, candidate: Candidate) -> list[Request]:
        """One request a document."""
        start = candidate.start_id
        return [document_request(start, ids) for ids in candidate.encode(self._texts)]

    def scores(self, requests: Sequence[Request], nats: Sequence[float]) -> ItemScores:
        """Bits and bytes of every document."""
        tokens = sum(len(request.target_ids) for request in requests)
        return ItemScores(
            numerator=[value / math.log(2) for value in nats],
            denominator=[float(len(text.encode())) for text in self._texts],
            extra={"perplexity": math.exp(math.fsum(nats) / tokens), "tokens": float(tokens)},
        )
