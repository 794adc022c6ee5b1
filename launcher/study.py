"""A study from corpus to report: stages that exist are kept, those missing are done in waves.

A wave is all runs whose inputs exist; its runs share one start of the ranks. Killed anywhere, the
same command goes on: finished stages are recognised by their folder, running ones by their newest
checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.configs.corpus import PrepareConfig
from shoal.configs.errors import DataError
from shoal.configs.load import find_config, load_config
from shoal.configs.schema import RunConfig
from shoal.configs.study import StudyConfig
from shoal.launcher.arms import Arm, CorpusFacts, RunPlanner, best_rate, settle_arms
from shoal.launcher.training import export_run, is_complete, run_folder

if TYPE_CHECKING:
    from rich.console import Console

DEMO = "studies/demo.yaml"


@dataclass
class Study:
    """A loaded study and what is known of its stages so far."""

    config: StudyConfig
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
