"""Writing aside of training: what is raised, and what is never published."""

import errno
import threading
import time

import killed_savers
import pytest
import safetensors.torch
import torch

from shoal.configs.errors import ShoalError
from shoal.trainer import saver
from shoal.trainer.checkpoint import TensorReader, list_checkpoints, verify_checkpoint
from shoal.trainer.engine import STATES
from shoal.trainer.saver import Saver

pytestmark = pytest.mark.usefixtures("process_group")


def begin(writer, step):
    return writer.begin(killed_savers.StateOnly(step), step, {"streams": []}, {"seed": 1})


def steps(root):
    return [int(folder.name[5:]) for folder in list_checkpoints(root)]


def test_training_waits_for_the_copy_alone(tmp_path, monkeypatch):
    may_write, digest = threading.Event(), saver.digest
    monkeypatch.setattr(saver, "digest", lambda path: may_write.wait(30) and digest(path))
    writer = Saver(tmp_path, keep=2)
    assert begin(writer, 1) < 10
    assert steps(tmp_path) == [], "it is not there yet, and training goes on"
    may_write.set()
    writer.wait()
    assert steps(tmp_path) == [1]
    assert verify_checkpoint(list_checkpoints(tmp_path)[0]).position == {"streams": []}


def test_what_changes_after_the_copy_is_not_saved(tmp_path, monkeypatch):
    class Changing(killed_savers.StateOnly):
        held = torch.zeros(3, 5)
        parameter_shapes = {"a": (3, 5)}

        def read_slices(self):
            for state in STATES:
                yield "a", state, 0, self.held

    go, save_file = threading.Event(), safetensors.torch.save_file
    monkeypatch.setattr(
        safetensors.torch, "save_file", lambda *given: go.wait(30) and save_file(*given)
    )
    writer, engine = Saver(tmp_path, keep=2), Changing(1)
    writer.begin(engine, 1, {}, {})
    engine.held.fill_(7.0)
    go.set()
    writer.wait()
    (folder,) = list_checkpoints(tmp_path)
    assert float(TensorReader(folder, verify_checkpoint(folder)).read("a").abs().max()) == 0


@pytest.mark.parametrize("saves", [0, 1])
def test_an_attempt_that_was_taken_over_publishes_nothing(tmp_path, saves):
    old = Saver(tmp_path, keep=9)
    for step in range(1, saves + 1):
        begin(old, step)
    old.wait()
    new = Saver(tmp_path, keep=9)
    begin(old, 2)
    with pytest.raises(ShoalError, match="another attempt of this run has taken over"):
        old.wait()
    before = list(range(1, saves + 1))
    assert steps(tmp_path) == before
    begin(new, 3)
    new.wait()
    assert steps(tmp_path) == [*before, 3]


def test_what_befalls_the_writer_reaches_training(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    writer = Saver(tmp_path, keep=2)
    monkeypatch.setattr(saver, "sync", full)
    begin(writer, 1)
    deadline = time.monotonic() + 30
    with pytest.raises(OSError, match="No space left"):
        while time.monotonic() < deadline:
            writer.check()
            time.sleep(0.01)
    monkeypatch.undo()
    begin(writer, 2)
    writer.wait()
    assert steps(tmp_path) == [2]


def test_a_rank_that_does_not_write_is_named(tmp_path):
    writer = Saver(tmp_path, keep=2, timeout=0.2)
    writer.ranks = 2
    begin(writer, 1)
    with pytest.raises(ShoalError, match=r"1 ranks have not written .* the first is rank-00001"):
        writer.wait()
    assert steps(tmp_path) == []


@pytest.mark.parametrize("kept", [0, 4])
def test_what_does_not_hold_everything_is_not_published(tmp_path, kept):
    class Forgetful(killed_savers.StateOnly):
        def read_slices(self):
            for name, state, offset, values in super().read_slices():
                if (name, state) != ("b", "exp_avg"):
                    yield name, state, offset, values
                elif kept:
                    yield name, state, offset, values[:kept]

    writer = Saver(tmp_path, keep=2)
    writer.begin(Forgetful(1), 1, {}, {})
    with pytest.raises(ShoalError, match="exp_avg of b: not every one of 7 elements once"):
        writer.wait()
    assert steps(tmp_path) == []


def test_what_others_are_writing_is_left_alone(tmp_path):
    writer = Saver(tmp_path, keep=1)
    (tmp_path / ".partial-step-00000009-x").mkdir()  # a rank that is ahead
    for step in (1, 2):
        begin(writer, step)
    writer.finish()
    assert steps(tmp_path) == [2]
    assert (tmp_path / ".partial-step-00000009-x").is_dir()
    assert not list(tmp_path.glob(".partial-old*"))
    Saver(tmp_path, keep=1)
    assert not list(tmp_path.glob(".partial*")), "the next start clears it away"


def test_old_ones_go_when_the_new_one_is_there(tmp_path):
    writer = Saver(tmp_path, keep=2)
    for step in (1, 2, 3):
        begin(writer, step)
    writer.wait()
    assert steps(tmp_path) == [2, 3]
