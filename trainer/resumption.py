"""Going on from a checkpoint: all ranks choose, verify and load the same one together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from shoal.configs.errors import DataError
from shoal.configs.schema import RunConfig
from shoal.trainer.aside import REFUSED_VARIABLE, note_resumed
from shoal.trainer.bucket import Bucket
from shoal.trainer.checkpoint import (
    Manifest,
    TensorReader,
    list_candidates,
    none_is_whole,
    read_manifest,
    verify_file,
)
from shoal.trainer.disks import OwnDisks
from shoal.trainer.engine import Engine
from shoal.trainer.stores import SharedFolder
from shoal.trainer.teamwork import Progress, Tick, do_together, gather

Found = tuple[Path, Manifest]
_Seen = tuple[Manifest | None, DataError | None, str | None]
"""A rank's manifest, what is wrong with its copy, and the digest of the one that is meant."""


def open_store(config: RunConfig, root: Path, timeout: float) -> SharedFolder:
    """Return where a run's checkpoints go, as its config says; collective.

    Args:
        config: Of the run.
        root: Local folder of its checkpoints.
        timeout: Seconds to wait for other ranks' files.
    """
    kept = config.checkpoint
    store: SharedFolder
    if kept.folder:
        store = Bucket(f"{kept.folder.rstrip('/')}/{config.name}", root, timeout)
    elif kept.copies != "shared":
        store = OwnDisks(root, timeout, every=kept.copies == "every")
    else:
        store = SharedFolder(root, timeout)
    store.refused = os.environ.get(REFUSED_VARIABLE, "")
    return store


def find_checkpoint(
    store: SharedFolder,
    resume: str = "auto",
    warn: Callable[[str], object] = lambda text: None,
    progress: Progress = lambda doing: None,
    *,
    device: torch.device,
) -> Found | None:
    """Return the checkpoint that a run goes on from, verified, or None for a fresh start.

    Collective: ranks that see one folder share the hashing of its files. What is damaged or not
    there, or another than on the first host that has it, is brought from where it is sound, if the
    store can, or else passed over. One that the store refuses is left out.

    Args:
        store: Of the run's own checkpoints.
        resume: `auto`, `never` (which its caller has made sure of), or a run or checkpoint.
        warn: Told of each that is passed over.
        progress: Of the watchdog.
        device: Of the ranks' collectives.

    Raises:
        DataError: all are damaged, or there is none where `resume` points; on all ranks.
    """

    folders, is_own = _list_folders(store, resume, progress, device)
    problems = []
    for folder in folders:
        manifest, problem = _verify_together(store, folder, is_own, progress, device)
        if problem is None and manifest:
            _note(store, folder.name if is_own else "")
            return folder, manifest
        problems.append(str(problem))
        warn(f"checkpoint passed over: {problem}")
    if problems:
        raise none_is_whole(store.root, problems)
    _note(store, "")
    return None


def _list_folders(
    store: SharedFolder, resume: str, progress: Progress, device: torch.device
) -> tuple[list[Path], bool]:
    """Return what the run may go on from, best first, and whether that is its own."""

    def list_names(tick: Tick) -> tuple[list[str], list[str]]:
        names = store.list_names()
        return names, [name for name in names if name != store.refused]

    listed = gather(do_together(list_names, "looking for checkpoints", progress, device))
    own = sorted({name for _, left in listed for name in left}, reverse=True)
    if not own and any(names for names, _ in listed):
        raise DataError(
            f"training from {store.refused} has failed twice, and there is no older checkpoint",
            where=store.root,
            fix="see to the cause of the failure; the same command then goes on from it",
        )
    if own or resume in ("auto", "never"):
        return [store.root / name for name in own], True
    return do_together(
        lambda tick: list_candidates(store.root, resume), "looking", progress, device
    ), False


def _note(store: SharedFolder, name: str) -> None:
    if store.place == store.rank:
        note_resumed(store.root, name)


