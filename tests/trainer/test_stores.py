"""Checkpoints elsewhere than in one shared folder: object storage, and disks of every host."""

import shutil
import socket
from pathlib import Path

import fsspec
import killed_savers
import pytest
from loop_runs import STEPS, curve, make_case, steps_on_disk

from shoal.configs.errors import ConfigError, PreflightError, ShoalError, StoppedOnRequest
from shoal.trainer.bucket import Bucket, list_published
from shoal.trainer.checkpoint import MANIFEST, Retention, verify_checkpoint
from shoal.trainer.resumption import find_checkpoint
from shoal.trainer.saver import Saver
from shoal.trainer.stores import SharedFolder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]

SUMMATION_ORDER = 5e-6


def save(writer, step, **more):
    writer.begin(killed_savers.StateOnly(step), step, {"streams": []}, {"seed": 1}, **more)
    writer.finish()


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"{request.param}://{tmp_path}/bucket"


def objects(url):
    fs, base = fsspec.core.url_to_fs(url)
    return sorted(path.removeprefix(base).lstrip("/") for path in fs.find(base))


# Object storage.


def test_a_checkpoint_goes_up_and_comes_down(url, tmp_path):
    writer = Saver(Bucket(url, tmp_path / "a"), Retention(2))
    for step in (1, 2, 3):
        save(writer, step)
    assert list_published(url) == ["step-00000002", "step-00000003"]
    files = [name for name in objects(url) if name.startswith("step")]
    assert len(files) == 4, "of each one file and the manifest; the rest is gone"
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".elsewhere"]
    assert (tmp_path / "a" / ".elsewhere").read_text() == f"{url}/step-00000003"
    store = Bucket(url, tmp_path / "b")
    Saver(store, Retention(2))
    folder, manifest = find_checkpoint(store)
    assert folder == tmp_path / "b" / "step-00000003"
    assert verify_checkpoint(folder) == manifest and manifest.step == 3


def test_what_has_no_manifest_does_not_exist(url, tmp_path, monkeypatch):
    writer = Saver(Bucket(url, tmp_path / "a"), Retention(2))
    save(writer, 1)
    order = []
    fs = writer.store.fs
    pipe, put = type(fs).pipe_file, type(fs).put_file
    monkeypatch.setattr(
        type(fs), "put_file", lambda s, a, b, *r, **k: order.append(b) or put(s, a, b, *r, **k)
    )
    monkeypatch.setattr(
        type(fs), "pipe_file", lambda s, a, *r, **k: order.append(a) or pipe(s, a, *r, **k)
    )
    save(writer, 2)
    assert order[0].endswith(".safetensors") and order[-1].endswith(f"step-00000002/{MANIFEST}")

    def die(self, path, *rest, **more):
        if path.endswith(MANIFEST):
            raise OSError("link down")
        return pipe(self, path, *rest, **more)

    monkeypatch.setattr(type(fs), "pipe_file", die)
    with pytest.raises(OSError, match="link down"):
        save(writer, 3)
    monkeypatch.undo()
    assert list_published(url) == ["step-00000001", "step-00000002"]
    assert any(name.startswith("step-00000003/") for name in objects(url))
    Saver(Bucket(url, tmp_path / "b"), Retention(2))
    assert not any(name.startswith("step-00000003/") for name in objects(url)), "the next start"


