"""Checkpoints without code and without topology: safetensors, an index, and a manifest of hashes.

A checkpoint is a folder `step-00000100` with one safetensors file a rank and `manifest.json`,
which lists for every file its size and SHA-256, and for every (parameter, state) the slices it is
stored in as (file, key, offset, length): any number of ranks and any ZeRO stage can read it.
Written aside, synced, renamed: a folder with this name is whole.

Version 1 knew neither frozen parameters nor the validation loss; it is read as what it would be
today (`_modernise`).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator
from torch import Tensor

from shoal.configs.errors import DataError
from shoal.configs.load import first_problem
from shoal.trainer.optim import ADAM_STATES
from shoal.trainer.storage import digest
from shoal.trainer.teamwork import Tick

SCHEMA = 2
MANIFEST = "manifest.json"
BYTES_PER_PARAMETER = 4 * (1 + len(ADAM_STATES))


FileName = Annotated[str, StringConstraints(pattern=r"^rank-\d{5}(-[0-9a-f]+)?\.safetensors$")]


class StoredFile(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Slice(BaseModel):
    """A run of elements of one flattened tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    key: str
    offset: int
    length: int


class StoredTensor(BaseModel):
    """Where one (parameter, state) is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


class Manifest(BaseModel):
    """What a checkpoint holds; its own integrity is `digest` over all the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    step: int
    position: dict[str, Any]
    run: dict[str, Any]
    loss: float | None
    """On the validation rows after this step, nats per token, where it was measured."""
    files: dict[FileName, StoredFile]
    tensors: dict[str, dict[str, StoredTensor]]
    """By parameter, and what there is of it: a frozen one has a weight alone."""
    digest: str = ""

    def sealed(self) -> Manifest:
        """Return it with its digest, taken over what is written."""
        tree = json.loads(self.model_dump_json())
        return self.model_copy(update={"digest": _compute_digest(tree)})

    @model_validator(mode="after")
    def _names_its_files(self) -> Manifest:
        for states in self.tensors.values():
            for tensor in states.values():
                for piece in tensor.slices:
                    if piece.file not in self.files:
                        raise ValueError(f"a slice is in {piece.file}, which has no hash")
        return self


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, judging by names alone.

    Only a name that `checkpoint_name` gives counts: a user's copy beside it (step-00000050.bak) is
    no checkpoint, and no business of ours.
    """
    return sorted(root.glob("step-" + 8 * "[0-9]"))


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest of this version or an older one.

    Raises:
        DataError: not a checkpoint of ours, of a newer version, or altered.
    """
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), path)
    except FileNotFoundError:
        raise DataError("not a Shoal checkpoint: no manifest.json", where=folder) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None


def parse_manifest(data: bytes, path: object) -> Manifest:
    """Check the content of a manifest that was read from `path`, as `read_manifest` does."""
    try:
        tree = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError("not a Shoal checkpoint manifest: not UTF-8", where=path) from None
    except ValueError as error:
        raise DataError(f"not a Shoal checkpoint manifest: not JSON: {error}", where=path) from None
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if not isinstance(version, int) or version < 1:
        raise DataError("not a Shoal checkpoint manifest: no schema_version", where=path)
    if version > SCHEMA:
        raise DataError(
            f"was written by a newer Shoal (schema {version}); this one reads up to {SCHEMA}",
            where=path,
            fix="update Shoal",
        )
    try:
        manifest = Manifest.model_validate(_modernise(tree, version))
    except ValidationError as error:
        raise DataError(
            f"not a Shoal checkpoint manifest: {first_problem(error)}", where=path
        ) from None
    if manifest.digest != _compute_digest(tree):
        raise DataError("the manifest was altered: its digest does not match", where=path)
    return manifest


def _modernise(tree: dict[str, Any], version: int) -> dict[str, Any]:
    """Return the manifest of an older version as one of this version."""
    if version == 1:  # which had no loss
        tree = {"loss": None, **tree, "schema_version": 2}
    return tree


