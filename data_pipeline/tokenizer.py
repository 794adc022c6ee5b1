"""The byte-level BPE tokenizer: load, train, encode, decode, fingerprint; door to its libraries.

`tokenizers` says what the ids are; `tiktoken`, several times as fast, computes them where its ids
are proven to agree.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.configs.errors import DataError
from shoal.data_pipeline.words import WordEncoder

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"

_FORMS = "tokenizer.json, vocab.json with merges.txt, or encoder.json with vocab.bpe"
_VOCAB_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

# GPT-2's pattern (Radford et al. 2019), in the possessive form that needs no backtracking.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_PROBE = (
    "The synapse's 3 vesicles didn't fuse; they'll wait.\n\n\tif x >= 10:  return 'α-motor'  \r\n"
    " Ünïcödé — naïve café 中文字符 日本語 한국어 العربية हिन्दी ½ ² Ⅷ"
    " \u00a0\u200b\u2028\ufb01\u0301e\u0301 \U0001f469\U0001f3fd\u200d\U0001f52c"
    " <|endoftext|> <|endoftext|><s></s> [PAD] 1234567890 3.14e-10"
    " CamelCaseWord ALLCAPS --- ... !!!    blanks   \n\n\n   \x00\x07 http://example.org/a_b?c=d "
)


def _byte_symbols() -> dict[str, int]:
    """Return GPT-2's table from printable symbol to the byte it stands for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


