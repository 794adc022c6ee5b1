"""The loader: batches depend on the step alone; ranks, resumes and padding change nothing."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.batch import IGNORE, PADDING_ROW
from shoal.data_pipeline.loader import Loader, validation_batches
from shoal.data_pipeline.rows import Rows
from shoal.data_pipeline.shards import prepare
from shoal.data_pipeline.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def prepare_other(prepared, make_config, lines, records, tmp_path_factory):
    """Prepare another small corpus; with the tokenizer of `prepared` unless told otherwise."""

    def make(**changes):
        base = tmp_path_factory.mktemp("other")
        file = lines(base / "x.jsonl", records(40, seed=5))
        given = {
            "train": [{"path": str(file)}],
            "tokenizer": {"path": str(prepared.tokenizer)},
            "validation_share": 0.0,
        }
        return prepare(make_config(base / "out", **(given | changes)))

    return make


@pytest.fixture(scope="module")
def streams(prepared, prepare_other):
    return [(Rows.open(prepared.train), 3.0), (Rows.open(prepare_other().train), 1.0)]


def make_loader(streams, **changes):
    given = {"seed": 1, "batch_rows": 10, "micro_batch_rows": 4}
    return Loader(streams, **(given | changes))


def join(batches, field):
    return torch.cat([getattr(batch, field) for batch in batches])


@pytest.mark.parametrize("batch_rows", [1, 3, 10, 16])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_rows", [1, 4, 100])
def test_same_global_batch_on_any_number_of_ranks(batch_rows, num_ranks, micro_batch_rows, streams):
    sizes = {"batch_rows": batch_rows, "micro_batch_rows": micro_batch_rows}
    whole = make_loader(streams, batch_rows=batch_rows, micro_batch_rows=batch_rows)
    for step in (0, 1, 517):
        (expected,) = whole.microbatches(step)
        ranks = [
            make_loader(streams, rank=rank, num_ranks=num_ranks, **sizes)
            for rank in range(num_ranks)
        ]
        parts = [rank.microbatches(step) for rank in ranks]
        assert {len(part) for part in parts} == {ranks[0].accumulation}
        shapes = {tuple(tuple(b.inputs.shape) for b in part) for part in parts}
        assert len(shapes) == 1
        batches = [batch for part in parts for batch in part]
        assert all(len(batch.row_ids) <= micro_batch_rows for batch in batches)
        real = join(batches, "row_ids") != PADDING_ROW
        assert join(batches, "row_ids")[real].tolist() == ranks[0].row_ids(step).tolist()
        for field in ("inputs", "targets", "segments", "row_ids"):
            assert torch.equal(join(batches, field)[real], getattr(expected, field))
        assert sum(batch.real_tokens for batch in batches) == expected.real_tokens


def test_padded_rows_weigh_nothing(streams):
    parts = [
        make_loader(streams, batch_rows=5, rank=rank, num_ranks=4).microbatches(3)
        for rank in range(4)
    ]
    assert [join(part, "row_ids").tolist().count(PADDING_ROW) for part in parts] == [0, 0, 1, 2]
    for batch in (batch for part in parts for batch in part):
        padded = batch.row_ids == PADDING_ROW
        assert (batch.targets[padded] == IGNORE).all()
        assert (batch.targets[~padded] != IGNORE).any(dim=1).all()
    assert parts[3][0].real_tokens == 0


def test_batches_hold_the_rows_they_name(streams):
    offset = len(streams[0][0])
    for step in range(20):
        (batch,) = make_loader(streams, micro_batch_rows=10).microbatches(step)
        for number, inputs, targets, segments in zip(
            batch.row_ids.tolist(), batch.inputs, batch.targets, batch.segments, strict=True
        ):
            stream, row = (0, number) if number < offset else (1, number - offset)
            rows = streams[stream][0]
            stored = rows.gather(np.asarray([row]))
            assert inputs.tolist() == stored.tokens[0, :-1].tolist()
            assert targets.tolist() == stored.targets[0].tolist()
            assert segments.tolist() == stored.segments[0].tolist()


def test_types_and_shapes(streams):
    (batch,) = make_loader(streams, micro_batch_rows=10).microbatches(0)
    assert batch.inputs.shape == batch.targets.shape == batch.segments.shape == (10, 16)
    assert batch.inputs.dtype == batch.targets.dtype == batch.row_ids.dtype == torch.int64
    assert batch.segments.dtype == torch.int32
    assert batch.to("cpu").row_ids is batch.row_ids


def test_a_step_reached_anew_is_the_step_reached_by_iterating(streams):
    running = make_loader(streams)
    seen = [running.microbatches(step) for step in range(300)]
    for step in (0, 1, 150, 299):
        for new, old in zip(make_loader(streams).microbatches(step), seen[step], strict=True):
            for field in ("inputs", "targets", "segments", "row_ids"):
                assert torch.equal(getattr(new, field), getattr(old, field))


def test_every_epoch_sees_every_row_once_in_another_order(prepared):
    rows = Rows.open(prepared.validation)
    size = len(rows)
    loader = make_loader([(rows, 1.0)], batch_rows=7)
    order = np.asarray([loader.row_ids(step) for step in range(size)])  # 7 epochs, in 7s
    assert np.array_equal(np.bincount(order.ravel(), minlength=size), np.full(size, 7))
    for step in range(size):  # a batch may hold the end of an epoch and the beginning of the next
        seen = np.bincount(order[:step].ravel(), minlength=size)
        assert seen.max() - seen.min() <= 1
    places = np.argsort(order.ravel(), kind="stable").reshape(size, 7) - np.arange(7) * size
    assert np.abs(np.corrcoef(places[:, 0], places[:, 1])[0, 1]) < 0.3  # another order
    other = make_loader([(rows, 1.0)], batch_rows=7, seed=2)
    assert other.row_ids(0).tolist() != loader.row_ids(0).tolist()


def test_streams_are_mixed_by_weight_and_each_in_epochs(streams):
    loader = make_loader(streams, batch_rows=64)
    order = [loader.row_ids(step) for step in range(16 * 5)]  # 5 blocks
    offset, size = len(streams[0][0]), len(streams[1][0])
    seen = np.zeros(size, dtype=np.int64)
    for step, batch in enumerate(order):
        seen += np.bincount(batch[batch >= offset] - offset, minlength=size)
        assert seen.max() - seen.min() <= 1
        assert seen.sum() == loader.count_rows(step + 1)[1]
    assert seen.sum() == 5 * 256 and seen.min() >= 2


def test_streams_that_do_not_fit_together_are_refused(streams, prepare_other):
    other_tokenizer = prepare_other(tokenizer={"vocab_size": 300})
    other_context = prepare_other(context=24)
    for other, message in (
        (other_tokenizer, "another tokenizer than the first stream"),
        (other_context, "rows of 24 tokens, the first stream of 16"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            make_loader([streams[0], (Rows.open(other.train), 1.0)])
        assert caught.value.where == str(other.train)


def test_weights_too_small_and_nothing_to_read_are_refused(streams):
    with pytest.raises(ConfigError, match="smallest share"):
        make_loader([(streams[0][0], 1.0), (streams[1][0], 1e-5)])
    with pytest.raises(ConfigError, match="nothing to read"):
        make_loader([])


def test_without_document_mask_a_row_is_one_segment(streams, prepared):
    (masked,) = make_loader(streams, micro_batch_rows=10).microbatches(0)
    (open_,) = make_loader(streams, micro_batch_rows=10, document_mask=False).microbatches(0)
    assert masked.segments.max() > 0
    assert open_.segments.max() == 0
    assert torch.equal(open_.targets, masked.targets)
    rows = Rows.open(prepared.validation)
    sizes = np.zeros(rows.manifest.vocab_size, dtype=np.int64)
    batches, _ = validation_batches(rows, 9, 4, token_bytes=sizes, document_mask=False)
    assert max(int(batch.segments.max()) for batch in batches) == 0


@pytest.fixture(scope="module")
def validation(prepared):
    return Rows.open(prepared.validation), Tokenizer.load(prepared.tokenizer).token_bytes


@pytest.mark.parametrize("max_rows", [1, 2, 10, 37, 10_000])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_validation_is_the_same_for_any_number_of_ranks(max_rows, num_ranks, validation):
    rows, token_bytes = validation
    count = min(max_rows, len(rows))
    parts, sizes = [], set()
    for rank in range(num_ranks):
        batches, text_bytes = validation_batches(
            rows, max_rows, 4, rank, num_ranks, token_bytes=token_bytes
        )
        parts.append(list(batches))
        sizes.add(text_bytes)
    assert {sum(len(b.row_ids) for b in part) for part in parts} == {-(-count // num_ranks)}
    assert len({len(part) for part in parts}) == 1
    batches = [batch for part in parts for batch in part]
    numbers = join(batches, "row_ids")
    numbers = numbers[numbers != PADDING_ROW]
    assert numbers.tolist() == [(2 * i + 1) * len(rows) // (2 * count) for i in range(count)]
    targets = join(batches, "targets")
    assert sizes == {int(token_bytes[targets[targets != IGNORE].numpy()].sum())}
    assert (targets[join(batches, "row_ids") == PADDING_ROW] == IGNORE).all()


def test_validation_rows_are_spread_evenly(validation):
    rows, token_bytes = validation
    batches, _ = validation_batches(rows, 10, 4, token_bytes=token_bytes)
    numbers = np.sort(join(batches, "row_ids").numpy())
    gaps = np.diff([-0.5, *numbers, len(rows) - 0.5])
    assert len(np.unique(numbers)) == 10
    assert gaps[1:-1].max() <= len(rows) / 10 + 1
    assert max(gaps[0], gaps[-1]) <= len(rows) / 20 + 1


def test_whole_validation_split_holds_the_bytes_of_its_texts(validation):
    rows, token_bytes = validation
    _, text_bytes = validation_batches(rows, len(rows), 8, token_bytes=token_bytes)
    assert text_bytes == rows.manifest.text_bytes


def test_validation_batches_are_a_sequence(validation):
    rows, token_bytes = validation
    batches, _ = validation_batches(rows, 10, 4, token_bytes=token_bytes)
    assert [len(batch.row_ids) for batch in batches] == [4, 4, 2]
    assert torch.equal(batches[-1].inputs, batches[2].inputs)
    assert [len(batch.row_ids) for batch in batches[1:]] == [4, 2]
    with pytest.raises(IndexError):
        batches[3]


def test_damaged_shard_stops_the_step_that_meets_it(prepared, tmp_path):
    shutil.copytree(prepared.output, tmp_path / "c")
    rows = Rows.open(tmp_path / "c" / "train")
    file = rows.folder / rows.manifest.shards[2].file
    file.write_bytes(file.read_bytes()[:-1])
    first = sum(shard.rows for shard in rows.manifest.shards[:2])
    damaged = range(first, first + rows.manifest.shards[2].rows)
    loader = make_loader([(rows, 1.0)])
    for step in range(40):
        if set(loader.row_ids(step).tolist()) & set(damaged):
            with pytest.raises(DataError) as caught:
                loader.microbatches(step)
            assert caught.value.where == str(file)
        else:
            loader.microbatches(step)


def test_reading_ahead_changes_nothing(streams):
    plain, ahead = make_loader(streams), make_loader(streams, read_ahead=2)
    for step in (0, 1, 2, 3, 40, 41, 7):
        for one, two in zip(plain.microbatches(step), ahead.microbatches(step), strict=True):
            for field in ("inputs", "targets", "segments", "row_ids", "streams"):
                assert torch.equal(getattr(one, field), getattr(two, field))
    ahead.close()


@pytest.mark.parametrize("block_rows", [None, 2])
def test_a_run_goes_on_exactly_on_any_other_number_of_ranks(streams, block_rows):
    """Killed at any step and gone on with other counts: the rows, and their order, are the same."""
    given = {"batch_rows": 16, "block_rows": block_rows}
    expected = [make_loader(streams, **given).row_ids(step).tolist() for step in range(40)]
    step = 0
    for num_ranks, steps in ((1, 3), (8, 5), (2, 1), (4, 20), (8, 11)):
        ranks = [
            make_loader(streams, rank=rank, num_ranks=num_ranks, read_ahead=rank % 2, **given)
            for rank in range(num_ranks)
        ]
        for _ in range(steps):
            parts = [rank.microbatches(step) for rank in ranks]
            batches = [batch for part in parts for batch in part]
            assert join(batches, "row_ids").tolist() == expected[step]
            offset = len(streams[0][0])
            streams_of = [int(row >= offset) for row in expected[step]]
            assert join(batches, "streams").tolist() == streams_of
            step += 1
        for rank in ranks:
            rank.close()
    assert step == 40


def test_ranks_read_shards_of_their_own(prepared):
    """With batches of 64 rows each of 4 ranks reads one quarter of the rows, but for the borders
    of epochs, where a batch holds the end of one and the beginning of the next."""
    rows = Rows.open(prepared.train)
    steps = len(rows) // 64
    for rank in range(4):
        loader = make_loader(
            [(rows, 1.0)], batch_rows=64, micro_batch_rows=16, rank=rank, num_ranks=4
        )
        read = np.concatenate(
            [join(loader.microbatches(step), "row_ids").numpy() for step in range(steps)]
        )
        assert np.all((read >= rank * len(rows) // 4 - 1) & (read <= (rank + 1) * len(rows) // 4))
        assert len(np.unique(read)) == len(read)
