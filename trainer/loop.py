"""The training loop: step, log, validate, save, stop."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from shoal.configs.errors import (
    ConfigError,
    DataError,
    NonFiniteLossError,
    ShoalError,
    StoppedOnRequest,
)
from shoal.configs.load import build_config
from shoal.configs.schema import RunConfig
from shoal.data_pipeline.batch import Batch
from shoal.trainer import checkpoint
from shoal.trainer.engine import Engine
from shoal.trainer.ledger import LedgerEntry, append_entry, now
from shoal.trainer.metrics import Metrics
from shoal.trainer.optim import learning_rate


class BatchSource(Protocol):
    """What the loop needs of a loader: the rows of any step, from nothing but its number."""

    def microbatches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step, equally many on every rank."""
        ...


@dataclass(frozen=True)
class Validation:
    """Batches of this rank, and what turns nats per token into bits per byte."""

    batches: Sequence[Batch]
    text_bytes: int
    """UTF-8 bytes that the scored targets stand for, over all ranks."""


@dataclass(frozen=True)
class RunFacts:
    """What the loop records but does not decide."""

    folder: Path
    rank: int
    ranks: int
    device: str
    training_flops_per_token: float
    chosen: dict[str, str | int] = field(default_factory=dict)
    """What `auto` came to: kernels, ZeRO stage; written to the metrics at every start."""


def train(
    engine: Engine,
    source: BatchSource,
    config: RunConfig,
    facts: RunFacts,
    *,
    validation: Validation | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    position: dict[str, Any] | None = None,
) -> float | None:
    """Train from the newest whole checkpoint to the last step; return the last validation loss.

    None where there was nothing left to do, or nothing to validate on.

    `position` identifies the inputs (hashes and weights of the shards, hash of the teacher, as JSON
    values); it is stored with every checkpoint, and a checkpoint of others is refused.

    Raises:
        StoppedOnRequest: a stop was asked for; a checkpoint of the last finished step is saved.
        NonFiniteLossError: the loss is NaN or infinite; no checkpoint of that step is written.
        DataError: a shard or checkpoint is broken, named.
    """
    return _Training(
        engine, source, config, facts, validation, stop_requested, position or {}
    ).run()


