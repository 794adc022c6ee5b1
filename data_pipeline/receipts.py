"""Output by URL: what a corpus in object storage leaves on this machine, all but its shards.

The corpus there is what counts; the receipt is a copy of its manifests, tokenizer and lists, so
that whoever needs those reads them as of any corpus.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path, PurePosixPath

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.files import exists, find_files, read_bytes
from shoal.data_pipeline.manifest import MANIFEST, TOKENIZER, read_manifest
from shoal.data_pipeline.pieces import SPLITS
from shoal.data_pipeline.transfers import upload_folder

RECEIPTS = Path("data") / ".remote"
"""Receives receipts, and the work on a corpus before it is sent."""

_KNOWN = (TOKENIZER, *SPLITS)
_SHARDS = (".mds", ".mds.zstd", ".mds.zst")


def receipt_folder(url: str) -> Path:
    """Return where the receipt of a URL lies."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", url).strip("-.")
    return RECEIPTS / f"{plain[-60:]}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def fetch_receipt(url: str, splits: list[str], receipt: Path) -> bool:
    """Bring a receipt up to what lies behind the URL.

    Returns:
        Whether all of the corpus is there; else an upload was cut short, or there is nothing.

    Raises:
        ConfigError: something else is there.
        DataError: the storage cannot be reached, refuses, or names files that lead elsewhere.
    """
    url = url.rstrip("/")
    if not all(exists(f"{url}/{name}/{MANIFEST}") for name in splits):
        _check_free(url)
        if receipt.exists():
            shutil.rmtree(receipt)
        return False
    if all(_is_same(receipt / name / MANIFEST, f"{url}/{name}/{MANIFEST}") for name in splits):
        return True
    aside = receipt.with_name(f"{receipt.name}.new")
    if aside.exists():
        shutil.rmtree(aside)
    for file in find_files(url).files:
        parts = PurePosixPath(file.name).parts
        if parts[0] not in _KNOWN or file.name.endswith(_SHARDS):
            continue
        if len(parts) != 2 or ".." in parts:
            raise DataError("is no part of a corpus", where=file.path)
        (aside / parts[0]).mkdir(parents=True, exist_ok=True)
        (aside / file.name).write_bytes(read_bytes(file.path))
    if receipt.exists():
        shutil.rmtree(receipt)
    aside.rename(receipt)
    return True


def _is_same(file: Path, url: str) -> bool:
    return file.is_file() and file.read_bytes() == read_bytes(url)


def _check_free(url: str) -> None:
    """Refuse a prefix that holds what no upload of ours has left there."""
    for file in find_files(url).files if exists(url) else ():
        if PurePosixPath(file.name).parts[0] not in _KNOWN:
            raise ConfigError(
                f"holds something else, such as {file.name}",
                where=url,
                fix="choose another output=..., or remove it",
            )


def send_corpus(folder: Path, url: str) -> None:
    """Upload a finished corpus, its manifests last, and then remove its shards here.

    Raises:
        DataError: the storage cannot be reached, refuses, or shows other sizes afterwards.
    """
    upload_folder(folder, url.rstrip("/"))
    for name in SPLITS:
        if (folder / name).is_dir():
            for shard in read_manifest(folder / name).shards:
                (folder / name / shard.file).unlink()
