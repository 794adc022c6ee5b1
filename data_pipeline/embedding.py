"""Text of rows to vectors of length one; the door to scikit-learn's text tools and to
sentence-transformers.

What maps texts to vectors is an `Embed`: a frozen dataclass of paths, which every process can
rebuild, and which is called with texts. A third kind, the hidden states of a model of ours, comes
from the launcher.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.configs.clusters import EmbeddingConfig
from shoal.configs.errors import ConfigError, DataError, PreflightError
from shoal.data_pipeline.manifest import hash_file
from shoal.data_pipeline.store import write_whole
from shoal.data_pipeline.tokens import save_array

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors of length one, or zero where there is nothing to tell.  # (n, dims) float32"""

EMBED_ROWS = 512
"""Texts embedded in one call; never another number, since floats depend on it."""

FACTS = "embedder.json"
RARITY = "rarity.npy"
COMPONENTS = "components.npy"

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_POWER_ITERATIONS = 5


@dataclass(frozen=True)
class TfidfEmbed:
    """Hashed words, weighted by their rarity, on the main directions of a sample.

    Latent semantic indexing (Deerwester et al. 1990) with feature hashing (Weinberger et al. 2009).

    Args:
        folder: Written by `fit_tfidf`.
    """

    folder: Path

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts."""
        rarity, components = _load_tfidf(self.folder)
        weighted = _weigh(_count_words(texts, len(rarity)), rarity)
        return normalise(np.asarray(weighted @ components.T))


def fit_tfidf(
    batches: Iterable[Sequence[str]], config: EmbeddingConfig, seed: int, folder: Path
) -> TfidfEmbed:
    """Take the rarity of words and the main directions from a sample, and write them.

    Memory: 12 bytes for each different word of each row, and 4 x buckets x dimensions.

    Args:
        batches: Texts of the sample.
        config: Buckets and dimensions.
        seed: Of the decomposition.
        folder: Receives embedder.json, rarity.npy (buckets,) and components.npy (dims, buckets).

    Raises:
        DataError: the sample has next to no words.
    """
    import scipy.sparse
    from sklearn.decomposition import TruncatedSVD

    counts = scipy.sparse.vstack([_count_words(texts, config.buckets) for texts in batches])
    counts = counts.tocsr()
    present = np.bincount(counts.indices, minlength=config.buckets)
    most = min(counts.shape[0], int(np.count_nonzero(present))) - 1
    if most < 1:
        raise DataError("the sample of rows holds next to no words", where="embedding")
    rarity = (np.log((1 + counts.shape[0]) / (1 + present)) + 1).astype(np.float32)
    with one_thread():
        decomposition = TruncatedSVD(
            min(config.dimensions, most), n_iter=_POWER_ITERATIONS, random_state=seed
        ).fit(_weigh(counts, rarity))
    folder.mkdir(parents=True, exist_ok=True)
    save_array(folder / RARITY, rarity)
    save_array(folder / COMPONENTS, decomposition.components_.astype(np.float32))
    facts = {
        "method": "tfidf",
        "rows": counts.shape[0],
        "explained_variance": float(decomposition.explained_variance_ratio_.sum()),
    }
    write_whole(folder / FACTS, json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return TfidfEmbed(folder)


@lru_cache(maxsize=4)
def _load_tfidf(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        rarity = np.load(folder / RARITY, allow_pickle=False)
        components = np.load(folder / COMPONENTS, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"the embedder cannot be read: {error}", where=folder) from None
    return rarity, components


def _count_words(texts: Sequence[str], buckets: int) -> csr_matrix:
    """Return how often words of each bucket occur.  # (texts, buckets) float32"""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=buckets,
        alternate_sign=False,
        norm=None,
        stop_words="english",
        dtype=np.float32,
    )
    return vectorizer.transform(texts)


def _weigh(counts: csr_matrix, rarity: np.ndarray) -> csr_matrix:
    """Return (1 + ln count) x rarity, in rows of length one (Salton and Buckley 1988)."""
    from sklearn.preprocessing import normalize

    weighted = counts.copy()
    weighted.data = (np.log(counts.data) + 1) * rarity[counts.indices]
    return normalize(weighted, copy=False)


def read_words() -> Callable[[str], list[str]]:
    """Return the function that takes a text apart into the words that are counted."""
    from sklearn.feature_extraction.text import CountVectorizer

    split: Callable[[str], list[str]] = CountVectorizer(stop_words="english").build_analyzer()
    return split


@dataclass(frozen=True)
class SentenceEmbed:
    """A sentence-transformers model of a local folder (Reimers and Gurevych 2019).

    Args:
        folder: Holds modules.json, and weights as safetensors.
    """

    folder: Path

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts; what exceeds the model's length is cut off."""
        model = _load_sentence_model(self.folder)
        vectors = model.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)
        return normalise(np.asarray(vectors, dtype=np.float32))


def open_sentence_model(path: str | Path) -> SentenceEmbed:
    """Check the folder of a sentence-transformers model; nothing of it is run.

    Raises:
        ConfigError: no such folder; a name on a hub is none.
        DataError: it holds pickled weights, or asks to run code of its own.
    """
    folder = Path(path).expanduser()
    if not (folder / "modules.json").is_file():
        raise ConfigError(
            "no sentence-transformers model there: modules.json is missing",
            where=folder,
            fix="give a local folder: SentenceTransformer(NAME).save(FOLDER) writes one",
        )
    for module in _read_json(folder / "modules.json"):
        # A class of the folder itself would be imported, whatever trust_remote_code says.
        kind = str(module.get("type")) if isinstance(module, dict) else "None"
        if not kind.startswith("sentence_transformers."):
            raise DataError(f"asks to run code of its own: {kind}", where=folder / "modules.json")
    for file in sorted(folder.rglob("*")):
        if file.suffix in _PICKLES:
            raise DataError(
                "holds pickled weights, and pickles run code when they are read",
                where=file,
                fix="save the model with safe_serialization=True, and remove this file",
            )
        if file.suffix == ".py":
            raise DataError("holds code, which is never run", where=file, fix="remove it")
        if file.name == "config.json" and "auto_map" in _read_json(file):
            raise DataError("asks to run code of its own (auto_map)", where=file)
    return SentenceEmbed(folder)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError("not readable as JSON", where=file) from None


@lru_cache(maxsize=1)
def _load_sentence_model(folder: Path) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise PreflightError(
            "sentence-transformers is not installed", fix="pip install 'shoal[embeddings]'"
        ) from None
    try:
        return SentenceTransformer(
            str(folder),
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot be loaded: {error}", where=folder) from None


def hash_folder(folder: Path) -> str:
    """Return the SHA-256 over names and contents of all files of a model's folder."""
    import hashlib

    total = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        total.update(f"{file.relative_to(folder)}\0{hash_file(file)}\n".encode())
    return total.hexdigest()


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length one; zeros stay.  # (n, dims) float32"""
    wide = vectors.astype(np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", wide, wide, dtype=np.float64))[:, None]
    return (wide / np.where(norms > 0, norms, 1)).astype(np.float32)


def embed_batches(embed: Embed, batches: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
    """Yield the vectors of each batch, computed alike in any process."""
    with one_thread():
        for texts in batches:
            yield embed(texts)


def one_thread() -> Any:
    """Compute in one thread meanwhile: sums by several depend on how many there are."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)
