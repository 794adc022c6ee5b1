"""Going on from a checkpoint: all ranks choose, verify and load the same one together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from shoal.configs.errors import DataError
from shoal.configs.schema import RunConfig
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


def open_store(config: RunConfig, root: Path, timeout: float) -> SharedFolder:
    """Return where a run's checkpoints go, as its config says; collective.

    Args:
        config: Of the run.
        root: Local folder of its checkpoints.
        timeout: Seconds to wait for other ranks' files.
    """
    if config.checkpoint.folder:
        return Bucket(f"{config.checkpoint.folder.rstrip('/')}/{config.name}", root, timeout)
    if config.checkpoint.copies != "shared":
        return OwnDisks(root, timeout, every=config.checkpoint.copies == "every")
    return SharedFolder(root, timeout)


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
    there is brought from where it is sound, if the store can, or else passed over.

    Args:
        store: Of the run's own checkpoints.
        resume: `auto`, `never` (which its caller has made sure of), or a run or checkpoint.
        warn: Told of each that is passed over.
        progress: Of the watchdog.
        device: Of the ranks' collectives.

    Raises:
        DataError: all are damaged, or there is none where `resume` points; on all ranks.
    """

    def list_names(tick: Tick) -> list[str]:
        return store.list_names()

    listed = do_together(list_names, "looking for checkpoints", progress, device)
    own = sorted(set().union(*gather(listed)), reverse=True)
    folders = [store.root / name for name in own]
    if not own and resume not in ("auto", "never"):
        folders = do_together(
            lambda tick: list_candidates(store.root, resume), "looking", progress, device
        )
    problems = []
    for folder in folders:
        manifest, problem = _verify_together(store, folder, bool(own), progress, device)
        if problem is None and manifest:
            return folder, manifest
        problems.append(str(problem))
        warn(f"checkpoint passed over: {problem}")
    if problems:
        raise none_is_whole(store.root, problems)
    return None


def _verify_together(
    store: SharedFolder, folder: Path, own: bool, progress: Progress, device: torch.device
) -> tuple[Manifest | None, DataError | None]:
    """Return the manifest, and what is wrong with the checkpoint after all."""

    def verify_share(tick: Tick) -> tuple[Manifest | None, DataError | None]:
        try:
            manifest = read_manifest(folder)
            seat = store.neighbours.index(store.rank)
            for name in sorted(manifest.files)[seat :: len(store.neighbours)]:
                verify_file(folder / name, manifest.files[name], tick)
        except DataError as error:
            return None, error
        return manifest, None

    for attempt in range(2):
        manifest, problem = do_together(verify_share, f"verifying {folder.name}", progress, device)
        found = gather(problem)
        first = next((problem for problem in found if problem), None)
        if first is None or attempt or not own:
            break
        places = set(store.places)
        sound = places - {store.places[rank] for rank, problem in enumerate(found) if problem}
        mend = partial(store.mend, folder.name, sorted(sound))
        if not do_together(mend, f"bringing {folder.name}", progress, device):
            break
    return manifest, first


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
