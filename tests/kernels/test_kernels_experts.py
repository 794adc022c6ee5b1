"""Experts: the grouped product against the loop, outputs and gradients, on every odd shape."""

import pytest
import torch
import torch.nn.functional as F

from shoal.kernels.experts import run_experts

# tokens, width, expert hidden, experts, k. Widths of 20 and 30 are not aligned to 16 bytes.
SHAPES = [(64, 32, 24, 4, 2), (17, 20, 30, 3, 1), (128, 16, 8, 16, 4), (5, 64, 48, 8, 8)]


def make_inputs(tokens, width, hidden, experts, active, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scores = draw(tokens, experts)
    if experts > active:
        scores[:, 0] = -9.0  # expert 0 stays without tokens
    gates, ids = scores.softmax(-1).topk(active)
    tensors = [draw(tokens, width), gates]
    tensors += [draw(experts, 2 * hidden, width) / width**0.5]
    tensors += [draw(experts, width, hidden) / hidden**0.5]
    hidden_, gates, gate_up, down = (t.to(dtype).to(device).requires_grad_() for t in tensors)
    return hidden_, ids.to(device), gates, gate_up, down


def run(backend, inputs):
    """Return the output and the gradients of all four float inputs."""
    hidden, ids, gates, gate_up, down = inputs
    output = run_experts(hidden, ids, gates, gate_up, down, backend=backend)
    weights = torch.arange(output.numel(), device=output.device).view_as(output).cos()
    leaves = (hidden, gates, gate_up, down)
    return output.detach(), *torch.autograd.grad(output, leaves, weights.to(output.dtype))


def exact(inputs):
    hidden, ids, gates, gate_up, down = inputs
    leaves = [t.detach().double().requires_grad_() for t in (hidden, gates, gate_up, down)]
    return run("loop", (leaves[0], ids, *leaves[1:]))


def plain(inputs):
    """Every token through every expert, gates zero where not chosen, in the inputs' dtype."""
    hidden, ids, gates, gate_up, down = inputs
    dense_gates = gates.new_zeros(len(hidden), len(gate_up)).scatter(1, ids, gates)
    gate, up = torch.einsum("tw,ehw->teh", hidden, gate_up).chunk(2, -1)
    outputs = torch.einsum("teh,ewh->tew", F.silu(gate) * up, down)
    output = (outputs * dense_gates[:, :, None]).sum(1)
    weights = torch.arange(output.numel(), device=output.device).view_as(output).cos()
    leaves = (hidden, gates, gate_up, down)
    return output.detach(), *torch.autograd.grad(output, leaves, weights.to(output.dtype))


def check(shape, dtype, device="cpu"):
    inputs = make_inputs(*shape, dtype=dtype, device=device)
    want = exact(inputs)
    reference = plain(inputs)
    for backend in ("loop", "grouped_mm"):
        for name, right, naive, got in zip(
            ("output", "hidden", "gates", "gate_up", "down"),
            want, reference, run(backend, inputs), strict=True,
        ):  # fmt: skip
            assert got.dtype == dtype
            error, limit = (got - right).norm(), 2 * (naive - right).norm()
            assert error <= limit + 1e-6 * right.norm(), f"{backend} {name}: {error} > {limit}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_are_as_exact_as_plain_torch(shape, dtype):
    check(shape, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_mm_equals_loop_in_fp32(shape):
    inputs = make_inputs(*shape)
    for want, got in zip(run("loop", inputs), run("grouped_mm", inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_empty_experts_get_zero_gradients(backend):
    *_, gate_up, down = run(backend, make_inputs(*SHAPES[0]))
    assert not gate_up[0].any() and not down[0].any()
    assert gate_up[1:].flatten(1).any(1).all() and down[1:].flatten(1).any(1).all()


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_with_unit_gate_is_the_dense_layer(backend, dtype):
    hidden, _, _, gate_up, down = make_inputs(48, 32, 40, 1, 1, dtype)
    ids, ones = torch.zeros(48, 1, dtype=torch.long), torch.ones(48, 1)
    got = run_experts(hidden, ids, ones, gate_up, down, backend=backend)
    gate, up = F.linear(hidden, gate_up[0]).chunk(2, -1)
    assert torch.equal(got, F.linear(F.silu(gate) * up, down[0]))


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_a_plain_sum_can_be_differentiated(backend):
    """The gradient of a sum has stride 0, which grouped_mm itself refuses."""
    inputs = make_inputs(*SHAPES[0])
    output = run_experts(inputs[0], *inputs[1:], backend=backend)
    output.sum().backward()
    assert inputs[3].grad.any()


def test_grouped_path_compiles_whole():
    inputs = make_inputs(*SHAPES[0])
    compiled = torch.compile(run_experts, fullgraph=True, backend="aot_eager")
    got = compiled(inputs[0], *inputs[1:], backend="grouped_mm")
    torch.testing.assert_close(got, run("grouped_mm", inputs)[0])


def test_unknown_backend_is_refused():
    inputs = make_inputs(*SHAPES[0])
    with pytest.raises(ValueError, match="unknown experts backend"):
        run_experts(inputs[0], *inputs[1:], backend="magic")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree_on_cuda(shape):
    check(shape, torch.bfloat16, "cuda")
