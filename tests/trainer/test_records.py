"""The ledger and the metrics as files: torn lines, broken lines, sums."""

import json

import pytest

from shoal.configs.errors import DataError
from shoal.configs.schema import DataConfig, ModelConfig, RunConfig, Stream, TrainConfig
from shoal.trainer.booking import Booking
from shoal.trainer.ledger import LedgerEntry, append_entry, now, read_ledger
from shoal.trainer.metrics import Metrics, read_metrics
from shoal.trainer.segment import RunFacts


def make_entry(stage="a", **more):
    values = {"kind": "train", "stage": stage, "started": now(), "seconds": 2.0} | more
    return LedgerEntry(**values)


def test_entries_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "ledger.jsonl"
    assert read_ledger(path) == []
    entries = [make_entry("a", devices=2, tokens=7, flops=1e20), make_entry("b", scope="generic")]
    for entry in entries:
        append_entry(path, entry)
    assert read_ledger(path) == entries
    assert [json.loads(line)["device_seconds"] for line in path.read_text().splitlines()] == [4, 2]


@pytest.mark.parametrize("left", [1, 20, -3])
def test_a_torn_last_line_is_dropped_and_stays_harmless(tmp_path, left):
    path = tmp_path / "ledger.jsonl"
    for stage in "abc":
        append_entry(path, make_entry(stage))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:left])
    assert [entry.stage for entry in read_ledger(path)] == ["a", "b"]
    append_entry(path, make_entry("d"))  # the next start goes on
    append_entry(path, make_entry("e"))
    assert [entry.stage for entry in read_ledger(path)] == ["a", "b", "d", "e"]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append_entry(path, make_entry("a"))
    path.write_text(path.read_text().rstrip("\n"))
    append_entry(path, make_entry("b"))
    assert [entry.stage for entry in read_ledger(path)] == ["a", "b"]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"kind": "train"}', '{"kind": "party"}', "x"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, bad):
    path = tmp_path / "ledger.jsonl"
    append_entry(path, make_entry("a"))
    with path.open("a") as file:
        file.write(bad + "\n")
    append_entry(path, make_entry("b"))
    with pytest.raises(DataError, match="line 2 is not a ledger entry") as error:
        read_ledger(path)
    assert error.value.where == str(path)


def test_shares_are_exact_and_work_done_again_is_cost(tmp_path):
    """Steps 2 to 4 are done twice, as after a kill between booking and publishing."""
    config = RunConfig(
        data=DataConfig(train=(Stream(path="a"), Stream(path="b", name="b"))),
        model=ModelConfig(context=16),
        train=TrainConfig(tokens=6 * 4 * 16, batch_rows=4),
    )
    facts = RunFacts(tmp_path, 0, 1, "cpu", 1.0, streams=("a", "b"),
                     count_rows=lambda batches: {"a": 3 * batches, "b": batches})  # fmt: skip
    for first, cuts in ((0, (2, 4)), (2, (6,))):
        booking = Booking(config, facts, first)
        for cut in cuts:
            for _ in range(booking.step, cut):
                booking.count(50, [(9.0, 40.0), (9.0, 10.0)])
            booking.book(cut)
    entries = read_ledger(tmp_path / "ledger.jsonl")
    assert [entry.streams for entry in entries] == [
        {"a": 80, "b": 20}, {"a": 80, "b": 20}, {"a": 160, "b": 40},
    ]  # fmt: skip
    assert [entry.streams_total["a"] for entry in entries] == [6, 12, 18]
    assert entries[-1].streams_total == {"a": 18, "b": 6}, "of six steps, not of eight"
    alone = Booking(config, RunFacts(tmp_path, 0, 1, "cpu", 1.0, streams=("a",)), 6)
    alone.count(50, ())
    alone.book(7)
    assert read_ledger(tmp_path / "ledger.jsonl")[-1].streams == {"a": 50}


def write_steps(folder, start, stop, steps=9):
    metrics = Metrics(folder, name="run", steps=steps, start=start, active=True)
    for step in range(start + 1, stop + 1):
        metrics.write("train", step, loss=1.0 / step, tokens_per_second=1.0)
        if step % 2 == 0:
            metrics.write("validation", step, loss=0.5, bits_per_byte=0.25)
    metrics.close()


def summary(folder):
    return [(r["kind"][0], r["step"]) for r in read_metrics(folder / "metrics.jsonl")]


def test_a_resumed_run_forgets_what_it_does_again(tmp_path):
    write_steps(tmp_path, 0, 5)
    write_steps(tmp_path, 2, 4)
    want = [("t", 1), ("t", 2), ("v", 2), ("t", 3), ("t", 4), ("v", 4)]
    assert summary(tmp_path) == want
    assert not list(tmp_path.glob("*.partial"))


def test_torn_metrics_lose_their_last_line_alone(tmp_path):
    write_steps(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert summary(tmp_path) == [("t", 1), ("t", 2), ("v", 2)]
    write_steps(tmp_path, 2, 3)
    assert summary(tmp_path) == [("t", 1), ("t", 2), ("v", 2), ("t", 3)]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_a_broken_line_of_the_metrics_is_named(tmp_path):
    write_steps(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]))
    with pytest.raises(DataError, match="line 2 is not a record") as error:
        read_metrics(path)
    assert error.value.where == str(path)


def test_ranks_other_than_0_write_nothing(tmp_path, capsys):
    metrics = Metrics(tmp_path, name="run", steps=3, start=0, active=False)
    metrics.write("train", 1, loss=1.0, tokens_per_second=1.0)
    metrics.say("x")
    metrics.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    write_steps(tmp_path, 0, 3, steps=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run step 1/3: loss 1.000") and "tok/s" in lines[0]
    assert any("step 2/3: validation loss 0.5000, 0.2500 bits per byte" in line for line in lines)
    assert lines[-1].startswith("run step 3/3")  # the last step is always shown
