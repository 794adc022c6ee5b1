"""The folder of a run: where it is, and what it says."""

from __future__ import annotations

from pathlib import Path

from shoal.configs.errors import ConfigError, DataError
from shoal.configs.load import build_config, read_tree
from shoal.configs.schema import RunConfig

CONFIG_FILE = "config.yaml"
DIVERGED = "diverged.txt"


def run_folder(config: RunConfig) -> Path:
    """Return where a run lives."""
    return Path(config.output) / config.name


def is_complete(folder: Path, config: RunConfig) -> bool:
    """Return whether a run has its last checkpoint, whole; a damaged one is trained again."""
    from shoal.trainer.checkpoint import checkpoint_name, verify_checkpoint

    last = folder / "checkpoints" / checkpoint_name(config.steps)
    try:
        verify_checkpoint(last)
    except DataError:
        return False
    return True


def has_diverged(folder: Path) -> bool:
    """Return whether a run was a trial that ended in a loss that is not a number."""
    return (folder / DIVERGED).is_file()


def read_run(folder: Path) -> RunConfig:
    """Read the resolved config of a run folder."""
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError("not a run: it has no config.yaml", where=folder, fix="shoal runs")
    return build_config(RunConfig, read_tree(folder / CONFIG_FILE), where=folder / CONFIG_FILE)


def check_may_begin(config: RunConfig) -> None:
    """Refuse a start that must be a fresh one where there is something to go on from.

    Raises:
        ConfigError: checkpoint.resume is `never` and there is a checkpoint.
    """
    from shoal.trainer.checkpoint import list_checkpoints
    from shoal.trainer.objects import list_published

    if config.checkpoint.resume != "never":
        return
    root: object = run_folder(config) / "checkpoints"
    held: list[object] = [*list_checkpoints(run_folder(config) / "checkpoints")]
    if config.checkpoint.folder:
        root = f"{config.checkpoint.folder.rstrip('/')}/{config.name}"
        held += list_published(str(root))
    if held:
        raise ConfigError(
            "there are checkpoints, and checkpoint.resume=never",
            where=root,
            fix="give another name=, or checkpoint.resume=auto to go on from them",
        )
