"""Steps that cannot be taken, weights that are not alike: left out, gone back from, refused."""

import re
import shutil
import time
from types import SimpleNamespace

import engine_ranks
import pytest
from loop_runs import STEPS, curve, make_case, run, steps_on_disk

from shoal.configs.errors import (
    NonFiniteLossError,
    PreflightError,
    ReplicaError,
    StoppedOnRequest,
)
from shoal.trainer import checkpoint, saver
from shoal.trainer.engine import Engine
from shoal.trainer.ledger import read_ledger
from shoal.trainer.segment import Validation

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]


class Poisoned(engine_ranks.Source):
    """Destroys a weight of the engine before a step."""

    def __init__(self, engine, step):
        super().__init__(0, 1)
        self.engine, self.poisoned = engine, step

    def microbatches(self, step):
        if step == self.poisoned:
            self.engine.objective.model.final_norm.weight.data.fill_(float("nan"))
        return super().microbatches(step)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_with_a_gradient_that_is_no_number_is_left_out(ranks, tmp_path, stage):
    folder = tmp_path / "run"
    broken = {"steps": [3], "rank": 1}
    answer = ranks(2).run({"a": make_case(folder, run="loop", stage=stage, broken=broken)})["a"]
    assert answer["error"] is None
    reference = engine_ranks.train_plain(make_case(folder, left_out=[3]))["losses"]
    found = curve(folder)
    assert list(found) == [step for step in range(1, STEPS + 1) if step != 4]
    assert list(found.values()) == pytest.approx([*reference[:3], *reference[4:]], abs=1e-4)
    assert curve(folder, "skipped", "rows") == {4: [12, 13, 14, 15]}, "those of all ranks"
    assert curve(folder, "skipped", "grad_norm")[4] in ("nan", "inf")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_left_out_in_bf16_changes_no_bit(ranks, stage):
    """Neither of the fp32 masters, of the moments, nor of the bf16 weights, on any rank."""
    given = {"run": "watched", "kind": "dense", "precision": "bf16", "stage": stage, "steps": 4}
    broken = {"steps": [2], "rank": 1}
    answers = ranks(2).run(
        {
            "met": given | {"taken": [0, 1, 2, 3], "broken": broken},
            "never met": given | {"taken": [0, 1, 3]},
        }
    )
    met, never = answers["met"]["seen"], answers["never met"]["seen"]
    assert [[rank["taken"] for rank in step] for step in met] == [[True] * 2] * 2 + [
        [False] * 2, [True] * 2
    ]  # fmt: skip
    assert all(not rank["norm"] < float("inf") for rank in met[2]), "NaN or infinite"
    for before, after in zip(met[1], met[2], strict=True):
        assert after["held"] == before["held"]
    kinds = {key.partition("/")[0] for key in met[2][0]["held"]}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "forward torch.bfloat16"}
    assert met[3] == never[2], "loss, norm and all that is held, on every rank"
    changed = [key for key, bits in met[3][0]["held"].items() if bits != met[2][0]["held"][key]]
    assert {key.partition("/")[0] for key in changed} == kinds


def test_what_was_left_out_is_remembered_by_a_checkpoint(tmp_path):
    broken = {"steps": [1]}
    assert run(tmp_path / "whole", broken=broken)["error"] is None
    assert run(tmp_path / "run", broken=broken, stop_after=4)["error"] is not None
    assert run(tmp_path / "run", broken=broken)["error"] is None
    last = checkpoint.checkpoint_name(STEPS)
    whole, resumed = (
        checkpoint.verify_checkpoint(tmp_path / name / "checkpoints" / last)
        for name in ("whole", "run")
    )
    assert whole.files == resumed.files, "bit for bit: the optimiser counts its updates, not steps"
    assert resumed.position["skipped"] == 1
    assert [m.position["ledger"] for m in (whole, resumed)] == [1, 2], "what it had cost by then"
    assert curve(tmp_path / "run", "skipped", "rows") == {2: [4, 5, 6, 7]}


def test_broken_weights_are_not_saved_and_left_behind(tmp_path):
    folder = tmp_path / "run"
    engine = engine_ranks.build_engine(make_case(folder), 1)
    source, steps = Poisoned(engine, 3), 10
    answer = run(folder, steps=steps, every_steps=2, engine=engine, source=source)
    assert answer["error"] is None
    # From the fourth on four steps in a row; then on from step 2 with the batches after those.
    assert list(source.rows) == list(range(steps + 5))
    assert list(curve(folder)) == list(range(1, steps + 1))
    assert list(curve(folder, "skipped", "rows")) == [4, 5, 6, 7]
    last = checkpoint.verify_checkpoint(folder / "checkpoints" / checkpoint.checkpoint_name(steps))
    assert last.position["passed_over"] == 5
    entries = read_ledger(folder / "ledger.jsonl")
    totals = [entry.streams_total["all"] for entry in entries]
    assert totals == sorted(totals) and totals[-1] == (steps + 5) * engine_ranks.ROWS


