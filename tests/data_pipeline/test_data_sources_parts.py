"""Parts: read one after the other they are the source, however it is cut."""

from __future__ import annotations

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shoal.configs.corpus import SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline import parts
from shoal.data_pipeline.documents import DroppedLog
from shoal.data_pipeline.parts import PART_BYTES, list_parts, read_part
from shoal.data_pipeline.sources import read_documents

LINES = (
    b'{"text": "one"}',
    b'{"text": "two lines\\nin one", "id": "given"}',
    '{"text": "神経 naïve", "domain": "bio"}'.encode(),
    b"",
    b"  ",
    b"not JSON",
    b"\xff\xfe",
    b'{"text": ""}',
    b'{"text": "' + b"long " * 50 + b'"}',
)


def whole(source):
    dropped = DroppedLog()
    return list(read_documents(source, dropped)), dropped


def by_parts(source, part_bytes=PART_BYTES):
    """Documents and drops of all parts, each sent as to a worker, and the parts."""
    dropped = DroppedLog()
    found = []
    cut = list_parts(source, 7, part_bytes)
    for place, part in enumerate(cut):
        assert (part.source, part.number) == (7, place)
        found += read_part(source, pickle.loads(pickle.dumps(part)), dropped)
    return found, dropped, cut


@given(
    st.lists(st.sampled_from(LINES), max_size=30),
    st.integers(1, 200),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
)
@example([b'{"text": "x"}'] * 3, 14, b"\n", True, False)  # a part ends exactly with a line
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_cut_of_a_file_reads_the_same(tmp_path, lines, part_bytes, end, closed, mark):
    data = b"\xef\xbb\xbf" * mark + end.join(lines) + end * closed
    (tmp_path / "x.jsonl").write_bytes(data)
    source = SourceConfig(path=str(tmp_path / "x.jsonl"))
    documents, dropped = whole(source)
    found, dropped_too, cut = by_parts(source, part_bytes)
    assert found == documents
    assert dropped_too == dropped
    assert sum(part.bytes for part in cut) == len(data)
    longest = max((len(line) for line in data.split(b"\n")), default=0) + 1
    assert all(part.bytes <= part_bytes + longest for part in cut)
    assert len(cut) >= len(data) // (part_bytes + longest)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 3000))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_cut_of_a_parquet_file_reads_the_same(tmp_path, groups, part_bytes):
    rows = [{"text": f"row {i}" if i % 4 else None} for i in range(sum(groups))]
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "x.parquet", schema) as writer:
        first = 0
        for count in groups:
            writer.write_table(pa.Table.from_pylist(rows[first : first + count], schema))
            first += count
    source = SourceConfig(path=str(tmp_path / "x.parquet"))
    documents, dropped = whole(source)
    found, dropped_too, cut = by_parts(source, part_bytes)
    assert (found, dropped_too) == (documents, dropped)
    if part_bytes == 1:
        assert len(cut) == len(groups)


def test_a_parquet_file_is_cut_between_row_groups(tmp_path):
    table = pa.table({"text": [f"row {i}" * 9 for i in range(60)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=10)
    source = SourceConfig(path=str(tmp_path / "x.parquet"))
    _, _, cut = by_parts(source, 1)
    assert [(p.stretches[0].first, p.stretches[0].first_line) for p in cut] == [
        (i, 10 * i + 1) for i in range(6)
    ]


def test_small_files_share_a_part_and_large_ones_are_cut(tmp_path, lines, records, monkeypatch):
    for number in range(20):
        lines(tmp_path / "a" / f"{number:02d}.jsonl", records(3, number))
    lines(tmp_path / "b.jsonl", records(200))
    lines(tmp_path / "c.jsonl.gz", records(400, 1))
    (tmp_path / "d.csv").write_text("text\n" + "some words\n" * 1000)
    (tmp_path / "e.txt").write_text("plain " * 1000)
    source = SourceConfig(path=str(tmp_path))
    documents, dropped = whole(source)
    found, dropped_too, cut = by_parts(source, 4000)
    assert (found, dropped_too) == (documents, dropped)
    names = [{stretch.file.name for stretch in part.stretches} for part in cut]
    assert 1 < len([n for n in names if min(n) < "b"]) < 10
    assert len([n for n in names if "b.jsonl" in n]) > 5
    assert all(len([n for n in names if name in n]) == 1 for name in ("c.jsonl.gz", "d.csv"))
    assert len(by_parts(source)[2]) == 1
    monkeypatch.setattr(parts, "_MAX_FILES", 5)
    found, _, cut = by_parts(source)
    assert found == documents and [len(part.stretches) for part in cut] == [5, 5, 5, 5, 4]


def test_every_file_is_counted(tmp_path, lines):
    lines(tmp_path / "a.jsonl", [{"text": "x", "domain": "bio"}, b"{}", {"text": "y"}])
    lines(tmp_path / "b.jsonl", [{"text": "x", "domain": "law"}])
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("x")
    _, dropped = whole(SourceConfig(path=str(tmp_path)))
    assert dropped.taken == {"a.jsonl": 2, "b.jsonl": 1, "": 3}
    assert (dropped.total, dropped.unwanted) == (1, 0)
    _, dropped = whole(SourceConfig(path=str(tmp_path), domains=("law",)))
    assert dropped.taken == {"b.jsonl": 1}
    assert (dropped.total, dropped.unwanted) == (0, 6)


def test_what_must_be_read_in_one_go_is_one_part(tmp_path, lines, records):
    for name in "ab":
        lines(tmp_path / f"{name}.jsonl", records(50))
    source = SourceConfig(path=str(tmp_path), max_bytes=9000)
    found, _, cut = by_parts(source, 100)
    assert len(cut) == 1 and len(cut[0].stretches) == 2
    assert found == whole(source)[0]
    assert 50 < len(found) < 100
    found, _, cut = by_parts(SourceConfig(path=str(tmp_path), format="datasets"), 100)
    assert [document.text for document in found] == [r["text"] for r in records(50)] * 2
    assert len(cut) == 1 and cut[0].bytes == sum(f.stat().st_size for f in tmp_path.iterdir())


def test_a_file_cut_short_since_it_was_listed(tmp_path, lines, records):
    file = lines(tmp_path / "x.jsonl", records(100))
    source = SourceConfig(path=str(file))
    cut = list_parts(source, 0, 2000)
    data = file.read_bytes()
    file.write_bytes(data[: data.index(b"\n", len(data) - 3000) + 1])
    with pytest.raises(DataError, match="shorter than it was") as caught:
        list(read_part(source, cut[-1], DroppedLog()))
    assert caught.value.where == str(file)


def test_lines_longer_than_a_block_and_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_BLOCK_BYTES", 64)
    texts = ["x" * 1000, "y", "z" * 700, "w"]
    data = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "x.jsonl").write_text(data)
    source = SourceConfig(path=str(tmp_path / "x.jsonl"))
    found, _, cut = by_parts(source, 100)
    assert [document.text for document in found] == texts
    assert [document.id for document in found] == [f"x.jsonl:{i}" for i in (1, 2, 3, 4)]
    assert len(cut) == 3, "the last one of y and z, whose line it ends in"


def test_a_file_that_changes_while_it_is_read(tmp_path, lines, records):
    file = lines(tmp_path / "x.jsonl", records(100))
    found = read_documents(SourceConfig(path=str(file)), DroppedLog())
    next(found)
    with file.open("ab") as more:
        more.write(b'{"text": "late"}\n')
    with pytest.raises(DataError, match="was changed while the corpus was read") as caught:
        list(found)
    assert caught.value.where == str(file)
