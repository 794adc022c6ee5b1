"""GPT-2 and Llama family decoders as plain single-device modules with few, fused parameters.

Nothing here knows about ranks, sharding or losses. Sizes in shapes: `heads` counts query heads,
`kv_heads` key and value heads, `head_dim` is one head's width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoal.configs.schema import ModelConfig
from shoal.kernels.attention import AttentionMask, attend, prepare_mask
from shoal.kernels.backend import Kernels
from shoal.trainer.moe import MixtureOfExperts, RouterStats

RESIDUAL_PROJECTIONS = ("output.weight", "down.weight", "feed_forward.down")


class Hidden(NamedTuple):
    """What a forward pass returns; a plain tuple, so that ZeRO-3's hooks see the tensors in it."""

    states: Tensor
    """(rows, context, width), after the final norm."""
    router: tuple[RouterStats, ...]
    """One entry a layer; empty for dense models."""


class Linear(nn.Linear):
    """A linear layer that starts at zero: weights come from `Transformer.initialize` or a file."""

    def reset_parameters(self) -> None:
        """Draw nothing from the global random state."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """An embedding that starts at zero, for the same reason as `Linear`."""

    def reset_parameters(self) -> None:
        """Draw nothing from the global random state."""
        nn.init.zeros_(self.weight)


class Rotary(NamedTuple):
    """Rotation of each position and pair of channels (Su et al. 2021)."""

    cosine: Tensor  # (context, head_dim / 2)
    sine: Tensor


def rotary_tables(config: ModelConfig, device: torch.device) -> Rotary:
    """Return the tables for all positions, fp32; angle = position x theta^(-2 pair / head_dim)."""
    pairs = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / config.rope_theta ** (pairs / config.head_size)
    angles = torch.arange(config.context, device=device).float()[:, None] * frequencies
    return Rotary(angles.cos(), angles.sin())


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Rotate (rows, context, heads, head_dim); channel i pairs with i + head_dim / 2 (Llama)."""
    cosine, sine = rotary.cosine[:, None], rotary.sine[:, None]
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.kv_heads
        self.head_dim = config.head_size
        self.backend = kernels.attention
        bias = config.family == "gpt2"
        fused = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = Linear(config.width, fused, bias=bias)
        self.output = Linear(self.heads * self.head_dim, config.width, bias=bias)
        self.query_norm: nn.RMSNorm | None = None
        self.key_norm: nn.RMSNorm | None = None
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(self.head_dim, config.norm_eps)
            self.key_norm = nn.RMSNorm(self.head_dim, config.norm_eps)

    def forward(self, states: Tensor, mask: AttentionMask, rotary: Rotary | None) -> Tensor:
        """Map (rows, context, width) to the same shape."""
        rows, context, _ = states.shape
        fused = self.qkv(states).view(rows, context, -1, self.head_dim)
        query_key, value = fused.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = query_key.split([self.heads, self.kv_heads], dim=2)
            query_key = torch.cat((self.query_norm(query), self.key_norm(key)), dim=2)
        if rotary is not None:
            query_key = rotate(query_key, rotary)
        query, key = query_key.split([self.heads, self.kv_heads], dim=2)
        mixed = attend(
            query.transpose(1, 2),  # (rows, heads, context, head_dim)
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            backend=self.backend,
        )
        return self.output(mixed.transpose(1, 2).reshape(rows, context, -1))


