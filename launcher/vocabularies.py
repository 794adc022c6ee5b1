"""What `shoal tokenizer compare` asks and answers: texts read, two tokenizers measured, tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from shoal.data_pipeline.tokenizer import Tokenizer
    from shoal.data_pipeline.vocabulary import DomainShare, Overlap, SplitWord, TextFacts

BRAINBENCH = "BrainBench"
SHIPPED_CASES = ("{samples}/brainbench_human.jsonl.gz",)
TOP_WORDS = 20


@dataclass(frozen=True)
class Question:
    """What two tokenizers are compared on."""

    texts: dict[str, str]
    """Path of each named text."""
    domain: frozenset[str]
    """Names of those that are text of the domain."""
    words: Path | None = None
    brainbench: tuple[str, ...] = SHIPPED_CASES
    field: str = "text"
    max_bytes: int = 20_000_000

    @classmethod
    def parse(
        cls,
        texts: Sequence[str],
        domain: Sequence[str],
        words: Path | None,
        brainbench: Sequence[str] | None,
        field: str,
        max_bytes: int,
    ) -> Question:
        """Read the options of the command.

        Raises:
            ConfigError: a text without a name, a name twice, or a domain that names no text.
        """
        named: dict[str, str] = {}
        for text in texts:
            name, equals, path = text.partition("=")
            if not equals or not name or not path or name in named or name == BRAINBENCH:
                raise ConfigError(
                    f"{text!r} gives no text a name of its own",
                    where="--texts",
                    fix="write NAME=PATH, each name once: --texts neuro=neuro.jsonl.gz",
                )
            named[name] = path
        chosen = frozenset(domain or list(named)[:1])
        if unknown := chosen - set(named):
            raise ConfigError(
                f"{', '.join(sorted(unknown))} names no text",
                where="--domain",
                fix=f"one of {', '.join(named)}" if named else "add --texts NAME=PATH",
            )
        cases = tuple(brainbench) if brainbench else SHIPPED_CASES
        return cls(named, chosen, words, cases, field, max_bytes)


@dataclass(frozen=True)
class DomainWords:
    """Which words were taken for the domain's, and what the vocabularies have of them."""

    method: str
    found: int
    top: list[str]
    shares: tuple[DomainShare, DomainShare]
    only_first: list[SplitWord] = field(default_factory=list)
    """Words that are one token of the first, with their pieces of the second."""
    only_second: list[SplitWord] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Two tokenizers, measured."""

    paths: tuple[str, str]
    fingerprints: tuple[str, str]
    overlap: Overlap
    texts: dict[str, TextFacts]
    """By name; BrainBench is one of them, its prompt before each original abstract."""
    domain: DomainWords | None
    """None where no general text tells what is special in the domain, and no words were given."""


def read_texts(path: str, field: str, max_bytes: int | None) -> Iterator[str]:
    """Read the texts of a source of any kind that a corpus may have.

    Raises:
        ConfigError: nothing is there.
        DataError: none of its records has a text.
    """
    from shoal.configs.corpus import SourceConfig
    from shoal.data_pipeline.documents import DroppedLog
    from shoal.data_pipeline.sources import read_documents

    dropped, found = DroppedLog(), False
    for document in read_documents(
        SourceConfig(path=path, text_key=field, max_bytes=max_bytes), dropped
    ):
        found = True
        yield document.text
    if not found:
        cause = "\n  ".join(["holds no text", *dropped.examples[:3]])
        raise DataError(cause, where=path, fix="name the field of the text with --field")


def compare_tokenizers(first: Path, second: Path, question: Question) -> Comparison:
    """Measure both on every text, and find what they have of the domain's words.

    Raises:
        ConfigError: a text is not there.
        DataError: a tokenizer cannot be read, or a text is empty.
    """
    from shoal.data_pipeline.tokenizer import Tokenizer
    from shoal.data_pipeline.vocabulary import compare_entries, measure_texts

    a, b = Tokenizer.load(first), Tokenizer.load(second)
    facts = {
        name: measure_texts(a, b, read_texts(path, question.field, question.max_bytes))
        for name, path in question.texts.items()
    }
    domain = _settle_domain(a, b, question, facts)
    facts[BRAINBENCH] = measure_texts(a, b, _read_brainbench(question.brainbench))
    return Comparison(
        paths=(str(first), str(second)),
        fingerprints=(a.fingerprint, b.fingerprint),
        overlap=compare_entries(a, b),
        texts=facts,
        domain=domain,
    )


def _read_brainbench(files: Sequence[str]) -> Iterator[str]:
    """Give each original abstract as a model reads it: after the prompt."""
    from shoal.eval.tasks.brainbench import PROMPT

    for file in files:
        for text in read_texts(file, "original_abstract", None):
            yield PROMPT + text


def _settle_domain(
    a: Tokenizer, b: Tokenizer, question: Question, facts: dict[str, TextFacts]
) -> DomainWords | None:
    from shoal.data_pipeline import vocabulary

    general = [name for name in facts if name not in question.domain]
    if question.words is not None:
        words = _read_words(question.words)
        method = f"given in {question.words}"
    elif general:
        inside = _add_counts(facts, sorted(question.domain))
        words = list(vocabulary.find_domain_words(inside, _add_counts(facts, general)))
        method = (
            f"in {', '.join(sorted(question.domain))} at least {vocabulary.MIN_SURPLUS:g} times as "
            f"frequent as in {', '.join(general)}, log-likelihood ratio ≥ {vocabulary.MIN_RATIO}"
        )
    else:
        return None
    return DomainWords(
        method=method,
        found=len(words),
        top=words[:TOP_WORDS],
        shares=(
            vocabulary.measure_domain_share(a, words),
            vocabulary.measure_domain_share(b, words),
        ),
        only_first=vocabulary.find_split_words(a, b, words),
        only_second=vocabulary.find_split_words(b, a, words),
    )


def _read_words(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=file) from None
    words = list(dict.fromkeys(line.strip().lower() for line in lines if line.strip()))
    if not words:
        raise DataError("holds no words", where=file, fix="write one word a line")
    return words


def _add_counts(facts: dict[str, TextFacts], names: Sequence[str]) -> Counter[str]:
    total: Counter[str] = Counter()
    for name in names:
        total.update(facts[name].counts)
    return total


def to_json(comparison: Comparison) -> str:
    """Return the comparison as JSON; ratios are there beside the counts they come from."""
    tree: dict[str, Any] = asdict(comparison)
    for name, facts in comparison.texts.items():
        del tree["texts"][name]["counts"]
        tree["texts"][name] |= {
            "fertility": facts.fertility,
            "bytes_per_token": facts.bytes_per_token,
            "tokens_per_document": facts.tokens_per_document,
            "compression": facts.compression,
        }
    return json.dumps(tree, indent=1, ensure_ascii=False)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Return the comparison as tables: vocabularies, texts, words that only one has whole."""
    tables = [_vocabulary_table(comparison), _texts_table(comparison.texts)]
    if comparison.domain is not None:
        tables.append(_words_table(comparison.domain))
    return tables


