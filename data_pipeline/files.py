"""Files here and in object storage, alike: the door to fsspec, for reading corpora.

A path is a local one or a URL (`s3://`, `gs://`, ...). Whatever a driver raises becomes
an error that names the URL, and no error shows a secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from shoal.configs.errors import ConfigError, DataError, PreflightError, ShoalError

BUFFER_BYTES = 1 << 20
_REMOTE_BLOCK = 8 << 20  # one request each: below some megabytes latency is what one waits for

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WILD = re.compile(r"[*?\[]")
_DRIVERS = {
    "s3": "'shoal[s3]'", "s3a": "'shoal[s3]'", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs",
    "abfss": "adlfs", "az": "adlfs", "http": "aiohttp", "https": "aiohttp",
}  # fmt: skip
_STAMPS = (
    "ETag", "etag", "generation", "md5Hash", "content_md5", "mtime", "LastModified",
    "last_modified", "updated", "created",
)  # fmt: skip
_SECRETS = re.compile(
    r"(?<=://)[^/@\s]*:[^/@\s]*(?=@)"
    r"|(?<=[?&])(?:x-(?:amz|goog)-(?:signature|security-token|credential)|sig|signature|token|"
    r"access_token|password|key|secret)=[^&\s]+",
    re.IGNORECASE,
)
_SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|ACCOUNT_KEY|SAS")


@dataclass(frozen=True)
class FileFacts:
    """One file as a listing shows it."""

    path: str
    """Local path or URL, to open it by."""
    name: str
    """Below the folder that was listed, with slashes."""
    bytes: int
    stamp: str
    """Changes when the contents do; empty where the storage tells nothing of the kind."""


def is_url(path: str | Path) -> bool:
    """Whether a path leads to other storage than the local file system."""
    return bool(_URL.match(str(path))) and not str(path).startswith("file://")


def local_path(path: str | Path) -> Path:
    """Return a local path as such; `file://` and `~` are understood."""
    return Path(str(path).removeprefix("file://")).expanduser()


@dataclass(frozen=True)
class Found:
    """What a path means."""

    kind: Literal["file", "folder", "glob"]
    files: tuple[FileFacts, ...]
    """Sorted by name; none where nothing is there."""


def find_files(path: str | Path) -> Found:
    """Return the files that a path means: itself, those below a folder, or those a glob matches.

    Raises:
        DataError: the storage cannot be reached, or refuses; below a folder here, a link to
            another folder, or one that leads nowhere.
        ConfigError: no such kind of URL, or a secret in it.
        PreflightError: the driver of this kind of URL is not installed.
    """
    found = _find_remote(str(path)) if is_url(path) else _find_local(local_path(path))
    return Found(found.kind, tuple(sorted(found.files, key=lambda file: file.name)))


def _find_local(given: Path) -> Found:
    kind: Literal["file", "folder", "glob"] = "glob"
    if given.is_file():
        kind, base, paths = "file", given.parent, [given]
    elif given.is_dir():
        kind, base, paths = "folder", given, list(_walk(given))
    else:
        base, paths = _glob_local(given)
    for path in paths:
        if path.is_symlink() and not path.exists():
            _refuse_link(path, base, "leads nowhere", "mend or remove it")
    files = [_local_facts(p, p.relative_to(base).as_posix()) for p in paths if p.is_file()]
    return Found(kind, tuple(files))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder; what may not be looked into is not passed over."""

    def refuse(error: OSError) -> None:
        fix = "give yourself the right to read it, or name the files by a glob"
        raise DataError(f"cannot be read: {error}", where=error.filename, fix=fix)

    for above, folders, names in os.walk(folder, onerror=refuse):
        for link in (Path(above, name) for name in folders):
            if link.is_symlink():
                fix = "name it as a source of its own, or remove it"
                _refuse_link(link, folder, "is a link to a folder, which is not followed", fix)
        yield from (Path(above, name) for name in names)


def _refuse_link(link: Path, base: Path, cause: str, fix: str) -> None:
    """Refuse a link below a folder, unless it is hidden: editors leave such, and none is read."""
    if not any(part.startswith(".") for part in link.relative_to(base).parts):
        raise DataError(cause, where=link, fix=fix)


