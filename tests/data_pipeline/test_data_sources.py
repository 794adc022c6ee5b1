"""Sources: every format is read alike, broken records are listed, broken files stop everything."""

from __future__ import annotations

import errno
import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from shoal.configs.corpus import SourceConfig
from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.files import stat
from shoal.data_pipeline.sources import DroppedLog, list_files, read_documents, resolve_path

RECORDS = [
    {"id": f"r{i}", "text": f"text {i} – naïve 神経\nwith two lines", "domain": "ab"[i % 2]}
    for i in range(7)
]


def read(path, **settings):
    """Documents of a source as (id, text, domain), and what was dropped."""
    dropped = DroppedLog()
    source = SourceConfig(path=str(path), **settings)
    found = [(d.id, d.text, d.domain) for d in read_documents(source, dropped)]
    return found, dropped


def as_tuples(records):
    return [(r["id"], r["text"], r["domain"]) for r in records]


@pytest.fixture
def make_source(tmp_path, lines):
    """Write RECORDS in a form; returns what a source calls it."""

    def parquet():
        pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    def saved(split):
        import datasets

        data = datasets.Dataset.from_list(RECORDS)
        whole = datasets.DatasetDict({"train": data}) if split else data
        whole.save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    forms = {
        "jsonl": lambda: lines(tmp_path / "x.jsonl", RECORDS),
        "gz": lambda: lines(tmp_path / "x.jsonl.gz", RECORDS),
        "zst": lambda: lines(tmp_path / "x.jsonl.zst", RECORDS),
        "upper": lambda: lines(tmp_path / "X.NDJSON", RECORDS),
        "parquet": parquet,
        "datasets dict": lambda: saved(True),
        "datasets flat": lambda: saved(False),
        "datasets folder": lambda: lines(tmp_path / "folder" / "train.jsonl", RECORDS).parent,
    }
    return lambda form: forms[form]()


@pytest.mark.parametrize(
    "form",
    ["jsonl", "gz", "zst", "upper", "parquet", "datasets dict", "datasets flat", "datasets folder"],
)
def test_all_forms_give_the_same_documents(form, make_source):
    kind = "datasets" if form.startswith("datasets") else "auto"
    found, dropped = read(make_source(form), format=kind)
    assert found == as_tuples(RECORDS)
    assert dropped.total == 0


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_archives_of_several_parts(packed, tmp_path, lines):
    """gzip members and Zstandard frames one after another are one file."""
    parts = [lines(tmp_path / f"{i}.jsonl{packed}", RECORDS[i : i + 1]) for i in range(7)]
    whole = tmp_path / "whole" / f"x.jsonl{packed}"
    whole.parent.mkdir()
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert read(whole)[0] == as_tuples(RECORDS)


def test_zero_bytes_after_an_archive_are_padding(tmp_path, lines):
    file = lines(tmp_path / "x.jsonl.gz", RECORDS)
    file.write_bytes(file.read_bytes() + bytes(512))
    assert read(file)[0] == as_tuples(RECORDS)


def test_archive_larger_than_any_buffer(tmp_path, lines):
    records = [{"text": os.urandom(300_000).hex()} for _ in range(4)]
    found, _ = read(lines(tmp_path / "x.jsonl.zst", records))
    assert [text for _, text, _ in found] == [r["text"] for r in records]


def test_folder_is_read_in_order_of_names(tmp_path, lines):
    lines(tmp_path / "b.jsonl", RECORDS[2:4])
    lines(tmp_path / "a" / "z.jsonl.gz", RECORDS[:2])
    lines(tmp_path / ".hidden" / "x.jsonl", RECORDS)
    lines(tmp_path / ".x.jsonl", RECORDS)
    (tmp_path / "notes.md").write_text("A note.")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found, dropped = read(tmp_path)
    assert found == [*as_tuples(RECORDS[:4]), ("notes.md", "A note.", "")]
    assert dropped.total == 0
    assert read(tmp_path, format="jsonl")[0] == as_tuples(RECORDS[:4])
    assert read(tmp_path, format="text")[0] == [("notes.md", "A note.", "")]


def test_a_folder_that_may_not_be_looked_into_is_not_passed_over(tmp_path, lines, monkeypatch):
    lines(tmp_path / "closed" / "x.jsonl", RECORDS)
    lines(tmp_path / "y.jsonl", RECORDS)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="Permission denied") as caught:
        read(tmp_path)
    assert caught.value.where == str(tmp_path / "closed")


def test_a_link_to_a_folder_is_not_passed_over(tmp_path, lines):
    lines(tmp_path / "in" / "x.jsonl", RECORDS)
    lines(tmp_path / "other" / "y.jsonl", RECORDS)
    (tmp_path / "in" / "more").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match="a link to a folder") as caught:
        read(tmp_path / "in")
    assert caught.value.where == str(tmp_path / "in" / "more")
    assert "a source of its own" in caught.value.fix
    assert read(tmp_path / "in" / "more")[0] == as_tuples(RECORDS)


