"""Quality filters: Gopher quality, Gopher repetition, C4, FineWeb; their rules, one text at a time.

Thresholds are the published ones (`configs/corpus.py`). `docs/data_cleaning.md` lists where the
rules differ from the filters of datatrove, and why.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from shoal.configs.corpus import (
    C4Config,
    FilterConfig,
    FineWebConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
)
from shoal.data_pipeline.ngrams import LETTERED, SPOKEN, STOP_TRAITS, Lexicon, Repeats, Words

BULLETS = ("•", "-")
ELLIPSES = ("...", "…")
SENTENCE_MARKS = tuple(".?!。．｡！？︒﹒﹗⁇⁈⁉‼⸮؟۔।॥։።፧፨។៕၊။܀܁܂᠃᠉‽")
"""What ends a sentence, in the scripts in use today (Sentence_Terminal of Unicode)."""
C4_LINE_ENDS = (".", "?", "!", '"', "'")
POLICY_PHRASES = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
    "use cookies",
)  # fmt: skip
_SENTENCE_END = re.compile(r"""[.!?]["')\]”’]*(?:\s|$)""")
_PARAGRAPHS = re.compile(r"\n{2,}")


@dataclass(frozen=True)
class Verdict:
    """Why a text is not kept."""

    rule: str
    match: str
    """The value and the threshold."""


class Text:
    """A text on its way through the filters; what several of them need is worked out once."""

    def __init__(self, text: str, lexicon: Lexicon | None = None) -> None:
        self.text = text
        self._lexicon = Lexicon() if lexicon is None else lexicon
        self._words: Words | None = None
        self._lines: list[str] | None = None

    @property
    def words(self) -> Words:
        """Its words, split at blanks."""
        if self._words is None or self._words.generation != self._lexicon.generation:
            self._words = self._lexicon.read(self.text)
        return self._words

    @property
    def word_count(self) -> int:
        """How many words there are; cheaper than `words` where nothing else is asked of them."""
        return len(self.text.split()) if self._words is None else self._words.count

    @property
    def lines(self) -> list[str]:
        """Its lines, those left out that are empty or blank."""
        if self._lines is None:
            self._lines = [line for line in self.text.split("\n") if line and not line.isspace()]
        return self._lines

    def replace(self, text: str) -> None:
        """Go on with another text."""
        if text != self.text:
            self.text, self._words, self._lines = text, None, None


class Filter(Protocol):
    """Judges texts by its rules, in their order; one that changes the text says what it took."""

    @property
    def name(self) -> str:
        """What its config section is called; reasons begin with it."""
        ...

    def judge(self, text: Text, changes: Counter[str]) -> Verdict | None:
        """Return why a text with a word at least is to be removed, or None."""
        ...


def build_filters(config: FilterConfig) -> list[Filter]:
    """Return the filters that are on, in the order in which they judge."""
    filters: list[Filter] = []
    if config.gopher_quality:
        filters.append(GopherQuality(config.gopher_quality))
    if config.gopher_repetition:
        filters.append(GopherRepetition(config.gopher_repetition))
    if config.c4:
        filters.append(C4(config.c4))
    if config.fineweb:
        filters.append(FineWeb(config.fineweb))
    return filters


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _above(rule: str, value: float, limit: float) -> Verdict | None:
    return Verdict(rule, f"{value:.4g}, at most {limit:g}") if value > limit else None


def _below(rule: str, value: float, limit: float) -> Verdict | None:
    return Verdict(rule, f"{value:.4g}, at least {limit:g}") if value < limit else None


