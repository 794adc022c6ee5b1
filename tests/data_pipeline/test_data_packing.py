"""Packing: rows against rules written out one token at a time."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.configs.corpus import PackingConfig
from shoal.data_pipeline.bins import fit_items
from shoal.data_pipeline.mds import row_type
from shoal.data_pipeline.packing import IGNORE, Form, Layout, decode_rows

EOT, SEPARATOR = 0, 60
DTYPE = np.dtype("<u2")


@st.composite
def corpora(draw):
    """Documents without empty ones, their order, and a row length."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=14))
    # Every token of the corpus is another one, so that it shows where each went.
    ids = iter(range(100, 100 + sum(sizes)))
    documents = [[next(ids) for _ in range(size)] for size in sizes]
    return documents, draw(st.permutations(range(len(sizes)))), draw(st.integers(1, 17))


def make_layout(documents, order, context, **packing):
    separator = packing.get("separator", "end_of_text")
    form = Form(
        context=context,
        eot=EOT,
        separator={"end_of_text": EOT, "none": None}.get(separator, SEPARATOR),
        leads=separator == "end_of_text",
        piece_tokens=packing.get("piece_tokens"),
        overlap=packing.get("overlap", True),
    )
    lengths = np.asarray([len(document) for document in documents])
    return Layout.plan(lengths, np.asarray(order), form, PackingConfig(**packing))


def fill(documents, layout, first=0, last=None):
    last = layout.rows if last is None else last
    here, starts, _, _ = layout.locate(first, last)
    numbers = layout.documents[here]
    spans = [
        (int(s), np.asarray(documents[n], DTYPE)) for n, s in zip(numbers, starts[:-1], strict=True)
    ]
    return layout.fill(first, last, spans, DTYPE)


def read(documents, layout, first=0, last=None):
    stored = fill(documents, layout, first, last)
    raw = stored.view(np.uint8).reshape(len(stored), stored.dtype.itemsize)
    return stored, decode_rows(raw, layout.form.context, DTYPE)


def concatenate_naively(documents, order, context):
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


@settings(max_examples=200, deadline=None)
@given(corpus=corpora())
def test_concatenation_equals_the_naive_one(corpus):
    documents = corpus[0]
    rows, targets, segments = concatenate_naively(*corpus)
    layout = make_layout(*corpus)
    _, found = read(documents, layout)
    assert layout.tokens == sum(len(d) + 1 for d in documents)
    assert found.tokens.tolist() == rows
    assert found.targets.tolist() == targets
    for mine, expected in zip(found.segments.tolist(), segments, strict=True):
        assert mine[: len(expected)] == expected
        # What fills the last row up, and the end of text before it, are seen by no document.
        assert not set(mine[len(expected) :]) & set(expected)


METHODS = [
    {"method": "concatenate"},
    {"method": "concatenate", "batch_documents": 3},
    {"method": "concatenate", "piece_tokens": 5},
    {"method": "concatenate", "separator": "s"},
    {"method": "concatenate", "separator": "s", "piece_tokens": 5, "batch_documents": 2},
    {"method": "concatenate", "separator": "none"},
    {"method": "concatenate", "separator": "none", "batch_documents": 2},
    {"method": "best_fit"},
    {"method": "window"},
]


@pytest.mark.parametrize(
    "packing", METHODS, ids=lambda packing: "-".join(map(str, packing.values()))
)
@settings(max_examples=60, deadline=None)
@given(corpus=corpora())
def test_every_token_is_a_target_once(packing, corpus):
    """Every token of every document; without a leading separator all but the first of a block."""
    documents, order, _ = corpus
    layout = make_layout(*corpus, **packing)
    stored, found = read(documents, layout)
    targets = Counter(found.targets[found.targets != IGNORE].tolist())
    assert targets.total() == layout.tokens == int((stored["length"] - 1).sum())
    expected = {token for document in documents for token in document}
    if not layout.form.leads:
        batch = packing.get("batch_documents") or len(order)
        expected -= {documents[order[n]][0] for n in range(0, len(order), batch)}
    assert {t for t in targets if t >= 100} == expected
    assert all(targets[token] == 1 for token in expected)
    if layout.form.leads and "piece_tokens" not in packing:
        assert targets[EOT] == len(documents)
        # The token that ends a document is what its last token predicts, whatever comes next.
        after = dict(zip(found.tokens[:, :-1].ravel(), found.targets.ravel(), strict=True))
        for document in documents:
            assert after[document[-1]] == EOT
    assert (
        stored["tokens"][np.arange(layout.form.context + 1) >= stored["length"][:, None]] == EOT
    ).all()


