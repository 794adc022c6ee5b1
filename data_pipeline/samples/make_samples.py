"""Makes the sample corpus from the larger corpora it is a part of.

    python make_samples.py SOURCE [OUT]

SOURCE holds `general_corpus/`, `domain_corpus/`, `brainbench/` and `tasks/medical_abstracts/`; the
corpora are files `NAME.train.jsonl.gz` and `NAME.valid.jsonl.gz`, documents shuffled and split by
whole works. From every source whole documents are taken in file order up to a size, equally much of
each of its domain labels. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Kilobytes of text taken from each source: for training, for validation.
DOMAIN = {
    "neuro_fulltext": (3400, 130),
    "biomed_fulltext": (1300, 50),
    "openstax_health": (1600, 45),
    "medquad": (1100, 30),
    "clinical_notes": (600, 25),
    "plos_sample": (500, 0),
}
GENERAL = {
    "openstax_general": (2200, 70),
    "classic_books": (1200, 30),
    "arxiv_abstracts": (800, 25),
    "masc": (500, 20),
    "dc_code": (450, 15),
    "peps": (400, 20),
    "oa_stm": (400, 0),
    "plant_science": (400, 35),
    "factbook": (350, 14),
    "us_speeches": (350, 24),
    "stackexchange_dba_meta": (350, 15),
    "recipes": (200, 8),
    "eips": (150, 10),
    "rust_rfcs": (150, 10),
}
LONGEST = {"train": 90_000, "valid": 45_000}
"""Bytes of the longest document taken: a few giants would crowd out the rest."""

NOT_KEPT = {"keywords", "subjects", "tags", "site", "section", "subset", "category"}
"""Fields that neither name nor attribute a document."""

REMAINDER = "general pathological conditions"
QUESTION_CHARACTERS = 600


def main() -> None:
    """Write every sample file and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent)
    given = parser.parse_args()
    for group, sizes in (("domain", DOMAIN), ("general", GENERAL)):
        folder = given.source / f"{group}_corpus"
        for split, name, column in (("train", "train", 0), ("valid", "validation", 1)):
            documents = [
                document
                for source, kilobytes in sizes.items()
                for document in take(
                    folder / f"{source}.{split}.jsonl.gz", kilobytes[column], split
                )
            ]
            write(given.out / f"{group}_{name}.jsonl.gz", documents)
    for cases in ("human", "gpt4"):
        records = read(given.source / "brainbench" / f"cases_{cases}.jsonl.gz")
        write(given.out / f"brainbench_{cases}.jsonl.gz", records)
    abstracts = read(given.source / "tasks" / "medical_abstracts" / "dev.jsonl.gz")
    write(given.out / "medical_abstracts.jsonl.gz", make_questions(abstracts))


def read(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a compressed file of JSON lines."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records so that the bytes depend on them alone: no name and no time in the header."""
    packed = io.BytesIO()
    count = size = 0
    with gzip.GzipFile(filename="", fileobj=packed, mode="wb", compresslevel=9, mtime=0) as stream:
        for record in records:
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            count += 1
            size += len(record.get("text", "").encode())
    file.write_bytes(packed.getvalue())
    print(f"| `{file.name}` | {count:,} | {size:,} | {file.stat().st_size:,} |")


def take(file: Path, kilobytes: int, split: str) -> list[dict[str, Any]]:
    """Return whole documents, about `kilobytes` of text, equally much of every domain label."""
    if not kilobytes:
        return []
    documents = [d for d in read(file) if len(d["text"].encode()) <= LONGEST[split]]
    labels = sorted({document["domain"] for document in documents})
    limit = 1000 * kilobytes / len(labels)
    taken: Counter[str] = Counter()
    kept = []
    for document in documents:
        size = len(document["text"].encode())
        if taken[document["domain"]] + size <= limit:
            taken[document["domain"]] += size
            kept.append({k: v for k, v in document.items() if k not in NOT_KEPT and v is not None})
    return kept


def make_questions(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return title and beginning of each abstract as a question, the disease groups as choices.

    The remainder class is left out: its name says nothing that an abstract could be recognised by.
    """
    kept = [record for record in records if record["label"] != REMAINDER]
    choices = sorted({record["label"] for record in kept})
    return [
        {
            "id": record["id"],
            "question": f"{shorten(record['text'])}\n\nThis abstract is about",
            "choices": choices,
            "answer": choices.index(record["label"]),
            "source": "medical_abstracts",
            "license": "CC BY-SA 3.0",
        }
        for record in kept
    ]


def shorten(text: str) -> str:
    """Return the sentences that end within the first QUESTION_CHARACTERS, at least one."""
    if len(text) <= QUESTION_CHARACTERS:
        return text
    ends = [match.end() for match in re.finditer(r"[.?!](?=\s+[A-Z0-9(\[])", text)]
    inside = [end for end in ends if end <= QUESTION_CHARACTERS]
    return text[: inside[-1] if inside else ends[0] if ends else QUESTION_CHARACTERS]


if __name__ == "__main__":
    main()