@dataclass(frozen=True)
class GopherQuality:
    """Rules on whole documents (Rae et al. 2021, table A1)."""

    config: GopherQualityConfig
    name: str = "gopher_quality"

    def judge(self, text: Text, changes: Counter[str]) -> Verdict | None:
        """Return the first rule that a text breaks."""
        return self._judge_words(text.words) or self._judge_marks(text) or self._judge_lines(text)

    def _judge_words(self, words: Words) -> Verdict | None:
        import numpy as np

        config = self.config
        spoken = (words.traits & SPOKEN) > 0
        count = int(np.count_nonzero(spoken))
        length = _share(int(words.lengths @ spoken), count)
        lettered = int(np.count_nonzero(words.traits & LETTERED))
        stops = int(np.bitwise_or.reduce(words.traits)) & STOP_TRAITS
        return (
            _below("too few words", count, config.min_words)
            or _above("too many words", count, config.max_words)
            or _below("words too short", length, config.min_mean_word_length)
            or _above("words too long", length, config.max_mean_word_length)
            or _below(
                "too few words with letters",
                _share(lettered, words.count),
                config.min_alphabetic_words,
            )
            or _below("too few stop words", stops.bit_count(), config.min_stop_words)
        )

    def _judge_marks(self, text: Text) -> Verdict | None:
        limit, count = self.config.max_symbol_word_ratio, text.word_count
        ellipses = sum(map(text.text.count, ELLIPSES))
        return _above("too many #", _share(text.text.count("#"), count), limit) or _above(
            "too many ellipses", _share(ellipses, count), limit
        )

    def _judge_lines(self, text: Text) -> Verdict | None:
        lines = text.lines
        bullets = sum(line.lstrip().startswith(BULLETS) for line in lines)
        ellipses = sum(line.rstrip().endswith(ELLIPSES) for line in lines)
        return _above(
            "too many bullet lines", _share(bullets, len(lines)), self.config.max_bullet_lines
        ) or _above(
            "too many lines ending in an ellipsis",
            _share(ellipses, len(lines)),
            self.config.max_ellipsis_lines,
        )


def count_duplicates(parts: list[str]) -> tuple[int, int]:
    """Return how many parts occurred before, and their characters."""
    if len(set(parts)) == len(parts):
        return 0, 0
    counts = Counter(parts)
    number = len(parts) - len(counts)
    return number, sum(len(part) * (count - 1) for part, count in counts.items())


@dataclass(frozen=True)
class GopherRepetition:
    """Repetition within a document (Rae et al. 2021, table A1); shares are of characters."""

    config: GopherRepetitionConfig
    name: str = "gopher_repetition"

    def judge(self, text: Text, changes: Counter[str]) -> Verdict | None:
        """Return the first rule that a text breaks."""
        return self._judge_parts(text) or self._judge_ngrams(text)

    def _judge_parts(self, text: Text) -> Verdict | None:
        config, size = self.config, len(text.text)
        paragraphs = _PARAGRAPHS.split(text.text.strip())
        count, characters = count_duplicates(paragraphs)
        verdict = _above(
            "duplicate paragraphs", _share(count, len(paragraphs)), config.max_duplicate_paragraphs
        ) or _above(
            "characters in duplicate paragraphs",
            _share(characters, size),
            config.max_duplicate_paragraph_characters,
        )
        if verdict:
            return verdict
        count, characters = count_duplicates(text.lines)
        return _above(
            "duplicate lines", _share(count, len(text.lines)), config.max_duplicate_lines
        ) or _above(
            "characters in duplicate lines",
            _share(characters, size),
            config.max_duplicate_line_characters,
        )

    def _judge_ngrams(self, text: Text) -> Verdict | None:
        top, duplicate = self.config.max_top_ngrams, self.config.max_duplicate_ngrams
        words, characters = text.words, len(text.text)
        sizes, longest_top = (*top, *duplicate), max(top, default=0)
        for repeats in words.find_repeats(min(sizes, default=1), max(sizes, default=0)):
            size = repeats.size
            if size in top:
                value = _share(measure_top(words, repeats), characters)
                if verdict := _above(f"top {size}-gram", value, top[size]):
                    return verdict
            if size not in duplicate and size < longest_top:
                continue
            bound = _share(bound_duplicates(words, repeats), characters)
            if size in duplicate and bound > duplicate[size]:
                value = _share(measure_duplicates(words, repeats), characters)
                if verdict := _above(f"duplicate {size}-grams", value, duplicate[size]):
                    return verdict
            later = [limit for longer, limit in duplicate.items() if longer > size]
            if size >= longest_top and bound <= min(later, default=1):
                return None
        return None


def measure_top(words: Words, repeats: Repeats) -> int:
    """Return the characters in all occurrences of the most frequent sequence, the first of those.

    Blanks between its words are counted.
    """
    if not len(repeats.starts):
        return 0
    most = int(repeats.counts.max())
    start = int(repeats.starts[(repeats.counts[repeats.kinds] == most).argmax()])
    length = int(words.offsets[start + repeats.size] - words.offsets[start]) + repeats.size - 1
    return length * most


