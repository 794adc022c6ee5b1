"""What ranks print: shown behind their names, and kept, one file a rank and attempt.

Ranks print into pipes that outlive them, so that the last words of one that is killed are read. On
a terminal rank 0 has that for its standard output, which is a display and no record. Nothing here
waits for whoever reads what we show: the files have all of it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ATTEMPTS_KEPT = 10
LAUNCH_FILE = "launch.yaml"
"""The config that the ranks of an attempt were given, beside what they print."""
LONGEST_LINE = 1 << 14
READ_BYTES = 1 << 16
OUT, ERR = 1, 2
HELD_BYTES = 1 << 22
"""What is kept for a reader that is slow."""
PATIENCE_SECONDS = 1.0
"""Who reads nothing for so long misses what comes."""
END_SECONDS = 10.0
"""What showing the rest, and writing it to a file, may take at the end."""


def next_log_folder(run: Path) -> Path:
    """Make and return the folder for what the next attempt of a run prints; old ones go."""
    root = run / "logs"
    root.mkdir(parents=True, exist_ok=True)
    done = drop_old_logs(root)
    number = int(done[-1].name.removeprefix("attempt-")) if done else 0
    while True:
        number += 1
        folder = root / f"attempt-{number:05d}"
        with contextlib.suppress(FileExistsError):  # of another command for this run
            folder.mkdir()
            return folder


def drop_old_logs(root: Path) -> list[Path]:
    """Make room for one more of the folders that are kept; return those that were there."""
    done = sorted(root.glob("attempt-" + 5 * "[0-9]"))
    for old in done[: max(0, len(done) + 1 - ATTEMPTS_KEPT)]:
        shutil.rmtree(old, ignore_errors=True)
    return done


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
        self._screen = Screen()
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
        self._thread.join(END_SECONDS)
        self._screen.close()
        if self._thread.is_alive():  # a file system that hangs, or something that still prints
            return
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
                    self._pass_on(stream, line)
            if over and not ready:
                break
        for key in self._selector.get_map().values():
            if key.data.rest:
                self._pass_on(key.data, key.data.rest + b"\n")

    def _pass_on(self, stream: _Stream, line: bytes) -> None:
        with contextlib.suppress(OSError):
            if stream.log:
                stream.log.write(line)
        self._screen.show(stream.target, stream.prefix + line)


def _take_lines(stream: _Stream) -> Iterator[bytes]:
    """Yield whole lines, and the beginning of one that has no end."""
    *lines, stream.rest = stream.rest.split(b"\n")
    for line in lines:
        yield line + b"\n"
    if len(stream.rest) > LONGEST_LINE:
        yield stream.rest + b"\n"
        stream.rest = b""


class Screen:
    """Writes lines to our standard streams, from a thread that may be kept waiting there."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, bytes]] = deque()
        self._held = self._missed = self._written = 0
        self._closed = False
        self._change = threading.Condition()
        threading.Thread(target=self._write, name="screen", daemon=True).start()

    def show(self, target: int, line: bytes) -> None:
        """Have a line written to a descriptor; it is dropped where nobody reads there."""

        def has_room() -> bool:
            return self._held + len(line) <= HELD_BYTES

        with self._change:
            # Once for all that is dropped: the ranks must not wait, line by line.
            if not has_room() and (
                self._missed or not self._change.wait_for(has_room, PATIENCE_SECONDS)
            ):
                self._missed += 1
                return
            if self._missed:
                text = f"({self._missed} lines are not shown here, where nobody read them)\n"
                self._missed = 0
                self._add(target, text.encode())
            self._add(target, line)

    def close(self) -> None:
        """Wait until all is written, or nobody reads it; nothing is shown after that."""
        deadline, before = time.monotonic() + END_SECONDS, -1
        with self._change:
            while self._held and self._written != before and time.monotonic() < deadline:
                before = self._written
                self._change.wait_for(lambda: not self._held, PATIENCE_SECONDS)
            self._closed = True
            self._change.notify_all()

    def _add(self, target: int, line: bytes) -> None:
        self._lines.append((target, line))
        self._held += len(line)
        self._change.notify_all()

    def _write(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._lines or self._closed)
                if self._closed:
                    return
                target, line = self._lines.popleft()
            data = line
            with contextlib.suppress(OSError):  # the reader is gone
                while data:
                    data = data[os.write(target, data) :]
            with self._change:
                self._held -= len(line)
                self._written += 1
                self._change.notify_all()
