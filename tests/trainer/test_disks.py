"""Checkpoints on disks of every host: each has its copies, and one that is lost is brought back."""

import shutil
import socket
import time
from pathlib import Path

import killed_savers
import pytest
import torch
from loop_runs import curve, make_case, steps_on_disk

from shoal.configs.errors import PreflightError, StoppedOnRequest
from shoal.trainer import disks
from shoal.trainer.checkpoint import Retention, verify_checkpoint
from shoal.trainer.disks import OwnDisks
from shoal.trainer.saver import Saver

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]


def disk(tmp_path, number):
    return tmp_path / f"disk-{number}" / "run"


def run_on_disks(ranks, tmp_path, number=2, **more):
    case = make_case(tmp_path, run="loop", **{"stage": 2, "disks": 2, "every_steps": 2} | more)
    return ranks(number).run({"a": case})["a"]


def hashes(folder):
    return verify_checkpoint(folder).files


def test_every_host_has_the_whole_checkpoint(ranks, tmp_path):
    """Four ranks on two disks; one disk is lost, and the run goes on as if nothing had been."""
    first = run_on_disks(ranks, tmp_path, 4, copies="every", stop_after=3)
    assert first["error"][0] == StoppedOnRequest.__name__, first["error"]
    for name in ("step-00000002", "step-00000003"):
        one, other = (disk(tmp_path, number) / "checkpoints" / name for number in (0, 1))
        assert len(hashes(one)) == 4 and hashes(one) == hashes(other)
    shutil.rmtree(disk(tmp_path, 0) / "checkpoints")
    second = run_on_disks(ranks, tmp_path, 4, copies="every")
    assert second["error"] is None and list(second["rows"]) == [3, 4, 5]
    for number in (0, 1):
        assert steps_on_disk(disk(tmp_path, number)) == [4, 6]
        assert not list((disk(tmp_path, number) / "checkpoints").glob(".partial*"))
    whole = ranks(4).run({"a": make_case(tmp_path / "whole", run="loop", stage=2)})["a"]
    assert whole["error"] is None
    assert curve(disk(tmp_path, 0)) == curve(tmp_path / "whole")


def test_the_newest_that_any_host_can_read_is_taken(ranks, tmp_path):
    assert run_on_disks(ranks, tmp_path, copies="every", stop_after=4)["error"] is not None
    flip = disk(tmp_path, 0) / "checkpoints" / "step-00000004" / "rank-00001.safetensors"
    flip.write_bytes(flip.read_bytes()[:-1])
    again = run_on_disks(ranks, tmp_path, copies="every", stop_after=1)
    assert next(iter(again["rows"])) == 4, "from the copy on the other disk"
    for number in (0, 1):
        for folder in (disk(tmp_path, number) / "checkpoints").glob("step-0000000[45]"):
            file = folder / "rank-00000.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
    assert steps_on_disk(disk(tmp_path, 0)) == [4, 5]
    answer = run_on_disks(ranks, tmp_path, copies="every")
    assert answer["error"][0] == "DataError" and "no checkpoint of this run" in answer["error"][1]


def test_the_first_host_alone_may_keep_them(ranks, tmp_path):
    assert run_on_disks(ranks, tmp_path, copies="first", stop_after=3)["error"] is not None
    assert steps_on_disk(disk(tmp_path, 0)) == [2, 3]
    assert steps_on_disk(disk(tmp_path, 1)) == []
    assert len(hashes(disk(tmp_path, 0) / "checkpoints" / "step-00000003")) == 2
    assert not list((disk(tmp_path, 1) / "checkpoints").glob(".partial*"))
    second = run_on_disks(ranks, tmp_path, copies="first")
    assert second["error"] is None and list(second["rows"]) == [3, 4, 5]


def test_a_run_of_a_lost_first_host_does_not_begin_anew(ranks, tmp_path):
    assert run_on_disks(ranks, tmp_path, copies="first", stop_after=5)["error"] is not None
    (disk(tmp_path, 0).parent).rename(tmp_path / "lost")
    kind, text = run_on_disks(ranks, tmp_path, copies="first")["error"]
    assert kind == PreflightError.__name__
    assert "disk-0/run/checkpoints/step-0000000" in text and "remove" in text
    shutil.rmtree(disk(tmp_path, 0).parent)
    (tmp_path / "lost").rename(disk(tmp_path, 0).parent)
    again = run_on_disks(ranks, tmp_path, copies="first")
    assert again["error"] is None and list(again["rows"]) == [5]


