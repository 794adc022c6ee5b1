"""Inference budgets: every axis measured on the built model, and shapes solved to a target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from shoal.configs.errors import ConfigError
from shoal.configs.load import first_problem
from shoal.configs.schema import EXPERT_MULTIPLE, ModelConfig
from shoal.configs.study import SOLVED_AXES, BudgetConfig, MatchConfig
from shoal.eval.candidate import ShapeFacts
from shoal.eval.latency import Latency
from shoal.trainer.cost import flops_per_token, kv_bytes_per_token, resident_bytes

DEFAULT_CONTEXT = 1024
TIMED_AXES = ("latency_ms", "tokens_per_second")


@dataclass(frozen=True)
class Measured:
    """One axis of one model against its target."""

    axis: str
    target: float
    measured: float
    formula: float | None
    """What the arithmetic says; None for timings, and for models the arithmetic does not know."""
    deviation: float
    """(measured - target) / target."""
    within: bool
    rule: str = "match"
    """`match`: within tolerance on both sides; `limit`: not beyond the target."""

    @property
    def excess(self) -> float:
        """Share by which it is worse than the target; negative where there is room."""
        return excess(self.axis, self.deviation)

    def as_tree(self) -> dict[str, Any]:
        """Return a tree for JSON."""
        return asdict(self)


def excess(axis: str, deviation: float) -> float:
    """Return how much worse than a target a deviation from it is; of speed less is worse."""
    return -deviation if axis == "tokens_per_second" else deviation


@dataclass(frozen=True)
class Shape:
    """A shape the solver looked at."""

    model: ModelConfig
    value: float
    deviation: float
    stretch: float
    """How far feed-forward over width is from the template's, as |log ratio|."""


def resolve_contexts(
    budgets: Mapping[str, BudgetConfig], contexts: Iterable[int]
) -> dict[str, BudgetConfig]:
    """Return the budgets, those that name no context at what every arm can take, up to 1024.

    Models of others may take a hundred times that, and nobody asked to have it measured.

    Args:
        budgets: By name.
        contexts: Longest input of every arm in tokens, at least one.
    """
    shortest = min(DEFAULT_CONTEXT, *contexts)
    return {
        name: budget.model_copy(update={"context": budget.context or shortest})
        for name, budget in budgets.items()
    }


def measure_cost(
    facts: ShapeFacts,
    budget: BudgetConfig,
    *,
    model: ModelConfig | None = None,
    latency: Latency | None = None,
    rule: str = "match",
) -> Measured:
    """Measure one axis on the built model, under the budget's conditions.

    Args:
        facts: What was measured of the model at the budget's context.
        budget: Axis, target and conditions.
        model: Its configuration, for the formula beside the measurement.
        latency: Timings under the budget's conditions; needed for the timed axes.
        rule: `match` for a model built to this budget, `limit` for one that was not.
    """
    if budget.axis == "active_flops_per_token":
        value = facts.flops_per_token
    elif budget.axis == "resident_bytes":
        value = facts.resident_bytes(budget.precision)
    elif budget.axis == "kv_bytes_per_token":
        value = facts.kv_bytes_per_token(budget.precision)
    elif latency is None:
        raise ConfigError(f"axis {budget.axis} needs timings", where="budget")
    elif budget.axis == "latency_ms":
        value = latency.decode_ms.median
    else:
        value = latency.decode_tokens_per_second
    solved = model is not None and budget.axis in SOLVED_AXES
    formula = compute_cost(model, budget) if solved and model is not None else None
    return check_match(budget, value, formula, rule)


def check_match(
    budget: BudgetConfig, measured: float, formula: float | None = None, rule: str = "match"
) -> Measured:
    """Compare a value with a budget's target; a match is two-sided, a limit is not.

    The tolerance is for what a solver can reach; a limit is kept or it is not.
    """
    deviation = (measured - budget.target) / budget.target
    if rule == "limit":
        within = excess(budget.axis, deviation) <= 0
    else:
        within = abs(deviation) <= budget.tolerance
    return Measured(budget.axis, budget.target, measured, formula, deviation, within, rule)


