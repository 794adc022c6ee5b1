"""A study: arms that meet one inference budget, trained alike, compared on the same tasks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shoal.configs.schema import Count, Section, Share, WorldConfig

Axis = Literal[
    "active_flops_per_token", "resident_bytes", "kv_bytes_per_token", "latency_ms",
    "tokens_per_second",
]  # fmt: skip
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
SOLVED_AXES = ("active_flops_per_token", "resident_bytes", "kv_bytes_per_token")


class BudgetConfig(Section):
    """One limit on inference: an axis, its target, and the conditions it is meant at."""

    axis: Axis
    target: float = Field(gt=0, description="FLOPs, bytes, ms or tokens/s, as the axis says")
    tolerance: Share = Field(0.03, description="largest deviation that still counts as met")
    precision: Literal["fp32", "bf16", "int8", "int4"] = "bf16"
    context: int | None = Field(
        None,
        ge=4,  # below that no two tokens can be timed one after the other
        description="tokens in context when one more is computed. None: what all arms can take, up "
        "to 1024",
    )
    batch: Count = 1

    @property
    def settled_context(self) -> int:
        """Tokens in context, as a number.

        Raises:
            ValueError: it is None still; `eval.budget.resolve_contexts` was not called.
        """
        if self.context is None:
            raise ValueError(f"the context of budget {self.axis} was not resolved")
        return self.context


class TasksConfig(Section):
    """What every arm is scored on."""

    perplexity: dict[str, str] = Field(
        default_factory=dict, description="name -> JSONL of documents: perplexity, bits per byte"
    )
    brainbench: tuple[str, ...] = Field((), description="JSONL files of BrainBench cases")
    multiple_choice: dict[str, str] = Field(
        default_factory=dict, description="name -> JSONL with question, choices, answer"
    )
    max_items: Count | None = Field(None, description="first items of every task only")
    context: Count | None = Field(None, description="scoring window; None: the model's own")


class TuningConfig(Section):
    """The learning-rate search that every arm gets, on equal terms; its cost is booked."""

    lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    tokens: Count = Field(description="training tokens of one trial")
    seed: Seed = 1000


class MatchConfig(Section):
    """Free dimensions that the budget solver may set, starting from the arm's model."""

    budget: str = Field(description="name of the budget this arm is built to")
    widths: tuple[int, ...] = Field((), description="widths to try; none: the model's own")
    hidden_multiple: Count = Field(8, description="step of the feed-forward width")


class ArmConfig(Section):
    """One contestant: overrides of the study's `run`, ending in one export a seed."""

    match: MatchConfig | None = None
    run: dict[str, Any] = Field(default_factory=dict, description="overrides of the study's run")
    teacher: str | None = Field(None, description="name of a support run of this study")
    teacher_weight: Share = 0.5
    teacher_temperature: float = Field(1.0, gt=0)


class StudyConfig(Section):
    """Arms + budgets + tasks -> report."""

    name: Name
    output: str = Field("reports", description="report folder is output/name")
    runs: str = Field("runs", description="run folders are runs/name/stage")
    prepare: str = Field(description="corpus config, relative to this file")
    run: dict[str, Any] = Field(description="what every run of the study has in common")
    budgets: dict[str, BudgetConfig] = Field(min_length=1)
    support: dict[Name, ArmConfig] = Field(
        default_factory=dict, description="runs that others need (teachers); not contestants"
    )
    arms: dict[Name, ArmConfig] = Field(min_length=1)
    equal_on: Literal["tokens", "flops"] = Field("tokens", description="what makes training fair")
    seeds: tuple[Seed, ...] = Field((0, 1), min_length=1)
    tuning: TuningConfig | None = None
    tasks: TasksConfig = TasksConfig()
    primary_task: str = Field(description="the task whose metric names the winner")
    world: WorldConfig = WorldConfig()

    @model_validator(mode="after")
    def _nothing_twice(self) -> StudyConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: one is given twice, which shows no spread")
        both = self.arms.keys() & self.support.keys()
        if both:
            raise ValueError(f"{', '.join(sorted(both))}: an arm and a support run of one name")
        for name, run in self.support.items():
            if run.teacher:
                raise ValueError(f"support run {name}: a teacher of a teacher is not supported")
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> StudyConfig:
        for group in (self.arms, self.support):
            for name, arm in group.items():
                if arm.match and arm.match.budget not in self.budgets:
                    raise ValueError(
                        f"arm {name}: no budget named {arm.match.budget!r}; "
                        f"there are {', '.join(self.budgets)}"
                    )
                if arm.match and self.budgets[arm.match.budget].axis not in SOLVED_AXES:
                    raise ValueError(
                        f"arm {name}: shapes are solved for {', '.join(SOLVED_AXES)}; axis "
                        f"{self.budgets[arm.match.budget].axis} can only be measured"
                    )
                if arm.teacher and arm.teacher not in self.support:
                    raise ValueError(
                        f"arm {name}: no support run named {arm.teacher!r}; "
                        f"there are {', '.join(self.support) or 'none'}"
                    )
        return self
