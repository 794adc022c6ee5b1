"""From a study's arms to the runs they need: shapes solved, rates tuned, stages keyed.

Pure planning: nothing here trains. A run's folder name ends in a hash of everything that
determines its result, so a stage that exists is the stage that is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.configs.errors import ConfigError
from shoal.configs.load import build_config, merge
from shoal.configs.schema import ModelConfig, RunConfig
from shoal.configs.study import ArmConfig, BudgetConfig, MatchConfig, StudyConfig

STAGE_FORMAT = 1  # raise when the same config would give another result than before


@dataclass(frozen=True)
class Arm:
    """An arm or support run with its shape settled."""

    name: str
    config: ArmConfig
    model: ModelConfig
    shared: bool
    """Used by other arms: booked as generic cost, and not a contestant."""

    @property
    def kind(self) -> str:
        """`dense`, `moe` or `distilled`."""
        if self.config.teacher:
            return "distilled"
        return "moe" if self.model.moe else "dense"


@dataclass(frozen=True)
class CorpusFacts:
    """What planning needs of a prepared corpus."""

    train: Path
    validation: Path
    shards_hash: str
    validation_hash: str
    vocab_size: int
    """Entries of the tokenizer."""
    context: int
    """Tokens of a row."""


def settle_arms(study: StudyConfig, corpus: CorpusFacts) -> list[Arm]:
    """Give every support run and arm its shape, solved to its budget where it is matched.

    Raises:
        ConfigError: a key is unknown, no shape meets a budget (the nearest is named), or the
            comparison could not be made under the conditions asked for.
    """
    from shoal.eval.budget import resolve_contexts
    from shoal.eval.preconditions import check_conditions

    bases = {
        name: _base_config(study, config, corpus, name)
        for name, config in (*study.support.items(), *study.arms.items())
    }
    for name, base in bases.items():
        if base.model.context != corpus.context:
            raise ConfigError(
                f"a context of {base.model.context} does not fit rows of {corpus.context} tokens",
                where=f"{name}: model.context",
                fix=f"model.context={corpus.context}, or prepare rows of another length",
            )
    contexts = {name: bases[name].model.context for name in study.arms}
    check_conditions(contexts, study.budgets, study.tasks)
    budgets = resolve_contexts(study.budgets, contexts.values())
    for name in study.arms:
        _check_equal_training(study, bases[name], corpus, name)
    arms = []
    for shared, group in ((True, study.support), (False, study.arms)):
        for name, config in group.items():
            model = bases[name].model.with_vocab(corpus.vocab_size)
            if config.match:
                model = _solve(model, budgets, config.match, name)
            arms.append(Arm(name, config, model, shared))
    return arms


def _solve(
    model: ModelConfig, budgets: Mapping[str, BudgetConfig], match: MatchConfig, name: str
) -> ModelConfig:
    from shoal.eval.budget import solve_shape

    try:
        return solve_shape(model, budgets[match.budget], match)
    except ConfigError as error:
        where = f"arm {name}, budget {match.budget}"
        raise ConfigError(error.cause, where=where, fix=error.fix) from None


# What an arm may have of its own: its shape, and how its passes are cut up and sharded.
OWN_SECTIONS = ("model", "kernels", "name")
OWN_TRAIN = ("micro_batch_rows", "zero_stage", "activation_checkpointing", "compile")


def _check_equal_training(
    study: StudyConfig, run: RunConfig, corpus: CorpusFacts, name: str
) -> None:
    """Refuse an arm that would be trained otherwise than the study says.

    Raises:
        ConfigError: names the keys.
    """
    common = _base_config(study, ArmConfig(), corpus, name).model_dump(mode="json")
    own = run.model_dump(mode="json")
    free = {"train": OWN_TRAIN, "optim": ("lr",)}
    differing = [
        f"{section}.{key}"
        for section, values in own.items()
        if section not in OWN_SECTIONS and isinstance(values, dict)
        for key, value in values.items()
        if key not in free.get(section, ()) and value != (common[section] or {}).get(key)
    ]
    differing += [key for key in ("seed", "prepare", "teacher") if own[key] != common[key]]
    if differing:
        raise ConfigError(
            f"arm {name} would be trained otherwise than the rest: {', '.join(differing)}",
            where=f"study {study.name}",
            fix="set these in the study's own `run`, for all arms; an arm may change model, "
            "kernels and optim.lr (a teacher is named with `teacher`)",
        )


def _base_config(study: StudyConfig, arm: ArmConfig, corpus: CorpusFacts, name: str) -> RunConfig:
    tree = merge(study.run, arm.run)
    tree["data"] = {
        **tree.get("data", {}),
        "train": [{"path": str(corpus.train)}],
        "validation": str(corpus.validation),
    }
    tree["world"] = study.world.model_dump()
    return build_config(RunConfig, tree, where=f"study {study.name}, arm {name}")


class RunPlanner:
    """Makes the `RunConfig` of any stage of an arm."""

    def __init__(self, study: StudyConfig, corpus: CorpusFacts, arms: Iterable[Arm]) -> None:
        self.study = study
        self.corpus = corpus
        self.arms = {arm.name: arm for arm in arms}
        self.output = Path(study.runs) / study.name

    def trial(self, arm: Arm, lr: float, teacher: Path | None = None) -> RunConfig:
        """Return the short run that tries one learning rate."""
        tuning = self.study.tuning
        assert tuning is not None
        changes = {"seed": tuning.seed, "optim": {"lr": lr}, "train": {"tokens": tuning.tokens}}
        return self._config(arm, changes, teacher, label=f"tune-{lr:g}", kind="tune")

    def run(self, arm: Arm, lr: float | None, seed: int, teacher: Path | None = None) -> RunConfig:
        """Return the full run of one seed; `lr` None keeps the configured rate."""
        changes: dict[str, Any] = {"seed": seed}
        if lr is not None:
            changes["optim"] = {"lr": lr}
        tokens = self._equal_tokens(arm)
        if tokens:
            changes["train"] = {"tokens": tokens}
        return self._config(arm, changes, teacher, label=f"seed{seed}", kind="train")

    def _equal_tokens(self, arm: Arm) -> int | None:
        """Training tokens that cost as many FLOPs as the first arm's, where FLOPs are equal."""
        if self.study.equal_on == "tokens" or arm.shared:
            return None
        first = self.arms[next(iter(self.study.arms))]
        base = _base_config(self.study, first.config, self.corpus, first.name)
        return round(base.train.tokens * self._flops(first) / self._flops(arm))

    def _flops(self, arm: Arm) -> int:
        """FLOPs of one trained token of an arm, its teacher's forward pass included."""
        from shoal.trainer.cost import training_flops_per_token

        teacher = self.arms[arm.config.teacher].model if arm.config.teacher else None
        return training_flops_per_token(arm.model, arm.model.context, teacher)

    def _config(
        self, arm: Arm, changes: dict[str, Any], teacher: Path | None, *, label: str, kind: str
    ) -> RunConfig:
        base = _base_config(self.study, arm.config, self.corpus, arm.name)
        tree = merge(base.model_dump(mode="json"), changes)
        tree["model"] = arm.model.model_dump(mode="json")
        tree["output"] = str(self.output)
        tree["ledger"] = {"kind": kind, "scope": "generic" if arm.shared else "specialization"}
        if teacher:
            tree["teacher"] = {
                "path": str(teacher),
                "temperature": arm.config.teacher_temperature,
                "weight": arm.config.teacher_weight,
            }
        config = build_config(RunConfig, tree, where=f"study {self.study.name}, arm {arm.name}")
        name = f"{arm.name}-{label}-{self._key(config)}"
        return config.model_copy(update={"name": name})

    def _key(self, config: RunConfig) -> str:
        """Hash of everything that determines the run's result; of a trial that is a loss."""
        tree = config.determinants()
        tree["shards"] = self.corpus.shards_hash
        tree["format"] = STAGE_FORMAT
        if config.ledger.kind == "tune":
            tree["validation"] = [self.corpus.validation_hash, config.validation.max_rows]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:10]


def best_rate(losses: dict[float, float]) -> float:
    """Return the rate with the lowest validation loss; the smaller of two equal ones."""
    return min(sorted(losses), key=lambda lr: losses[lr])
