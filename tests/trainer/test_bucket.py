"""Checkpoints in object storage: what goes up is whole or not there, and comes down again."""

import hashlib
import json
import shutil

import fsspec
import killed_savers
import pytest
import torch
from loop_runs import STEPS, curve, make_case, steps_on_disk

from shoal.configs.errors import (
    ConfigError,
    DataError,
    PreflightError,
    ShoalError,
    StoppedOnRequest,
)
from shoal.launcher import exports
from shoal.trainer.aside import read_resumed
from shoal.trainer.bucket import Bucket
from shoal.trainer.checkpoint import Retention, verify_checkpoint
from shoal.trainer.disks import OwnDisks
from shoal.trainer.objects import list_published
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


def find(store, **more):
    return find_checkpoint(store, **more, device=torch.device("cpu"))


def take(store):
    """Claim a store, and return what a run would go on from there."""
    Saver(store, Retention(2))
    found = find(store)
    return found and found[1].step


def objects(url):
    fs, base = fsspec.core.url_to_fs(url)
    return sorted(path.removeprefix(base).lstrip("/") for path in fs.find(base))


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
    folder, manifest = find(store)
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
    assert order[0].endswith(".safetensors") and order[-1].endswith(
        f"step-00000002/manifest-{writer.store.token}.json"
    )

    def die(self, path, *rest, **more):
        if "/manifest" in path:
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
    remove = fs.rm

    def die(self, paths, **more):
        if any("step-00000002" in path for path in paths):
            raise OSError("killed")
        remove(self, paths, **more)

    monkeypatch.setattr(fs, "rm", die)
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
    assert find(store)[1].step == 5, "the same step of the new one is as it was"


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
    assert find(store, warn=warnings.append)[1].step == 1
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
        PreflightError, match=r"has no checkpoint of this run that is as new as .*/step-00000004"
    ):
        Saver(Bucket(url, root), Retention(2))
    fs, base = fsspec.core.url_to_fs(url)
    fs.put(str(root / "step-00000004"), f"{base}/step-00000004", recursive=True)  # as the fix says
    store = Bucket(url, root)
    Saver(store, Retention(2))
    assert find(store)[1].step == 4


def test_going_back_to_a_folder_of_its_own_is_no_fresh_start(url, tmp_path):
    save(Saver(Bucket(url, tmp_path), Retention(2)), 3)
    with pytest.raises(PreflightError, match=f"the newest .* is {url}/step-00000003"):
        Saver(SharedFolder(tmp_path), Retention(2))
    shutil.rmtree(tmp_path / "bucket", ignore_errors=True)


def test_newer_checkpoints_here_are_never_given_up_for_older_ones_there(url, tmp_path):
    save(Saver(Bucket(url, tmp_path / "a"), Retention(2)), 100)
    root = tmp_path / "b"
    killed_savers.save(root, 500)
    with pytest.raises(PreflightError, match=r"as new as .*500; its newest is step-00000100"):
        Saver(Bucket(url, root), Retention(2))
    (root / "step-00000500").rename(root / "step-00000050")
    assert take(Bucket(url, root)) == 100
    save(Saver(Bucket(url, root), Retention(2)), 200)
    assert take(Bucket(url, root)) == 200
    found = sorted(path.name for path in root.glob("step-*"))
    assert found == ["step-00000050", "step-00000200"], "only what was fetched may go"


def find_object(url, name, part):
    fs, base = fsspec.core.url_to_fs(url)
    (path,) = (path for path in fs.find(f"{base}/{name}") if part in path.rpartition("/")[2])
    return fs, path


@pytest.mark.parametrize("part", ["rank-00000", "manifest"])
@pytest.mark.parametrize("gone", [True, False])
def test_what_is_not_whole_there_is_passed_over(url, tmp_path, part, gone):
    writer = Saver(Bucket(url, tmp_path / "a"), Retention(9, best=True))
    save(writer, 1, loss=1.0)
    save(writer, 2, loss=2.0)
    fs, path = find_object(url, "step-00000002", part)
    fs.rm_file(path)
    if not gone:
        fs.pipe_file(path, b"{")
    store = Bucket(url, tmp_path / "b")
    assert take(store) == 1
    writer = Saver(store, Retention(9, best=True))
    save(writer, 3, loss=3.0)
    assert take(Bucket(url, tmp_path / "c")) == 3, "retention lives with it, too"