def _vocabulary_table(comparison: Comparison) -> Table:
    overlap, domain = comparison.overlap, comparison.domain
    table = _new_table("vocabularies", ["", "first", "second"])
    rows: list[tuple[str, Sequence[str]]] = [
        ("tokenizer", comparison.paths),
        ("fingerprint", [print_[:12] for print_ in comparison.fingerprints]),
        ("entries", [f"{n:,}" for n in overlap.entries]),
        ("shared", [f"{overlap.shared:,} ({share:.1%})" for share in overlap.shares]),
    ]
    if domain is not None:
        rows += [
            ("entries that are domain words", [f"{s.entries:,} ({s.share:.1%})"
                                               for s in domain.shares]),
            (f"of {domain.found:,} domain words one token", [f"{s.words:,}"
                                                             for s in domain.shares]),
        ]  # fmt: skip
        table.caption = f"Domain words: {domain.method}. The most special: {', '.join(domain.top)}"
    _add_rows(table, ([name, *values] for name, values in rows))
    return table


def _texts_table(texts: dict[str, TextFacts]) -> Table:
    columns = ["text", "documents", "bytes", "tokens per word", "bytes per token",
               "tokens per document", "first / second"]  # fmt: skip
    table = _new_table("texts: first, second", columns)
    _add_rows(table, (
        [
            name,
            f"{facts.documents:,}",
            f"{facts.bytes:,}",
            ", ".join(f"{x:.3f}" for x in facts.fertility),
            ", ".join(f"{x:.2f}" for x in facts.bytes_per_token),
            ", ".join(f"{x:,.1f}" for x in facts.tokens_per_document),
            f"{facts.compression:.3f}",
        ]
        for name, facts in texts.items()
    ))  # fmt: skip
    table.caption = "Above 1 the second needs fewer tokens. BrainBench: prompt and abstract."
    return table


def _words_table(domain: DomainWords) -> Table:
    table = _new_table("domain words whole in one alone", ["only", "word", "of the other"])
    for name, found in (("first", domain.only_first), ("second", domain.only_second)):
        _add_rows(table, ([name, one.word, " · ".join(one.pieces)] for one in found))
    return table


def _new_table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and "text" in columns else "left")
    return table


def _add_rows(table: Table, rows: Any) -> None:
    from rich.markup import escape

    for row in rows:
        table.add_row(*map(escape, row))
