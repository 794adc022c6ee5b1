"""A study from corpus to report: stages that exist are kept, those missing are done in waves.

A wave is all runs whose inputs exist; its runs share one start of the ranks. Killed anywhere, the
same command goes on: finished stages are recognised by their folder, running ones by their newest
checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.configs.corpus import PrepareConfig
from shoal.configs.errors import ConfigError, DataError, ShoalError
from shoal.configs.load import load_config
from shoal.configs.schema import RunConfig
from shoal.configs.study import StudyConfig
from shoal.launcher.arms import Arm, CorpusFacts, RunPlanner, best_rate, settle_arms
from shoal.launcher.corpus import open_corpus, prepare_corpus
from shoal.launcher.exports import export_run, export_untrained
from shoal.launcher.runs import has_diverged, is_complete, run_folder
from shoal.launcher.screen import newest_checkpoint_note
from shoal.launcher.tables import progress_bars

if TYPE_CHECKING:
    from rich.console import Console

DEMO = "studies/demo.yaml"


@dataclass
class Study:
    """A loaded study and what is known of its stages so far."""

    config: StudyConfig
    prepare: PrepareConfig
    corpus: CorpusFacts
    arms: list[Arm]
    planner: RunPlanner
    console: Console
    rates: dict[str, float | None] = field(default_factory=dict)

    @property
    def seeds(self) -> dict[str, tuple[int, ...]]:
        """Seeds of every arm; a support run needs only the first."""
        return {a.name: self.config.seeds[:1] if a.shared else self.config.seeds for a in self.arms}

    def teacher(self, arm: Arm) -> Path | None:
        """Return where the teacher's export is or will be."""
        if arm.config.teacher is None:
            return None
        return self.exports(self.planner.arms[arm.config.teacher])[0]

    def trials(self, arm: Arm) -> list[RunConfig]:
        """Return the arm's learning-rate trials."""
        if self.config.tuning is None:
            return []
        teacher = self.teacher(arm)
        return [self.planner.trial(arm, lr, teacher) for lr in self.config.tuning.lrs]

    def runs(self, arm: Arm) -> list[RunConfig]:
        """Return the arm's full runs; its rate must be known."""
        lr, teacher = self.rates[arm.name], self.teacher(arm)
        return [self.planner.run(arm, lr, seed, teacher) for seed in self.seeds[arm.name]]

    def exports(self, arm: Arm) -> list[Path]:
        """Return where the arm's exports are or will be, one a seed."""
        return [run_folder(run) / "export" for run in self.runs(arm)]


