"""The solver finds dense and MoE shapes within tolerance, or names the nearest it can reach."""

import pytest

from shoal.configs.errors import ConfigError
from shoal.configs.schema import ModelConfig
from shoal.configs.study import BudgetConfig, MatchConfig
from shoal.eval.budget import (
    check_match,
    compute_cost,
    measure_cost,
    resolve_contexts,
    scoring_precision,
    solve_shape,
)
from shoal.eval.candidate import Candidate

DENSE = ModelConfig(vocab_size=4096, context=256, num_layers=6, width=192, num_heads=6)
MOE = DENSE.model_copy(update={"moe": ModelConfig(moe={"num_experts": 8, "active_experts": 2}).moe})


def budget(axis, target, **conditions):
    return BudgetConfig(axis=axis, target=target, context=256, **conditions)


@pytest.mark.parametrize("template", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("axis", ["active_flops_per_token", "resident_bytes"])
@pytest.mark.parametrize("factor", [0.85, 1.0, 1.7])
def test_solver_meets_targets(template, axis, factor):
    target = budget(axis, factor * compute_cost(DENSE, budget(axis, 1)))
    shape = solve_shape(template, target, MatchConfig(budget="b", hidden_multiple=8))
    assert abs(compute_cost(shape, target) / target.target - 1) <= 0.03
    assert shape.feed_forward % 8 == 0
    assert shape.width == template.width
    assert (shape.moe is None) == (template.moe is None)
    free = {"hidden", "moe"}
    assert shape.model_dump(exclude=free) == template.model_dump(exclude=free)
    ModelConfig.model_validate(shape.model_dump())


def test_moe_equal_in_flops_is_larger_and_equal_in_bytes_is_cheaper():
    """Idle experts cost bytes and no FLOPs, so the two matches are different models."""
    flops = budget(
        "active_flops_per_token", compute_cost(DENSE, budget("active_flops_per_token", 1))
    )
    size = budget("resident_bytes", compute_cost(DENSE, budget("resident_bytes", 1)))
    match = MatchConfig(budget="b", hidden_multiple=8)
    by_flops, by_size = solve_shape(MOE, flops, match), solve_shape(MOE, size, match)
    assert compute_cost(by_flops, size) > 1.3 * size.target
    assert compute_cost(by_size, flops) < 0.95 * flops.target


def test_widths_are_searched_and_proportions_kept():
    target = budget("resident_bytes", 2.5 * compute_cost(DENSE, budget("resident_bytes", 1)))
    match = MatchConfig(budget="b", widths=(192, 300, 324, 396), hidden_multiple=8)
    shape = solve_shape(DENSE, target, match)
    assert abs(compute_cost(shape, target) / target.target - 1) <= 0.03
    wide = {w: solve_shape(DENSE, target, match.model_copy(update={"widths": (w,)}))
            for w in (192, 300, 324)}  # fmt: skip
    proportion = DENSE.feed_forward / DENSE.width
    best = min(wide.values(), key=lambda m: abs(m.feed_forward / m.width / proportion - 1))
    assert shape == best
    assert shape.width in (300, 324)


def test_key_value_budget_is_met_by_width():
    target = budget("kv_bytes_per_token", 2 * 6 * 384 * 2)
    shape = solve_shape(DENSE, target, MatchConfig(budget="b", widths=(192, 288, 384)))
    assert shape.width == 384
    assert compute_cost(shape, target) == target.target


def test_budget_no_shape_can_meet_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        solve_shape(DENSE, budget("resident_bytes", 100_000), MatchConfig(budget="b"))
    smallest = DENSE.model_copy(update={"hidden": 8})
    nearest = compute_cost(smallest, budget("resident_bytes", 1))
    assert f"{nearest:,.0f}" in str(caught.value)
    assert "hidden 8" in str(caught.value)
    assert caught.value.fix


def test_coarse_steps_that_miss_are_refused():
    exact = compute_cost(DENSE.model_copy(update={"hidden": 300}), budget("resident_bytes", 1))
    tight = budget("resident_bytes", exact, tolerance=0.001)
    with pytest.raises(ConfigError, match=r"within 0\.1%"):
        solve_shape(DENSE, tight, MatchConfig(budget="b", hidden_multiple=128))


@pytest.mark.parametrize(
    ("template", "width", "reason"),
    [(DENSE, 100, "width 100 is not a multiple of num_heads 6"), (DENSE, 198, "head_dim 33 is odd"),
     (MOE, 204, "must be multiples of 8"), (DENSE, -6, "width: Input should be greater")],
)  # fmt: skip
def test_width_that_is_no_model_is_refused_with_the_reason(template, width, reason):
    """Also beside widths that would do: the list asks for a search that cannot be made."""
    match = MatchConfig(budget="b", widths=(192, width, 101))
    with pytest.raises(ConfigError, match=f"no model is {width} wide: .*{reason}") as caught:
        solve_shape(template, budget("resident_bytes", 1e7), match)
    assert caught.value.where == "match.widths"


def test_timed_axes_cannot_be_solved():
    with pytest.raises(ConfigError, match="only be measured"):
        solve_shape(DENSE, budget("latency_ms", 5), MatchConfig(budget="b"))


def test_match_is_two_sided():
    target = budget("resident_bytes", 1000, tolerance=0.03)
    assert check_match(target, 1029).within
    assert check_match(target, 971).within
    assert not check_match(target, 1031).within
    assert not check_match(target, 969).within
    assert check_match(target, 900).deviation == pytest.approx(-0.1)


def test_built_model_is_measured_not_believed(make_export, shapes):
    """The formula of another shape does not change what is measured."""
    candidate = Candidate.open(make_export("llama"))
    right = compute_cost(shapes["llama"], budget("resident_bytes", 1))
    wrong = shapes["llama"].model_copy(update={"hidden": 480})
    asked = BudgetConfig(axis="resident_bytes", target=right, context=64)
    found = measure_cost(candidate.shape_facts(64), asked, model=wrong)
    assert found.measured == right and found.within
    assert found.formula == compute_cost(wrong, asked) != right


def test_scoring_precision_is_what_bytes_assume():
    flops = budget("active_flops_per_token", 1, precision="fp32")
    size = budget("resident_bytes", 1, precision="bf16")
    assert scoring_precision({"a": flops, "b": size}) == "bf16"
    assert scoring_precision({"a": flops}) == "fp32"
    with pytest.raises(ConfigError, match="different precisions"):
        scoring_precision({"a": size, "b": budget("resident_bytes", 1, precision="fp32")})


def test_budget_without_context_is_meant_at_the_shortest():
    own = BudgetConfig(axis="active_flops_per_token", target=1, context=32)
    open_one = BudgetConfig(axis="active_flops_per_token", target=1)
    with pytest.raises(ValueError, match="not resolved"):
        compute_cost(DENSE, open_one)
    settled = resolve_contexts({"own": own, "open": open_one}, [256, 64])
    assert [b.settled_context for b in settled.values()] == [32, 64]
    assert compute_cost(DENSE, settled["open"]) > compute_cost(DENSE, settled["own"])
    assert open_one.context is None


def test_limit_is_one_sided():
    size = budget("resident_bytes", 1000, tolerance=0.03)
    assert check_match(size, 100, rule="limit").within
    assert check_match(size, 1000, rule="limit").within
    assert not check_match(size, 1001, rule="limit").within
    speed = budget("tokens_per_second", 1000, tolerance=0.03)
    assert check_match(speed, 5000, rule="limit").within
    slow = check_match(speed, 900, rule="limit")
    assert not slow.within
    assert slow.excess == pytest.approx(0.1)