def test_what_was_in_object_storage_is_no_fresh_start_on_own_disks(ranks, tmp_path):
    folder = disk(tmp_path, 1) / "checkpoints"
    folder.mkdir(parents=True)
    (folder / ".elsewhere").write_text("s3://there/run/step-00000004")
    kind, text = run_on_disks(ranks, tmp_path, copies="every")["error"]
    assert kind == PreflightError.__name__ and "newest checkpoint of this run is s3://there" in text


def test_hosts_do_not_go_on_from_two_checkpoints_of_one_step(ranks, tmp_path):
    assert run_on_disks(ranks, tmp_path, copies="every", stop_after=2)["error"] is not None
    one, other = (disk(tmp_path, n) / "checkpoints" / "step-00000002" for n in (0, 1))
    killed_savers.save(other.parent.parent / "x", 2).rename(other.with_name("x"))
    shutil.rmtree(other)
    other.with_name("x").rename(other)
    assert hashes(other) != hashes(one), "each is whole"
    assert run_on_disks(ranks, tmp_path, copies="every", stop_after=1)["error"] is not None
    assert hashes(other) == hashes(one)


def test_a_suspect_does_not_come_back_from_another_host(ranks, tmp_path):
    assert run_on_disks(ranks, tmp_path, copies="every", stop_after=4)["error"] is not None
    given = {"environment": {"SHOAL_REFUSED": "step-00000004"}}
    again = run_on_disks(ranks, tmp_path, copies="every", **given, stop_after=1)
    cleared = {"environment": {"SHOAL_REFUSED": ""}}
    assert next(iter(again["rows"])) == 2
    last = run_on_disks(ranks, tmp_path, copies="every", **cleared)
    assert last["error"] is None and next(iter(last["rows"])) == 3


def test_other_hosts_keep_only_what_they_went_on_from(ranks, tmp_path):
    for stop in (2, 2):
        answer = run_on_disks(ranks, tmp_path, copies="first", every_steps=1, stop_after=stop)
        assert answer["error"] is not None
    assert run_on_disks(ranks, tmp_path, copies="first", every_steps=1)["error"] is None
    assert steps_on_disk(disk(tmp_path, 0)) == [5, 6]
    assert steps_on_disk(disk(tmp_path, 1)) == [4]


def test_a_full_disk_of_one_receiver_is_named_at_once(ranks, tmp_path):
    begun = time.monotonic()
    answer = run_on_disks(ranks, tmp_path, 2, copies="every", refuse_part=1)
    assert "No space left" in answer["error"][1] or "no space" in answer["error"][1].lower()
    assert time.monotonic() - begun < 60


def test_a_folder_that_is_not_shared_is_refused(ranks, tmp_path):
    kind, text = run_on_disks(ranks, tmp_path)["error"]
    assert kind == PreflightError.__name__
    assert f"rank 1 on {socket.gethostname()} does not see" in text
    assert "checkpoint.copies=every" in text
    assert not Path(disk(tmp_path, 1) / "metrics.jsonl").exists()


def test_marks_of_killed_ranks_go(tmp_path):
    (tmp_path / ".seen-0123-4").touch()
    Saver(OwnDisks(tmp_path, every=True), Retention(1))
    assert not list(tmp_path.glob(".seen-*"))


def test_what_comes_from_other_hosts_is_forced_to_disk_on_its_way(tmp_path, monkeypatch):
    forced = []
    monkeypatch.setattr(disks, "SYNC_BYTES", 8)
    monkeypatch.setattr(disks, "force", lambda stream: forced.append(stream.tell()))
    for first in range(0, 18, 4):
        size = min(4, 18 - first)
        disks.write_at(tmp_path / "rank-00001.safetensors", first, torch.ones(size).byte())
    assert forced == [8, 16]
