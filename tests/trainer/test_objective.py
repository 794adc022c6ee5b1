"""The objective: sums over tokens, a teacher that is never trained, router terms by hand."""

import engine_models
import engine_ranks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shoal.configs.schema import ModelConfig, MoEConfig, TeacherConfig
from shoal.data_pipeline.batch import IGNORE
from shoal.kernels.backend import Kernels
from shoal.trainer.model import Transformer
from shoal.trainer.moe import balance_loss, expert_load, z_loss
from shoal.trainer.objective import NUM_SUMS, LossSums, Objective, Teacher

KERNELS = Kernels("sdpa", "grouped_mm", loss_chunk_tokens=5)
SMALL = {"vocab_size": 41, "context": 12, "num_layers": 2, "num_heads": 4}


def make_model(seed, moe=None, **more):
    # A large init_std makes distributions that are far from even, and from each other.
    shape = ModelConfig(**{"width": 32, "init_std": 0.3, "moe": moe} | SMALL | more)
    model = Transformer(shape, KERNELS)
    model.initialize(seed)
    return model


def make_rows(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 41, (rows, 12), generator=generator)
    targets = torch.randint(0, 41, (rows, 12), generator=generator)
    targets[0, :7] = IGNORE
    return inputs, targets, torch.zeros(rows, 12, dtype=torch.int32)


def gradients(objective, loss):
    return dict(
        zip(
            dict(objective.named_parameters()),
            torch.autograd.grad(loss, list(objective.parameters())),
            strict=True,
        )
    )


def make_distilled(share, temperature=2.0):
    teacher = Teacher(
        make_model(9, width=48), TeacherConfig(path="x", temperature=temperature, weight=share)
    )
    student = make_model(1)
    return Objective(student, teacher), teacher


