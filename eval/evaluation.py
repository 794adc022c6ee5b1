"""Evaluation of exports, one by one and kept: shape facts, timings, scores on every task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shoal.configs.errors import ConfigError
from shoal.configs.study import BudgetConfig
from shoal.eval.cache import ResultCache
from shoal.eval.candidate import Candidate, ShapeFacts
from shoal.eval.contamination import Overlap, find_overlap
from shoal.eval.inputs import ArmInput, Progress, References, TrainingTexts
from shoal.eval.latency import REPEATS, Latency, describe_machine, measure_latencies
from shoal.eval.pairs import ArmScores
from shoal.eval.scoring import score_texts, unigram_scores
from shoal.eval.tasks.task import ItemScores, Task

# What a config.json may hold that does not change the shape.
VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True)
class Conditions:
    """What a timing is taken under."""

    precision: str
    context: int
    batch: int

    @classmethod
    def of(cls, budget: BudgetConfig) -> Conditions:
        """Return the conditions of a budget."""
        return cls(budget.precision, budget.settled_context, budget.batch)


class Contestant:
    """An arm with its exports opened."""

    def __init__(self, arm: ArmInput) -> None:
        if not arm.exports:
            raise ConfigError("an arm needs at least one export", where=f"arm {arm.name}")
        self.arm = arm
        self.candidates = [
            Candidate.open(export.folder, _label(arm, export.seed), arm.kind)
            for export in arm.exports
        ]
        shapes = [
            {key: value for key, value in candidate.config.items() if key not in VOLATILE}
            for candidate in self.candidates
        ]
        if any(shape != shapes[0] for shape in shapes):
            raise ConfigError(
                "its exports differ in shape, so they are not trainings of one model",
                where=f"arm {arm.name}",
            )

    @property
    def first(self) -> Candidate:
        """The first export: its shape stands for all."""
        return self.candidates[0]


class Evaluator:
    """Measures and scores; everything it finds out is kept in the cache."""

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        precision: str,
        context: int | None,
        cache: ResultCache,
        progress: Progress | None = None,
    ) -> None:
        self.tasks = tasks
        self.precision = precision
        self.context = context
        self.cache = cache
        self.progress = progress

    def shape_facts(self, candidate: Candidate, context: int) -> ShapeFacts:
        """Measure, or recall, what a model weighs and computes."""
        facts = {"export": candidate.hash, "context": context}
        tree = self.cache.get("shape", facts, lambda: asdict(candidate.shape_facts(context)))
        return ShapeFacts(**tree)

    def latencies(
        self, contestants: Sequence[Contestant], conditions: Conditions
    ) -> dict[str, Latency]:
        """Time all arms in turns; only timings taken together on this machine are recalled."""
        members = {one.arm.name: one.first for one in contestants}
        facts = {
            "exports": {name: member.hash for name, member in members.items()},
            "conditions": asdict(conditions),
            "machine": describe_machine(),
            "repeats": REPEATS,
        }

        def measure() -> dict[str, Any]:
            timed = measure_latencies(members, **asdict(conditions), progress=self.progress)
            return {name: latency.as_tree() for name, latency in timed.items()}

        trees = self.cache.get("latency", facts, measure)
        return {name: Latency.from_tree(tree) for name, tree in trees.items()}

    def scores(self, candidate: Candidate, task: Task) -> ItemScores:
        """Score, or recall, one export on one task."""
        facts = {
            "export": candidate.hash,
            "task": [task.kind, task.version, task.file_hash],
            "precision": self.precision,
            "context": self.context,
        }

        def score() -> dict[str, Any]:
            requests = task.requests(candidate)
            nats = score_texts(
                candidate,
                requests,
                precision=self.precision,
                context=self.context,
                progress=self.progress,
            )
            return task.scores(requests, nats).as_tree()

        return ItemScores(**self.cache.get("scores", facts, score))

    def arm_scores(self, contestant: Contestant) -> dict[str, ArmScores]:
        """Score all exports of an arm on all tasks, one model in memory at a time."""
        seeds = [export.seed for export in contestant.arm.exports]
        trainings = []
        for candidate in contestant.candidates:
            trainings.append([self.scores(candidate, task) for task in self.tasks])
            candidate.release()
        return {
            task.name: ArmScores(contestant.arm.name, seeds, [one[i] for one in trainings])
            for i, task in enumerate(self.tasks)
        }

    def reference_rows(self, references: References, tokens_of: Candidate) -> list[dict[str, Any]]:
        """Score what a model must at least beat; unigram counts are in `tokens_of`'s tokens."""
        rows = []
        if references.unigram_counts is not None:
            counts = np.asarray(references.unigram_counts, dtype=np.int64)
            scored = {task.name: self._unigram(task, tokens_of, counts) for task in self.tasks}
            rows.append(
                self._row("unigram", "add-one smoothed token counts of training text", scored)
            )
        if references.untrained is not None:
            what = "the first arm's shape before training"
            rows.append(self._model_row("untrained", what, references.untrained))
        for name, folder in references.others.items():
            rows.append(self._model_row(name, f"{name}: scored beside the arms, no arm", folder))
        return rows

    def _model_row(self, name: str, what: str, folder: Path) -> dict[str, Any]:
        candidate = Candidate.open(folder, name)
        scored = {task.name: self.scores(candidate, task) for task in self.tasks}
        candidate.release()
        return self._row(name, what, scored)

    def _unigram(self, task: Task, tokens_of: Candidate, counts: np.ndarray) -> ItemScores:
        facts = {
            "export": tokens_of.hash,
            "task": [task.kind, task.version, task.file_hash],
            "counts": hashlib.sha256(counts.tobytes()).hexdigest(),
        }

        def score() -> dict[str, Any]:
            requests = task.requests(tokens_of)
            return task.scores(requests, unigram_scores(requests, counts)).as_tree()

        return ItemScores(**self.cache.get("unigram", facts, score))

    def tokenizer_hash(self, candidate: Candidate) -> str:
        """Identify, or recall, the vocabulary of an export."""
        facts = {"export": candidate.hash}
        return self.cache.get("tokenizer", facts, lambda: candidate.tokenizer_hash)

    def _row(self, name: str, what: str, scored: Mapping[str, ItemScores]) -> dict[str, Any]:
        return {
            "name": name,
            "kind": "reference",
            "description": what,
            "tasks": {
                task.name: {
                    "metric": task.metric,
                    "value": scored[task.name].value,
                    "n": len(scored[task.name].numerator),
                    **({"extra": scored[task.name].extra} if scored[task.name].extra else {}),
                }
                for task in self.tasks
            },
        }

    def overlaps(self, training: TrainingTexts) -> dict[str, Overlap]:
        """Search, or recall, which items of each task are in the training text, read once."""
        tasks = [[task.kind, task.version, task.file_hash] for task in self.tasks]

        def search() -> dict[str, Any]:
            if self.progress:
                self.progress("searching the test items in the training text", 0, None)
            items = [text for task in self.tasks for text in task.texts()]
            return asdict(find_overlap(items, training.read()))

        facts = {"tasks": tasks, "training": training.key}
        found = Overlap(**self.cache.get("overlap", facts, search))
        shares = iter(found.shares)
        return {
            task.name: Overlap(list(islice(shares, len(task.item_ids()))), found.documents)
            for task in self.tasks
        }


def _label(arm: ArmInput, seed: int | None) -> str:
    return arm.name if seed is None else f"{arm.name} seed {seed}"
