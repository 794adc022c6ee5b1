"""Cleaning: each step and all of them against datatrove's, in one process, on the sample corpus.

datatrove's words are split at blanks, as ours are: that is 17 times as fast as its default.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from benchmarks import samples
from benchmarks.claims import (
    Claim,
    Target,
    WrongResultError,
    make_parser,
    print_claim,
    take_turns,
)
from shoal.configs.corpus import (
    C4Config,
    CleanConfig,
    DecontaminationConfig,
    FilterConfig,
    FineWebConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    NearDuplicatesConfig,
    NormalizeConfig,
    ScrubConfig,
    SourceConfig,
)
from shoal.data_pipeline.documents import Document

DIFFERENT_VERDICTS = 0.01  # share of documents; docs/data_cleaning.md lists the reasons
OFF: dict[str, Any] = {"normalize": None, "scrub": None, "filters": None, "decontaminate": None}
NO_FILTER: dict[str, Any] = {
    "gopher_quality": None,
    "gopher_repetition": None,
    "c4": None,
    "fineweb": None,
}


@dataclass(frozen=True)
class Corpus:
    """Documents in memory, and their bytes."""

    documents: list[Document]
    size: int

    @classmethod
    def read(cls, stride: int) -> Corpus:
        """Take every so manieth of the samples."""
        from shoal.data_pipeline.documents import DroppedLog
        from shoal.data_pipeline.sources import read_documents

        found: list[Document] = []
        for path in samples.SOURCES:
            records = read_documents(SourceConfig(path=path), DroppedLog())
            found += islice(records, 0, None, stride)
        return cls(found, sum(len(document.text.encode()) for document in found))

    def rate(self, work: Callable[[Document], Any]) -> float:
        """Return the MB a second of processor time, of something done to every document."""
        start = time.process_time()
        for document in self.documents:
            work(document)
        return self.size / (time.process_time() - start) / 1e6

    def describe(self) -> dict[str, Any]:
        """Return what the figures depend on."""
        return {"documents": len(self.documents), "text_bytes": self.size, "processes": 1}


def main() -> None:
    """Print a line for every claim."""
    quick = make_parser(__doc__).parse_args().quick
    corpus = Corpus.read(8 if quick else 2)
    rounds = 3 if quick else 7
    peers = make_peers()
    configs: dict[str, dict[str, Any]] = {
        "gopher_quality": {"gopher_quality": GopherQualityConfig()},
        "gopher_repetition": {"gopher_repetition": GopherRepetitionConfig()},
        "c4": {"c4": C4Config()},
        "fineweb": {"fineweb": FineWebConfig()},
    }
    for name, filters in configs.items():
        config = FilterConfig.model_validate({**NO_FILTER, **filters})
        clean = CleanConfig.model_validate({**OFF, "filters": config})
        print_claim(measure_step(name, clean, peers[name], corpus, rounds))
    for name, section in (
        ("decontaminate", DecontaminationConfig()),
        ("scrub", ScrubConfig(phones=False)),  # the peer knows e-mail and IP addresses alone
    ):
        clean = CleanConfig.model_validate({**OFF, name: section})
        print_claim(measure_step(name, clean, peers[name], corpus, rounds))
    print_claim(measure_all(peers, corpus, rounds))


Step = Callable[[Document], bool]
"""Does its work on a document; whether it is kept."""


def make_cleaner(config: CleanConfig) -> Step:
    """Return our steps, afresh: every word is new to them, which costs the most."""
    from shoal.data_pipeline.cleaner import Cleaner

    cleaner = Cleaner.build(config)
    return lambda document: isinstance(cleaner.clean(document), Document)


def make_peers() -> dict[str, Step]:
    """Return datatrove's steps by our names."""
    from datatrove.pipeline import filters
    from datatrove.pipeline.filters import (
        c4_filters,
        fineweb_quality_filter,
        gopher_quality_filter,
        gopher_repetition_filter,
    )

    for module in (fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter):
        module.split_into_words = lambda text, _: text.split()
    ends = re.compile(r"""[.!?]["')\]”’]*(?:\s|$)""")
    c4_filters.split_into_sentences = lambda text, _: ends.findall(text)
    return {
        "gopher_quality": _as_step(filters.GopherQualityFilter()),
        "gopher_repetition": _as_step(filters.GopherRepetitionFilter()),
        "c4": _as_step(filters.C4QualityFilter(remove_citations=False)),
        "fineweb": _as_step(filters.FineWebQualityFilter()),
        "decontaminate": _as_step(make_decontamination()),
        "scrub": make_formatter(),
        "sign": make_signer(),
    }


def _as_step(peer: Any) -> Step:
    from datatrove.data import Document as TheirDocument

    return lambda document: peer.filter(TheirDocument(document.text, document.id)) is True


