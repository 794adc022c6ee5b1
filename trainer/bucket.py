"""Checkpoints that go to object storage: the manifest goes last and comes away first.

What is removed there was listed before a look at who owns the place: an attempt that was frozen
and wakes up later cannot remove what another has written since.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from shoal.configs.errors import DataError, PreflightError, ShoalError
from shoal.trainer.aside import ELSEWHERE
from shoal.trainer.checkpoint import (
    MANIFEST,
    Manifest,
    Retention,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
)
from shoal.trainer.objects import Objects, choose_manifest, find_leftovers
from shoal.trainer.storage import write_text
from shoal.trainer.stores import OWNER, SharedFolder, Word, find_places, wait_for
from shoal.trainer.teamwork import Progress, Tick, do_together, raise_together


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
        self.url, self.objects = url, Objects(url)
        self.fs, self.base = self.objects.fs, self.objects.base

    @property
    def file_name(self) -> str:
        """The name of this rank's file, which no other attempt uses."""
        return f"rank-{self.rank:05d}-{self.token}.safetensors"

    def needed_bytes(self, total: int, own: int) -> int:
        """Return the bytes that the next save takes here: what the neighbours send away."""
        return own * len(self.neighbours)

    def claim(self, token: str) -> None:
        """Take over; collective. Removes what belongs to no checkpoint.

        Raises:
            PreflightError: it cannot be written, or a host has newer checkpoints of this run.
        """
        self.token = token
        self.places = find_places(self.root, token)
        if self.place == self.rank:
            self._clear()
        raise_together(self._take_bucket() if self.rank == 0 else None)
        raise_together(self._find_newer() if self.place == self.rank else None)

    def _take_bucket(self) -> PreflightError | None:
        """Become its owner; return what keeps this rank from it."""
        try:
            self.fs.makedirs(self.base, exist_ok=True)
            self.fs.pipe_file(f"{self.base}/{OWNER}", self.token.encode())
            for name, files in self.objects.find().items():
                if leftovers := find_leftovers(files):
                    self.objects.remove(name, leftovers)
        except Exception as error:  # every driver has its own
            return PreflightError(
                f"cannot be written: {type(error).__name__}: {error}",
                where=self.url,
                fix="check checkpoint.folder and the credentials on every host",
            )
        return None

    def _find_newer(self) -> PreflightError | None:
        """Return what is wrong if this host knows of newer checkpoints than there are there."""
        there = max(self.objects.list_published(), default="")
        # What was fetched from there is no loss, unless all is gone there.
        own = [f for f in list_checkpoints(self.root) if not (there and (f / ELSEWHERE).is_file())]
        if own and own[-1].name > there:
            newest = f"; its newest is {there}" if there else ""
            return PreflightError(
                f"has no checkpoint of this run that is as new as {own[-1]}{newest}",
                where=self.url,
                fix="copy the folders step-* there to go on from them, or take another name=",
            )
        note = self.root / ELSEWHERE
        known = note.read_text(encoding="utf-8") if note.is_file() else ""
        if there and known.startswith(f"{self.url}/"):
            return None
        return super()._find_newer() if known.rpartition("/")[2] > there else None

    def hand_in(
        self, aside: Path, file: str, word: Word, wanted: Callable[[], bool]
    ) -> list[Word] | None:
        """Upload this rank's file and what it says of it; rank 0 collects what all say."""
        name = aside.name.removeprefix(".partial-").removesuffix(f"-{self.token}")
        folder = f"{self.base}/{name}"
        self.objects.upload(aside / file, name, self.tick)
        (aside / file).unlink()
        words = [f"rank-{rank:05d}-{self.token}.json" for rank in range(self.ranks)]
        self.fs.pipe_file(f"{folder}/{words[self.rank]}", json.dumps(word).encode())
        if self.rank:
            return None
        wait_for(words, lambda w: self.fs.exists(f"{folder}/{w}"), wanted, self.timeout, folder)
        return [json.loads(self.fs.cat_file(f"{folder}/{w}")) for w in words]

    def publish(self, aside: Path, manifest: Manifest, rule: Retention) -> None:
        """Put the manifest, and remove what is too old; only the owner may.

        Raises:
            ShoalError: another attempt owns the place.
        """
        shutil.rmtree(aside, ignore_errors=True)
        name = checkpoint_name(manifest.step)
        own = f"-{self.token}.safetensors"
        others = [file for file in self.objects.find().get(name, {}) if not file.endswith(own)]
        self._check_owner()
        path = f"{self.base}/{name}/manifest-{self.token}.json"
        self.fs.pipe_file(path, manifest.model_dump_json().encode())
        self._check_owner()
        write_text(self.root / ELSEWHERE, f"{self.url}/{name}")
        self.refused = ""
        if others:
            self.objects.remove(name, others)
        self._remove_old(rule, manifest.step)

    def _remove_old(self, rule: Retention, newest: int) -> None:
        found = {n: files for n, files in self.objects.find().items() if choose_manifest(files)}
        losses = {
            checkpoint_step(name): self._read_loss(name) if rule.best else None for name in found
        }
        self._check_owner()
        for step in losses.keys() - rule.choose(losses, newest):
            name = checkpoint_name(step)
            self.objects.remove(name, found[name])

    def _read_loss(self, name: str) -> float | None:
        try:
            return self.objects.read_manifest(name).loss
        except DataError:
            return None

    def _check_owner(self) -> None:
        if self.fs.cat_file(f"{self.base}/{OWNER}").decode() != self.token:
            raise ShoalError(
                "another attempt of this run has taken over: this one publishes nothing more",
                where=self.url,
            )

    def list_names(self) -> list[str]:
        """Return the names of what is there, on rank 0."""
        return self.objects.list_published() if self.rank == 0 else []

    def read_digest(self, name: str) -> str | None:
        """Return the digest of what is there: a local copy may be another of this step.

        Raises:
            DataError: it is not whole.
        """
        return self.objects.read_manifest(name).digest

    def can_mend(self, sound: Collection[int]) -> bool:
        """Whether there is where to bring a checkpoint from."""
        return True

    def mend(self, name: str, sound: Collection[int], tick: Tick) -> None:
        """Download a checkpoint where it is not; it takes the place of any other of this step.

        Neighbours share the work; the first of them names the folder when all is there.

        Raises:
            DataError: it is not whole there.
        """
        if self.place in sound:
            return
        manifest = self.objects.read_manifest(name)
        seat, seats = self.neighbours.index(self.rank), len(self.neighbours)
        aside = self.aside_of(name)
        aside.mkdir(parents=True, exist_ok=True)
        files = sorted(manifest.files)
        self.objects.download(name, files[seat::seats], aside, tick)
        if seat == 0:
            wait_for(
                files,
                lambda file: _is_whole(aside / file, manifest.files[file].bytes),
                lambda: True,
                self.timeout,
                aside,
            )
            self.objects.settle(aside, name)

    def close(self, name: str, progress: Progress, device: torch.device) -> None:
        """Fetch the last checkpoint of a run that is done to the first host, for exports."""

        def fetch(tick: Tick) -> None:
            if self.place and self.place == self.rank:
                self._clear()
            if self.place == 0 and not (self.root / name / MANIFEST).is_file():
                self.mend(name, (), tick)

        do_together(fetch, f"fetching {name}", progress, device)


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size
