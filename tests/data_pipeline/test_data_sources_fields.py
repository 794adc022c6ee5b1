"""Fields of records: CSV and TSV, several fields as one text, and labels."""

from __future__ import annotations

import csv
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.configs.corpus import SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline import formats
from shoal.data_pipeline.documents import DroppedLog
from shoal.data_pipeline.sources import read_documents


def read(path, **settings):
    dropped = DroppedLog()
    source = SourceConfig(path=str(path), **settings)
    return [(d.id, d.text, d.domain) for d in read_documents(source, dropped)], dropped.places


def write(file, data):
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


@pytest.mark.parametrize("dialect", ["excel", "excel-tab", "unix"])
def test_what_the_csv_module_writes_is_read_back(dialect, tmp_path):
    chooser = random.Random(0)
    texts = [
        "".join(chooser.choices("ab ,\t\"\n'é神", k=chooser.randint(1, 40))) for _ in range(300)
    ]
    rows = [(f"d{i}", "bio", text) for i, text in enumerate(texts)]
    name = "x.tsv" if dialect == "excel-tab" else "x.csv"
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, dialect).writerows([("id", "domain", "text"), *rows])
    found, dropped = read(tmp_path / name)
    assert found == [(i, text, domain) for i, domain, text in rows if text.strip()]
    assert {reason for _, reason in dropped} <= {"empty text"}


def test_places_are_lines_whatever_lies_between(tmp_path):
    data = 'text,n\n"two\n\nlines",1\none,2\n\ntoo,many,fields\nfew\n"closed" badly,3\nlast,4\n'
    found, dropped = read(write(tmp_path / "x.csv", data))
    assert found == [
        ("x.csv:2", "two\n\nlines", ""),
        ("x.csv:5", "one", ""),
        ("x.csv:10", "last", ""),
    ]
    assert dropped == [
        ("x.csv:7", "3 fields, 2 in the header"),
        ("x.csv:8", "1 fields, 2 in the header"),
        ("x.csv:9", "not CSV"),
    ]


def test_bytes_that_are_no_text_spoil_their_row_alone(tmp_path):
    data = b'\xef\xbb\xbftext,n\r\none,1\r\ncaf\xe9,2\r\n"x\r\n\xff",3\r\nfour,4\r\n'
    found, dropped = read(write(tmp_path / "x.csv", data))
    assert [text for _, text, _ in found] == ["one", "four"]
    assert dropped == [("x.csv:3", "not UTF-8"), ("x.csv:4", "not UTF-8")]


def test_a_field_of_megabytes(tmp_path):
    text = "long, " * 500_000
    found, _ = read(write(tmp_path / "x.csv", f'id,text\n1,"{text}"\n'))
    assert found == [("1", text, "")]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('one,1\n"open,2\n' + "lost,3\n" * 100, 3),
        ('one,1\n"two\n""lines""\n","open\nlost,3\n', 5),  # not where its row begins
        ('one,1\n"open ""\n""\n', 3),
        ('one,1\n5" wide,"', 3),
        ('one,1\n"two\nlines",1\n"caf\xe9', 5),
    ],
)
def test_a_quote_that_is_never_closed_is_an_error_that_names_its_line(rows, line, tmp_path):
    write(tmp_path / "x.csv", b"text,n\n" + rows.encode("latin-1"))
    with pytest.raises(DataError, match=f"opens in line {line} is never closed") as caught:
        read(tmp_path / "x.csv")
    assert caught.value.where == f"{tmp_path / 'x.csv'}:{line}"
    assert caught.value.fix


def test_every_line_that_a_stray_quote_swallows_is_dropped(tmp_path, monkeypatch):
    data = "text,n\none,1\n" + '"open,2\nlost,3\nlost,4\n"good",5\n' + "last,6\n"
    found, dropped = read(write(tmp_path / "x.csv", data))
    assert [text for _, text, _ in found] == ["one", "last"]
    assert dropped == [(f"x.csv:{line}", "not CSV") for line in (3, 4, 5, 6)]
    monkeypatch.setattr(formats, "MAX_FIELD", 50)
    write(tmp_path / "x.csv", "text,n\none,1\n" + '"open,2\n' + "lost,3\n" * 6 + "good,4\n" * 9)
    found, dropped = read(tmp_path / "x.csv")
    assert [text for _, text, _ in found[:2]] == ["one", "good"], "given up after 50 characters"
    assert dropped == [(f"x.csv:{line}", "not CSV") for line in range(3, 3 + len(dropped))]
    assert len(found) + len(dropped) == 17


