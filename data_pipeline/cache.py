"""Shards read by URL, kept in a folder that jobs share: downloaded once, checked, evicted by age.

    CACHE/room.lock                      held while room is made
    CACHE/KEY/split/                     manifest.json and the shards that are here
    CACHE/KEY/tokenizer/
    CACHE/KEY/locks/SHARD                held by who downloads it
    CACHE/KEY/partial/SHARD@BYTES@PROCESS@...
                                         what is on its way; of a killed job where no lock is held

KEY is the hash of the manifest, so other shards behind the same URL never mix with these. Shards
get their names whole and checked. A lock goes with the process that holds it. A shard may be
evicted while a job reads it: its mapping stays whole until it is let go.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.manifest import MANIFEST, TOKENIZER, Manifest, read_manifest
from shoal.data_pipeline.remote import Remote, count_bytes, wait_while_growing

DOWNLOADS = 8
"""At a time, of one process."""

_TOUCH_SECONDS = 1.0
_TRIES = 5
_numbers = count()

Tick = Callable[[], None]
"""Called between shards; what it raises ends the reading."""


def go_on() -> None:
    """Do nothing: a `Tick` of readings that nobody ends."""


class FileKey(NamedTuple):
    """What a file is known by that was hashed; a number alone may be given to another file."""

    inode: int
    changed: int
    """Time of the last change of its content, in nanoseconds; see `RemoteShards._touch`."""
    size: int

    @classmethod
    def of(cls, facts: os.stat_result) -> FileKey:
        """Return the key of a file."""
        return cls(facts.st_ino, facts.st_mtime_ns, facts.st_size)


def default_cache() -> Path:
    """Return the user's folder for what can be downloaded again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "shoal" / "shards"