def _compute_digest(tree: dict[str, Any]) -> str:
    """Return the SHA-256 of everything in a manifest but its digest."""
    rest = {key: value for key, value in tree.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(folder: Path) -> Manifest:
    """Check every file's size and hash; return the manifest.

    Raises:
        DataError: naming the file that is missing, truncated or altered.
    """
    manifest = read_manifest(folder)
    for name, fact in manifest.files.items():
        verify_file(folder / name, fact)
    return manifest


def verify_file(path: Path, fact: StoredFile, tick: Tick = lambda: None) -> None:
    """Check one file's size and hash.

    Raises:
        DataError: it is missing, truncated or altered.
    """
    if not path.is_file():
        raise DataError("checkpoint file is missing", where=path)
    if path.stat().st_size != fact.bytes:
        raise DataError(f"{path.stat().st_size} bytes, expected {fact.bytes}", where=path)
    try:
        found = digest(path, tick)
    except OSError as error:  # a bad disk
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None
    if found != fact.sha256:
        raise DataError("content was altered: SHA-256 does not match", where=path)


def newest_checkpoint(
    root: Path, warn: Callable[[str], object] | None = None
) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that verifies, or None where there is none at all.

    A damaged one is passed over with a warning; if all are damaged that is an error, since
    starting from scratch would silently lose the run.
    """
    problems = []
    for folder in reversed(list_checkpoints(root)):
        try:
            return folder, verify_checkpoint(folder)
        except DataError as error:
            problems.append(str(error))
            if warn:
                warn(f"checkpoint passed over: {error}")
    if problems:
        raise none_is_whole(root, problems)
    return None


def none_is_whole(root: Path, problems: Sequence[str]) -> DataError:
    """Return the error of a run whose every checkpoint is damaged."""
    return DataError(
        "no checkpoint of this run is whole: " + "; ".join(problems),
        where=root,
        fix="restore a checkpoint, or start again under another name=",
    )


def list_candidates(root: Path, resume: str = "auto") -> list[Path]:
    """Return what a run may go on from, best first: its own checkpoints, else another's.

    Args:
        root: Folder of the run's own checkpoints.
        resume: `auto`, `never` (which its caller has made sure of), or a run or checkpoint.

    Raises:
        DataError: there is none where `resume` points.
    """
    own = list_checkpoints(root)[::-1]
    if own or resume in ("auto", "never"):
        return own
    given = Path(resume)
    if (given / MANIFEST).is_file():
        return [given]
    found = list_checkpoints(given / "checkpoints")[::-1]
    if not found:
        raise DataError("there is no checkpoint", where=given, fix="checkpoint.resume=auto")
    return found


class TensorReader:
    """Reassembles full tensors, or runs of their elements, from the slices of a checkpoint."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._open: dict[str, Any] = {}

    def read(self, name: str, state: str = "weight") -> Tensor:
        """Return one full fp32 tensor on the CPU."""
        shape = self.manifest.tensors[name][state].shape
        return self.read_run(name, state, 0, math.prod(shape)).reshape(shape)

    def read_run(self, name: str, state: str, offset: int, length: int) -> Tensor:
        """Return so many elements of one flattened tensor, fp32, on the CPU."""
        from safetensors import safe_open

        run = torch.empty(length, dtype=torch.float32)
        for piece in self.manifest.tensors[name][state].slices:
            first = max(offset, piece.offset)
            last = min(offset + length, piece.offset + piece.length)
            if first >= last:
                continue
            if piece.file not in self._open:
                self._open[piece.file] = safe_open(self.folder / piece.file, framework="pt")
            stored = self._open[piece.file].get_slice(piece.key)
            run[first - offset : last - offset] = stored[first - piece.offset : last - piece.offset]
        return run


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is there."""

    newest: int
    """So many of the newest."""
    milestone_every: int | None = None
    """Those of every so many steps stay for good."""
    best: bool = False
    """So does the one with the lowest validation loss, until a better one is there."""

    def choose(self, losses: Mapping[int, float | None], newest: int) -> set[int]:
        """Return the steps to keep.

        Args:
            losses: Validation loss of every checkpoint, by step.
            newest: The step that was just saved. Later ones were passed over as damaged when this
                run resumed: they must not count among those kept.
        """
        steps = sorted(step for step in losses if step <= newest)
        kept = set(steps[-self.newest :])
        if self.milestone_every:
            kept |= {step for step in steps if step % self.milestone_every == 0}
        measured = [(loss, -step) for step in steps if (loss := losses[step]) is not None]
        if self.best and measured:
            kept.add(-min(measured)[1])
        return kept


def checkpoint_step(name: str) -> int:
    """Return the step of a checkpoint's name."""
    return int(name.removeprefix("step-"))


def remove_old(root: Path, rule: Retention, newest: int) -> None:
    """Delete the checkpoints of a folder that `rule` does not keep."""
    found = {checkpoint_step(folder.name): folder for folder in list_checkpoints(root)}
    losses = {step: read_loss(folder) if rule.best else None for step, folder in found.items()}
    for step in found.keys() - rule.choose(losses, newest):
        # Renamed first: a kill in the middle must not leave a broken folder under a good name.
        found[step].rename(root / f".partial-old-{found[step].name}")
    for leftover in root.glob(".partial-old-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def read_loss(folder: Path) -> float | None:
    """Return the validation loss of a checkpoint, None where none was measured or it is damaged."""
    try:
        return read_manifest(folder).loss
    except DataError:
        return None
