"""Our models against `transformers`, and what training asks of them: packing, seeds, dropout."""

import json

import pytest
import torch
from safetensors.torch import save_file

from shoal.configs.schema import ModelConfig, MoEConfig
from shoal.kernels.backend import Kernels
from shoal.trainer.formats import export_config, export_tensors
from shoal.trainer.model import Transformer

SMALL = {"vocab_size": 97, "context": 24, "num_layers": 3, "width": 48, "num_heads": 4}


def routed(experts, active, **more):
    return MoEConfig(num_experts=experts, active_experts=active, hidden=24, **more)


SHAPES = {
    "gpt2": ModelConfig(family="gpt2", **SMALL),
    "gpt2, own head, odd sizes": ModelConfig(
        family="gpt2", tie_embeddings=False, hidden=50, norm_eps=1e-6, **SMALL
    ),
    "llama": ModelConfig(**SMALL),
    "llama, grouped, free head": ModelConfig(
        num_kv_heads=2, head_dim=10, hidden=40, rope_theta=500.0, norm_eps=1e-6, **SMALL
    ),
    "llama, one key head, own head": ModelConfig(num_kv_heads=1, tie_embeddings=False, **SMALL),
    "qwen3": ModelConfig(qk_norm=True, num_kv_heads=2, head_dim=16, **SMALL),
    "qwen3, own head": ModelConfig(qk_norm=True, tie_embeddings=False, **SMALL),
    "mixtral": ModelConfig(moe=routed(4, 2), num_kv_heads=2, **SMALL),
    "mixtral, top 1, tied": ModelConfig(moe=routed(3, 1), head_dim=8, **SMALL),
    "qwen3 moe": ModelConfig(
        qk_norm=True, tie_embeddings=False, moe=routed(6, 3), num_kv_heads=1, **SMALL
    ),
    "qwen3 moe, raw gates": ModelConfig(
        qk_norm=True, moe=routed(5, 2, normalize_gates=False), **SMALL
    ),
}
CLASSES = {
    "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
}  # fmt: skip


def make_model(config, seed=0, experts="grouped_mm", attention="sdpa"):
    """Return a model in which every weight matters: no gain is one and no bias zero."""
    model = Transformer(config, Kernels(attention, experts, 16))
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(6.0)  # the default 0.02 leaves attention and gates near even
    return model.eval()


def make_inputs(rows=3, context=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (rows, context), generator=generator)


def load_theirs(config, state, folder):
    """Write our weights in their names and let `transformers` read them."""
    from transformers import AutoModelForCausalLM

    tree = export_config(config, eot_id=0, dtype="fp32")
    (folder / "config.json").write_text(json.dumps(tree))
    save_file(export_tensors(config, state), folder / "model.safetensors", {"format": "pt"})
    theirs, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == config.export_class
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return theirs.eval()


