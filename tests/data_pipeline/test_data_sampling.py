"""Resampled streams: the right histogram, by statistics; a pure function; honest about repeats."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from shoal.configs.errors import ConfigError
from shoal.data_pipeline.sampling import (
    SampledOrder,
    describe_sample,
    entropy_bits,
    make_target,
    row_number_type,
    total_variation,
)

DRAWS = 1_000_000
CLUSTERS = 64


@pytest.fixture(scope="module")
def corpus():
    """Clusters of 20,000 generic rows, of very different sizes; domain rows in each cluster."""
    chooser = np.random.default_rng(5)
    sizes = chooser.dirichlet(np.full(CLUSTERS, 0.5))
    clusters = np.concatenate([np.arange(CLUSTERS), chooser.choice(CLUSTERS, 20_000, p=sizes)])
    domain = chooser.multinomial(3000, chooser.dirichlet(np.full(CLUSTERS, 0.5)))
    return clusters.astype(np.uint16), domain


def p_value(counts, target):
    """Chance of a histogram so far off, were `target` the truth; cells without mass hold none."""
    assert counts[target == 0].sum() == 0
    cells = target > 0
    return stats.chisquare(counts[cells], target[cells] * counts.sum()).pvalue


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_histogram_is_the_domains(corpus, seed):
    clusters, domain = corpus
    target = make_target(np.bincount(clusters), domain)
    assert np.allclose(target, domain / domain.sum())
    rows = SampledOrder(clusters, target, (seed, 0)).rows(np.arange(DRAWS))
    counts = np.bincount(clusters[rows], minlength=CLUSTERS)
    assert p_value(counts, target) > 0.001
    tilt = np.where(np.arange(CLUSTERS) % 2, 1.02, 0.98)
    perturbed = target * tilt / (target * tilt).sum()
    assert p_value(counts, perturbed) < 0.001


@pytest.mark.parametrize("first", [0, 10**12])
def test_rows_of_a_cluster_are_alike(corpus, first):
    clusters, _ = corpus
    target = np.zeros(CLUSTERS)
    largest = np.bincount(clusters).argmax()
    target[largest] = 1
    rows = SampledOrder(clusters, target, (7, 1)).rows(np.arange(first, first + 300_000))
    counts = np.bincount(rows, minlength=len(clusters))[clusters == largest]
    assert counts.sum() == 300_000
    assert stats.chisquare(counts).pvalue > 0.001


def test_draws_are_independent(corpus):
    clusters, _ = corpus
    target = np.zeros(CLUSTERS)
    target[[3, 9]] = 0.5
    drawn = clusters[SampledOrder(clusters, target, (0,)).rows(np.arange(DRAWS))] == 3
    for lag in (1, 2, 64, 1024):
        pairs = np.bincount(2 * drawn[:-lag] + drawn[lag:], minlength=4)
        assert stats.chisquare(pairs).pvalue > 0.001


def test_a_pure_function_of_the_position(corpus):
    clusters, domain = corpus
    target = make_target(np.bincount(clusters), domain)
    order = SampledOrder(clusters, target, (0, 0))
    positions = np.arange(5000)
    rows = order.rows(positions)
    shuffled = np.random.default_rng(0).permutation(5000)
    again = SampledOrder(clusters, target, (0, 0))
    assert np.array_equal(again.rows(positions[shuffled]), rows[shuffled])
    assert np.array_equal(again.rows(positions[4000:]), rows[4000:])
    assert not np.array_equal(SampledOrder(clusters, target, (0, 1)).rows(positions), rows)


def test_the_order_never_changes():
    """What runs under way rely on: new code must give the rows that old code gave."""
    order = SampledOrder(np.arange(100) % 4, np.asarray([0.5, 0.25, 0.25, 0.0]), (3, 0))
    assert order.rows(np.asarray([0, 1, 2, 3, 10**9, 2**62])).tolist() == [
        42, 56, 37, 90, 44, 1,
    ]  # fmt: skip


def test_partitions_are_stretches_of_rows(corpus):
    clusters, domain = corpus
    order = SampledOrder(clusters, make_target(np.bincount(clusters), domain), (0, 0))
    rows, partitions = order.locate(np.arange(5000))
    assert np.array_equal(rows, order.rows(np.arange(5000)))
    by_row = np.argsort(rows, kind="stable")
    assert np.all(np.diff(partitions[by_row]) >= 0)
    assert partitions.min() >= 0
    assert partitions.max() < 64


def test_temper_goes_from_generic_to_domain(corpus):
    clusters, domain = corpus
    generic = np.bincount(clusters)
    far = [
        total_variation(make_target(generic, domain + 1, temper), generic)
        for temper in (0.0, 0.3, 0.6, 1.0)
    ]
    assert far[0] == pytest.approx(0)
    assert far == sorted(far)
    assert np.allclose(make_target(generic, domain + 1, 1.0), (domain + 1) / (domain + 1).sum())


def test_temper_0_leaves_out_no_cluster():
    generic, domain = np.asarray([5, 5, 10]), np.asarray([4, 0, 0])
    assert make_target(generic, domain, 0.0).tolist() == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("temper", [400.0, 1e6])
def test_a_large_temper_takes_the_heaviest_cluster(temper):
    generic, domain = np.asarray([10**6, 10, 5]), np.asarray([1, 900, 400])
    target = make_target(generic, domain, temper)
    assert target.sum() == pytest.approx(1)
    assert target.argmax() == 1 and target[1] > 0.99
    facts = describe_sample(generic, domain, temper, 100)
    assert facts.effective_rows == pytest.approx(10, rel=0.01)
    assert (
        SampledOrder(np.repeat([0, 1, 2], [5, 10, 5]), target, (0,)).rows(np.arange(9)).max() < 15
    )


def test_a_row_takes_four_bytes(corpus):
    clusters, domain = corpus
    order = SampledOrder(clusters, make_target(np.bincount(clusters), domain), (0, 0))
    assert order._rows.nbytes == 4 * len(clusters)
    assert order.rows(np.arange(9)).dtype == np.int64
    assert [row_number_type(n) for n in (2**32, 2**32 + 1)] == [np.uint32, np.int64]


def test_mass_without_rows_goes_to_the_others():
    generic, domain = np.asarray([10, 0, 30]), np.asarray([2, 5, 3])
    assert make_target(generic, domain).tolist() == pytest.approx([0.4, 0, 0.6])
    assert describe_sample(generic, domain, 1.0, 10).lost_share == 0.5
    with pytest.raises(ConfigError, match="no cluster holds rows of the domain"):
        make_target(generic, np.asarray([0, 5, 0]))


def test_facts_come_true(corpus):
    clusters, domain = corpus
    generic = np.bincount(clusters)
    facts = describe_sample(generic, domain, 1.0, 30_000)
    order = SampledOrder(clusters, make_target(generic, domain), (1, 0))
    counts = np.bincount(order.rows(np.arange(30_000)), minlength=len(clusters))
    # The number of different rows varies by less than the root of itself.
    assert abs(np.count_nonzero(counts) - facts.distinct_rows) < 4 * facts.distinct_rows**0.5
    assert facts.unique_fraction == facts.distinct_rows / 30_000
    of_largest = counts[clusters == (domain / generic).argmax()]
    assert of_largest.mean() == pytest.approx(facts.most_repeats, rel=0.1)
    weights = (domain / domain.sum() / (generic / generic.sum()))[clusters]
    assert facts.effective_rows == pytest.approx(weights.sum() ** 2 / (weights**2).sum())


def test_equal_histograms_lose_nothing():
    generic = np.asarray([100, 300, 600])
    facts = describe_sample(generic, generic // 100, 1.0, 1)
    assert facts.effective_rows == pytest.approx(1000)
    assert facts.unique_fraction == pytest.approx(1)


def test_entropy_and_variation():
    assert entropy_bits(np.asarray([4, 4, 4, 4, 0])) == 2
    assert entropy_bits(np.asarray([7, 0])) == 0
    assert total_variation(np.asarray([1, 0]), np.asarray([0, 9])) == 1
