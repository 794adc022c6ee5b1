"""The cleaner: normalise, scrub, filter, decontaminate, in this order, one document at a time.

Duplicates are found after it, among the documents it keeps: of two copies the clean one stays.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache

from shoal.configs.corpus import CleanConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.decontamination import Index, Matcher
from shoal.data_pipeline.documents import Document, Removal
from shoal.data_pipeline.files import stat
from shoal.data_pipeline.filters import Filter, Text, build_filters
from shoal.data_pipeline.ngrams import Lexicon
from shoal.data_pipeline.normalization import Normalizer
from shoal.data_pipeline.scrubbing import Scrubber
from shoal.data_pipeline.sources import resolve_path


@dataclass
class Cleaner:
    """The steps of a config that look at a document alone."""

    normalizer: Normalizer | None
    scrubber: Scrubber | None
    filters: list[Filter]
    matcher: Matcher | None
    lexicon: Lexicon
    counts: Counter[str] = field(default_factory=Counter)
    """What was changed in the documents that were kept: texts normalised, marks put, lines
    removed."""

    @classmethod
    def build(cls, config: CleanConfig) -> Cleaner:
        """Read the evaluation sets and get everything ready.

        Raises:
            DataError: an evaluation set is missing, damaged, or holds no text long enough.
        """
        lexicon = Lexicon()
        index = Index.build(config.decontaminate) if config.decontaminate else None
        return cls(
            Normalizer(config.normalize) if config.normalize else None,
            Scrubber(config.scrub) if config.scrub else None,
            build_filters(config.filters) if config.filters else [],
            Matcher(index, lexicon) if index else None,
            lexicon,
        )

    def clean(self, document: Document) -> Document | Removal:
        """Return the document with its text changed, or why it is removed."""
        changes: Counter[str] = Counter()
        text = Text(document.text, self.lexicon)
        if self.normalizer is not None:
            text.replace(self.normalizer.normalize(document.text))
            changes["normalize: texts"] += text.text != document.text
        if not text.text or text.text.isspace():
            return _remove(document, "normalize: no text left", "blanks and controls alone")
        if self.scrubber is not None:
            text.replace(self.scrubber.scrub(text.text, changes))
        for judge in self.filters:
            verdict = judge.judge(text, changes)
            if verdict is not None:
                return _remove(document, f"{judge.name}: {verdict.rule}", verdict.match)
        if self.matcher is not None and (hit := self.matcher.find(text.words)) is not None:
            return _remove(document, "decontamination", str(hit))
        self.counts.update(+changes)
        return replace(document, text=text.text)

    def take_counts(self) -> Counter[str]:
        """Return the counts since the last call, and begin anew."""
        taken, self.counts = self.counts, Counter()
        return taken


def _remove(document: Document, reason: str, match: str) -> Removal:
    return Removal(document.id, document.source, document.domain, reason, match)


def load_cleaner(config: CleanConfig) -> Cleaner:
    """Return the cleaner of a config and of its evaluation sets as they are, built once a process.

    Raises:
        DataError: an evaluation set is missing.
    """
    against = () if config.decontaminate is None else config.decontaminate.against
    stamps = tuple(map(_stamp, against))
    return _load(config.model_dump_json(), stamps)  # the config cannot be hashed: it holds dicts


def _stamp(path: str) -> str:
    """Return what changes with a file; nothing of a missing one, which building names."""
    try:
        return stat(resolve_path(path)).stamp
    except DataError:
        return ""


@lru_cache(maxsize=1)
def _load(config: str, stamps: tuple[str, ...]) -> Cleaner:
    return Cleaner.build(CleanConfig.model_validate_json(config))
