"""Going on from a checkpoint: all ranks choose, verify and load the same one together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from shoal.configs.errors import DataError
from shoal.trainer.checkpoint import (
    Manifest,
    TensorReader,
    list_candidates,
    none_is_whole,
    read_manifest,
    verify_file,
)
from shoal.trainer.engine import Engine
from shoal.trainer.teamwork import CPU, Progress, Tick, do_together, gather

Found = tuple[Path, Manifest]


def find_checkpoint(
    root: Path,
    resume: str = "auto",
    warn: Callable[[str], object] = lambda text: None,
    progress: Progress = lambda doing: None,
    device: torch.device = CPU,
) -> Found | None:
    """Return the checkpoint that a run goes on from, verified, or None for a fresh start.

    Collective: rank 0 lists them, and every rank hashes a share of the files. A damaged one is
    passed over.

    Args:
        root: Folder of the run's own checkpoints.
        resume: `auto`, `never` (which its caller has made sure of), or a run or checkpoint.
        warn: Told of each that is passed over.
        progress: Of the watchdog.
        device: Of the ranks' collectives.

    Raises:
        DataError: all are damaged, or there is none where `resume` points; on all ranks.
    """

    def list_on_first(tick: Tick) -> list[Path]:
        return list_candidates(root, resume) if dist.get_rank() == 0 else []

    listed = do_together(list_on_first, "looking for checkpoints", progress, device)
    problems = []
    for folder in gather(listed)[0]:
        manifest, problem = _verify_together(folder, progress, device)
        if problem is None and manifest:
            return folder, manifest
        problems.append(str(problem))
        warn(f"checkpoint passed over: {problem}")
    if problems:
        raise none_is_whole(root, problems)
    return None


def _verify_together(
    folder: Path, progress: Progress, device: torch.device
) -> tuple[Manifest | None, DataError | None]:
    """Return the manifest, and what the first rank that found fault found."""

    def verify_share(tick: Tick) -> tuple[Manifest | None, DataError | None]:
        try:
            manifest = read_manifest(folder)
            share = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
            for name in share:
                verify_file(folder / name, manifest.files[name], tick)
        except DataError as error:
            return None, error
        return manifest, None

    manifest, own = do_together(verify_share, f"verifying {folder.name}", progress, device)
    return manifest, next((found for found in gather(own) if found), None)


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
