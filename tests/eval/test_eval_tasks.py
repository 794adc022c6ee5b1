"""Task files: every fault is named by file and line; contamination and calibration by hand."""

import gzip
import json

import numpy as np
import pytest
import zstandard

from shoal.configs.errors import ConfigError, DataError
from shoal.configs.study import TasksConfig
from shoal.eval.calibration import calibrate
from shoal.eval.contamination import find_overlap
from shoal.eval.tasks.catalogue import load_tasks
from shoal.eval.tasks.items import read_items
from shoal.eval.tasks.multiple_choice import MultipleChoiceTask
from shoal.eval.tasks.perplexity import PerplexityTask


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        PerplexityTask("t", str(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="samples"):
        PerplexityTask("t", "{samples}/there-is-no-such-file.jsonl")


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b"{broken", "not a line of JSON"),
        (b"\xff\xfe", "not a line of JSON"),
        (b'["a"]', "expected an object"),
        (b'{"body": "x"}', "'text' is missing; there are body"),
        (b'{"text": 3}', "'text' holds int"),
        (b'{"text": ""}', "'text' is empty"),
    ],
)
def test_broken_line_is_named(tmp_path, line, cause):
    file = tmp_path / "documents.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        PerplexityTask("t", str(file))
    assert caught.value.where == f"{file}:3"
    assert cause in caught.value.cause


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, "at least two"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "twice"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "none of the 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "none of the 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "holds bool"),
    ],
)
def test_broken_question_is_named(tmp_path, record, cause):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=cause) as caught:
        MultipleChoiceTask("t", str(file))
    assert caught.value.where == f"{file}:1"


def test_empty_and_torn_files_are_named(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="holds no items"):
        read_items(empty, {"text": str})
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read_items(torn, {"text": str})
    corrupt = tmp_path / "corrupt.jsonl.gz"
    packed = bytearray(gzip.compress(np.random.default_rng(0).bytes(400).hex().encode()))
    packed[20:40] = b"\xff" * 20
    corrupt.write_bytes(packed)
    with pytest.raises(DataError, match=r"cannot be read.*corrupt|corrupt.*cannot be read"):
        read_items(corrupt, {"text": str})
    torn = tmp_path / "torn.jsonl.zst"
    torn.write_bytes(b"not zstandard")
    with pytest.raises(DataError, match="cannot be read"):
        read_items(torn, {"text": str})


def test_compressed_files_read_alike(tmp_path):
    lines = b"".join(json.dumps({"text": f"t{i}"}).encode() + b"\n" for i in range(5))
    for name, data in {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.ZstdCompressor().compress(lines),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert [r["text"] for _, r in read_items(tmp_path / name, {"text": str}, 3)] == [
            "t0", "t1", "t2",
        ]  # fmt: skip


def test_catalogue_refuses_nothing_and_doubles(task_files):
    with pytest.raises(ConfigError, match="nothing to score"):
        load_tasks(TasksConfig())
    documents = str(task_files["documents"])
    with pytest.raises(ConfigError, match="two tasks are called 'a'"):
        load_tasks(
            TasksConfig(
                perplexity={"a": documents}, multiple_choice={"a": str(task_files["questions"])}
            )
        )
    tasks = load_tasks(
        TasksConfig(
            perplexity={"a": documents},
            brainbench=(str(task_files["brainbench"]),) * 2,
            multiple_choice={"b": str(task_files["questions"])},
            max_items=5,
        )
    )
    assert [task.name for task in tasks] == ["a", "brainbench", "b"]
    assert [len(task.item_ids()) for task in tasks] == [5, 5, 5]


WORDS = [f"word{i}" for i in range(400)]


def text(start, count):
    return " ".join(WORDS[start : start + count])


def test_overlap_counts_shared_runs_of_thirteen_words():
    items = [text(0, 20), text(100, 20), text(200, 12), "Mixed: " + text(300, 13).upper() + "."]
    training = [
        text(150, 40),
        "other " + text(5, 13) + " other",  # one of the first item's eight 13-grams
        text(100, 12) + " broken " + text(112, 8),  # twelve in a row are not enough
        text(195, 40),  # the third item is too short to match
        text(300, 13),  # case and punctuation do not hide a copy
    ]
    found = find_overlap(items, iter(training))
    assert found.documents == 5
    assert found.shares == pytest.approx([1 / 8, 0.0, 0.0, 0.5])
    assert found.contaminated == [0, 3]


def test_overlap_ignores_what_every_document_says():
    licence = text(0, 30)
    assert find_overlap([licence], [licence] * 10).contaminated == [0]
    assert find_overlap([licence], [licence] * 11).contaminated == []


def test_overlap_equals_plain_search():
    rng = np.random.default_rng(0)
    items = [" ".join(rng.choice(["a", "b"], 40)) for _ in range(20)]
    training = [" ".join(rng.choice(["a", "b", "c"], 400, p=[0.45, 0.45, 0.1])) for _ in range(10)]
    grams = {}
    for document in training:
        words = document.split()
        for gram in {tuple(words[i : i + 13]) for i in range(len(words) - 12)}:
            grams[gram] = grams.get(gram, 0) + 1
    expected = []
    for item in items:
        words = item.split()
        mine = [tuple(words[i : i + 13]) for i in range(len(words) - 12)]
        expected.append(sum(0 < grams.get(gram, 0) <= 10 for gram in mine) / len(mine))
    assert sum(expected) > 0
    assert find_overlap(items, training).shares == pytest.approx(expected)


def test_calibration_bins_by_rank():
    confidence = [float(i) for i in range(100)]
    correct = [float(i >= 50) for i in range(100)]
    found = calibrate(correct, confidence)
    assert [b["n"] for b in found["bins"]] == [10] * 10
    assert [b["accuracy"] for b in found["bins"]] == [0.0] * 5 + [1.0] * 5
    assert found["bins"][0]["confidence"] == pytest.approx(4.5)
    assert found["slope"] > 1
    assert calibrate([1.0, 0.0], [0.1, 0.2])["slope"] is None


def test_archive_cut_at_the_end_of_a_line_is_no_shorter_test_set(tmp_path):
    packer = zstandard.ZstdCompressor().compressobj()
    whole_lines = packer.compress(b'{"text": "a"}\n' * 3)
    whole_lines += packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)  # the frame is not ended
    file = tmp_path / "cut.jsonl.zst"
    file.write_bytes(whole_lines)
    with pytest.raises(DataError, match="cut short"):
        read_items(file, {"text": str})
