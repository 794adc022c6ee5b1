"""The tokenizer: ids, bytes, fingerprints; what is refused; and that all ways give the same ids."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from shoal.configs.corpus import SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.documents import DroppedLog
from shoal.data_pipeline.sources import read_documents
from shoal.data_pipeline.tokenizer import END_OF_TEXT, Tokenizer

ODD = [
    "",
    " ",
    "\n\n \t\r\n  x  ",
    "naïve café e\u0301 \ufb01 ½ ² Ⅷ",
    "神経 日本語 한국어 العربية हिन्दी",
    "\U0001f469\U0001f3fd\u200d\U0001f52c\U0001f1e9\U0001f1ea",
    "\x00\x07\x7f\u0085\u00a0\u200b\u2028\u2029\ufeff\ufffd\uffff\U0010ffff",
    "don't DON'T they'll 'tis ''' x's",
    f"a{END_OF_TEXT}b {END_OF_TEXT}{END_OF_TEXT}",
    "<|endof" + "text|> <s></s> [PAD] <|im_start|>",
    "1234567890 3.14e-10 x_y?z=1 ---!!!",
]

# Characters at which splitting patterns part ways, and pieces of the literal special token.
texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            [" ", "  ", "\n", "\t", "'s", "'ll", "é", "e\u0301", "½", "<|", END_OF_TEXT]
        ),
        st.sampled_from(["the", "cell", "aa", "aaa", "ab"]),
    ),
    max_size=20,
).map("".join)


def build(merges=(), *, extra=(), special=(END_OF_TEXT,), added=(), **options):
    """A byte-level backend of the 256 bytes and these merges."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in [left + right for left, right in merges] + list(extra):
        vocab.setdefault(token, len(vocab))
    backend = Backend(models.BPE(vocab=vocab, merges=list(merges), **options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.add_tokens(list(added))
    return backend


@pytest.fixture(scope="module")
def trained(records):
    words = [record["text"] for record in records(300)]
    return Tokenizer.train([*words, *ODD, "aaaa aaa ab abab " * 9], 400)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "saved"
    trained.save(folder)
    return folder


def test_training(trained):
    assert trained.vocab_size == 400
    assert trained.eot_id == 399
    assert trained.is_fast


def test_training_on_few_words_names_the_size_that_they_allow():
    with pytest.raises(DataError, match="too small for a tokenizer of 1,000 entries") as caught:
        Tokenizer.train(["ab ab"], 1000)
    size = int(caught.value.fix.split("vocabulary to ")[1].split(",")[0])
    assert 257 < size < 270
    small = Tokenizer.train(["ab ab"], size)
    assert small.vocab_size == size
    assert small.eot_id == size - 1


TRAIN = """
import json, sys
from shoal.data_pipeline.tokenizer import Tokenizer
texts = json.load(open(sys.argv[1]))
if sys.argv[2] == "reversed":
    texts.reverse()
print(Tokenizer.train(texts, 600)._backend.to_str())
"""


def test_training_is_the_same_for_any_threads_and_order(tmp_path):
    """Ties are many in so little text of so few letters: a choice by chance would show."""
    file = tmp_path / "texts.json"
    chooser = random.Random(0)
    file.write_text(json.dumps(["".join(chooser.choices("abcde ", k=80)) for _ in range(60)]))
    made = set()
    for threads, order in (("1", "as given"), ("4", "as given"), ("3", "reversed")):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-c", TRAIN, str(file), order]
        made.add(subprocess.run(command, env=env, check=True, capture_output=True).stdout)
    (same,) = made
    assert len(json.loads(same)["model"]["vocab"]) == 599  # the end of text is an added token


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_load_gives_back_what_was_saved(name, folder, trained):
    loaded = Tokenizer.load(folder / name)
    assert loaded.fingerprint == trained.fingerprint
    assert (loaded.eot_id, loaded.vocab_size) == (399, 400)
    for a, b in zip(loaded.encode_batch(ODD), trained.encode_batch(ODD), strict=True):
        assert np.array_equal(a, b)


def test_saving_again_changes_no_byte(folder, tmp_path):
    Tokenizer.load(folder).save(tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_load_from_vocab_and_merges(folder, trained, tmp_path):
    tree = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(tree["vocab"] | {END_OF_TEXT: 399}))
    pairs = "".join(f"{left} {right}\n" for left, right in tree["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + pairs)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.is_fast
    for a, b in zip(loaded.encode_batch(ODD), trained.encode_batch(ODD), strict=True):
        assert np.array_equal(a, b)


def test_fingerprint_is_of_what_decides_ids(trained):
    assert len(trained.fingerprint) == 64
    first = Tokenizer(build([("a", "b")]), END_OF_TEXT).fingerprint
    assert first == Tokenizer(build([("a", "b")]), END_OF_TEXT).fingerprint
    others = [
        build([("a", "b"), ("ab", "c")]),
        build([("b", "a")]),
        build([("a", "b")], special=[END_OF_TEXT, "<pad>"]),
        build([("a", "b")], special=["<pad>", END_OF_TEXT]),
    ]
    assert len({first, *(Tokenizer(other, END_OF_TEXT).fingerprint for other in others)}) == 5


def test_fingerprint_stays_what_it_was():
    """Written down: another value would disown every prepared corpus."""
    expected = "22258a1d48ebce85ab258c8cbfc26c5533f35f94d38b9cd1eb566cf4f668ce49"
    assert Tokenizer(build([("a", "b")]), END_OF_TEXT).fingerprint == expected


@pytest.mark.parametrize("text", ODD)
def test_odd_text_survives(text, trained):
    (ids,) = trained.encode_batch([text])
    assert trained.decode(ids) == text
    assert trained.token_bytes[ids].sum() == len(text.encode())
    assert trained.eot_id not in ids


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_tiktoken_and_tokenizers_agree(text, trained):
    (fast,) = trained.encode_batch([text])
    (slow,) = trained._encode_slow([text])
    assert fast.tolist() == slow.tolist()
    assert trained.decode(fast) == text
    assert trained.token_bytes[fast].sum() == len(text.encode())
    assert trained.eot_id not in fast


@pytest.mark.parametrize("name", ["domain_validation", "general_validation"])
def test_tiktoken_and_tokenizers_agree_on_every_sample_document(name):
    """A vocabulary of its own for each, large enough that merges compete."""
    source = SourceConfig(path=f"{{samples}}/{name}.jsonl.gz", max_bytes=400_000)
    documents = [document.text for document in read_documents(source, DroppedLog())]
    tokenizer = Tokenizer.train(documents, 4096)
    assert tokenizer.is_fast
    ids = zip(tokenizer.encode_batch(documents), tokenizer._encode_slow(documents), strict=True)
    assert all(np.array_equal(fast, slow) for fast, slow in ids)


@pytest.mark.parametrize("text", [" " * 1_000_000, "a" * 1_000_000, "\n" * 300_000 + "x"])
def test_long_runs_do_not_break_the_fast_path(text, trained):
    assert trained.decode(trained.encode_batch([text])[0]) == text


def test_bytes_that_are_no_character_decode_to_the_replacement(trained):
    ids = trained.encode_batch(["神"])[0]
    if len(ids) == 1:
        ids = np.asarray([trained.pieces.index(b"\xe7")])
    assert trained.decode(ids[:1]) == "\ufffd"


def test_special_tokens_stand_for_no_bytes():
    tokenizer = Tokenizer(build([("a", "b")], special=[END_OF_TEXT, "<pad>"]), END_OF_TEXT)
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [2, 0, 0]


def test_auto_tokenizer_gives_the_same_ids(folder, trained):
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(folder)
    plain = [text for text in ODD if END_OF_TEXT not in text]
    for text, ids in zip(plain, trained.encode_batch(plain), strict=True):
        assert auto(text)["input_ids"] == ids.tolist()
        assert auto.decode(ids) == text
    assert auto.eos_token_id == auto.bos_token_id == trained.eot_id
    assert len(auto) == trained.vocab_size


@pytest.mark.parametrize(
    "backend",
    [
        # A token that its own merges never make: tiktoken would find it all the same.
        build([("b", "c"), ("a", "b"), ("c", "d"), ("ab", "cd")]),
        # An entry without a merge.
        build([("a", "b")], extra=["xyz"]),
        # A word that is cut out of the text first.
        build([("a", "b")], added=["bca"]),
    ],
    ids=["unreachable", "no merge", "added word"],
)
def test_slow_where_tiktoken_would_differ(backend):
    tokenizer = Tokenizer(backend, END_OF_TEXT)
    assert not tokenizer.is_fast
    text = "abcd xyz abcabcd"
    assert tokenizer.encode_batch([text])[0].tolist() == backend.encode(text).ids
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_ids_out_of_merge_order_are_slow_and_right():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"bc": 256, "ab": 257}
    backend = build()
    backend.model = models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c")])
    tokenizer = Tokenizer(backend, END_OF_TEXT)
    assert not tokenizer.is_fast
    assert tokenizer.encode_batch(["abc"])[0].tolist() == [257, vocab["c"]]


def word_level():
    backend = Backend(models.WordLevel({"a": 0, END_OF_TEXT: 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def sentence_piece():
    backend = build(extra=["▁"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


def few_bytes():
    backend = build()
    backend.model = models.BPE(vocab={"a": 0, "b": 1}, merges=[])
    return backend


REFUSED = {
    "word level": (word_level, "is a WordLevel tokenizer, not byte-level BPE"),
    "sentence piece": (sentence_piece, "not byte-level BPE"),
    "dropout": (lambda: build([("a", "b")], dropout=0.5), "ids are random"),
    "few bytes": (few_bytes, "has no token for 254 of the 256 bytes"),
    "foreign symbol": (lambda: build(extra=["▁x"]), "more than bytes of text"),
    "word ends": (
        lambda: build([("a", "b</w>")], extra=["b</w>"], end_of_word_suffix="</w>"),
        "more than bytes of text",
    ),
    "no end of text": (lambda: build(special=["<pad>"]), "has no token '<|endoftext|>'"),
    "end of text in texts": (
        lambda: build(special=[], added=[END_OF_TEXT]),
        "within a text for the end of the text",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_kinds(name, tmp_path):
    make, message = REFUSED[name]
    make().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError) as caught:
        Tokenizer.load(tmp_path)
    assert message in caught.value.cause
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer there"),
        ({"vocab.json": "{}"}, "no tokenizer there"),
        ({"tokenizer.json": "{"}, "not a tokenizer"),
        ({"tokenizer.json": "[1]"}, "not a tokenizer"),
        ({"vocab.json": "{", "merges.txt": ""}, "not a GPT-2 vocabulary"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b c\n"}, "not a GPT-2 vocabulary"),
        ({"tokenizer_config.json": "[]"}, "not readable as JSON"),
        ({"tokenizer_config.json": "\xff"}, "not readable as JSON"),
    ],
)
def test_broken_folders(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("form", ["</s>", {"content": "</s>"}])
def test_end_of_text_is_the_folders_own(form, tmp_path):
    build(special=["<s>", "</s>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": form}))
    assert Tokenizer.load(tmp_path).eot_id == 257
