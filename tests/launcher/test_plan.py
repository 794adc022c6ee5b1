"""What a run will be: the share of each rank, and the commands of every way to start it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shoal.configs.errors import ConfigError
from shoal.configs.load import load_config
from shoal.configs.schema import RunConfig
from shoal.data_pipeline.batch import PADDING_ROW
from shoal.data_pipeline.loader import Loader
from shoal.data_pipeline.packing import RowBatch
from shoal.launcher import hosts as hosts_module
from shoal.launcher.fanout import FORWARDED
from shoal.launcher.hosts import Host
from shoal.launcher.plan import plan_batch, print_plan
from shoal.launcher.run import Order, find_hosts, make_order
from shoal.launcher.ways import script_path, write_batch_script

GOLDEN = Path(__file__).with_name("golden")


class ConstantRows:
    """As much of `data_pipeline.rows.Rows` as a loader reads: 100 rows of ones."""

    manifest = SimpleNamespace(context=4, eot_id=0, tokenizer_fingerprint="same")
    folder = "nowhere"

    def __len__(self) -> int:
        return 100

    def gather(self, rows: np.ndarray, tick: object = None) -> RowBatch:
        ones = np.ones((len(rows), 5), np.int64)
        return RowBatch(ones, np.zeros((len(rows), 4), np.int32), ones[:, 1:])


@pytest.mark.parametrize(
    ("rows", "micro", "ranks", "micro_batches", "padded"),
    [
        (32, 8, 2, (8, 8), 0),
        (32, 8, 3, (8, 3), 1),
        (16, 8, 3, (6,), 2),
        (16, 8, 1, (8, 8), 0),
        (5, 2, 3, (2,), 1),
        (1, 4, 2, (1,), 1),
    ],
)
def test_the_plan_deals_a_batch_as_the_loader_does(
    rows: int, micro: int, ranks: int, micro_batches: tuple[int, ...], padded: int
) -> None:
    overrides = [f"train.batch_rows={rows}", f"train.micro_batch_rows={micro}"]
    plan = plan_batch(load_config(RunConfig, "default.yaml", overrides), ranks)
    assert (plan.micro_batches, plan.padded_rows) == (micro_batches, padded)
    found_padding = 0
    for rank in range(ranks):
        loader = Loader(
            [(ConstantRows(), 1.0)],  # type: ignore[list-item]
            seed=0,
            batch_rows=rows,
            micro_batch_rows=micro,
            rank=rank,
            num_ranks=ranks,
        )
        batches = loader.microbatches(0)
        assert tuple(len(batch.row_ids) for batch in batches) == plan.micro_batches
        found_padding += sum(int((batch.row_ids == PADDING_ROW).sum()) for batch in batches)
    assert found_padding == plan.padded_rows


# The commands, as golden files: write them anew with SHOAL_GOLDEN=1 after a change that is meant.

NAMED = [Host("n1", 2), Host("n2", 2, (1, 3))]


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    """A job over two other hosts, with slots of one chosen."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith((*FORWARDED, "SLURM_"))]:
        monkeypatch.delenv(name)
    for name in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setattr(hosts_module, "is_local", lambda name: False)
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=4\n")
    words = ["default.yaml", "name=golden", "world.time_limit_minutes=60"]
    return make_order(words, hostfile="hosts", include="n1@n2:1,3", dry_run=True)


def normalise(text: str, folder: Path) -> str:
    names = {sys.executable: "PYTHON", script_path(): "RUN", str(folder): "FOLDER"}
    for found, name in names.items():
        text = text.replace(found, name)
    return text


@pytest.mark.parametrize("way", ["ssh", "pdsh", "slurm", "none", "deepspeed", "sbatch"])
def test_the_commands_of_every_way(
    way: str, order: Order, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = make_order(order.words, hostfile=order.hostfile, include=order.include, show=way)
    assert order.dry_run, "--show alone starts nothing either"
    (config,) = order.load()
    hosts = find_hosts(order, config)
    assert hosts == NAMED
    print_plan(order, config, hosts)
    found = normalise(capsys.readouterr().out, tmp_path)
    found = found[max(0, found.find("start by")) :]
    file = GOLDEN / f"{way}.txt"
    if os.environ.get("SHOAL_GOLDEN"):
        file.write_text(found)
    assert found == file.read_text()


def test_the_way_that_is_configured_is_shown(
    order: Order, capsys: pytest.CaptureFixture[str]
) -> None:
    (config,) = order.load()
    print_plan(order, config, NAMED)
    assert "start by world.launcher=ssh" in (shown := capsys.readouterr().out)
    assert "pdsh -R ssh" not in shown
    assert "other ways: --show" in shown
    everything = make_order(order.words, show="all")
    print_plan(everything, config, NAMED)
    shown = capsys.readouterr().out
    for text in ("world.launcher=ssh", "pdsh -R ssh", "srun --overlap", "(type it)", "#SBATCH",
                 "deepspeed.launcher.launch"):  # fmt: skip
        assert text in shown


BATCH_TOOLS = {
    "scontrol": """#!/bin/sh
if [ "$1" = show ]; then echo "   JobState=$STATE Reason=None"; else echo "$@" >>said; fi
""",
    # Ends as it is told by $CODE, at once or after the signal it waits for.
    "launcher": """#!/bin/bash
trap 'echo USR1 >>said; exit 5' USR1
trap 'echo TERM >>said; exit 5' TERM
[ "$CODE" ] && exit "$CODE"
touch waiting
while :; do sleep 0.05; done
""",
}


@pytest.mark.parametrize(
    ("code", "number", "state", "said"),
    [
        ("0", None, "RUNNING", []),
        ("3", None, "RUNNING", []),
        ("5", None, "RUNNING", ["requeue 7"]),
        ("", "USR1", "RUNNING", ["USR1", "requeue 7"]),
        ("", "TERM", "RUNNING", ["TERM"]),
        ("", "USR1", "COMPLETING", ["USR1"]),
    ],
)
def test_the_batch_script_asks_for_more_time_only_where_that_helps(
    code: str, number: str | None, state: str, said: list[str], order: Order, tmp_path: Path
) -> None:
    (config,) = order.load()
    script = "\n".join(write_batch_script(order, config, NAMED))
    script = script.replace(sys.executable, "./launcher")
    for name, text in {**BATCH_TOOLS, "job.sh": script}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    said_before = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment = os.environ | said_before | {"CODE": code, "STATE": state}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment)
    if number:
        deadline = 100
        while not (tmp_path / "waiting").exists() and deadline:
            deadline -= 1
            subprocess.run(["sleep", "0.1"], check=True)
        subprocess.run(["kill", f"-{number}", str(job.pid)], check=True)
    assert job.wait(30) == int(code or 5)
    lines = (tmp_path / "said").read_text().splitlines() if (tmp_path / "said").exists() else []
    assert lines == said


def test_hosts_that_differ_are_no_allocation(order: Order) -> None:
    (config,) = order.load()
    with pytest.raises(ConfigError, match="Slurm gives every node alike"):
        write_batch_script(order, config, [Host("n1", 1), Host("n2", 2)])


def test_a_batch_script_is_of_words_that_a_shell_reads_back(order: Order) -> None:
    order = make_order(["default.yaml", "name=a", "output=it's here"], show="sbatch")
    (config,) = order.load()
    script = write_batch_script(order, config, [Host("n1", 1)])
    command = next(line for line in script if line.endswith(" &"))
    assert "output=it's here" in shlex.split(command)
