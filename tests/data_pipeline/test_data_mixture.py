"""Orders and mixtures: permutations are permutations, and blocks hold exact shares."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.configs.errors import ConfigError
from shoal.data_pipeline.mixture import BLOCK_ROWS, Mixture, permute, share_block

keys = st.tuples(st.integers(0, 2**40), st.sampled_from(["documents", "train"]), st.integers(0, 9))


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 3000), key=keys)
def test_permute_is_a_permutation(size, key):
    order = permute(np.arange(size), size, *key)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 2**62), key=keys, data=st.data())
def test_permute_needs_no_other_position(size, key, data):
    """Any positions, however asked for, go where they go in the whole: distinct and in range."""
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    together = permute(np.asarray(positions), size, *key)
    alone = [int(permute(np.asarray([p]), size, *key)[0]) for p in positions]
    assert together.tolist() == alone
    assert len(set(alone)) == len(alone)
    assert min(alone) >= 0 and max(alone) < size


def test_permute_depends_on_every_part_of_its_key():
    size = 1000
    orders = [permute(np.arange(size), size, *key) for key in ((0, 1, 2), (1, 1, 2), (0, 2, 2),
              (0, 1, 3), ("0", "12"), (0, "1", 2, 0))]  # fmt: skip
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(order == other) < 0.02  # 0.001 expected


def test_permute_shuffles():
    """Neighbours are no neighbours any more, and every place is as likely: rough statistics."""
    size = 4096
    order = permute(np.arange(size), size, 3)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.06  # 4 standard errors
    firsts = np.asarray([permute(np.asarray([0]), 8, seed)[0] for seed in range(1600)])
    counts = np.bincount(firsts, minlength=8)
    assert counts.min() > 140 and counts.max() < 260  # 200 expected, 4.5 standard deviations


def test_permute_stays_what_it_was():
    """Written down: another order would change every prepared corpus and every resumed run."""
    expected = [2, 3, 0, 5, 8, 6, 9, 4, 7, 1]
    assert permute(np.arange(10), 10, 7, 0, 1).tolist() == expected


def test_permute_costs_the_same_anywhere():
    """Positions of a range that no memory could hold."""
    positions = np.arange(1000, dtype=np.int64)
    begin = time.perf_counter()
    permute(positions + 10**18, 2 * 10**18, 1)
    assert time.perf_counter() - begin < 1.0  # takes milliseconds


weights = st.lists(st.floats(0.002, 1.0), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(weights=weights)
def test_shares_add_up_and_are_nearest(weights):
    exact = [w / sum(weights) * BLOCK_ROWS for w in weights]
    if min(exact) < 0.5:
        return
    counts = share_block(weights)
    assert sum(counts) == BLOCK_ROWS
    for count, share in zip(counts, exact, strict=True):
        assert count >= 1
        if min(exact) >= 1:
            assert abs(count - share) < 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([5.0], [1024]),
        ([1, 1], [512, 512]),
        ([3, 1], [768, 256]),
        ([1, 1, 1], [342, 341, 341]),
        ([0.7, 0.2, 0.1], [717, 205, 102]),
        ([1023, 1], [1023, 1]),
        # Two streams rounded up to one row: the large one gives way, not one of them.
        ([1, 1, 2046], [1, 1, 1022]),
        ([0.6] * 1000 + [424], [1] * 1000 + [24]),
        ([1] * 1024, [1] * 1024),
    ],
)
def test_share_block(weights, expected):
    assert share_block(weights) == expected


@pytest.mark.parametrize("weights", [[1, 2049], [1e-9, 1], [1, 1, 1e6]])
def test_weight_too_small_is_refused_and_named(weights):
    with pytest.raises(ConfigError, match="smallest share that can be kept") as caught:
        Mixture(weights)
    assert caught.value.where == "data.train.0.weight"


def test_more_streams_than_rows_are_refused():
    with pytest.raises(ConfigError, match="1025 streams do not fit"):
        share_block([1.0] * 1025)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), block=st.integers(0, 10**9))
def test_every_block_holds_exact_shares(weights, block):
    mixture = Mixture(weights)
    places = mixture.locate(np.arange(BLOCK_ROWS) + block * BLOCK_ROWS)
    assert np.array_equal(np.bincount(places.streams, minlength=len(weights)), mixture.counts)
    for stream, count in enumerate(mixture.counts):
        inside = places.positions[places.streams == stream]
        assert np.array_equal(inside, block * count + np.arange(count))


def test_stretches_are_even():
    """Any 64 positions in a row hold a stream's share to within two rows."""
    mixture = Mixture([0.7, 0.2, 0.1])
    streams = mixture.locate(np.arange(5 * BLOCK_ROWS)).streams
    for stream, share in enumerate(mixture.counts / BLOCK_ROWS):
        running = np.concatenate([[0], np.cumsum(streams == stream)])
        inside = running[64:] - running[:-64]
        assert np.abs(inside - 64 * share).max() <= 2