def _glob_local(pattern: Path) -> tuple[Path, list[Path]]:
    """Expand a glob; the base is the longest folder before the first wildcard."""
    parts = pattern.parts
    wild = next((i for i, part in enumerate(parts) if _WILD.search(part)), len(parts))
    base = Path(*parts[:wild])
    if wild == len(parts) or not base.is_dir():
        return base, []
    return base, list(base.glob(str(Path(*parts[wild:]))))


def _local_facts(path: Path, name: str) -> FileFacts:
    facts = path.stat()
    return FileFacts(str(path), name, facts.st_size, f"{facts.st_size} mtime={facts.st_mtime_ns}")


def _find_remote(url: str) -> Found:
    kind: Literal["file", "folder", "glob"] = "folder"
    with explain(url):
        fs, path = reach(url)
        facts = _look_up(fs, path)
        wild = _WILD.search(path)
        base, found = path, {}
        if facts is not None and facts["type"] == "file":
            kind, base, found = "file", path.rpartition("/")[0], {path: facts}
        elif facts is not None:
            found = fs.find(path, detail=True)
        elif wild:
            kind, base = "glob", path[: wild.start()].rpartition("/")[0]
            found = fs.glob(path, detail=True)
        files = [
            _remote_facts(_as_url(fs, url, name), name.removeprefix(base).lstrip("/"), one)
            for name, one in found.items()
            if one["type"] == "file" and not name.endswith("/")  # that marks an empty folder
        ]
    return Found(kind, tuple(files))


def _look_up(fs: Any, path: str) -> dict[str, Any] | None:
    """Return what a storage knows of a name; None if nothing is there."""
    try:
        return dict(fs.info(path))
    except FileNotFoundError:
        return None


def _as_url(fs: Any, given: str, path: str) -> str:
    """Return the URL of what a driver calls `path`, in the words of a URL given beside it."""
    top, place = "/".join(given.split("/")[:3]), given.split("/")[2]
    first, _, rest = path.lstrip("/").partition("/")
    if place.split("@")[0] == first:  # abfs names its account behind the @, drivers do not
        return f"{top}/{rest}"
    return str(fs.unstrip_protocol(path))


def _remote_facts(url: str, name: str, facts: dict[str, Any]) -> FileFacts:
    size = facts.get("size")
    if size is None:
        raise DataError("its server does not tell its size", where=url, fix="download it first")
    known = next((f"{key}={facts[key]}" for key in _STAMPS if facts.get(key)), "").replace('"', "")
    return FileFacts(url, name, int(size), f"{size} {known}" if known else "")


def stat(path: str | Path) -> FileFacts:
    """Return size and stamp of one file.

    Raises:
        DataError: there is none, or the storage cannot be reached.
    """
    found: list[FileFacts] = []
    if is_url(path):
        with explain(str(path)):
            fs, inside = reach(str(path))
            facts = _look_up(fs, inside)
            if facts is not None and facts["type"] == "file":
                found = [_remote_facts(str(path), inside.rpartition("/")[2], facts)]
    elif local_path(path).is_file():
        found = [_local_facts(local_path(path), local_path(path).name)]
    if not found:
        fix = "check the path, and that the disk or bucket it lies on is there"
        raise DataError("no such file", where=redact(str(path)), fix=fix)
    return found[0]


def is_changed(path: str, stamp: str) -> bool:
    """Whether a file is another one than when it had a stamp, as far as its storage tells.

    Raises:
        DataError: it is gone, or the storage cannot be reached.
    """
    (size, _, known), (size_now, _, known_now) = (
        one.partition(" ") for one in (stamp, stat(path).stamp)
    )
    # A driver may tell other things of a file than of a listing: only the same thing compares.
    alike = known.partition("=")[0] == known_now.partition("=")[0]
    return bool(size and size_now) and (size != size_now or (alike and known != known_now))


