"""Checkpoints in object storage, by fsspec: the manifest goes last and comes away first.

Objects cannot be renamed, so a checkpoint is there when its manifest is. Every attempt's files have
names of their own: what an attempt that was cut off still uploads belongs to no manifest.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from shoal.configs.errors import ConfigError, PreflightError, ShoalError
from shoal.trainer.checkpoint import (
    MANIFEST,
    Manifest,
    Retention,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    parse_manifest,
)
from shoal.trainer.storage import sync, write_text
from shoal.trainer.stores import ELSEWHERE, OWNER, SharedFolder, Word, find_places, wait_for
from shoal.trainer.teamwork import Progress, Tick, do_together, raise_together

_NAME = re.compile(r"step-\d{8}")


class Bucket(SharedFolder):
    """Objects under one address; `root` of every host is where files are written aside."""

    def __init__(self, url: str, root: Path, timeout: float = 600) -> None:
        """Name the address.

        Args:
            url: Such as s3://bucket/prefix/run; credentials are what its fsspec driver looks for.
            root: Local folder of the run's checkpoints.
            timeout: Seconds to wait for other ranks' files.

        Raises:
            ConfigError: no such kind of address.
            PreflightError: its driver is not installed.
        """
        super().__init__(root, timeout)
        self.url = url
        self.fs, self.base = _open(url)

    @property
    def file_name(self) -> str:
        """The name of this rank's file, which no other attempt uses."""
        return f"rank-{self.rank:05d}-{self.token}.safetensors"

    def claim(self, token: str) -> None:
        """Take over; collective. Removes what belongs to no checkpoint.

        Raises:
            PreflightError: it cannot be written.
        """
        self.token = token
        self.places = find_places(self.root, token)
        if self.place == self.rank:
            for leftover in self.root.glob(".partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        raise_together(self._take_bucket() if self.rank == 0 else None)

    def _take_bucket(self) -> PreflightError | None:
        """Become its owner; return what keeps this rank from it."""
        try:
            self.fs.makedirs(self.base, exist_ok=True)
            self.fs.pipe_file(f"{self.base}/{OWNER}", self.token.encode())
            for name in self._list_folders():
                self._clean(name)
            here = list_checkpoints(self.root)
            if here and not self._list_published():
                return PreflightError(
                    f"has no checkpoint of this run, and {self.root} has: {here[-1].name}",
                    where=self.url,
                    fix="copy the folders step-* there to go on from them, or take another name=",
                )
        except Exception as error:  # every driver has its own
            return PreflightError(
                f"cannot be written: {type(error).__name__}: {error}",
                where=self.url,
                fix="check checkpoint.folder and the credentials on every host",
            )
        return None

    def hand_in(
        self, aside: Path, file: str, word: Word, wanted: Callable[[], bool]
    ) -> list[Word] | None:
        """Upload this rank's file and what it says of it; rank 0 collects what all say."""
        folder = (
            f"{self.base}/{aside.name.removeprefix('.partial-').removesuffix('-' + self.token)}"
        )
        self.fs.makedirs(folder, exist_ok=True)
        self.fs.put_file(str(aside / file), f"{folder}/{file}")
        (aside / file).unlink()
        names = [f"rank-{rank:05d}-{self.token}.json" for rank in range(self.ranks)]
        self.fs.pipe_file(f"{folder}/{names[self.rank]}", json.dumps(word).encode())
        if self.rank:
            return None
        wait_for(
            names, lambda name: self.fs.exists(f"{folder}/{name}"), wanted, self.timeout, folder
        )
        return [json.loads(self.fs.cat_file(f"{folder}/{name}")) for name in names]

    def publish(self, aside: Path, manifest: Manifest, rule: Retention) -> None:
        """Put the manifest, and remove what is too old; only the owner may.

        Raises:
            ShoalError: another attempt owns the place.
        """
        shutil.rmtree(aside, ignore_errors=True)
        if self.fs.cat_file(f"{self.base}/{OWNER}").decode() != self.token:
            raise ShoalError(
                "another attempt of this run has taken over: this one publishes nothing more",
                where=self.url,
            )
        name = checkpoint_name(manifest.step)
        self.fs.pipe_file(f"{self.base}/{name}/{MANIFEST}", manifest.model_dump_json().encode())
        write_text(self.root / ELSEWHERE, f"{self.url}/{name}")
        self._clean(name)
        held = {checkpoint_step(name): self._read(name) for name in self._list_published()}
        kept = rule.choose({step: found.loss for step, found in held.items()}, manifest.step)
        for step in held.keys() - kept:
            folder = f"{self.base}/{checkpoint_name(step)}"
            self.fs.rm_file(f"{folder}/{MANIFEST}")
            self.fs.rm(folder, recursive=True)

    def list_names(self) -> list[str]:
        """Return the names of what is there, on rank 0."""
        return self._list_published() if self.rank == 0 else []

    def mend(self, name: str, sound: Collection[int], tick: Tick) -> bool:
        """Download a checkpoint where it is not; it takes the place of any other there.

        Neighbours share the work; the first of them names the folder when all is there.
        """
        if self.place in sound:
            return True
        seat, seats = self.neighbours.index(self.rank), len(self.neighbours)
        aside = self.root / f".partial-{name}-{self.token}"
        aside.mkdir(parents=True, exist_ok=True)
        manifest = self._read(name)
        for file in sorted(manifest.files)[seat::seats]:
            self.fs.get_file(f"{self.base}/{name}/{file}", str(aside / file))
            sync(aside / file)
            tick()
        if seat == 0:
            wait_for(
                sorted(manifest.files),
                lambda file: _is_whole(aside / file, manifest.files[file].bytes),
                lambda: True,
                self.timeout,
                aside,
            )
            self._name(aside, name)
        return True

    def close(self, name: str, progress: Progress, device: torch.device) -> None:
        """Fetch the last checkpoint of a run that is done to the first host, for exports."""

        def fetch(tick: Tick) -> None:
            if self.place == 0 and not (self.root / name / MANIFEST).is_file():
                self.mend(name, (), tick)

        do_together(fetch, f"fetching {name}", progress, device)

    def _folder_of(self, aside: Path) -> str:
        name = aside.name.removeprefix(".partial-").removesuffix(f"-{self.token}")
        return f"{self.base}/{name}"

    def _word_name(self, rank: int) -> str:
        return f"rank-{rank:05d}-{self.token}.json"

    def _name(self, aside: Path, name: str) -> None:
        self.fs.get_file(f"{self.base}/{name}/{MANIFEST}", str(aside / MANIFEST))
        sync(aside / MANIFEST)
        for old in list_checkpoints(self.root):
            shutil.rmtree(old)
        aside.rename(self.root / name)

    def _read(self, name: str) -> Manifest:
        path = f"{self.base}/{name}/{MANIFEST}"
        return parse_manifest(self.fs.cat_file(path), path)

    def _list_folders(self) -> list[str]:
        return _list_folders(self.fs, self.base)

    def _list_published(self) -> list[str]:
        return _list_published(self.fs, self.base)

    def _clean(self, name: str) -> None:
        """Remove what a manifest does not name, or all where there is none."""
        folder = f"{self.base}/{name}"
        known: set[str] = set()
        if self.fs.exists(f"{folder}/{MANIFEST}"):
            known = {MANIFEST, *self._read(name).files}
        for path in self.fs.ls(folder, detail=False):
            if path.rpartition("/")[2] not in known:
                self.fs.rm_file(path)


def list_published(url: str) -> list[str]:
    """Return the names of the checkpoints of a run under an address, oldest first.

    Raises:
        ConfigError, PreflightError: as for a `Bucket`.
    """
    return _list_published(*_open(url))


def _list_folders(fs: Any, base: str) -> list[str]:
    found = (path.rstrip("/").rpartition("/")[2] for path in fs.ls(base, detail=False))
    return sorted(name for name in found if _NAME.fullmatch(name))


def _list_published(fs: Any, base: str) -> list[str]:
    if not fs.exists(base):
        return []
    return [name for name in _list_folders(fs, base) if fs.exists(f"{base}/{name}/{MANIFEST}")]


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


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
