"""From finished stages to the report: what `eval.compare` is given, and what the terminal shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.errors import ConfigError
from shoal.configs.schema import RunConfig
from shoal.configs.study import BudgetConfig, TasksConfig
from shoal.launcher.runs import run_folder
from shoal.launcher.tables import progress_bars

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shoal.eval.inputs import ArmInput, ExportInput, References
    from shoal.launcher.arms import Arm
    from shoal.launcher.study import Study

CACHE = "scores"
LEDGER = "ledger.jsonl"


def write_study_report(study: Study) -> Path:
    """Measure, score and compare all arms of a finished study; write and show the report."""
    from shoal.data_pipeline.shards import training_texts
    from shoal.eval.compare import compare
    from shoal.eval.inputs import TrainingTexts

    config = study.config
    texts = TrainingTexts(lambda: training_texts(study.prepare), study.corpus.shards_hash)
    with progress_bars() as progress:
        report = compare(
            [_arm_input(study, arm) for arm in study.arms if not arm.shared],
            config.budgets,
            config.tasks,
            name=config.name,
            cache=study.planner.output / CACHE,
            primary_task=config.primary_task,
            references=_references(study),
            training_texts=texts,
            progress=progress,
        )
    return publish(report, Path(config.output) / config.name, study.console)


def compare_exports(
    exports: Sequence[Path],
    budgets: Mapping[str, BudgetConfig],
    tasks: TasksConfig,
    out: Path,
) -> Path:
    """Compare models that exist, each an arm of its own; write and show the report.

    Raises:
        ConfigError: fewer than two models, or names that do not fit together.
        DataError: a folder is no model, named.
    """
    from rich.console import Console

    from shoal.eval.compare import compare
    from shoal.eval.inputs import ArmInput
    from shoal.eval.report import check_folder
    from shoal.trainer.export import read_facts

    check_folder(out)
    if len(exports) < 2:
        raise ConfigError("a comparison needs two models or more", where="EXPORTS")
    arms = []
    for name, folder in zip(_names(exports), exports, strict=True):
        facts = read_facts(folder)
        seed = facts.get("provenance", {}).get("seed")
        ledger = read_entries(folder.parent / LEDGER) if folder.name == "export" else []
        arms.append(
            ArmInput(name, _kind(facts, folder), [export_input(folder, seed)], ledger=ledger)
        )
    cache = out.with_name(f".{out.name}-{CACHE}")
    with progress_bars() as progress:
        report = compare(arms, budgets, tasks, name=out.name, cache=cache, progress=progress)
    return publish(report, out, Console(highlight=False))


def publish(report: Mapping[str, Any], out: Path, console: Console) -> Path:
    """Write the report to `out`, show its verdict, return the folder."""
    from shoal.eval.report import write_report

    folder = write_report(report, out)
    show_verdict(report, folder, console)
    return folder


def score_export(export: Path, tasks: TasksConfig, precision: str) -> Table:
    """Score one model on tasks and return a table with a line for each.

    Raises:
        ConfigError, DataError: tasks or model that cannot be used, named.
    """
    from rich.table import Table

    from shoal.eval.cache import ResultCache
    from shoal.eval.candidate import Candidate
    from shoal.eval.evaluation import Evaluator
    from shoal.eval.tasks.catalogue import load_tasks

    loaded = load_tasks(tasks)
    candidate = Candidate.open(export, export.name)
    with progress_bars() as progress:
        evaluator = Evaluator(
            loaded,
            precision=precision,
            context=tasks.context,
            cache=ResultCache(None),
            progress=progress,
        )
        scored = {task: evaluator.scores(candidate, task) for task in loaded}
    table = Table(title=f"{export} in {precision}", title_justify="left")
    for column in ("task", "metric", "value", "items", "beside it"):
        table.add_column(column, justify="right" if column in ("value", "items") else "left")
    for task, scores in scored.items():
        extra = ", ".join(f"{name} {value:.4f}" for name, value in scores.extra.items())
        count = f"{len(scores.numerator):,}"
        table.add_row(task.name, task.metric, f"{scores.value:.4f}", count, extra)
    return table


def show_verdict(report: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Print the verdict table, what the differences are worth, and where everything is."""
    verdict = report["verdict"]
    console.print(verdict_table(report))
    console.print(f"[bold]{verdict['headline']}[/bold]", soft_wrap=True)
    for sentence in verdict["sentences"]:
        console.print(f"- {sentence}", soft_wrap=True)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    if verdict["export"]:
        console.print(f"deploy: {verdict['deploy']}, {verdict['export']}", soft_wrap=True)