@contextmanager
def hold(lock: Path, watch: Callable[[], object], seconds: float) -> Iterator[None]:
    """Hold a lock among threads and processes; who waits watches what is done by who has it.

    Raises:
        DataError: it is held, and what `watch` returns has stayed the same for `seconds`.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:

        def is_ours() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        if not wait_while_growing(is_ours, watch, seconds):
            raise DataError(
                f"another process holds it, and has got no further for {seconds:g} seconds",
                where=lock,
                fix="end that process, or raise data.download_seconds",
            )
        yield


@dataclass(frozen=True)
class ShardCache:
    """The folder, its limit, and how patient downloads are.

    Args:
        root: Folder; jobs of one host may share it.
        limit: Most bytes of shards in it, those on their way included; None: no limit.
        seconds: Without a byte for so long, a download has failed.
    """

    root: Path
    limit: int | None = None
    seconds: float = 60.0

    @classmethod
    def choose(cls, root: str | None, limit: int | None, seconds: float) -> ShardCache:
        """Return the cache a config asks for."""
        return cls(Path(root) if root else default_cache(), limit, seconds)

    def open_split(self, url: str) -> RemoteShards:
        """Bring the manifest and the tokenizer of a split; no shard.

        Raises:
            DataError: they are not there, do not come, or are not what they should be.
        """
        remote = Remote(url, self.seconds)
        with tempfile.TemporaryDirectory(prefix="shoal-manifest-") as name:
            file = remote.fetch(MANIFEST, Path(name))
            try:
                manifest = read_manifest(name)
            except DataError as error:
                raise DataError(error.cause, where=remote.join(MANIFEST), fix=error.fix) from None
            text = file.read_bytes()
        home = self.root / hashlib.sha256(text).hexdigest()[:32]
        files = RemoteShards(self, remote, home, manifest)
        self._sweep()
        for tokenizer_file, expected in manifest.tokenizer_files.items():
            if Path(tokenizer_file).name != tokenizer_file or tokenizer_file.startswith("."):
                cause = f"names a file outside its folder: {tokenizer_file!r}"
                raise DataError(cause, where=remote.join(MANIFEST))
            files.bring_file(f"../{TOKENIZER}/{tokenizer_file}", home / TOKENIZER, expected)
        _write_whole(files.folder / MANIFEST, text)
        return files

    def make_room(self, partial: Path, size: int) -> Path:
        """Make a folder for a file of `size` bytes on its way, old shards giving way to it.

        Waits for the room that other downloads hold for as long as any of them gets further.

        Raises:
            ConfigError: the cache is too small for it.
            DataError: other downloads hold the room, and get no further; names them.
        """
        if self.limit is not None and size > self.limit:
            raise self.too_small(size)
        made: list[Path] = []

        def is_made() -> bool:
            with hold(self.root / "room.lock", self.watch, self.seconds):
                if self.limit is None or self._evict(self.limit - size):
                    folder = Path(f"{partial}@{size}@{os.getpid()}@{next(_numbers)}")
                    folder.mkdir(parents=True)
                    made.append(folder)
            if not made:
                self._sweep()
            return bool(made)

        if not wait_while_growing(is_made, self.watch, self.seconds):
            raise self._held_by_others(size)
        return made[0]

    def watch(self) -> object:
        """Return what changes while any download into the cache gets further."""
        return {folder.name: count_bytes(folder) for folder in self._on_the_way()}

    def _on_the_way(self) -> list[Path]:
        return sorted(self.root.glob("*/partial/*@*@*@*"))

    def _held_by_others(self, size: int) -> DataError:
        facts = [folder.name.rsplit("@", 3) for folder in self._on_the_way()]
        held = sum(int(reserved) for _, reserved, *_ in facts)
        names = ", ".join(f"{name} of process {process}" for name, _, process, _ in facts)
        return DataError(
            f"no room for {size:,} bytes: of {self.limit:,}, {held:,} are held by downloads that "
            f"have got no further for {self.seconds:g} seconds: {names or 'none now'}",
            where=self.root,
            fix="end those processes, raise data.cache_bytes, or set another data.cache",
        )

    def too_small(self, size: int) -> ConfigError:
        """Return the error for a need that the limit cannot meet."""
        return ConfigError(
            f"the cache may hold {self.limit:,} bytes, and {size:,} are needed at once",
            where="data.cache_bytes",
            fix=f"raise it to {size} or more, for each job that shares {self.root}; or set "
            "data.shuffle_block_rows, so that fewer shards are in use at a time",
        )

    def _evict(self, most: int) -> bool:
        """Remove shards, the one used longest ago first, until `most` bytes or fewer are left."""
        found = []
        for file in self.root.glob("*/split/*"):
            try:
                facts = file.stat()
            except OSError:
                continue
            if file.name != MANIFEST and not file.name.startswith("."):
                found.append((max(facts.st_atime_ns, facts.st_mtime_ns), file, facts.st_size))
        total = sum(size for _, _, size in found)
        total += sum(int(part.name.split("@")[-3]) for part in self._on_the_way())
        for _, file, size in sorted(found):
            if total <= most:
                break
            file.unlink(missing_ok=True)
            total -= size
        return total <= most

    def _sweep(self) -> None:
        """Remove what killed jobs left on its way: nobody holds its lock."""
        for partial in self._on_the_way():
            lock = partial.parent.parent / "locks" / partial.name.rsplit("@", 3)[0]
            try:
                with lock.open("w") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(partial, ignore_errors=True)
            except OSError:
                continue


class RemoteShards:
    """The shards of one split behind a URL, brought into the cache when they are needed."""

    def __init__(self, cache: ShardCache, remote: Remote, home: Path, manifest: Manifest) -> None:
        self.cache, self.remote, self.home, self.manifest = cache, remote, home, manifest
        self.folder = home / "split"
        self._checked: dict[int, FileKey] = {}
        """Which file was checked, by shard."""
        self._touched: dict[int, float] = {}

    def need(self, numbers: Sequence[int]) -> int:
        """Return the bytes of shards."""
        return sum(self.manifest.shards[number].bytes for number in numbers)

    def bring(self, numbers: Sequence[int], beside: int = 0, tick: Tick = go_on) -> None:
        """Download those shards that are not here, several at a time, and mark all as in use.

        Args:
            numbers: Of the shards.
            beside: Bytes of other shards that are needed at the same time.
            tick: Called before each; what it raises ends the reading.

        Raises:
            ConfigError: the cache cannot hold them at once.
            DataError: one is missing, corrupt or does not come; names it.
        """
        limit = self.cache.limit
        if limit is not None and self.need(numbers) + beside > limit:
            raise self.cache.too_small(self.need(numbers) + beside)
        absent = [number for number in numbers if not self._touch(number)]

        def bring_one(number: int) -> None:
            tick()
            self.path(number)

        if len(absent) == 1:
            bring_one(absent[0])
        elif absent:
            with ThreadPoolExecutor(min(DOWNLOADS, len(absent))) as pool:
                list(pool.map(bring_one, absent))

    def path(self, number: int) -> Path:
        """Return the file of a shard, here and checked; another job may remove it at any time.

        Raises:
            DataError: it is missing, corrupt or does not come; names it.
        """
        shard = self.manifest.shards[number]
        file = self.folder / shard.file
        try:
            here: FileKey | None = FileKey.of(file.stat())
        except OSError:
            here = None
        if here is None or here != self._checked.get(number):
            self._checked[number] = self.bring_file(
                shard.file, self.folder, shard.sha256, shard.bytes
            )
            self._touch(number)
        return file

    def let_go(self, numbers: Sequence[int]) -> list[int]:
        """Return those of the shards that were evicted, whose mappings only take up space."""
        names = self.manifest.shards
        return [n for n in numbers if not (self.folder / names[n].file).exists()]

    def bring_file(self, name: str, folder: Path, expected: str, size: int = 0) -> FileKey:
        """Have a file in a folder, whole and as expected; one damaged there is downloaded again.

        Returns:
            Which file it is that was checked.

        Raises:
            DataError: it is missing, corrupt or does not come; names it.
        """
        target = folder / Path(name).name
        for _ in range(_TRIES):
            # What another process brings while this one waits is checked like all else.
            found = _check_file(target, expected) or self._download(name, target, expected, size)
            if found:
                return found
        raise DataError(
            "is removed or damaged again and again once it is there",
            where=target,
            fix="see to the disk, and to other programs that use the folder",
        )

    def _download(self, name: str, target: Path, expected: str, size: int) -> FileKey | None:
        """Download a file and put it in its place; None where another has just done so."""
        partial = self.home / "partial" / target.name
        lock = self.home / "locks" / target.name
        # Who waits gives the other the time that the other's download has.
        with hold(lock, self.cache.watch, 2 * self.cache.seconds + 1):
            if target.exists():
                return None
            for left in partial.parent.glob(f"{partial.name}@*"):  # of a killed job
                shutil.rmtree(left, ignore_errors=True)
            aside = self.cache.make_room(partial, size)
            try:
                file = self._fetch_sound(name, aside, expected)
                target.parent.mkdir(parents=True, exist_ok=True)
                key = FileKey.of(file.stat())
                file.replace(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return key

    def _fetch_sound(self, name: str, aside: Path, expected: str) -> Path:
        """Download a file; what arrives damaged is downloaded once more."""
        for _ in range(2):
            file = self.remote.fetch(name, aside)
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
                os.fsync(content.fileno())
            if found == expected:
                return file
            file.unlink()
        raise DataError(
            "is corrupt where it is stored: its SHA-256 is not the manifest's",
            where=self.remote.join(name),
            fix="upload it again from a good copy, or prepare the corpus again",
        )

    def _touch(self, number: int) -> bool:
        """Mark a shard as in use, now and then; False where it is not here.

        By its time of access: that of its last change is part of what it is known by.
        """
        now = time.monotonic()
        if now - self._touched.get(number, -_TOUCH_SECONDS) < _TOUCH_SECONDS:
            return True
        file = self.folder / self.manifest.shards[number].file
        try:
            os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
        except OSError:
            return False
        self._touched[number] = now
        return True


def _check_file(file: Path, expected: str) -> FileKey | None:
    """Return which file is there if its SHA-256 is as expected; a damaged one is removed.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with file.open("rb") as content:
            key = FileKey.of(os.fstat(content.fileno()))
            if hashlib.file_digest(content, "sha256").hexdigest() == expected:
                return key
        if FileKey.of(file.stat()) == key:  # or another process has put a sound one there
            file.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=file) from error
    return None


def _write_whole(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".new-", delete=False) as aside:
        aside.write(data)
        aside.flush()
        os.fsync(aside.fileno())
    Path(aside.name).replace(file)
