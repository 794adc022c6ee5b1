"""Checkpoints on disks that hosts do not share: the first host, or every one, gets them whole.

Bytes travel from rank to rank in a group of their own, aside of training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal.configs.errors import DataError
from shoal.trainer.checkpoint import MANIFEST, StoredFile, list_checkpoints, verify_file
from shoal.trainer.storage import CHUNK_BYTES, sync
from shoal.trainer.stores import SharedFolder, Word, find_places
from shoal.trainer.teamwork import Progress, Tick, gather


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

    @property
    def keepers(self) -> list[int]:
        """The ranks that publish: the first of every place, or rank 0 alone."""
        return sorted(set(self.places)) if self.every else [0]

    def claim(self, token: str) -> None:
        """Take over the folder of every host; collective."""
        self.token = token
        self.places = find_places(self.root, token)
        if self.place == self.rank:
            self._take()
        gather(None)

    def give_up(self, aside: Path) -> None:
        """Let the others know that this rank has no file to hand in."""
        self._exchange(None)

    def hand_in(
        self, aside: Path, file: str, word: Word, wanted: Callable[[], bool]
    ) -> list[Word] | None:
        """Pass this rank's file to the keepers; return all ranks' words on those."""
        words = self._exchange(word)
        if None in words:
            return None
        trouble = None
        try:
            self._pass_all(aside, words)
        except (DataError, OSError) as error:
            trouble = error
        # No keeper gives the folder its name while a neighbour still reads from it.
        if any(self._exchange(str(trouble) if trouble else None)):
            if trouble:
                raise trouble
            return None
        if self.place not in self.keepers:
            (aside / file).unlink()
            with suppress(OSError):  # the last neighbour removes it
                aside.rmdir()
        return words if self.rank in self.keepers else None

    def _pass_all(self, aside: Path, words: Sequence[Word]) -> None:
        for rank, word in enumerate(words):
            receivers = [keeper for keeper in self.keepers if keeper != self.places[rank]]
            for name, facts in word["files"].items():
                self._pass(aside / name, facts["bytes"], rank, receivers)
                if self.rank in receivers:
                    verify_file(aside / name, StoredFile(**facts))

    def close(self, name: str, progress: Progress, device: torch.device) -> None:
        """Leave the group in which bytes travelled."""
        dist.destroy_process_group(self.group)

    def list_names(self) -> list[str]:
        """Return the names of what is on this rank's disk."""
        return [folder.name for folder in list_checkpoints(self.root)]

    def mend(self, name: str, sound: Collection[int], tick: Tick) -> bool:
        """Bring a checkpoint from the first host that has it to those that do not."""
        if not sound:
            return False
        source = min(sound)
        receivers = sorted(set(self.places) - set(sound))
        if self.rank != source and self.rank not in receivers:
            return True
        found = self.root / name
        files = sorted(file.name for file in found.iterdir()) if self.rank == source else []
        aside = found if self.rank == source else self.root / f".partial-{name}-{self.token}"
        aside.mkdir(exist_ok=True)
        for receiver in receivers:
            told: list[Any] = [[(file, (found / file).stat().st_size) for file in files]]
            if self.rank == source:
                dist.send_object_list(told, receiver, group=self.group)
            elif self.rank == receiver:
                dist.recv_object_list(told, source, group=self.group)
            if self.rank in (source, receiver):
                for file, size in told[0]:
                    self._pass(aside / file, size, source, [receiver], tick)
        if self.rank in receivers:
            self._name(aside, found)
        return True

    def _name(self, aside: Path, final: Path) -> None:
        if not (aside / MANIFEST).is_file():
            raise DataError("came without its manifest", where=final)
        sync(aside)
        if final.exists():
            final.rename(self.root / f".partial-old-{final.name}")
        aside.rename(final)
        sync(self.root)

    def _exchange(self, word: Word | str | None) -> list[Any]:
        words: list[Any] = [None] * self.ranks
        dist.all_gather_object(words, word, group=self.group)
        return words

    def _pass(
        self,
        file: Path,
        size: int,
        sender: int,
        receivers: Sequence[int],
        tick: Tick = lambda: None,
    ) -> None:
        """Send a file from one rank to others, a chunk at a time."""
        if self.rank == sender and receivers:
            with file.open("rb") as stream:
                while data := stream.read(CHUNK_BYTES):
                    chunk = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    for receiver in receivers:
                        dist.send(chunk, receiver, group=self.group)
                    tick()
        elif self.rank in receivers:
            with file.open("wb") as stream:
                for first in range(0, size, CHUNK_BYTES):
                    chunk = torch.empty(min(CHUNK_BYTES, size - first), dtype=torch.uint8)
                    dist.recv(chunk, sender, group=self.group)
                    stream.write(chunk.numpy().tobytes())
                    tick()
            sync(file)
