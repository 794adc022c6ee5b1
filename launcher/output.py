"""What ranks print: shown behind their names, and kept, one file a rank and attempt.

Ranks print into pipes that outlive them, so that the last words of one that is killed are read. On
a terminal rank 0 has that for its standard output, which is a display and no record.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ATTEMPTS_KEPT = 10
LONGEST_LINE = 1 << 14
READ_BYTES = 1 << 16
OUT, ERR = 1, 2


def next_log_folder(run: Path) -> Path:
    """Make and return the folder for what the next attempt of a run prints; old ones go."""
    root = run / "logs"
    root.mkdir(parents=True, exist_ok=True)
    done = sorted(root.glob("attempt-" + 5 * "[0-9]"))
    for old in done[: max(0, len(done) + 1 - ATTEMPTS_KEPT)]:
        shutil.rmtree(old, ignore_errors=True)
    number = int(done[-1].name.removeprefix("attempt-")) + 1 if done else 1
    folder = root / f"attempt-{number:05d}"
    folder.mkdir()
    return folder


def log_name(rank: int) -> str:
    """Return the name of the file that keeps what a rank prints."""
    return f"rank-{rank:05d}.log"


@dataclass
class _Stream:
    """One pipe of one rank."""

    target: int
    prefix: bytes
    log: IO[bytes] | None
    rest: bytes = field(default=b"")


class RankOutput:
    """The pipes of this machine's ranks, and the thread that empties them."""

    def __init__(
        self, folder: Path, ranks: Sequence[int], name: Callable[[int], str], logs: Path | None
    ) -> None:
        """Make the pipes in `folder`; keep what comes in `logs`, as far as that can be written.

        Args:
            folder: A scratch folder.
            ranks: Global ranks, in the order of local ones.
            name: Rank -> what stands before its lines.
            logs: Folder for a file a rank.
        """
        self.paths: dict[int, dict[int, str]] = {OUT: {}, ERR: {}}
        """Stream -> local rank -> where it prints to; empty: where we do."""
        self._selector = selectors.DefaultSelector()
        self._files: list[IO[bytes]] = []
        for local_rank, rank in enumerate(ranks):
            log = self._open_log(logs, rank)
            for target in (OUT, ERR):
                path = folder / f"print-{rank}-{target}"
                self.paths[target][local_rank] = ""
                if rank == 0 and target == OUT and os.isatty(OUT):
                    continue
                os.mkfifo(path)
                self.paths[target][local_rank] = str(path)
                # For writing, too: it has no end before we are done with it.
                descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
                stream = _Stream(target, name(rank).encode(), log)
                self._selector.register(descriptor, selectors.EVENT_READ, stream)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._copy, name="output", daemon=True)

    def __enter__(self) -> RankOutput:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Show what is left in the pipes; the ranks are gone."""
        self._over.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()
        for file in self._files:
            file.close()

    def _open_log(self, logs: Path | None, rank: int) -> IO[bytes] | None:
        with contextlib.suppress(OSError):  # a full disk ends a run where it saves, not here
            if logs is not None:
                self._files.append((logs / log_name(rank)).open("ab", buffering=0))
                return self._files[-1]
        return None

    def _copy(self) -> None:
        while True:
            over = self._over.is_set()  # asked before the last look
            ready = self._selector.select(0.1)
            for key, _ in ready:
                stream: _Stream = key.data
                with contextlib.suppress(BlockingIOError):
                    stream.rest += os.read(key.fd, READ_BYTES)
                for line in _take_lines(stream):
                    _show(stream, line)
            if over and not ready:
                break
        for key in self._selector.get_map().values():
            if key.data.rest:
                _show(key.data, key.data.rest + b"\n")


def _take_lines(stream: _Stream) -> Iterator[bytes]:
    """Yield whole lines, and the beginning of one that has no end."""
    *lines, stream.rest = stream.rest.split(b"\n")
    for line in lines:
        yield line + b"\n"
    if len(stream.rest) > LONGEST_LINE:
        yield stream.rest + b"\n"
        stream.rest = b""


def _show(stream: _Stream, line: bytes) -> None:
    with contextlib.suppress(OSError):
        if stream.log:
            stream.log.write(line)
    with contextlib.suppress(OSError):  # nobody reads it any more
        data = stream.prefix + line
        while data:
            data = data[os.write(stream.target, data) :]
