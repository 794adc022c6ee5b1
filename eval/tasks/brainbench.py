"""BrainBench: tell the abstract of a neuroscience paper from one with altered results.

Protocol of Luo et al. 2024 (Nature Human Behaviour; arXiv:2405.09395): each version follows one
fixed prompt; perplexity is taken over all tokens but the first, prompt included, without a start
token; the version with the lower perplexity is the choice, and a tie counts as wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shoal.eval.candidate import Candidate
from shoal.eval.scoring import Request
from shoal.eval.tasks.items import locate, read_items
from shoal.eval.tasks.task import ItemScores, accuracy_scores, hash_files

PROMPT = (
    "You are a neuroscientist with deep knowledge in neuroscience. "
    "Here is an abstract from a neuroscience publication: "
)


class BrainBenchTask:
    """Pairs of abstracts; one item a pair. Confidence is the distance of the perplexities."""

    kind = "brainbench"
    version = 1
    metric = "accuracy"
    higher_is_better = True

    def __init__(self, name: str, paths: Sequence[str], max_items: int | None = None) -> None:
        self.name = name
        files = [locate(path) for path in paths]
        fields: dict[str, type | tuple[type, ...]] = {
            "original_abstract": str,
            "incorrect_abstract": str,
        }
        records = [item for file in files for item in read_items(file, fields)][:max_items]
        self._pairs = [(r["original_abstract"], r["incorrect_abstract"]) for _, r in records]
        self._ids = [str(r.get("case_id", place)) for place, r in records]
        self.file_hash = hash_files(files, max_items)

    def item_ids(self) -> list[str]:
        """Name every pair."""
        return self._ids

    def texts(self) -> list[str]:
        """Return the original abstracts."""
        return [original for original, _ in self._pairs]

    def requests(self, candidate: Candidate) -> list[Request]:
        """Two requests a pair, the original first."""
        texts = [PROMPT + abstract for pair in self._pairs for abstract in pair]
        return [Request(ids[:1], ids[1:]) for ids in candidate.encode(texts)]

    def scores(self, requests: Sequence[Request], nats: Sequence[float]) -> ItemScores:
        """Right where the original has the lower perplexity."""
        perplexities = [
            math.exp(value / len(request.target_ids))
            for request, value in zip(requests, nats, strict=True)
        ]
        original, altered = perplexities[::2], perplexities[1::2]
        return accuracy_scores(
            [a < b for a, b in zip(original, altered, strict=True)],
            confidence=[abs(a - b) for a, b in zip(original, altered, strict=True)],
        )
