"""Orders and mixtures: permutations are permutations, and blocks hold exact shares."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.configs.data import DataConfig
from shoal.configs.errors import ConfigError
from shoal.data_pipeline.mixture import (
    BLOCK_ROWS,
    Mixture,
    Pattern,
    plan_mixture,
    share_block,
)
from shoal.data_pipeline.order import permute

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
    mixture, counts = Mixture(weights), share_block(weights)
    places = mixture.locate(np.arange(BLOCK_ROWS) + block * BLOCK_ROWS)
    assert np.array_equal(np.bincount(places.streams, minlength=len(weights)), counts)
    for stream, count in enumerate(counts):
        inside = places.positions[places.streams == stream]
        assert np.array_equal(inside, block * count + np.arange(count))


def test_stretches_are_even():
    """Any 64 positions in a row hold a stream's share to within two rows."""
    streams = Mixture([0.7, 0.2, 0.1]).locate(np.arange(5 * BLOCK_ROWS)).streams
    for stream, share in enumerate(np.asarray([717, 205, 102]) / BLOCK_ROWS):
        running = np.concatenate([[0], np.cumsum(streams == stream)])
        inside = running[64:] - running[:-64]
        assert np.abs(inside - 64 * share).max() <= 2


@settings(max_examples=150, deadline=None)
@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=9), data=st.data())
def test_any_stretch_of_a_pattern_is_found_alone(counts, data):
    counts[0] += 1
    pattern = Pattern(counts)
    whole = pattern.locate(np.arange(pattern.length))
    for stream, count in enumerate(counts):
        assert np.array_equal(whole.positions[whole.streams == stream], np.arange(count))
    first = data.draw(st.integers(0, pattern.length))
    last = data.draw(st.integers(first, pattern.length))
    part = pattern._lay_out(first, last)
    assert np.array_equal(part.streams, whole.streams[first:last])
    assert np.array_equal(part.positions, whole.positions[first:last])
    seen = np.bincount(whole.streams[:first], minlength=len(counts))
    assert np.array_equal(pattern.count_rows(first), seen)


def test_long_patterns_are_exact_without_a_table():
    counts = [123_457, 7, 500_001, 0, 1]
    pattern = Pattern(counts)
    assert pattern._table is None
    cuts = [*range(0, pattern.length, 99_991), pattern.length]
    parts = [pattern.locate(np.arange(a, b)) for a, b in itertools.pairwise(cuts)]
    streams = np.concatenate([part.streams for part in parts])
    turns = np.concatenate([part.positions for part in parts])
    for stream, count in enumerate(counts):
        assert np.array_equal(turns[streams == stream], np.arange(count))
    again = pattern.locate(np.asarray([pattern.length + 5, 5]))
    assert again.streams[0] == again.streams[1]
    assert again.positions[0] == again.positions[1] + counts[again.streams[0]]


def make_data(*streams, **more):
    named = [{"path": f"data/{name}", "name": name, **stream} for name, stream in
             zip("abcdef", streams, strict=False)]  # fmt: skip
    return DataConfig.model_validate({"train": named, **more})


def count(mixture, first, last, streams):
    places = mixture.locate(np.arange(first, last))
    return np.bincount(places.streams, minlength=streams).tolist()


def test_repeat_and_choose_are_exact_over_the_run():
    data = make_data({"repeat": 2.5}, {"choose": 77}, {"weight": 3}, {"weight": 1})
    mixture = plan_mixture(data, [100, 1000, 50, 9999], context=16, run_rows=10_000)
    left = 10_000 - 250 - 77
    assert count(mixture, 0, 10_000, 4) == [250, 77, round(left * 0.75), round(left * 0.25)]
    assert count(mixture, 2500, 5000, 4)[0] in (62, 63)  # evenly
    assert mixture.count_rows(10_000).tolist() == count(mixture, 0, 10_000, 4)


@pytest.mark.parametrize("run_rows", [299, 308])
def test_streams_that_give_another_number_of_rows_are_refused(run_rows):
    data = make_data({"repeat": 2}, {"choose": 100})
    for whole in (300, 304):  # the latter rounded up to steps of 8
        assert count(plan_mixture(data, [100, 500], 16, whole, 8), 0, 300, 2) == [200, 100]
    with pytest.raises(ConfigError, match=r"give 300 rows .* the run takes") as caught:
        plan_mixture(data, [100, 500], 16, run_rows, 8)
    assert f"train.tokens={300 * 16}" in str(caught.value.fix)