@pytest.mark.parametrize(
    "packing", METHODS, ids=lambda packing: "-".join(map(str, packing.values()))
)
@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), data=st.data())
def test_any_stretch_of_rows_is_part_of_the_whole(packing, corpus, data):
    documents, layout = corpus[0], make_layout(*corpus, **packing)
    first = data.draw(st.integers(0, layout.rows - 1))
    last = data.draw(st.integers(first + 1, layout.rows))
    whole = fill(documents, layout)
    assert fill(documents, layout, first, last).tobytes() == whole[first:last].tobytes()


@pytest.mark.parametrize(
    "packing", METHODS, ids=lambda packing: "-".join(map(str, packing.values()))
)
@settings(max_examples=60, deadline=None)
@given(corpus=corpora())
def test_segments_are_documents(packing, corpus):
    """Inputs of one row share a segment exactly where they are of one document."""
    documents, layout = corpus[0], make_layout(*corpus, **packing)
    owner = {token: number for number, d in enumerate(documents) for token in d}
    _, found = read(documents, layout)
    for tokens, segments in zip(found.tokens[:, :-1], found.segments, strict=True):
        text = [
            (owner[t], s)
            for t, s in zip(tokens.tolist(), segments.tolist(), strict=True)
            if t in owner
        ]
        assert len(set(text)) == len({o for o, _ in text}) == len({s for _, s in text})


def pack_like_the_paper(documents, context, piece, separator, batch=1000):
    """The rule of arXiv:2405.09395 as its code states it (model_training/train.py).

    Tokenised with truncation and overflow, all pieces of a batch of documents joined and cut again,
    the short last chunk kept, padded and ignored.
    """
    chunks = []
    for first in range(0, len(documents), batch):
        joined = []
        for document in documents[first : first + batch]:
            for start in range(0, len(document), piece):
                joined += document[start : start + piece] + separator
        chunks += [joined[i : i + context] for i in range(0, len(joined), context)]
    return chunks


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "spt"])
@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), batch=st.integers(1, 5))
def test_paper_rule(marked, corpus, batch):
    documents, order, context = corpus
    packing = {"separator": "none", "batch_documents": batch, "overlap": False}
    if marked:
        packing |= {"separator": "s", "piece_tokens": max(1, context - 1)}
    layout = make_layout(*corpus, **packing)
    chunks = pack_like_the_paper(
        [documents[n] for n in order],
        context,
        max(1, context - 1) if marked else context,
        [SEPARATOR] if marked else [],
        batch,
    )
    stored, found = read(documents, layout)
    assert [
        row[:size].tolist() for row, size in zip(found.tokens, stored["length"], strict=True)
    ] == chunks
    # As Hugging Face models shift labels: the first token of a chunk is no target.
    goals = [[*chunk[1:], *[IGNORE] * (context - len(chunk) + 1)] for chunk in chunks]
    assert found.targets.tolist() == goals
    assert layout.padding_tokens == sum(context - len(chunk) for chunk in chunks)


