"""Jobs over several hosts that are network namespaces with an sshd each, and what befalls them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
RUN_PY = str(HERE.parents[1] / "launcher" / "run.py")
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
CANNOT = 77
STEPS, ROWS, CONTEXT = 120, 4, 64
CORPUS = {
    "name": "small",
    "output": "data/small",
    "train": [{"path": "{samples}/domain_train.jsonl.gz", "max_bytes": 200_000}],
    "tokenizer": {"vocab_size": 400},
    "context": CONTEXT,
}
RUN = {
    "name": "lab",
    "prepare": "corpus.yaml",
    "model": {"context": CONTEXT, "num_layers": 2, "width": 32, "num_heads": 2},
    "data": {"train": [{"path": "data/small/train"}]},
    "optim": {"lr": 5e-3},
    "train": {"tokens": STEPS * ROWS * CONTEXT, "batch_rows": ROWS, "precision": "fp32"},
    "checkpoint": {"every_steps": 10, "keep": 2},
    "world": {"save_seconds": 10},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards, and a run of one host that nothing befell."""
    folder = make_folder(tmp_path_factory.mktemp("corpus"), "localhost slots=2\n")
    done = subprocess.run(
        [sys.executable, RUN_PY, "--hostfile", "hosts", "run.yaml"], cwd=folder, check=False,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def make_folder(folder: Path, hosts: str) -> Path:
    (folder / "corpus.yaml").write_text(yaml.safe_dump(CORPUS))
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "hosts").write_text(hosts)
    return folder


