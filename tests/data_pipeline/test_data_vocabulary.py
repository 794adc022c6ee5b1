"""Comparing vocabularies: counts against counts by hand, and domain words that were planted."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from shoal.data_pipeline.tokenizer import END_OF_TEXT, Tokenizer
from shoal.data_pipeline.vocabulary import (
    compare_entries,
    find_domain_words,
    find_split_words,
    measure_domain_share,
    measure_texts,
)

TEXTS = ["the neuron fires", "a neuron, naïve\n\nand 3 Neurons", ""]


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    """256 bytes and the end of text."""
    return Tokenizer.train(["neuron"], 257)


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    return Tokenizer.train([" neuron neuron Neuron axon the the the"] * 5, 271)


def test_overlap_counts_entries_by_their_bytes(plain: Tokenizer, learned: Tokenizer) -> None:
    overlap = compare_entries(plain, learned)
    assert overlap.shared == 257  # its end of text has another id, and is the same entry
    assert overlap.entries == (257, 271)
    assert overlap.shares == (1.0, 257 / 271)


def test_texts_are_measured_as_by_hand(plain: Tokenizer, learned: Tokenizer) -> None:
    facts = measure_texts(plain, learned, iter(TEXTS))
    size = sum(len(text.encode()) for text in TEXTS)
    fewer = sum(len(ids) for ids in learned.encode_batch(TEXTS))
    assert (facts.documents, facts.words, facts.bytes) == (3, 9, size)
    assert facts.tokens == [size, fewer]
    assert fewer < size
    assert facts.fertility == [size / 9, fewer / 9]
    assert facts.bytes_per_token == [1.0, size / fewer]
    assert facts.tokens_per_document == [size / 3, fewer / 3]
    assert facts.compression == size / fewer
    assert facts.counts == Counter(the=1, neuron=2, fires=1, naïve=1, neurons=1) + Counter(["and"])


def test_no_text_divides_by_nothing(plain: Tokenizer) -> None:
    facts = measure_texts(plain, plain, [])
    assert facts.fertility == [0.0, 0.0]
    assert facts.compression == 0.0


def test_the_likelihood_ratio_is_that_of_its_definition() -> None:
    """Against binomial likelihoods spelled out as in Dunning 1993."""

    def log_l(p: float, k: int, n: int) -> float:
        return k * math.log(p) + (n - k) * math.log(1 - p)

    found = find_domain_words({"axon": 40, "the": 960}, {"axon": 5, "the": 1995})
    both = 45 / 3000
    expected = 2 * (
        log_l(40 / 1000, 40, 1000) + log_l(5 / 2000, 5, 2000)
        - log_l(both, 40, 1000) - log_l(both, 5, 2000)
    )  # fmt: skip
    assert list(found) == ["axon"]
    assert found["axon"] == pytest.approx(expected, rel=1e-9)


def test_planted_domain_words_are_found_and_no_others() -> None:
    chooser = random.Random(0)
    common = [f"common{letter}" for letter in "abcdefghij"]
    domain = Counter(chooser.choices(common, k=5000)) + Counter(axon=60, gyrus=30, chance=2)
    general = Counter(chooser.choices(common, k=9000)) + Counter(axon=10)
    found = find_domain_words(domain, general)
    assert list(found) == ["axon", "gyrus"] or list(found) == ["gyrus", "axon"]
    assert list(find_domain_words(domain, general, min_surplus=20)) == ["gyrus"]
    assert "chance" in find_domain_words(domain, general, min_ratio=3)


def test_domain_words_do_not_depend_on_the_order_of_counting() -> None:
    words = {f"word{n}": 30 for n in range(20)}
    backwards = dict(reversed(words.items()))
    assert list(find_domain_words(words, {"x": 1000})) == list(
        find_domain_words(backwards, {"x": 1000})
    )


def test_domain_share_counts_every_spelling(learned: Tokenizer) -> None:
    pieces = [piece.decode("utf-8", errors="replace") for piece in learned.pieces]
    spelt = [piece for piece in pieces if piece.strip().lower() == "neuron"]
    assert len(spelt) >= 2
    share = measure_domain_share(learned, ["neuron", "absent"])
    assert share.entries == len(spelt)
    assert share.share == len(spelt) / 271
    assert share.words == 1


def test_the_end_of_text_is_no_domain_word(learned: Tokenizer) -> None:
    assert measure_domain_share(learned, ["endoftext"]).entries == 0
    assert END_OF_TEXT.encode() in learned.pieces


def test_split_words(plain: Tokenizer, learned: Tokenizer) -> None:
    found = find_split_words(learned, plain, ["absent", "neuron", "the"])
    assert [one.word for one in found] == ["neuron", "the"]
    assert "".join(found[0].pieces) == "neuron"
    assert len(found[0].pieces) == 7  # its blank is a token of its own
    assert find_split_words(plain, learned, ["neuron"]) == []
    assert len(find_split_words(learned, plain, ["neuron", "the"], limit=1)) == 1