def test_a_manifest_cannot_have_files_written_elsewhere(tmp_path):
    url = f"file://{tmp_path}/bucket"
    writer = Saver(Bucket(url, tmp_path / "a"), Retention(9))
    save(writer, 1)
    save(writer, 2)
    fs, path = find_object(url, "step-00000002", "manifest")
    tree = json.loads(fs.cat_file(path))
    tree["files"]["../../EVIL"] = {"bytes": 4, "sha256": "0" * 64}
    rest = {key: value for key, value in tree.items() if key != "digest"}
    tree["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    fs.pipe_file(path, json.dumps(tree).encode())
    (tmp_path / "EVIL").write_text("evil")
    assert take(Bucket(url, tmp_path / "x" / "y" / "b")) == 1
    assert not list((tmp_path / "x").rglob("EVIL"))


def test_an_attempt_that_wakes_up_late_harms_nothing(url, tmp_path, monkeypatch):
    """It has looked at who the owner is, and is frozen before it puts its manifest."""
    old = Saver(Bucket(url, tmp_path / "a"), Retention(1))
    look = old.store._check_owner
    frozen = []

    def freeze():
        look()
        if not frozen:
            frozen.append(Saver(Bucket(url, tmp_path / "b"), Retention(1)))
            save(frozen[0], 5)

    monkeypatch.setattr(old.store, "_check_owner", freeze)
    with pytest.raises(ShoalError, match="another attempt of this run has taken over"):
        save(old, 5)
    monkeypatch.undo()
    store = Bucket(url, tmp_path / "c")
    assert take(store) == 5
    (file,) = (path for path in (store.root / "step-00000005").glob("rank-*"))
    assert frozen[0].store.token in file.name


def test_a_copy_of_another_checkpoint_of_the_step_is_replaced(url, tmp_path):
    save(Saver(Bucket(url, tmp_path / "a"), Retention(2)), 5, loss=1.0)
    root = tmp_path / "b"
    killed_savers.save(root, 5)
    store = Bucket(url, root)
    Saver(store, Retention(2))
    assert find(store)[1].loss == 1.0


def test_a_checkpoint_that_failed_is_left_out_until_training_is_past_it(url, tmp_path):
    writer = Saver(Bucket(url, tmp_path / "a"), Retention(2))
    save(writer, 1)
    save(writer, 2)
    store = Bucket(url, tmp_path / "b")
    store.refused = "step-00000002"
    assert take(store) == 1
    assert read_resumed(store.root) == "step-00000001"
    save(Saver(store, Retention(2)), 2)
    assert take(store) == 2, "the new one"
    alone = SharedFolder(tmp_path / "c")
    killed_savers.save(alone.root, 2)
    alone.refused = "step-00000002"
    with pytest.raises(DataError, match="failed twice, and there is no older"):
        take(alone)


def test_a_slow_file_is_seen_to_move(tmp_path, monkeypatch):
    url = f"memory://{tmp_path}/bucket"
    writer = Saver(Bucket(url, tmp_path / "a"), Retention(2))
    monkeypatch.setattr(writer.store, "tick", lambda: ticks.append("up"))
    ticks = []
    save(writer, 1)
    assert len(ticks) >= 1
    store = Bucket(url, tmp_path / "b")
    Saver(store, Retention(2))
    ticks.clear()
    store.mend("step-00000001", (), lambda: ticks.append("down"))
    assert len(ticks) >= 2, "while it comes, and when it is there"


def test_room_is_asked_for_where_it_is_needed(url, tmp_path):
    assert Bucket(url, tmp_path).needed_bytes(100, 10) == 10
    assert SharedFolder(tmp_path).needed_bytes(100, 10) == 100
    disks = OwnDisks(tmp_path, every=False)
    assert disks.needed_bytes(100, 10) == 100
    disks.places = [7]
    assert disks.needed_bytes(100, 10) == 10


def test_a_stopped_run_is_exported_from_its_newest_checkpoint(url, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    save(Saver(Bucket(url, root), Retention(2)), 5)
    take(Bucket(url, root))
    save(Saver(Bucket(url, root), Retention(2)), 9)
    assert [path.name for path in root.glob("step-*")] == ["step-00000005"]
    told = []
    exports._bring_newest(root, told.append)
    assert told == [f"fetching {url}/step-00000009"]
    assert verify_checkpoint(root / "step-00000009").step == 9
    (root / ".elsewhere").write_text("n1:/disk/step-00000010")
    with pytest.raises(DataError, match="newest checkpoint is n1:/disk/step-00000010"):
        exports._bring_newest(root, told.append)


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