class Tokenizer:
    """A byte-level BPE tokenizer with an end-of-text token; encodes text, never special tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, eot: str, where: object = None) -> None:
        self._backend = backend
        self._where = where
        # A special token spelled out in a text is text: tokenizers would read it as the token.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._tree: dict[str, Any] = json.loads(backend.to_str())
        self._check_kind()
        found = backend.token_to_id(eot)
        if found is None:
            raise DataError(f"has no token {eot!r} to end a document with", where=where)
        self.eot_token = eot
        self.eot_id = int(found)
        if self.eot_id in self._encode_slow([eot])[0]:
            raise DataError(
                f"takes {eot!r} within a text for the end of the text",
                where=where,
                fix="mark it as special: added_tokens in tokenizer.json",
            )
        self._fast = self._build_fast()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a tokenizer from a folder or a tokenizer.json.

        Raises:
            DataError: nothing there, broken, or no byte-level BPE.
        """
        given = Path(path)
        file = given / "tokenizer.json" if given.is_dir() else given
        eot = _read_eot(file.parent)
        if file.is_file():
            return cls(_load_json(file), eot, given)
        for vocab_name, merges_name in _VOCAB_AND_MERGES:
            vocab, merges = given / vocab_name, given / merges_name
            if vocab.is_file() and merges.is_file():
                return cls(_load_vocab_and_merges(vocab, merges, eot), eot, given)
        raise DataError("no tokenizer there", where=given, fix=f"a folder with {_FORMS}")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn byte-level BPE merges (Sennrich et al. 2016; bytes as in GPT-2) from texts.

        Pairs are counted over all texts and ties broken by symbol, so neither the order of the
        texts nor the number of threads changes a merge. The last id is the end-of-text token.

        Args:
            texts: What to learn from; read once, never held in memory as a whole.
            vocab_size: Entries of the result, exactly: 256 bytes, the merges, the end of text.

        Raises:
            DataError: the texts hold too few pairs to merge for so many entries.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([END_OF_TEXT])
        found = backend.get_vocab_size()
        if found != vocab_size:
            raise DataError(
                f"the text is too small for a tokenizer of {vocab_size:,} entries: its words are "
                f"whole tokens after {found - 257:,} merges, which make {found:,} entries",
                where="tokenizer.vocab_size",
                fix=f"lower the vocabulary to {found}, or give more text",
            )
        return cls(backend, END_OF_TEXT)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return len(self.pieces)

    @property
    def is_fast(self) -> bool:
        """Whether tiktoken computes the ids."""
        return self._fast is not None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what determines ids: vocabulary, merges, splitting, added tokens."""
        model = self._tree["model"]
        added = [[t["id"], t["content"], t["special"]] for t in self._tree["added_tokens"]]
        facts = {
            "vocab": sorted(model["vocab"].items()),
            "merges": [_merge_pair(merge) for merge in model["merges"]],
            "options": {key: bool(model.get(key)) for key in ("ignore_merges", "byte_fallback")},
            "normalizer": self._tree["normalizer"],
            "pre_tokenizer": _without_offsets(self._tree["pre_tokenizer"]),
            "added": sorted(added),
            "eot": self.eot_id,
        }
        text = json.dumps(facts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text each id stands for, special tokens for none.  # (vocab,) int64"""
        special = {t["id"] for t in self._tree["added_tokens"] if t["special"]} | {self.eot_id}
        sizes = [0 if i in special else len(piece) for i, piece in enumerate(self.pieces)]
        return np.asarray(sizes, dtype=np.int64)

    @cached_property
    def pieces(self) -> list[bytes]:
        """Bytes of every id; ids that no token has are empty."""
        symbols = _byte_symbols()
        added = {token["content"] for token in self._tree["added_tokens"]}
        vocab = self._backend.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(vocab.values()) + 1)
        for token, number in vocab.items():
            if token in added:
                pieces[number] = token.encode()
            else:
                pieces[number] = bytes(symbols[symbol] for symbol in token)
        return pieces

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, without any special token.  # each (tokens,) uint32"""
        if self._fast is None:
            return self._encode_slow(texts)
        if self._words is not None:
            return self._words.encode_batch(texts)
        return [self._encode_fast(text) for text in texts]

    @cached_property
    def _words(self) -> WordEncoder | None:
        """What encodes each word once, where the pattern is the one it knows."""
        if self._fast_pattern() != _GPT2_PATTERN:
            return None
        sizes = np.asarray([len(piece) for piece in self.pieces], dtype=np.int64)
        return WordEncoder(self._encode_fast, sizes)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that form no UTF-8 become the replacement character."""
        pieces = self.pieces
        return b"".join(pieces[int(i)] for i in ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write a folder that `AutoTokenizer.from_pretrained` loads without a network."""
        folder.mkdir(parents=True, exist_ok=True)
        tree = {**self._tree, "truncation": None, "padding": None}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.eot_token,
            "eos_token": self.eot_token,
            "unk_token": self.eot_token,
            "add_prefix_space": False,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
        }
        special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token")}
        for name, content in (
            ("tokenizer.json", tree),
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", special),
        ):
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")

    def _encode_slow(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _encode_fast(self, text: str) -> np.ndarray:
        assert self._fast is not None
        try:
            return np.asarray(self._fast.encode_to_numpy(text, disallowed_special=()))
        except ValueError:  # its regular expressions give up on some megabyte-long runs
            return self._encode_slow([text])[0]

    def _check_kind(self) -> None:
        """Refuse what is not byte-level BPE: its ids would not stand for bytes of text."""
        model = self._tree["model"]
        byte_level = any(step["type"] == "ByteLevel" for step in self._pre_steps())
        if model["type"] != "BPE" or not byte_level:
            raise DataError(
                f"is a {model['type']} tokenizer, not byte-level BPE",
                where=self._where,
                fix="give one like GPT-2's, or train one with tokenizer.vocab_size",
            )
        if model.get("dropout"):
            raise DataError("has BPE dropout: its ids are random", where=self._where)
        symbols = set(_byte_symbols())
        added = {token["content"] for token in self._tree["added_tokens"]}
        marks = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
        if any(marks) or any(set(t) - symbols for t in set(model["vocab"]) - added):
            raise DataError("has tokens that are more than bytes of text", where=self._where)
        missing = symbols - set(model["vocab"])
        if missing:
            raise DataError(f"has no token for {len(missing)} of the 256 bytes", where=self._where)

    def _pre_steps(self) -> list[dict[str, Any]]:
        steps = self._tree["pre_tokenizer"] or {"type": "none"}
        return steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]

    def _build_fast(self) -> tiktoken.Encoding | None:
        """Return tiktoken's form of this tokenizer, or None where its ids would differ."""
        pattern = self._fast_pattern()
        if pattern is None or not self._ranks_are_merges():
            return None
        import tiktoken

        symbols = _byte_symbols()
        vocab: dict[str, int] = self._tree["model"]["vocab"]
        skipped = {token["content"] for token in self._tree["added_tokens"]}
        ranks = {
            bytes(symbols[symbol] for symbol in token): number
            for token, number in vocab.items()
            if token not in skipped
        }
        fast = tiktoken.Encoding("shoal", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        probe = np.asarray(fast.encode_to_numpy(_PROBE, disallowed_special=()))
        if not np.array_equal(probe, self._encode_slow([_PROBE])[0]):
            logging.getLogger(__name__).info("tiktoken differs for this tokenizer: not used")
            return None
        return fast

    def _fast_pattern(self) -> str | None:
        """Return the splitting pattern if it is one that tiktoken can follow exactly."""
        if self._tree["normalizer"] is not None:
            return None
        if any(not token["special"] for token in self._tree["added_tokens"]):
            return None  # added words are cut out of the text before the pattern is applied
        steps = self._pre_steps()
        last = steps[-1]
        if last["type"] != "ByteLevel" or last["add_prefix_space"]:
            return None
        if len(steps) == 1 and last["use_regex"]:
            return _GPT2_PATTERN
        first = steps[0]
        whole = first.get("behavior") == "Isolated" and not first.get("invert")
        if len(steps) == 2 and first["type"] == "Split" and whole and not last["use_regex"]:
            found: str | None = first["pattern"].get("Regex")
            return found
        return None

    def _ranks_are_merges(self) -> bool:
        """Whether ids rise in the order of merges, the one thing tiktoken knows of them.

        It also takes a word that is a token for that token, so every token must be what the merges
        make of its own symbols.
        """
        model = self._tree["model"]
        vocab: dict[str, int] = model["vocab"]
        made = ["".join(_merge_pair(merge)) for merge in model["merges"]]
        ids = [vocab[token] for token in made]
        added = {token["content"] for token in self._tree["added_tokens"]}
        reachable = set(made) | set(_byte_symbols()) | added
        rising = all(a < b for a, b in itertools.pairwise(ids))
        if not rising or not set(vocab) <= reachable:
            return False
        return all(len(self._backend.model.tokenize(token)) == 1 for token in made)


def _merge_pair(merge: str | list[str]) -> list[str]:
    """Return the two sides of a merge, in either of the forms tokenizers has written."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _without_offsets(tree: Any) -> Any:
    """Leave out of a pre-tokenizer what moves offsets but no id."""
    if isinstance(tree, dict):
        return {k: _without_offsets(v) for k, v in tree.items() if k != "trim_offsets"}
    return [_without_offsets(item) for item in tree] if isinstance(tree, list) else tree


def _load_json(file: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever is wrong
        raise DataError(f"not a tokenizer: {error}", where=file) from None


def _load_vocab_and_merges(vocab_file: Path, merges_file: Path, eot: str) -> tokenizers.Tokenizer:
    """Build GPT-2's tokenizer from its two files."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    try:
        vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
        merges = list(_read_merges(merges_file))
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:
        raise DataError(f"not a GPT-2 vocabulary: {error}", where=vocab_file.parent) from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if eot in vocab:
        backend.add_special_tokens([eot])
    return backend


def _read_merges(file: Path) -> Iterator[tuple[str, str]]:
    # Not splitlines: it would also cut at symbols that are part of a merge.
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith("#version"):
            left, right = line.rstrip("\r").split(" ")
            yield left, right


def _read_eot(folder: Path) -> str:
    """Return the token that ends a document: the folder's eos token, or GPT-2's."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return END_OF_TEXT
    try:
        token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError):
        raise DataError("not readable as JSON", where=file) from None
    if isinstance(token, dict):
        token = token.get("content")
    return token or END_OF_TEXT
