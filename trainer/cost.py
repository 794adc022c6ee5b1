"""What a shape costs, as pure arithmetic: parameters, FLOPs per token, bytes. Loads no torch.

A FLOP is one multiplication or addition; a matrix of n entries costs 2n a token. Norms,
activations, softmax and look-ups are left out, as is usual.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from shoal.configs.schema import ModelConfig

BYTES_PER_VALUE = {
    "fp32": Fraction(4),
    "bf16": Fraction(2),
    "int8": Fraction(1),
    "int4": Fraction(1, 2),
}


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of one shape; a tied matrix counts once."""

    total: int
    active: int
    """What one token passes through: of the experts only the k it is sent to."""
    embedding: int
    """What is looked up: token and learned position embeddings."""
    matrix_active: int
    """Entries of the matrices one token is multiplied with: router and head (once) included."""


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one token's forward pass."""

    matrices: int
    attention: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.matrices + self.attention


def count_parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of `Transformer(config)`, exactly.

    Raises:
        ValueError: `config.vocab_size` is not resolved.
    """
    tables = _vocab_size(config) * config.width
    positions = config.context * config.width if config.family == "gpt2" else 0
    norm = config.width * (2 if config.family == "gpt2" else 1)
    layer = _attention(config) + 2 * norm
    idle, router = 0, 0
    if config.moe:
        router = config.moe.num_experts * config.width
        expert = 3 * config.width * config.feed_forward
        layer += router + config.moe.num_experts * expert
        idle = (config.moe.num_experts - config.moe.active_experts) * expert
    else:
        layer += _dense(config)
    own_head = 0 if config.tie_embeddings else tables
    total = tables + positions + config.num_layers * layer + norm + own_head
    return Parameters(
        total=total,
        active=total - config.num_layers * idle,
        embedding=tables + positions,
        matrix_active=config.num_layers * _layer_matrices(config) + tables,
    )


def flops_per_token(config: ModelConfig, context: int) -> ForwardFlops:
    """Return the FLOPs of one token's forward pass within rows of `context` tokens.

    2 x active matrix entries + 4 x layers x heads x head_dim x context: scores and mixing over the
    full square, as PaLM (Chowdhery et al. 2022, appendix B) and most projects count, although half
    of it is masked. The same number holds for decoding one token at that context.

    Args:
        config: The shape; `vocab_size` must be resolved.
        context: Tokens a token attends to.
    """
    heads = config.num_heads * config.head_size
    return ForwardFlops(
        matrices=2 * count_parameters(config).matrix_active,
        attention=4 * config.num_layers * heads * context,
    )


def training_flops_per_token(
    config: ModelConfig, context: int, teacher: ModelConfig | None = None
) -> int:
    """Return the FLOPs of one trained token: three forward passes (backward counts as two).

    A live teacher adds its forward pass. Recomputation under activation checkpointing is not
    counted.
    """
    own = 3 * flops_per_token(config, context).total
    return own + (flops_per_token(teacher, context).total if teacher else 0)


def resident_bytes(config: ModelConfig, precision: str) -> int:
    """Return the bytes of all weights, idle experts included.

    Args:
        config: The shape; `vocab_size` must be resolved.
        precision: fp32, bf16, int8 or int4; scales of quantised weights are not counted.
    """
    return _bytes(count_parameters(config).total, precision)


def kv_bytes_per_token(config: ModelConfig, precision: str) -> int:
    """Return the bytes that one token adds to the key-value cache."""
    return _bytes(2 * config.num_layers * config.kv_heads * config.head_size, precision)


def _bytes(values: int, precision: str) -> int:
    """Return the bytes of so many values, rounded up to a whole one."""
    return -int(-values * BYTES_PER_VALUE[precision] // 1)


def _vocab_size(config: ModelConfig) -> int:
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is not resolved: it comes from the tokenizer")
    return config.vocab_size


def _attention(config: ModelConfig) -> int:
    matrices = _attention_matrices(config)
    if config.family == "gpt2":
        return matrices + 3 * config.width + config.width  # biases of qkv and output
    return matrices + (2 * config.head_size if config.qk_norm else 0)


def _attention_matrices(config: ModelConfig) -> int:
    fused = (config.num_heads + 2 * config.kv_heads) * config.head_size
    return config.width * (fused + config.num_heads * config.head_size)


def _dense(config: ModelConfig) -> int:
    hidden, width = config.feed_forward, config.width
    return 2 * width * hidden + hidden + width if config.family == "gpt2" else 3 * width * hidden


def _layer_matrices(config: ModelConfig) -> int:
    """Matrix entries that one token meets in one layer."""
    feed_forward = config.width * config.feed_forward
    attention = _attention_matrices(config)
    if config.moe:
        router = config.moe.num_experts * config.width
        return attention + router + config.moe.active_experts * 3 * feed_forward
    return attention + (2 if config.family == "gpt2" else 3) * feed_forward
