"""Writing aside of training: what is raised, and what is never published."""

import errno
import io
import os
import shutil
import socket
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import killed_savers
import pytest
import torch

from shoal.configs.errors import PreflightError, ShoalError
from shoal.trainer import saver, storage
from shoal.trainer.bucket import Bucket
from shoal.trainer.checkpoint import (
    Retention,
    TensorReader,
    list_checkpoints,
    read_manifest,
    verify_checkpoint,
)
from shoal.trainer.saver import Saver
from shoal.trainer.stores import SharedFolder

pytestmark = pytest.mark.usefixtures("process_group")


def make(root, keep, timeout=600, **rule):
    return Saver(SharedFolder(root, timeout), Retention(keep, **rule))


def begin(writer, step, **more):
    return writer.begin(killed_savers.StateOnly(step), step, {"streams": []}, {"seed": 1}, **more)


def hold_writing(monkeypatch):
    """Let nothing be written before the event that is returned is set."""
    go, write = threading.Event(), saver.write_pieces
    monkeypatch.setattr(saver, "write_pieces", lambda *given: go.wait(30) and write(*given))
    return go


def steps(root):
    return [int(folder.name[5:]) for folder in list_checkpoints(root)]


def test_training_waits_for_the_copy_alone(tmp_path, monkeypatch):
    may_write = hold_writing(monkeypatch)
    writer = make(tmp_path, 2)
    begin(writer, 1)
    assert steps(tmp_path) == [], "it is not there yet, and training goes on"
    may_write.set()
    writer.finish()
    assert steps(tmp_path) == [1]
    assert verify_checkpoint(list_checkpoints(tmp_path)[0]).position == {"streams": []}


def test_what_changes_after_the_copy_is_not_saved(tmp_path, monkeypatch):
    class Changing(killed_savers.StateOnly):
        held = torch.zeros(3, 5)
        parameter_shapes = {"a": (3, 5)}
        parameter_states = {"a": killed_savers.STATES}

        def read_slices(self):
            for state in killed_savers.STATES:
                yield "a", state, 0, self.held

    go = hold_writing(monkeypatch)
    writer, engine = make(tmp_path, 2), Changing(1)
    writer.begin(engine, 1, {}, {})
    engine.held.fill_(7.0)
    go.set()
    writer.finish()
    (folder,) = list_checkpoints(tmp_path)
    assert float(TensorReader(folder, verify_checkpoint(folder)).read("a").abs().max()) == 0


def test_every_save_holds_its_own_values(tmp_path):
    writer = make(tmp_path, 2)
    for step in (1, 2):
        begin(writer, step)
    writer.finish()
    for folder in list_checkpoints(tmp_path):
        manifest = verify_checkpoint(folder)
        reader = TensorReader(folder, manifest)
        for name, state, _, values in killed_savers.StateOnly(manifest.step).read_slices():
            assert torch.equal(reader.read(name, state), values)


@pytest.mark.parametrize("saves", [0, 1])
def test_an_attempt_that_was_taken_over_publishes_nothing(tmp_path, saves):
    old = make(tmp_path, 9)
    for step in range(1, saves + 1):
        begin(old, step)
    old.finish()
    new = make(tmp_path, 9)
    begin(old, 2)
    with pytest.raises(ShoalError, match="another attempt of this run has taken over"):
        old.finish()
    before = list(range(1, saves + 1))
    assert steps(tmp_path) == before
    begin(new, 3)
    new.finish()
    assert steps(tmp_path) == [*before, 3]


