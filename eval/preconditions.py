"""What is checked before anything is measured, scored or, in a study, trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from shoal.configs.errors import ConfigError
from shoal.configs.study import BudgetConfig, TasksConfig
from shoal.eval.budget import TIMED_AXES, scoring_precision
from shoal.eval.candidate import RUN_PRECISIONS
from shoal.eval.inputs import ArmInput


def check_names(
    arms: Sequence[ArmInput], budgets: Mapping[str, BudgetConfig], tasks: list[str], primary: str
) -> None:
    """Refuse a comparison of arms that cannot be told apart or belong to nothing.

    Raises:
        ConfigError: names what does not fit.
    """
    names = [arm.name for arm in arms]
    if not names or not budgets:
        raise ConfigError("a comparison needs at least one arm and one budget")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two arms are called {name!r}")
    for arm in arms:
        if arm.match is not None and arm.match not in budgets:
            raise ConfigError(
                f"no budget named {arm.match!r}; there are {', '.join(budgets)}",
                where=f"arm {arm.name}",
            )
    check_primary_task(tasks, primary)


def check_reference_names(arms: Iterable[str], others: Iterable[str]) -> None:
    """Refuse reference rows that could be taken for an arm or for one of the fixed rows.

    Args:
        arms: Names of the arms.
        others: Names of the reference rows beside the fixed ones.

    Raises:
        ConfigError: names the first that could be.
    """
    taken = {"unigram", "untrained", *arms}
    for name in others:
        if name in taken:
            raise ConfigError(
                f"a reference cannot be called {name!r}: another row is", fix="rename it"
            )


def check_primary_task(tasks: Sequence[str], primary: str) -> None:
    """Refuse a deciding task that is not among the tasks.

    Raises:
        ConfigError: it is not; names those that are.
    """
    if primary not in tasks:
        raise ConfigError(
            f"no task named {primary!r}; there are {', '.join(tasks)}", where="primary_task"
        )


def check_conditions(
    contexts: Mapping[str, int], budgets: Mapping[str, BudgetConfig], tasks: TasksConfig
) -> None:
    """Refuse conditions that arms cannot be measured, scored or timed under.

    Needs no model, so that a study can ask before anything is trained.

    Args:
        contexts: Longest input in tokens of every arm, by its name.
        budgets: By name; a context of None fits every arm.
        tasks: What will be scored.

    Raises:
        ConfigError: a context is longer than an arm's, or models cannot be run at a precision that
            they would be scored or timed at; names the key.
    """
    _check_precisions(budgets)
    shortest = min(contexts, key=lambda arm: contexts[arm])
    limit = contexts[shortest]
    wanted = {
        f"budgets.{name}.context": (budget.context, _say_how(name, "context", str(limit)))
        for name, budget in budgets.items()
    }
    wanted["tasks.context"] = (
        tasks.context,
        f"tasks.context={limit} in a study, `context: {limit}` in the file of --tasks",
    )
    for place, (context, fix) in wanted.items():
        if context and context > limit:
            raise ConfigError(
                f"a context of {context} tokens is longer than the {limit} of {shortest}",
                where=place,
                fix=f"{fix}; all arms are measured alike",
            )


def _check_precisions(budgets: Mapping[str, BudgetConfig]) -> None:
    """Refuse precisions of budgets whose conditions models are scored or timed under."""
    scoring_precision(budgets)
    first = next(iter(budgets))
    for name, budget in budgets.items():
        is_run = name == first or budget.axis in ("resident_bytes", *TIMED_AXES)
        if is_run and budget.precision not in RUN_PRECISIONS:
            raise ConfigError(
                f"models cannot be run at {budget.precision} yet, and scoring or timing them at "
                "another precision than the budget assumes would not be fair",
                where=f"budgets.{name}.precision",
                fix=_say_how(name, "precision", " or ".join(RUN_PRECISIONS)),
            )


def _say_how(budget: str, key: str, value: str) -> str:
    """Return how a condition of a budget is written, in a study and on a command line."""
    return (
        f"budgets.{budget}.{key}={value} in a study, "
        f"--budget AXIS=TARGET,{key}={value} on the command line"
    )
