"""What tells duplicates: the digest of a text, its set of shingles, and its MinHash bands.

A signature is `bands` x `band_hashes` minima over a document's shingles, each under another
multiply-add hash (Broder 1997). The minima of a band are folded into one key; two documents of
Jaccard similarity s share a key in at least one band with probability 1 - (1 - s^r)^b, for b bands
of r hashes (Leskovec, Rajaraman and Ullman 2014, section 3.4).
"""

from __future__ import annotations

import hashlib
import os
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from shoal.configs.corpus import NearDuplicatesConfig

NO_KEY = 0
"""Band key of a document without a word, which matches nothing."""

_PUNCTUATION = (
    string.punctuation + "\u2018\u2019\u201c\u201d\u2013\u2014\u2026\u00ab\u00bb\u00b7\u2022"
)
_CACHED_WORDS = 500_000
_CACHED_LENGTH = 40
_BLOCK = 1024  # shingles at once, so that bands x band_hashes x block stays in the cache
_SEED = 20_480_817
_DIGEST_ROWS = 2


def digest(text: str) -> bytes:
    """Return 16 bytes that two texts share only if they are the same (BLAKE2b)."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class _WordHashes(dict[str, int]):
    """64-bit hash of each word, by how it stands in the text; 0 for one of punctuation alone."""

    def __missing__(self, raw: str) -> int:
        import xxhash

        word = raw.strip(_PUNCTUATION)
        number = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass")) | 1 if word else 0
        if len(raw) <= _CACHED_LENGTH:
            if len(self) >= _CACHED_WORDS:
                self.clear()
            self[raw] = number
        return number


class Shingler:
    """Turns a text into the hashes of its shingles: its runs of `ngram` words.

    Words are what blanks separate, in lower case, without punctuation at their ends.
    """

    def __init__(self, ngram: int) -> None:
        """Take the words a shingle has."""
        import numpy as np

        self._ngram = ngram
        self._words = _WordHashes()
        draw = np.random.Generator(np.random.PCG64(_SEED))
        self._factors = draw.integers(0, 2**63, size=ngram, dtype=np.uint64) * 2 + 1

    def hash_words(self, text: str) -> np.ndarray[Any, Any]:
        """Return a 64-bit hash of each word, in the order of the text.  # (words,) uint64"""
        import numpy as np

        raw = text.lower().split()
        words = np.fromiter(map(self._words.__getitem__, raw), np.uint64, len(raw))
        return words if words.all() else words[words != 0]

    def join_words(self, words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return 64-bit hashes of all shingles, repeated ones too.  # (shingles,) uint64

        A text of fewer words than a shingle has is one shingle; without a word it has none.
        """
        size = min(self._ngram, len(words))
        if size == 0:
            return words
        shingles = len(words) - size + 1
        hashes = words[:shingles] * self._factors[0]
        for place in range(1, size):
            hashes += words[place : place + shingles] * self._factors[place]
        return _mix(hashes)

    def hash_shingles(self, text: str) -> np.ndarray[Any, Any]:
        """Return the shingles of a text, as `join_words` does."""
        return self.join_words(self.hash_words(text))


def _mix(hashes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Spread 64-bit numbers in place, so that each half depends on all bits (Stafford 2011)."""
    import numpy as np

    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes ^= hashes >> np.uint64(shift)
        hashes *= np.uint64(factor)
    hashes ^= hashes >> np.uint64(31)
    return hashes


class Signer:
    """Computes the band keys of documents."""

    def __init__(self, config: NearDuplicatesConfig) -> None:
        """Draw the hash functions; they are the same in every process."""
        import numpy as np

        draw = np.random.Generator(np.random.PCG64(_SEED + 1))
        hashes = config.bands * config.band_hashes
        shape = (hashes, 1)
        self._shape = (config.bands, config.band_hashes)
        self._factors = draw.integers(0, 2**31, size=shape, dtype=np.uint32) * 2 + 1
        self._addends = draw.integers(0, 2**32, size=shape, dtype=np.uint32)
        self._folds = draw.integers(0, 2**63, size=config.band_hashes, dtype=np.uint64) * 2 + 1
        self._shingler = Shingler(config.ngram)
        self._buffer = np.empty((hashes, _BLOCK), np.uint32)

    def sign(self, text: str) -> np.ndarray[Any, Any]:
        """Return one key a band, NO_KEY for a text without a word.  # (bands,) uint64"""
        import numpy as np

        hashes = (self._shingler.hash_shingles(text) >> np.uint64(32)).astype(np.uint32)
        if len(hashes) == 0:
            return np.full(self._shape[0], NO_KEY, np.uint64)
        minima = self._minimize(hashes).reshape(self._shape).astype(np.uint64)
        keys = _mix((minima * self._folds).sum(axis=1, dtype=np.uint64))
        return np.maximum(keys, NO_KEY + 1)

    def _minimize(self, hashes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the least value under each hash function.  # (bands * band_hashes,) uint32"""
        import numpy as np

        least = None
        for first in range(0, len(hashes), _BLOCK):
            block = hashes[first : first + _BLOCK]
            values = self._buffer[:, : len(block)]
            np.multiply(self._factors, block, out=values)
            values += self._addends
            here = values.min(axis=1)
            least = here if least is None else np.minimum(least, here)
        assert least is not None  # sign() has seen a shingle
        return least


@dataclass(frozen=True)
class Keys:
    """By what the documents of a piece are compared."""

    digests: np.ndarray[Any, Any]
    """# (documents, 2) uint64"""
    bands: np.ndarray[Any, Any]
    """# (documents, bands) uint64"""


def sign_piece(texts: Iterable[str], config: NearDuplicatesConfig | None) -> Keys:
    """Return the keys of documents in their order; without near duplicates there are no bands."""
    import numpy as np

    signer = None if config is None else Signer(config)
    digests = bytearray()
    rows = []
    for text in texts:
        digests += digest(text)
        if signer is not None:
            rows.append(signer.sign(text))
    bands = np.stack(rows) if rows else np.empty((0, 0 if config is None else config.bands))
    pairs = np.frombuffer(bytes(digests), "<u8").reshape(-1, _DIGEST_ROWS)
    if config is None:
        bands = np.empty((len(pairs), 0))
    return Keys(pairs.astype(np.uint64), bands.astype(np.uint64))


def save_array(file: Path, array: np.ndarray[Any, Any]) -> None:
    """Write one .npy file, whole or not at all."""
    import numpy as np

    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("wb") as raw:
        np.save(raw, array, allow_pickle=False)
        raw.flush()
        os.fsync(raw.fileno())
    aside.rename(file)


def save_keys(file: Path, keys: Keys) -> None:
    """Write keys, those of a band side by side so that a band is read alone."""
    import numpy as np

    save_array(file, np.ascontiguousarray(np.hstack([keys.digests, keys.bands]).T))


def load_keys(file: Path) -> Keys:
    """Map the keys of a piece, which are read where they are looked at.

    Raises:
        DataError: The file is not what `save_keys` writes.
    """
    import numpy as np

    try:
        table = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read keys: {error}", where=str(file)) from error
    if table.dtype != np.uint64 or table.ndim != 2 or len(table) < _DIGEST_ROWS:
        raise DataError("not a table of keys", where=str(file))
    return Keys(table[:_DIGEST_ROWS].T, table[_DIGEST_ROWS:].T)
