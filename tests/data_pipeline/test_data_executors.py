"""Clusters: the same tasks, the same bytes; what fails there is an error here."""

from __future__ import annotations

import importlib
import os
import re
import stat
import sys
from pathlib import Path

import pytest

from shoal.configs.corpus import ExecutorConfig, SlurmConfig
from shoal.configs.errors import DataError, PreflightError
from shoal.data_pipeline import executors
from shoal.data_pipeline.shards import prepare

GOLDEN = Path(__file__).parent / "golden"

SBATCH = """#!/bin/bash
# Slurm in twenty lines: runs every task of a job array at once, here.
for given; do script=$given; done
n=$(ls {spool} | wc -l)
cp "$script" {spool}/$n.sbatch
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
log=$(sed -n 's/^#SBATCH --output=//p' "$script")
for i in $(seq 0 $last); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here RUN_OFFSET=0 \\
        bash "$script" > "${{log/\\%A_\\%a/${{n}}_$i}}" 2>&1
done
echo Submitted batch job $n
"""
COMMANDS = {
    "sbatch": SBATCH,
    "squeue": "#!/bin/bash\necho slurm_load_jobs error: Invalid job id specified >&2; exit 1\n",
    "scancel": "#!/bin/bash\ntouch $(dirname $0)/cancelled-$1\n",
    "srun": '#!/bin/bash\nshift 3\nexec "$@"\n',
    "scontrol": "#!/bin/bash\necho here\n",
}
SLURM = {"partition": "cpu", "tasks_at_once": 7, "account": "lab", "setup": "module load python"}


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    """The module of the stage, which processes elsewhere find as well."""
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)
    return importlib.import_module("counting")


@pytest.fixture
def count(counting):
    return counting.Count


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands of Slurm on the PATH; the folder where batch scripts are kept."""
    spool, commands = tmp_path / "spool", tmp_path / "bin"
    spool.mkdir()
    commands.mkdir()
    for name, text in COMMANDS.items():
        file = commands / name
        file.write_text(text.format(spool=spool) if name == "sbatch" else text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setattr(executors, "GRACE_SECONDS", 0.5)
    return spool


def open_slurm(logs, told=None, **changes):
    config = ExecutorConfig(kind="slurm", slurm=SlurmConfig(**(SLURM | changes)))
    report = (lambda *facts: None) if told is None else (lambda *facts: told.append(facts))
    return executors.open_executor(config, 1, logs, report)


@pytest.mark.slow
def test_slurm_runs_what_is_left_and_submits_what_the_golden_file_says(slurm, count, tmp_path):
    told = []
    (tmp_path / "1").write_text("done before")
    with open_slurm(tmp_path / "logs", told, options={"constraint": "fast"}) as run:
        run(count(tmp_path, 3))
        run(count(tmp_path, 3))  # nothing left: nothing is submitted
    assert (tmp_path / "1").read_text() == "done before"
    assert [(tmp_path / str(n)).read_text() for n in (0, 2)] == ["1", "1"]
    assert told == [("count: up", done, 3) for done in (1, 2, 3)]
    (script,) = slurm.iterdir()
    text = script.read_text().replace(str(tmp_path), "FOLDER")
    text = text.replace(str(Path(sys.executable).parent), "PYTHON")
    assert text == (GOLDEN / "stage.sbatch").read_text()


@pytest.mark.slow
def test_failed_task_on_slurm_is_the_error_it_was(slurm, count, tmp_path):
    with open_slurm(tmp_path / "logs") as run, pytest.raises(DataError) as caught:
        run(count(tmp_path, 3, fails=(1,)))
    assert "count: up: task 1 failed, 1 of 3 are not done: does not count" in caught.value.cause
    assert "number 1" in str(caught.value.where)
    log = Path(re.search(r"its log is (.*)", str(caught.value.where)).group(1))
    assert "does not count" in log.read_text()
    assert caught.value.fix == "learn it"
    assert (tmp_path / "2").is_file()


def test_task_that_slurm_killed_is_a_preflight_error(slurm, count, tmp_path, monkeypatch):
    (slurm.parent / "bin" / "sbatch").write_text("#!/bin/bash\necho Submitted batch job 5\n")
    with (
        open_slurm(tmp_path / "logs") as run,
        pytest.raises(PreflightError, match=r"task 0 failed, 2 of 2 .* without a word") as caught,
    ):
        run(count(tmp_path, 2))
    assert caught.value.where == str(tmp_path / "logs" / "count-up")


def test_interrupted_wait_cancels_the_job(slurm, count, tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    (slurm.parent / "bin" / "sbatch").write_text("#!/bin/bash\necho Submitted batch job 5\n")
    (slurm.parent / "bin" / "squeue").write_text("#!/bin/bash\necho PENDING\n")
    monkeypatch.setattr(executors.time, "sleep", interrupt)
    with open_slurm(tmp_path / "logs") as run, pytest.raises(KeyboardInterrupt):
        run(count(tmp_path, 1))
    assert (slurm.parent / "bin" / "cancelled-5").is_file()


def test_many_tasks_share_the_jobs_of_one_array(slurm, count, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "MAX_JOBS", 10)
    task = executors.ClusterTask(count(tmp_path, 95), tuple(range(95)), tmp_path / "l", tmp_path)
    executor = executors._SlurmSubmission(SlurmConfig(**SLURM)).make_executor(task)
    assert (executor.tasks, executor.tasks_per_job, executor.workers) == (95, 10, 7)


def test_absent_slurm_is_a_preflight_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with (
        pytest.raises(PreflightError, match="sbatch and squeue") as caught,
        open_slurm(tmp_path),
    ):
        pass
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("kind", ["slurm", "ray"])
def test_absent_library_is_a_preflight_error(kind, tmp_path, monkeypatch):
    for name in ("datatrove", "datatrove.utils", "datatrove.utils.logging"):
        monkeypatch.setitem(sys.modules, name, None)
    config = ExecutorConfig(kind=kind, slurm=SlurmConfig(**SLURM))
    with (
        pytest.raises(PreflightError, match="not installed") as caught,
        executors.open_executor(config, 1, tmp_path, lambda *facts: None),
    ):
        pass
    assert caught.value.fix == "pip install 'shoal[cluster]'"


@pytest.mark.slow
def test_ray_gives_the_same_bytes_and_its_failures_are_errors(
    make_config, prepared, tree, count, tmp_path, monkeypatch
):
    monkeypatch.setattr(executors, "GRACE_SECONDS", 0.5)
    same = {"tokenizer": {"path": str(prepared.tokenizer)}, "shard_bytes": 40_000}
    local = prepare(make_config(tmp_path / "a", **same))
    config = make_config(tmp_path / "b", **same, executor={"kind": "ray"})
    with executors._connect_ray(None):
        there = prepare(config)
        failing = count(tmp_path, 2, fails=(0, 1))
        run = executors._ClusterRun(tmp_path / "l", lambda *facts: None, executors._run_on_ray)
        with pytest.raises(DataError, match="task 0 failed, 2 of 2 are not done: does not count"):
            run(failing)
    assert there.built
    assert tree(there.output) == tree(local.output)
