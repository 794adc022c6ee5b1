"""The whole path on real text: prepare, train, kill, resume, export, compare, look."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

SHOAL = str(Path(sys.executable).with_name("shoal"))
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
RUN_PY = str(Path(__file__).resolve().parents[1] / "launcher" / "run.py")
STEPS = 24

CORPUS = {
    "name": "small",
    "output": "data/small",
    "train": [
        {"path": "{samples}/domain_train.jsonl.gz", "max_bytes": 250_000},
        {"path": "{samples}/general_train.jsonl.gz", "max_bytes": 250_000},
    ],
    "validation": [{"path": "{samples}/domain_validation.jsonl.gz", "max_bytes": 40_000}],
    "tokenizer": {"vocab_size": 512},
    "context": 64,
}
RUN = {
    "name": "whole",
    "prepare": "corpus.yaml",
    "model": {"context": 64, "num_layers": 2, "width": 32, "num_heads": 2, "dropout": 0.1},
    "data": {"train": [{"path": "data/small/train"}], "validation": "data/small/validation"},
    "optim": {"lr": 5e-3},
    "train": {
        "tokens": STEPS * 4 * 64,
        "batch_rows": 4,
        "micro_batch_rows": 1,
        "precision": "fp32",
    },
    "validation": {"every_steps": 8, "max_rows": 16},
    "checkpoint": {"every_steps": 4, "keep": 2},
}
TASKS = {"perplexity": {"domain": "{samples}/domain_validation.jsonl.gz"}, "max_items": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the corpus is prepared and the run `whole` is trained undisturbed."""
    folder = tmp_path_factory.mktemp("smoke")
    for name, tree in {"corpus": CORPUS, "run": RUN, "tasks": TASKS}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    shoal(folder, "train", "run.yaml")
    return folder


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SHOAL, *words], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def shoal(folder: Path, *words: str, code: int = 0) -> str:
    process = start(folder, *words)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == code, out
    return out


def records(folder: Path, run: str, kind: str = "train") -> list[dict[str, Any]]:
    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def wait_for_step(folder: Path, run: str, step: int, process: subprocess.Popen[str]) -> None:
    file = folder / "runs" / run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if file.is_file() and file.read_text().count('"kind": "train"') >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def assert_same_training(folder: Path, run: str) -> None:
    """Every step once, and the losses of the undisturbed run: so the same rows, too."""
    expected, got = records(folder, "whole"), records(folder, run)
    assert [r["step"] for r in got] == list(range(1, STEPS + 1))
    for ours, theirs in zip(got, expected, strict=True):
        # Same ranks, same stage, fp32, states stored in full: equal to the last bit but for the
        # order in which gloo sums two ranks, which is fixed for two.
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    final = [records(folder, name, "validation")[-1]["bits_per_byte"] for name in ("whole", run)]
    assert abs(final[0] - final[1]) < 1e-3


