"""Reading ahead: results and errors come at their step, and nothing is left running."""

from __future__ import annotations

import threading
import time

import pytest

from shoal.data_pipeline.ahead import ReadAhead, ReadingStopped


def wait_until(is_so):
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_steps_are_begun_before_they_are_asked_for_and_no_more_than_told():
    begun = []
    ahead = ReadAhead(lambda step, tick: begun.append(step) or step * step, 2)
    assert ahead.get(5) == 25
    wait_until(lambda: begun == [5, 6, 7])
    assert ahead.get(6) == 36 and ahead.get(7) == 49
    wait_until(lambda: begun == [5, 6, 7, 8, 9])
    ahead.close()
    assert begun == [5, 6, 7, 8, 9]


def test_another_step_than_the_next_is_read_as_well():
    begun = []
    ahead = ReadAhead(lambda step, tick: begun.append(step) or step, 1)
    for step in (0, 1, 10, 11, 3, 3, 4):
        assert ahead.get(step) == step
    ahead.close()


def test_an_error_is_raised_at_its_step_and_at_no_other():
    def read(step, tick):
        if step == 3:
            raise ValueError("shard 3")
        return step

    ahead = ReadAhead(read, 2)
    assert [ahead.get(step) for step in (1, 2)] == [1, 2]
    with pytest.raises(ValueError, match="shard 3"):
        ahead.get(3)
    assert ahead.get(4) == 4
    with pytest.raises(ValueError, match="shard 3"):
        ahead.get(3)
    ahead.close()


def test_closing_ends_the_thread_and_does_not_wait_for_one_that_hangs(monkeypatch):
    before = threading.active_count()
    ahead = ReadAhead(lambda step, tick: step, 2)
    ahead.get(0)
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        ahead.get(1)
    monkeypatch.setattr("shoal.data_pipeline.ahead.CLOSE_SECONDS", 0.05)
    over = threading.Event()
    hanging = ReadAhead(lambda step, tick: step and over.wait(20), 1)
    hanging.get(0)
    begun = time.monotonic()
    hanging.close()
    assert time.monotonic() - begun < 5
    over.set()


def test_nothing_is_read_beyond_the_end_unless_it_is_asked_for():
    begun = []
    ahead = ReadAhead(lambda step, tick: begun.append(step) or step, 3, end=7)
    for step in (4, 5, 6):
        assert ahead.get(step) == step
    assert ahead.get(9) == 9  # batches that were left out lead beyond it
    ahead.close()
    assert begun == [4, 5, 6, 9]


def test_closing_ends_a_reading_between_two_shards():
    ended = []

    def read(step, tick):
        try:
            while step:
                tick()
                time.sleep(0.002)
        except ReadingStopped:
            ended.append(step)
            raise
        return step

    ahead = ReadAhead(read, 1)
    ahead.get(0)
    ahead.close()
    assert ended == [1]
    assert not any(thread.name == "shoal-ahead" for thread in threading.enumerate())
