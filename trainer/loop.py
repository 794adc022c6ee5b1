"""The training loop: step, log, validate, save, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from shoal.configs.errors import (
    NonFiniteLossError,
    ShoalError,
    StoppedOnRequest,
)
from shoal.configs.schema import RunConfig
from shoal.data_pipeline.batch import Batch
from shoal.trainer.anomaly import AnomalyDetector
from shoal.trainer.booking import Booking
from shoal.trainer.checkpoint import Retention, checkpoint_name
from shoal.trainer.engine import Engine
from shoal.trainer.identity import check_same_inputs, check_same_run, name_odd_replicas
from shoal.trainer.metrics import Metrics
from shoal.trainer.optim import learning_rate
from shoal.trainer.resumption import find_checkpoint, load_checkpoint, open_store
from shoal.trainer.saver import Saver
from shoal.trainer.segment import BatchSource, RunFacts, Validation, seed_dropout
from shoal.trainer.teamwork import raise_together


def train(
    engine: Engine,
    source: BatchSource,
    config: RunConfig,
    facts: RunFacts,
    *,
    validation: Validation | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    position: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda doing: None,
) -> float | None:
    """Train from the newest whole checkpoint to the last step; return the last validation loss.

    None where there was nothing left to do, or nothing to validate on.

    `position` identifies the inputs (hashes and weights of the shards, hash of the teacher, as JSON
    values); it is stored with every checkpoint, and a checkpoint of others is refused. `progress`
    is told what comes next, so that a rank that gets no further can be told from one that works.

    Raises:
        StoppedOnRequest: a stop was asked for; a checkpoint of the last finished step is saved.
        ReplicaError: ranks hold other weights than the rest; what is saved is from before.
        NonFiniteLossError: step after step had to be left out, also from the newest checkpoint on.
        DataError: a shard or checkpoint is broken, named.
    """
    return _Training(
        engine, source, config, facts, validation, stop_requested, position or {}, progress
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
        progress: Callable[[str], None],
    ) -> None:
        self.engine, self.source, self.config, self.facts = engine, source, config, facts
        self.validation, self.stop_requested, self.position = validation, stop_requested, position
        self.progress = progress
        self.checkpoints = facts.folder / "checkpoints"
        self.step = self.skipped = self.passed_over = 0
        """Steps done; those of them left out; batches passed over by going back."""
        self.detector = AnomalyDetector(config.train.spike_limit)
        kept = config.checkpoint
        self.saver = Saver(
            # Before the watchdog, which knows less.
            open_store(config, self.checkpoints, config.world.timeout_seconds / 2),
            Retention(kept.keep, kept.milestone_every, kept.keep_best),
        )
        self._restore()
        self.skipped_in_a_row, self.went_back, self.is_due = 0, False, False
        self.loss: float | None = None
        """Of the validation rows after this step."""
        self.saved_step = self.sound_step = self.step
        """The last that was saved, and the last of those that has proven sound."""
        self.booking = Booking(config, facts, self.step)
        self.metrics = self._start_metrics()

    def _start_metrics(self) -> Metrics:
        facts = self.facts
        metrics = Metrics(
            facts.folder,
            name=self.config.name,
            steps=self.config.steps,
            start=self.step,
            active=facts.rank == 0,
        )
        metrics.write("start", self.step, ranks=facts.ranks, device=facts.device, **facts.chosen)
        return metrics

    def run(self) -> float | None:
        loss = None
        try:
            while self.step < self.config.steps:
                if not self._take_step():
                    continue
                last = self.step == self.config.steps
                self.loss = None
                if self.validation and self._validates(last):
                    loss = self._validate(self.validation)
                self._save_if_due(last)
            self._settle()
            if self.sound_step < self.step:
                raise NonFiniteLossError(
                    "the last step left weights that are no numbers",
                    where=self.facts.folder,
                    fix=f"the newest checkpoint is step {self.sound_step}",
                )
            self.saver.store.close(checkpoint_name(self.step), self.progress, self.engine.device)
        except BaseException:
            self.saver.leave()
            raise
        finally:
            self.metrics.close()
        return loss

    def _validates(self, last: bool) -> bool:
        """Whether to look at the validation rows now; which of two checkpoints is best asks it."""
        best = self.config.checkpoint.keep_best and self._saves_at(self.step)
        return last or best or self.step % self.config.validation.every_steps == 0

    def _saves_at(self, step: int) -> bool:
        return step == self.config.steps or step % self.config.checkpoint.every_steps == 0

    def _restore(self) -> bool:
        """Load the newest checkpoint every rank agrees on; False where there is none."""
        warn = print if self.facts.rank == 0 else lambda text: None
        found = find_checkpoint(
            self.saver.store,
            self.config.checkpoint.resume,
            warn,
            self.progress,
            device=self.engine.device,
        )
        if found is None:
            return False
        folder, manifest = found
        check_same_run(manifest.run, self.config, where=folder)
        allowed = self.config.checkpoint.allow_changes
        check_same_inputs(manifest.position, self.position, folder, allowed)
        # As a checkpoint from before steps could be left out has it.
        self.step, self.skipped = manifest.step, manifest.position.get("skipped", 0)
        self.passed_over = manifest.position.get("passed_over", 0)
        self.detector = AnomalyDetector(
            self.config.train.spike_limit, manifest.position.get("history", ())
        )
        load_checkpoint(
            self.engine, folder, manifest, self.step - self.skipped, progress=self.progress
        )
        return True

    def _take_step(self) -> bool:
        """Take the next step, or leave it out; False when that has led back to an earlier one."""
        begun, number = time.perf_counter(), self.step + 1
        self.progress(f"reading the rows of step {number}")
        batches = self.source.microbatches(self.step + self.passed_over)
        self.progress(f"waiting for the others before step {number}")
        tokens = self._agree(sum(batch.real_tokens for batch in batches))
        seed_dropout(self.config, self.step, batches)
        self.progress(f"taking step {number}")
        lr = learning_rate(self.config.optim, self.step, self.config.steps)
        result = self.engine.train_step(batches, lr, tokens, self.detector.accepts)
        loss = result.sums.cross_entropy / tokens
        self.booking.count(tokens, result.sums.streams)
        self.step += 1
        if not result.taken:
            return self._skip(loss, result.grad_norm, batches)
        self.skipped_in_a_row = 0
        seconds = time.perf_counter() - begun
        self.metrics.write(
            "train",
            self.step,
            tokens=self.step * self.config.step_tokens,
            loss=loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_second=tokens / seconds,
            seconds=seconds,
            **result.describe(
                distils=bool(self.config.teacher),
                routes=bool(self.config.model.moe),
                streams=self.facts.streams,
            ),
        )
        return True

    def _agree(self, tokens: int) -> int:
        """Sum the real tokens over ranks, and stop everywhere if any rank was asked to, or has to.

        Taken before the forward pass (one small collective): every loss is then a sum over one
        known count, and no rank stops while another goes on.

        Raises:
            StoppedOnRequest: it was.
            ShoalError, OSError: a checkpoint could not be written, or the next one will not fit.
        """
        near = self.is_due or self._saves_at(self.step + 1)
        trouble = self.saver.find_trouble()
        shortage = self.saver.find_shortage(self.engine) if near else None
        flags = [self.stop_requested(), trouble is not None, shortage is not None]
        shared = torch.tensor([tokens, *map(int, flags)], device=self.engine.device)
        dist.all_reduce(shared)
        total, stop, troubles, shortages = shared.tolist()
        if troubles:
            raise_together(trouble)
        if shortages:
            self._settle()  # the one before is published before the first rank ends
            raise_together(shortage)
        if stop:
            self._stop()
        return int(total)

    def _save_if_due(self, last: bool) -> None:
        """Save at every so many steps, and after the last one; compare what must be alike.

        That is compared once more after the next step that is taken: what was saved is published
        then. While steps cannot be taken the weights may be what is wrong, so both wait.
        """
        self.is_due |= self._saves_at(self.step)
        if self.is_due and (not self.skipped_in_a_row or last):
            self._save()
        elif self.skipped_in_a_row:
            return
        elif self.saver.awaits_word or self.step % self.config.checkpoint.compare_every == 0:
            self._compare_replicas()

    def _stop(self) -> None:
        """Save what is sound, and end.

        Raises:
            StoppedOnRequest: there is a checkpoint to go on from.
            ShoalError: there is none.
        """
        if self.step > self.saved_step and not self.skipped_in_a_row:
            self._save()
        self._settle()
        if not self.sound_step:
            raise ShoalError(
                "stopped on request before there was anything to save", where=self.facts.folder
            )
        raise StoppedOnRequest(
            f"stopped on request after step {self.step} of {self.config.steps}; step "
            f"{self.sound_step} is saved",
            where=self.checkpoints,
            fix="run the same command again to continue",
        )

    def _validate(self, validation: Validation) -> float:
        begun = time.perf_counter()
        sums = [self.engine.evaluate(self._watched(part.batches)) for part in validation.parts]
        scores = validation.describe(sums)
        loss = float(scores["loss"])
        self.loss = loss if math.isfinite(loss) else None
        self.metrics.write(
            "validation",
            self.step,
            tokens=self.step * self.config.step_tokens,
            **scores,
            seconds=time.perf_counter() - begun,
        )
        return loss

    def _watched(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(batches, 1):
            self.progress(f"validating after step {self.step}, batch {number} of {len(batches)}")
            yield batch

    def _compare_replicas(self) -> None:
        """Refuse to go on, or to save, with weights that are not alike on all ranks.

        What was saved and not yet compared since is dropped if they are not; if they are, it is
        published once a step has been taken from it.

        Raises:
            ReplicaError: names the ranks; the run may go on from its newest checkpoint.
        """
        odd = self.engine.compare_replicas()
        if odd or not self.skipped_in_a_row:
            self._vouch(sound=not odd)
        if odd:
            self.saver.finish(self.progress)  # what was vouched for is sound
            raise name_odd_replicas(odd, self.step, self.facts.folder)

    def _vouch(self, *, sound: bool) -> None:
        """Say of what was saved last, if that is still open, whether it is sound."""
        if self.saver.awaits_word:
            self.saver.vouch(sound=sound)
            self.sound_step = self.saved_step if sound else self.sound_step
            self.saved_step = self.sound_step

    def _settle(self) -> None:
        """Let what was saved last be published or dropped, now: no further step will tell."""
        if self.saver.awaits_word:
            tried = self.step > self.saved_step
            if self.skipped_in_a_row if tried else not self.engine.is_finite():
                self._vouch(sound=False)
            else:
                self._compare_replicas()
                self._vouch(sound=True)
        self.saver.finish(self.progress)

    def _save(self) -> None:
        self.progress(f"saving step {self.step}")
        self._settle()
        self._book()
        seconds = self.saver.begin(
            self.engine,
            self.step,
            position={
                **self.position,
                "step": self.step,
                "ledger": self.booking.position,
                "skipped": self.skipped,
                "passed_over": self.passed_over,
                "history": self.detector.history,
            },
            run=self.config.model_dump(mode="json"),
            loss=self.loss,
            sound=False,
            progress=self.progress,
        )
        self.saved_step, self.is_due = self.step, False
        self.metrics.write("checkpoint", self.step, seconds=seconds)

    def _book(self) -> None:
        if self.facts.rank == 0:
            self.booking.book(self.step, self.passed_over)

    def _skip(self, loss: float, norm: float, batches: Sequence[Batch]) -> bool:
        """Record a step that was left out on all ranks; after too many in a row go back, once.

        Returns False when the run has gone back.

        Raises:
            NonFiniteLossError: that has been tried, or there is nothing to go back to.
            ReplicaError: it is not the rows: ranks hold other weights than the rest.
        """
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._compare_replicas()
        found: list[Any] = [None] * self.facts.ranks
        dist.all_gather_object(found, [row for batch in batches for row in batch.row_ids.tolist()])
        rows = sorted({row for of_rank in found for row in of_rank if row >= 0})
        self.metrics.write("skipped", self.step, loss=str(loss), grad_norm=str(norm), rows=rows)
        what = f"step {self.step} left out: loss {loss:.4g}, gradient norm {norm:.4g}"
        self.metrics.say(f"{self.config.name}: {what}; rows {_shorten(rows)}")
        if self.skipped_in_a_row <= self.config.train.max_skipped_steps:
            return True
        self._settle()
        if not (self.went_back or self.config.ledger.kind == "tune") and self.sound_step:
            self._go_back()
            return False
        self._book()
        raise NonFiniteLossError(
            f"{self.skipped_in_a_row} steps in a row cannot be taken; step {self.step} has loss "
            f"{loss}, gradient norm {norm}, rows {_shorten(rows)}",
            where=self.facts.folder,
            fix="lower optim.lr, lengthen optim.warmup_share or set optim.clip_norm; the newest "
            f"checkpoint is step {self.sound_step}",
        )

    def _go_back(self) -> None:
        """Go on from the newest checkpoint with the batches after those that led here."""
        self._book()
        worked = self.step + self.passed_over
        self._restore()
        self.passed_over = worked - self.step
        self.skipped_in_a_row, self.went_back, self.is_due = 0, True, False
        self.saved_step = self.sound_step = self.step
        self.booking.begin(self.step)
        self.metrics.go_back(self.step)
        self.metrics.say(
            f"{self.config.name}: back at step {self.step}, past {self.passed_over} batches"
        )


def _shorten(rows: Sequence[int]) -> str:
    return f"{rows[:16]}".removesuffix("]") + (", ...]" if len(rows) > 16 else "]")
