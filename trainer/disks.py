"""Checkpoints on disks that hosts do not share: the first host, or every one, gets them whole.

Bytes travel from rank to rank in a group of their own, aside of training.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.configs.errors import DataError, PreflightError
from shoal.trainer.aside import ELSEWHERE, read_resumed
from shoal.trainer.checkpoint import (
    MANIFEST,
    Manifest,
    Retention,
    StoredFile,
    checkpoint_name,
    list_checkpoints,
    read_manifest,
    verify_file,
)
from shoal.trainer.storage import CHUNK_BYTES, SYNC_BYTES, force, sync, write_text
from shoal.trainer.stores import (
    OWNER,
    SharedFolder,
    Word,
    drop_fetched,
    find_places,
    refuse_older,
    replace_folder,
)
from shoal.trainer.teamwork import Progress, Tick, gather

Trouble = DataError | OSError


class OwnDisks(SharedFolder):
    """A folder of the same name on every host; ranks that see the same one are neighbours."""

    def __init__(self, root: Path, timeout: float = 600, *, every: bool) -> None:
        """Name the folder; collective.

        Args:
            root: Folder of the run's checkpoints.
            timeout: Seconds to wait for other ranks' files.
            every: Whether all hosts keep what is saved, or the first alone.
        """
        super().__init__(root, timeout)
        self.every = every
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.newest = ""
        """Where the newest checkpoint on this rank's disk is, as other hosts name it."""

    @property
    def keepers(self) -> list[int]:
        """The ranks that publish: the first of every place, or rank 0 alone."""
        return sorted(set(self.places)) if self.every else [0]

    @property
    def address(self) -> str:
        """This rank's folder, as other hosts name it."""
        return f"{socket.gethostname()}:{self.root}"

    def needed_bytes(self, total: int, own: int) -> int:
        """Return the bytes that the next save takes here: all of it on hosts that keep it."""
        return total if self.place in self.keepers else own * len(self.neighbours)

    def claim(self, token: str) -> None:
        """Take over the folder of every host; collective.

        Raises:
            PreflightError: newer ones were in object storage, or on a host that is not there.
        """
        self.token = token
        self.places = find_places(self.root, token)
        raise_if_behind(self.root, self._tell_folder())
        if self.place == self.rank:
            self._take()
        if names := self.list_names():
            self.newest = f"{self.address}/{names[-1]}"
        gather(None)

    def _tell_folder(self) -> tuple[str, str, str]:
        """Return what the folder knows of, its address unless it is new, and its newest."""
        note = self.root / ELSEWHERE
        known = note.read_text(encoding="utf-8") if note.is_file() else ""
        address = self.address if (self.root / OWNER).is_file() else ""
        return known, address, max(self.list_names(), default="")

    def give_up(self, aside: Path) -> None:
        """Let the others know that this rank has no file to hand in."""
        self._exchange(None)

    def hand_in(
        self, aside: Path, file: str, word: Word, wanted: Callable[[], bool]
    ) -> list[Word] | None:
        """Pass this rank's file to the keepers; return all ranks' words on those."""
        told = self._exchange((word, self.newest))
        if None in told:
            return None
        words = [word for word, _ in told]
        trouble = self._pass_all(aside, words)
        # No keeper gives the folder its name while a neighbour still reads from it.
        if any(self._exchange(str(trouble) if trouble else None)):
            if trouble:
                raise trouble
            return None
        if self.place not in self.keepers:
            (aside / file).unlink()
            with suppress(OSError):  # the last neighbour removes it
                aside.rmdir()
            if self.place == self.rank:
                self._note(told[self.keepers[0]][1])
        return words if self.rank in self.keepers else None

    def _note(self, newest: str) -> None:
        """Remember what the first host has; what was brought here from there may go."""
        if newest:
            write_text(self.root / ELSEWHERE, newest)
            drop_fetched(self.root, read_resumed(self.root))

    def _pass_all(self, aside: Path, words: Sequence[Word]) -> Trouble | None:
        """Pass every file to whom it is for; return this rank's first trouble, after all of them.

        An error that ended it at once would leave the others waiting for what is still to come.
        """
        trouble: Trouble | None = None
        for rank, word in enumerate(words):
            receivers = [keeper for keeper in self.keepers if keeper != self.places[rank]]
            for name, facts in word["files"].items():
                found = self._pass(aside / name, facts["bytes"], rank, receivers, self.tick)
                trouble = trouble or found
                if self.rank in receivers and trouble is None:
                    trouble = attempt(verify_file, aside / name, StoredFile(**facts), self.tick)
        return trouble

    def publish(self, aside: Path, manifest: Manifest, rule: Retention) -> None:
        """Give the folder its name, as in a shared one."""
        super().publish(aside, manifest, rule)
        self.newest = f"{self.address}/{checkpoint_name(manifest.step)}"

    def close(self, name: str, progress: Progress, device: torch.device) -> None:
        """Leave the group in which bytes travelled."""
        dist.destroy_process_group(self.group)

    def list_names(self) -> list[str]:
        """Return the names of what is on this rank's disk."""
        return [folder.name for folder in list_checkpoints(self.root)]

    def can_mend(self, sound: Collection[int]) -> bool:
        """Whether any host has it."""
        return bool(sound)

    def mend(self, name: str, sound: Collection[int], tick: Tick) -> None:
        """Bring a checkpoint from the first host that has it to those that do not.

        Raises:
            OSError: it cannot be read, or written.
        """
        source = min(sound)
        receivers = sorted(set(self.places) - set(sound))
        if self.rank != source and self.rank not in receivers:
            return
        final = self.root / name
        files = [MANIFEST, *read_manifest(final).files] if self.rank == source else []
        aside = final if self.rank == source else self.aside_of(name)
        trouble: Trouble | None = None
        for receiver in receivers:
            told: list[Any] = [[(f, (final / f).stat().st_size) for f in files], self.address]
            if self.rank == source:
                dist.send_object_list(told, receiver, group=self.group)
            elif self.rank == receiver:
                dist.recv_object_list(told, source, group=self.group)
                if receiver not in self.keepers:
                    trouble = attempt(mark_fetched, aside, f"{told[1]}/{name}")
            if self.rank in (source, receiver):
                for file, size in told[0]:
                    found = self._pass(aside / file, size, source, [receiver], tick)
                    trouble = trouble or found
        if trouble:
            raise trouble
        if self.rank in receivers:
            replace_folder(aside, final)

    def _exchange(self, word: object) -> list[Any]:
        words: list[Any] = [None] * self.ranks
        dist.all_gather_object(words, word, group=self.group)
        return words

    def _pass(
        self, file: Path, size: int, sender: int, receivers: Sequence[int], tick: Tick
    ) -> Trouble | None:
        """Send a file from one rank to others, a chunk at a time; return what a disk refuses.

        The rest then travels all the same, as zeros, and is dropped: nobody is left waiting.
        """
        if not receivers or self.rank not in (sender, *receivers):
            return None
        trouble: Trouble | None = None
        for first in range(0, size, CHUNK_BYTES):
            chunk = torch.zeros(min(CHUNK_BYTES, size - first), dtype=torch.uint8)
            if self.rank == sender:
                trouble = trouble or attempt(read_at, file, first, chunk)
                for receiver in receivers:
                    dist.send(chunk, receiver, group=self.group)
            else:
                dist.recv(chunk, sender, group=self.group)
                trouble = trouble or attempt(write_at, file, first, chunk)
            tick()
        if self.rank in receivers:
            trouble = trouble or attempt(sync, file)
        return trouble