def test_empty_ids_and_domains_are_missing(tmp_path):
    data = "id,text,domain\n,one,\nb,two,bio\n"
    found, _ = read(write(tmp_path / "x.csv", data))
    assert found == [("x.csv:2", "one", ""), ("b", "two", "bio")]


@pytest.mark.parametrize("name", ["x.csv.gz", "x.tsv.zst", "x.CSV"])
def test_packed_tables(name, tmp_path, lines):
    separator = b"\t" if "tsv" in name else b","
    lines(tmp_path / name, [separator.join([b"id", b"text"]), separator.join([b"1", b"one"])])
    assert read(tmp_path / name) == ([("1", "one", "")], [])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "names no columns"),
        ("\ntext\n", "names no columns"),
        ("text;n\none;1\n", "no column 'text'; there are text;n"),
        ("body,n\none,1\n", "no column 'text'; there are body, n"),
        ("text,text\none,1\n", "several columns are called 'text'"),
        ("text,id,id\none,1,2\n", "several columns are called 'id'"),
    ],
)
def test_tables_that_cannot_be_understood(data, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path / "x.csv", data))
    assert caught.value.where == str(tmp_path / "x.csv")


KEYS = ("title", "text")


def test_several_fields_are_one_text(tmp_path, lines):
    records = [
        {"title": "Title", "text": "Body"},
        {"text": "alone"},
        {"title": "  ", "text": "blank title"},
        {"title": None, "text": None},
        {"title": "", "text": ""},
        {"title": 5, "text": "x"},
    ]
    found, dropped = read(lines(tmp_path / "x.jsonl", records), text_key=KEYS)
    assert [text for _, text, _ in found] == ["Title\nBody", "alone", "blank title"]
    assert dropped == [
        ("x.jsonl:4", "no text under key 'title', 'text'"),
        ("x.jsonl:5", "empty text"),
        ("x.jsonl:6", "no text under key 'title'"),
    ]
    pq.write_table(pa.Table.from_pylist(records[:5]), tmp_path / "x.parquet")
    assert [text for _, text, _ in read(tmp_path / "x.parquet", text_key=KEYS)[0]] == [
        text for _, text, _ in found
    ]
    write(tmp_path / "x.csv", "text,title\nBody,Title\nalone,\n")
    assert [text for _, text, _ in read(tmp_path / "x.csv", text_key=KEYS)[0]] == [
        "Title\nBody",
        "alone",
    ]
    write(tmp_path / "x.txt", "whole")
    assert read(tmp_path / "x.txt", text_key=KEYS)[0] == [("x.txt", "whole", "")]


def test_a_table_without_one_of_several_columns(tmp_path):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no column 'title'; there are text"):
        read(tmp_path / "x.parquet", text_key=KEYS)


def test_one_label_for_a_source(tmp_path, lines):
    file = lines(tmp_path / "x.jsonl", [{"text": "a", "domain": "bio"}, {"text": "b"}])
    assert [label for _, _, label in read(file, domain="all")[0]] == ["all", "all"]
    found, _ = read(file, domain="all", domains=("bio",))
    assert found == [("x.jsonl:1", "a", "all")]
    assert read(file, domain="\udc00")[1] == [
        (f"x.jsonl:{i}", "not Unicode text: lone surrogates") for i in (1, 2)
    ]


def test_ids_that_repeat_stay_as_they_were_given(tmp_path, lines):
    file = lines(tmp_path / "x.jsonl", [{"text": t, "id": "same"} for t in "ab"] + [{"text": "c"}])
    assert [i for i, _, _ in read(file)[0]] == ["same", "same", "x.jsonl:3"]