def _verify_together(
    store: SharedFolder, folder: Path, own: bool, progress: Progress, device: torch.device
) -> tuple[Manifest | None, DataError | None]:
    """Return the manifest, and what is wrong with the checkpoint after all."""
    for attempt in range(2):
        look = partial(_look, store, folder, own)
        manifest, problem, wanted = do_together(look, f"verifying {folder.name}", progress, device)
        seen = gather((manifest.digest if manifest else None, problem, wanted))
        problems = _compare(seen, store.places, folder)
        first = next((problem for problem in problems if problem), None)
        bad = {store.places[rank] for rank, problem in enumerate(problems) if problem}
        sound = sorted(set(store.places) - bad)
        if first is None or attempt or not own or not store.can_mend(sound):
            break
        bring = partial(_bring, store, folder.name, sound)
        lacking = gather(do_together(bring, f"bringing {folder.name}", progress, device))
        if first := next((problem for problem in lacking if problem), None):
            break
    return manifest, first


def _look(store: SharedFolder, folder: Path, own: bool, tick: Tick) -> _Seen:
    """Verify this rank's share of the files; rank 0 also says which checkpoint is meant."""
    wanted = None
    try:
        if own and store.rank == 0:
            wanted = store.read_digest(folder.name)
        manifest = read_manifest(folder)
        seat = store.neighbours.index(store.rank)
        for name in sorted(manifest.files)[seat :: len(store.neighbours)]:
            verify_file(folder / name, manifest.files[name], tick)
    except DataError as error:
        return None, error, wanted
    return manifest, None, wanted


def _compare(
    seen: Sequence[tuple[str | None, DataError | None, str | None]],
    places: Sequence[int],
    folder: Path,
) -> list[DataError | None]:
    """Return what is wrong with each rank's copy: hosts may hold two checkpoints of one step."""
    bad = {places[rank] for rank, (_, problem, _) in enumerate(seen) if problem}
    whole = (digest for rank, (digest, _, _) in enumerate(seen) if places[rank] not in bad)
    wanted = seen[0][2] or next(whole, None)
    other = DataError("is another checkpoint of this step than the one to go on from", where=folder)
    return [problem or (other if digest != wanted else None) for digest, problem, _ in seen]


def _bring(store: SharedFolder, name: str, sound: Sequence[int], tick: Tick) -> DataError | None:
    try:
        store.mend(name, sound, tick)
    except DataError as error:
        return error
    return None


def load_checkpoint(
    engine: Engine,
    folder: Path,
    manifest: Manifest,
    updates: int | None = None,
    progress: Progress = lambda doing: None,
) -> None:
    """Put a verified checkpoint into the engine; collective, any ranks and stage.

    Every rank reads the slices it holds, no more.

    Args:
        engine: Of the same model and optimiser.
        folder: The checkpoint.
        manifest: Its manifest.
        updates: How many of its steps changed the weights; None: all.
        progress: Of the watchdog.

    Raises:
        DataError: of another model or optimiser; nothing was written.
    """
    _check_fits(engine, folder, manifest)
    reader = TensorReader(folder, manifest)

    def fill(tick: Tick) -> None:
        for name, state, offset, values in engine.held_slices():
            values.copy_(reader.read_run(name, state, offset, values.numel()))
            tick()

    do_together(fill, f"loading {folder.name}", progress, engine.device)
    engine.finish_writing(manifest.step if updates is None else updates)


def _check_fits(engine: Engine, folder: Path, manifest: Manifest) -> None:
    # By shape too: a slice of a smaller tensor would fit, silently, into a ZeRO-3 partition.
    stored = {name: states["weight"].shape for name, states in manifest.tensors.items()}
    odd = {name for name, _ in stored.items() ^ engine.parameter_shapes.items()}
    if odd:
        raise DataError(
            f"holds other parameters than the model: {', '.join(sorted(odd)[:5])}", where=folder
        )
    for name, states in engine.parameter_states.items():
        if set(states) != manifest.tensors[name].keys():
            raise DataError(
                f"holds other states of {name} ({', '.join(sorted(manifest.tensors[name]))}) than "
                f"are trained here ({', '.join(sorted(states))})",
                where=folder,
                fix="freeze the same parameters and use the same optimiser as when it was saved",
            )