def verdict_table(report: Mapping[str, Any]) -> Table:
    """Return one line an arm, best first, then the reference rows."""
    from rich.table import Table

    from shoal.eval.words import format_score, format_si

    task = report["verdict"]["primary_task"]
    metric, sign = report["verdict"]["metric"], 1
    if report["arms"][0]["tasks"][task]["higher_is_better"]:
        sign = -1
    # Narrow enough for 80 columns; everything else is in the report.
    table = Table(title=f"{report['study']['name']}: {task}", title_justify="left", box=None)
    table.add_column("arm", no_wrap=True)
    short = {"bits_per_byte": "bits/byte"}.get(metric, metric)
    for word in (short, "95% interval", "FLOPs/token", "resident", "decode"):
        table.add_column(word, justify="right", no_wrap=True)
    for arm in sorted(report["arms"], key=lambda arm: sign * arm["tasks"][task]["value"]):
        scores, cost = arm["tasks"][task], arm["inference"]
        low, high = (format_score(end, metric) for end in scores["ci95"])
        table.add_row(
            arm["name"],
            format_score(scores["value"], metric),
            f"{low}-{high}",
            format_si(cost["flops_per_token"]),
            format_si(cost["bytes_resident"], "B"),
            f"{cost['latency_ms']['decode']['median']:.1f} ms",
        )
    for row in report["references"]:
        table.add_row(
            f"[dim]{row['name']}[/dim]", format_score(row["tasks"][task]["value"], metric)
        )
    return table


def export_input(folder: Path, seed: int | None) -> ExportInput:
    """Return an export with what its run recorded, where it lies in a run's folder."""
    from shoal.eval.inputs import ExportInput
    from shoal.trainer.export import read_facts
    from shoal.trainer.metrics import read_metrics

    metrics = read_metrics(folder.parent / "metrics.jsonl") if folder.name == "export" else []
    return ExportInput(folder, seed, metrics, read_facts(folder).get("provenance", {}))


def read_entries(file: Path) -> list[dict[str, Any]]:
    """Return ledger lines as plain trees, as a report takes them."""
    from shoal.trainer.ledger import read_ledger

    return [
        entry.model_dump() | {"device_seconds": entry.device_seconds} for entry in read_ledger(file)
    ]


def _arm_input(study: Study, arm: Arm) -> ArmInput:
    from shoal.eval.inputs import ArmInput

    runs = study.runs(arm)
    exports = [
        export_input(export, run.seed)
        for export, run in zip(study.exports(arm), runs, strict=True)
    ]  # fmt: skip
    return ArmInput(
        arm.name,
        arm.kind,
        exports,
        match=arm.config.match.budget if arm.config.match else None,
        teacher=arm.config.teacher,
        model=arm.model,
        equal_on=study.config.equal_on,
        ledger=_ledger(study, arm),
    )


def _ledger(study: Study, arm: Arm) -> list[dict[str, Any]]:
    """All stages an arm stands on: the corpus, its teacher, its trials, its runs."""
    stages: list[RunConfig] = []
    if arm.config.teacher:
        teacher = study.planner.arms[arm.config.teacher]
        stages += [*study.trials(teacher), *study.runs(teacher)]
    stages += [*study.trials(arm), *study.runs(arm)]
    entries = read_entries(study.corpus.train.parent / LEDGER)
    for stage in stages:
        entries += read_entries(run_folder(stage) / LEDGER)
    return entries


def _references(study: Study) -> References:
    from shoal.data_pipeline.shards import token_counts
    from shoal.eval.inputs import References
    from shoal.launcher.study import untrained_folder

    return References(
        token_counts(study.corpus.train),
        untrained_folder(study),
        others={arm.name: study.exports(arm)[0] for arm in study.arms if arm.shared},
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Name models by their folders, a run's export by its run; equal names are numbered."""
    plain = [f.resolve().parent.name if f.name == "export" else f.resolve().name for f in folders]
    return [
        f"{name}-{plain[: i + 1].count(name)}" if plain.count(name) > 1 else name
        for i, name in enumerate(plain)
    ]


def _kind(facts: Mapping[str, Any], folder: Path) -> str:
    """Return `distilled`, `moe` or `dense`, as far as the folder tells."""
    from shoal.eval.candidate import Candidate

    return "distilled" if (facts.get("run") or {}).get("teacher") else Candidate.open(folder).kind