def raise_if_behind(root: Path, told: tuple[str, str, str]) -> None:
    """Refuse a start from less than some host knows of; collective.

    What a host that is there has, it knows best itself, unless its disk is a new one.

    Raises:
        PreflightError: names where the newest is.
    """
    every = gather(told)
    present = {address for _, address, _ in every}
    known = [note for note, _, _ in every if note.rpartition("/")[0] not in present]
    newest = max(known, key=lambda note: note.rpartition("/")[2], default="")
    if newest.rpartition("/")[2] > max(name for _, _, name in every):
        error: PreflightError = refuse_older(newest, root)
        raise error


def attempt(work: Callable[..., object], *given: object) -> Trouble | None:
    """Do what a disk may refuse; return its trouble."""
    try:
        work(*given)
    except (DataError, OSError) as error:
        return error
    return None


def read_at(file: Path, first: int, chunk: Tensor) -> None:
    """Read a part of a file that starts at byte `first`."""
    with file.open("rb") as stream:
        stream.seek(first)
        stream.readinto(chunk.numpy().data)


def write_at(file: Path, first: int, chunk: Tensor) -> None:
    """Write the next part of a file; the first one makes it anew."""
    file.parent.mkdir(exist_ok=True)
    with file.open("ab" if first else "wb") as stream:
        stream.write(chunk.numpy().data)
        if stream.tell() % SYNC_BYTES < len(chunk):
            force(stream)


def mark_fetched(aside: Path, where: str) -> None:
    """Say in a checkpoint that is brought here where it is from."""
    aside.mkdir(exist_ok=True)
    write_text(aside / ELSEWHERE, where)
