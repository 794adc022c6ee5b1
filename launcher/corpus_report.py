"""The page of `shoal prepare --report`: what was read, removed, cut and packed, from the manifests.

It is made from manifest.json, removed.jsonl and dropped.jsonl of each split and from nothing else,
so a corpus that was prepared long ago, or lies behind a URL, can be shown as well.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.errors import DataError
from shoal.launcher.history import format_bytes

if TYPE_CHECKING:
    from shoal.data_pipeline.manifest import Manifest

REPORT = "report.html"
EXAMPLES = 5
PAIRS = 12
"""Near-duplicate pairs that are shown, the least alike first: there a mistake would be."""
DOMAINS = 30
"""Domains that are shown, the largest."""
MATCH_CHARACTERS = 300
STEPS = {
    "gopher_quality": "Gopher quality",
    "gopher_repetition": "Gopher repetition",
    "c4": "C4",
    "fineweb": "FineWeb",
    "decontamination": "decontamination",
    "exact_duplicate": "exact duplicates",
    "near_duplicate": "near duplicates",
}
"""Steps of cleaning in the order they run, by the first word of a removal's reason."""


@dataclass
class Removed:
    """What the list of removals tells beyond its counts."""

    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The first few of each reason."""
    pairs: list[dict[str, Any]] = field(default_factory=list)
    """Near duplicates, the least similar first."""
    similarities: Counter[int] = field(default_factory=Counter)
    """Near duplicates by percent of similarity, rounded down."""


@dataclass(frozen=True)
class SplitView:
    """One split as the page shows it."""

    name: str
    manifest: Manifest
    removed: Removed
    dropped: list[dict[str, Any]]
    """Examples of records that were broken."""

    @property
    def steps(self) -> list[tuple[str, str, int, list[dict[str, Any]]]]:
        """(step, rule, documents, examples) of every reason, steps in the order they run."""
        cleaning = self.manifest.cleaning
        order = list(STEPS)
        rows = []
        for reason, count in (cleaning.removed if cleaning else {}).items():
            step, _, rule = reason.partition(": ")
            place = order.index(step) if step in STEPS else len(order)
            rows.append((place, -count, rule, STEPS.get(step, step), reason))
        return [
            (step, rule, -count, self.removed.examples.get(reason, []))
            for _, count, rule, step, reason in sorted(rows)
        ]

    @property
    def examples(self) -> list[tuple[str, str, int, list[dict[str, Any]]]]:
        """Those steps that have examples."""
        return [row for row in self.steps if row[-1]]

    @property
    def domains(self) -> list[tuple[str, int]]:
        """Domain labels and their documents, the largest first."""
        return sorted(self.manifest.domains.items(), key=lambda pair: (-pair[1], pair[0]))

    @property
    def bars(self) -> list[Bar]:
        """The histogram of document lengths."""
        return draw_bars({int(size): count for size, count in self.manifest.lengths.items()})

    @property
    def similarity_bars(self) -> list[Bar]:
        """The histogram of similarities of near duplicates."""
        found = self.removed.similarities
        spread = range(min(found), max(found) + 1) if found else ()
        tallest = max(found.values(), default=1)
        return [Bar(f"{n}%", found[n], found[n] / tallest) for n in spread]


@dataclass(frozen=True)
class Bar:
    """One column of a histogram."""

    label: str
    count: int
    height: float
    """Of the tallest, 0 to 1."""


def draw_bars(lengths: Mapping[int, int]) -> list[Bar]:
    """Return a column for every power of two between the shortest and the longest document."""
    if not lengths:
        return []
    powers = [size for size in lengths if size > 0]
    sizes = [0] if 0 in lengths else []
    size = min(powers, default=1)
    while powers and size <= max(powers):
        sizes.append(size)
        size *= 2
    tallest = max(lengths.values())
    return [
        Bar(_name_size(one), lengths.get(one, 0), lengths.get(one, 0) / tallest) for one in sizes
    ]


def _name_size(tokens: int) -> str:
    for unit, factor in (("M", 2**20), ("k", 2**10)):
        if tokens >= factor:
            return f"{tokens // factor}{unit}"
    return str(tokens)


def write_corpus_report(output: Path, name: str) -> Path:
    """Write the page into the folder of a prepared corpus; an older page there is replaced.

    Args:
        output: The folder, or that of the receipt of one behind a URL.
        name: What the page calls the corpus.

    Returns:
        The page.

    Raises:
        DataError: no corpus there, or a manifest or list that was altered.
    """
    from shoal.trainer.storage import write_durable

    page = output / REPORT
    aside = output / f".{REPORT}.new"
    write_durable(aside, render_corpus(output, name))
    aside.replace(page)
    return page


def render_corpus(output: Path, name: str) -> str:
    """Return the page of a corpus: one file, no script, no outside resource.

    Raises:
        DataError: no corpus there, or a manifest or list that was altered.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from shoal.data_pipeline.pieces import TRAIN, VALIDATION

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        count=lambda number: f"{number:,}",
        bytes=format_bytes,
        share=_format_share,
        short=_format_count,
        clip=_clip,
        yaml=_dump_yaml,
    )
    splits = [view_split(output / TRAIN)]
    if (output / VALIDATION).is_dir():
        splits.append(view_split(output / VALIDATION))
    page = environment.get_template("corpus.html.jinja")
    return page.render(name=name, output=output, splits=splits, DOMAINS=DOMAINS)