def spell_out(objective, teacher, share, temperature, rows):
    """Both terms with whole logits and torch's own derivative (Hinton et al. 2015, section 2)."""
    inputs, targets, segments = rows
    real = targets != IGNORE
    logits = objective.model.logits(inputs, segments)[real]
    with torch.no_grad():
        guide = teacher.model.logits(inputs, segments)[real]
    cross_entropy = F.cross_entropy(logits, targets[real], reduction="sum")
    kl = F.kl_div(
        (logits / temperature).log_softmax(-1),
        (guide / temperature).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    distillation = temperature**2 * kl
    return (1 - share) * cross_entropy + share * distillation, cross_entropy, distillation


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_equals_torch(share, temperature):
    objective, teacher = make_distilled(share, temperature)
    rows = make_rows()
    loss, sums = objective(*rows)
    want, cross_entropy, distillation = spell_out(objective, teacher, share, temperature, rows)
    # fp32 sums of some hundred terms, in chunks of 5 tokens and as a whole.
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    both = torch.stack([cross_entropy, distillation])
    torch.testing.assert_close(sums[:2], both, rtol=1e-5, atol=0)
    got, right = gradients(objective, loss), gradients(objective, want)
    for name, value in right.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_shares_at_the_ends_are_one_term_alone():
    rows = make_rows()
    plain = Objective(make_model(1))
    objective, _ = make_distilled(0.0)
    assert torch.equal(objective(*rows)[0], plain(*rows)[0])
    taught, _ = make_distilled(1.0)
    loss, sums = taught(*rows)
    assert torch.equal(loss.detach(), sums[1]) and sums[1] > 1
    assert torch.equal(sums[0], plain(*rows)[1][0])  # still reported


def test_the_teacher_is_no_part_of_the_module():
    objective, teacher = make_distilled(0.5)
    assert all(name.startswith("model.") for name in objective.state_dict())
    own = {id(p) for p in objective.parameters()}
    assert not own & {id(p) for p in teacher.model.parameters()}
    assert teacher.model not in set(objective.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    objective.train()
    assert not teacher.model.training  # no dropout in what is imitated
    before = [p.clone() for p in teacher.model.parameters()]
    objective(*make_rows())[0].backward()
    torch.optim.SGD(objective.parameters(), lr=1.0).step()
    for old, new in zip(before, teacher.model.parameters(), strict=True):
        assert torch.equal(old, new) and new.grad is None


def test_validation_does_not_ask_the_teacher():
    objective, teacher = make_distilled(0.5)
    teacher.hidden = None
    _, sums = objective.eval()(*make_rows())
    assert sums[0] > 0 and sums[1] == 0


@pytest.mark.parametrize("taught", [False, True])
def test_the_loss_is_a_sum_over_tokens(taught):
    """Rows one at a time, with different numbers of real targets, add up to the whole."""
    objective = make_distilled(0.5)[0] if taught else Objective(make_model(1))
    inputs, targets, segments = make_rows()
    loss, sums = objective(inputs, targets, segments)
    whole = gradients(objective, loss)
    parts = [
        objective(inputs[r : r + 1], targets[r : r + 1], segments[r : r + 1]) for r in range(3)
    ]
    torch.testing.assert_close(sum(part for part, _ in parts), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(vector for _, vector in parts), sums, rtol=1e-6, atol=0)
    added = gradients(objective, sum(part for part, _ in parts))
    for name, value in whole.items():
        torch.testing.assert_close(added[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_padded_rows_change_nothing():
    for objective in (Objective(make_model(1)), make_routed()):
        inputs, targets, segments = make_rows()
        _, sums = objective(inputs, targets, segments)
        pad = torch.cat([inputs, torch.full_like(inputs[:2], 3)])
        none = torch.cat([targets, torch.full_like(targets[:2], IGNORE)])
        loss, padded = objective(pad, none, torch.cat([segments, segments[:2]]))
        torch.testing.assert_close(padded, sums, rtol=1e-5, atol=1e-5)
        only = objective(pad[3:], none[3:], segments[:2])
        assert only[0] == 0 and not only[1].any()
        assert not any(g.any() for g in gradients(objective, only[0]).values())
        assert loss.isfinite()


def make_routed(**more):
    moe = MoEConfig(num_experts=4, active_experts=2, hidden=16, **more)
    return Objective(make_model(2, moe=moe))


def test_router_terms_are_means_over_layers_times_tokens():
    objective = make_routed(balance_weight=0.5, z_weight=0.25)
    inputs, targets, segments = make_rows()
    loss, sums = objective(inputs, targets, segments)
    mask, tokens = targets.flatten() != IGNORE, int((targets != IGNORE).sum())
    layers = objective.model(inputs, segments).router
    assert len(layers) == 2
    read = LossSums.from_vector(sums)
    balance = sum(balance_loss(layer, mask, 4) for layer in layers) / 2
    assert read.balance == pytest.approx(tokens * balance.item(), rel=1e-5)
    router_z = sum(z_loss(layer, mask) for layer in layers) / 2
    assert read.router_z == pytest.approx(tokens * router_z.item(), rel=1e-5)
    load = sum(expert_load(layer, mask) for layer in layers) / 2
    assert read.expert_load == pytest.approx((tokens * load).tolist(), rel=1e-5)
    assert sum(read.expert_load) == pytest.approx(tokens, rel=1e-5)
    want = read.cross_entropy + 0.5 * read.balance + 0.25 * read.router_z
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert sums.shape == (NUM_SUMS + 4,) and not sums.requires_grad


def test_router_terms_pull_the_router():
    rows = make_rows()
    found = []
    for weights in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
        objective = make_routed(balance_weight=weights[0], z_weight=weights[1])
        found.append(
            gradients(objective, objective(*rows)[0])["model.blocks.1.feed_forward.router"]
        )
    assert (found[1] - found[0]).abs().max() > 1e-3
    assert (found[2] - found[0]).abs().max() > 1e-3


def test_dense_models_have_no_router_terms():
    _, sums = Objective(make_model(1))(*make_rows())
    assert sums.shape == (NUM_SUMS,) and not sums[1:].any()
    assert LossSums.from_vector(sums).expert_load == ()


def test_every_parameter_gets_a_gradient():
    for kind in ("dense", "gpt2", "moe"):
        objective = engine_ranks.build(kind)
        inputs, targets = engine_models.global_batch(0)
        loss, _ = objective(inputs, targets, torch.zeros_like(inputs))
        for name, value in gradients(objective, loss).items():
            assert value.any(), (kind, name)
    assert isinstance(objective, nn.Module)


@pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=4, hidden=16)])
def test_losses_of_streams_are_told_apart(moe):
    objective = Objective(make_model(3, moe), num_streams=3)
    inputs, targets, segments = make_rows(5)
    targets[4] = IGNORE  # a padded row
    streams = torch.tensor([2, 0, 0, 2, -1])
    _, vector = objective(inputs, targets, segments, streams)
    sums = LossSums.from_vector(vector, 3)
    assert len(sums.expert_load) == (4 if moe else 0)
    for number in range(3):
        rows = streams == number
        nats, tokens = sums.streams[number]
        assert tokens == int((targets[rows] != IGNORE).sum())
        logits = objective.model.logits(inputs, segments)[rows]
        expected = F.cross_entropy(logits.flatten(0, 1), targets[rows].flatten(), reduction="sum",
                                   ignore_index=IGNORE) if tokens else torch.zeros(())  # fmt: skip
        assert nats == pytest.approx(expected.item(), rel=1e-5)
    assert sum(nats for nats, _ in sums.streams) == pytest.approx(sums.cross_entropy, rel=1e-6)
    _, plain = Objective(objective.model)(inputs, targets, segments, streams)
    assert torch.equal(plain, vector[: len(plain)]) and len(vector) == len(plain) + 6
