"""Writing checkpoints while training goes on: each rank its own slices, no collective.

Training waits for one thing: the copy of what the rank holds. A thread then writes and hashes it
and hands it in. The thread that publishes waits for the files of all ranks, and for word that what
was copied is sound: a checkpoint that nobody vouches for never appears.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.configs.errors import PreflightError, ShoalError, explain_machine_error
from shoal.trainer.checkpoint import (
    SCHEMA,
    Manifest,
    Retention,
    Slice,
    StoredFile,
    StoredTensor,
    checkpoint_name,
)
from shoal.trainer.engine import Engine
from shoal.trainer.storage import write_pieces
from shoal.trainer.stores import SharedFolder, Word
from shoal.trainer.teamwork import LOOK_SECONDS, Progress, Tick, raise_together

LEAVE_SECONDS = 30.0
ELEMENT_BYTES = 4
WAITING = "waiting for a checkpoint to be written"


@dataclass(frozen=True)
class _Part:
    """What one rank writes of a checkpoint."""

    kept: dict[str, Tensor]
    index: dict[str, Any]
    file: str
    head: dict[str, Any]
    """Step, position, run and loss, as the manifest has them."""
    shapes: Mapping[str, tuple[int, ...]]
    states: Mapping[str, tuple[str, ...]]
    """Of all parameters of the model."""
    vouched: threading.Event
    """Set once it is known whether what was copied is sound."""


class Saver:
    """Writes the checkpoints of one segment of a run, one at a time; one on every rank."""

    def __init__(self, store: SharedFolder, rule: Retention) -> None:
        """Take over a store of checkpoints; collective.

        Args:
            store: Where they go.
            rule: Which are kept.
        """
        self.store, self.rule = store, rule
        self.device: torch.device | None = None
        """Of the ranks' collectives; None until something is saved."""
        token = [secrets.token_hex(8)]
        dist.broadcast_object_list(token)
        store.claim(token[0])
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._vouched = threading.Event()
        self._vouched.set()
        self._sound, self._left = True, False
        self._ticks = 0
        """How often the thread has got further."""
        store.tick = self._tick
        self._kept: dict[str, Tensor] = {}
        """Memory of the copies, used again: to get it anew takes as long as to copy."""

    @property
    def awaits_word(self) -> bool:
        """Whether `vouch` is still to say something of the last checkpoint; alike on all ranks."""
        return not self._vouched.is_set()

    def begin(
        self,
        engine: Engine,
        step: int,
        position: dict[str, Any],
        run: dict[str, Any],
        *,
        loss: float | None = None,
        sound: bool = True,
        progress: Progress = lambda doing: None,
    ) -> float:
        """Copy what this rank holds and start writing it; return the seconds the copy took.

        Collective for as long as the checkpoint before this one is being written.

        Args:
            engine: Whose state.
            step: Steps done.
            position: Where the data stands.
            run: The resolved config.
            loss: On the validation rows, if it was measured at this step.
            sound: Whether it may be published once it is written; otherwise `vouch` tells.
            progress: Told now and then while it waits.

        Raises:
            ShoalError, OSError: that one could not be written; on all ranks.
        """
        self.finish(progress)
        self.device = engine.device
        begun = time.perf_counter()
        index, file = self._copy(engine), self.store.file_name
        seconds = time.perf_counter() - begun
        head = {"step": step, "position": position, "run": run, "loss": loss}
        self._vouched, self._sound = threading.Event(), sound
        shapes, states = engine.parameter_shapes, engine.parameter_states
        part = _Part(self._kept, index, file, head, shapes, states, self._vouched)
        self._thread = threading.Thread(target=self._write, args=(part,), name=f"saver {step}")
        if sound:
            self._vouched.set()
        self._thread.start()
        return seconds

    def _copy(self, engine: Engine) -> dict[str, Any]:
        """Copy what this rank holds; return where its file has it, by parameter and state."""
        kept, index = self._kept, dict[str, Any]()
        for name, state, offset, values in engine.read_slices():
            key = f"{state}/{name}"
            flat = values.detach().flatten()
            if key in kept:
                kept[key].copy_(flat)
            else:
                kept[key] = flat.to("cpu", torch.float32, copy=True)
            piece = Slice(file=self.store.file_name, key=key, offset=offset, length=flat.numel())
            entry = StoredTensor(shape=engine.parameter_shapes[name], slices=(piece,))
            index.setdefault(name, {})[state] = entry.model_dump()
        return index

    def vouch(self, *, sound: bool) -> None:
        """Say whether what was copied last is sound; otherwise it is never published."""
        if not self._vouched.is_set():
            self._sound = sound
            self._vouched.set()

    def find_trouble(self) -> BaseException | None:
        """Return what has befallen the thread, if anything, once."""
        error, self._error = self._error, None
        return error

    def find_shortage(self, engine: Engine) -> PreflightError | None:
        """Return what is wrong if the next checkpoint of `engine` will not find room here."""
        needed = self.store.needed_bytes(*count_bytes(engine))
        free = shutil.disk_usage(self.store.root).free
        if free >= needed:
            return None
        return PreflightError(
            f"the next checkpoint needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on "
            f"{socket.gethostname()}",
            where=self.store.root,
            fix="free some space there, or lower checkpoint.keep; the same command then goes on",
        )

    def finish(self, progress: Progress = lambda doing: None) -> None:
        """Wait until the last checkpoint is published, or dropped; collective.

        Args:
            progress: Of the watchdog; told for as long as any rank's thread gets further.

        Raises:
            ShoalError, OSError: a rank could not write it; on all.
        """
        if self.device is None:
            return
        last = -1
        while True:
            busy = self._thread is not None and self._thread.is_alive()
            told = [int(busy), int(self._error is not None), self._ticks]
            state = torch.tensor(told, device=self.device)
            dist.all_reduce(state)
            if int(state[1]) or not int(state[0]):
                break
            if int(state[2]) != last:
                last = int(state[2])
                progress(WAITING)
            time.sleep(LOOK_SECONDS)
        self._thread = None
        if int(state[1]):
            raise_together(self.find_trouble())

    def _tick(self) -> None:
        self._ticks += 1

    def leave(self) -> None:
        """Give what is being written a moment, and no more: something else has failed.

        What nobody has vouched for is not published.
        """
        self.vouch(sound=False)
        if self._thread is not None:
            self._thread.join(LEAVE_SECONDS)
        self._left = True

    def _write(self, part: _Part) -> None:
        aside = self.store.aside_of(checkpoint_name(part.head["step"]))
        try:
            self._write_aside(part, aside)
        except BaseException as error:  # raised where training can see it
            (aside / part.file).unlink(missing_ok=True)
            known = explain_machine_error(error)
            if known and not known.where:
                known = PreflightError(known.cause, where=self.store.root, fix=known.fix)
            self._error = known or error

    def _write_aside(self, part: _Part, aside: Path) -> None:
        try:
            word = _write_file(part, aside, self._tick)
        except BaseException:
            (aside / part.file).unlink(missing_ok=True)  # there may be no room for a word else
            self.store.give_up(aside)
            raise
        words = self.store.hand_in(aside, part.file, word, lambda: not self._left)
        if words is None:
            return
        manifest = _join(words, part)
        part.vouched.wait()
        if self._sound:
            self.store.publish(aside, manifest, self.rule)
        else:
            shutil.rmtree(aside, ignore_errors=True)


