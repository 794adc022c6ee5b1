"""The page of a prepared corpus: its figures, what it refuses, and that no text becomes markup."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.configs.errors import DataError
from shoal.data_pipeline.manifest import DROPPED, MANIFEST, REMOVED, Manifest, hash_file
from shoal.launcher import cli
from shoal.launcher.corpus_report import (
    Bar,
    draw_bars,
    render_corpus,
    summarize_removed,
    write_corpus_report,
)

HOSTILE = "<script>alert('&')</script>"
FEW = "gopher_quality: too few words"
REASONS = {FEW: 7, "decontamination": 1, "exact_duplicate": 2, "near_duplicate": 20}
REMOVALS = (
    [(f"short-{i}", FEW, f"{i}, at least 50", None) for i in range(7)]
    + [("leaked", "decontamination", f"{HOSTILE} of the test set", None)]
    + [(f"copy-{i}", "exact_duplicate", "original", None) for i in range(2)]
    + [(f"near-{i:02}", "near_duplicate", f"twin-{i:02}", 0.8 + i / 100) for i in range(20)]
)

FACTS: dict[str, Any] = {
    "prepare_key": "k" * 64, "rows": 12, "tokens": 1500, "text_bytes": 6000, "documents": 70,
    "context": 128, "tokenizer_fingerprint": "f" * 64, "vocab_size": 320, "eot_id": 319,
    "dtype": "uint16", "compression": None, "config": {"context": 128, "seed": 0},
    "sources": [{"path": f"texts/{HOSTILE}.jsonl", "files": 2, "sha256": "s", "documents": 100,
                 "bytes": 9000, "dropped": 1}],
    "dropped": {"total": 1, "reasons": {"not JSON": 1}, "examples": ["a.jsonl:3: not JSON"]},
    "packing": {"method": "best_fit", "separator": "end_of_text", "rows": 12, "tokens": 1500,
                "padding_tokens": 36, "cut_documents": 7},
    "cleaning": {"documents_read": 100, "bytes_read": 9000, "documents_kept": 70,
                 "bytes_kept": 6000, "removed": REASONS, "changed": {"scrub: <email>": 3},
                 "evaluation_sets": {"{samples}/brainbench_human.jsonl.gz": "e" * 64}},
    "domains": {"bio": 50, "": 20}, "lengths": {"8": 30, "32": 40},
    "shards": [{"file": "00000.mds", "bytes": 4000, "sha256": "a", "rows": 12, "raw_bytes": 4000,
                "raw_sha256": "b"}],
    "shards_hash": "h" * 64,
}  # fmt: skip


class Page(HTMLParser):
    """Collects what a reader sees, and whether every element is closed in its turn."""

    VOID = ("meta", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {"src", "href", "onclick"} & {name for name, _ in attrs}
        if tag not in self.VOID and not (tag in ("rect", "line") and self.open[-1] == "svg"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "rect":
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a split as `prepare` leaves it, but for its shards, which the page never opens."""

    def write(name: str = "train", **changes: Any) -> Path:
        folder = tmp_path / "corpus" / name
        folder.mkdir(parents=True)
        facts = FACTS | changes
        lists: dict[str, list[dict[str, Any]]] = {
            DROPPED: [{"source": "a", "place": "a.jsonl:3", "reason": "not JSON"}]
        }
        if facts["cleaning"]:
            lists[REMOVED] = [
                {"id": one, "source": "in/a.jsonl", "domain": "bio", "reason": reason,
                 "match": match, "similarity": similarity}
                for one, reason, match, similarity in REMOVALS
            ]  # fmt: skip
        for file, records in lists.items():
            lines = [json.dumps(record) + "\n" for record in records]
            (folder / file).write_text("".join(lines))
        files = {file: hash_file(folder / file) for file in lists}
        manifest = Manifest.model_validate(facts | {"files": files})
        (folder / MANIFEST).write_text(manifest.to_json())
        return folder.parent

    return write


def test_the_page_tells_what_the_manifest_does(write: Write) -> None:
    page = Page(render_corpus(write(), "mine"))
    for words in (
        "100 documents read, 9.0 kB",
        "30.0% of them removed by cleaning",
        "70 documents in the rows, 6.0 kB",
        "1,500 tokens, 4.00 bytes each",
        "2.3% padding",
        "near duplicates – 20 20.0%",
        "Gopher quality too few words 7 7.0%",
        "kept 70 70.0%",
        "documents cut 7 (10.0%)",
        "a.jsonl:3 not JSON",
        "scrub: <email> 3",
        "bio 50 71.4% (none) 20 28.6%",
        "seed: 0",
        "h" * 64,
    ):
        assert words in page.text
    assert "validation" not in page.text.lower()