class Dying(engine_ranks.Source):
    """Spoils every weight, on all ranks alike, once a step is saved and before the next."""

    def __init__(self, engine, step):
        super().__init__(0, 1)
        self.engine, self.last = engine, step

    def microbatches(self, step):
        if step == self.last - 1:
            train_step = self.engine.train_step

            def spoil(*given):
                result = train_step(*given)
                self.engine.objective.model.final_norm.weight.data.fill_(float("nan"))
                self.engine.train_step = train_step
                return result

            self.engine.train_step = spoil
        return super().microbatches(step)


def test_weights_that_no_step_can_be_taken_from_are_no_checkpoint(tmp_path):
    """They are alike on all ranks, and the loss of the step that made them was a number."""
    folder = tmp_path / "run"
    engine = engine_ranks.build_engine(make_case(folder), 1)
    answer = run(folder, steps=12, every_steps=2, engine=engine, source=Dying(engine, 4))
    assert answer["error"] is None
    assert list(curve(folder, "skipped", "rows")) == [5, 6, 7, 8]
    last = checkpoint.verify_checkpoint(folder / "checkpoints" / checkpoint.checkpoint_name(12))
    assert last.position["passed_over"] == 6, "from step 2, not from 4"


def test_a_stop_while_steps_cannot_be_taken_keeps_what_is_sound(tmp_path):
    folder = tmp_path / "run"
    engine = engine_ranks.build_engine(make_case(folder), 1)
    more = {"steps": 12, "every_steps": 2, "engine": engine, "stop_after": 6}
    answer = run(folder, source=Dying(engine, 4), **more)
    assert answer["error"][0] == StoppedOnRequest.__name__
    assert "after step 6 of 12; step 2 is saved" in answer["error"][1]
    assert steps_on_disk(folder) == [2]


def test_a_validation_loss_that_is_no_number_spoils_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "evaluate", lambda *_: (float("nan"), 1))
    batches = engine_ranks.microbatches(0, 0, 1)
    answer = run(tmp_path / "run", validation=Validation(batches, text_bytes=100))
    assert answer["error"] is None
    folder = tmp_path / "run" / "checkpoints" / checkpoint.checkpoint_name(STEPS)
    assert checkpoint.verify_checkpoint(folder).loss is None


def test_a_run_in_which_no_step_can_be_taken_ends(tmp_path):
    folder = tmp_path / "run"
    answer = run(folder, broken={"steps": list(range(100))}, every_steps=2)
    kind, text = answer["error"]
    assert kind == NonFiniteLossError.__name__
    assert "4 steps in a row cannot be taken; step 4 has loss" in text
    assert "[12, 13, 14, 15]" in text and "newest checkpoint is step 0" in text
    assert steps_on_disk(folder) == []
    assert [entry.note for entry in read_ledger(folder / "ledger.jsonl")] == ["steps 0 to 4"]


def test_a_run_that_went_back_in_vain_ends(tmp_path):
    folder = tmp_path / "run"
    answer = run(folder, steps=10, broken={"steps": list(range(2, 100))}, every_steps=1)
    assert answer["error"][0] == NonFiniteLossError.__name__
    assert steps_on_disk(folder) == [1], "the last that a step was taken from"
    assert list(answer["rows"]) == list(range(10)), "twice four of them left out"


def test_a_run_does_not_end_with_weights_that_are_no_numbers(tmp_path):
    folder = tmp_path / "run"
    engine = engine_ranks.build_engine(make_case(folder), 1)
    batches = engine_ranks.microbatches(0, 0, 1)
    answer = run(
        folder,
        engine=engine,
        source=Poisoned(engine, STEPS - 1),
        validation=Validation(batches, text_bytes=100),
    )
    assert answer["error"][0] == NonFiniteLossError.__name__
    assert "weights that are no numbers" in answer["error"][1]
    assert steps_on_disk(folder) == []


def test_every_rank_ends_at_losses_that_are_no_numbers(ranks, tmp_path):
    case = make_case(tmp_path / "run", run="loop", stage=2, optim={"lr": 1e30, "clip_norm": 0.0})
    answer = ranks(2).run({"a": case})["a"]
    assert answer["error"][0] == NonFiniteLossError.__name__ and not steps_on_disk(tmp_path / "run")
    assert ranks(2).run({"b": make_case(tmp_path / "b", run="loop", stage=2)})["b"]["error"] is None


