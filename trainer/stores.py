"""Where checkpoints go: how the files of all ranks come together, and how one is published.

Every store has a local folder, in which a rank writes its part aside of training.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal.configs.errors import PreflightError, ShoalError
from shoal.trainer.aside import hold_folder, remove_suspects
from shoal.trainer.checkpoint import (
    MANIFEST,
    Manifest,
    Retention,
    checkpoint_name,
    list_checkpoints,
    remove_old,
)
from shoal.trainer.storage import sync, write_text
from shoal.trainer.teamwork import LOOK_SECONDS, Progress, Tick, gather, raise_together

OWNER = ".owner"
ELSEWHERE = ".elsewhere"
"""Says where the newest one is, if that was not here."""
Word = dict[str, Any]


class SharedFolder:
    """One folder that all ranks see; the first rank publishes."""

    def __init__(self, root: Path, timeout: float = 600) -> None:
        """Name the folder.

        Args:
            root: Folder of the run's checkpoints.
            timeout: Seconds to wait for other ranks' files, or for the folder.
        """
        self.root, self.timeout = root, timeout
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.token = ""
        self.places = [0] * self.ranks
        """For every rank the first one that sees the same `root`."""

    @property
    def place(self) -> int:
        """The first rank that sees this rank's `root`."""
        return self.places[self.rank]

    @property
    def neighbours(self) -> list[int]:
        """The ranks that see this rank's `root`, itself included."""
        return [rank for rank, place in enumerate(self.places) if place == self.place]

    @property
    def file_name(self) -> str:
        """The name of this rank's file."""
        return f"rank-{self.rank:05d}.safetensors"

    def list_names(self) -> list[str]:
        """Return the names of the checkpoints that this rank is to know of."""
        return [folder.name for folder in list_checkpoints(self.root)] if self.rank == 0 else []

    def mend(self, name: str, sound: Collection[int], tick: Tick) -> bool:
        """Bring a checkpoint where it is not sound; return whether that could be tried.

        Called by all ranks, aside of training.

        Args:
            name: Of the checkpoint.
            sound: The places that have it.
            tick: Called whenever it gets further.
        """
        return False

    def close(self, name: str, progress: Progress, device: torch.device) -> None:
        """See that the last checkpoint of a run that is done is here too; collective."""

    def give_up(self, aside: Path) -> None:
        """Let the others know that this rank has no file to hand in, and why not to wait."""
        with suppress(OSError):
            write_text(aside / f"rank-{self.rank:05d}.json", "null")

    def claim(self, token: str) -> None:
        """Take over; collective. Removes what killed savers left aside.

        Whoever else still writes there, such as a rank of an attempt that was cut off, publishes
        and removes nothing any more: the folder names its owner.

        Raises:
            PreflightError: it is not one folder for all ranks; names the host of one that is apart.
        """
        self.token = token
        if self.rank == 0:
            self._take()
        raise_together(self._find_newer() if self.rank == 0 else None)
        self._check_shared()

    def hand_in(
        self, aside: Path, file: str, word: Word, wanted: Callable[[], bool]
    ) -> list[Word] | None:
        """Give this rank's file and what it says of it; return all ranks' words where it publishes.

        None also where a rank had nothing to give: its own error says why.

        Args:
            aside: Where this rank has written it.
            file: Its name there.
            word: What is to be known of it.
            wanted: Whether the others' are still worth waiting for.

        Raises:
            ShoalError: the others did not hand in theirs in time.
        """
        write_text(aside / f"rank-{self.rank:05d}.json", json.dumps(word))
        return self._collect(aside, wanted) if self.rank == 0 else None

    def publish(self, aside: Path, manifest: Manifest, rule: Retention) -> None:
        """Give the folder its name, and remove what is too old; only the owner may.

        Raises:
            ShoalError: another attempt owns the folder.
        """
        (aside / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        sync(aside / MANIFEST)
        sync(aside)
        final = self.root / checkpoint_name(manifest.step)
        with hold_folder(self.root, self.timeout):
            if (self.root / OWNER).read_text(encoding="utf-8") != self.token:
                raise ShoalError(
                    "another attempt of this run has taken over: this one publishes nothing more",
                    where=self.root,
                )
            if final.exists():  # done again after going back, or damaged
                final.rename(self.root / f".partial-old-{final.name}")
            aside.rename(final)
            sync(self.root)
            remove_old(self.root, rule, manifest.step)
            remove_suspects(self.root, manifest.step)

    def _take(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with hold_folder(self.root, self.timeout):
            for leftover in self.root.glob(".partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            write_text(self.root / OWNER, self.token)

    def _find_newer(self) -> PreflightError | None:
        """Return what is wrong if the run has gone further elsewhere."""
        note = self.root / ELSEWHERE
        newest = note.read_text(encoding="utf-8") if note.is_file() else ""
        names = [folder.name for folder in list_checkpoints(self.root)]
        if newest.rpartition("/")[2] <= max(names, default=""):
            return None
        return PreflightError(
            f"the newest checkpoint of this run is {newest}",
            where=self.root,
            fix=f"checkpoint.folder={newest.rsplit('/', 2)[0]}, or copy it here",
        )

    def _check_shared(self) -> None:
        """Refuse ranks that cannot see what the first one has just written."""
        import socket

        file = self.root / OWNER
        seen = file.is_file() and file.read_text(encoding="utf-8") == self.token
        for rank, host in enumerate(gather(None if seen else socket.gethostname())):
            if host is not None:
                raise PreflightError(
                    f"rank {rank} on {host} does not see the checkpoints of rank 0 there",
                    where=self.root,
                    fix="give output= a folder that all hosts share, or let every host have a copy "
                    "of its own (checkpoint.copies=every)",
                )

    def _collect(self, aside: Path, wanted: Callable[[], bool]) -> list[Word] | None:
        """Wait for the words of all ranks and return them, in the order of ranks."""
        names = [f"rank-{rank:05d}.json" for rank in range(self.ranks)]
        wait_for(names, lambda name: (aside / name).is_file(), wanted, self.timeout, aside)
        words = [json.loads((aside / name).read_text(encoding="utf-8")) for name in names]
        for name in names:
            (aside / name).unlink()
        return None if None in words else words


def wait_for(
    names: Sequence[str],
    exists: Callable[[str], bool],
    wanted: Callable[[], bool],
    timeout: float,
    where: object,
) -> None:
    """Wait until every rank's word is there.

    Raises:
        ShoalError: one is not in time, or is no longer `wanted`.
    """
    deadline = time.monotonic() + timeout
    left = list(names)
    while left := [name for name in left if not exists(name)]:
        if time.monotonic() > deadline or not wanted():
            raise ShoalError(
                f"{len(left)} ranks have not written their part in {timeout:.0f} s, "
                f"the first is {left[0].removesuffix('.json')}",
                where=where,
                fix="see to the disk of that rank; is the folder really shared?",
            )
        time.sleep(LOOK_SECONDS)


def find_places(root: Path, token: str) -> list[int]:
    """Return for every rank the first one that sees the same folder; collective.

    Found by looking, not by names: hosts may share a disk, and ranks of one host may not.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    root.mkdir(parents=True, exist_ok=True)
    mark = root / f".seen-{token}-{rank}"
    mark.touch()
    gather(None)
    first = next(r for r in range(ranks) if (root / f".seen-{token}-{r}").exists())
    places = gather(first)
    mark.unlink()
    return places