def exists(path: str | Path) -> bool:
    """Whether a file, or a folder with something in it, is there.

    Raises:
        DataError: the storage does not answer, or refuses: that is no "no".
    """
    if not is_url(path):
        return local_path(path).exists()
    with explain(str(path)):
        fs, inside = reach(str(path))
        return _look_up(fs, inside) is not None


def open_file(path: str | Path) -> io.BufferedReader:
    """Open a file for reading; it can be sought in and has a buffer.

    Raises:
        DataError: a URL that cannot be read, now or while it is. OSError for local files.
    """
    if not is_url(path):
        return cast(io.BufferedReader, local_path(path).open("rb", BUFFER_BYTES))
    with explain(str(path)):
        fs, inside = reach(str(path))
        raw = fs.open(inside, "rb", block_size=_REMOTE_BLOCK, cache_type="readahead")
    return io.BufferedReader(_RemoteFile(raw, str(path)), BUFFER_BYTES)


def read_bytes(path: str | Path) -> bytes:
    """Return the contents of a small file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise DataError(f"cannot be read: {error}", where=path) from None


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's contents.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot be read: {error}", where=path) from None


class _RemoteFile(io.RawIOBase):
    """A file of a driver, whose errors name the URL however far away they surface."""

    def __init__(self, raw: Any, url: str) -> None:
        self._raw = raw
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self._raw.tell())

    def readinto(self, buffer: Any) -> int:
        with explain(self._url):
            data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def reach(url: str) -> tuple[Any, str]:
    """Return the fsspec driver of a URL, and what the driver calls it."""
    check_url(url)
    top = "/".join(url.split("/")[:3])
    protocol = url.partition("://")[0]
    # Drivers look these up once; a process that changes them (as tests do) means another place.
    seen = tuple(sorted(i for i in os.environ.items() if re.match("AWS_|GOOGLE_|AZURE_", i[0])))
    try:
        fs = _connect(top, os.getpid(), seen)
    except ImportError as error:
        raise PreflightError(
            f"the driver of {protocol}:// is not installed: {error}",
            where=redact(url),
            fix=f"pip install {_DRIVERS.get(protocol, f'the fsspec driver of {protocol}://')}",
        ) from None
    except ValueError as error:
        fix = "s3://bucket/folder, for example"
        raise ConfigError(redact(str(error)), where=redact(url), fix=fix) from None
    return fs, str(fs._strip_protocol(url)).rstrip("/")


@lru_cache(maxsize=16)
def _connect(top: str, process: int, settings: tuple) -> Any:
    """Return a driver; one a process, since connections do not survive a fork."""
    import fsspec

    return fsspec.core.url_to_fs(top, use_listings_cache=False, skip_instance_cache=True)[0]


def check_url(url: str) -> None:
    """Refuse a URL with a secret in it: paths are written to logs and manifests.

    Raises:
        ConfigError: it has one.
    """
    if _SECRETS.search(url):
        raise ConfigError(
            "a secret stands in the URL",
            where=redact(url),
            fix="give it by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...)",
        )


def redact(text: str) -> str:
    """Return a text without the secrets in its URLs and those of the environment."""
    text = _SECRETS.sub("***", text)
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) > 7:
            text = text.replace(value, "***")
    return text


@contextlib.contextmanager
def explain(url: str) -> Iterator[None]:
    """Turn whatever a driver raises into an error of ours that names the URL."""
    where = redact(url)
    try:
        yield
    except ShoalError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"is not there: {redact(str(error))}", where=where) from None
    except PermissionError as error:
        raise DataError(
            f"access refused: {redact(str(error))}",
            where=where,
            fix="check credentials and rights (s3://: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, AWS_ENDPOINT_URL)",
        ) from None
    except Exception as error:  # drivers raise classes of botocore, aiohttp, google.auth, ...
        cause = redact(f"{type(error).__name__}: {error}")
        missing = "credentials" in cause.lower()
        raise DataError(
            f"cannot be reached: {cause}",
            where=where,
            fix="give credentials by the environment (s3://: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
            if missing
            else "check network and address (s3://: AWS_ENDPOINT_URL, AWS_DEFAULT_REGION)",
        ) from None
