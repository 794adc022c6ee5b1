"""What looking for duplicates holds: so many bytes a document, as the documentation states."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np

from shoal.configs.corpus import CleanConfig
from shoal.data_pipeline import candidates, matching
from shoal.data_pipeline.duplicates import ChooseRemoved


def test_groups_of_boilerplate_stay_linear() -> None:
    """A hundred thousand documents in one group give a bounded number of pairs, in all bands."""
    count = 100_000
    documents = np.arange(count)
    tracemalloc.start()
    band = matching.pair_band(np.full(count, 7, np.uint64), documents)
    pairs = matching.merge_pairs([band] * 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    later, earlier = matching.split_pairs(pairs)
    assert band.shape[1] <= matching.LARGE_GROUP_PAIRS * count
    assert np.bincount(later).max() == matching.LARGE_GROUP_PAIRS  # the same ones in each band
    assert (earlier < later).all() and set(later.tolist()) == set(range(1, count))
    assert 0 in earlier[later == count - 1] and count - 2 in earlier[later == count - 1]
    assert peak / count < 600  # a few times 4 pairs of 16 bytes


def test_memory_is_some_bytes_a_document() -> None:
    """Without copies: the digests and a band of 200,000 documents, whatever their length."""
    count = 200_000
    draw = np.random.Generator(np.random.PCG64(0))
    digests = draw.integers(0, 2**64, size=(count, 2), dtype=np.uint64)
    keys = draw.integers(1, 2**64, size=count, dtype=np.uint64)
    tracemalloc.start()
    assert (matching.find_twins(digests) == -1).all()
    _, exact = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    assert matching.pair_band(keys, np.arange(count)).shape == (2, 0)
    _, band = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert exact / count < 60 and band / count < 60


def test_pairing_groups_of_ten_holds_little_more_than_their_pairs() -> None:
    count = 100_000
    keys = np.random.Generator(np.random.PCG64(0)).permutation(count).astype(np.uint64)
    tracemalloc.start()
    band = matching.pair_band(keys // np.uint64(10), np.arange(count))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert band.shape[1] == count // 10 * 45
    assert (np.diff(band[0].astype(np.int64)) > 0).all()
    assert peak / count < 250  # of which 72 are the pairs


def test_choosing_is_some_bytes_a_removal(tmp_path: Path) -> None:
    """The later half are copies of the first, of which all but one are near duplicates."""
    count = 100_000
    half = count // 2
    plan = candidates.DuplicatePlan((), ((Path(), 0), (Path(), count)), CleanConfig(), tmp_path)
    copies = np.r_[np.full(half, -1), np.arange(half)]
    np.save(plan.twins, copies)
    pairs = matching.start_pairs(np.arange(1, half))  # each with document 0
    np.save(plan.candidates, pairs)
    for task, (first, end) in enumerate(candidates.cut_pairs(pairs)):
        np.save(plan.similarities(task), np.full(end - first, 0.75))
    tracemalloc.start()
    ChooseRemoved(plan).run(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    removed = np.load(plan.removed)
    assert removed["document"].tolist() == list(range(1, count))
    assert not removed["twin"].any(), "what a removal names stays"
    assert removed[half - 1].tolist() == (half, 0, 1.0, True), "the copy of what stays"
    assert set(np.delete(removed, half - 1)["similarity"]) == {0.75}
    assert peak / len(removed) < 120
