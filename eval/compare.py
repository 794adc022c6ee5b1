"""The comparison: finished arms in, one report out, the same rules for every arm.

Every axis is measured on the built export under the budget's conditions, quality is scored at the
precision the byte budget assumes, and every pair of arms is tested on every task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.configs.errors import ConfigError
from shoal.configs.study import BudgetConfig, TasksConfig
from shoal.eval.budget import (
    TIMED_AXES,
    Measured,
    measure_cost,
    resolve_contexts,
    scoring_precision,
)
from shoal.eval.cache import ResultCache
from shoal.eval.calibration import calibrate
from shoal.eval.candidate import ShapeFacts
from shoal.eval.contamination import COMMON_DOCUMENTS, GRAM
from shoal.eval.evaluation import Conditions, Contestant, Evaluator
from shoal.eval.inputs import ArmInput, Progress, References, TrainingTexts
from shoal.eval.latency import Latency, describe_machine
from shoal.eval.pairs import ArmScores, compare_pairs, describe_scores
from shoal.eval.preconditions import check_conditions, check_names, check_reference_names
from shoal.eval.spending import cost_curve, describe_training, total_ledger
from shoal.eval.tasks.catalogue import load_tasks
from shoal.eval.tasks.task import Task
from shoal.eval.verdict import reach_verdict

SCHEMA = 1


def compare(
    arms: Sequence[ArmInput],
    budgets: Mapping[str, BudgetConfig],
    tasks: TasksConfig,
    *,
    name: str = "comparison",
    primary_task: str | None = None,
    references: References | None = None,
    training_texts: TrainingTexts | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare arms at their budgets and return the report.

    Args:
        arms: Contestants, each with one export a seed.
        budgets: By name; to an arm built to none of them, each is a limit. One without a context
            is meant at the shortest context of the arms.
        tasks: What to score.
        name: Of the study.
        primary_task: Task that decides; None: the first.
        references: Rows a model must at least beat.
        training_texts: The corpus, to search test items in; None: not searched, and said so.
        cache: Folder for results; a second comparison of the same exports takes seconds.
        progress: Called with (label, done, total).

    Returns:
        A tree that `report_schema.json` describes.

    Raises:
        ConfigError: names that do not fit together, or conditions a model cannot meet.
        DataError: a task file or an export is missing or broken.
    """
    loaded = load_tasks(tasks)
    primary = primary_task or loaded[0].name
    references = references or References()
    check_names(arms, budgets, [task.name for task in loaded], primary)
    check_reference_names([arm.name for arm in arms], references.others)
    contestants = [Contestant(arm) for arm in arms]
    contexts = {one.arm.name: one.first.context for one in contestants}
    budgets = resolve_contexts(budgets, contexts.values())
    check_conditions(contexts, budgets, tasks)
    evaluator = Evaluator(
        loaded,
        precision=scoring_precision(budgets),
        context=tasks.context,
        cache=ResultCache(cache),
        progress=progress,
    )
    found = _measure_all(evaluator, contestants, budgets, references, training_texts)
    rows, pairs = found["arms"], found["pairs"]
    report = {
        "schema": SCHEMA,
        "study": {"name": name, "primary_task": primary, "tasks": _describe_tasks(loaded)},
        "environment": _describe_environment(evaluator, contestants),
        "budgets": [{"name": key, **budget.model_dump()} for key, budget in budgets.items()],
        "verdict": reach_verdict(rows, pairs, found["references"], primary),
        **found,
        "ledger": total_ledger(arms),
        "cost_curve": cost_curve(rows),
    }
    check_report(report)
    return report


def _measure_all(
    evaluator: Evaluator,
    contestants: Sequence[Contestant],
    budgets: Mapping[str, BudgetConfig],
    references: References,
    training_texts: TrainingTexts | None,
) -> dict[str, Any]:
    """Return the parts of the report that models have to be run for."""
    scores = [evaluator.arm_scores(one) for one in contestants]
    timings = _time_all(evaluator, contestants, budgets)
    rows = [
        _describe_arm(evaluator, one, scored, budgets, timings)
        for one, scored in zip(contestants, scores, strict=True)
    ]
    return {
        "arms": rows,
        "references": evaluator.reference_rows(references, contestants[0].first),
        "pairs": [
            pair
            for task in evaluator.tasks
            for pair in compare_pairs(task, [one[task.name] for one in scores])
        ],
        "calibration": _calibrate(evaluator.tasks, scores),
        "contamination": _search(evaluator, training_texts, rows, scores),
    }


def _describe_environment(
    evaluator: Evaluator, contestants: Sequence[Contestant]
) -> dict[str, Any]:
    """Return what scores and timings were taken under."""
    vocabularies = {evaluator.tokenizer_hash(one.first) for one in contestants}
    return describe_machine() | {
        "scoring": f"weights rounded to {evaluator.precision}, arithmetic fp32",
        "window": evaluator.context,
        "latency": "plain transformers, eager, arms taking turns",
        "same_tokenizer": len(vocabularies) == 1,
    }


def check_report(report: Mapping[str, Any]) -> None:
    """Validate a report against the published schema.

    Raises:
        ConfigError: names the first place that does not fit.
    """
    import jsonschema

    schema = json.loads(Path(__file__).with_name("report_schema.json").read_text("utf-8"))
    problem = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(schema).iter_errors(report)
    )
    if problem:
        raise ConfigError(f"not a valid report: {problem.message}", where=problem.json_path)