class GeluFeedForward(nn.Module):
    """GPT-2's: two matrices with biases around the tanh form of GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, config.feed_forward)
        self.down = Linear(config.feed_forward, config.width)

    def forward(self, states: Tensor) -> Tensor:
        """Map (rows, context, width) to the same shape."""
        return self.down(F.gelu(self.up(states), approximate="tanh"))


class GatedFeedForward(nn.Module):
    """Llama's SwiGLU (Shazeer 2020); gate and up projection are one matrix, gate first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.width, 2 * config.feed_forward, bias=False)
        self.down = Linear(config.feed_forward, config.width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """Map (rows, context, width) to the same shape."""
        gate, up = self.gate_up(states).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and around a residual connection."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, kernels)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = make_feed_forward(config, kernels)

    def forward(
        self, states: Tensor, mask: AttentionMask, rotary: Rotary | None
    ) -> tuple[Tensor, tuple[RouterStats, ...]]:
        """Map (rows, context, width) to the same shape; one `RouterStats` if there are experts."""
        mixed = self.attention(self.attention_norm(states), mask, rotary)
        states = states + F.dropout(mixed, self.dropout, self.training)
        normed = self.feed_forward_norm(states)
        router: tuple[RouterStats, ...] = ()
        if isinstance(self.feed_forward, MixtureOfExperts):
            mixed, stats = self.feed_forward(normed)
            router = (stats,)
        else:
            mixed = self.feed_forward(normed)
        return states + F.dropout(mixed, self.dropout, self.training), router


def make_norm(config: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
    """Return the family's norm over the width."""
    if config.family == "gpt2":
        return nn.LayerNorm(config.width, config.norm_eps)
    return nn.RMSNorm(config.width, config.norm_eps)


def make_feed_forward(config: ModelConfig, kernels: Kernels) -> nn.Module:
    """Return the family's feed-forward, dense or a mixture of experts."""
    if config.moe:
        return MixtureOfExperts(config, kernels)
    return GeluFeedForward(config) if config.family == "gpt2" else GatedFeedForward(config)


class Transformer(nn.Module):
    """A decoder-only language model. Weights are zero until `initialize` or a loaded state.

    `activation_checkpointing`, set by the caller, recomputes every block in the backward pass.
    Dropout (after the embedding and on both residual branches) draws from torch's default
    generator; nothing else does.
    """

    cosine: Tensor  # (context, head_dim / 2), llama only
    sine: Tensor

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        """Build the modules, on the meta device too.

        Raises:
            ValueError: `config.vocab_size` is not resolved.
        """
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not resolved: it comes from the tokenizer")
        self.config = config
        self.kernels = kernels
        self.activation_checkpointing = False
        self.embedding = Embedding(config.vocab_size, config.width)
        self.positions = (
            Embedding(config.context, config.width) if config.family == "gpt2" else None
        )
        self.blocks = nn.ModuleList(Block(config, kernels) for _ in range(config.num_layers))
        self.final_norm = make_norm(config)
        self.head = (
            None
            if config.tie_embeddings
            else nn.Parameter(torch.zeros(config.vocab_size, config.width))
        )
        if config.family == "llama":
            rotary = rotary_tables(config, self.embedding.weight.device)
            self.register_buffer("cosine", rotary.cosine, persistent=False)
            self.register_buffer("sine", rotary.sine, persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, (vocab, width): the embedding where the two are tied."""
        return self.embedding.weight if self.head is None else self.head

    def forward(self, inputs: Tensor, segments: Tensor | None = None) -> Hidden:
        """Return the final states of every token.

        Positions count from the start of the row in every family. Rotary attention sees only
        their differences, so a packed document is treated as if it were alone; GPT-2's learned
        positions are absolute, and there it is not.

        Args:
            inputs: (rows, context) int64 token ids; context at most `config.context`.
            segments: (rows, context) integers, the document of each token, or None.

        Raises:
            ValueError: the rows are longer than the model's context.
        """
        context = inputs.shape[1]
        if context > self.config.context:
            raise ValueError(
                f"rows of {context} tokens, the model's context is shorter: {self.config.context}"
            )
        states = self.embedding(inputs)  # (rows, context, width)
        if self.positions is not None:
            states = states + self.positions(torch.arange(context, device=inputs.device))
        states = F.dropout(states, self.config.dropout, self.training)
        rotary = self._rotary(context, states.dtype)
        mask = prepare_mask(segments, self.kernels.attention)
        router: tuple[RouterStats, ...] = ()
        for block in self.blocks:
            states, stats = self._run(block, states, mask, rotary)
            router += stats
        return Hidden(self.final_norm(states), router)

    def logits(self, inputs: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return (rows, context, vocab) logits in the model's dtype; large: not for training."""
        return F.linear(self(inputs, segments).states, self.head_weight)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill all weights from `seed` alone, the same on every device and for every kernel.

        GPT-2's scheme (Radford et al. 2019): normal with `init_std`, projections into the residual
        stream scaled by 1 / sqrt(2 x num_layers), gains one (the last `output_gain`), biases zero.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = self.config.init_std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith(RESIDUAL_PROJECTIONS) else self.config.init_std
                drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
                parameter.copy_(drawn)
        # Adam moves every weight by about the rate; logits of a narrow model, sums over few
        # channels, would stay small for long. A gain multiplies them and their first gradients.
        self.get_parameter("final_norm.weight").fill_(self.config.output_gain)
        if self.config.family == "llama":  # a model built on the meta device has no tables yet
            rotary = rotary_tables(self.config, self.embedding.weight.device)
            self.cosine.copy_(rotary.cosine)
            self.sine.copy_(rotary.sine)

    def _rotary(self, context: int, dtype: torch.dtype) -> Rotary | None:
        if self.config.family == "gpt2":
            return None
        # DeepSpeed casts parameters to bf16 but no buffers; fp32 tables would turn heads to fp32.
        return Rotary(self.cosine[:context].to(dtype), self.sine[:context].to(dtype))

    def _run(
        self, block: nn.Module, states: Tensor, mask: AttentionMask, rotary: Rotary | None
    ) -> tuple[Tensor, tuple[RouterStats, ...]]:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, states, mask, rotary, use_reentrant=False)
        return block(states, mask, rotary)
