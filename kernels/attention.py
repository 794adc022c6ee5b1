"""Causal attention that stays inside documents: an explicit reference and torch's fused kernel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("reference", "sdpa")


class AttentionMask(NamedTuple):
    """What a backend needs to know about documents, prepared once per forward pass.

    `allowed` is (rows, 1, context, context) bool, True where a query (third axis) may see a key
    (last axis); None means plain causal attention over the whole row.
    """

    allowed: Tensor | None


def prepare_mask(segments: Tensor | None, backend: str) -> AttentionMask:
    """Turn document indices into the mask that every layer of one forward pass shares.

    Args:
        segments: (rows, context) integers, the document each token belongs to; None: one document
            a row. A token attends to itself and to earlier tokens of the same document.
        backend: One of `BACKENDS`.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; there are {BACKENDS}")
    if segments is None:
        return AttentionMask(None)
    same = segments[:, :, None] == segments[:, None, :]  # (rows, context, context)
    return AttentionMask(same.tril()[:, None])


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, *, backend: str
) -> Tensor:
    """Return softmax(query key^T / sqrt(head_dim)) value under the mask.

    Args:
        query: (rows, heads, context, head_dim).
        key: (rows, kv_heads, context, head_dim); heads is a multiple of kv_heads, and query head h
            reads key head h // (heads / kv_heads).
        value: (rows, kv_heads, context, head_dim).
        mask: From `prepare_mask`.
        backend: `reference` materialises the scores in fp32; `sdpa` lets torch choose a fused
            kernel.

    Returns:
        (rows, heads, context, head_dim), in the dtype of `query`.

    Raises:
        ValueError: unknown backend.
    """
    if backend == "sdpa":
        return _attend_sdpa(query, key, value, mask)
    if backend == "reference":
        return _attend_reference(query, key, value, mask)
    raise ValueError(f"unknown attention backend {backend!r}; there are {BACKENDS}")


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask.allowed is not None and query.is_cuda:
        # With a mask, CUDA's fused kernels take no grouped heads: torch would fall back to its
        # unfused one.
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        grouped = False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask.allowed,
        is_causal=mask.allowed is None,
        enable_gqa=grouped,
    )


def _attend_reference(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    rows, heads, context, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = query.float().reshape(rows, kv_heads, heads // kv_heads, context, head_dim)
    keys, values = key.float()[:, :, None], value.float()[:, :, None]
    scores = groups @ keys.transpose(-2, -1) / math.sqrt(head_dim)
    allowed = mask.allowed
    if allowed is None:
        allowed = torch.ones(context, context, dtype=torch.bool, device=query.device).tril()
    else:
        allowed = allowed[:, :, None]
    scores = scores.masked_fill(~allowed, float("-inf"))
    mixed = scores.softmax(-1) @ values  # (rows, kv_heads, group, context, head_dim)
    return mixed.reshape(rows, heads, context, head_dim).to(query.dtype)