def test_a_killed_run_goes_on_as_if_nothing_had_been(folder: Path) -> None:
    process = start(folder, "train", "run.yaml", "name=killed")
    wait_for_step(folder, "killed", 10, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(1)  # ranks die with their launcher
    shoal(folder, "train", "run.yaml", "name=killed")
    assert_same_training(folder, "killed")
    assert not list((folder / "runs/killed/checkpoints").glob(".partial-*"))


def test_a_stopped_run_saves_says_so_and_goes_on(folder: Path) -> None:
    process = start(folder, "train", "run.yaml", "name=stopped")
    wait_for_step(folder, "stopped", 6, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 5, out
    assert "stopped on request after step" in out
    shoal(folder, "train", "run.yaml", "name=stopped")
    assert_same_training(folder, "stopped")


def test_a_finished_run_costs_no_training(folder: Path) -> None:
    before = (folder / "runs/whole/ledger.jsonl").read_text()
    shoal(folder, "train", "run.yaml")
    assert (folder / "runs/whole/ledger.jsonl").read_text() == before
    assert len(records(folder, "whole")) == STEPS


def test_other_ranks_see_the_same_rows(folder: Path) -> None:
    shoal(folder, "train", "run.yaml", "name=three", "world.ranks=3", "model.dropout=0.0",
          f"train.tokens={8 * 4 * 64}")  # fmt: skip
    shoal(folder, "train", "run.yaml", "name=one", "world.ranks=1", "model.dropout=0.0",
          f"train.tokens={8 * 4 * 64}")  # fmt: skip
    for ours, theirs in zip(records(folder, "three"), records(folder, "one"), strict=True):
        # Other partial sums of the same rows; three ranks do not divide the batch of four.
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)


with socket.socket() as probe:  # two suites on one machine must not meet
    probe.bind(("127.0.0.1", 0))
    PORT = str(probe.getsockname()[1])
FORMS = {
    "python": [sys.executable, RUN_PY, "--hostfile", "hosts"],
    "deepspeed, hostfile after": [DEEPSPEED, RUN_PY, "--hostfile", "hosts"],
    "deepspeed, hostfile before": [DEEPSPEED, "--master_port", PORT, "--hostfile", "hosts", RUN_PY],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_documented_form_trains_the_same(form: str, folder: Path, tmp_path: Path) -> None:
    (folder / "hosts").write_text("localhost slots=2\n")
    ssh = tmp_path / "ssh"  # DeepSpeed asks it for this machine's address in the last form
    ssh.write_text("#!/bin/sh\necho 127.0.0.1\n")
    ssh.chmod(0o755)
    name = form.replace(", ", "-").replace(" ", "-")
    done = subprocess.run(
        [*FORMS[form], "run.yaml", f"name={name}"], cwd=folder, text=True, timeout=200,
        capture_output=True, check=False,
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_training(folder, name)


def test_data_that_is_not_there_is_said_at_once(folder: Path) -> None:
    begun = time.monotonic()
    out = shoal(folder, "train", "run.yaml", "name=lost", "data.train.0.path=data/typo", code=3)
    assert "data/typo" in out
    assert time.monotonic() - begun < 60


def test_the_text_may_go_once_its_run_has_begun(folder: Path) -> None:
    text = (folder / "corpus.yaml").read_text()
    (folder / "corpus.yaml").write_text(text.replace("domain_train", "elsewhere"))
    shoal(folder, "train", "run.yaml")
    assert "elsewhere" in shoal(folder, "train", "run.yaml", "name=new", code=3)
    (folder / "corpus.yaml").write_text(text)


def test_a_context_longer_than_the_rows_is_refused(folder: Path) -> None:
    out = shoal(folder, "train", "run.yaml", "name=long", "model.context=128", code=2)
    assert "128" in out
    assert "64" in out


def test_a_student_learns_from_its_teacher_and_from_no_other(folder: Path) -> None:
    words = ("train", "run.yaml", "name=student", "teacher.path=export/teacher")
    shoal(folder, "export", "runs/whole", "export/teacher")
    shutil.copytree(folder / "export/teacher", folder / "export/sound")
    shoal(folder, *words, f"train.tokens={6 * 4 * 64}")
    assert all(r["distillation"] > 0 for r in records(folder, "student"))

    weights = folder / "export/teacher/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert "not what was exported" in shoal(folder, *words, "name=fresh", code=3)
    assert "no such teacher" in shoal(folder, *words, "teacher.path=export/none", code=2)
    assert "another teacher" in shoal(folder, *words, f"train.tokens={6 * 4 * 64}", code=3)

    other = {**CORPUS, "output": "data/vocabulary", "tokenizer": {"vocab_size": 300}}
    (folder / "vocabulary.yaml").write_text(yaml.safe_dump(other))
    out = shoal(folder, "train", "run.yaml", "name=foreign", "teacher.path=export/sound",
                "prepare=vocabulary.yaml", "data.train.0.path=data/vocabulary/train",
                "data.validation=data/vocabulary/validation", code=2)  # fmt: skip
    assert "the teacher's tokenizer is not the one of the shards" in out


def test_a_corrupt_shard_is_named_and_ends_the_run(folder: Path, tmp_path: Path) -> None:
    config = {**RUN, "name": "corrupt", "prepare": None, "output": str(tmp_path)}
    shutil.copytree(folder / "data/small", tmp_path / "data")
    shard = tmp_path / "data/train/shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(bytes(content))
    config["data"] = {"train": [{"path": str(tmp_path / "data/train")}]}
    (folder / "corrupt.yaml").write_text(yaml.safe_dump(config))
    out = shoal(folder, "train", "corrupt.yaml", code=3)
    assert "shard.00000.mds" in out
    assert "corrupt" in out


def test_export_generate_evaluate_compare(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shoal(folder, "export", "runs/whole", "export/fp32")
    shoal(folder, "export", "runs/whole", "export/bf16", "--dtype", "bf16")
    assert "exists already" in shoal(folder, "export", "runs/whole", "export/fp32", code=2)

    model = AutoModelForCausalLM.from_pretrained(folder / "export/fp32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export/fp32")
    words = tokenizer(f"{tokenizer.eos_token}The patient", return_tensors="pt")  # as in training
    longer = model.generate(**words, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(longer[0], skip_special_tokens=True)
    greedy = ("--max-new-tokens", "8", "--temperature", "0")
    assert shoal(folder, "generate", "export/fp32", "The patient", *greedy) == text + "\n"
    drawn = ("generate", "export/fp32", "word " * 100, "--max-new-tokens", "8", "--seed", "3")
    assert shoal(folder, *drawn) == shoal(folder, *drawn), "longer than the context of 64"

    table = shoal(folder, "evaluate", "export/fp32", "--tasks", "tasks.yaml")
    assert "bits_per_byte" in table
    out = shoal(folder, "compare", "export/fp32", "export/bf16", "--tasks", "tasks.yaml",
                "--budget", "resident_bytes=80kB", "--out", "reports/two")  # fmt: skip
    report = json.loads((folder / "reports/two/report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["fp32", "bf16"]
    # Both are scored with weights rounded to bf16: the same model, so nothing to decide.
    assert report["pairs"][0]["difference"] == pytest.approx(0, abs=1e-9)
    assert report["verdict"]["headline"] in " ".join(out.split())


def test_a_refused_resume_changes_nothing_and_exports_are_what_was_trained(folder: Path) -> None:
    before = (folder / "runs/whole/config.yaml").read_text()
    out = shoal(folder, "train", "run.yaml", "model.rope_theta=500000", code=2)
    assert "started with another model" in out
    assert (folder / "runs/whole/config.yaml").read_text() == before
    (folder / "runs/whole/config.yaml").write_text(before.replace("10000.0", "500000.0"))
    shoal(folder, "export", "runs/whole", "export/theta")
    (folder / "runs/whole/config.yaml").write_text(before)
    assert json.loads((folder / "export/theta/config.json").read_text())["rope_theta"] == 10000.0


def test_an_export_wants_the_shards_of_its_run(folder: Path) -> None:
    shutil.copytree(folder / "runs/whole", folder / "runs/moved")
    other = {**CORPUS, "output": "data/other", "tokenizer": {"vocab_size": 400}}
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    shoal(folder, "prepare", "other.yaml")
    config = (folder / "runs/moved/config.yaml").read_text()
    (folder / "runs/moved/config.yaml").write_text(config.replace("data/small", "data/other"))
    out = shoal(folder, "export", "runs/moved", "export/moved", code=3)
    assert "was trained on other rows" in out
    assert not (folder / "export/moved").exists()


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(folder: Path) -> None:
    shutil.copytree(folder / "runs/whole", folder / "runs/damaged")
    file = next((folder / f"runs/damaged/checkpoints/step-{STEPS:08d}").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    out = shoal(folder, "export", "runs/damaged", "export/damaged")
    assert "passed over" in out
    assert file.name in out


def test_a_rate_that_is_too_high_ends_a_run_but_not_a_search(folder: Path) -> None:
    words = ("train", "run.yaml", "optim.lr=1e30", "optim.warmup_share=0")
    out = shoal(folder, *words, "name=burnt", code=1)
    assert "steps in a row cannot be taken" in out
    assert not list((folder / "runs/burnt/checkpoints").glob("step-*"))
    shoal(folder, *words, "name=trial", "ledger.kind=tune")
    assert "loss" in (folder / "runs/trial/diverged.txt").read_text()


def test_what_is_there_can_be_looked_at(folder: Path) -> None:
    assert "whole" in shoal(folder, "runs")
    assert "24" in shoal(folder, "inspect", "runs/whole")
    assert "step" in shoal(folder, "inspect", f"runs/whole/checkpoints/step-{STEPS:08d}")
    assert "all as written" in shoal(folder, "shards", "verify", "data/small/train")
    assert "vocabulary" in shoal(folder, "shards", "show", "data/small/train")
