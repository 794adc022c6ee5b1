"""Signatures: words, shingles, band keys that meet as often as they should, and their files."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.configs.corpus import NearDuplicatesConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.minhash import (
    Keys,
    Shingler,
    Signer,
    digest,
    load_keys,
    save_keys,
    sign_piece,
)

CONFIG = NearDuplicatesConfig()


def draw_text(words: int, seed: int) -> str:
    """A text of words that hardly repeat."""
    chooser = random.Random(seed)
    return " ".join(f"w{chooser.randrange(10**9)}" for _ in range(words))


def test_words_are_compared_without_case_and_punctuation() -> None:
    shingler = Shingler(2)
    plain = shingler.hash_shingles("the cell fires it's 3.14 \u795e\u7d4c")
    loud = shingler.hash_shingles('The  "CELL" -- fires, \u2014 (It\'s)\n3.14... \u795e\u7d4c!')
    assert plain.tolist() == loud.tolist()
    assert shingler.hash_shingles("the cells fire").tolist() != plain[:2].tolist()


def test_shingles_are_runs_of_words() -> None:
    shingler = Shingler(3)
    assert len(shingler.hash_shingles("a b c d e")) == 3
    assert (
        shingler.hash_shingles("x a b c").tolist()[1:] == shingler.hash_shingles("a b c").tolist()
    )
    assert shingler.hash_shingles("a b c").tolist() != shingler.hash_shingles("c b a").tolist()
    assert len(shingler.hash_shingles("a b")) == 1
    assert len(shingler.hash_shingles("-- ... !")) == 0
    assert len(np.unique(shingler.hash_shingles("a b c " * 50))) == 3


def test_word_cache_does_not_change_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = draw_text(500, 1) + " " + "long" * 40
    wanted = Shingler(2).hash_shingles(text)
    monkeypatch.setattr("shoal.data_pipeline.minhash._CACHED_WORDS", 7)
    small = Shingler(2)
    assert (small.hash_shingles(text) == wanted).all()
    assert (small.hash_shingles(text) == wanted).all()


def test_keys_meet_as_often_as_the_similarity_says() -> None:
    """A single band of one hash is an estimate of the Jaccard similarity."""
    signer = Signer(NearDuplicatesConfig(bands=2000, band_hashes=1, ngram=1))
    shared = draw_text(200, 1)
    one, other = f"{shared} {draw_text(50, 2)}", f"{shared} {draw_text(150, 3)}"
    met = float((signer.sign(one) == signer.sign(other)).mean())
    assert met == pytest.approx(200 / 400, abs=0.05)  # 4.5 standard deviations of 2,000 draws


def test_long_texts_are_signed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = draw_text(5000, 4)
    whole = Signer(CONFIG).sign(text)
    monkeypatch.setattr("shoal.data_pipeline.minhash._BLOCK", 64)
    assert (Signer(CONFIG).sign(text) == whole).all()


def test_no_words_no_keys() -> None:
    signer = Signer(CONFIG)
    assert (signer.sign("") == 0).all() and (signer.sign("... --") == 0).all()
    assert (signer.sign("word") != 0).all()


def test_signatures_are_the_same_in_another_process() -> None:
    """Neither Python's hash seed nor the order of texts may show."""
    program = (
        "from shoal.configs.corpus import NearDuplicatesConfig as N;"
        "from shoal.data_pipeline.minhash import Signer;"
        "s = Signer(N()); s.sign('other words first');"
        "print(s.sign('The cell fires when light falls on it').tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(
        Signer(CONFIG).sign("The cell fires when light falls on it").tolist()
    )


def test_keys_survive_their_file(tmp_path: Path) -> None:
    texts = ["the cell fires", "", "the cell fires", "light falls on it"]
    keys = sign_piece(texts, CONFIG)
    save_keys(tmp_path / "keys.npy", keys)
    found = load_keys(tmp_path / "keys.npy")
    assert keys.bands.shape == (4, 32)
    assert (found.digests == keys.digests).all() and (found.bands == keys.bands).all()
    assert keys.digests[0].astype("<u8").tobytes() == digest("the cell fires")
    assert (keys.digests[0] == keys.digests[2]).all()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["keys.npy"]


@pytest.mark.parametrize("texts", [[], ["one text"]])
def test_exact_only_has_no_bands(tmp_path: Path, texts: list[str]) -> None:
    keys = sign_piece(texts, None)
    save_keys(tmp_path / "keys.npy", keys)
    found = load_keys(tmp_path / "keys.npy")
    assert found.digests.shape == (len(texts), 2) and found.bands.shape == (len(texts), 0)
    assert sign_piece([], CONFIG).bands.shape == (0, 32)


def test_broken_keys_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "keys.npy"
    for content in (b"", b"no array", b"\x93NUMPY"):
        file.write_bytes(content)
        with pytest.raises(DataError, match="cannot read keys"):
            load_keys(file)
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError):
        load_keys(file)
    np.save(file, np.zeros((1, 3)))
    with pytest.raises(DataError, match="not a table of keys"):
        load_keys(file)
    save_keys(file, Keys(np.zeros((5, 2), np.uint64), np.zeros((5, 4), np.uint64)))
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="cannot read keys"):
        load_keys(file)