def test_a_schedule_changes_shares_at_its_tokens_and_loses_no_row():
    data = make_data({"weight": 3}, {"weight": 1}, {"weight": 0}, schedule=[
        {"from_tokens": 16 * (3 * BLOCK_ROWS - 5), "weights": {"a": 1, "c": 1}},
        {"from_tokens": 16 * 5 * BLOCK_ROWS, "weights": {"c": 2, "b": 2}},
    ])  # fmt: skip
    mixture = plan_mixture(data, [100, 100, 100], context=16, run_rows=10**6)
    block = BLOCK_ROWS
    assert count(mixture, 0, 3 * block, 3) == [3 * 768, 3 * 256, 0]
    assert count(mixture, 3 * block, 5 * block, 3) == [block, 0, block]
    assert count(mixture, 5 * block, 9 * block, 3) == [0, 2 * block, 2 * block]
    places = mixture.locate(np.arange(9 * block))
    for stream in range(3):
        of_stream = places.positions[places.streams == stream]
        assert np.array_equal(of_stream, np.arange(len(of_stream)))
    for position in (0, 1, 3 * block - 1, 3 * block, 4 * block + 77, 7 * block + 3):
        expected = np.bincount(places.streams[:position], minlength=3)
        assert np.array_equal(mixture.count_rows(position), expected)
    anywhere = np.random.default_rng(0).integers(0, 9 * block, 500)
    found = mixture.locate(anywhere)
    assert np.array_equal(found.streams, places.streams[anywhere])
    assert np.array_equal(found.positions, places.positions[anywhere])


def test_changes_within_one_block_are_refused():
    data = make_data({}, {}, schedule=[
        {"from_tokens": 20_000, "weights": {"a": 1}}, {"from_tokens": 20_016, "weights": {"b": 1}},
    ])  # fmt: skip
    with pytest.raises(ConfigError, match="same row") as caught:
        plan_mixture(data, [10, 10], context=16, run_rows=9999)
    assert caught.value.where == "data.schedule.1.from_tokens"


NEVER = {
    "all rows taken": ([{"repeat": 10}, {}], {}, 1000, "data.train.1", r"b would .*weight 1\)"),
    "a part of a row": ([{"repeat": 0.001}, {}], {}, 9, "data.train.0", r"\(repeat 0.001\)"),
    "tiny weight": ([{"choose": 990}, {}, {"weight": 1e-3}], {}, 1000, "data.train.2", "0.001"),
    "short run": ([{"weight": 1000}, {"weight": 1}], {}, 100, "data.train.1", "100 rows"),
    "left out": ([{}, {}], [(0, {"a": 1})], 9999, "data.train.1", "by the schedule"),
    "never comes": (
        [{}, {"weight": 0}], [(16 * 9000, {"b": 1})], 9000, "data.schedule.0.from_tokens", "9,216",
    ),
    "at the end": (
        [{}, {}], [(0, {"a": 1, "b": 1}), (16 * 1025, {"b": 1})], 2048,
        "data.schedule.1.from_tokens", "the run ends after 2,048",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
def test_what_would_never_be_read_is_refused_and_named(name):
    streams, changes, run_rows, where, message = NEVER[name]
    schedule = [{"from_tokens": tokens, "weights": weights} for tokens, weights in changes]
    data = make_data(*streams, schedule=schedule)
    with pytest.raises(ConfigError, match=message) as caught:
        plan_mixture(data, [100] * len(streams), 16, run_rows)
    assert caught.value.where == where
    plan_mixture(data, [100] * len(streams), 16, run_rows, is_trial=True)


def test_a_change_in_the_last_block_still_comes():
    data = make_data({}, {"weight": 0}, schedule=[{"from_tokens": 16 * 1024, "weights": {"b": 1}}])
    assert plan_mixture(data, [9, 9], 16, 1025).count_rows(1025).tolist() == [1024, 1]


@pytest.mark.parametrize(
    ("streams", "more", "message"),
    [
        ([{"weight": 1, "repeat": 2}], {}, "give one of weight and repeat"),
        ([{"weight": 0}, {}], {}, "weight 0 and is never read"),
        ([{"repeat": 1}, {}], {"schedule": [{"from_tokens": 0, "weights": {"b": 1}}]}, "leave rep"),
        ([{}], {"schedule": [{"from_tokens": 9, "weights": {"x": 1}}]}, "names x, and the streams"),
        ([{}], {"schedule": [{"from_tokens": 9, "weights": {"a": 0}}]}, "all weights are 0"),
        ([{"name": "x"}, {"name": "x"}], {}, "two streams are called x"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(streams, more, message):
    with pytest.raises(ValueError, match=message):
        make_data(*streams, **more)
