"""Corpora of planted topics: documents of made-up words that no other topic has."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from shoal.configs.clusters import ClusterConfig
from shoal.configs.corpus import PrepareConfig
from shoal.data_pipeline.shards import prepare

TOPICS = 8
LETTERS = "bdfghjkw"
_SYLLABLES = ("ka", "lo", "mi", "ne", "pu", "ra", "so", "ti", "vu", "ze")


def make_words(topic: int) -> list[str]:
    """Words of a topic, which start with its letter."""
    chooser = random.Random(topic)
    letter = LETTERS[topic]
    return [letter + "".join(chooser.choices(_SYLLABLES, k=2)) + letter for _ in range(12)]


def write_topics(file: Path, documents: int, weights: list[int], seed: int) -> Path:
    """Write documents of 60 words of one topic each."""
    chooser = random.Random(seed)
    with file.open("w") as lines:
        for number in range(documents):
            topic = chooser.choices(range(TOPICS), weights)[0]
            text = " ".join(chooser.choices(make_words(topic), k=60))
            lines.write(json.dumps({"id": f"{seed}-{number}", "text": text}) + "\n")
    return file


def prepare_topics(folder: Path) -> Path:
    """Prepare a generic corpus of all topics and a domain of the first two."""
    sources = {
        "generic": write_topics(folder / "generic.jsonl", 400, [1] * TOPICS, 1),
        "domain": write_topics(folder / "domain.jsonl", 100, [3, 1] + [0] * (TOPICS - 2), 2),
    }
    tokenizer: dict[str, object] = {"vocab_size": 400}
    for name, file in sources.items():
        output = folder / name
        tree = {
            "output": str(output),
            "train": [{"path": str(file)}],
            "tokenizer": tokenizer,
            "context": 64,
            "processes": 1,
        }
        prepare(PrepareConfig.model_validate(tree))
        tokenizer = {"path": str(folder / "generic" / "tokenizer")}
    return folder


def make_config(corpora: Path, output: Path, **changes: object) -> ClusterConfig:
    """Return a config for the two corpora, altered as asked."""
    tree = {
        "output": str(output),
        "generic": {"name": "generic", "path": str(corpora / "generic" / "train")},
        "domains": [{"name": "domain", "path": str(corpora / "domain" / "train")}],
        "embedding": {"dimensions": 16, "buckets": 1024},
        "clusters": TOPICS,
        "task_rows": 128,
        "processes": 1,
    }
    return ClusterConfig.model_validate(tree | changes)


def find_topics(texts: list[str]) -> np.ndarray:
    """Return the topic that most words of each text are of.  # (n,) int64"""
    words = [text.split() for text in texts]
    counts = [[sum(w[0] == letter for w in row) for letter in LETTERS] for row in words]
    return np.asarray(counts).argmax(axis=1)
