"""Whole folders to object storage and back, so that what is there in part does not count.

Objects cannot be renamed: a folder is there when its manifest is, which is sent last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from itertools import groupby
from pathlib import Path, PurePosixPath

from shoal.configs.errors import DataError
from shoal.data_pipeline.files import FileFacts, explain, find_files, reach, redact

_FILES_AT_ONCE = 16

Told = Callable[[int], None]
"""Receives the bytes of files that have arrived."""


def _tell_nobody(size: int) -> None:
    """Report bytes to nobody."""


def upload_folder(
    folder: Path,
    url: str,
    last: Collection[str] = ("manifest.json",),
    told: Told = _tell_nobody,
) -> None:
    """Put the files below a folder under a URL; hidden ones are left out.

    Args:
        folder: What to send.
        url: Prefix that receives it; objects of the same names there are replaced.
        last: Names of files that are sent when all others are there in full size; of these, one
            that lies deeper goes first.
        told: Told of the bytes sent, now and then.

    Raises:
        DataError: the storage cannot be reached, refuses, or shows other sizes afterwards.
        ConfigError, PreflightError: as for any URL.
    """
    names = [
        file.relative_to(folder)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    ]
    names.sort(key=lambda name: _rank(name, last))
    for _, group in groupby(names, key=lambda name: _rank(name, last)):
        sizes = {name.as_posix(): (folder / name).stat().st_size for name in group}
        _send(folder, url, sizes, told)
        there = {file.name: file.bytes for file in find_files(url).files}
        for name, size in sizes.items():
            if there.get(name) != size:
                cause = f"{there.get(name, 'no')} bytes arrived of {size}"
                raise DataError(cause, where=redact(f"{url}/{name}"))


def _rank(name: Path, last: Collection[str]) -> int:
    """Return the turn of a file: all others, then the last ones, from the deepest up."""
    return 100 - len(name.parts) if name.name in last else 0


def _send(folder: Path, url: str, sizes: dict[str, int], told: Told) -> None:
    with explain(url):
        fs, base = reach(url)
        names = list(sizes)
        for start in range(0, len(names), _FILES_AT_ONCE):
            some = names[start : start + _FILES_AT_ONCE]
            fs.put([str(folder / name) for name in some], [f"{base}/{name}" for name in some])
            told(sum(sizes[name] for name in some))


def download_folder(url: str, folder: Path, told: Told = _tell_nobody) -> None:
    """Get everything below a URL as a folder, which appears whole or not at all.

    Args:
        url: Prefix to get.
        folder: Must not be there, or be empty.
        told: Told of the bytes received, now and then.

    Raises:
        DataError: nothing there, the storage cannot be reached, a file arrives short, or its name
            leads out of the folder.
        OSError: the disk is full, or `folder` is not empty.
    """
    found = find_files(url).files
    if not found:
        raise DataError("nothing is there", where=redact(url))
    for file in found:
        if PurePosixPath(file.name).is_absolute() or ".." in PurePosixPath(file.name).parts:
            raise DataError(f"a name leads out of the folder: {file.name!r}", where=redact(url))
    aside = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for start in range(0, len(found), _FILES_AT_ONCE):
            _receive(url, found[start : start + _FILES_AT_ONCE], aside)
            told(sum(file.bytes for file in found[start : start + _FILES_AT_ONCE]))
        for path in (aside, *aside.rglob("*")):
            _sync(path)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sync(folder.parent)


def _receive(url: str, files: tuple[FileFacts, ...], aside: Path) -> None:
    targets = [aside / file.name for file in files]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    with explain(url):
        fs, _ = reach(url)
        fs.get([fs._strip_protocol(file.path) for file in files], [str(t) for t in targets])
    for file, target in zip(files, targets, strict=True):
        size = target.stat().st_size if target.is_file() else 0
        if size != file.bytes:
            raise DataError(f"{size} bytes arrived of {file.bytes}", where=redact(file.path))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
