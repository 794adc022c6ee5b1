"""Cost arithmetic: parameters equal those of built models, FLOPs equal counts by hand."""

import subprocess
import sys

import pytest
import torch

from shoal.configs.schema import ModelConfig, MoEConfig
from shoal.kernels.backend import Kernels
from shoal.trainer.cost import (
    count_parameters,
    flops_per_token,
    kv_bytes_per_token,
    resident_bytes,
    training_flops_per_token,
)
from shoal.trainer.model import Transformer

SMALL = {"vocab_size": 96, "context": 16, "num_layers": 2, "width": 32, "num_heads": 4}
SHAPES = {
    "gpt2": ModelConfig(family="gpt2", **SMALL),
    "gpt2 own head": ModelConfig(family="gpt2", tie_embeddings=False, hidden=50, **SMALL),
    "llama": ModelConfig(**SMALL),
    "llama grouped, free head": ModelConfig(num_kv_heads=2, head_dim=10, hidden=40, **SMALL),
    "qwen3": ModelConfig(qk_norm=True, num_kv_heads=1, tie_embeddings=False, **SMALL),
    "mixtral": ModelConfig(moe=MoEConfig(num_experts=4, hidden=24), **SMALL),
    "mixtral top 1": ModelConfig(moe=MoEConfig(num_experts=3, active_experts=1), **SMALL),
    "qwen3 moe": ModelConfig(
        qk_norm=True,
        tie_embeddings=False,
        moe=MoEConfig(num_experts=8, active_experts=3, hidden=8, normalize_gates=False),
        **SMALL,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_counts_equal_the_built_model(name):
    config = SHAPES[name]
    with torch.device("meta"):
        model = Transformer(config, Kernels("sdpa", "grouped_mm", 8))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    experts = sum(v for n, v in sizes.items() if n.endswith((".gate_up", ".down")))
    idle = 0
    if config.moe:
        idle = experts * (config.moe.num_experts - config.moe.active_experts)
        idle //= config.moe.num_experts
    tables = sum(v for n, v in sizes.items() if n.startswith(("embedding", "positions")))
    counts = count_parameters(config)
    assert counts.total == sum(sizes.values())
    assert counts.active == counts.total - idle
    assert counts.embedding == tables


# Per token, with nothing factored out: every matrix is 2 x inputs x outputs, attention is scores
# (2 x heads x head_dim x context) and mixing (the same again).
BY_HAND = {
    "gpt2": 2 * (2 * 32 * 96 + 2 * 32 * 32 + 2 * 32 * 128 + 2 * 128 * 32) + 2 * 32 * 96
    + 2 * (2 * 4 * 8 * 16 + 2 * 4 * 8 * 16),
    "llama": 2 * (3 * 2 * 32 * 32 + 2 * 32 * 32 + 2 * 2 * 32 * 128 + 2 * 128 * 32) + 2 * 32 * 96
    + 2 * (2 * 4 * 8 * 16 + 2 * 4 * 8 * 16),
    "llama grouped, free head":
    2 * (2 * 32 * 40 + 2 * 2 * 32 * 20 + 2 * 40 * 32 + 2 * 2 * 32 * 40 + 2 * 40 * 32)
    + 2 * 32 * 96 + 2 * (2 * 4 * 10 * 16 + 2 * 4 * 10 * 16),
    "mixtral": 2 * (4 * 2 * 32 * 32 + 2 * 32 * 4 + 2 * (2 * 2 * 32 * 24 + 2 * 24 * 32))
    + 2 * 32 * 96 + 2 * (2 * 4 * 8 * 16 + 2 * 4 * 8 * 16),
    "mixtral top 1": 2 * (4 * 2 * 32 * 32 + 2 * 32 * 3 + 1 * (2 * 2 * 32 * 128 + 2 * 128 * 32))
    + 2 * 32 * 96 + 2 * (2 * 4 * 8 * 16 + 2 * 4 * 8 * 16),
    "qwen3 moe": 2 * (4 * 2 * 32 * 32 + 2 * 32 * 8 + 3 * (2 * 2 * 32 * 8 + 2 * 8 * 32))
    + 2 * 32 * 96 + 2 * (2 * 4 * 8 * 16 + 2 * 4 * 8 * 16),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_flops_equal_a_count_by_hand(name):
    assert flops_per_token(SHAPES[name], 16).total == BY_HAND[name]
    assert training_flops_per_token(SHAPES[name], 16) == 3 * BY_HAND[name]


def test_a_live_teacher_adds_its_forward_pass():
    found = training_flops_per_token(SHAPES["llama"], 16, teacher=SHAPES["gpt2"])
    assert found == 3 * BY_HAND["llama"] + BY_HAND["gpt2"]


@pytest.mark.parametrize("name", ["gpt2", "llama grouped, free head", "qwen3"])
def test_flops_equal_what_torch_counts(name):
    from torch.utils.flop_counter import FlopCounterMode

    config = SHAPES[name]
    with torch.device("meta"):
        model = Transformer(config, Kernels("sdpa", "loop", 8))
        with FlopCounterMode(display=False) as counter:
            model.logits(torch.zeros(1, 16, dtype=torch.long))
    assert counter.get_total_flops() == 16 * flops_per_token(config, 16).total


def test_attention_grows_with_context_alone():
    config = SHAPES["llama"]
    short, long = flops_per_token(config, 100), flops_per_token(config, 300)
    assert long.matrices == short.matrices and long.attention == 3 * short.attention


def test_bytes():
    config = SHAPES["llama grouped, free head"]
    total = count_parameters(config).total
    sizes = [resident_bytes(config, p) for p in ("fp32", "bf16", "int8", "int4")]
    assert sizes == [4 * total, 2 * total, total, -(-total // 2)]
    assert kv_bytes_per_token(config, "bf16") == 2 * 2 * 2 * 2 * 10  # k and v, layers, heads


def test_an_open_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        count_parameters(ModelConfig())


def test_arithmetic_needs_no_torch():
    code = "import sys, shoal.trainer.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
