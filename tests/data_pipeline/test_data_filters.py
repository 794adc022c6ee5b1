"""Quality filters: verdicts of datatrove's on real documents, and every rule where they differ."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from shoal.configs.corpus import (
    C4Config,
    FilterConfig,
    FineWebConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    SourceConfig,
)
from shoal.data_pipeline.documents import Document, DroppedLog
from shoal.data_pipeline.filters import (
    C4,
    Filter,
    FineWeb,
    GopherQuality,
    GopherRepetition,
    Text,
    build_filters,
)
from shoal.data_pipeline.ngrams import Lexicon
from shoal.data_pipeline.sources import read_documents

SENTENCE = "The cells of the cortex have to be seen with light, and that is what was done here. "


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Every eighth document of the samples: 300, in which each filter has something to remove."""
    found: list[Document] = []
    for name in ("general_train", "domain_train"):
        source = SourceConfig(path=f"{{samples}}/{name}.jsonl.gz")
        found += islice(read_documents(source, DroppedLog()), 0, None, 8)
    return found


@pytest.fixture(scope="module")
def peers() -> dict[str, Any]:
    """datatrove's filters, their words split at blanks and sentences counted as ours are."""
    from datatrove.pipeline import filters
    from datatrove.pipeline.filters import (
        c4_filters,
        fineweb_quality_filter,
        gopher_quality_filter,
        gopher_repetition_filter,
    )

    ends = re.compile(r"""[.!?]["')\]”’]*(?:\s|$)""")
    with pytest.MonkeyPatch.context() as patch:
        for module in (fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter):
            patch.setattr(module, "split_into_words", lambda text, _: text.split())
        patch.setattr(c4_filters, "split_into_sentences", lambda text, _: ends.findall(text))
        yield {
            "gopher_quality": filters.GopherQualityFilter(),
            "gopher_repetition": filters.GopherRepetitionFilter(),
            "c4": filters.C4QualityFilter(remove_citations=False),
            "fineweb": filters.FineWebQualityFilter(),
        }


def judge(ours: Filter, text: str) -> str | None:
    """The rule that a text breaks."""
    verdict = ours.judge(Text(text), Counter())
    return None if verdict is None else verdict.rule


EVERY_FILTER = FilterConfig(c4=C4Config(), fineweb=FineWebConfig())
DIFFERENCES: dict[str, Callable[[str], bool]] = {
    # blank lines are no lines; stop words count in capitals too
    "gopher_quality": lambda text: (
        "\n\n" in text or re.search(r"\b(The|To|Of|And|That)\b", text) is not None
    ),
    "gopher_repetition": lambda text: False,
    # the paper drops the page, datatrove looks only at lines it has not removed before
    "c4": lambda text: "{" in text,
    "fineweb": lambda text: False,
}


@pytest.mark.parametrize("number", range(4))
def test_verdicts_are_those_of_datatrove(
    number: int, documents: list[Document], peers: dict[str, Any]
) -> None:
    from datatrove.data import Document as TheirDocument

    lexicon = Lexicon()
    ours = build_filters(EVERY_FILTER)[number]
    removed, other = 0, []
    for document in documents:
        text = Text(document.text, lexicon)
        verdict = ours.judge(text, Counter())
        theirs = TheirDocument(text=document.text, id=document.id)
        kept = peers[ours.name].filter(theirs) is True
        removed += verdict is not None
        if (verdict is None) != kept:
            other.append(document)
        elif kept:
            assert text.text == theirs.text
    assert removed >= 2
    assert len(other) <= 3
    assert all(DIFFERENCES[ours.name](document.text) for document in other)


def test_filters_judge_in_the_order_of_the_config() -> None:
    assert [one.name for one in build_filters(EVERY_FILTER)] == [
        "gopher_quality",
        "gopher_repetition",
        "c4",
        "fineweb",
    ]
    assert [one.name for one in build_filters(FilterConfig())] == [
        "gopher_quality",
        "gopher_repetition",
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (SENTENCE * 4, None),
        (SENTENCE * 2, "too few words"),
        ("± " * 60 + SENTENCE, "too few words"),
        (SENTENCE * 6000, "too many words"),
        ("a I " * 30 + SENTENCE, "words too short"),
        ("of the " + "internationalisation " * 60, "words too long"),
        (SENTENCE * 4 + "12.5 " * 30, "too few words with letters"),
        ("Rivers carry water from mountains down into lakes. " * 8, "too few stop words"),
        ("Rivers carry water OF mountains down into The lakes. " * 8, None),
        (SENTENCE * 4 + "#" * 10, "too many #"),
        (SENTENCE * 4 + "… ... " * 6, "too many ellipses"),
        (f"- {SENTENCE}\n\n" * 9 + f"\n• {SENTENCE}", "too many bullet lines"),
        (f"- {SENTENCE}\n\n" * 9 + SENTENCE, None),
        (f"{SENTENCE}...\n{SENTENCE}\n{SENTENCE}" * 2, "too many lines ending in an ellipsis"),
    ],
)
def test_gopher_quality_rules(text: str, rule: str | None) -> None:
    assert judge(GopherQuality(GopherQualityConfig()), text) == rule