def bound_duplicates(words: Words, repeats: Repeats) -> int:
    """Return the characters within all sequences that occurred before: more cannot be duplicates.

    Nor can more be duplicates of longer sequences, since those consist of these.
    """
    import numpy as np

    if not len(repeats.starts):
        return 0
    first = np.empty(len(repeats.counts), np.int64)
    first[repeats.kinds[::-1]] = repeats.starts[::-1]  # of several values the last one counts
    again = repeats.starts[repeats.starts != first[repeats.kinds]]
    begins, ends = words.offsets[again], words.offsets[again + repeats.size]
    return int(np.minimum(ends[:-1], begins[1:]).sum() - begins[:-1].sum() + ends[-1] - begins[-1])


def measure_duplicates(words: Words, repeats: Repeats) -> int:
    """Return the characters in sequences that occurred before, none counted twice.

    The text is read from its start; a sequence met before is counted and stepped over whole.
    """
    seen: set[int] = set()
    free = characters = 0
    for start, kind in zip(repeats.starts.tolist(), repeats.kinds.tolist(), strict=True):
        if start < free:
            continue
        if kind in seen:
            free = start + repeats.size
            characters += int(words.offsets[free] - words.offsets[start])
        else:
            seen.add(kind)
    return characters


@dataclass(frozen=True)
class C4:
    """Lines that are no sentences are removed, then documents (Raffel et al. 2020, section 2.2)."""

    config: C4Config
    name: str = "c4"

    def judge(self, text: Text, changes: Counter[str]) -> Verdict | None:
        """Remove lines from a text, or return the first rule that it breaks."""
        if self.config.curly_brackets and (where := text.text.find("{")) >= 0:
            return Verdict("curly bracket", _quote(text.text, where))
        if self.config.boilerplate and (where := text.text.lower().find("lorem ipsum")) >= 0:
            return Verdict("lorem ipsum", _quote(text.text, where))
        removed: Counter[str] = Counter()
        kept = []
        for line in text.lines:
            reason = self._judge_line(line)
            if reason is None:
                kept.append(line.strip())
            else:
                removed[f"{self.name}: {reason}"] += 1
        left = "\n".join(kept)
        sentences = len(_SENTENCE_END.findall(left))
        verdict = _below("too few sentences", sentences, self.config.min_sentences)
        if verdict is None and not left:
            verdict = Verdict("no line left", f"{len(text.lines)} lines, none a sentence")
        if verdict is None:
            text.replace(left)
            changes.update(removed)
        return verdict

    def _judge_line(self, line: str) -> str | None:
        line = line.strip()
        if self.config.terminal_punctuation and (
            not line.endswith(C4_LINE_ENDS) or line.endswith("...")
        ):
            return "lines without terminal punctuation"
        if len(line.split(None, self.config.min_line_words)) < self.config.min_line_words:
            return "lines of too few words"
        if self.config.boilerplate:
            lower = line.lower()
            if "javascript" in lower:
                return "lines on javascript"
            if any(phrase in lower for phrase in POLICY_PHRASES):
                return "lines on cookies and policies"
        return None


def _quote(text: str, where: int) -> str:
    return " ".join(text[max(0, where - 20) : where + 20].split())


@dataclass(frozen=True)
class FineWeb:
    """What FineWeb adds to Gopher and C4 (Penedo et al. 2024, section 3.6)."""

    config: FineWebConfig
    name: str = "fineweb"

    def judge(self, text: Text, changes: Counter[str]) -> Verdict | None:
        """Return the first rule that a text breaks."""
        config, lines = self.config, text.lines
        punctuated = sum(line.endswith(SENTENCE_MARKS) for line in lines)
        short = sum(len(line) <= config.short_line for line in lines)
        _, duplicate = count_duplicates(lines)
        breaks = text.text.count("\n")
        return (
            _below(
                "too few lines end with punctuation",
                _share(punctuated, len(lines)),
                config.min_punctuated_lines,
            )
            or _above("too many short lines", _share(short, len(lines)), config.max_short_lines)
            or _above(
                "characters in duplicate lines",
                _share(duplicate, len(text.text) - breaks),
                config.max_duplicate_line_characters,
            )
            or _above(
                "too many line breaks",
                _share(breaks, text.word_count),
                config.max_newline_word_ratio,
            )
        )
