"""The output of `prepare`: who may work on it, whether it is finished, and how it gets its name."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shoal.configs.corpus import PrepareConfig
from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.files import is_url
from shoal.data_pipeline.manifest import (
    MANIFEST,
    TOKENIZER,
    check_tokenizer,
    read_manifest,
)
from shoal.data_pipeline.pieces import TRAIN, VALIDATION
from shoal.data_pipeline.proof import verify
from shoal.data_pipeline.provenance import STATS, settled_config
from shoal.data_pipeline.receipts import fetch_receipt, receipt_folder, send_corpus
from shoal.data_pipeline.stages import Progress

_GONE = ".gone"


@dataclass(frozen=True)
class Prepared:
    """Where a prepared corpus lies.

    Of one behind a URL the paths are those of its receipt, which holds no shards.
    """

    output: Path
    tokenizer: Path
    train: Path
    validation: Path | None
    built: bool = False
    """Whether this call made it; False: it was there."""
    url: str | None = None


def split_names(config: PrepareConfig) -> list[str]:
    """Return the splits a corpus has."""
    held_out = config.validation or config.validation_share
    return [TRAIN, VALIDATION] if held_out else [TRAIN]


def output_folder(config: PrepareConfig) -> Path:
    """Return the folder of the output; of a URL that of its receipt."""
    given = config.output
    return receipt_folder(given) if is_url(given) else Path(given)


def locate(config: PrepareConfig, output: Path, built: bool = False) -> Prepared:
    """Say where things lie in an output."""
    validation = output / VALIDATION if VALIDATION in split_names(config) else None
    url = config.output if is_url(config.output) else None
    return Prepared(output, output / TOKENIZER, output / TRAIN, validation, built, url)


def is_done(config: PrepareConfig, output: Path, key: str) -> bool:
    """Whether the output holds what the config asks for; anything else there is refused."""
    url = config.output if is_url(config.output) else None
    if url and not fetch_receipt(url, split_names(config), output):
        return False
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / TRAIN / MANIFEST).is_file():
        raise ConfigError(
            "exists and holds no prepared corpus",
            where=output,
            fix="choose another output=..., or remove it",
        )
    found = read_manifest(output / TRAIN)
    if found.prepare_key == key:
        _check_complete(config, output)
        return True
    old, new = found.config, settled_config(config)
    files = "the files of the tokenizer or a source" if config.tokenizer.path else "a source file"
    changed = [name for name in new if old.get(name) != new[name]] or [files]
    raise ConfigError(
        f"holds shards of another corpus: {', '.join(changed)} changed since",
        where=url or output,
        fix=f"choose another output=..., or remove the old one: {url or f'rm -r {output}'}",
    )


def _check_complete(config: PrepareConfig, output: Path) -> None:
    """Refuse a corpus with a folder removed or its tokenizer replaced.

    Preparing again would find it done and not bring them back.
    """
    prepared = locate(config, output)
    for folder in (prepared.tokenizer, prepared.train, prepared.validation):
        if folder is not None and not folder.is_dir():
            raise DataError(
                "is missing from a corpus that was prepared",
                where=folder,
                fix=f"remove the rest and prepare it again: rm -r {output}",
            )
    check_tokenizer(prepared.train, read_manifest(prepared.train))


@contextlib.contextmanager
def hold_lock(output: Path, progress: Progress) -> Iterator[None]:
    """Let one process prepare an output at a time; the others wait and find it done."""
    with (output.parent / f".{output.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait for another process that prepares this corpus", 0, None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def name_output(output: Path) -> Iterator[None]:
    """Name the output in system errors that name no file, as a write to a full disk does."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(output)
        raise


def remove_stale(output: Path, work: Path) -> None:
    """Remove unfinished work on other versions of this output."""
    for folder in output.parent.glob(f".partial-{output.name}-" + "[0-9a-f]" * 16):
        if folder.name != work.name:
            shutil.rmtree(folder)


def name_stale(work: str) -> str:
    """Return a name for work that is not to be gone on with: the next run removes it."""
    return work[:-16] + "0" * 16


def publish(config: PrepareConfig, work: Path, output: Path, progress: Progress) -> None:
    """Prove the finished folder, make it durable or send it, and give it its name.

    Raises:
        DataError: a file is damaged. What it belongs to is removed, or it would be found done, and
            refused, for ever; it can be made again, since all else is kept until all is proven.
    """
    for name in (TRAIN, VALIDATION):
        if (work / name).is_dir():
            _prove(work, name)
    for path in list(work.iterdir()):
        if path.name not in (TOKENIZER, TRAIN, VALIDATION, STATS):
            _remove(path)
    if is_url(config.output):
        progress("upload", 0, None)
        send_corpus(work, config.output)
    for folder in (*(f for f in work.iterdir() if f.is_dir()), work):
        sync_folder(folder)
    work.rename(output)
    sync_folder(output.parent)


def _prove(work: Path, name: str) -> None:
    """Verify a split; remove it, or the tokenizer, if that is damaged."""
    try:
        verify(work / name)
    except DataError as error:
        damaged = [name, f"{name}.plan"]  # the files of the plan are the same ones
        if error.where == str(work / TOKENIZER):
            damaged = [TOKENIZER]
        for path in damaged:
            if (work / path).is_dir():
                _remove(work / path)
        raise DataError(
            f"was damaged before it was published: {error.cause}",
            where=error.where,
            fix=f"prepare again, which makes only {damaged[0]} anew (it was removed); if that "
            "happens again, check disk and memory",
        ) from None


def _remove(path: Path) -> None:
    """Remove a part of the work; of a folder never a part, which might pass for the whole."""
    if path.is_dir() and path.suffix != _GONE:
        gone = path.with_name(path.name + _GONE)
        if gone.is_dir():
            shutil.rmtree(gone)
        path = path.rename(gone)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a folder and the files in it durable."""
    for path in (*(p for p in folder.iterdir() if p.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