def test_steps_stand_in_the_order_they_run(write: Write) -> None:
    text = Page(render_corpus(write(), "mine")).text
    steps = ("Gopher quality", "decontamination –", "exact duplicates", "near duplicates –")
    places = [text.index(f"{step} ") for step in steps]
    assert places == sorted(places)


def test_the_page_is_one_file_and_no_text_becomes_markup(write: Write) -> None:
    page = Page(render_corpus(write(), HOSTILE))  # asserts that nothing is loaded from elsewhere
    assert "script" not in page.tags
    assert page.text.count("alert") == 3  # the name, a source and a match, as text


def test_examples_are_few_and_the_least_similar_pairs_are_shown(write: Write) -> None:
    text = Page(render_corpus(write(), "mine")).text
    assert all(f"short-{i}" in text for i in range(5))
    assert "short-5" not in text
    assert "near-00 twin-00 0.800" in text
    assert "near-11 twin-11 0.910" in text
    assert "near-12" not in text
    assert "Gopher quality: too few words 7 removed, the first 5" in text
    assert "exact duplicates 2 removed document" in text
    assert "near duplicates 20 removed" not in text  # they have a table of their own


def test_both_splits(write: Write) -> None:
    write("validation", documents=3, cleaning=None, lengths={})
    text = Page(render_corpus(write(), "mine")).text
    assert "Validation 3 documents in the rows" in text
    assert "taken as they are" in text
    assert "holds no lengths" in text


def test_the_page_is_written_beside_the_splits_and_again(write: Write) -> None:
    output = write()
    page = write_corpus_report(output, "mine")
    assert page == output / "report.html"
    first = page.read_bytes()
    page.write_text("old")
    assert write_corpus_report(output, "mine").read_bytes() == first
    assert sorted(file.name for file in output.iterdir()) == ["report.html", "train"]


@pytest.mark.parametrize("file", [REMOVED, DROPPED])
def test_an_altered_list_is_refused(write: Write, file: str) -> None:
    output = write()
    (output / "train" / file).write_text("{}\n")
    with pytest.raises(DataError) as caught:
        write_corpus_report(output, "mine")
    assert caught.value.where == str(output / "train" / file)
    assert not (output / "report.html").exists()


def test_a_missing_list_is_refused(write: Write) -> None:
    output = write()
    (output / "train" / REMOVED).unlink()
    with pytest.raises(DataError, match="missing or was altered"):
        render_corpus(output, "mine")


def test_no_corpus_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards there"):
        render_corpus(tmp_path, "mine")


def test_bars_fill_the_gaps_between_powers_of_two() -> None:
    assert draw_bars({8: 30, 32: 40}) == [Bar("8", 30, 0.75), Bar("16", 0, 0), Bar("32", 40, 1)]
    assert [bar.label for bar in draw_bars({0: 1, 512: 2, 2048: 1})] == ["0", "512", "1k", "2k"]
    assert draw_bars({}) == []


def test_a_similarity_counts_where_it_is_written() -> None:
    records = [{"id": "a", "reason": "near_duplicate", "match": "b", "similarity": value}
               for value in (0.29, 0.8, 0.899, 1.0)]  # fmt: skip
    removed = summarize_removed(iter(records))
    assert removed.similarities == {29: 1, 80: 1, 89: 1, 100: 1}
    assert [pair["similarity"] for pair in removed.pairs] == [0.29, 0.8, 0.899, 1.0]


def test_prepare_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "the",
        "cell",
        "fires",
        "when",
        "light",
        "falls",
        "on",
        "it",
        "and",
        "it",
        "rests",
        "when",
        "there",
        "is",
        "none",
    ]
    lines = [{"id": f"d{i}", "text": " ".join(words[i % 7 :] + words[: i % 7])} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = {"name": "tiny", "output": "out", "train": [{"path": "a.jsonl"}], "context": 16,
            "tokenizer": {"vocab_size": 280}, "processes": 1}  # fmt: skip
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(tree))
    for built in (True, False):
        with pytest.raises(SystemExit) as caught:
            cli.main(["prepare", "corpus.yaml", *(["--report"] if not built else [])])
        assert not caught.value.code
        assert (tmp_path / "out" / "report.html").exists() is not built
    assert f"report: {Path('out') / 'report.html'}" in capsys.readouterr().out
    assert "60 documents in the rows" in Page((tmp_path / "out/report.html").read_text()).text