def view_split(folder: Path) -> SplitView:
    """Read the manifest of a split and the lists beside it.

    Raises:
        DataError: no shards there, or a file that was altered.
    """
    from shoal.data_pipeline.manifest import DROPPED, REMOVED, read_manifest

    manifest = read_manifest(folder)
    dropped: Counter[str] = Counter()
    examples = []
    for record in _read_list(folder, DROPPED, manifest):
        dropped[record["reason"]] += 1
        if dropped[record["reason"]] <= EXAMPLES:
            examples.append(record)
    removed = summarize_removed(_read_list(folder, REMOVED, manifest))
    return SplitView(folder.name, manifest, removed, examples)


def summarize_removed(records: Iterator[dict[str, Any]]) -> Removed:
    """Read the list of removals once, in memory that does not grow with it."""
    removed = Removed()
    least: list[tuple[float, int, dict[str, Any]]] = []
    for number, record in enumerate(records):
        similarity = record.get("similarity")
        if similarity is not None:
            removed.similarities[int(100 * similarity + 1e-9)] += 1
            heapq.heappush(least, (-similarity, -number, record))
            if len(least) > PAIRS:
                heapq.heappop(least)
        else:
            found = removed.examples.setdefault(record["reason"], [])
            if len(found) < EXAMPLES:
                found.append(record)
    removed.pairs = [record for _, _, record in sorted(least, reverse=True)]
    return removed


def _read_list(folder: Path, name: str, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Read a list of JSON lines that the manifest vouches for; none where it knows of none."""
    from shoal.data_pipeline.manifest import REMAKE, hash_file

    if name not in manifest.files:
        return
    file = folder / name
    if not file.is_file() or hash_file(file) != manifest.files[name]:
        raise DataError("is missing or was altered after it was written", where=file, fix=REMAKE)
    with file.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield json.loads(line)


def _format_share(part: float, whole: float) -> str:
    """Return a share in percent; a small one is not rounded to nothing."""
    if not whole or not part:
        return "0%"
    share = 100 * part / whole
    return "< 0.1%" if share < 0.1 else f"{share:.1f}%"


def _format_count(number: int) -> str:
    """Return a count that fits over a column."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 10 * factor:
            return f"{number / factor:.0f}{unit}"
    return f"{number:,}"


def _clip(text: str) -> str:
    return text if len(text) <= MATCH_CHARACTERS else f"{text[:MATCH_CHARACTERS]} …"


def _dump_yaml(tree: Mapping[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
    return text
