"""Writing checkpoints while training goes on: each rank its own slices, no collective.

Training waits for one thing: the copy of what the rank holds. A thread then writes and hashes it,
and leaves word beside it; that of rank 0 waits for the words of all, writes the manifest and
renames the folder into place. Nothing is published before every rank's file is on disk.
"""

from __future__ import annotations

import fcntl
import json
import math
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.configs.errors import PreflightError, ShoalError
from shoal.trainer.checkpoint import (
    MANIFEST,
    SCHEMA,
    Manifest,
    Slice,
    StoredFile,
    StoredTensor,
    checkpoint_name,
    remove_old,
)
from shoal.trainer.engine import STATES, Engine
from shoal.trainer.storage import digest, sync, write_text

OWNER = ".owner"
LOCK = ".lock"
LOOK_SECONDS = 0.05
LEAVE_SECONDS = 30.0
CPU = torch.device("cpu")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Part:
    """What one rank writes of a checkpoint."""

    kept: dict[str, Tensor]
    index: dict[str, Any]
    file: str
    head: dict[str, Any]
    """Step, position and run, as the manifest has them."""
    shapes: dict[str, tuple[int, ...]]
    """Of all parameters of the model."""


class Saver:
    """Writes the checkpoints of one segment of a run, one at a time; one on every rank."""

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        timeout: float = 600,
        device: torch.device = CPU,
    ) -> None:
        """Take over a folder of checkpoints; collective.

        What killed savers left aside is removed. Whoever else still writes there, such as a rank of
        an attempt that was cut off, publishes and removes nothing any more: the folder names its
        owner.

        Args:
            root: Folder of the run's checkpoints.
            keep: Newest checkpoints kept.
            timeout: Seconds that rank 0 waits for the other ranks' files, or for the folder.
            device: Of the ranks' collectives.
        """
        self.root, self.keep, self.timeout, self.device = root, keep, timeout, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        token = [secrets.token_hex(8)]
        if self.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            with self._hold_folder():
                for leftover in root.glob(".partial-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                write_text(root / OWNER, token[0])
        dist.broadcast_object_list(token)
        self.token: str = token[0]
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self,
        engine: Engine,
        step: int,
        position: dict[str, Any],
        run: dict[str, Any],
        progress: Progress = lambda doing: None,
    ) -> float:
        """Copy what this rank holds and start writing it; return the seconds the copy took.

        Waits for the checkpoint before this one.

        Args:
            engine: Whose state.
            step: Steps done.
            position: Where the data stands.
            run: The resolved config.
            progress: Told now and then while it waits.

        Raises:
            ShoalError, OSError: that one could not be written.
        """
        self.wait(progress)
        begun = time.perf_counter()
        kept: dict[str, Tensor] = {}
        index: dict[str, dict[str, dict[str, Any]]] = {}
        file = f"rank-{self.rank:05d}.safetensors"
        for name, state, offset, values in engine.read_slices():
            key = f"{state}/{name}"
            kept[key] = values.detach().to("cpu", copy=True).flatten()
            piece = Slice(file=file, key=key, offset=offset, length=values.numel())
            shape = engine.parameter_shapes[name]
            entry = StoredTensor(shape=shape, slices=(piece,)).model_dump()
            index.setdefault(name, {})[state] = entry
        seconds = time.perf_counter() - begun
        head = {"step": step, "position": position, "run": run}
        part = _Part(kept, index, file, head, engine.parameter_shapes)
        self._thread = threading.Thread(target=self._write, args=(part,), name=f"saver {step}")
        self._thread.start()
        return seconds

    def check(self) -> None:
        """Raise what has befallen the thread, if anything.

        Raises:
            ShoalError, OSError: the checkpoint could not be written.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, progress: Progress = lambda doing: None) -> None:
        """Wait until this rank's part of the last checkpoint is done; on rank 0: published.

        Raises:
            ShoalError, OSError: it could not be written.
        """
        while self._thread is not None:
            self._thread.join(1.0)
            if self._thread.is_alive():
                progress("waiting for a checkpoint to be written")
            else:
                self._thread = None
        self.check()

    def finish(self, progress: Progress = lambda doing: None) -> None:
        """Wait until the last checkpoint is published; collective, and the same on all ranks.

        Raises:
            ShoalError, OSError: this rank could not write it.
            RuntimeError: another could not, and says why.
        """
        while True:
            busy = self._thread is not None and self._thread.is_alive()
            state = torch.tensor([int(busy), int(self._error is not None)], device=self.device)
            dist.all_reduce(state)
            if int(state[1]) or not int(state[0]):
                break
            progress("waiting for a checkpoint to be written")
            time.sleep(LOOK_SECONDS)
        self._thread = None
        self.check()
        if int(state[1]):
            raise RuntimeError(f"another rank could not write its part of {self.root}")

    def leave(self) -> None:
        """Give what is being written a moment, and no more: something else has failed."""
        if self._thread is not None:
            self._thread.join(LEAVE_SECONDS)

    def _write(self, part: _Part) -> None:
        from safetensors.torch import save_file

        step = part.head["step"]
        aside = self.root / f".partial-{checkpoint_name(step)}-{self.token}"
        try:
            aside.mkdir(exist_ok=True)
            save_file(part.kept, aside / part.file)
            sync(aside / part.file)
            size = (aside / part.file).stat().st_size
            facts = {"bytes": size, "sha256": digest(aside / part.file)}
            word = json.dumps({"files": {part.file: facts}, "tensors": part.index})
            write_text(aside / f"rank-{self.rank:05d}.json", word)
            if self.rank == 0:
                manifest = _join(self._gather(aside), part)
                self._publish(aside, manifest)
        except BaseException as error:  # raised where training can see it
            self._error = error

    def _gather(self, aside: Path) -> list[dict[str, Any]]:
        """Wait for the words of all ranks and return them, in the order of ranks."""
        deadline = time.monotonic() + self.timeout
        names = [f"rank-{rank:05d}.json" for rank in range(self.ranks)]
        while missing := [name for name in names if not (aside / name).is_file()]:
            if time.monotonic() > deadline:
                raise ShoalError(
                    f"{len(missing)} ranks have not written their part in {self.timeout:.0f} s, "
                    f"the first is {missing[0].removesuffix('.json')}",
                    where=aside,
                    fix="see to the disk of that rank; is the folder really shared?",
                )
            time.sleep(LOOK_SECONDS)
        return [json.loads((aside / name).read_text(encoding="utf-8")) for name in names]

    def _publish(self, aside: Path, manifest: Manifest) -> None:
        """Give the folder its name, and remove what is too old; only the owner may."""
        for rank in range(self.ranks):
            (aside / f"rank-{rank:05d}.json").unlink()
        (aside / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        sync(aside / MANIFEST)
        sync(aside)
        final = self.root / checkpoint_name(manifest.step)
        with self._hold_folder():
            if (self.root / OWNER).read_text(encoding="utf-8") != self.token:
                raise ShoalError(
                    "another attempt of this run has taken over: this one publishes nothing more",
                    where=self.root,
                )
            if final.exists():  # done again after going back, or damaged
                final.rename(self.root / f".partial-old-{final.name}")
            aside.rename(final)
            sync(self.root)
            remove_old(self.root, self.keep, manifest.step)

    @contextmanager
    def _hold_folder(self) -> Iterator[None]:
        """Let one process at a time change which checkpoints there are."""
        deadline = time.monotonic() + self.timeout
        with (self.root / LOCK).open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise PreflightError(
                            "another process has been changing it for too long", where=self.root
                        ) from None
                    time.sleep(LOOK_SECONDS)
            yield


def _join(words: Sequence[dict[str, Any]], part: _Part) -> Manifest:
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
        for state in STATES:
            found, whole = tensors.get(name, {}).get(state), math.prod(shape)
            end = 0
            for piece in sorted(found.slices if found else (), key=lambda piece: piece.offset):
                end = end + piece.length if piece.offset == end else -1
            if end != whole:
                raise ShoalError(f"{state} of {name}: not every one of {whole} elements once")
    manifest = Manifest(schema_version=SCHEMA, files=files, tensors=tensors, **part.head)
    return manifest.model_copy(update={"digest": manifest.compute_digest()})


def save_checkpoint(
    engine: Engine, root: Path, *, step: int, position: dict[str, Any], run: dict[str, Any]
) -> Path:
    """Write the engine's whole state and wait for it; collective. Returns the published folder."""
    saver = Saver(root, keep=1 << 30)
    saver.begin(engine, step, position, run)
    saver.finish()
    return root / checkpoint_name(step)