class BlankTokenizer:
    """Words as datatrove wants to be given them."""

    word_tokenize = staticmethod(str.split)


def make_decontamination() -> Any:
    """Return their filter with the 13-grams of the evaluation texts that ours knows."""
    import json
    from pathlib import Path

    from datatrove.pipeline.decont import n_grams
    from datatrove.utils.text import TextNormConfig, ngrams, simplify_text

    from shoal.data_pipeline.sources import read_lines, resolve_path

    n_grams.load_word_tokenizer = lambda _: BlankTokenizer
    settings = n_grams.NGramsDecontConfig(
        n_grams=13, norm_config=TextNormConfig(norm_numbers=False)
    )
    peer = n_grams.NGramsDecontFilter("/nonexistent", settings)
    peer._index_hashes = {}
    for path in DecontaminationConfig().against:
        for line in read_lines(Path(resolve_path(path))):
            for text in json.loads(line).values():
                if isinstance(text, str):
                    words = simplify_text(text, settings.norm_config).split()
                    for sequence in ngrams(words, 13):
                        peer._index_hashes[peer.hash_func(" ".join(sequence))] = path
    return peer


def make_formatter() -> Step:
    """Return their scrubbing; it never removes a document."""
    from datatrove.pipeline.formatters import PIIFormatter

    peer = PIIFormatter()
    return lambda document: bool(peer.format(document.text)) or True


def make_signer() -> Step:
    """Return their MinHash signatures, with our shingles and bands."""
    from datatrove.pipeline.dedup import minhash
    from datatrove.utils.text import TextNormConfig

    minhash.load_word_tokenizer = lambda _: BlankTokenizer
    near = NearDuplicatesConfig()
    settings = minhash.MinhashConfig(
        n_grams=near.ngram,
        num_buckets=near.bands,
        hashes_per_bucket=near.band_hashes,
        norm_config=TextNormConfig(norm_numbers=False),
    )
    peer = minhash.MinhashDedupSignature("/nonexistent", settings)

    def sign(document: Document) -> bool:
        shingles = peer.get_shingles(document.text)
        return not len(shingles) or bool(peer.get_signature(shingles))

    return sign


def measure_step(name: str, config: CleanConfig, peer: Step, corpus: Corpus, rounds: int) -> Claim:
    """Compare one step with the peer's, after checking that both remove the same documents."""
    _check_verdicts(name, make_cleaner(config), peer, corpus)
    turns = take_turns(
        lambda: corpus.rate(make_cleaner(config)), lambda: corpus.rate(peer), rounds, warm_up=0
    )
    title = f"{name} against datatrove's"
    return Claim.from_turns(title, "MB/s per core", turns, Target(">=", 1), corpus.describe())


def _check_verdicts(name: str, ours: Step, peer: Step, corpus: Corpus) -> None:
    other = [one.id for one in corpus.documents if ours(one) != peer(one)]
    if len(other) > DIFFERENT_VERDICTS * len(corpus.documents):
        raise WrongResultError(f"{name}: {len(other)} other verdicts, such as {other[:3]}")


def measure_all(peers: dict[str, Step], corpus: Corpus, rounds: int) -> Claim:
    """Compare all that `shoal prepare` does to a document by default, MinHash included.

    The peer does not normalise, and signs only what its filters keep, as ours does.
    """
    from shoal.data_pipeline.minhash import Signer

    signer = Signer(NearDuplicatesConfig())
    chain = ("gopher_quality", "gopher_repetition", "decontaminate", "sign")

    def make_ours() -> Step:
        clean = make_cleaner(CleanConfig())
        return lambda document: clean(document) and signer.sign(document.text) is not None

    def peer(document: Document) -> bool:
        return all(peers[step](document) for step in chain)

    _check_verdicts("all steps", make_ours(), peer, corpus)
    turns = take_turns(
        lambda: corpus.rate(make_ours()), lambda: corpus.rate(peer), rounds, warm_up=0
    )
    setup = {**corpus.describe(), "steps_mb_per_s": _measure_steps(corpus)}
    name = "normalise, filter, decontaminate and sign against datatrove's"
    return Claim.from_turns(name, "MB/s per core", turns, Target(">=", 1.5, of="ours"), setup)


def _measure_steps(corpus: Corpus) -> dict[str, float]:
    """Return the MB/s of steps that have no peer, and of all of ours without signing."""
    configs = {
        "normalize": CleanConfig.model_validate({**OFF, "normalize": NormalizeConfig()}),
        "scrub, phones too": CleanConfig.model_validate({**OFF, "scrub": ScrubConfig()}),
        "all but signing": CleanConfig(),
    }
    return {
        name: max(corpus.rate(make_cleaner(config)) for _ in range(3))
        for name, config in configs.items()
    }


if __name__ == "__main__":
    main()
