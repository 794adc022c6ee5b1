"""Runs that are listed, looked into and cleaned: what is there is told, what is trained is left."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shoal.configs.load import dump_config
from shoal.configs.schema import DataConfig, ModelConfig, RunConfig, Stream, TrainConfig
from shoal.launcher import cli
from shoal.launcher.cleaning import clean_runs
from shoal.launcher.history import find_damage, format_bytes, read_history
from shoal.trainer.checkpoint import SCHEMA, Manifest, StoredFile, checkpoint_name
from shoal.trainer.storage import digest

STEPS, ROWS, CONTEXT = 40, 4, 16
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others' scratch folders are none of ours."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def write_checkpoint(root: Path, step: int) -> Path:
    """Write a small checkpoint of two ranks as a saver would."""
    folder = root / checkpoint_name(step)
    folder.mkdir(parents=True)
    files, tensors = {}, {}
    for rank in range(2):
        file = folder / f"rank-{rank:05d}.safetensors"
        save_file({f"{s}/w{rank}": torch.full((6,), float(step)) for s in STATES}, file)
        files[file.name] = StoredFile(bytes=file.stat().st_size, sha256=digest(file))
        tensors[f"w{rank}"] = {
            state: {
                "shape": (2, 3),
                "slices": [
                    {"file": file.name, "key": f"{state}/w{rank}", "offset": 0, "length": 6}
                ],
            }
            for state in STATES
        }
    tree: dict[str, Any] = {
        "schema_version": SCHEMA,
        "step": step,
        "position": {"step": step, "skipped": 1, "passed_over": 2, "streams": [["5" * 64, 1.0]]},
        "run": {"name": "r", "train": {"batch_rows": ROWS}},
        "files": files,
        "tensors": tensors,
    }
    manifest = Manifest.model_validate({"loss": None, **tree}).sealed()
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


STATES = ("weight", "exp_avg", "exp_avg_sq")


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    def make(
        name: str = "r", *, steps: int = STEPS, saved: tuple[int, ...] = (10, 20, 30, 40),
        scores: dict[int, float] | None = None,
    ) -> Path:  # fmt: skip
        config = RunConfig(
            name=name,
            output=str(tmp_path / "runs"),
            model=ModelConfig(vocab_size=64, width=32, num_heads=2, num_layers=1, context=CONTEXT),
            data=DataConfig(train=(Stream(path="x"),)),
            train=TrainConfig(tokens=STEPS * ROWS * CONTEXT, batch_rows=ROWS),
        )
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(dump_config(config))
        start = {"kind": "start", "step": 0, "ranks": 2, "device": "cpu", "zero_stage": 1,
                 "torch": "2.15"}  # fmt: skip
        records: list[dict[str, Any]] = [start]
        records += [{"kind": "train", "step": n, "loss": 5 - n / 50} for n in range(1, steps + 1)]
        records += [
            {"kind": "validation", "step": n, "loss": loss, "bits_per_byte": loss / 2}
            for n, loss in (scores or {}).items()
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        for step in saved:
            write_checkpoint(run / "checkpoints", step)
        return run

    return make


@pytest.fixture
def lock() -> Iterator[Callable[[Path], None]]:
    """Train a run, as far as others can see."""
    files = []

    def hold(run: Path) -> None:
        files.append((run / ".lock").open("w"))
        fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)

    yield hold
    for file in files:
        file.close()


def shoal(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def make_old(*paths: Path, days: float = 30) -> None:
    for path in paths:
        os.utime(path, (time.time() - days * 86400,) * 2)


# Listing.


def test_runs_say_how_they_ended(make_run: Make, lock: Callable[[Path], None]) -> None:
    assert read_history(make_run("done")).state == "done"
    assert read_history(make_run("stopped", steps=20, saved=(10, 20))).state == (
        "stopped at step 20, saved"
    )
    died = make_run("died", steps=27, saved=(10, 20))
    assert read_history(died).state == "broken off after step 27; goes on after 20"
    assert read_history(make_run("lost", steps=3, saved=())).state == (
        "broken off after step 3, nothing saved"
    )
    assert read_history(make_run("new", steps=0, saved=())).state == "not begun"
    diverged = make_run("diverged", steps=3, saved=())
    (diverged / "diverged.txt").write_text("loss is nan")
    assert read_history(diverged).state == "diverged"
    (died / ".lock").touch()
    assert read_history(died).state.startswith("broken off"), "a lock that nobody holds"
    lock(died)
    assert read_history(died).state == "in training"


def test_runs_are_a_table(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("wide", scores={10: 4.0, 20: 3.0, 30: 3.5, 40: 3.6})
    broken = make_run("broken")
    (broken / "metrics.jsonl").write_text("{\n{}\n")
    code, out, _ = shoal("runs", str(tmp_path / "runs"), capsys=capsys)
    assert code == 0
    line = next(line for line in out.splitlines() if "wide" in line)
    for word in ("40", "4.2000", "1.8000 bits/byte", "40, 30, 20 (best), 10", "kB", "done"):
        assert word in line
    assert "line 1 is not a record" in out


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.34e12, "2.3 TB")]
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert format_bytes(size) == text


# Looking into checkpoints.


def test_a_checkpoint_is_described(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run() / "checkpoints" / checkpoint_name(20)
    code, out, _ = shoal("inspect", str(folder), capsys=capsys)
    assert code == 0
    rows = {name.strip(): value.strip() for name, value in
            (line.strip("│").split("│") for line in out.splitlines() if "│" in line)}  # fmt: skip
    assert rows["step"] == "20"
    assert rows["format version"] == str(SCHEMA)
    assert rows["written by"] == "2 ranks on cpu, ZeRO 1, torch 2.15"
    assert rows["ranks"] == "2 wrote a file each"
    assert rows["parameters"] == "12 in 2 tensors"
    assert rows["states"] == "exp_avg, exp_avg_sq, weight"
    assert rows["rows read"] == "88, 4 a step", "two batches were passed over"
    assert rows["steps left out"] == "1"
    assert rows["shards 1"] == f"{'5' * 16}, weight 1.0"
    assert rows["hashes"].startswith("not read")
    _, out, _ = shoal("inspect", str(folder), "--verify", capsys=capsys)
    assert "verified" in out


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_what_is_broken_is_named(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    folder = run / "checkpoints" / checkpoint_name(20)
    flip(folder / "rank-00001.safetensors")
    for path in (run, folder):
        assert shoal("inspect", str(path), capsys=capsys)[0] == 0, "sizes are as recorded"
        code, out, err = shoal("inspect", str(path), "--verify", capsys=capsys)
        assert code == 3
        assert "BROKEN" in out
        assert "rank-00001.safetensors: was altered" in err
    (folder / "rank-00000.safetensors").unlink()
    code, out, err = shoal("inspect", str(folder), capsys=capsys)
    assert code == 3
    assert "rank-00000.safetensors: cannot be read: No such file" in err
    (folder / "manifest.json").write_text("{}")
    code, out, err = shoal("inspect", str(run), capsys=capsys)
    assert code == 3
    assert "not a Shoal checkpoint manifest" in err
    assert out.count("files and sizes as recorded") == 3, "the others are whole"


# Cleaning.


def leave_behind(run: Path) -> dict[str, Path]:
    """Make one of everything that may be left."""
    paths = {
        "partial": run / "checkpoints" / ".partial-step-00000099-ab",
        "key": run / "logs" / "mine" / ".call-key",
        "log": run / "logs" / "attempt-00001",
    }
    for folder in (paths["partial"], paths["log"], paths["key"].parent):
        folder.mkdir(parents=True)
    (paths["partial"] / "rank-00000.safetensors").write_bytes(b"x" * 1000)
    (paths["log"] / "rank-00000.log").write_text("x" * 10)
    paths["key"].write_text("x" * 10)
    return paths


def test_leftovers_go_and_nothing_else(make_run: Make, tmp_path: Path) -> None:
    run, root = make_run(), tmp_path / "runs"
    left = leave_behind(run)
    (run / "logs" / "attempt-00002").mkdir()
    (run / "logs" / "mine.txt").write_text("no log of ours")
    killed = tmp_path / "tmp" / "shoal-dead"
    killed.mkdir()
    (killed / "alive.lock").touch()
    locks = [run / ".lock", run / "checkpoints" / ".owner"]
    for file in locks:
        file.write_text("")
    fresh = clean_runs(root, dry_run=True)
    assert {one.path for one in fresh.removed} == {left["partial"], killed}, "the rest is too new"
    make_old(left["key"], left["log"], run / "logs" / "mine.txt", *locks)
    before = sorted(root.rglob("*"))
    planned = clean_runs(root, dry_run=True)
    assert sorted(root.rglob("*")) == before
    done = clean_runs(root)
    assert done == planned
    assert {one.path for one in done.removed} == {*left.values(), killed}
    assert sum(one.bytes for one in done.removed) == 1000 + 10 + 10
    gone = {*left.values(), left["partial"] / "rank-00000.safetensors"}
    gone |= {left["log"] / "rank-00000.log"}
    assert set(before) - set(root.rglob("*")) == gone
    assert clean_runs(root).removed == []


def test_folders_of_other_programs_are_not_touched(make_run: Make, tmp_path: Path) -> None:
    make_run()
    other = tmp_path / "runs" / "other"
    left = leave_behind(other)
    (other / "config.yaml").write_text("defaults: [db: mysql]\n")
    (other / ".lock").touch()
    make_old(*left.values(), other / ".lock")
    before = sorted(other.rglob("*"))
    assert clean_runs(tmp_path / "runs").removed == []
    assert sorted(other.rglob("*")) == before


def test_a_run_in_training_is_not_touched(
    make_run: Make, lock: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    make_old(*leave_behind(run).values())
    lock(run)
    make_old(run / ".lock")
    before = sorted(run.rglob("*"))
    words = ("runs", str(tmp_path / "runs"), "--clean", "--keep", "1")
    code, out, _ = shoal(*words, capsys=capsys)
    assert code == 0
    assert "in training: not touched" in out
    assert "removed: 0 B" in out
    assert sorted(run.rglob("*")) == before


def test_old_checkpoints_go_when_asked_for_by_number(make_run: Make, tmp_path: Path) -> None:
    run = make_run(scores={10: 3.0, 20: 4.0, 30: 4.5, 40: 4.6})
    root = run / "checkpoints"
    assert clean_runs(tmp_path / "runs").removed == []
    flip(root / checkpoint_name(40) / "rank-00000.safetensors")
    done = clean_runs(tmp_path / "runs", keep=1)
    assert [one.path.name for one in done.removed] == [checkpoint_name(20)]
    kept = sorted(path.name for path in root.iterdir())
    # The newest is damaged, so that the one before it is the newest whole one; 10 is the best.
    assert kept == [checkpoint_name(step) for step in (10, 30, 40)]
    assert not find_damage(root / checkpoint_name(30), verify=True)


@pytest.mark.parametrize("words", [["--keep", "2"], ["--dry-run"], ["--clean", "--keep", "0"]])
def test_options_that_go_with_clean(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = shoal("runs", str(tmp_path), *words, capsys=capsys)
    assert code == 2
