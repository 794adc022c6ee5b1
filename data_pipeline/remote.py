"""Files of a split by URL; the door to mosaicml-streaming's downloads."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.mds import import_streaming

ATTEMPTS = 3
_FIRST_PAUSE = 0.2
_POLL_SECONDS = 0.02
_ABSENT = {"403", "404", "AccessDenied", "NoSuchBucket", "NoSuchKey"}


class Remote:
    """A folder behind a URL: s3://, gs://, azure://, oci://, hf://, sftp://, dbfs:/ or file://.

    Args:
        url: Of the folder.
        seconds: Without a byte for so long, a download has failed.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.seconds = url.rstrip("/"), seconds
        self._downloader: Any = None

    def join(self, name: str) -> str:
        """Return the URL of a file; `../` in front of the name leads out of the folder."""
        base = self.url
        while name.startswith("../"):
            base, name = base.rpartition("/")[0], name[3:]
        return f"{base}/{name}"

    def fetch(self, name: str, folder: Path) -> Path:
        """Download a file into an empty folder; what breaks on the way is tried again.

        The folder may be removed while an attempt that was given up still hangs in it.

        Raises:
            DataError: there is no such file, nothing came for too long, or it failed time and
                again; names the URL.
            ConfigError: there is no way to read such URLs here.
        """
        url, file = self.join(name), folder / Path(name).name
        for attempt in range(1, ATTEMPTS + 1):
            # What came of a broken attempt would be taken for the whole file.
            file.unlink(missing_ok=True)
            error = self._try(self._connect(), url, file)
            if error is None:
                return file
            if _is_absent(error):
                raise DataError(
                    "there is no such file, or it may not be read", where=url, fix="see whether "
                    "the split was uploaded whole, and with which credentials it can be read"
                )  # fmt: skip
            if isinstance(error, ImportError):
                raise _explain_missing(url, error)
            if attempt < ATTEMPTS:
                time.sleep(_FIRST_PAUSE * 4 ** (attempt - 1))
        cause = f"cannot be downloaded, tried {ATTEMPTS} times: {type(error).__name__}: {error}"
        raise DataError(cause, where=url)

    def _connect(self) -> Any:
        """Return the library's downloader, chosen once; it holds the connection.

        Another thread, whose download stalls, may give it up at any time.
        """
        downloader = self._downloader
        if downloader is not None:
            return downloader
        import_streaming()
        from streaming.base.storage.download import CloudDownloader

        parts = urlparse(self.url)
        try:
            downloader = CloudDownloader.get("" if parts.scheme == "file" else self.url)
        except ImportError as error:
            raise _explain_missing(self.url, error) from None
        except ValueError:
            raise ConfigError(
                f"shards cannot be read from {parts.scheme}:// URLs", where=self.url
            ) from None
        self._downloader = downloader
        return downloader

    def _try(self, downloader: Any, url: str, file: Path) -> BaseException | None:
        """Download once, watched; return what went wrong.

        The library cannot be told to give up, so it works in a thread that is left behind.
        """
        parts = urlparse(url)
        source = unquote(parts.path) if parts.scheme == "file" else url
        failures: list[BaseException] = []

        def work() -> None:
            try:
                downloader.download(source, str(file), self.seconds)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work, name="shoal-download", daemon=True)
        thread.start()
        if not wait_while_growing(
            lambda: not thread.is_alive(), lambda: count_bytes(file.parent), self.seconds
        ):
            self._downloader = None
            raise DataError(
                f"download stalled: not a byte for {self.seconds:g} seconds",
                where=url,
                fix="see to the network or the storage, or raise data.download_seconds",
            )
        return failures[0] if failures else None


def wait_while_growing(
    is_over: Callable[[], bool], measure: Callable[[], object], seconds: float
) -> bool:
    """Wait for something; False once what `measure` returns has stayed the same for `seconds`."""
    seen, last = measure(), time.monotonic()
    pause = 0.001
    while not is_over():
        found = measure()
        if found != seen:
            seen, last = found, time.monotonic()
        elif time.monotonic() - last > seconds:
            return False
        time.sleep(pause)
        pause = min(_POLL_SECONDS, 2 * pause)
    return True


def count_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder; what goes away meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(parent) / name).stat().st_size
    return total


def _is_absent(error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError):
        return True
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(code) in _ABSENT or type(error).__name__ == "NotFound"


def _explain_missing(url: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"reading it needs a package that is not installed: {error}",
        where=url,
        fix="install the storage's client; for s3:// it is shoal[s3]",
    )
