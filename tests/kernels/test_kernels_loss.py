"""The chunked loss: values and gradients against whole logits, with and without a teacher."""

import pytest
import torch

from shoal.kernels.loss import IGNORE, chunked_loss, reference_loss

TOKENS, WIDTH, VOCAB = 37, 16, 53


def make_inputs(dtype=torch.float32, teacher=False):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight = draw(TOKENS, WIDTH).requires_grad_(), draw(VOCAB, WIDTH).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[[0, 5, 36]] = IGNORE
    more = {}
    if teacher:
        more = {
            "teacher_hidden": draw(TOKENS, 24),
            "teacher_weight": draw(VOCAB, 24),
            "temperature": 2.0,
            "teacher_share": 0.7,
        }
    return hidden, weight, targets, more


def values_and_grads(loss, hidden, weight):
    return [*loss, *torch.autograd.grad(loss.total * 0.25, (hidden, weight))]


def as_double(hidden, weight, targets, more):
    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    more = {k: v.double() if torch.is_tensor(v) else v for k, v in more.items()}
    return *doubles, targets, more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_chunks_change_nothing(chunk, teacher, dtype):
    """The error against fp64 is at most twice that of whole logits in the same dtype."""
    hidden, weight, targets, more = make_inputs(dtype, teacher)
    got = values_and_grads(chunked_loss(hidden, weight, targets, chunk, **more), hidden, weight)
    plain = values_and_grads(reference_loss(hidden, weight, targets, **more), hidden, weight)
    hidden64, weight64, _, more64 = as_double(hidden, weight, targets, more)
    # `.float()` inside makes this fp32 arithmetic on exactly rounded inputs: enough for bf16.
    exact = values_and_grads(
        reference_loss(hidden64, weight64, targets, **more64), hidden64, weight64
    )
    for index, (one, two, right) in enumerate(zip(got, plain, exact, strict=True)):
        assert one.dtype == two.dtype
        error, limit = (one - right).abs().max(), 2 * (two - right).abs().max()
        scale = right.abs().max()
        assert error <= limit + 2e-6 * scale, (index, error, limit)


def test_total_mixes_its_parts():
    hidden, weight, targets, more = make_inputs(teacher=True)
    sums = chunked_loss(hidden, weight, targets, 8, **more)
    torch.testing.assert_close(sums.total, 0.3 * sums.cross_entropy + 0.7 * sums.distillation)
    assert sums.total.requires_grad
    assert not sums.cross_entropy.requires_grad and not sums.distillation.requires_grad


def test_a_teacher_that_is_the_student_pulls_nowhere():
    hidden, weight, targets, _ = make_inputs()
    sums = chunked_loss(
        hidden, weight, targets, 8,
        teacher_hidden=hidden, teacher_weight=weight, temperature=3.0, teacher_share=1.0,
    )  # fmt: skip
    assert abs(sums.distillation.item()) < 1e-4
    grads = torch.autograd.grad(sums.total, (hidden, weight))
    assert max(g.abs().max().item() for g in grads) < 1e-5


def test_ignored_targets_count_nowhere():
    hidden, weight, targets, _ = make_inputs()
    sums = chunked_loss(hidden, weight, targets, 8)
    (grad,) = torch.autograd.grad(sums.total, hidden)
    assert not grad[targets == IGNORE].any() and grad[targets != IGNORE].any(1).all()
    nothing = chunked_loss(hidden, weight, torch.full_like(targets, IGNORE), 8)
    assert nothing.total == 0 and not torch.autograd.grad(nothing.total, weight)[0].any()


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets, _ = make_inputs()
    loss = chunked_loss(hidden, weight.detach(), targets, 8)
    loss.total.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not chunked_loss(hidden, weight, targets, 8).total.requires_grad


def test_teachers_that_do_not_fit_are_refused():
    hidden, weight, targets, more = make_inputs(teacher=True)
    with pytest.raises(ValueError, match="vocabulary"):
        chunked_loss(hidden, weight, targets, 8, **more | {"teacher_weight": torch.ones(9, 24)})
    with pytest.raises(ValueError, match="both"):
        chunked_loss(hidden, weight, targets, 8, **more | {"teacher_weight": None})
