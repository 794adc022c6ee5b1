"""The training loop: resuming, refusing, recording; all of it with a real engine."""

import json
import math
import shutil

import engine_ranks
import pytest
import torch
import torch.nn.functional as F
from engine_ranks import CONTEXT, ROWS
from loop_runs import STEPS, curve, make_case, run, steps_on_disk

from shoal.configs.errors import ConfigError, DataError, StoppedOnRequest
from shoal.data_pipeline.batch import IGNORE
from shoal.kernels.backend import Kernels
from shoal.trainer import checkpoint
from shoal.trainer.engine import Engine
from shoal.trainer.identity import check_same_inputs, check_same_run
from shoal.trainer.ledger import read_ledger
from shoal.trainer.metrics import read_metrics
from shoal.trainer.model import Transformer
from shoal.trainer.segment import Validation, dropout_seed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]

# Losses near 4 have an ulp of 5e-7; other ranks sum in another order, for up to 6 steps.
SUMMATION_ORDER = 5e-6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, by kind."""
    known = {}

    def get(kind="dense", **more):
        key = (kind, *more.items())
        if key not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            known[key] = (folder, run(folder, kind=kind, **more))
        return known[key]

    return get


# Resuming.


@pytest.mark.parametrize("kind", ["dense", "dropout", "moe"])
def test_a_run_stopped_at_any_step_ends_as_if_never_stopped(whole, tmp_path, kind):
    straight, answer = whole(kind)
    assert answer["error"] is None and list(answer["rows"]) == list(range(STEPS))
    for stop in range(1, STEPS) if kind == "dense" else (2,):
        folder = tmp_path / f"stopped-{stop}"
        first = run(folder, kind=kind, stop_after=stop)
        assert (
            first["error"][0] == "StoppedOnRequest" and f"after step {stop} " in first["error"][1]
        )
        assert steps_on_disk(folder) == [stop]
        second = run(folder, kind=kind)
        assert second["error"] is None and list(second["rows"]) == list(range(stop, STEPS))
        read = {step: rows for step, rows in first["rows"].items() if step < stop}
        assert read | second["rows"] == answer["rows"]
        assert curve(folder) == curve(straight)  # on one rank the order of sums is the same
    last = [
        checkpoint.read_manifest(f / "checkpoints" / "step-00000006") for f in (folder, straight)
    ]
    assert last[0].files == last[1].files  # sizes and hashes of all weights and moments


def test_changing_ranks_and_stages_on_the_way(whole, ranks, tmp_path):
    straight, _ = whole("dense")
    folder = tmp_path / "run"
    assert run(folder, stop_after=2)["error"][0] == StoppedOnRequest.__name__
    for number, stage in ((2, 3), (3, 1)):  # one step each
        case = make_case(folder, run="loop", stage=stage, stop_after=1)
        answer = ranks(number).run({"loop": case})["loop"]
        assert answer["error"][0] == StoppedOnRequest.__name__
    assert steps_on_disk(folder) == [3, 4]
    assert run(folder)["error"] is None
    assert list(curve(folder)) == list(range(1, STEPS + 1))
    assert list(curve(folder).values()) == pytest.approx(
        list(curve(straight).values()), abs=SUMMATION_ORDER
    )


def test_rows_do_not_depend_on_the_ranks(whole, ranks, tmp_path):
    _, answer = whole("dense")
    shares = ranks(2).run({"a": make_case(tmp_path / "a", run="loop", stage=1)})["a"]["rows"]
    for step, rows in answer["rows"].items():
        assert shares[step] == rows[: ROWS // 2]  # of rank 0


def test_dropout_on_ranks_without_rows_survives_a_resume(ranks, tmp_path):
    """On 3 ranks the last one has only padding; its random state must not matter or drift."""
    group, common = ranks(3), {"run": "loop", "kind": "dropout", "stage": 1}
    answers = group.run(
        {
            "whole": make_case(tmp_path / "whole", **common),
            "first": make_case(tmp_path / "parts", **common, stop_after=3),
            "second": make_case(tmp_path / "parts", **common),
        }
    )
    assert [a["error"] and a["error"][0] for a in answers.values()] == [
        None, "StoppedOnRequest", None]  # fmt: skip
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_dropout_is_a_function_of_seed_step_and_rows(whole):
    assert curve(whole("dropout")[0]) != curve(whole("dense")[0])
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]  # rows come back in a second epoch
    assert len({dropout_seed(*place) for place in places}) == len(places)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(whole, tmp_path, capsys):
    straight, _ = whole("dense")
    folder = tmp_path / "run"
    run(folder, every_steps=2, stop_after=5)
    assert steps_on_disk(folder) == [4, 5]  # keep is 2
    file = folder / "checkpoints" / "step-00000005" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    answer = run(folder, every_steps=2)
    assert "passed over" in capsys.readouterr().out and list(answer["rows"]) == [4, 5]
    assert list(curve(folder)) == list(range(1, STEPS + 1))
    assert curve(folder) == curve(straight)


def test_what_a_killed_saver_left_is_cleared_away(tmp_path):
    folder = tmp_path / "run"
    run(folder, stop_after=2)
    sound = folder / "checkpoints" / "step-00000002"
    shutil.copytree(sound, sound.with_name(".partial-step-00000003"))
    assert run(folder)["error"] is None
    assert steps_on_disk(folder) == [2, 6]
    assert not list((folder / "checkpoints").glob(".partial*"))


def test_a_finished_run_costs_nothing(tmp_path, whole):
    straight, _ = whole("dense")
    folder = shutil.copytree(straight, tmp_path / "run")
    before = (folder / "ledger.jsonl").read_text()
    answer = run(folder)
    assert answer["error"] is None and not answer["rows"]
    assert curve(folder) == curve(straight)
    assert (folder / "ledger.jsonl").read_text() == before


def test_a_stop_before_the_first_step_saves_nothing(tmp_path):
    answer = run(tmp_path / "run", stop_after=0)
    assert answer["error"] == [
        "ShoalError", f"{tmp_path / 'run'}: stopped on request before there was anything to save"
    ]  # fmt: skip
    assert steps_on_disk(tmp_path / "run") == []


def test_a_run_goes_on_from_another_ones_checkpoint(whole, tmp_path):
    straight, _ = whole()
    source = tmp_path / "first"
    run(source, every_steps=2, stop_after=4)
    for resume in (source, source / "checkpoints" / checkpoint.checkpoint_name(4)):
        folder = tmp_path / f"from-{resume.name}"
        assert run(folder, resume=str(resume))["error"] is None
        assert list(curve(folder)) == [5, 6], "its own record begins there"
        assert curve(folder) == {step: curve(straight)[step] for step in (5, 6)}
    before = steps_on_disk(folder)
    assert run(folder, resume=str(tmp_path / "nowhere"))["error"] is None, "it has its own by now"
    assert steps_on_disk(folder) == before


def test_nothing_to_go_on_from_is_no_fresh_start(tmp_path):
    (tmp_path / "empty").mkdir()
    answer = run(tmp_path / "run", resume=str(tmp_path / "empty"))
    assert (
        answer["error"][0] == DataError.__name__ and "there is no checkpoint" in answer["error"][1]
    )
    assert not curve(tmp_path / "run") and not steps_on_disk(tmp_path / "run")


def test_a_change_may_be_allowed_by_name(tmp_path):
    run(tmp_path / "run", stop_after=3)
    changed = {"optim": {"lr": 0.02}}
    refused = run(tmp_path / "run", **changed)["error"]
    assert refused[0] == ConfigError.__name__ and "optim.lr (was 0.01, now 0.02)" in refused[1]
    assert run(tmp_path / "run", **changed, allow_changes=["optim.lr"])["error"] is None


# Refusing.


CHANGES = {
    "optim": {"optim": {"lr": 1.0}},
    "seed": {"seed": 5},
    "model": {"model": {"dropout": 0.5}},
    "train.tokens": {"train": {"tokens": 10**6}},
    "train.batch_rows": {"train": {"batch_rows": 8}},
    "train.precision": {"train": {"precision": "bf16", "zero_stage": 1}},
    "teacher": {"teacher": {"path": "x"}},
    "data.document_mask": {"data": {"document_mask": False}},
}
FREE = {
    "ranks": {"world": {"ranks": 7}},
    "stage": {"train": {"zero_stage": 3}},
    "portions": {"train": {"micro_batch_rows": 7}},
    "recomputation": {"train": {"activation_checkpointing": True}},
    "compilation": {"train": {"compile": True}},
    "kernels": {"kernels": {"attention": "reference"}},
    "checkpoints": {"checkpoint": {"every_steps": 3, "keep": 9}},
    "validation": {"validation": {"every_steps": 3}},
    "where": {"output": "elsewhere"},
    "folders": {"data": {"train": [{"path": "moved"}]}},
    "booking": {"ledger": {"scope": "generic"}},
}


def changed(config, change):
    tree = config.model_dump(mode="json")
    for key, value in change.items():
        merged = isinstance(value, dict) and isinstance(tree[key], dict)
        tree[key] = tree[key] | value if merged else value
    return type(config).model_validate(tree)


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_give_another_result_is_refused(name, tmp_path):
    config = engine_ranks.run_config(make_case(tmp_path / "run"))
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    check_same_run(stored, config, where=tmp_path)
    with pytest.raises(ConfigError, match="another " + name) as error:
        check_same_run(stored, changed(config, CHANGES[name]), where=tmp_path)
    assert error.value.fix and error.value.where == str(tmp_path)


@pytest.mark.parametrize("name", FREE)
def test_what_gives_the_same_result_may_change(name, tmp_path):
    config = engine_ranks.run_config(make_case(tmp_path / "run"))
    check_same_run(config.model_dump(mode="json"), changed(config, FREE[name]), where=tmp_path)


@pytest.mark.parametrize("kind", ["dropout", "moe"])
def test_portions_may_not_change_where_the_result_depends_on_them(kind, tmp_path):
    config = engine_ranks.run_config(make_case(tmp_path / "run", kind=kind))
    other = changed(config, FREE["portions"])
    with pytest.raises(ConfigError, match=r"another train\.micro_batch_rows"):
        check_same_run(config.model_dump(mode="json"), other, where=tmp_path)


def test_another_teacher_of_the_same_name_is_refused(tmp_path):
    stored = {"streams": [["a", 1.0]], "teacher": {"model.safetensors": "old"}}
    check_same_inputs(stored, {"streams": [["a", 1.0]]}, where=tmp_path)  # as an export asks
    with pytest.raises(DataError, match="another teacher"):
        check_same_inputs(stored, stored | {"teacher": {"model.safetensors": "new"}}, tmp_path)


def test_the_loop_itself_refuses_another_rate_and_other_rows(tmp_path):
    folder = tmp_path / "run"
    position = {"streams": [["hash a", 1.0], ["hash b", 0.25]]}
    run(folder, stop_after=2, position=position)
    before = (folder / "metrics.jsonl").read_text()
    kind, text = run(folder, optim={"lr": 0.5}, position=position)["error"]
    assert kind == ConfigError.__name__ and "another optim" in text
    kind, text = run(folder, position={"streams": [["hash c", 1.0]]})["error"]
    assert kind == DataError.__name__ and "other rows" in text and "hash c" in text
    assert (folder / "metrics.jsonl").read_text() == before
    assert run(folder, position=position)["error"] is None


# Recording.


def test_metrics_hold_every_step_once_after_a_kill(whole, tmp_path):
    """A kill loses the steps after the newest checkpoint, and may tear the last line."""
    straight, _ = whole("dense")
    folder = tmp_path / "run"
    run(folder, every_steps=2, stop_after=5)
    shutil.rmtree(folder / "checkpoints" / "step-00000005")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    assert run(folder, every_steps=2)["error"] is None
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r["kind"] == "start"] == [0, 4]
    assert curve(folder) == curve(straight)


def test_records_say_what_was_done(whole):
    folder, _ = whole("moe")
    start, *steps, saved = read_metrics(folder / "metrics.jsonl")
    assert (saved["kind"], saved["step"]) == ("checkpoint", STEPS) and saved["seconds"] > 0
    assert start == {"kind": "start", "step": 0, "ranks": 1, "device": "cpu"}
    for record in steps:
        step = record["step"]
        assert record["tokens"] == step * ROWS * CONTEXT and record["seconds"] > 0
        real = engine_ranks.count_tokens(step - 1)
        assert record["tokens_per_second"] == pytest.approx(real / record["seconds"], rel=0.05)
        assert 0.9 < record["balance"] < 4 and record["router_z"] > 0 and record["grad_norm"] > 0
        assert len(record["expert_load"]) == 4
        assert sum(record["expert_load"]) == pytest.approx(1.0, abs=1e-5)
    rates = list(curve(folder, key="lr").values())
    assert rates[1] == max(rates) == 1e-2 and rates[-1] == pytest.approx(1e-3)


def test_ledger_entries_add_up_to_the_steps(tmp_path):
    folder = tmp_path / "run"
    run(folder, every_steps=2, stop_after=3)
    run(folder, every_steps=2)
    entries = read_ledger(folder / "ledger.jsonl")
    cuts = ((0, 2), (2, 3), (3, 4), (4, 6))
    assert [entry.note for entry in entries] == [f"steps {a} to {b}" for a, b in cuts]
    assert (tokens := sum(e.tokens for e in entries)) == STEPS * ROWS * CONTEXT
    real = sum(map(engine_ranks.count_tokens, range(STEPS)))
    assert sum(e.streams["all"] for e in entries) == real < tokens
    assert [e.streams_total["all"] for e in entries] == [last * ROWS for _, last in cuts]
    assert sum(e.flops for e in entries) == tokens * engine_ranks.FLOPS_PER_TOKEN
    assert sum(e.seconds for e in entries) >= sum(curve(folder, key="seconds").values())
    assert all(e.kind == "train" and e.stage == "run" and e.devices == 1 for e in entries)


def test_device_seconds_count_every_rank(ranks, tmp_path):
    case = make_case(tmp_path / "run", run="loop", stage=1)
    ranks(2).run({"a": case})
    (entry,) = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert entry.devices == 2 and entry.device_seconds == 2 * entry.seconds
    assert entry.tokens == STEPS * ROWS * CONTEXT  # not once a rank


@torch.no_grad()
def spell_out_validation(folder, kind, batches):
    """Nats and targets of the saved weights, from whole logits in fp64."""
    found = checkpoint.newest_checkpoint(folder / "checkpoints")
    model = Transformer(engine_ranks.shape(kind), Kernels("reference", "loop", 8)).eval()
    reader = checkpoint.TensorReader(*found)
    model.load_state_dict({name: reader.read(name) for name in found[1].tensors})
    nats, count = 0.0, 0
    for batch in batches:
        logits = model.logits(batch.inputs, batch.segments).double()
        real = batch.targets != IGNORE
        nats += F.cross_entropy(logits[real], batch.targets[real], reduction="sum").item()
        count += int(real.sum())
    return nats, count


@pytest.mark.parametrize("kind", ["dense", "dropout"])
def test_validation_in_bits_per_byte(tmp_path, kind):
    folder = tmp_path / "run"
    batches = [*engine_ranks.microbatches(100, 0, 1), *engine_ranks.microbatches(101, 0, 1)]
    validation = Validation(batches, text_bytes=400)
    answer = run(folder, kind=kind, validation=validation, validate_every=4)
    assert list(curve(folder, "validation")) == [4, 6]  # every 4 steps, and at the end
    nats, count = spell_out_validation(folder, kind, batches)
    record = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "validation"][-1]
    # fp32 sums of about 120 terms against fp64.
    assert record["loss"] == answer["loss"] == pytest.approx(nats / count, rel=1e-6)
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / 400, rel=1e-6)
    assert record["bits_per_byte"] / record["loss"] != pytest.approx(1 / math.log(2), rel=0.5)


def test_milestones_and_the_best_stay(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(Engine, "evaluate", lambda engine, batches: (next(losses), 1))
    validation = Validation(engine_ranks.microbatches(100, 0, 1), text_bytes=400)
    given = {"validation": validation, "steps": 8, "every_steps": 2}
    folder = tmp_path / "run"
    assert run(folder, keep_best=True, stop_after=5, **given)["error"] is not None
    assert steps_on_disk(folder) == [4, 5], "a stop is not validated"
    run(folder, keep_best=True, milestone_every=8, **given)
    assert steps_on_disk(folder) == [4, 6, 8], "the best, and the newest two"
    found = [checkpoint.read_loss(folder / "checkpoints" / f"step-{s:08d}") for s in (4, 6, 8)]
    assert found == [1.0, 2.0, 2.5]


def test_a_long_load_is_no_hang(tmp_path):
    told = []
    run(tmp_path / "run", stop_after=2)
    run(tmp_path / "run", progress=told.append)
    for words in ("looking for checkpoints", "verifying step-00000002", "loading step-00000002"):
        assert words in told


def test_validation_leaves_training_as_it_was(whole, tmp_path):
    """With dropout: what validation draws or switches must not be felt by the next step."""
    validation = Validation(engine_ranks.microbatches(100, 0, 1), text_bytes=400)
    folder = tmp_path / "run"
    run(folder, kind="dropout", validation=validation, validate_every=1)
    assert curve(folder) == curve(whole("dropout")[0])


def test_several_validation_splits_are_scored_together_and_each_alone(tmp_path):
    folder = tmp_path / "run"
    first, second = (engine_ranks.microbatches(step, 0, 1) for step in (100, 101))
    general = Validation(first, 300, "general", more=(Validation(second, 100, "law"),))
    run(folder, validation=general)
    (record,) = (r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "validation")
    sums = [spell_out_validation(folder, "dense", batches) for batches in (first, second)]
    nats, count = (sum(column) for column in zip(*sums, strict=True))
    assert record["loss"] == pytest.approx(nats / count, rel=1e-6)
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / 400, rel=1e-6)
    expected = {
        name: part / tokens for name, (part, tokens) in zip(("general", "law"), sums, strict=True)
    }
    assert record["streams"] == pytest.approx(expected, rel=1e-6)
