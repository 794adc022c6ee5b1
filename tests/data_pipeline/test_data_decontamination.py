"""Decontamination: planted sequences are all found, and nothing that is not there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.configs.corpus import DecontaminationConfig, SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline import decontamination
from shoal.data_pipeline.decontamination import Index, Matcher
from shoal.data_pipeline.documents import DroppedLog
from shoal.data_pipeline.ngrams import Lexicon, find_words, find_words_of_each, hash_ngrams
from shoal.data_pipeline.sources import read_documents

WORD_PARTS = " \n\u00a0\u2003.,-_'´`09aAΣσİßﬁ²Ⅳ\u0301\u1100\u1161"
EVALUATION_FIELDS = ("original_abstract", "incorrect_abstract", "question")
SAMPLES = ("general_train", "domain_train", "general_validation", "domain_validation")


@pytest.fixture(scope="module")
def index() -> Index:
    return Index.build(DecontaminationConfig())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    found: list[str] = []
    for name in SAMPLES:
        source = SourceConfig(path=f"{{samples}}/{name}.jsonl.gz")
        found += [document.text for document in read_documents(source, DroppedLog())]
    return found


def read_evaluation_texts() -> list[str]:
    from shoal.data_pipeline.sources import read_lines, resolve_path

    found = []
    for path in DecontaminationConfig().against:
        for line in read_lines(Path(resolve_path(path))):
            record = json.loads(line)
            found += [record[key] for key in EVALUATION_FIELDS if key in record]
    return found


def test_no_shipped_document_is_taken_for_contaminated(index: Index, texts: list[str]) -> None:
    lexicon = Lexicon()
    matcher = Matcher(index, lexicon)
    assert [text for text in texts if matcher.find(lexicon.read(text))] == []


def test_planted_sequences_are_all_found(index: Index, texts: list[str]) -> None:
    """Thirteen words of each evaluation text, written otherwise, somewhere in a document."""
    chooser, lexicon = random.Random(0), Lexicon(capacity=4_000)
    matcher = Matcher(index, lexicon)
    planted = 0
    for text in read_evaluation_texts():
        words = find_words(text)
        if len(words) < 13:
            continue
        start = chooser.randrange(len(words) - 12)
        sequence = words[start : start + 13]
        written = [
            chooser.choice((word, word.upper(), f"({word}),", f"“{word}”")) for word in sequence
        ]
        host = chooser.choice(texts)[:4000].split(" ")
        where = chooser.randrange(len(host) + 1)
        host[where:where] = ["qqq", "\n".join(written), "qqq"]
        for hit in (index.find(" ".join(host)), matcher.find(lexicon.read(" ".join(host)))):
            assert hit is not None
            assert hit.words == " ".join(sequence)
        short = [*host[:where], "qqq", *written[:6], "qqq", *written[6:], "qqq"]
        assert index.find(" ".join(short)) is None
        planted += 1
    assert planted > 400
    assert lexicon.generation > 1


def write_set(file: Path, *records: Any) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def build(*files: Path, ngram: int = 5) -> Index:
    return Index.build(DecontaminationConfig(against=tuple(map(str, files)), ngram=ngram))


def test_every_field_counts_and_a_hit_names_its_record(tmp_path: Path) -> None:
    file = write_set(
        tmp_path / "set.jsonl",
        {"id": "a", "question": "One two three four five six?", "answer": 3},
        {"id": "b", "choices": ["too short", "seven eight nine ten eleven"]},
        {"id": "c", "deep": {"er": [{"est": "twelve thirteen fourteen 0.05 1,000"}]}},
        {"id": "d", "text": "four words are few"},
    )
    index = build(file)
    assert index.too_short == {str(file): 1}
    assert index.sequences == 4
    hit = index.find("And: TWO three, four-five six.")
    assert str(hit) == f"{file}:1: two three four five six"
    assert str(index.find("Seven–eight “nine” ten _eleven_")).startswith(f"{file}:2: seven")
    assert str(index.find("twelve thirteen fourteen 0.05 1,000")).startswith(f"{file}:3: ")
    for other in (
        "one two three four",
        "five seven eight nine ten",
        "six seven eight nine ten",
        "twelve thirteen fourteen 0.06 1,000",
        "four words are few",
        "",
    ):
        assert index.find(other) is None


def test_hits_by_hash_are_compared_by_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every hash the same, hits are still those that are there."""
    monkeypatch.setattr(decontamination, "hash_ngrams", lambda *args: hash_ngrams(*args) * 0)
    file = write_set(tmp_path / "set.jsonl", "a b c d e f", "g h i j k l")
    index = build(file)
    assert index.find("b c d e g h i j l k a b c d") is None
    assert str(index.find("x g h i j k")) == f"{file}:2: g h i j k"


def test_sets_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        build(tmp_path / "absent.jsonl")
    (tmp_path / "broken.jsonl").write_text('"a b c d e"\n{"text": \n')
    with pytest.raises(DataError, match=r"broken\.jsonl:2: .*JSON lines"):
        build(tmp_path / "broken.jsonl")
    few = write_set(tmp_path / "few.jsonl", {"text": "a b c"})
    with pytest.raises(DataError, match="no text of 5 words"):
        build(few)
    assert build(few, ngram=3).find("a b c") is not None


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from(WORD_PARTS) | st.characters(codec="utf-8"), max_size=30))
def test_words_of_a_text_are_those_between_its_blanks(text: str) -> None:
    """What `Matcher` relies on, when it takes each word apart once."""
    apart = [word for part in text.split() for word in find_words(part)]
    assert find_words(text) == apart
    together, counts = find_words_of_each(text.split())
    assert together == apart
    assert counts.tolist() == [len(find_words(part)) for part in text.split()]


def test_words_are_compared_by_letters_and_digits() -> None:
    assert find_words("It’s α-motor, p<0.05 (n=1,000); naïve ﬁnd_x 10². ...") == [
        "it", "s", "α", "motor", "p", "0.05", "n", "1,000", "naïve", "find", "x", "102",
    ]  # fmt: skip
