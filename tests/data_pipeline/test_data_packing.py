"""Packing: every token of every document is a target exactly once, against a naive packer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data_pipeline.packing import (
    IGNORE,
    Layout,
    find_segments,
    find_targets,
)

EOT = 0


def pack_naively(documents, order, context):
    """Rows, targets and segments as lists, one token at a time."""
    stream, owner = [], []
    for number in order:
        stream += [EOT, *documents[number]]
        owner += [number] * (1 + len(documents[number]))
    stream.append(EOT)
    rows, targets, segments = [], [], []
    for first in range(0, len(stream) - 1, context):
        row = stream[first : first + context + 1]
        goal = row[1:]
        owners = owner[first : first + context]
        row += [EOT] * (context + 1 - len(row))
        goal += [IGNORE] * (context - len(goal))
        rows.append(row)
        targets.append(goal)
        segments.append([list(dict.fromkeys(owners)).index(o) for o in owners])
    return rows, targets, segments


@st.composite
def corpora(draw):
    """Documents without empty ones, their order, and a row length."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    values = np.random.default_rng(draw(st.integers(0, 99)))
    documents = [values.integers(1, 50, size).tolist() for size in sizes]
    order = draw(st.permutations(range(len(sizes))))
    return documents, order, draw(st.integers(1, 17))


def plan(documents, order, context):
    lengths = np.asarray([len(document) for document in documents])
    return Layout.plan(lengths, np.asarray(order), context)


def fill(documents, layout, first, last):
    return layout.fill(
        first, last, EOT, lambda n: np.asarray(documents[n], np.uint16), np.dtype("<u2")
    )


@settings(max_examples=300, deadline=None)
@given(corpus=corpora())
def test_equals_the_naive_packer(corpus):
    documents, order, context = corpus
    rows, targets, segments = pack_naively(documents, order, context)
    layout = plan(*corpus)
    assert layout.rows == len(rows)
    assert layout.tokens == sum(len(d) + 1 for d in documents)
    tokens = fill(documents, layout, 0, layout.rows).astype(np.int64)
    assert tokens.tolist() == rows
    assert find_targets(tokens, EOT).tolist() == targets
    for found, expected in zip(find_segments(tokens, EOT).tolist(), segments, strict=True):
        assert found[: len(expected)] == expected


@settings(max_examples=100, deadline=None)
@given(corpus=corpora(), data=st.data())
def test_any_stretch_of_rows_is_part_of_the_whole(corpus, data):
    documents, layout = corpus[0], plan(*corpus)
    first = data.draw(st.integers(0, layout.rows - 1))
    last = data.draw(st.integers(first + 1, layout.rows))
    whole = fill(documents, layout, 0, layout.rows)
    assert np.array_equal(fill(documents, layout, first, last), whole[first:last])


@settings(max_examples=100, deadline=None)
@given(corpus=corpora())
def test_targets_in_a_line_are_the_documents(corpus):
    documents, order, _ = corpus
    layout = plan(*corpus)
    targets = find_targets(fill(documents, layout, 0, layout.rows).astype(np.int64), EOT).ravel()
    real = targets[targets != IGNORE]
    assert real.tolist() == [t for n in order for t in [*documents[n], EOT]]
    assert (targets[len(real) :] == IGNORE).all()
    assert len(targets) - len(real) < layout.context


def test_padding_is_seen_by_no_document():
    """What fills the last row up belongs to segments of its own."""
    layout = plan([[5, 6]], [0], 6)
    tokens = fill([[5, 6]], layout, 0, 1).astype(np.int64)
    assert tokens.tolist() == [[EOT, 5, 6, EOT, EOT, EOT, EOT]]
    assert find_targets(tokens, EOT).tolist() == [[5, 6, EOT, -100, -100, -100]]
    assert find_segments(tokens, EOT).tolist() == [[0, 0, 0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([7, 7, 0, 7, 7], [0, 0, 1, 1]),  # begins within a document
        ([0, 7, 0, 7, 0], [0, 0, 1, 1]),  # begins with one
        ([7, 0, 7, 7, 0], [0, 1, 1, 1]),
        ([7, 7, 7, 7, 0], [0, 0, 0, 0]),  # the next document starts in the next row
    ],
)
def test_segments_count_from_zero_in_every_row(row, expected):
    segments = find_segments(np.asarray([row, row]), EOT)
    assert segments.dtype == np.int32
    assert segments.tolist() == [expected, expected]
