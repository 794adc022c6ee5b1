"""Checkpoints without code and without topology: safetensors, an index, and a manifest of hashes.

A checkpoint is a folder `step-00000100` with one safetensors file a rank and `manifest.json`,
which lists for every file its size and SHA-256, and for every (parameter, state) the slices it is
stored in as (file, key, offset, length): any number of ranks and any ZeRO stage can read it.
Written aside, synced, renamed: a folder with this name is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from shoal.configs.errors import DataError
from shoal.configs.load import first_problem
from shoal.trainer.engine import STATES, Engine
from shoal.trainer.storage import digest

SCHEMA = 1
MANIFEST = "manifest.json"
BYTES_PER_PARAMETER = 4 * len(STATES)


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
    files: dict[str, StoredFile]
    tensors: dict[str, dict[str, StoredTensor]]
    digest: str = ""

    def compute_digest(self) -> str:
        """Return the SHA-256 of everything but the digest."""
        tree = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


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
    """Read and check a manifest.

    Raises:
        DataError: not a checkpoint of ours, of another schema, or altered.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("not a Shoal checkpoint: no manifest.json", where=folder) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None
    except UnicodeDecodeError:
        raise DataError("not a Shoal checkpoint manifest: not UTF-8", where=path) from None
    except ValidationError as error:
        raise DataError(
            f"not a Shoal checkpoint manifest: {first_problem(error)}", where=path
        ) from None
    if manifest.schema_version != SCHEMA:
        raise DataError(f"schema {manifest.schema_version}, this is schema {SCHEMA}", where=path)
    if manifest.digest != manifest.compute_digest():
        raise DataError("the manifest was altered: its digest does not match", where=path)
    return manifest


def verify_checkpoint(folder: Path) -> Manifest:
    """Check every file's size and hash; return the manifest.

    Raises:
        DataError: naming the file that is missing, truncated or altered.
    """
    manifest = read_manifest(folder)
    for name, fact in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DataError("checkpoint file is missing", where=path)
        if path.stat().st_size != fact.bytes:
            raise DataError(f"{path.stat().st_size} bytes, expected {fact.bytes}", where=path)
        try:
            found = digest(path)
        except OSError as error:  # a bad disk
            raise DataError(f"cannot be read: {error.strerror}", where=path) from None
        if found != fact.sha256:
            raise DataError("content was altered: SHA-256 does not match", where=path)
    return manifest


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
        raise DataError(
            "no checkpoint of this run is whole: " + "; ".join(problems),
            where=root,
            fix="restore a checkpoint, or start again under another name=",
        )
    return None


def find_checkpoint(
    root: Path, resume: str = "auto", warn: Callable[[str], object] | None = None
) -> tuple[Path, Manifest] | None:
    """Return what a run goes on from: its own newest checkpoint, or where it has none, another's.

    Args:
        root: Folder of the run's own checkpoints.
        resume: `auto`, `never` (which its caller has made sure of), or a run or checkpoint.
        warn: Told of each that is passed over as damaged.

    Raises:
        DataError: all are damaged, or there is none where `resume` points.
    """
    own = newest_checkpoint(root, warn)
    if own or resume in ("auto", "never"):
        return own
    given = Path(resume)
    if (given / MANIFEST).is_file():
        return given, verify_checkpoint(given)
    found = newest_checkpoint(given / "checkpoints", warn)
    if found is None:
        raise DataError("there is no checkpoint", where=given, fix="checkpoint.resume=auto")
    return found


def load_checkpoint(
    engine: Engine, folder: Path, manifest: Manifest, updates: int | None = None
) -> None:
    """Put a verified checkpoint into the engine; collective, any ranks and stage.

    `updates` says how many of its steps changed the weights; None: all.

    Raises:
        DataError: of another model; nothing was written.
    """
    stored = {name: states["weight"].shape for name, states in manifest.tensors.items()}
    if stored != engine.parameter_shapes:
        # By shape too: a slice of a smaller tensor would fit, silently, into a ZeRO-3 partition.
        odd = sorted(name for name, _ in stored.items() ^ engine.parameter_shapes.items())
        raise DataError(
            f"holds other parameters than the model: {', '.join(dict.fromkeys(odd[:5]))}",
            where=folder,
        )
    reader = TensorReader(folder, manifest)
    for name in engine.parameter_names:
        for state in STATES:
            engine.write_state(name, state, reader.read(name, state))
    engine.finish_writing(manifest.step if updates is None else updates)


class TensorReader:
    """Reassembles full tensors from the slices of a checkpoint."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._open: dict[str, Any] = {}

    def read(self, name: str, state: str = "weight") -> Tensor:
        """Return one full fp32 tensor on the CPU."""
        from safetensors import safe_open

        stored = self.manifest.tensors[name][state]
        flat = torch.empty(torch.Size(stored.shape).numel(), dtype=torch.float32)
        for piece in stored.slices:
            if piece.file not in self._open:
                self._open[piece.file] = safe_open(self.folder / piece.file, framework="pt")
            part = self._open[piece.file].get_tensor(piece.key).flatten()
            flat[piece.offset : piece.offset + piece.length] = part
        return flat.reshape(stored.shape)


def remove_old(root: Path, keep: int, newest: int) -> None:
    """Delete all but the newest `keep` checkpoints.

    `newest` is the step that was just saved. Folders of later steps were passed over as damaged
    when this run resumed: they must not count among those kept.
    """
    found = list_checkpoints(root)
    whole = [folder for folder in found if folder.name <= checkpoint_name(newest)]
    for folder in set(found) - set(whole[-keep:]):
        # Renamed first: a kill in the middle must not leave a broken folder under a good name.
        doomed = root / f".partial-old-{folder.name}"
        folder.rename(doomed)
    for leftover in root.glob(".partial-old-*"):
        shutil.rmtree(leftover, ignore_errors=True)
