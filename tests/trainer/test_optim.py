"""The learning rate as a pure function of the step, and which parameters decay."""

import itertools
import math

import engine_ranks
import pytest
import torch
from torch import nn

from shoal.configs.schema import OptimConfig
from shoal.trainer.optim import group_parameters, learning_rate

STEPS = 100
SCHEDULES = ("cosine", "wsd", "linear", "constant")


def rates(steps=STEPS, **values):
    config = OptimConfig(**{"lr": 2.0, "warmup_share": 0.1, "min_lr_share": 0.1} | values)
    return [learning_rate(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    curve = rates(schedule=schedule)
    assert curve[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(curve) == curve[9] == 2.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_never_rises_after_warm_up(schedule):
    curve = rates(schedule=schedule)
    assert all(a >= b for a, b in itertools.pairwise(curve[9:]))
    assert min(curve) > 0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
@pytest.mark.parametrize("lowest", [0.0, 0.1, 1.0])
def test_the_last_step_takes_the_lowest_rate(schedule, lowest):
    curve = rates(schedule=schedule, min_lr_share=lowest)
    assert curve[-1] == pytest.approx(2.0 * lowest, abs=1e-12)  # rounding of a few products
    assert min(curve[10:]) == curve[-1]


def test_shapes_by_hand():
    # 90 steps after warm-up; the middle of the decay is the 45th of them, step 54 counted from 0.
    assert rates(schedule="cosine")[54] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates(schedule="cosine")[31] == pytest.approx(
        2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * 22 / 90)))
    )
    assert rates(schedule="linear")[54] == pytest.approx(2.0 * (1 - 0.9 * 0.5))
    assert rates(schedule="constant")[10:] == [2.0] * 90
    wsd = rates(schedule="wsd", decay_share=0.2)
    assert wsd[10:80] == [2.0] * 70
    assert wsd[80:] == pytest.approx([2.0 * (1 - 0.9 * n / 20) for n in range(1, 21)])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_a_rate_at_every_step(schedule, warmup, steps):
    for decay in (0.0, 1.0):
        curve = rates(steps, schedule=schedule, warmup_share=warmup, decay_share=decay)
        assert all(0 < rate <= 2.0 for rate in curve)


def test_without_warm_up_the_first_step_is_near_the_peak():
    assert rates(schedule="constant", warmup_share=0.0)[0] == 2.0
    assert rates(schedule="linear", warmup_share=0.0)[0] == pytest.approx(2.0 * (1 - 0.9 / 100))


def test_a_decay_longer_than_the_rest_starts_after_warm_up():
    curve = rates(schedule="wsd", warmup_share=0.5, decay_share=0.9)
    assert curve[49] == 2.0 and curve[50] < 2.0


@pytest.mark.parametrize("kind", ["gpt2", "moe"])
def test_matrices_decay_and_vectors_do_not(kind):
    objective = engine_ranks.build(kind)
    decaying, plain = group_parameters(objective, OptimConfig(weight_decay=0.3))
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in objective.named_parameters()}
    members = [{names[id(p)] for p in group["params"]} for group in (decaying, plain)]
    assert members[0] | members[1] == set(names.values()) and not members[0] & members[1]
    assert all(name.endswith(("norm.weight", "bias")) for name in members[1])
    assert not any(name.endswith(("norm.weight", "bias")) for name in members[0])


def test_frozen_parameters_and_empty_groups_are_left_out():
    module = nn.Linear(3, 2)
    module.weight.requires_grad_(False)
    (group,) = group_parameters(module, OptimConfig())
    assert group["params"] == [module.bias] and group["weight_decay"] == 0.0
    assert not group_parameters(nn.Identity(), OptimConfig())


def test_a_tied_matrix_is_updated_once():
    groups = group_parameters(engine_ranks.build("dense"), OptimConfig())
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    torch.optim.AdamW(groups)  # refuses a parameter that comes twice