@settings(max_examples=200, deadline=None)
@given(corpus=corpora())
def test_best_fit_cuts_long_documents_alone(corpus):
    documents, _, context = corpus
    layout = make_layout(*corpus, method="best_fit")
    _, found = read(documents, layout)
    rows_of = {token: row for row, tokens in enumerate(found.targets) for token in tokens.tolist()}
    for document in documents:
        rows = len({rows_of[token] for token in document})
        assert rows == max(1, -(-len(document) // context)) or len(document) >= context
    assert layout.cut_documents == sum(len(d) + 1 > context for d in documents)
    assert layout.padding_tokens == layout.rows * context - layout.tokens


@settings(max_examples=200, deadline=None)
@given(corpus=corpora())
def test_windows_hold_one_document(corpus):
    documents, order, context = corpus
    layout = make_layout(*corpus, method="window")
    _, found = read(documents, layout)
    owner = {token: number for number, d in enumerate(documents) for token in d}
    held = [{owner[t] for t in row.tolist() if t in owner} for row in found.tokens]
    assert all(len(numbers) == 1 for numbers in held)
    assert layout.rows == sum(-(-(len(d) + 1) // context) for d in documents)
    assert [n for row in held for n in row] == [
        n for n in order for _ in range(-(-(len(documents[n]) + 1) // context))
    ]


def fit_naively(sizes, room, capacity):
    """Room left in all bins, an item at a time."""
    room = list(room)
    for size in sorted(sizes, reverse=True):
        fitting = [(left, number) for number, left in enumerate(room) if left >= size]
        if fitting:
            room[min(fitting)[1]] -= size
        else:
            room.append(capacity - size)
    return sorted(room)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 40))
def test_fitting_is_best_fit_decreasing(data, capacity):
    sizes = np.asarray(data.draw(st.lists(st.integers(1, capacity), max_size=40)), dtype=np.int64)
    room = np.asarray(data.draw(st.lists(st.integers(0, capacity - 1), max_size=6)), dtype=np.int64)
    bins, count = fit_items(sizes, room, capacity)
    left = np.concatenate([room, np.full(count - len(room), capacity)])
    np.subtract.at(left, bins, sizes)
    assert sorted(left.tolist()) == fit_naively(sizes.tolist(), room.tolist(), capacity)


def test_statistics():
    """Rows of 4: two documents of 2 + 1 places, one of 5 + 1; what each method makes of them."""
    documents, order = [[101, 102], [103, 104], [105, 106, 107, 108, 109]], [0, 1, 2]
    facts = {}
    for method in ("concatenate", "best_fit", "window"):
        layout = make_layout(documents, order, 4, method=method)
        facts[method] = (layout.rows, layout.tokens, layout.padding_tokens, layout.cut_documents)
    assert facts == {
        "concatenate": (3, 12, 0, 2),
        "best_fit": (4, 12, 4, 1),
        "window": (4, 12, 4, 1),
    }


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.95])
@pytest.mark.parametrize("context", [1, 2, 7, 8, 63, 512, 2048, 9001])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_decoding_against_plain_sums(dtype, context, share):
    """Also of rows with more documents than a byte counts."""
    values, rows = np.random.default_rng(context), 30
    stored = np.zeros(rows, row_type(context, np.dtype(dtype)))
    ends = values.random((rows, context + 1)) < share
    stored["ends"] = np.packbits(ends, axis=1)
    stored["length"] = values.integers(1, context + 2, rows)
    stored["tokens"] = values.integers(0, 60000, (rows, context + 1))
    raw = stored.view(np.uint8).reshape(rows, -1)
    found = decode_rows(raw, context, np.dtype(dtype))
    assert [part.dtype for part in (found.tokens, found.segments, found.targets)] == [
        np.int64, np.int32, np.int64,
    ]  # fmt: skip
    assert np.array_equal(found.tokens, stored["tokens"])
    segments = np.concatenate([np.zeros((rows, 1), int), np.cumsum(ends, axis=1)], axis=1)
    assert np.array_equal(found.segments, segments[:, :context])
    for number, length in enumerate(stored["length"].tolist()):
        expected = found.tokens[number, 1:].copy()
        expected[length - 1 :] = IGNORE
        assert found.targets[number].tolist() == expected.tolist()


def test_a_million_documents_are_packed_in_seconds():
    values = np.random.default_rng(0)
    lengths = np.minimum(values.lognormal(6, 1.3, 1_000_000), 60_000).astype(np.int64) + 1
    form = Form(context=2048, eot=EOT, separator=EOT)
    start = time.process_time()
    layout = Layout.plan(lengths, np.arange(len(lengths)), form, PackingConfig(method="best_fit"))
    assert time.process_time() - start < 15  # alone it takes 2
    assert layout.tokens == int((lengths + 1).sum())
    assert layout.padding_tokens / layout.tokens < 0.001