def _time_all(
    evaluator: Evaluator, contestants: Sequence[Contestant], budgets: Mapping[str, BudgetConfig]
) -> dict[Conditions, dict[str, Latency]]:
    """Time all arms under the first budget's conditions, and under those of timed budgets."""
    wanted = [Conditions.of(next(iter(budgets.values())))]
    wanted += [Conditions.of(b) for b in budgets.values() if b.axis in TIMED_AXES]
    timings = {c: evaluator.latencies(contestants, c) for c in dict.fromkeys(wanted)}
    for one in contestants:
        one.first.release()
    return timings


def _describe_arm(
    evaluator: Evaluator,
    contestant: Contestant,
    scores: Mapping[str, ArmScores],
    budgets: Mapping[str, BudgetConfig],
    timings: Mapping[Conditions, Mapping[str, Latency]],
) -> dict[str, Any]:
    """Return one arm's part of the report."""
    arm = contestant.arm
    measured = {
        key: _measure(evaluator, contestant, budget, timings) for key, budget in budgets.items()
    }
    # Held to all budgets, an arm is judged by the one it has least room in.
    own = arm.match or max(measured, key=lambda key: measured[key].excess)
    first = next(iter(budgets.values()))
    facts = evaluator.shape_facts(contestant.first, first.settled_context)
    contestant.first.release()  # what counting built; the next arm's needs the room
    return {
        "name": arm.name,
        "kind": arm.kind,
        "teacher": arm.teacher,
        "matched": {"budget": own, **measured[own].as_tree()},
        "budgets": {key: value.as_tree() for key, value in measured.items()},
        "parameters": {"total": facts.total, "active": facts.active, "embedding": facts.embedding},
        "inference": _describe_inference(facts, first, timings[Conditions.of(first)][arm.name]),
        "training": describe_training(arm),
        "tasks": {task.name: describe_scores(task, scores[task.name]) for task in evaluator.tasks},
        "export": str(arm.exports[0].folder),
        "exports": [
            {"path": str(export.folder), "seed": export.seed, "hash": member.hash}
            for export, member in zip(arm.exports, contestant.candidates, strict=True)
        ],
        "provenance": dict(arm.exports[0].provenance),
    }


def _describe_inference(
    facts: ShapeFacts, budget: BudgetConfig, latency: Latency
) -> dict[str, Any]:
    """Return what running a model costs under a budget's conditions."""
    return {
        "conditions": {
            "precision": budget.precision,
            "context": budget.settled_context,
            "batch": budget.batch,
        },
        "flops_per_token": facts.flops_per_token,
        "bytes_resident": facts.resident_bytes(budget.precision),
        "kv_bytes_per_token": facts.kv_bytes_per_token(budget.precision),
        "latency_ms": {
            "prefill": latency.prefill_ms.as_tree(),
            "decode": latency.decode_ms.as_tree(),
            "unstable": latency.unstable,
        },
        "tokens_per_second": {
            "prefill": latency.prefill_tokens_per_second,
            "decode": latency.decode_tokens_per_second,
        },
    }


def _measure(
    evaluator: Evaluator,
    contestant: Contestant,
    budget: BudgetConfig,
    timings: Mapping[Conditions, Mapping[str, Latency]],
) -> Measured:
    timed = timings.get(Conditions.of(budget), {}).get(contestant.arm.name)
    facts = evaluator.shape_facts(contestant.first, budget.settled_context)
    rule = "match" if contestant.arm.match else "limit"
    return measure_cost(facts, budget, model=contestant.arm.model, latency=timed, rule=rule)


def _describe_tasks(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    return [
        {
            "name": task.name,
            "kind": task.kind,
            "version": task.version,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "items": len(task.item_ids()),
            "file_hash": task.file_hash,
        }
        for task in tasks
    ]


def _calibrate(
    tasks: Sequence[Task], scores: Sequence[Mapping[str, ArmScores]]
) -> dict[str, dict[str, Any]]:
    """Calibration of every arm's first training on every BrainBench task."""
    found = {}
    for task in tasks:
        if task.kind == "brainbench":
            firsts = {s[task.name].arm: s[task.name].trainings[0] for s in scores}
            found[task.name] = {
                arm: calibrate(first.numerator, first.detail["confidence"])
                for arm, first in firsts.items()
            }
    return found


def _search(
    evaluator: Evaluator,
    training: TrainingTexts | None,
    rows: Sequence[dict[str, Any]],
    scores: Sequence[Mapping[str, ArmScores]],
) -> dict[str, Any]:
    """Search the tasks in the training text, and add each arm's value without what was found."""
    rule = {"ngram": GRAM, "ignored_above_documents": COMMON_DOCUMENTS}
    if training is None:
        return {"searched": False, **rule, "documents": None, "tasks": {}}
    found: dict[str, Any] = {}
    overlaps = evaluator.overlaps(training)
    for task in evaluator.tasks:
        marked = set(overlaps[task.name].contaminated)
        ids = task.item_ids()
        found[task.name] = {
            "items": len(ids),
            "contaminated": len(marked),
            "ids": [ids[number] for number in sorted(marked)],
        }
        for row, scored in zip(rows, scores, strict=True):
            row["tasks"][task.name]["without_contaminated"] = scored[task.name].mean.value_without(
                marked
            )
    documents = next(iter(overlaps.values())).documents
    return {"searched": True, **rule, "documents": documents, "tasks": found}