@pytest.mark.parametrize("every", [{"compare_every": 1}, {"every_steps": 4}], ids=["own", "save"])
def test_a_bit_that_flips_on_one_rank_is_found_and_never_saved(ranks, tmp_path, every):
    case = make_case(tmp_path / "run", run="loop", flip=(3, 1), **{"every_steps": 2, **every})
    answer = ranks(3).run({"a": case})["a"]
    kind, text = answer["error"]
    assert kind == ReplicaError.__name__
    assert re.search("the weights of rank 1 on .* are not those of the others after step 5", text)
    assert steps_on_disk(tmp_path / "run") == ([2] if case["every_steps"] == 2 else [])
    again = ranks(3).run({"b": {**case, "flip": None}})["b"]
    assert again["error"] is None


@pytest.mark.parametrize("stage", [0, 1])
def test_a_bit_that_spoils_the_loss_is_no_fault_of_the_rows(ranks, tmp_path, stage):
    case = make_case(tmp_path / "run", run="loop", flip=(3, 1), bit=30, stage=stage, every_steps=2)
    kind, text = ranks(2).run({"a": case})["a"]["error"]
    assert kind == ReplicaError.__name__ and "after step 4" in text
    assert steps_on_disk(tmp_path / "run") == [2]
    assert ranks(2).run({"b": {**case, "flip": None}})["b"]["error"] is None
    assert list(curve(tmp_path / "run")) == list(range(1, STEPS + 1)), "no step was left out"


@pytest.mark.parametrize("stage", [1, 2])
def test_sound_replicas_are_alike_at_every_stage(ranks, tmp_path, stage):
    case = make_case(tmp_path / "run", run="loop", stage=stage, compare_every=1)
    assert ranks(3).run({"a": case})["a"]["error"] is None


def test_what_a_comparison_after_it_does_not_confirm_is_no_checkpoint(ranks, tmp_path):
    """The bit flips after step 4 was saved; the run goes on from step 2 as if it had not."""
    case = make_case(tmp_path / "run", run="loop", stage=0, every_steps=2)
    answer = ranks(2).run({"a": case | {"flip": (4, 1)}})["a"]
    assert answer["error"][0] == ReplicaError.__name__ and "after step 5" in answer["error"][1]
    assert steps_on_disk(tmp_path / "run") == [2]
    again = ranks(2).run({"b": case, "c": {**case, "folder": str(tmp_path / "whole")}})
    assert again["b"]["error"] is None and list(again["b"]["rows"]) == [2, 3, 4, 5]
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


@pytest.mark.parametrize("stop", [{}, {"stop_after": 4}], ids=["end", "stop"])
def test_the_last_checkpoint_is_compared_before_the_run_ends(tmp_path, monkeypatch, stop):
    compared, whole = [], Engine.compare_replicas
    monkeypatch.setattr(
        Engine, "compare_replicas", lambda engine: compared.append(1) or whole(engine)
    )
    run(tmp_path / "run", **stop)
    assert len(compared) == 1
    monkeypatch.setattr(Engine, "compare_replicas", lambda engine: [0])
    answer = run(tmp_path / "other", **stop)
    assert answer["error"][0] == ReplicaError.__name__ and steps_on_disk(tmp_path / "other") == []


def test_a_full_disk_on_one_rank_ends_all_and_loses_nothing(ranks, tmp_path):
    case = make_case(tmp_path / "run", run="loop", stage=1, every_steps=2)
    begun = time.monotonic()
    answer = ranks(2).run({"a": case | {"full": (1, 4)}})["a"]
    kind, text = answer["error"]
    assert kind == PreflightError.__name__ and "No space left" in text and "fix: free" in text
    assert time.monotonic() - begun < saver.LEAVE_SECONDS, "nobody waits for what cannot come"
    assert str(tmp_path / "run" / "checkpoints") in text
    assert steps_on_disk(tmp_path / "run") == [2]
    assert ranks(2).run({"b": case})["b"]["error"] is None
    assert steps_on_disk(tmp_path / "run") == [4, 6]


def test_too_little_room_is_found_before_a_save(tmp_path, monkeypatch):
    free = 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    class Filling(engine_ranks.Source):
        def microbatches(self, step):
            nonlocal free
            free = 0 if step == 2 else free
            return super().microbatches(step)

    answer = run(tmp_path / "run", every_steps=2, source=Filling(0, 1))
    assert answer["error"][0] == PreflightError.__name__ and "free some space" in answer["error"][1]
    assert steps_on_disk(tmp_path / "run") == [2], "what was being written then is there"
    assert list(answer["rows"]) == [0, 1, 2, 3], "before the fourth step, which would be saved"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, None),
        ({"optim": {"lr": 0.5}}, "rank 1 was given another optim.lr (0.5, on rank 0 "),
        ({"streams": "b"}, "rank 1 was given another streams (b, on rank 0 a)"),
    ],
)
def test_ranks_that_would_not_train_the_same_are_refused(ranks, tmp_path, given, named):
    case = make_case(tmp_path / "run", run="alike", **{"rank 1": given})
    error = ranks(2).run({"a": case})["a"]["error"]
    assert (error is None) == (named is None)
    assert named is None or (error[0] == "ConfigError" and named in error[1])
