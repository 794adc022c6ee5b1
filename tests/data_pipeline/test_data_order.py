"""The order of rows: exact epochs of any size, even partitions, the same cost at any position."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data_pipeline.order import PARTITIONS, RowOrder


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 2000),
    seed=st.integers(0, 2**31),
    block_rows=st.one_of(st.none(), st.integers(1, 40)),
    epoch=st.integers(0, 10**6),
)
def test_an_epoch_holds_every_row_once(size, seed, block_rows, epoch):
    order = RowOrder(size, (seed, 0), block_rows)
    rows, partitions = order.locate(np.arange(epoch * size, (epoch + 1) * size))
    assert np.array_equal(np.sort(rows), np.arange(size))
    edges = order.first_rows
    assert len(edges) == PARTITIONS + 1 and edges[-1] == size
    assert np.all((edges[partitions] <= rows) & (rows < edges[partitions + 1]))
    assert np.diff(edges).max() - np.diff(edges).min() <= 1


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 2**50),
    block_rows=st.one_of(st.none(), st.integers(1, 2**30)),
    data=st.data(),
)
def test_a_row_depends_on_its_position_alone(size, block_rows, data):
    order = RowOrder(size, (1, 2), block_rows)
    positions = data.draw(st.lists(st.integers(0, 2 * size - 1), min_size=1, max_size=12))
    rows, _ = order.locate(np.asarray(positions))
    assert rows.tolist() == [int(order.locate(np.asarray([p]))[0][0]) for p in positions]
    assert rows.min() >= 0 and rows.max() < size


@pytest.mark.parametrize("stretches", [1, 2, 4, 8, 16, 32, 64])
def test_any_batch_takes_equally_from_every_stretch_of_partitions(stretches):
    """So that ranks that cut a sorted batch evenly read partitions of their own."""
    _, partitions = RowOrder(64 * 50, (0, 0)).locate(np.arange(64 * 50))
    for first in range(0, 64 * 50 - stretches, 7):
        parts = partitions[first : first + stretches] // (PARTITIONS // stretches)
        assert np.array_equal(np.sort(parts), np.arange(stretches))


def test_rows_are_shuffled_anew_in_every_epoch_and_partition():
    size = 64 * 200
    epochs = RowOrder(size, (0, 0)).locate(np.arange(2 * size))[0].reshape(2, size)
    assert np.mean(epochs[0] == epochs[1]) < 0.02  # 0.005 expected
    of_partition = epochs[0].reshape(200, 64) % 200  # places within each partition
    assert np.mean(of_partition[:, 0] == of_partition[:, 1]) < 0.05
    correlation = np.corrcoef(np.arange(200), of_partition.T)[0, 1:]
    assert np.abs(correlation).mean() < 0.12  # 0.057 expected of chance
    other = RowOrder(size, (1, 0)).locate(np.arange(size))[0]
    assert np.mean(other == epochs[0]) < 0.02


def test_blocks_are_read_one_after_another_in_another_order():
    size, block = 64 * 100, 10
    rows, partitions = RowOrder(size, (3, 0), block).locate(np.arange(2 * size))
    for partition in (0, 17, 63):
        within = rows[partitions == partition] - partition * 100
        blocks = (within // block).reshape(2, 10, block)
        assert np.all(blocks == blocks[:, :, :1])  # one block at a time
        turns = blocks[:, :, 0]
        assert np.array_equal(np.sort(turns, axis=1), np.tile(np.arange(10), (2, 1)))
        assert turns[0].tolist() != sorted(turns[0]) and turns[0].tolist() != turns[1].tolist()
    inside = rows[:size].reshape(-1, 64).T.reshape(64, 10, block) % block
    assert len({tuple(places) for places in inside.reshape(-1, block)}) > 600  # of 640


def test_the_order_stays_what_it_was():
    """Written down: another order would change every resumed run; then raise ORDER_VERSION."""
    rows, _ = RowOrder(1000, (7, 0)).locate(np.arange(1500, 1508))
    assert rows.tolist() == [184, 679, 423, 936, 110, 614, 361, 870]
    rows, _ = RowOrder(1000, (7, 0), 4).locate(np.arange(1500, 1508))
    assert rows.tolist() == [178, 677, 429, 926, 111, 615, 366, 861]


def test_it_costs_the_same_at_any_position():
    order = RowOrder(10**15, (0, 0))
    order.locate(np.arange(4096))
    begun = time.perf_counter()
    order.locate(np.arange(4096) + 9 * 10**17)
    assert time.perf_counter() - begun < 0.5  # takes a few milliseconds