def _write_file(part: _Part, aside: Path, tick: Tick) -> Word:
    """Write this rank's file; return what the manifest has to say of it."""
    file = aside / part.file
    aside.mkdir(exist_ok=True)
    found = write_pieces(file, _serialize(part.kept), tick)
    facts = {"bytes": file.stat().st_size, "sha256": found}
    return {"files": {part.file: facts}, "tensors": part.index}


def _serialize(kept: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """Yield a safetensors file in pieces; `save_file` of that library does not say how far it is.

    Args:
        kept: Of one axis, fp32, on the CPU, each in one run of memory.
    """
    table, end = {}, 0
    for key, values in kept.items():
        begin, end = end, end + ELEMENT_BYTES * values.numel()
        table[key] = {"dtype": "F32", "shape": [values.numel()], "data_offsets": [begin, end]}
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)  # so that what follows is aligned
    yield memoryview(len(head).to_bytes(8, "little") + head)
    for values in kept.values():
        yield values.view(torch.uint8).numpy().data


def count_bytes(engine: Engine) -> tuple[int, int]:
    """Return the bytes of a checkpoint, over all ranks, and those of this rank's part."""
    total = sum(
        math.prod(shape) * len(engine.parameter_states[name])
        for name, shape in engine.parameter_shapes.items()
    )
    own = sum(values.numel() for _, _, _, values in engine.read_slices())
    return ELEMENT_BYTES * total, ELEMENT_BYTES * own


def _join(words: Sequence[Word], part: _Part) -> Manifest:
    """Put the words of all ranks together.

    Raises:
        ShoalError: they do not hold every element of every state once.
    """
    files: dict[str, StoredFile] = {}
    tensors: dict[str, dict[str, StoredTensor]] = {}
    for word in words:
        files |= {name: StoredFile(**facts) for name, facts in word["files"].items()}
        for name, states in word["tensors"].items():
            for state, tree in states.items():
                held, entry = tensors.setdefault(name, {}), StoredTensor(**tree)
                slices = held[state].slices + entry.slices if state in held else entry.slices
                held[state] = entry.model_copy(update={"slices": slices})
    for name, shape in part.shapes.items():
        for state in part.states[name]:
            found, whole = tensors.get(name, {}).get(state), math.prod(shape)
            end = 0
            for piece in sorted(found.slices if found else (), key=lambda piece: piece.offset):
                end = end + piece.length if piece.offset == end else -1
            if end != whole:
                raise ShoalError(f"{state} of {name}: not every one of {whole} elements once")
    return Manifest(schema_version=SCHEMA, files=files, tensors=tensors, **part.head).sealed()


def save_checkpoint(
    engine: Engine, root: Path, *, step: int, position: dict[str, Any], run: dict[str, Any]
) -> Path:
    """Write the engine's whole state and wait for it; collective. Returns the published folder."""
    saver = Saver(SharedFolder(root), Retention(newest=1 << 30))
    saver.begin(engine, step, position, run)
    saver.finish()
    return root / checkpoint_name(step)
