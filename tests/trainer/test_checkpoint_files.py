"""Checkpoints as files: damage is named, killed savers leave nothing that looks whole."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import killed_savers
import pytest
import torch
from safetensors.torch import save_file

from shoal.configs.errors import DataError
from shoal.trainer import checkpoint
from shoal.trainer.checkpoint import (
    MANIFEST,
    Retention,
    TensorReader,
    digest,
    list_checkpoints,
    newest_checkpoint,
    read_manifest,
    remove_old,
    verify_checkpoint,
)

FILE = "rank-00000.safetensors"


pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp("three") / "checkpoints"
    for step in (1, 2, 10):
        killed_savers.save(root, step)
    return root


@pytest.fixture
def root(three, tmp_path):
    """A copy of three sound checkpoints, steps 1, 2 and 10."""
    return shutil.copytree(three, tmp_path / "checkpoints")


def names_in(root):
    """Names of what is there, but for the marks of who may publish."""
    return sorted(path.name for path in root.iterdir() if path.name not in (".owner", ".lock"))


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_manifest(folder, **values):
    tree = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(tree | values))


DAMAGES = {
    "altered file": (lambda f: flip_byte(f / FILE), FILE, "SHA-256"),
    "truncated file": (lambda f: (f / FILE).write_bytes(b"short"), FILE, "5 bytes, expected"),
    "missing file": (lambda f: (f / FILE).unlink(), FILE, "missing"),
    "altered step": (lambda f: edit_manifest(f, step=11), MANIFEST, "digest"),
    "altered position": (lambda f: edit_manifest(f, position={}), MANIFEST, "digest"),
    "altered run": (lambda f: edit_manifest(f, run={"seed": 2}), MANIFEST, "digest"),
    "no digest": (lambda f: edit_manifest(f, digest=""), MANIFEST, "digest"),
    "newer schema": (lambda f: edit_manifest(f, schema_version=3, new=1), MANIFEST, "schema 3"),
    "no schema": (lambda f: edit_manifest(f, schema_version=None), MANIFEST, "no schema_version"),
    "a list": (lambda f: (f / MANIFEST).write_text("[1]"), MANIFEST, "no schema_version"),
    "foreign key": (lambda f: edit_manifest(f, more=1), MANIFEST, "more"),
    "torn manifest": (lambda f: (f / MANIFEST).write_text('{"step": 1'), MANIFEST, "JSON"),
    "binary manifest": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), MANIFEST, "UTF-8"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "step-00000010", "no manifest.json"),
    "manifest is a folder": (
        lambda f: (f / MANIFEST).unlink() or (f / MANIFEST).mkdir(), MANIFEST, "cannot be read"),
}  # fmt: skip


def test_only_names_of_checkpoints_are_checkpoints(root):
    for name in ("step-00000050.bak", "step-5", "step-000000500", ".partial-step-00000011"):
        shutil.copytree(root / "step-00000010", root / name)
    assert [path.name[5:] for path in list_checkpoints(root)] == [
        "00000001",
        "00000002",
        "00000010",
    ]
    remove_old(root, Retention(1), 10)
    assert set(names_in(root)) == {
        "step-00000010", "step-00000050.bak", "step-5", "step-000000500", ".partial-step-00000011",
    }  # fmt: skip


def test_sound_checkpoints_verify(root):
    for step in (1, 2, 10):
        manifest = verify_checkpoint(root / f"step-{step:08d}")
        assert (manifest.step, manifest.run) == (step, {"seed": 1})
        assert manifest.position == {"streams": [["x", 1.0]]}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_passed_over(root, name):
    damage, file, words = DAMAGES[name]
    folder = root / "step-00000010"
    damage(folder)
    with pytest.raises(DataError, match=words) as error:
        verify_checkpoint(folder)
    assert Path(error.value.where).name == file
    warnings = []
    found = newest_checkpoint(root, warn=warnings.append)
    assert found is not None and found[1].step == 2
    assert len(warnings) == 1 and file in warnings[0] and "passed over" in warnings[0]


def write_version_1(folder, step):
    """Write a checkpoint of two ranks as version 1 of the format did; return its tensors."""
    generator = torch.Generator().manual_seed(step)
    whole = {
        (name, state): torch.randn(shape, generator=generator)
        for name, shape in {"a": (3, 5), "b": (7,)}.items()
        for state in ("weight", "exp_avg", "exp_avg_sq")
    }
    folder.mkdir(parents=True)
    files, tensors = {}, {}
    for rank in range(2):
        file, kept = f"rank-{rank:05d}.safetensors", {}
        for (name, state), value in whole.items():
            cut = value.numel() // 2
            part = value.flatten()[cut:] if rank else value.flatten()[:cut]
            kept[f"{state}/{name}"] = part.clone()
            entry = {"shape": list(value.shape), "slices": []}
            entry = tensors.setdefault(name, {}).setdefault(state, entry)
            entry["slices"].append({"file": file, "key": f"{state}/{name}",
                                    "offset": rank * cut, "length": part.numel()})  # fmt: skip
        save_file(kept, folder / file)
        data = (folder / file).read_bytes()
        files[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    tree = {"schema_version": 1, "step": step, "position": {"streams": [["x", 1.0]]},
            "run": {"seed": 1}, "files": files, "tensors": tensors}  # fmt: skip
    sealed = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(tree | {"digest": sealed}, indent=1))
    return whole


def test_a_checkpoint_of_version_1_loads(tmp_path):
    folder = tmp_path / "step-00000007"
    whole = write_version_1(folder, 7)
    manifest = verify_checkpoint(folder)
    assert (manifest.schema_version, manifest.step, manifest.loss) == (2, 7, None)
    assert manifest.position == {"streams": [["x", 1.0]]}
    reader = TensorReader(folder, manifest)
    for (name, state), value in whole.items():
        assert torch.equal(reader.read(name, state), value)
    edit_manifest(folder, step=8)
    with pytest.raises(DataError, match="digest"):
        read_manifest(folder)


def test_a_newer_version_says_what_to_do(root):
    edit_manifest(root / "step-00000010", schema_version=3, something="new")
    with pytest.raises(DataError, match="newer Shoal") as error:
        read_manifest(root / "step-00000010")
    assert error.value.fix == "update Shoal"


def test_runs_of_elements_are_put_together_from_slices(tmp_path):
    folder = tmp_path / "step-00000007"
    whole = write_version_1(folder, 7)
    reader = TensorReader(folder, read_manifest(folder))
    flat = whole["a", "exp_avg"].flatten()
    for offset in range(15):
        for length in range(1, 16 - offset):
            run = reader.read_run("a", "exp_avg", offset, length)
            assert torch.equal(run, flat[offset : offset + length])


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="not a Shoal checkpoint") as error:
            read_manifest(folder)
        assert error.value.where == str(folder)


def test_all_damaged_is_an_error_and_none_is_not(root, tmp_path):
    assert newest_checkpoint(tmp_path / "nothing yet") is None
    for folder in root.glob("step-*"):
        flip_byte(folder / FILE)
    with pytest.raises(DataError, match="no checkpoint of this run is whole") as error:
        newest_checkpoint(root)
    assert error.value.fix and error.value.where == str(root)
    assert all(f"step-{step:08d}" in str(error.value) for step in (1, 2, 10))


def test_a_disk_that_cannot_be_read_counts_as_damage(root, monkeypatch):
    def refuse(path, tick):
        if path.parent.name == "step-00000010":
            raise OSError(5, "Input/output error")
        return digest(path, tick)

    monkeypatch.setattr(checkpoint, "digest", refuse)
    warnings = []
    found = newest_checkpoint(root, warn=warnings.append)
    assert found is not None and found[1].step == 2 and "Input/output error" in warnings[0]


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_newest_are_kept(root, keep):
    remove_old(root, Retention(keep), newest=10)
    kept = [f"step-{step:08d}" for step in (1, 2, 10)][-keep:]
    assert names_in(root) == kept


def test_damaged_later_steps_do_not_push_out_sound_ones(root):
    """Steps 2 and 10 were passed over, the run went on from step 1 and saved step 5."""
    for step in (2, 10):
        flip_byte(root / f"step-{step:08d}" / FILE)
    killed_savers.save(root, 5)
    remove_old(root, Retention(2), newest=5)
    found = newest_checkpoint(root)
    assert found is not None and found[1].step == 5
    names = names_in(root)
    assert "step-00000005" in names and "step-00000010" not in names


def test_saving_a_step_again_replaces_it(root):
    flip_byte(root / "step-00000010" / FILE)
    killed_savers.save(root, 10)
    assert verify_checkpoint(root / "step-00000010").step == 10


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_looks_whole(tmp_path):
    command = [sys.executable, killed_savers.__file__, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    for point in killed_savers.POINTS:
        root = tmp_path / point / "checkpoints"
        published = point.startswith("renamed")
        names = names_in(root)
        whole = ["step-00000001", *(["step-00000002"] if published else [])]
        if not published:
            assert names.pop(0).startswith(".partial-step-00000002"), point
        assert names == whole, point
        for name in whole:
            verify_checkpoint(root / name)
        found = newest_checkpoint(root, warn=pytest.fail)
        assert found is not None and found[1].step == len(whole)
        killed_savers.save(root, 2)  # the next start saves that step after all
        remove_old(root, Retention(2), newest=2)
        assert names_in(root) == ["step-00000001", "step-00000002"]
        verify_checkpoint(root / "step-00000002")
