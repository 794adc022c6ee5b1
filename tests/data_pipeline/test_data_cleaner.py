"""The cleaner as a whole: normalisation, the order of its steps, what it says of removals."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import unicodedata
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.configs.corpus import (
    C4Config,
    CleanConfig,
    DecontaminationConfig,
    FilterConfig,
    NormalizeConfig,
    ScrubConfig,
    SourceConfig,
)
from shoal.configs.errors import DataError
from shoal.data_pipeline.cleaner import Cleaner, load_cleaner
from shoal.data_pipeline.documents import Document, DroppedLog, Removal
from shoal.data_pipeline.normalization import Normalizer
from shoal.data_pipeline.sources import read_documents

PROSE = (
    "We saw how cells of the visual cortex answer to gratings of different contrast, and found "
    "that inhibition rises before excitation does. When light falls on a receptive field, firing "
    "follows within forty milliseconds; later responses have less to do with what was shown than "
    "with what an animal expects. None of these effects could be explained by movements of eyes.\n"
)
SECRET = "thirteen words of an evaluation text which no model should ever have seen"


@pytest.fixture
def against(tmp_path: Path) -> DecontaminationConfig:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"question": SECRET}) + "\n")
    return DecontaminationConfig(against=(str(file),))


def document(text: str) -> Document:
    return Document("d1", text, "bio", "here.jsonl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("  a \t\r\nb\rc\x0cd\u2028e\x85f \n", "a\nb\nc\nd\ne\nf"),
        ("a\n\n\n \t\n\u00a0\nb", "a\n\nb"),
        ("a\x00b\x07c\ufeffd\u200be\u00adf\u2060g", "abcdefg"),
        ("    if x:\n\treturn  y", "if x:\n\treturn  y"),
        ("a\u200c\u200db", "a\u200c\u200db"),
        ("e\u0301 ﬁ", "é ﬁ"),
        ("\n \t\u3000", ""),
    ],
)
def test_whitespace_and_unicode_are_made_plain(text: str, expected: str) -> None:
    assert Normalizer(NormalizeConfig()).normalize(text) == expected


def test_forms_can_be_chosen() -> None:
    text = " e\u0301 ﬁ\r\n"
    assert Normalizer(NormalizeConfig(unicode="none")).normalize(text) == "e\u0301 ﬁ"
    assert Normalizer(NormalizeConfig(unicode="NFKC")).normalize(text) == "é fi"
    assert Normalizer(NormalizeConfig(whitespace=False)).normalize(text) == " é ﬁ\r\n"


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.sampled_from(" \n\r\t\x0b\x1f\x85\u00ad\u2003\u0301\u00b4eaﬁ") | st.characters()),
    st.sampled_from(["NFC", "NFKC", "none"]),
)
def test_normalising_twice_changes_nothing_more(text: str, form: str) -> None:
    normalizer = Normalizer(NormalizeConfig.model_validate({"unicode": form}))
    once = normalizer.normalize(text)
    assert normalizer.normalize(once) == once
    assert "\r" not in once and "\n\n\n" not in once and once == once.strip()
    if form != "none":
        assert unicodedata.is_normalized(form, once)


def test_steps_follow_their_order(against: DecontaminationConfig) -> None:
    config = CleanConfig(scrub=ScrubConfig(), decontaminate=against)
    cleaner = Cleaner.build(config)
    kept = cleaner.clean(document(PROSE + "Write  to a@b.org .\r\n"))
    assert kept == document(PROSE + "Write  to <email> .")
    # too short as well as contaminated: the filter comes first
    short = cleaner.clean(document(SECRET))
    assert short == Removal(
        "d1", "here.jsonl", "bio", "gopher_quality: too few words", "13, at least 50"
    )
    shared = cleaner.clean(document(PROSE + SECRET.replace(" ", ",\n\n\n").upper()))
    assert isinstance(shared, Removal)
    assert shared.reason == "decontamination"
    assert shared.match == f"{against.against[0]}:1: {SECRET}"
    assert shared.similarity is None
    empty = cleaner.clean(document("\x00\n \ufeff"))
    assert isinstance(empty, Removal)
    assert empty.reason == "normalize: no text left"
    assert cleaner.take_counts() == {"normalize: texts": 1, "scrub: <email>": 1}
    assert cleaner.take_counts() == {}


def test_contamination_is_sought_in_what_c4_leaves(against: DecontaminationConfig) -> None:
    text = PROSE * 2 + SECRET
    config = CleanConfig(decontaminate=against, filters=FilterConfig(gopher_repetition=None))
    assert isinstance(Cleaner.build(config).clean(document(text)), Removal)
    lines = CleanConfig(
        decontaminate=against, filters=FilterConfig(gopher_repetition=None, c4=C4Config())
    )
    cleaner = Cleaner.build(lines)
    kept = cleaner.clean(document(text))
    assert isinstance(kept, Document)
    assert SECRET not in kept.text
    assert cleaner.counts["c4: lines without terminal punctuation"] == 1


def test_everything_off_leaves_documents_as_they_are() -> None:
    config = CleanConfig(normalize=None, scrub=None, filters=None, decontaminate=None)
    cleaner = Cleaner.build(config)
    odd = document(" a\r\n\x00 a@b.org " + SECRET)
    assert cleaner.clean(odd) is odd or cleaner.clean(odd) == odd
    assert not cleaner.counts


def test_a_process_builds_a_cleaner_once(against: DecontaminationConfig) -> None:
    config = CleanConfig(decontaminate=against)
    assert load_cleaner(config) is load_cleaner(CleanConfig(decontaminate=against))
    assert load_cleaner(CleanConfig(decontaminate=None)) is not load_cleaner(config)


def test_a_changed_evaluation_set_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    config = CleanConfig(filters=None, decontaminate=DecontaminationConfig(against=(str(file),)))
    for text in (" ".join(f"old{n}" for n in range(20)), " ".join(f"newer{n}" for n in range(20))):
        file.write_text(json.dumps({"text": text}) + "\n")
        assert isinstance(load_cleaner(config).clean(document(text)), Removal)
    file.unlink()
    with pytest.raises(DataError, match=r"set\.jsonl"):
        load_cleaner(config)


def clean_samples(order: int) -> str:
    """Clean a hundred documents forwards or backwards; return what came of it, sorted."""
    source = SourceConfig(path="{samples}/general_train.jsonl.gz")
    documents = list(islice(read_documents(source, DroppedLog()), 100))
    cleaner = Cleaner.build(CleanConfig())
    found = sorted(repr(cleaner.clean(document)) for document in documents[::order])
    return repr((found, sorted(cleaner.counts.items())))


def test_results_depend_on_the_document_alone() -> None:
    """Not on the hash seed of the process, nor on the documents before."""
    code = (
        "import sys; from importlib.util import module_from_spec, spec_from_file_location as at;"
        "spec = at('here', sys.argv[1]); here = module_from_spec(spec);"
        "spec.loader.exec_module(here); sys.stdout.write(here.clean_samples(-1))"
    )
    other = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code, __file__],
        env={"PYTHONHASHSEED": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert other.stdout == clean_samples(1)


def test_samples_lose_few_documents_and_every_removal_says_why() -> None:
    cleaner = Cleaner.build(CleanConfig())
    source = SourceConfig(path="{samples}/domain_validation.jsonl.gz")
    results = [cleaner.clean(document) for document in read_documents(source, DroppedLog())]
    removals = [result for result in results if isinstance(result, Removal)]
    assert len(removals) < len(results) / 5
    assert all(": " in removal.reason and removal.match for removal in removals)
    assert pickle.loads(pickle.dumps(removals)) == removals