def in_lab(folder: Path, count: int, event: str, command: list[str]) -> dict[str, Any]:
    """Run the driver on the first of `count` hosts; skip where there can be none."""
    done = subprocess.run(
        [str(HERE / "netlab.sh"), str(count), sys.executable, str(HERE / "lab_driver.py"), event,
         *command], cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


def losses(folder: Path) -> list[float]:
    lines = (folder / "runs/lab/metrics.jsonl").read_text().splitlines()
    records = [r for line in lines if (r := json.loads(line))["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    return [r["loss"] for r in records]


def ranks(folder: Path) -> list[int]:
    """Ranks of every start of the run."""
    lines = (folder / "runs/lab/metrics.jsonl").read_text().splitlines()
    return [r["ranks"] for line in lines if (r := json.loads(line))["kind"] == "start"]


def assert_same_training(folder: Path, corpus: Path) -> None:
    # fp32; other rank counts sum in another order.
    assert losses(folder) == pytest.approx(losses(corpus), abs=1e-4)


def prepared(tmp_path: Path, corpus: Path, hosts: str) -> Path:
    folder = make_folder(tmp_path, hosts)
    (folder / "data").symlink_to(corpus / "data")
    return folder


PYTHON = [sys.executable, RUN_PY, "--hostfile", "hosts", "run.yaml"]


@pytest.mark.parametrize(
    ("hosts", "command", "count"),
    [
        ("n1 slots=1\nn2 slots=2\n", PYTHON, 3),
        ("n1 slots=1\nn2 slots=1\n", [DEEPSPEED, *PYTHON[1:]], 2),
        ("n2 slots=2\n", PYTHON, 2),
    ],
    ids=["python", "deepspeed", "one other host"],
)
def test_hosts_train_one_job(
    hosts: str, command: list[str], count: int, corpus: Path, tmp_path: Path
) -> None:
    folder = prepared(tmp_path, corpus, hosts)
    seen = in_lab(folder, 2, "none", command)
    output = (folder / "output").read_text()
    assert seen["code"] == 0, output
    assert ranks(folder) == [count]
    assert_same_training(folder, corpus)
    assert sum(seen["left"]) == 0


SLURM = [str(HERE / "slurm_lab.sh")]
NODES = ["--nodes=2", "--ntasks-per-node=1"]


@pytest.mark.parametrize(
    ("program", "hosts", "command"),
    [
        ("pdsh", "n1 slots=1\nn2 slots=1\n", [*PYTHON, "world.launcher=pdsh"]),
        ("slurmctld", "n1 slots=9\n",
         [*SLURM, "salloc", *NODES, sys.executable, RUN_PY, "run.yaml", "world.launcher=slurm",
          "world.ranks=1"]),
        ("slurmctld", "n1 slots=9\n",
         [*SLURM, "srun", *NODES, "--cpu-bind=none", sys.executable, RUN_PY, "run.yaml"]),
    ],
    ids=["pdsh", "inside an allocation", "ranks of srun"],
)  # fmt: skip
def test_others_may_start_the_guards_or_the_ranks(
    program: str, hosts: str, command: list[str], corpus: Path, tmp_path: Path
) -> None:
    if not shutil.which(program):
        pytest.skip(f"no {program}")
    folder = prepared(tmp_path, corpus, hosts)
    seen = in_lab(folder, 2, "none", command)
    output = (folder / "output").read_text()
    assert seen["code"] == 0, output
    assert ranks(folder) == [2]
    assert_same_training(folder, corpus)


@pytest.mark.parametrize(
    ("event", "cause"),
    [
        ("kill_rank", "rank 1 was killed by SIGKILL"),
        ("freeze_rank", "rank 1 stands still"),
        ("kill_guard", "n2: ssh ended (exit code 255)"),
    ],
)
def test_what_is_killed_or_hangs_is_started_again(
    event: str, cause: str, corpus: Path, tmp_path: Path
) -> None:
    folder = prepared(tmp_path, corpus, "n1 slots=1\nn2 slots=1\n")
    seen = in_lab(folder, 2, event, [*PYTHON, "world.timeout_seconds=30"])
    output = (folder / "output").read_text()
    assert seen["code"] == 0, output
    assert "attempt 2 of 4, on n1, n2" in output
    assert cause in output
    assert ranks(folder) == [2, 2]
    assert_same_training(folder, corpus)
    assert seen["idle"] < 5 * 30, "five times what is asked for"
    assert sum(seen["left"]) == 0


def test_a_job_goes_on_without_a_host_that_is_lost(corpus: Path, tmp_path: Path) -> None:
    folder = prepared(tmp_path, corpus, "n1 slots=1\nn2 slots=1\n")
    seen = in_lab(folder, 2, "link_down", PYTHON)
    output = (folder / "output").read_text()
    assert seen["code"] == 0, output
    assert "attempt 2 of 4, on n1\n" in output
    assert ranks(folder) == [2, 1]
    assert seen["idle"] < 5 * 90, "five times what is asked for"
    assert_same_training(folder, corpus)


@pytest.mark.parametrize(("event", "code"), [("terminate", 5), ("kill_launcher", -9)])
def test_a_stop_leaves_a_checkpoint_and_no_process(
    event: str, code: int, corpus: Path, tmp_path: Path
) -> None:
    folder = prepared(tmp_path, corpus, "n1 slots=1\nn2 slots=1\n")
    seen = in_lab(folder, 2, event, [*PYTHON, "checkpoint.every_steps=1000"])
    assert seen["code"] == code, (folder / "output").read_text()
    assert "Traceback" not in (folder / "output").read_text()
    assert seen["left"] == [0, 0]
    assert list((folder / "runs/lab/checkpoints").glob("step-*")), "the stop alone can have saved"
    seen = in_lab(folder, 2, "none", PYTHON)
    assert seen["code"] == 0, (folder / "output").read_text()
    assert_same_training(folder, corpus)


def test_a_host_that_does_not_answer_is_named(corpus: Path, tmp_path: Path) -> None:
    folder = prepared(tmp_path, corpus, "n1 slots=1\nn7 slots=1\n")
    seen = in_lab(folder, 1, "none", PYTHON)
    output = (folder / "output").read_text()
    assert seen["code"] == 4, output
    assert "error: n7: " in output
    assert "fix: correct it in the hostfile" in output
    assert "Traceback" not in output


def test_a_run_folder_that_is_not_shared_is_named(corpus: Path, tmp_path: Path) -> None:
    folder = prepared(tmp_path, corpus, "n1 slots=1\nn2 slots=1\n")
    seen = in_lab(folder, 2, "none", [*PYTHON, "output=/run"])  # a file system of each host's own
    output = (folder / "output").read_text()
    assert seen["code"] == 4, output
    assert "n2: does not share the run folder /run/lab" in output
