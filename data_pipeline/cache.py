"""Shards read by URL, kept in a folder that jobs share: downloaded once, checked, evicted by age.

    CACHE/room.lock                      held while room is made
    CACHE/KEY/split/                     manifest.json and the shards that are here
    CACHE/KEY/tokenizer/
    CACHE/KEY/locks/SHARD                held by who downloads it
    CACHE/KEY/partial/SHARD@BYTES@...    what is on its way; of a killed job where no lock is held

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.manifest import MANIFEST, TOKENIZER, Manifest, ShardFacts, read_manifest
from shoal.data_pipeline.remote import Remote, wait_while_growing

DOWNLOADS = 8
"""At a time, of one process."""

_TOUCH_SECONDS = 1.0
_numbers = count()


def default_cache() -> Path:
    """Return the user's folder for what can be downloaded again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "shoal" / "shards"


@contextmanager
def hold(lock: Path, watched: Path, seconds: float) -> Iterator[None]:
    """Hold a lock among threads and processes; who waits watches the files of who has it.

    Raises:
        DataError: it is held, and nothing has grown in `watched` for `seconds`.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:

        def is_ours() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        if not wait_while_growing(is_ours, watched, seconds):
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

        Raises:
            ConfigError: the cache is too small for it beside what other jobs download.
        """
        begun = time.monotonic()
        while True:
            with hold(self.root / "room.lock", self.root, self.seconds):
                if self.limit is None or self._evict(self.limit - size):
                    folder = Path(f"{partial}@{size}@{os.getpid()}@{next(_numbers)}")
                    folder.mkdir(parents=True)
                    return folder
            if time.monotonic() - begun > self.seconds:
                raise self.too_small(size)
            time.sleep(0.05)

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
                found.append((facts.st_mtime_ns, file, facts.st_size))
        total = sum(size for _, _, size in found)
        total += sum(int(part.name.split("@")[-3]) for part in self.root.glob("*/partial/*@*@*@*"))
        for _, file, size in sorted(found):
            if total <= most:
                break
            file.unlink(missing_ok=True)
            total -= size
        return total <= most

    def _sweep(self) -> None:
        """Remove what killed jobs left on its way: nobody holds its lock."""
        for partial in self.root.glob("*/partial/*@*@*@*"):
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
        self._checked: dict[int, int] = {}
        """Inode of the file that was checked, by shard."""
        self._touched: dict[int, float] = {}

    def need(self, numbers: Sequence[int]) -> int:
        """Return the bytes of shards."""
        return sum(self.manifest.shards[number].bytes for number in numbers)

    def bring(self, numbers: Sequence[int], beside: int = 0) -> None:
        """Download those shards that are not here, several at a time, and mark all as in use.

        Args:
            numbers: Of the shards.
            beside: Bytes of other shards that are needed at the same time.

        Raises:
            ConfigError: the cache cannot hold them at once.
            DataError: one is missing, corrupt or does not come; names it.
        """
        limit = self.cache.limit
        if limit is not None and self.need(numbers) + beside > limit:
            raise self.cache.too_small(self.need(numbers) + beside)
        absent = [number for number in numbers if not self._touch(number)]
        if len(absent) == 1:
            self.path(absent[0])
        elif absent:
            with ThreadPoolExecutor(min(DOWNLOADS, len(absent))) as pool:
                list(pool.map(self.path, absent))

    def path(self, number: int) -> Path:
        """Return the file of a shard, here and checked; another job may remove it at any time.

        Raises:
            DataError: it is missing, corrupt or does not come; names it.
        """
        shard = self.manifest.shards[number]
        if not self._is_sound(number, shard):
            self.bring_file(shard.file, self.folder, shard.sha256, shard.bytes)
            self._touch(number)
        return self.folder / shard.file

    def let_go(self, numbers: Sequence[int]) -> list[int]:
        """Return those of the shards that were evicted, whose mappings only take up space."""
        names = self.manifest.shards
        return [n for n in numbers if not (self.folder / names[n].file).exists()]

    def bring_file(self, name: str, folder: Path, expected: str, size: int = 0) -> None:
        """Download a file into a folder unless it is there; it appears whole and checked.

        Raises:
            DataError: it is missing, corrupt or does not come; names it.
        """
        target = folder / Path(name).name
        partial = self.home / "partial" / target.name
        lock = self.home / "locks" / target.name
        # Who waits gives the other the time that the other's download has.
        with hold(lock, partial.parent, 2 * self.cache.seconds + 1):
            if target.exists():
                return
            for left in partial.parent.glob(f"{partial.name}@*"):  # of a killed job
                shutil.rmtree(left, ignore_errors=True)
            aside = self.cache.make_room(partial, size)
            try:
                file = self._fetch_sound(name, aside, expected)
                folder.mkdir(parents=True, exist_ok=True)
                file.replace(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)

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

    def _is_sound(self, number: int, shard: ShardFacts) -> bool:
        """Whether a shard is here; looked at whole once, and removed if it was damaged here."""
        path = self.folder / shard.file
        try:
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if self._checked.get(number) == facts.st_ino:
                    return True
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return False
        if found != shard.sha256:
            path.unlink(missing_ok=True)
            return False
        self._checked[number] = facts.st_ino
        self._touch(number)
        return True

    def _touch(self, number: int) -> bool:
        """Mark a shard as in use, now and then; False where it is not here."""
        now = time.monotonic()
        if now - self._touched.get(number, -_TOUCH_SECONDS) < _TOUCH_SECONDS:
            return True
        try:
            os.utime(self.folder / self.manifest.shards[number].file)
        except OSError:
            return False
        self._touched[number] = now
        return True


def _write_whole(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".new-", delete=False) as aside:
        aside.write(data)
        aside.flush()
        os.fsync(aside.fileno())
    Path(aside.name).replace(file)