def run_study(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Do what is missing of a study and write its report; return the report's folder.

    Raises:
        ShoalError: named; what was finished before stays finished.
    """
    from rich.console import Console

    console = Console(highlight=False)
    begun = time.monotonic()
    config = load_config(StudyConfig, path, overrides)
    study = _open_study(config, console)
    _train_all(study)
    _export_untrained(study)
    from shoal.launcher.verdict import write_study_report

    folder = write_study_report(study)
    console.print(f"study {config.name}: done in {time.monotonic() - begun:.0f} s")
    return folder


def _open_study(config: StudyConfig, console: Console) -> Study:
    """Prepare the corpus, settle every shape; nothing is trained before all of it is checked."""
    from shoal.data_pipeline.shards import read_manifest
    from shoal.eval.preconditions import check_primary_task, check_reference_names
    from shoal.eval.report import check_folder
    from shoal.eval.tasks.catalogue import load_tasks

    # A fault in what comes last must not wait until all is trained.
    check_folder(Path(config.output) / config.name)
    check_reference_names(config.arms, config.support)
    check_primary_task([task.name for task in load_tasks(config.tasks)], config.primary_task)
    prepare_config = load_config(PrepareConfig, config.prepare)
    with progress_bars() as progress:
        prepared = prepare_corpus(prepare_config, progress)
    if prepared.validation is None:
        raise DataError(
            "a study needs a validation split", where=config.prepare, fix="set validation_share"
        )
    manifest = read_manifest(prepared.train)
    corpus = CorpusFacts(
        prepared.train,
        prepared.validation,
        manifest.shards_hash,
        read_manifest(prepared.validation).shards_hash,
        manifest.vocab_size,
        manifest.context,
    )
    arms = settle_arms(config, corpus)
    planner = RunPlanner(config, corpus, arms)
    return Study(config, prepare_config, corpus, arms, planner, console)


def _train_all(study: Study) -> None:
    """Waves: trials, then full runs; arms with a teacher wait for its export."""
    for waiting in (False, True):
        arms = [arm for arm in study.arms if (arm.config.teacher is not None) == waiting]
        trials = [run for arm in arms for run in study.trials(arm)]
        _do_runs(study, trials, "learning-rate trials")
        for arm in arms:
            study.rates[arm.name] = _choose_rate(study, arm)
        runs = [run for arm in arms for run in study.runs(arm)]
        _do_runs(study, runs, "runs")
        for arm in arms:
            for run in study.runs(arm):
                _export(study, run)


def _do_runs(study: Study, runs: Sequence[RunConfig], what: str) -> None:
    """Train those of `runs` that are not complete, in one start of the ranks."""
    from shoal.launcher.processes import train_configs

    missing = [run for run in runs if not _is_over(run)]
    if not missing:
        return
    study.console.print(f"[bold]{len(missing)} {what}[/bold] ({len(runs) - len(missing)} done)")
    try:
        train_configs(missing)
    except ShoalError as error:
        left = [r for r in missing if not _is_over(r)]
        error.add_note(newest_checkpoint_note(run_folder((left or missing)[0])))
        raise


def _is_over(run: RunConfig) -> bool:
    """Whether a run has its last checkpoint, or has shown that its rate is too high."""
    return is_complete(run_folder(run), run) or has_diverged(run_folder(run))


def _choose_rate(study: Study, arm: Arm) -> float | None:
    """Return the best tried rate by validation loss; None where nothing was to be tuned."""
    from shoal.trainer.metrics import read_metrics

    losses = {}
    for trial in study.trials(arm):
        records = read_metrics(run_folder(trial) / "metrics.jsonl")
        scores = [r["loss"] for r in records if r["kind"] == "validation"]
        losses[trial.optim.lr] = math.inf if has_diverged(run_folder(trial)) else scores[-1]
    if not losses:
        return None
    best = best_rate(losses)
    tried = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in losses.items())
    if math.isinf(losses[best]):
        raise ConfigError(
            f"arm {arm.name}: no rate that was tried trains ({tried})",
            where="tuning.lrs",
            fix="try lower ones",
        )
    edge = len(losses) > 1 and best in (min(losses), max(losses))
    study.console.print(
        f"{arm.name}: learning rate {best:g} (validation loss {tried})"
        + ("; at the edge of those tried" if edge else ""),
        soft_wrap=True,
    )
    return best


def _export(study: Study, run: RunConfig) -> None:
    from shoal.trainer.export import verify_export

    out = run_folder(run) / "export"
    if out.exists():
        step = verify_export(out).get("step")
        if step != run.steps:
            raise DataError(
                f"is an export of step {step}, not of the last, {run.steps}",
                where=out,
                fix="move it away: the study exports the finished run",
            )
    else:
        with study.console.status(f"exporting {run.name}"):
            report = export_run(run_folder(run), out, complete=True)
        study.console.print(
            f"exported {run.name}: logits equal to {report.max_logit_difference:.1e}"
        )


def _export_untrained(study: Study) -> None:
    """Export the first arm's shape untouched by training, the report's reference row."""
    first = study.runs(next(arm for arm in study.arms if not arm.shared))[0]
    out = untrained_folder(study)
    if not out.exists():
        export_untrained(first.model, first.seed, open_corpus(first), out)


def untrained_folder(study: Study) -> Path:
    """Return where the untrained reference export is."""
    first = study.runs(next(arm for arm in study.arms if not arm.shared))[0]
    return study.planner.output / f"untrained-{first.name}"
