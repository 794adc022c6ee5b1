"""The form of a row in an MDS shard; the door to mosaicml-streaming for writing.

A row is three columns of fixed size, so that a mapped shard is a matrix.
"""

from __future__ import annotations

import sys
import types

import numpy as np


def token_type(vocab_size: int) -> np.dtype:
    """Return the smallest type that holds every id, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def row_type(context: int, dtype: np.dtype) -> np.dtype:
    """Return the bytes of a row as MDS lays them out: columns by name, without gaps.

    - ends: one bit for each of the context + 1 tokens (numpy's packbits, big bit order), set where
      a token is the last of its document within the row;
    - length: tokens that are text, from the first; what follows is padding (end-of-text tokens);
    - tokens: context + 1 ids, the last of which is a target only.
    """
    return np.dtype(
        [
            ("ends", "u1", (-(-(context + 1) // 8),)),
            ("length", "<u4"),
            ("tokens", dtype.newbyteorder("<"), (context + 1,)),
        ]
    )


def import_streaming() -> types.ModuleType:
    """Import mosaicml-streaming without its image and video parts, which need torchvision."""
    for name in ("multimodal", "text", "vision"):
        module = f"streaming.{name}"
        sys.modules.setdefault(module, types.ModuleType(module))
    import streaming

    return streaming
