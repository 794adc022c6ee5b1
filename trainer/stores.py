"""Where checkpoints go: how the files of all ranks come together, and how one is published.

Every store has a local folder, in which a rank writes its part aside of training.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal.configs.errors import PreflightError, ShoalError
from shoal.trainer.aside import ELSEWHERE
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
LOCK = ".lock"
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
        self.refused = ""
        """The checkpoint that a start leaves out; until one has been published since."""
        self.tick: Tick = lambda: None
        """Called whenever a file gets further on its way there."""

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

    def aside_of(self, name: str) -> Path:
        """Return the folder in which a checkpoint is written, or brought, until it is whole."""
        return self.root / f".partial-{name}-{self.token}"

    def needed_bytes(self, total: int, own: int) -> int:
        """Return the bytes that the next save takes on this rank's disk.

        Args:
            total: Bytes of the whole checkpoint.
            own: Bytes of this rank's part.
        """
        return total

    def list_names(self) -> list[str]:
        """Return the names of the checkpoints that this rank is to know of."""
        return [folder.name for folder in list_checkpoints(self.root)] if self.rank == 0 else []

    def read_digest(self, name: str) -> str | None:
        """Return which checkpoint of that name is meant, by its manifest; None: what is here."""
        return None

    def can_mend(self, sound: Collection[int]) -> bool:
        """Whether a checkpoint that `sound` places have can be brought to the others."""
        return False

    def mend(self, name: str, sound: Collection[int], tick: Tick) -> None:
        """Bring a checkpoint where it is not sound, if `can_mend`.

        Called by all ranks, aside of training.

        Args:
            name: Of the checkpoint.
            sound: The places that have it.
            tick: Called whenever it gets further.

        Raises:
            DataError: it cannot be had whole.
        """

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
            PreflightError: it is not one folder for all ranks (names the host of one apart),
                or the run has gone further elsewhere.
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
        final = self.root / checkpoint_name(manifest.step)
        with hold_folder(self.root, self.timeout):
            if (self.root / OWNER).read_text(encoding="utf-8") != self.token:
                raise ShoalError(
                    "another attempt of this run has taken over: this one publishes nothing more",
                    where=self.root,
                )
            replace_folder(aside, final)  # done again after going back, or damaged
            self.refused = ""
            remove_old(self.root, rule, manifest.step)

    def _take(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with hold_folder(self.root, self.timeout):
            self._clear()
            write_text(self.root / OWNER, self.token)

    def _clear(self) -> None:
        for leftover in self.root.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _find_newer(self) -> PreflightError | None:
        """Return what is wrong if the run has gone further elsewhere."""
        note = self.root / ELSEWHERE
        newest = note.read_text(encoding="utf-8") if note.is_file() else ""
        names = [folder.name for folder in list_checkpoints(self.root)]
        if newest.rpartition("/")[2] <= max(names, default=""):
            return None
        return refuse_older(newest, self.root)

    def _check_shared(self) -> None:
        """Refuse ranks that cannot see what the first one has just written."""
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
        if not wanted():
            raise ShoalError("no longer waits for the other ranks: something has failed")
        if time.monotonic() > deadline:
            raise ShoalError(
                f"{len(left)} ranks have not written their part in {timeout:.0f} s, "
                f"the first is {left[0].removesuffix('.json')}",
                where=where,
                fix="see to the disk of that rank; is the folder really shared?",
            )
        time.sleep(LOOK_SECONDS)


@contextmanager
def hold_folder(root: Path, timeout: float = 600) -> Iterator[None]:
    """Let one process at a time change which checkpoints there are.

    Raises:
        PreflightError: another has been at it for `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    with (root / LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise PreflightError(
                        "another process has been changing it for too long", where=root
                    ) from None
                time.sleep(LOOK_SECONDS)
        yield


def replace_folder(aside: Path, final: Path) -> None:
    """Give a folder the name of a checkpoint; one of that name is moved away first."""
    old = final.with_name(f".partial-old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    sync(aside)
    if final.exists():
        final.rename(old)
    aside.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def drop_fetched(root: Path, kept: str) -> None:
    """Remove what was brought here from elsewhere, but the one named `kept`."""
    for folder in list_checkpoints(root):
        if folder.name != kept and (folder / ELSEWHERE).is_file():
            old = folder.rename(root / f".partial-old-{folder.name}")
            shutil.rmtree(old, ignore_errors=True)


def refuse_older(newest: str, root: Path) -> PreflightError:
    """Return the error of a start that would fall behind what is known to be elsewhere.

    Args:
        newest: Address of the newest checkpoint in object storage, or HOST:FOLDER/step-N.
        root: Folder that knows of it.
    """
    place = newest.rsplit("/", 2)[0]
    there = f"checkpoint.folder={place}" if "://" in newest else "let that host be there again"
    return PreflightError(
        f"the newest checkpoint of this run is {newest}",
        where=root,
        fix=f"{there}, or copy it here; to go on from an older one, remove {root / ELSEWHERE}",
    )


def find_places(root: Path, token: str) -> list[int]:
    """Return for every rank the first one that sees the same folder; collective.

    Found by looking, not by names: hosts may share a disk, and ranks of one host may not.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    root.mkdir(parents=True, exist_ok=True)
    mark = root / f".seen-{token}-{rank}"
    mark.touch()
    for old in root.glob(".seen-*"):
        if not old.name.startswith(f".seen-{token}-"):  # of ranks that were killed here
            old.unlink(missing_ok=True)
    gather(None)
    first = next(r for r in range(ranks) if (root / f".seen-{token}-{r}").exists())
    places = gather(first)
    mark.unlink()
    return places