def test_every_class_is_covered():
    assert {config.export_class for config in SHAPES.values()} == CLASSES


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_equal_transformers(name, tmp_path):
    config, inputs = SHAPES[name], make_inputs()
    model = make_model(config)
    theirs = load_theirs(config, model.state_dict(), tmp_path)(inputs).logits
    ours = model.logits(inputs)
    assert ours.std() > 0.3  # not accidentally even
    # fp32 sums of some dozen terms of order 1, in another order: a few ulps each.
    assert (ours - theirs).abs().max() < 1e-5
    plain = make_model(config, experts="loop", attention="reference").logits(inputs)
    assert (plain - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_every_weight_matters(name):
    """The comparison above would otherwise say nothing about it."""
    model, inputs = make_model(SHAPES[name]), make_inputs()
    before = model.logits(inputs)
    for label, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
        assert (model.logits(inputs) - before).abs().max() > 1e-4, label
        parameter.copy_(kept)


@pytest.mark.parametrize("name", [n for n, c in SHAPES.items() if c.family == "llama"])
@torch.no_grad()
def test_packed_documents_equal_documents_alone(name):
    model, inputs = make_model(SHAPES[name]), make_inputs()
    cuts = [(0, 9), (9, 10), (10, 24)]
    segments = torch.tensor([[n for n, (a, b) in enumerate(cuts) for _ in range(a, b)]] * 3)
    packed = model.logits(inputs, segments.int())
    assert (packed - model.logits(inputs)).abs().max() > 0.01
    for start, stop in cuts:
        alone = model.logits(inputs[:, start:stop])
        # Rotary angles are rounded at other positions: their differences are equal to an ulp.
        assert (packed[:, start:stop] - alone).abs().max() < 2e-5


@torch.no_grad()
def test_gpt2_documents_do_not_see_each_other():
    model, inputs = make_model(SHAPES["gpt2"]), make_inputs()
    segments = (torch.arange(24) >= 11).int().expand(3, -1)
    before = model.logits(inputs, segments)
    inputs[:, :11] = 5
    after = model.logits(inputs, segments)
    assert torch.equal(after[:, 11:], before[:, 11:])
    assert not torch.equal(model.logits(inputs)[:, 11:], before[:, 11:])


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_a_function_of_the_seed_alone(name):
    config, states = SHAPES[name], []
    for noise, experts, seed in ((1, "loop", 7), (2, "grouped_mm", 7), (2, "grouped_mm", 8)):
        torch.manual_seed(noise)
        model = Transformer(config, Kernels("sdpa", experts, 16))
        before = torch.get_rng_state()
        model.initialize(seed)
        assert torch.equal(torch.get_rng_state(), before)  # dropout's stream is not moved
        states.append(model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
        assert value.ndim == 1 or not torch.equal(value, states[2][key]), key


@pytest.mark.parametrize("name", SHAPES)
def test_initial_spread(name):
    """Normal with `init_std`; projections into the residual stream are narrower by sqrt(2 L)."""
    config = SHAPES[name]
    model = Transformer(config, Kernels("sdpa", "loop", 16))
    model.initialize(0)
    narrowed = 0
    for label, value in model.named_parameters():
        if value.ndim == 1:
            assert (value == (0.0 if label.endswith("bias") else 1.0)).all(), label
            continue
        narrow = "output" in label or "down" in label
        narrowed += narrow
        want = 0.02 / (6**0.5 if narrow else 1)
        # The spread of n draws is off by about want / sqrt(2 n): four times that, and 144 draws
        # at the least (a router).
        assert abs(value.std().item() - want) < 4 * want / (2 * value.numel()) ** 0.5, label
    assert narrowed == 2 * config.num_layers


@pytest.mark.parametrize("name", ["gpt2", "qwen3 moe"])
def test_the_last_gain_starts_where_it_is_told(name):
    config = SHAPES[name].model_copy(update={"output_gain": 8.0})
    plain, gained = (Transformer(c, Kernels("sdpa", "loop", 16)) for c in (SHAPES[name], config))
    for model in (plain, gained):
        model.initialize(0)
    assert (gained.final_norm.weight == 8.0).all()
    for label, value in gained.state_dict().items():
        assert label == "final_norm.weight" or torch.equal(value, plain.state_dict()[label]), label
    with torch.no_grad():
        logits = [model.eval().logits(make_inputs()) for model in (plain, gained)]
    torch.testing.assert_close(logits[1], 8 * logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_model_built_on_the_meta_device(name):
    config = SHAPES[name]
    with torch.device("meta"):
        model = Transformer(config, Kernels("sdpa", "grouped_mm", 16))
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.fill_(float("nan"))  # whatever memory held
    model.initialize(3)
    plain = Transformer(config, Kernels("sdpa", "grouped_mm", 16))
    plain.initialize(3)
    inputs = make_inputs()
    assert torch.equal(model.logits(inputs), plain.logits(inputs))


def gradients(model, inputs):
    torch.manual_seed(11)  # of dropout
    logits = model.logits(inputs)
    (logits * logits.detach().cos()).sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return [logits.detach(), *found]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["gpt2", "llama, grouped, free head", "qwen3 moe"])
def test_recomputed_activations_give_equal_gradients(name, dropout):
    config = SHAPES[name].model_copy(update={"dropout": dropout})
    model, inputs = make_model(config).train(), make_inputs()
    want = gradients(model, inputs)
    model.activation_checkpointing = True
    got = gradients(model, inputs)
    for one, two in zip(want, got, strict=True):
        assert torch.equal(one, two)  # the same operations on the same numbers and masks


def test_recomputing_saves_memory():
    """Fewer saved numbers: otherwise nothing was recomputed."""

    def count(checkpointing):
        model = make_model(SHAPES["llama"]).train()
        model.activation_checkpointing = checkpointing
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ):
            model.logits(make_inputs())
        return sum(saved)

    assert count(True) < 0.5 * count(False)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_dropout_in_training_alone(name):
    config = SHAPES[name].model_copy(update={"dropout": 0.2})
    model, inputs = make_model(config), make_inputs()
    still = make_model(SHAPES[name])
    with torch.no_grad():
        assert torch.equal(model.logits(inputs), still.logits(inputs))
        model.train()
        torch.manual_seed(1)
        first, second = model.logits(inputs), model.logits(inputs)
        torch.manual_seed(1)
        again = model.logits(inputs)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert not torch.equal(first, still.logits(inputs))


@torch.no_grad()
def test_bf16_stays_bf16():
    """Only parameters may be cast, as DeepSpeed does: rotary tables must not turn heads to fp32."""
    for name in ("gpt2", "llama, grouped, free head", "qwen3 moe"):
        inputs, exact = make_inputs(), make_model(SHAPES[name]).logits(make_inputs())
        whole, parameters = make_model(SHAPES[name]).bfloat16(), make_model(SHAPES[name])
        for parameter in parameters.parameters():
            parameter.data = parameter.data.bfloat16()
        for model in (whole, parameters):
            logits = model.logits(inputs)
            assert logits.dtype == torch.bfloat16
            # 8 bits of every weight and activation, over three layers: a few hundredths.
            assert (logits - exact).norm() < 0.05 * exact.norm()


def test_rows_that_are_too_long_and_open_vocabularies_are_refused():
    with pytest.raises(ValueError, match="context"):
        make_model(SHAPES["llama"])(make_inputs(context=25))
    with pytest.raises(ValueError, match="vocab_size"):
        Transformer(ModelConfig(), Kernels("sdpa", "loop", 16))