def compute_cost(model: ModelConfig, budget: BudgetConfig) -> float:
    """Return what the arithmetic says of a shape on the budget's axis.

    Raises:
        ConfigError: the axis can only be measured.
    """
    if budget.axis == "active_flops_per_token":
        return float(flops_per_token(model, budget.settled_context).total)
    if budget.axis == "resident_bytes":
        return float(resident_bytes(model, budget.precision))
    if budget.axis == "kv_bytes_per_token":
        return float(kv_bytes_per_token(model, budget.precision))
    raise ConfigError(
        f"axis {budget.axis} can only be measured, not computed",
        where="budget",
        fix=f"solve for one of {', '.join(SOLVED_AXES)}",
    )


def scoring_precision(budgets: Mapping[str, BudgetConfig]) -> str:
    """Return the precision quality is scored at: what the byte budget assumes, else the first.

    Raises:
        ConfigError: byte budgets disagree.
    """
    named = {b.precision for b in budgets.values() if b.axis == "resident_bytes"}
    if len(named) > 1:
        raise ConfigError(
            f"byte budgets assume different precisions ({', '.join(sorted(named))}); "
            "quality is scored at one",
            where="budgets",
            fix="give them one precision",
        )
    return named.pop() if named else next(iter(budgets.values())).precision


def solve_shape(template: ModelConfig, budget: BudgetConfig, match: MatchConfig) -> ModelConfig:
    """Return the shape that meets a budget: widths to try x feed-forward width (of one expert).

    For every width the feed-forward width nearest to the target is found; among the shapes within
    tolerance the one proportioned most like the template wins, then the nearer one.

    Args:
        template: Everything that is not free; `vocab_size` must be known.
        budget: Axis and target.
        match: Widths to try and the step of the feed-forward width.

    Raises:
        ConfigError: no model has one of the widths, or no shape is within tolerance; names the
            first such width, or the nearest shape.
    """
    step = match.hidden_multiple
    if template.moe:
        step = math.lcm(step, EXPERT_MULTIPLE)
    shapes = [
        shape
        for width in match.widths or (template.width,)
        for shape in _shapes_of_width(template, width, budget, step)
    ]
    met = [shape for shape in shapes if abs(shape.deviation) <= budget.tolerance]
    if met:
        return min(met, key=lambda s: (round(s.stretch, 3), abs(s.deviation))).model
    nearest = min(shapes, key=lambda shape: abs(shape.deviation))
    model = nearest.model
    raise ConfigError(
        f"no shape meets {budget.axis} = {budget.target:,.0f} within {budget.tolerance:.1%}; "
        f"the nearest is {nearest.value:,.0f} ({nearest.deviation:+.1%}) with width "
        f"{model.width}, hidden {model.feed_forward}, {model.num_layers} layers",
        where="budget",
        fix="change the target, match.widths, match.hidden_multiple, num_layers or num_experts",
    )


def _shapes_of_width(
    template: ModelConfig, width: int, budget: BudgetConfig, step: int
) -> Iterator[Shape]:
    """Yield the nearest shapes of one width, below and above the target."""
    base = _with_width(template, width)
    proportion = template.feed_forward / template.width
    # Every solved axis is linear in the feed-forward width: two points give the line.
    low = compute_cost(_with_hidden(base, step), budget)
    slope = compute_cost(_with_hidden(base, 2 * step), budget) - low
    if slope:
        steps = (budget.target - low) / slope + 1
        hidden = {max(1, math.floor(steps)) * step, max(1, math.ceil(steps)) * step}
    else:
        hidden = {max(1, round(proportion * width / step)) * step if width != template.width
                  else template.feed_forward}  # fmt: skip
    for size in sorted(hidden):
        model = _with_hidden(base, size)
        value = compute_cost(model, budget)
        deviation = (value - budget.target) / budget.target
        yield Shape(model, value, deviation, abs(math.log(size / width / proportion)))


def _with_width(template: ModelConfig, width: int) -> ModelConfig:
    """Return the template at another width.

    Raises:
        ConfigError: no model has it; says why.
    """
    if width == template.width:
        return template
    try:
        return ModelConfig.model_validate(template.model_dump() | {"width": width})
    except ValidationError as error:
        raise ConfigError(
            f"no model is {width} wide: {first_problem(error)}", where="match.widths"
        ) from None


def _with_hidden(model: ModelConfig, hidden: int) -> ModelConfig:
    if model.moe:
        moe = model.moe.model_copy(update={"hidden": hidden})
        return model.model_copy(update={"moe": moe})
    return model.model_copy(update={"hidden": hidden})