def test_repetitive_texts_are_judged_by_the_same_rule_as_by_datatrove(
    peers: dict[str, Any],
) -> None:
    """Texts of few words, with stretches that come back overlapping, as no real ones do."""
    from datatrove.data import Document as TheirDocument

    chooser = random.Random(0)
    ours, rules = GopherRepetition(GopherRepetitionConfig()), Counter[str]()
    for number in range(200):
        words = [chooser.choice("abcdefgh") * chooser.randint(1, 9) for _ in range(200)]
        for _ in range(chooser.randint(0, 9)):
            start, size = chooser.randrange(150), chooser.randint(4, 16)
            there = chooser.randrange(len(words))
            words[there:there] = words[start : start + size]
        text = " ".join(words)
        kept = peers["gopher_repetition"].filter(TheirDocument(text=text, id=str(number)))
        theirs = None if kept is True else re.search(r"(top|dup)\D*(\d+)", kept[1])
        rule = judge(ours, text)
        found = None if rule is None else re.search(r"(top|dup)\D*(\d+)", rule)
        assert (theirs and theirs.groups()) == (found and found.groups())
        rules[str(rule)] += 1
    assert len(rules) >= 5
    assert 20 < rules["None"] < 180


def number_words(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (number_words(0, 60), None),
        ("tiny", None),
        ("a b", None),
        ("\n\n".join(["same"] * 2 + list("abc")), "characters in duplicate paragraphs"),
        ("\n\n".join(["x"] * 3 + [number_words(0, 20), number_words(50, 20)]),
         "duplicate paragraphs"),
        ("\n".join(["x"] * 3 + [number_words(0, 20), number_words(50, 20)]), "duplicate lines"),
        ("\n".join([number_words(0, 9)] * 2 + [number_words(20, 5), number_words(30, 5)]),
         "characters in duplicate lines"),
        (" ".join(f"of the {number_words(i, 2)}" for i in range(0, 40, 2)), "top 2-gram"),
        (number_words(0, 15) + " " + number_words(0, 15) + " " + number_words(20, 22),
         "duplicate 5-grams"),
        (" ".join([number_words(0, 10), number_words(20, 40)] * 2)[:-1], "duplicate 5-grams"),
        ("x " * 400, "top 2-gram"),
    ],
)  # fmt: skip
def test_gopher_repetition_rules(text: str, rule: str | None) -> None:
    assert judge(GopherRepetition(GopherRepetitionConfig()), text) == rule


def test_long_sequences_are_judged_when_shorter_ones_pass() -> None:
    """Twelve words of 102 come back, of which a 10-gram takes ten."""
    text = " ".join([number_words(0, 12), number_words(20, 33), number_words(0, 12),
                     number_words(60, 45)])  # fmt: skip
    assert judge(GopherRepetition(GopherRepetitionConfig()), text) is None
    strict = GopherRepetitionConfig(max_duplicate_ngrams={5: 0.5, 10: 0.05})
    assert judge(GopherRepetition(strict), text) == "duplicate 10-grams"
    single = GopherRepetitionConfig(max_top_ngrams={1: 0.02}, max_duplicate_ngrams={})
    assert judge(GopherRepetition(single), text + " w7 w7 w7 w7") == "top 1-gram"


def test_c4_removes_lines_and_counts_them() -> None:
    kept = "This line is kept by C4.\n" * 5
    text = Text(
        kept
        + "A heading\nToo short.\nPlease turn on JavaScript now.\nRead our cookie policy, please."
        "\nIt goes on and on...\n"
    )
    changes: Counter[str] = Counter()
    assert C4(C4Config()).judge(text, changes) is None
    assert text.text == kept.strip()
    assert changes == {
        "c4: lines without terminal punctuation": 2,
        "c4: lines of too few words": 1,
        "c4: lines on javascript": 1,
        "c4: lines on cookies and policies": 1,
    }


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("One is here now. Two is. Three is. Four is. Five is.", None),
        ("One is here now. Two is. Three is. Four is.", "too few sentences"),
        ("It is here now. " * 9 + "\nsee {x}", "curly bracket"),
        ("It is here now. " * 9 + "\nLorem Ipsum dolor", "lorem ipsum"),
    ],
)
def test_c4_rules(text: str, rule: str | None) -> None:
    changes: Counter[str] = Counter()
    verdict = C4(C4Config()).judge(Text(text), changes)
    assert (verdict and verdict.rule) == rule
    assert rule is None or not changes
    assert judge(C4(C4Config(min_sentences=0)), "no sentence\nat all") == "no line left"
    off = C4Config(
        terminal_punctuation=False,
        min_line_words=0,
        min_sentences=0,
        curly_brackets=False,
        boilerplate=False,
    )
    assert judge(C4(off), text) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (f"{SENTENCE.strip()}\n" + number_words(0, 40), None),
        ("\n".join(number_words(9 * i, 9) for i in range(9)), "too few lines end with punctuation"),
        ("\n".join([*(f"{number_words(9 * i, 3)}." for i in range(7)), SENTENCE, "神経。"]),
         "too many short lines"),
        (f"{SENTENCE.strip()}\n" * 2, "characters in duplicate lines"),
        ("\n\n\n".join(f"{'x' * 25}{i} and so on." for i in range(9)),
         "too many line breaks"),
    ],
)  # fmt: skip
def test_fineweb_rules(text: str, rule: str | None) -> None:
    assert judge(FineWeb(FineWebConfig()), text) == rule


def test_a_verdict_names_value_and_threshold() -> None:
    verdict = GopherQuality(GopherQualityConfig()).judge(Text("three short words"), Counter())
    assert verdict is not None
    assert verdict.match == "3, at least 50"


def test_verdicts_do_not_depend_on_what_a_lexicon_read_before(documents: list[Document]) -> None:
    small, filters = Lexicon(capacity=500), build_filters(FilterConfig())
    for document in documents[::6]:
        seen = [one.judge(Text(document.text, small), Counter()) for one in filters]
        assert seen == [one.judge(Text(document.text), Counter()) for one in filters]
    assert small.generation > 3