def test_what_befalls_the_writer_reaches_training(tmp_path, monkeypatch):
    def full(stream):
        raise OSError(errno.ENOSPC, "No space left on device", stream.name)

    writer = make(tmp_path, 2)
    monkeypatch.setattr(storage, "force", full)
    begin(writer, 1)
    deadline = time.monotonic() + 30
    while (error := writer.find_trouble()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert isinstance(error, PreflightError) and "No space left" in error.cause
    assert error.where.startswith(str(tmp_path)) and error.fix
    assert not list(tmp_path.glob("**/*.safetensors")), "what does not fit is not left there"
    monkeypatch.undo()
    begin(writer, 2)
    writer.finish()
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("slow", ["write", "sync"])
def test_a_slow_disk_is_told_from_one_that_hangs(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(storage, "CHUNK_BYTES", 32)
    monkeypatch.setattr(storage, "SYNC_BYTES", 32 if slow == "sync" else 1 << 20)
    calls, hung, told = [], [], []

    def disk():
        calls.append(time.monotonic())
        time.sleep(0.05)
        if len(calls) == 20:
            hung.append(time.monotonic())
            time.sleep(1)
            hung.append(time.monotonic())

    class SlowFile(io.FileIO):
        def write(self, data):
            disk()
            return super().write(data)

    def open_slowly(path, mode="r", *rest, **more):
        own = path.suffix == ".safetensors" and mode == "wb"
        return SlowFile(path, mode) if own else real_open(path, mode, *rest, **more)

    real_open, fsync = Path.open, os.fsync
    if slow == "write":
        monkeypatch.setattr(Path, "open", open_slowly)
    else:
        monkeypatch.setattr(os, "fsync", lambda handle: disk() or fsync(handle))
    writer = make(tmp_path, 2)
    begin(writer, 1)
    writer.finish(lambda doing: told.append(time.monotonic()))
    moving = [calls[0], *(moment for moment in told if moment < hung[0]), hung[0]]
    assert max(later - before for before, later in pairwise(moving)) < (hung[0] - calls[0]) / 2
    assert sum(hung[0] < moment < hung[1] for moment in told) <= 1, "of what came just before"
    assert steps(tmp_path) == [1]
    assert verify_checkpoint(list_checkpoints(tmp_path)[0])


def test_a_rank_that_does_not_write_is_named(tmp_path):
    writer = make(tmp_path, 2, timeout=0.2)
    writer.store.ranks = 2
    begin(writer, 1)
    with pytest.raises(ShoalError, match=r"1 ranks have not written .* the first is rank-00001"):
        writer.finish()
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

    writer = make(tmp_path, 2)
    writer.begin(Forgetful(1), 1, {}, {})
    with pytest.raises(ShoalError, match="exp_avg of b: not every one of 7 elements once"):
        writer.finish()
    assert steps(tmp_path) == []


def test_what_others_are_writing_is_left_alone(tmp_path):
    writer = make(tmp_path, 1)
    (tmp_path / ".partial-step-00000009-x").mkdir()  # a rank that is ahead
    for step in (1, 2):
        begin(writer, step)
    writer.finish()
    assert steps(tmp_path) == [2]
    assert (tmp_path / ".partial-step-00000009-x").is_dir()
    assert not list(tmp_path.glob(".partial-old*"))
    make(tmp_path, 1)
    assert not list(tmp_path.glob(".partial*")), "the next start clears it away"


def test_old_ones_go_when_the_new_one_is_there(tmp_path):
    writer = make(tmp_path, 2)
    for step in (1, 2, 3):
        begin(writer, step)
    writer.finish()
    assert steps(tmp_path) == [2, 3]


def test_what_nobody_vouches_for_is_never_there(tmp_path):
    writer = make(tmp_path, 1)
    begin(writer, 1)
    writer.finish()
    begin(writer, 2, sound=False)
    assert writer.awaits_word
    time.sleep(0.3)
    assert steps(tmp_path) == [1], "neither the new one, nor is the old one gone"
    writer.vouch(sound=False)
    writer.finish()
    assert steps(tmp_path) == [1] and not list(tmp_path.glob(".partial*"))
    begin(writer, 3, sound=False)
    writer.vouch(sound=True)
    writer.finish()
    assert steps(tmp_path) == [3]
    begin(writer, 4, sound=False)
    writer.leave()
    assert steps(tmp_path) == [3]


LOSSES = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.5, 6: None}
RULES = {
    "newest": ({}, [5, 6]),
    "milestones": ({"milestone_every": 2}, [2, 4, 5, 6]),
    "best": ({"best": True}, [2, 5, 6]),
    "both": ({"milestone_every": 4, "best": True}, [2, 4, 5, 6]),
}


@pytest.mark.parametrize("name", RULES)
def test_what_stays_beside_the_newest(tmp_path, name):
    rule, kept = RULES[name]
    writer = make(tmp_path, 2, **rule)
    for step, loss in LOSSES.items():
        begin(writer, step, loss=loss)
    writer.finish()
    assert steps(tmp_path) == kept
    for step in kept:
        assert read_manifest(tmp_path / f"step-{step:08d}").loss == LOSSES[step]


def test_a_better_one_takes_the_place_of_the_best(tmp_path):
    writer = make(tmp_path, 1, best=True)
    for step, loss in {1: 2.0, 2: 3.0, 3: 1.5, 4: 1.5, 5: 9.0}.items():
        begin(writer, step, loss=loss)
    writer.finish()
    assert steps(tmp_path) == [4, 5], "of two that are as good the newer"


class Half(killed_savers.StateOnly):
    """Holds one parameter; the others are on other ranks."""

    def read_slices(self):
        return (piece for piece in super().read_slices() if piece[0] == "a")


@pytest.mark.parametrize("place", ["shared folder", "object storage"])
def test_room_is_looked_for_before_it_is_needed(tmp_path, monkeypatch, place):
    if place == "shared folder":
        store, needed = SharedFolder(tmp_path), 4 * 3 * (15 + 7 + 1)
    else:  # parts alone are written here, on their way there
        store, needed = Bucket(f"memory://{tmp_path}", tmp_path), 4 * 3 * 15
    writer, engine = Saver(store, Retention(2)), Half(1)
    free = needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert writer.find_shortage(engine) is None
    free -= 1
    error = writer.find_shortage(engine)
    assert isinstance(error, PreflightError) and socket.gethostname() in error.cause
    assert error.where == str(tmp_path) and "free some space" in error.fix
