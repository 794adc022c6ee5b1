"""Checkpoints of one run in object storage, by fsspec.

Objects cannot be renamed, so a checkpoint is there when its manifest is. What one attempt writes
has its token in all names: two attempts never write one object, and a manifest whose files are gone
(its attempt was taken over meanwhile) counts for nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.configs.errors import ConfigError, DataError, PreflightError
from shoal.trainer.aside import ELSEWHERE
from shoal.trainer.checkpoint import MANIFEST, Manifest, parse_manifest
from shoal.trainer.storage import sync, write_durable
from shoal.trainer.stores import drop_fetched, replace_folder
from shoal.trainer.teamwork import Tick

_NAME = re.compile(r"step-\d{8}")
_MANIFEST = re.compile(r"manifest(?:-([0-9a-f]+))?\.json")


class Objects:
    """What lies under one address."""

    def __init__(self, url: str) -> None:
        """Name the address; nothing is asked of it yet.

        Raises:
            ConfigError: no such kind of address.
            PreflightError: its driver is not installed.
        """
        self.url = url
        self.fs, self.base = _open(url)

    def find(self) -> dict[str, dict[str, int]]:
        """Return the bytes of every file, by name of the checkpoint, oldest first, and of the file.

        Also of what has no manifest.
        """
        found: dict[str, dict[str, int]] = {}
        for path, facts in self.fs.find(self.base, detail=True).items():
            folder, _, file = path.rpartition("/")
            above, _, name = folder.rpartition("/")
            if above == self.base and _NAME.fullmatch(name):
                found.setdefault(name, {})[file] = facts["size"]
        return dict(sorted(found.items()))

    def list_published(self) -> list[str]:
        """Return the names of the checkpoints there, oldest first."""
        return [name for name, files in self.find().items() if choose_manifest(files)]

    def read_manifest(self, name: str) -> Manifest:
        """Read the manifest of a checkpoint, and see that its files are there.

        Raises:
            DataError: there is none, it was altered, or a file is missing or cut short.
        """
        files = self.find().get(name, {})
        manifest = parse_manifest(self._read_bytes(name, files), f"{self.url}/{name}")
        for file, fact in manifest.files.items():
            where = f"{self.url}/{name}/{file}"
            if file not in files:
                raise DataError("checkpoint file is missing", where=where)
            if files[file] != fact.bytes:
                raise DataError(f"{files[file]} bytes, expected {fact.bytes}", where=where)
        return manifest

    def _read_bytes(self, name: str, files: Collection[str]) -> bytes:
        file = choose_manifest(files)
        if file is None:
            raise DataError("not a Shoal checkpoint: no manifest", where=f"{self.url}/{name}")
        try:
            return bytes(self.fs.cat_file(f"{self.base}/{name}/{file}"))
        except FileNotFoundError:
            raise DataError("is gone", where=f"{self.url}/{name}/{file}") from None

    def upload(self, file: Path, name: str, tick: Tick) -> None:
        """Put one file of a checkpoint there."""
        folder = f"{self.base}/{name}"
        self.fs.makedirs(folder, exist_ok=True)
        self.fs.put_file(str(file), f"{folder}/{file.name}", callback=_listen(tick))

    def download(self, name: str, files: Iterable[str], aside: Path, tick: Tick) -> None:
        """Get some files of a checkpoint into a folder.

        Raises:
            DataError: one is gone.
        """
        for file in files:
            path = f"{self.base}/{name}/{file}"
            try:
                self.fs.get_file(path, str(aside / file), callback=_listen(tick))
            except FileNotFoundError:
                raise DataError("is gone", where=f"{self.url}/{name}/{file}") from None
            sync(aside / file)
            tick()

    def settle(self, aside: Path, name: str) -> None:
        """Give a folder with all files of a checkpoint its name; others fetched before it go."""
        root = aside.parent
        (aside / MANIFEST).write_bytes(self._read_bytes(name, self.find().get(name, {})))
        sync(aside / MANIFEST)
        write_durable(aside / ELSEWHERE, f"{self.url}/{name}")
        replace_folder(aside, root / name)
        drop_fetched(root, name)

    def fetch(self, name: str, root: Path) -> None:
        """Bring a whole checkpoint into the folder of a run, where no ranks are at work.

        Raises:
            DataError: it is not whole.
        """
        aside = root / f".partial-{name}-fetched"
        shutil.rmtree(aside, ignore_errors=True)
        manifest = self.read_manifest(name)
        aside.mkdir(parents=True)
        self.download(name, sorted(manifest.files), aside, lambda: None)
        self.settle(aside, name)

    def remove(self, name: str, files: Collection[str]) -> None:
        """Remove files of a checkpoint, its manifest first."""
        folder = f"{self.base}/{name}"
        first = [file for file in files if _MANIFEST.fullmatch(file)]
        for file in first:
            self.fs.rm_file(f"{folder}/{file}")
        if rest := [f"{folder}/{file}" for file in files if file not in first]:
            self.fs.rm(rest)
        with suppress(Exception):  # where there are folders, and this one is empty
            self.fs.rmdir(folder)


def list_published(url: str) -> list[str]:
    """Return the names of the checkpoints of a run under an address, oldest first.

    Raises:
        ConfigError, PreflightError: as for `Objects`.
    """
    return Objects(url).list_published()


def choose_manifest(files: Collection[str]) -> str | None:
    """Return which of the files of a checkpoint is its manifest, if it is there at all."""
    chosen = None
    for file in sorted(files):
        match = _MANIFEST.fullmatch(file)
        if match and (match[1] is None or f"rank-00000-{match[1]}.safetensors" in files):
            chosen = file
    return chosen


def find_leftovers(files: Collection[str]) -> list[str]:
    """Return those of the files under the name of a checkpoint that do not belong to it."""
    chosen = choose_manifest(files)
    if chosen == MANIFEST:  # copied there by somebody
        return []
    own = chosen.removeprefix("manifest").removesuffix(".json") if chosen else None
    return [
        file
        for file in files
        if file != chosen and not (own and file.endswith(f"{own}.safetensors"))
    ]


def _listen(tick: Tick) -> Any:
    """Return what lets a driver tell that it gets further with a file."""
    from fsspec.callbacks import Callback

    return Callback(hooks={"tick": lambda *_, **__: tick()})


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, base = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise PreflightError(
            f"the driver of this address is not installed: {error}",
            where=url,
            fix="pip install 's3fs' (s3://), 'gcsfs' (gs://) or 'adlfs' (abfs://)",
        ) from None
    except ValueError as error:
        raise ConfigError(str(error), where=url, fix="s3://bucket/prefix, for example") from None
    return fs, base.rstrip("/")
