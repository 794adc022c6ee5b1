"""The batch: what a loader hands to the trainer, and all the trainer knows of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.data_pipeline.packing import IGNORE

__all__ = ["IGNORE", "PADDING_ROW", "Batch"]

PADDING_ROW = -1
"""Row number of a row that only fills up a batch."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass.

    A padded row (`row_ids` = -1) makes the ranks' batches equal in shape; all its targets are
    IGNORE, so it weighs nothing. Tensors may share memory: none is changed in place.
    """

    inputs: Tensor  # (rows, context) int64
    targets: Tensor  # (rows, context) int64, IGNORE where nothing is to be predicted
    segments: Tensor  # (rows, context) int32, document of each token, counted within the row
    row_ids: Tensor  # (rows,) int64, global row number
    streams: Tensor | None = None  # (rows,) int64, number of the stream, -1 of a padded row

    @property
    def real_tokens(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; row numbers stay on the CPU, where they are read."""
        return replace(
            self,
            inputs=self.inputs.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True),
            streams=None if self.streams is None else self.streams.to(device, non_blocking=True),
        )
