"""Memory of `shoal prepare`: the peak for a large corpus against that for one a tenth as large.

The peer is ourselves: memory is bounded if ten times the text takes no more. The text is drawn word
by word from the sample corpus, so that no document repeats another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks import samples
from benchmarks.claims import Claim, Target, Turns, make_parser, print_claim, use_all_cores
from shoal.configs.corpus import CleanConfig, PrepareConfig

FULL_BYTES, QUICK_BYTES = 5_000_000_000, 200_000_000
FILE_BYTES = 100_000_000
DOCUMENT_WORDS = 600
SAMPLE_SECONDS = 0.25

CHILD = """
import sys
from pathlib import Path
from shoal.configs.corpus import PrepareConfig
from shoal.data_pipeline.shards import prepare

if __name__ == "__main__":
    prepare(PrepareConfig.model_validate_json(Path(sys.argv[1]).read_text()))
"""


def main() -> None:
    """Print a line for every claim."""
    quick = make_parser(__doc__).parse_args().quick
    cores = use_all_cores()
    size = QUICK_BYTES if quick else FULL_BYTES
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as name:
        folder = Path(name)
        tokenizer = _train_tokenizer(folder)
        peaks = {}
        for label, wanted in (("small", size // 10), ("large", size)):
            text = folder / label
            write_corpus(text, wanted)
            peaks[label] = measure_peak(_make_config(folder, text, tokenizer, cores), folder)
        large, small = peaks["large"], peaks["small"]
        setup = {
            "text_bytes": [size // 10, size],
            "processes": cores,
            "seconds": [small.seconds, large.seconds],
            "cleaning": "all but scrub, with near duplicates and decontamination",
        }
        # Two rounds of one measurement: a peak has no spread worth the hours.
        turns = Turns((large.bytes,) * 2, (small.bytes,) * 2)
        name = "peak memory of prepare, ten times the text"
        print_claim(Claim.from_turns(name, "bytes", turns, Target("<=", 1.25), setup))


@dataclass(frozen=True)
class Peak:
    """Most memory that a command and its children held at once, and how long it took."""

    bytes: float
    seconds: float


def write_corpus(folder: Path, size: int) -> None:
    """Write about `size` bytes of text as JSON lines, in files of FILE_BYTES."""
    folder.mkdir()
    words, shares = _count_words()
    draw = np.random.default_rng(size)
    number = written = 0
    while written < size:
        file = folder / f"{number:03d}.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            of_file = 0
            while of_file < FILE_BYTES and written + of_file < size:
                chosen = words[draw.choice(len(words), DOCUMENT_WORDS * 64, p=shares)]
                for text in map(_join, chosen.reshape(64, DOCUMENT_WORDS)):
                    lines.write(json.dumps({"text": text}) + "\n")
                    of_file += len(text)
        written += of_file
        number += 1


def _join(words: np.ndarray) -> str:
    """Make lines of twelve words."""
    lines = words.reshape(-1, 12)
    return ".\n".join(" ".join(line) for line in lines) + "."


def _count_words() -> tuple[np.ndarray, np.ndarray]:
    from shoal.configs.corpus import SourceConfig
    from shoal.data_pipeline.documents import DroppedLog
    from shoal.data_pipeline.sources import read_documents

    counts: Counter[str] = Counter()
    for source in samples.SOURCES:
        for document in read_documents(SourceConfig(path=source), DroppedLog()):
            counts.update(word for word in document.text.split() if word.isalpha())
    return np.asarray(list(counts)), np.fromiter(counts.values(), float) / counts.total()


def _train_tokenizer(folder: Path) -> Path:
    from shoal.data_pipeline.shards import prepare

    return prepare(samples.make_config(folder / "trained", 1024)).tokenizer


def _make_config(folder: Path, text: Path, tokenizer: Path, processes: int) -> PrepareConfig:
    config = samples.make_config(
        folder / f"{text.name}-shards",
        1024,
        sources=(str(text),),
        tokenizer=tokenizer,
        processes=processes,
    )
    return config.model_copy(update={"clean": CleanConfig()})


def measure_peak(config: PrepareConfig, folder: Path) -> Peak:
    """Prepare in a process of its own; return the peak of what it and its workers hold.

    Memory that processes share counts once (proportional set size); the page cache does not count.
    """
    file = folder / "config.json"
    file.write_text(config.model_dump_json())
    script = folder / "child.py"
    script.write_text(CHILD)
    begun = time.perf_counter()
    child = subprocess.Popen([sys.executable, str(script), str(file)])
    peak = 0
    while child.poll() is None:
        peak = max(peak, _held_bytes(child.pid))
        time.sleep(SAMPLE_SECONDS)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, child.args)
    return Peak(peak, time.perf_counter() - begun)


def _held_bytes(pid: int) -> int:
    total = 0
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has ended
            continue
    return total


if __name__ == "__main__":
    main()
