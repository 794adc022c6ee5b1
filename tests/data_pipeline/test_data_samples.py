"""The shipped samples: small, attributed record by record, and described in their README."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import pytest

from shoal.data_pipeline.sources import resolve_path

FOLDER = Path(resolve_path("{samples}"))
CORPORA = ["domain_train", "domain_validation", "general_train", "general_validation"]
CASES = ["brainbench_human", "brainbench_gpt4"]
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@cache
def read(name):
    with gzip.open(FOLDER / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def text_of(record):
    parts = ("text", "question", "original_abstract", "incorrect_abstract")
    return "".join(record.get(part, "") for part in parts)


def test_nothing_else_is_shipped_and_it_is_small():
    expected = {f"{name}.jsonl.gz" for name in [*CORPORA, *CASES, "medical_abstracts"]}
    found = {file.name for file in FOLDER.iterdir() if file.is_file()}
    assert found == expected | {"README.md", "make_samples.py"}
    assert sum((FOLDER / name).stat().st_size for name in found) <= 8_000_000


@pytest.mark.parametrize("name", [*CORPORA, *CASES, "medical_abstracts"])
def test_readme_counts_are_true(name):
    file = FOLDER / f"{name}.jsonl.gz"
    size = sum(len(text_of(record).encode()) for record in read(name))
    numbers = f"{len(read(name)):,} | {size:,} | {file.stat().st_size:,} |"
    (line,) = [line for line in README.splitlines() if line.startswith(f"| `{file.name}`")]
    assert line.endswith(numbers)


def test_readme_has_a_row_for_every_source():
    for source in {record["source"] for name in CORPORA for record in read(name)}:
        (line,) = [line for line in README.splitlines() if line.startswith(f"| `{source}` |")]
        of_source = [r for name in CORPORA for r in read(name) if r["source"] == source]
        size = sum(len(record["text"].encode()) for record in of_source)
        assert f"| {len(of_source):,} | {size:,} |" in line
    assert "`medical_abstracts`" in README


@pytest.mark.parametrize("name", CORPORA)
def test_every_document_is_attributed(name):
    for record in read(name):
        for key in ("id", "text", "source", "domain", "license"):
            assert isinstance(record[key], str) and record[key].strip()
        assert record["id"].startswith(record["source"] + "/")
        assert "GPL" not in record["license"] and "NC" not in record["license"]
        if "BY-SA" in record["license"]:
            assert record["url"] and record["authors"]
    assert len({record["id"] for record in read(name)}) == len(read(name))


@pytest.mark.parametrize("group", ["domain", "general"])
def test_splits_share_no_document(group):
    train, validation = (read(f"{group}_{split}") for split in ("train", "validation"))
    for key in ("id", "text"):
        assert not {r[key] for r in train} & {r[key] for r in validation}


def test_questions():
    for record in read("medical_abstracts"):
        assert record["id"] and record["question"].endswith("This abstract is about")
        assert 0 <= record["answer"] < len(record["choices"])
        assert (record["source"], record["license"]) == ("medical_abstracts", "CC BY-SA 3.0")


@pytest.mark.parametrize("name", CASES)
def test_evaluation_cases_are_pairs_and_no_training_text(name):
    corpus = "\n".join(record["text"] for name in CORPORA for record in read(name))
    for record in read(name):
        assert record["case_id"] and record["doi"].startswith("https://doi.org/")
        assert record["original_abstract"] != record["incorrect_abstract"]
        words = record["original_abstract"].split()
        assert " ".join(words[20:33]) not in corpus
