"""Texts encoded word by word have the ids of the whole texts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data_pipeline import words
from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.data_pipeline.words import WordEncoder, cut_text

TEXT = st.text(st.sampled_from(list("ab1.'é中 \n\t\u00a0\u2028\x1c  ")), max_size=30)


@pytest.fixture(scope="module")
def tokenizer(prepared) -> Tokenizer:
    return Tokenizer.load(prepared.tokenizer)


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(TEXT, max_size=6))
def test_ids_are_those_of_the_whole_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    found = tokenizer.encode_batch(texts)
    assert len(found) == len(texts)
    for text, ids in zip(texts, found, strict=True):
        expected = tokenizer._encode_slow([text])[0]
        assert ids.tolist() == expected.tolist(), repr(text)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_pieces_are_the_text_and_are_cut_between_words_alone(text: str) -> None:
    pieces = cut_text(text)
    assert " ".join(pieces) == text
    for before, after in itertools.pairwise(pieces):
        assert before and not before[-1].isspace()
        assert after and not after[0].isspace()


def test_words_are_encoded_once_and_forgotten_when_they_are_many(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_MAX_PIECES", 10)
    asked: list[str] = []

    def encode(text: str) -> np.ndarray:
        asked.append(text)
        return tokenizer._encode_fast(text)

    sizes = np.asarray([len(piece) for piece in tokenizer.pieces])
    encoder = WordEncoder(encode, sizes)
    text = "the cell fires when the cell fires"
    first = encoder.encode_batch([text, text])
    assert "".join(asked) == " cell fires when thethe"
    asked.clear()
    again = encoder.encode_batch([text])
    assert asked == []
    assert again[0].tolist() == first[0].tolist() == first[1].tolist()
    many = " ".join(f"w{number}" for number in range(20))
    encoder.encode_batch([many])
    assert encoder.count > 10
    encoder.encode_batch(["the end"])
    assert encoder.count == 2
    assert encoder.encode_batch([]) == []


def test_blanks_by_the_million_take_no_long_time(tokenizer: Tokenizer) -> None:
    text = " " * 1_000_000 + "x" + " \n" * 100_000
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