@pytest.mark.parametrize("pattern", ["", "*.jsonl"])
def test_a_link_that_leads_nowhere_is_not_passed_over(pattern, tmp_path, lines):
    lines(tmp_path / "x.jsonl", RECORDS)
    (tmp_path / "y.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="leads nowhere") as caught:
        read(tmp_path / pattern)
    assert caught.value.where == str(tmp_path / "y.jsonl") and caught.value.fix


def test_links_to_files_are_followed_and_hidden_ones_do_not_matter(tmp_path, lines):
    lines(tmp_path / "other" / "y.jsonl", RECORDS)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").symlink_to(tmp_path / "other" / "y.jsonl")
    (tmp_path / "in" / ".#x.jsonl").symlink_to("user@host.1234")  # an editor's lock
    (tmp_path / "in" / ".cache").symlink_to(tmp_path / "other")
    assert read(tmp_path / "in")[0] == as_tuples(RECORDS)


@pytest.mark.parametrize("kind", ["auto", "datasets"])
def test_a_secret_in_a_url_is_refused_in_any_format(kind):
    source = SourceConfig(path="s3://name:hush@host/folder", format=kind)
    with pytest.raises(ConfigError, match="a secret stands in the URL") as caught:
        list_files(source)
    assert "hush" not in str(caught.value)


def test_text_folder_names_documents_by_path(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.txt").write_bytes(b"\xef\xbb\xbfFirst\r\nline")
    (tmp_path / "two.md").write_text("# Second")
    (tmp_path / "bad.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n")
    found, dropped = read(tmp_path)
    assert found == [("deep/one.txt", "First\r\nline", ""), ("two.md", "# Second", "")]
    assert dropped.places == [("bad.txt", "not UTF-8"), ("blank.txt", "empty text")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*.jsonl", [0, 1]), ("**/*.jsonl", [0, 1, 2]), ("[ab].jsonl", [0, 1]), ("c/?.jsonl", [2])],
)
def test_glob(pattern, expected, tmp_path, lines):
    for name, record in zip(("a.jsonl", "b.jsonl", "c/x.jsonl"), RECORDS, strict=False):
        lines(tmp_path / name, [record])
    found, _ = read(tmp_path / pattern)
    assert found == as_tuples(RECORDS[i] for i in expected)


def test_file_named_like_a_glob_is_that_file(tmp_path, lines):
    assert read(lines(tmp_path / "x[1].jsonl", RECORDS))[0] == as_tuples(RECORDS)


def test_missing_ids_are_file_and_line(tmp_path, lines):
    records = [{"text": "one"}, b"", {"text": "two", "id": None}, {"text": "three", "id": 7}]
    lines(tmp_path / "in" / "x.jsonl", records)
    assert [i for i, _, _ in read(tmp_path)[0]] == ["in/x.jsonl:1", "in/x.jsonl:3", "7"]
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "y.parquet")
    assert [i for i, _, _ in read(tmp_path / "y.parquet")[0]] == ["y.parquet:1", "y.parquet:2"]


def test_other_keys(tmp_path, lines):
    file = lines(tmp_path / "x.jsonl", [{"body": "words", "key": 5, "kind": 3}])
    found, _ = read(file, text_key="body", id_key="key", domain_key="kind")
    assert found == [("5", "words", "3")]


def test_domains_are_kept_and_others_are_not_broken(tmp_path, lines):
    records = [*RECORDS, {"domain": "b"}, {"text": "no domain"}, {"domain": "a"}]
    found, dropped = read(lines(tmp_path / "x.jsonl", records), domains=["a"])
    assert found == as_tuples(RECORDS[::2])
    assert dropped.places == [("x.jsonl:10", "no text under key 'text'")]
    assert [i for i, _, _ in read(tmp_path / "x.jsonl", domains=[""])[0]] == ["x.jsonl:9"]


def test_max_bytes_counts_utf8_and_never_cuts(tmp_path, lines):
    file = lines(tmp_path / "x.jsonl", [{"text": "神" * 10}, {"text": "x" * 10}, {"text": "y"}])
    for limit, expected in ((29, 0), (30, 1), (39, 1), (40, 2), (41, 3), (1000, 3)):
        assert len(read(file, max_bytes=limit)[0]) == expected


def test_byte_order_mark_is_no_part_of_the_first_record(tmp_path, lines):
    plain = lines(tmp_path / "x.jsonl", RECORDS).read_bytes()
    (tmp_path / "y.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"))
    found, dropped = read(tmp_path / "y.jsonl")
    assert (found, dropped.total) == (as_tuples(RECORDS), 0)


BROKEN = [
    (b'{"text": "cut', "not JSON"),
    (b"nonsense", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"9" * 5000, "not JSON"),
    ('{"text": "café"}'.encode("latin-1"), "not UTF-8"),
    ('{"text": "x"}'.encode("utf-16"), "not UTF-8"),
    (rb'{"text": "half \ud83d pair"}', "not Unicode text: lone surrogates"),
    (rb'{"text": "fine", "id": "\udc00"}', "not Unicode text: lone surrogates"),
    (rb'{"text": "fine", "domain": "\udc00"}', "not Unicode text: lone surrogates"),
    (b'["text"]', "not a JSON object"),
    (b'{"body": "x"}', "no text under key 'text'"),
    (b'{"text": 5}', "no text under key 'text'"),
    (b'{"text": null}', "no text under key 'text'"),
    (b'{"text": " \\n\\t"}', "empty text"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_broken_line_is_listed_and_the_rest_goes_on(line, reason, tmp_path, lines):
    found, dropped = read(lines(tmp_path / "x.jsonl", [RECORDS[0], line, RECORDS[1]]))
    assert [text for _, text, _ in found] == [RECORDS[0]["text"], RECORDS[1]["text"]]
    assert dropped.places == [("x.jsonl:2", reason)]
    assert dropped.examples == [f"x.jsonl:2: {reason}"]


def test_parquet_with_false_text_and_nulls(tmp_path):
    """Columns called text may hold other bytes: Parquet does not check."""
    raw = pa.array([b"one", b"caf\xe9", None, b"four"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet")
    found, dropped = read(tmp_path / "x.parquet")
    assert [t for _, t, _ in found] == ["one", "four"]
    assert dropped.places == [
        ("x.parquet:2", "not UTF-8"),
        ("x.parquet:3", "no text under key 'text'"),
    ]


def test_parquet_without_the_column_names_those_there(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": ["1"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column 'text'; there are body, id"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", ["gone.jsonl", "gone", "*.jsonl", "gone/*.jsonl", "empty"])
def test_nothing_there(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no documents there") as caught:
        read(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["x.xml", "x.xml.gz", "README"])
def test_unknown_format(name, tmp_path):
    (tmp_path / name).write_text("a,b\n")
    with pytest.raises(DataError, match="unknown format") as caught:
        read(tmp_path / name)
    assert name in str(caught.value.where)
    assert "format: jsonl" in str(caught.value.fix)


def test_given_format_overrules_the_name(tmp_path, lines):
    assert read(lines(tmp_path / "x.data", RECORDS), format="jsonl")[0] == as_tuples(RECORDS)


def test_name_that_is_not_utf8_is_refused(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("text")
    with pytest.raises(DataError, match=r"not UTF-8: 'caf\\udce9.txt'"):
        read(tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_cut_archive_is_an_error_not_an_early_end(packed, share, tmp_path, lines):
    records = [{"text": os.urandom(2000).hex()} for _ in range(300)]
    file = lines(tmp_path / f"x.jsonl{packed}", records)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(DataError, match="cannot be read: damaged or cut short") as caught:
        read(file)
    assert caught.value.where == str(file)


@pytest.mark.parametrize("lost", [1, 9, 40])
@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_archive_of_which_the_last_part_is_cut(packed, lost, tmp_path, lines):
    part = lines(tmp_path / f"x.jsonl{packed}", RECORDS).read_bytes()
    (tmp_path / f"x.jsonl{packed}").write_bytes((part + part)[:-lost])
    with pytest.raises(DataError, match="cannot be read: damaged or cut short"):
        read(tmp_path / f"x.jsonl{packed}")


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_file_that_may_not_be_opened(packed, tmp_path, lines, monkeypatch):
    """Its archive is not called damaged."""
    file = lines(tmp_path / f"x.jsonl{packed}", RECORDS)

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot be read: \[Errno 13\] Permission denied"):
        read(file)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.jsonl.gz", gzip.compress),
        ("x.txt.gz", gzip.compress),
        ("x.jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress),
    ],
)
def test_flipped_byte_in_an_archive(name, pack, tmp_path):
    data = bytearray(pack(b'{"text": "some words"}\n' * 1000))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match="cannot be read") as caught:
        read(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_file_that_is_not_what_its_name_says(name, tmp_path):
    (tmp_path / name).write_text('{"text": "plain"}\n')
    with pytest.raises(DataError, match="cannot be read") as caught:
        read(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize("settings", [{"path": "gone"}, {"split": "test"}])
def test_datasets_that_cannot_be_loaded(settings, tmp_path, make_source):
    path = settings.pop("path", None) or make_source("datasets dict")
    with pytest.raises(DataError, match="datasets cannot load it") as caught:
        read(path, format="datasets", **settings)
    assert caught.value.where == str(path) and caught.value.fix


def test_an_absent_split_names_those_there(make_source):
    path = make_source("datasets dict")
    with pytest.raises(DataError, match="no split 'test'") as caught:
        read(path, format="datasets", split="test")
    assert (caught.value.where, caught.value.fix) == (str(path), "set split: train")


def test_an_absent_file_has_a_remedy(tmp_path):
    with pytest.raises(DataError, match="no such file") as caught:
        stat(tmp_path / "gone")
    assert caught.value.where == str(tmp_path / "gone") and "check the path" in caught.value.fix


def test_samples_stand_for_the_shipped_corpus():
    source = SourceConfig(path="{samples}/domain_validation.jsonl.gz")
    assert [file.name for file in list_files(source)] == ["domain_validation.jsonl.gz"]
    assert resolve_path("x/{samples}") == "x/{samples}"
