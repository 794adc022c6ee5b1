"""What a vocabulary is worth on a domain: overlap, fertility and domain words beside another's.

The analysis of Luo et al. 2024 (arXiv:2405.09395) of its two tokenizers. Which words belong to the
domain it asked GPT-4; here they are given, or found by counting.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from shoal.data_pipeline.tokenizer import Tokenizer

MIN_RATIO = 10.83
"""Log-likelihood ratio from which a surplus is no chance: p < 0.001 at one degree of freedom."""
MIN_SURPLUS = 2.0
"""How many times as frequent a domain word is in the domain: in much text any surplus is sure."""

_WORD = re.compile(r"[^\W\d_]{3,}")
_LETTER = re.compile(r"[^\W\d_]")
_BATCH = 256


@dataclass(frozen=True)
class Overlap:
    """The entries two vocabularies have in common, compared as bytes."""

    shared: int
    entries: tuple[int, int]
    """Distinct entries of each."""
    shares: tuple[float, float]
    """What part of each is shared."""


@dataclass
class TextFacts:
    """One text as two tokenizers see it."""

    documents: int = 0
    words: int = 0
    """Stretches between blanks."""
    bytes: int = 0
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    counts: Counter[str] = field(default_factory=Counter, repr=False)
    """How often each lower-case word of three letters or more occurs."""

    @property
    def fertility(self) -> list[float]:
        """Tokens per word of each (Rust et al. 2021)."""
        return [tokens / max(self.words, 1) for tokens in self.tokens]

    @property
    def bytes_per_token(self) -> list[float]:
        """UTF-8 bytes per token of each."""
        return [self.bytes / max(tokens, 1) for tokens in self.tokens]

    @property
    def tokens_per_document(self) -> list[float]:
        """Mean tokens of a document of each."""
        return [tokens / max(self.documents, 1) for tokens in self.tokens]

    @property
    def compression(self) -> float:
        """Tokens of the first for each token of the second: above 1 the second is shorter."""
        return self.tokens[0] / max(self.tokens[1], 1)


@dataclass(frozen=True)
class DomainShare:
    """How much of a vocabulary are words of the domain."""

    entries: int
    share: float
    """Of all entries of the vocabulary."""
    words: int
    """Domain words that are one token in running text, that is, after a blank."""


@dataclass(frozen=True)
class SplitWord:
    """A word that one tokenizer has whole and the other in pieces."""

    word: str
    pieces: tuple[str, ...]


def compare_entries(first: Tokenizer, second: Tokenizer) -> Overlap:
    """Count the entries that both vocabularies hold; their ids do not matter."""
    a, b = set(first.pieces) - {b""}, set(second.pieces) - {b""}
    shared = len(a & b)
    return Overlap(shared, (len(a), len(b)), (shared / len(a), shared / len(b)))


def measure_texts(first: Tokenizer, second: Tokenizer, texts: Iterable[str]) -> TextFacts:
    """Tokenise texts with both and count; read once, a few hundred in memory at a time."""
    facts = TextFacts()
    source = iter(texts)
    while batch := list(islice(source, _BATCH)):
        facts.documents += len(batch)
        for number, tokenizer in enumerate((first, second)):
            facts.tokens[number] += sum(map(len, tokenizer.encode_batch(batch)))
        for text in batch:
            facts.words += len(text.split())
            facts.bytes += len(text.encode())
            facts.counts.update(_WORD.findall(text.lower()))
    return facts


def find_domain_words(
    domain: Mapping[str, int],
    general: Mapping[str, int],
    min_ratio: float = MIN_RATIO,
    min_surplus: float = MIN_SURPLUS,
) -> dict[str, float]:
    """Find the words that a domain uses more than general text does, beyond chance.

    A word belongs to the domain if its log-likelihood ratio (Dunning 1993, section 5: two binomials
    against one) is at least `min_ratio` and it is at least `min_surplus` times as frequent.

    Args:
        domain: How often each word occurs in text of the domain.
        general: The same of general text.
        min_ratio: Smallest log-likelihood ratio, -2 log lambda.
        min_surplus: Smallest quotient of the two relative frequencies.

    Returns:
        The ratio of each word of the domain, the greatest first, ties in alphabetical order.
    """
    words = sorted(domain)
    sizes = max(sum(domain.values()), 1), max(sum(general.values()), 1)
    inside = np.array([domain[word] for word in words], dtype=np.float64)
    outside = np.array([general.get(word, 0) for word in words], dtype=np.float64)
    ratio = _likelihood_ratio(inside, sizes[0], outside, sizes[1])
    frequent = inside / sizes[0] >= min_surplus * outside / sizes[1]
    chosen = np.flatnonzero((ratio >= min_ratio) & frequent)
    found = ((words[i], float(ratio[i])) for i in chosen)
    return dict(sorted(found, key=lambda pair: (-pair[1], pair[0])))


def _likelihood_ratio(k1: np.ndarray, n1: int, k2: np.ndarray, n2: int) -> np.ndarray:
    """Dunning's -2 log lambda of k1 of n1 against k2 of n2.  # (words,)"""
    from scipy.special import xlogy

    def log_likelihood(p: np.ndarray, k: np.ndarray, n: int) -> np.ndarray:
        values: np.ndarray = xlogy(k, p) + xlogy(n - k, 1 - p)
        return values

    both = (k1 + k2) / (n1 + n2)
    apart = log_likelihood(k1 / n1, k1, n1) + log_likelihood(k2 / n2, k2, n2)
    return 2 * (apart - log_likelihood(both, k1, n1) - log_likelihood(both, k2, n2))


def measure_domain_share(tokenizer: Tokenizer, words: Iterable[str]) -> DomainShare:
    """Count the entries that are words of the domain.

    As in arXiv:2405.09395 an entry is looked up without its blank and in lower case, and all
    spellings of a word count: "neuron", " neuron" and " Neuron" are three entries.
    """
    known = {word.lower() for word in words}
    texts = [piece.decode("utf-8", errors="replace") for piece in tokenizer.pieces if piece]
    entries = sum(text.strip().lower() in known for text in texts if _LETTER.search(text))
    whole = known & {text[1:] for text in texts if text.startswith(" ")}
    return DomainShare(entries, entries / len(texts), len(whole))


def find_split_words(
    whole: Tokenizer, split: Tokenizer, words: Iterable[str], limit: int = 10
) -> list[SplitWord]:
    """Return the first words that, after a blank, are one token of `whole`, several of `split`."""
    found: list[SplitWord] = []
    for word in words:
        if len(found) == limit:
            break
        (one,), (pieces,) = whole.encode_batch([f" {word}"]), split.encode_batch([f" {word}"])
        if len(one) == 1 and len(pieces) > 1:
            found.append(SplitWord(word, _spell(split, pieces.tolist())))
    return found


def _spell(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(tokenizer.decode([i]).strip() for i in ids)
