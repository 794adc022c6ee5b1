"""Texts to vectors by a finished model: what the clusters of a corpus may be made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from shoal.eval.candidate import Candidate

BATCH_TEXTS = 16


@dataclass(frozen=True)
class ExportEmbed:
    """Mean of the last hidden states of an export of ours, or of any Hugging Face folder.

    Args:
        folder: Of the model.
        precision: fp32 or bf16: what its weights are rounded to; sums are fp32.
    """

    folder: Path
    precision: str = "fp32"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts, of length one; what exceeds the context is cut off.

        Returns:
            (n, width) float32.
        """
        from shoal.data_pipeline.embedding import normalise

        candidate = _open(self.folder)
        parts = [
            _embed(candidate, texts[first : first + BATCH_TEXTS], self.precision)
            for first in range(0, len(texts), BATCH_TEXTS)
        ]
        return normalise(np.concatenate(parts))


@lru_cache(maxsize=1)
def _open(folder: Path) -> Candidate:
    from shoal.eval.candidate import Candidate

    return Candidate.open(folder)


def _embed(candidate: Candidate, texts: Sequence[str], precision: str) -> np.ndarray:
    """Return the mean hidden state of each text, its start token among them.  # (n, width)"""
    import torch

    model = candidate.rounded_model(precision)
    rows = [[candidate.start_id, *ids][: candidate.context] for ids in candidate.encode(texts)]
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), candidate.start_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    with torch.inference_mode():
        states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    weights = mask[:, :, None].float()
    mean: np.ndarray = ((states * weights).sum(dim=1) / weights.sum(dim=1)).cpu().numpy()
    return mean