class _Training:
    """State of one segment: from a (re)start to the end, a stop, or an error."""

    def __init__(
        self,
        engine: Engine,
        source: BatchSource,
        config: RunConfig,
        facts: RunFacts,
        validation: Validation | None,
        stop_requested: Callable[[], bool],
        position: dict[str, Any],
    ) -> None:
        self.engine, self.source, self.config, self.facts = engine, source, config, facts
        self.validation, self.stop_requested, self.position = validation, stop_requested, position
        self.checkpoints = facts.folder / "checkpoints"
        self.step = self._restore()
        self.saved_step = self.booked_step = self.step
        self.booked_at, self.started = time.monotonic(), now()
        self.metrics = Metrics(
            facts.folder,
            name=config.name,
            steps=config.steps,
            start=self.step,
            active=facts.rank == 0,
        )
        self.metrics.write(
            "start", self.step, ranks=facts.ranks, device=facts.device, **facts.chosen
        )

    def run(self) -> float | None:
        loss = None
        try:
            while self.step < self.config.steps:
                self._take_step()
                last = self.step == self.config.steps
                if self.validation and (
                    last or self.step % self.config.validation.every_steps == 0
                ):
                    loss = self._validate(self.validation)
                if last or self.step % self.config.checkpoint.every_steps == 0:
                    self._save()
        finally:
            self.metrics.close()
        return loss

    def _restore(self) -> int:
        """Load the newest checkpoint every rank agrees on; return its step."""
        choice: list[Any] = [None]
        if self.facts.rank == 0:
            try:
                choice = [checkpoint.newest_checkpoint(self.checkpoints, warn=print)]
            except ShoalError as error:
                choice = [error]
        dist.broadcast_object_list(choice)
        if isinstance(choice[0], ShoalError):
            raise choice[0]
        if choice[0] is None:
            return 0
        folder, manifest = choice[0]
        check_same_run(manifest.run, self.config, where=folder)
        check_same_inputs(manifest.position, self.position, where=folder)
        checkpoint.load_checkpoint(self.engine, folder, manifest)
        return int(manifest.step)

    def _take_step(self) -> None:
        begun = time.perf_counter()
        batches = self.source.microbatches(self.step)
        tokens = self._agree(sum(batch.real_tokens for batch in batches))
        self._seed_dropout(batches)
        lr = learning_rate(self.config.optim, self.step, self.config.steps)
        result = self.engine.train_step(batches, lr, tokens)
        loss = result.sums.cross_entropy / tokens
        if not math.isfinite(loss + result.grad_norm):
            self._refuse_non_finite(loss, result.grad_norm, batches)
        self.step += 1
        seconds = time.perf_counter() - begun
        values: dict[str, Any] = {
            "tokens": self.step * self.config.step_tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
        }
        if self.config.teacher:
            values["distillation"] = result.sums.distillation / tokens
        if self.config.model.moe:
            values["balance"] = result.sums.balance / tokens
            values["router_z"] = result.sums.router_z / tokens
            values["expert_load"] = [load / tokens for load in result.sums.expert_load]
        self.metrics.write("train", self.step, **values)

    def _agree(self, tokens: int) -> int:
        """Sum the real tokens over ranks, and stop everywhere if any rank was asked to.

        Taken before the forward pass (one small collective): every loss is then a sum over one
        known count, and no rank stops while another goes on.
        """
        shared = torch.tensor([tokens, int(self.stop_requested())], device=self.engine.device)
        dist.all_reduce(shared)
        if int(shared[1]):
            self._stop()
        return int(shared[0])

    def _stop(self) -> None:
        if self.step > self.saved_step:
            self._save()
        raise StoppedOnRequest(
            f"stopped on request after step {self.step} of {self.config.steps}; it is saved",
            where=self.checkpoints,
            fix="run the same command again to continue",
        )

    def _seed_dropout(self, batches: Sequence[Batch]) -> None:
        """Make dropout a function of seed, step and rows, so that no random state needs saving."""
        if self.config.model.dropout:
            row = int(batches[0].row_ids[0]) if batches else 0
            torch.manual_seed(dropout_seed(self.config.seed, self.step, row))

    def _validate(self, validation: Validation) -> float:
        begun = time.perf_counter()
        nats, tokens = self.engine.evaluate(validation.batches)
        loss = nats / tokens
        self.metrics.write(
            "validation",
            self.step,
            tokens=self.step * self.config.step_tokens,
            loss=loss,
            bits_per_byte=nats / math.log(2) / validation.text_bytes,
            seconds=time.perf_counter() - begun,
        )
        return loss

    def _save(self) -> None:
        checkpoint.save_checkpoint(
            self.engine,
            self.checkpoints,
            step=self.step,
            position={**self.position, "step": self.step},
            run=self.config.model_dump(mode="json"),
        )
        self.saved_step = self.step
        if self.facts.rank == 0:
            checkpoint.remove_old(self.checkpoints, self.config.checkpoint.keep, self.step)
        self._book(self.step)

    def _book(self, step: int) -> None:
        """Append what was done since the last entry, up to and with `step`, to the ledger."""
        steps, self.booked_step = step - self.booked_step, step
        seconds, self.booked_at = time.monotonic() - self.booked_at, time.monotonic()
        started, self.started = self.started, now()
        if self.facts.rank or not steps:
            return
        tokens = steps * self.config.step_tokens
        append_entry(
            self.facts.folder / "ledger.jsonl",
            LedgerEntry(
                kind=self.config.ledger.kind,
                stage=self.config.name,
                scope=self.config.ledger.scope,
                started=started,
                seconds=seconds,
                devices=self.facts.ranks,
                device=self.facts.device,
                tokens=tokens,
                flops=tokens * self.facts.training_flops_per_token,
                note=f"steps {step - steps} to {step}",
            ),
        )

    def _refuse_non_finite(self, loss: float, norm: float, batches: Sequence[Batch]) -> None:
        self._book(self.step + 1)  # that step was worked too, and a search pays for its failures
        rows = [int(row) for batch in batches for row in batch.row_ids if row >= 0]
        raise NonFiniteLossError(
            f"loss {loss}, gradient norm {norm} at step {self.step + 1}; rows of rank "
            f"{self.facts.rank}: {rows[:16]}{' ...' if len(rows) > 16 else ''}",
            where=self.facts.folder,
            fix="lower optim.lr, lengthen optim.warmup_share or set optim.clip_norm; the newest "
            f"checkpoint is step {self.saved_step}",
        )


def dropout_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of a rank's dropout in one step: of the run, the step and its first row."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {row}".encode()).digest()[:7], "big")


def check_same_run(stored: dict[str, Any], config: RunConfig, where: Path) -> None:
    """Refuse to continue a run whose config would give another result.

    Raises:
        ConfigError: naming the keys that differ.
    """
    # Read as a config of today: keys that are new since then have their defaults in both.
    theirs = build_config(RunConfig, stored, where=where).determinants()
    ours = config.determinants()
    differing = [k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]
    if stored.get("name") != config.name:
        differing.append("name")
    if differing:
        raise ConfigError(
            f"this run was started with another {', '.join(differing)}",
            where=where,
            fix="give the changed run another name=, or restore the old values",
        )


def check_same_inputs(stored: Mapping[str, Any], position: Mapping[str, Any], where: Path) -> None:
    """Refuse a checkpoint of other shards, or of another teacher, than those at hand.

    Args:
        stored: `position` of the checkpoint.
        position: Hashes and weights of the shards, hash of the teacher, as now opened.
        where: The checkpoint.

    Raises:
        DataError: they are not the same.
    """
    for key, now_there in position.items():
        if key == "teacher" and key not in stored:
            continue  # saved before teachers were remembered
        if stored.get(key) != now_there:
            what = "by another teacher" if key == "teacher" else "on other rows"
            raise DataError(
                f"was trained {what}: {stored.get(key)}, now {now_there}",
                where=where,
                fix="point data.train and teacher.path at what the run was started with",
            )