def test_retention_takes_the_manifest_first(url, tmp_path, monkeypatch):
    writer = Saver(Bucket(url, tmp_path / "a"), Retention(1, best=True))
    save(writer, 1, loss=1.0)
    save(writer, 2, loss=3.0)
    fs = type(writer.store.fs)
    monkeypatch.setattr(fs, "rm", lambda *rest, **more: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        save(writer, 3, loss=2.0)
    assert list_published(url) == ["step-00000001", "step-00000003"], "the best and the newest"
    assert any(name.startswith("step-00000002/rank") for name in objects(url)), "half of it"


def test_an_attempt_that_was_taken_over_puts_no_manifest(url, tmp_path):
    old = Saver(Bucket(url, tmp_path / "a"), Retention(2))
    new = Saver(Bucket(url, tmp_path / "b"), Retention(2))
    save(new, 5)
    with pytest.raises(ShoalError, match="another attempt of this run has taken over"):
        save(old, 5)
    store = Bucket(url, tmp_path / "c")
    Saver(store, Retention(2))
    assert find_checkpoint(store)[1].step == 5, "the same step of the new one is as it was"


def test_a_damaged_object_is_passed_over(url, tmp_path):
    writer = Saver(Bucket(url, tmp_path / "a"), Retention(2))
    save(writer, 1)
    save(writer, 2)
    fs, base = fsspec.core.url_to_fs(url)
    (file,) = (path for path in fs.find(f"{base}/step-00000002") if path.endswith("safetensors"))
    data = fs.cat_file(file)
    fs.pipe_file(file, data[:-1] + bytes([data[-1] ^ 1]))
    store, warnings = Bucket(url, tmp_path / "b"), []
    Saver(store, Retention(2))
    assert find_checkpoint(store, warn=warnings.append)[1].step == 1
    assert len(warnings) == 1 and "SHA-256" in warnings[0]


def test_an_address_that_cannot_be_used_says_why(tmp_path):
    with pytest.raises(ConfigError, match="nosuch") as error:
        Bucket("nosuch://x/y", tmp_path)
    assert "s3://" in error.value.fix
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(PreflightError, match="cannot be written") as error:
        Saver(Bucket(f"file://{tmp_path}/file/run", tmp_path / "a"), Retention(1))
    assert "credentials" in error.value.fix and str(tmp_path) in error.value.where


def test_checkpoints_that_are_here_alone_are_no_fresh_start(url, tmp_path):
    root = tmp_path / "a"
    killed_savers.save(root, 4)
    with pytest.raises(
        PreflightError, match=r"has no checkpoint of this run, and .*: step-00000004"
    ):
        Saver(Bucket(url, root), Retention(2))
    fs, base = fsspec.core.url_to_fs(url)
    fs.put(str(root / "step-00000004"), f"{base}/step-00000004", recursive=True)  # as the fix says
    store = Bucket(url, root)
    Saver(store, Retention(2))
    assert find_checkpoint(store)[1].step == 4


def test_going_back_to_a_folder_of_its_own_is_no_fresh_start(url, tmp_path):
    save(Saver(Bucket(url, tmp_path), Retention(2)), 3)
    with pytest.raises(PreflightError, match=f"the newest .* is {url}/step-00000003"):
        Saver(SharedFolder(tmp_path), Retention(2))
    shutil.rmtree(tmp_path / "bucket", ignore_errors=True)


@pytest.fixture(scope="module")
def s3():
    """A local S3 server with one bucket, and the environment that leads there."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="checkpoints")
        yield environment
    server.stop()


def test_ranks_without_a_common_disk_go_on_from_s3(ranks, tmp_path, s3):
    given = {"run": "loop", "stage": 2, "bucket": "s3://checkpoints/lab", "environment": s3}
    case = make_case(tmp_path, **given, disks=2, every_steps=2)
    first = ranks(2).run({"a": case | {"stop_after": 3}})["a"]
    assert first["error"][0] == StoppedOnRequest.__name__, first["error"]
    assert list_published("s3://checkpoints/lab/run") == ["step-00000002", "step-00000003"]
    shutil.rmtree(tmp_path / "disk-0" / "run" / "checkpoints")
    second = ranks(3).run({"a": case | {"stage": 3, "disks": 3}})["a"]
    assert second["error"] is None and list(second["rows"]) == [3, 4, 5]
    assert list_published("s3://checkpoints/lab/run") == ["step-00000004", "step-00000006"]
    assert steps_on_disk(tmp_path / "disk-0" / "run") == [STEPS], "fetched for exports"
    whole = make_case(tmp_path / "whole", run="loop", stage=2)
    assert ranks(2).run({"a": whole})["a"]["error"] is None
    wanted = pytest.approx(curve(tmp_path / "whole"), abs=SUMMATION_ORDER)
    assert curve(tmp_path / "disk-0" / "run") == wanted


# Disks of every host.


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


def test_a_folder_that_is_not_shared_is_refused(ranks, tmp_path):
    kind, text = run_on_disks(ranks, tmp_path)["error"]
    assert kind == PreflightError.__name__
    assert f"rank 1 on {socket.gethostname()} does not see" in text
    assert "checkpoint.copies=every" in text
    assert not Path(disk(tmp_path, 1) / "metrics.jsonl").exists()
