"""Attention: the fused kernel against the explicit one; documents that cannot see each other."""

import pytest
import torch

from shoal.kernels.attention import attend, prepare_mask

SHAPES = [(2, 4, 4, 17, 8), (3, 6, 2, 33, 16), (1, 4, 1, 64, 32)]


def make_inputs(rows, heads, kv_heads, context, head_dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(number):
        drawn = torch.randn(
            rows, number, context, head_dim, generator=generator, dtype=torch.float64
        )
        return drawn.to(dtype)

    return draw(heads), draw(kv_heads), draw(kv_heads)


def make_segments(rows, context):
    places = torch.arange(context)
    return torch.stack([(places * (row + 2)) // context for row in range(rows)]).int()


def exact(query, key, value, segments):
    """Attention spelled out in fp64."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(repeats, 1) for t in (key, value))
    scores = query.double() @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)[None]
    if segments is not None:
        hidden = hidden | (segments[:, :, None] != segments[:, None, :])
    return scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_sdpa_is_as_exact_as_plain_torch(shape, packed, dtype):
    query, key, value = make_inputs(*shape, dtype=dtype)
    segments = make_segments(shape[0], shape[3]) if packed else None
    want = exact(query, key, value, segments)
    repeats = shape[1] // shape[2]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(-2, -1) / shape[4] ** 0.5
    seen = prepare_mask(segments, "reference").allowed
    if seen is None:
        seen = torch.ones(shape[3], shape[3], dtype=torch.bool).tril()
    plain = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    plain = plain @ value.repeat_interleave(repeats, 1)
    for backend in ("sdpa", "reference"):
        got = attend(query, key, value, prepare_mask(segments, backend), backend=backend)
        assert got.dtype == dtype
        limit = 2 * (plain - want).abs().max() + 1e-7
        assert (got - want).abs().max() <= limit, backend


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_agree(packed):
    segments = make_segments(3, 33) if packed else None
    grads = {}
    for backend in ("reference", "sdpa"):
        inputs = [t.requires_grad_() for t in make_inputs(*SHAPES[1])]
        result = attend(*inputs, prepare_mask(segments, backend), backend=backend)
        (result * torch.arange(result.numel()).view_as(result).cos()).sum().backward()
        grads[backend] = [t.grad for t in inputs]
    for want, got in zip(grads["reference"], grads["sdpa"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_packed_documents_equal_documents_alone(backend):
    query, key, value = make_inputs(1, 4, 2, 24, 8)
    segments = torch.tensor([[0] * 10 + [1] * 5 + [2] * 9])
    packed = attend(query, key, value, prepare_mask(segments, backend), backend=backend)
    for start, end in ((0, 10), (10, 15), (15, 24)):
        part = slice(start, end)
        alone = attend(
            query[:, :, part], key[:, :, part], value[:, :, part],
            prepare_mask(None, backend), backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(packed[:, :, part], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_the_future_is_not_seen(backend):
    query, key, value = make_inputs(1, 2, 2, 12, 8)
    before = attend(query, key, value, prepare_mask(None, backend), backend=backend)
    key[:, :, 7:], value[:, :, 7:] = 9.0, -9.0
    after = attend(query, key, value, prepare_mask(None, backend), backend=backend)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.allclose(before[:, :, 7:], after[:, :, 7:])


def test_unknown_backend_is_refused():
    query, key, value = make_inputs(1, 2, 2, 4, 8)
    with pytest.raises(ValueError, match="unknown attention backend"):
        prepare_mask(None, "magic")
    with pytest.raises(ValueError, match="unknown attention backend"):
        attend(query, key, value, prepare_mask(None, "sdpa"), backend="magic")
