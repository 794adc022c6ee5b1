"""Mixture of experts: against the dense layer, between backends, and its losses by hand."""

import math

import pytest
import torch

from shoal.configs.schema import ModelConfig, MoEConfig
from shoal.kernels.backend import Kernels
from shoal.trainer.model import GatedFeedForward, Transformer
from shoal.trainer.moe import MixtureOfExperts, RouterStats, balance_loss, expert_load, z_loss

SHAPE = {"vocab_size": 61, "context": 16, "num_layers": 2, "width": 32, "num_heads": 4}
BACKENDS = ("loop", "grouped_mm")


def make_config(experts, active, **more):
    moe = MoEConfig(num_experts=experts, active_experts=active, hidden=24, **more)
    return ModelConfig(moe=moe, qk_norm=True, init_std=0.2, **SHAPE)


def make_layer(config, backend, seed=0):
    layer = MixtureOfExperts(config, Kernels("sdpa", backend, 8))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return layer


def make_states(rows=3):
    return torch.randn(rows, 16, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_one_expert_is_the_dense_layer(backend, normalize):
    """Softmax over one expert is 1 whatever the router says, so the gate is a unit."""
    config = make_config(1, 1, normalize_gates=normalize)
    layer = make_layer(config, backend)
    dense = GatedFeedForward(config)
    dense.load_state_dict({"gate_up.weight": layer.gate_up[0], "down.weight": layer.down[0]})
    left, right = make_states().requires_grad_(), make_states().requires_grad_()
    got, want = layer(left)[0], dense(right)
    assert torch.equal(got, want) and want.abs().max() > 0.1
    (got * got.detach().cos()).sum().backward()
    (want * want.detach().cos()).sum().backward()
    # The gradients of the inputs and weights go through the same products in another order.
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-5, atol=1e-5)
    for ours, name in ((layer.gate_up, "gate_up"), (layer.down, "down")):
        theirs = getattr(dense, name).weight.grad
        torch.testing.assert_close(ours.grad[0], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "active"), [(4, 2), (5, 1), (3, 3)])
def test_models_agree_between_backends(experts, active, normalize):
    config = make_config(experts, active, normalize_gates=normalize)
    inputs = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(1))
    found = {}
    for backend in BACKENDS:
        model = Transformer(config, Kernels("sdpa", backend, 8))
        model.initialize(3)
        logits = model.logits(inputs)
        logits.logsumexp(-1).sum().backward()
        found[backend] = [logits.detach(), *(p.grad for p in model.parameters())]
    assert len(found["loop"]) > 10
    for want, got in zip(found["loop"], found["grouped_mm"], strict=True):
        # fp32 products of the same numbers, grouped differently; gradients add 48 tokens.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_gates_and_choices_by_hand():
    config = make_config(4, 2, normalize_gates=False)
    layer = make_layer(config, "loop")
    tokens = make_states().flatten(0, 1)
    stats, gates = layer.route(tokens)
    logits = tokens.double() @ layer.router.double().T
    shares = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assert stats.expert_ids.tolist() == shares.argsort(-1, descending=True)[:, :2].tolist()
    torch.testing.assert_close(gates, shares.sort(-1, descending=True)[0][:, :2].float())
    layer.normalize_gates = True
    normalized = layer.route(tokens)[1]
    torch.testing.assert_close(normalized.sum(-1), torch.ones(48))
    torch.testing.assert_close(normalized, gates / gates.sum(-1, keepdim=True))


def test_routing_is_fp32_in_a_bf16_model():
    layer = make_layer(make_config(4, 2), "loop").bfloat16()
    mixed, stats = layer(make_states().bfloat16())
    assert mixed.dtype == torch.bfloat16
    assert stats.logits.dtype == stats.probabilities.dtype == torch.float32


def make_stats(logits, active):
    return RouterStats(logits.softmax(-1), logits, logits.topk(active).indices)


@pytest.mark.parametrize("active", [1, 2])
def test_balance_is_one_when_even(active):
    """Token i prefers experts i and i + 1, each a little: loads and mean probabilities are 1/4."""
    logits = torch.zeros(8, 4)
    for token in range(8):
        logits[token, token % 4], logits[token, (token + 1) % 4] = 0.02, 0.01
    stats = make_stats(logits, active)
    everyone = torch.ones(8, dtype=torch.bool)
    assert expert_load(stats, everyone).tolist() == [0.25] * 4
    assert balance_loss(stats, everyone, 4).item() == pytest.approx(1.0, abs=1e-6)


def test_balance_is_the_number_of_experts_when_all_go_to_one():
    logits = torch.full((6, 4), -50.0)
    logits[:, 2] = 50.0
    stats = make_stats(logits, 1)
    everyone = torch.ones(6, dtype=torch.bool)
    assert expert_load(stats, everyone).tolist() == [0, 0, 1, 0]
    assert balance_loss(stats, everyone, 4).item() == pytest.approx(4.0, abs=1e-6)


def test_losses_by_hand():
    """Two tokens, two experts: probabilities (3/4, 1/4) and (1/5, 4/5), both top-1."""
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(4.0)]])
    stats, everyone = make_stats(logits, 1), torch.ones(2, dtype=torch.bool)
    mean = [(3 / 4 + 1 / 5) / 2, (1 / 4 + 4 / 5) / 2]
    assert balance_loss(stats, everyone, 2).item() == pytest.approx(2 * (mean[0] + mean[1]) / 2)
    want = (math.log(4.0) ** 2 + math.log(5.0) ** 2) / 2
    assert z_loss(stats, everyone).item() == pytest.approx(want, rel=1e-6)
    first = torch.tensor([True, False])
    assert z_loss(stats, first).item() == pytest.approx(math.log(4.0) ** 2, rel=1e-6)
    assert balance_loss(stats, first, 2).item() == pytest.approx(2 * 3 / 4, rel=1e-6)
    assert expert_load(stats, first).tolist() == [1, 0]


def test_padding_counts_nowhere():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(12, 4, generator=generator)
    mask = torch.arange(12) < 7
    part = make_stats(logits[:7], 2)
    other = logits.clone()
    other[7:] = 100 * torch.randn(5, 4, generator=generator)
    everyone = torch.ones(7, dtype=torch.bool)
    for padded in (make_stats(logits, 2), make_stats(other, 2)):
        torch.testing.assert_close(balance_loss(padded, mask, 4), balance_loss(part, everyone, 4))
        torch.testing.assert_close(z_loss(padded, mask), z_loss(part, everyone))
        assert torch.equal(expert_load(padded, mask), expert_load(part, everyone))


def test_padding_alone_costs_nothing():
    stats = make_stats(torch.randn(5, 4), 2)
    nobody = torch.zeros(5, dtype=torch.bool)
    assert balance_loss(stats, nobody, 4) == 0 and z_loss(stats, nobody) == 0
    assert not expert_load(stats, nobody).any()


def test_a_dense_shape_is_refused():
    with pytest.raises(ValueError, match=r"config\.moe"):
        MixtureOfExperts(ModelConfig(**SHAPE), Kernels("sdpa", "loop", 8))
