"""The documented command: its words, its dry run, its three forms, one job of exactly N ranks."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from run_jobs import (
    FAKE_TRAINING,
    hostfile,
    records,
    run,
    start,
    wait_for_records,
    wait_until_gone,
)

from shoal.configs.errors import ConfigError
from shoal.launcher.processes import WORKER
from shoal.launcher.run import parse_order

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "launcher" / "run.py")
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


@pytest.fixture
def stage(tmp_path: Path) -> dict[str, str]:
    """Environment in which ranks train in pretence and leave a record each."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FAKE_TRAINING)
    (tmp_path / "records").mkdir()
    # Given a hostfile, DeepSpeed itself asks the first host by ssh whether it is there and for its
    # address, also if it is this machine: answer as a reachable host would.
    ssh = site / "ssh"
    ssh.write_text("#!/bin/sh\necho 127.0.0.1\n")
    ssh.chmod(0o755)
    return os.environ | {
        "PYTHONPATH": str(site),
        "PATH": f"{site}{os.pathsep}{os.environ['PATH']}",
        "RECORDS": str(tmp_path / "records"),
    }


# Words.


def test_without_words_the_default_config() -> None:
    order = parse_order([])
    assert (order.configs, order.overrides, order.hostfile) == (("default.yaml",), (), None)


def test_words_in_any_order() -> None:
    order = parse_order(
        ["--local_rank=1", "optim.lr=1e-3", "--hostfile", "h", "runs/lr=3/config.yaml", "--dry-run"]
    )
    assert order.configs == ("runs/lr=3/config.yaml",)
    assert order.overrides == ("optim.lr=1e-3",)
    assert (order.hostfile, order.dry_run, order.worker) == ("h", True, False)


def test_two_configs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"one config at a time, not 2: a\.yaml, b\.yaml"):
        parse_order(["a.yaml", "b.yaml"])
    assert parse_order(["--worker", "a.yaml", "b.yaml"]).configs == ("a.yaml", "b.yaml")


# Dry run.


def plan_of(text: str) -> dict[str, str]:
    """Label -> text of a plan on the screen."""
    words = [line.split(maxsplit=1) for line in text.splitlines()[1:]]
    return {label: rest[0] for label, *rest in filter(None, words) if rest}


def test_dry_run_says_everything_and_starts_nothing(stage: dict[str, str], tmp_path: Path) -> None:
    words = ["--dry-run", "--hostfile", hostfile(tmp_path, 3), "train.batch_rows=20", "name=dry"]
    done = run([sys.executable, RUN, *words], stage, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = plan_of(done.stdout)
    assert lines["run"] == "dry -> runs/dry"
    assert lines["ranks"].startswith("3 ranks on ")
    assert ": 0=cpu, 1=cpu, 2=cpu; " in lines["ranks"]
    assert lines["batch"] == "20 rows = 5,120 tokens a step; each rank 1 x 7 rows; 1 padded row"
    assert lines["steps"] == "196"
    assert lines["tokens"] == "1,003,520 (1,000,000 asked for)"
    assert lines["data"] == "data/samples/train"
    assert lines["command"].endswith("default.yaml train.batch_rows=20 name=dry world.ranks=3")
    assert lines["saves"].startswith("runs/dry/checkpoints, every 50 steps, the newest 2 kept; beg")
    assert lines["torchrun"].endswith(
        "-m shoal.launcher.run --worker runs/dry/logs/attempt-N/launch.yaml"
    )
    assert "--nproc-per-node=3" in lines["torchrun"]
    assert lines["localhost"].startswith(
        "RANK=0,1,2 LOCAL_RANK=0,1,2 LOCAL_WORLD_SIZE=3 NODE_RANK=0"
    )
    assert records(stage) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts", "records", "site"]


@pytest.mark.parametrize("slots", [2, 3])
def test_the_command_of_a_dry_run_gives_its_plan(
    slots: int, stage: dict[str, str], tmp_path: Path
) -> None:
    words = ["--dry-run", "--hostfile", hostfile(tmp_path, slots), "output=a b's", "world.ranks=2"]
    first = run([sys.executable, RUN, *words], stage, tmp_path)
    assert first.returncode == 0, first.stderr
    lines = plan_of(first.stdout)
    again = run([*shlex.split(lines["command"]), "--dry-run"], stage, tmp_path)
    assert again.returncode == 0, again.stderr
    theirs = plan_of(again.stdout)
    assert theirs.pop("command") == lines.pop("command")
    assert theirs == lines


def test_the_command_of_a_dry_run_is_short_in_a_checkout(stage: dict[str, str]) -> None:
    done = run([sys.executable, RUN, "--dry-run", "world.ranks=2"], stage, ROOT)
    command = shlex.join([sys.executable, "launcher/run.py", "default.yaml", "world.ranks=2"])
    assert command == plan_of(done.stdout)["command"]


def test_a_rank_that_the_launcher_did_not_start_is_refused(
    stage: dict[str, str], tmp_path: Path
) -> None:
    done = run([*WORKER, "default.yaml"], stage, tmp_path)
    assert done.returncode == 2
    assert "ranks are started by the launcher only" in done.stderr
    assert "fix: run the same without --worker: python launcher/run.py" in done.stderr
    assert "Traceback" not in done.stderr
    assert records(stage) == []


def test_a_stray_world_size_is_not_another_launcher(stage: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, RUN, "--dry-run", "world.ranks=3"]
    done = run(command, stage | {"WORLD_SIZE": "7"}, tmp_path)
    assert "3 ranks on" in done.stdout
    done = run(command, stage | {"WORLD_SIZE": "seven", "RANK": "0"}, tmp_path)
    assert done.returncode == 2
    assert "WORLD_SIZE='seven' is not a number" in done.stderr


@pytest.mark.slow
def test_the_ranks_of_torchrun_outlive_the_shell_that_started_it(
    stage: dict[str, str], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", RUN]
    shell = start(
        ["sh", "-c", f"{shlex.join(torchrun)} & wait"], stage | {"FAKE": "stop"}, tmp_path
    )
    pids = [record["pid"] for record in wait_for_records(stage, 2)]
    os.kill(shell.pid, signal.SIGKILL)
    time.sleep(1)
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    os.kill(psutil.Process(pids[0]).ppid(), signal.SIGKILL)
    wait_until_gone(pids, 20)


@pytest.mark.slow
def test_dry_run_under_deepspeed_is_said_once(stage: dict[str, str], tmp_path: Path) -> None:
    command = [DEEPSPEED, "--num_gpus", "2", RUN, "--hostfile", hostfile(tmp_path), "--dry-run"]
    done = run(command, stage, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dry run: nothing is started") == 1
    assert records(stage) == []


# The three forms.


@pytest.mark.slow
@pytest.mark.parametrize("form", ["script's hostfile", "deepspeed's hostfile", "python"])
def test_all_forms_start_one_job_of_exactly_that_many_ranks(
    form: str, stage: dict[str, str], tmp_path: Path
) -> None:
    hosts = hostfile(tmp_path, 2)
    command = {
        # One process more than DeepSpeed would start here: the second one must leave.
        "script's hostfile": [DEEPSPEED, "--num_gpus", "2", RUN, "--hostfile", hosts],
        "deepspeed's hostfile": [DEEPSPEED, "--hostfile", hosts, RUN],
        "python": [sys.executable, RUN, "--hostfile", hosts],
    }[form]
    done = run(command, stage, tmp_path)
    assert done.returncode == 0, done.stderr
    found = records(stage)
    assert [record["rank"] for record in found] == [[0, 2, 0, 2], [1, 2, 1, 2]]
    assert Counter(tuple(record["names"]) for record in found) == {("default",): 2}  # type: ignore[arg-type]
    assert len({record["port"] for record in found}) == 1
    assert {record["device"] for record in found} == {"cpu"}
    assert all(record["path"] != str(ROOT / "launcher") for record in found)


@pytest.mark.slow
def test_deepspeeds_hostfile_without_ssh(stage: dict[str, str], tmp_path: Path) -> None:
    """As docs/install.md says it, for machines that nobody can reach by ssh."""
    without_ssh = ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    command = [DEEPSPEED, *without_ssh, "--hostfile", hostfile(tmp_path), RUN]
    done = run(command, stage | {"PATH": os.environ["PATH"]}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [record["rank"] for record in records(stage)] == [[0, 2, 0, 2], [1, 2, 1, 2]]


@pytest.mark.slow
def test_plain_form_one_of_the_documentation(stage: dict[str, str], tmp_path: Path) -> None:
    words = ["--hostfile", hostfile(tmp_path, 3), "train.tokens=4096", "world.threads=2"]
    done = run([DEEPSPEED, RUN, *words], stage, tmp_path)
    assert done.returncode == 0, done.stderr
    found = records(stage)
    assert [record["rank"] for record in found] == [[n, 3, n, 3] for n in range(3)]
    assert {record["steps"] for record in found} == {1}
    assert {record["threads"] for record in found} == {"2"}


def test_without_hostfile_the_config_says_how_many(stage: dict[str, str], tmp_path: Path) -> None:
    done = run([sys.executable, RUN, "world.ranks=1", "name=one"], stage, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [record["rank"] for record in records(stage)] == [[0, 1, 0, 1]]


# Bad input and ends.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("localhost slots=2\n192.0.2.7 slots=2\n", "names this machine localhost"),
        ("-oProxyCommand=true slots=2\n", "no host name"),
        ("localhost slots=2\nlocalhost slots=2\n", "named twice"),
        ("", "names no host"),
        (None, "no such hostfile"),
    ],
)
def test_bad_hostfile_ends_with_one_screen(
    text: str | None, message: str, stage: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    done = run([sys.executable, RUN, "--hostfile", str(file)], stage, tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "fix: " in done.stderr
    assert "Traceback" not in done.stderr
    assert records(stage) == []


@pytest.mark.slow
def test_one_other_host_is_refused_under_deepspeed(stage: dict[str, str], tmp_path: Path) -> None:
    """DeepSpeed starts a hostfile of one other machine on this one; our ranks do not train it."""
    hosts = tmp_path / "hosts"
    hosts.write_text("192.0.2.7 slots=1\n")
    done = run([DEEPSPEED, "--hostfile", str(hosts), RUN], stage, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "DeepSpeed starts that on this machine instead" in done.stderr
    assert records(stage) == []


def test_a_host_that_does_not_answer_is_named_before_anything_starts(
    stage: dict[str, str], tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("far-away.invalid slots=1\nother.invalid slots=1\n")
    Path(tmp_path / "site/ssh").write_text("#!/bin/sh\necho 'no route to it' >&2\nexit 255\n")
    done = run([sys.executable, RUN, "--hostfile", str(hosts)], stage, tmp_path)
    assert done.returncode == 4, done.stderr
    assert "far-away.invalid: no route to it (exit code 255) (1 more: other.invalid)" in done.stderr
    assert records(stage) == []


@pytest.mark.parametrize("words", [["optim.leanr=1"], ["nope.yaml"], ["train.tokens=0"]])
def test_bad_config_is_found_before_ranks_start(
    words: list[str], stage: dict[str, str], tmp_path: Path
) -> None:
    done = run([sys.executable, RUN, "--hostfile", hostfile(tmp_path), *words], stage, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert records(stage) == []


def test_error_of_a_rank_is_the_error_of_the_job(stage: dict[str, str], tmp_path: Path) -> None:
    checkpoint = tmp_path / "runs" / "default" / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    command = [sys.executable, RUN, "--hostfile", hostfile(tmp_path)]
    done = run(command, stage | {"FAKE": "data"}, tmp_path)
    assert done.returncode == 3
    assert "error: shard.00001.mds: shard is corrupt" in done.stderr
    assert "failed first: rank 1 on " in done.stderr
    assert "fix: shoal shards verify" in done.stderr
    assert "newest checkpoint: runs/default/checkpoints/step-00000100" in done.stderr
    assert "Traceback" not in done.stderr
    wait_until_gone([record["pid"] for record in records(stage)], 1)  # type: ignore[misc]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signal_lets_the_ranks_save(
    number: signal.Signals, stage: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, RUN, "--hostfile", hostfile(tmp_path)]
    job = start(command, stage | {"FAKE": "stop"}, tmp_path)
    pids = [record["pid"] for record in wait_for_records(stage, 2)]
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 5
    assert "stopped: step 7 of 9 is saved" in err
    wait_until_gone(pids, 1)  # type: ignore[arg-type]


def test_a_time_limit_is_a_stop(stage: dict[str, str], tmp_path: Path) -> None:
    words = ["world.ranks=2", "world.time_limit_minutes=0.3", "world.save_seconds=1"]
    done = run([sys.executable, RUN, *words], stage | {"FAKE": "stop"}, tmp_path)
    assert done.returncode == 5, done.stderr
    assert "0.3 minutes are nearly over: saving" in done.stderr
    assert "stopped: step 7 of 9 is saved" in done.stderr
    done = run([sys.executable, RUN, "world.time_limit_minutes=0.3"], stage, tmp_path)
    assert done.returncode == 2
    assert "leaves nothing beside the save_seconds 20" in done.stderr


RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "FAKE": "stop"}


@pytest.mark.parametrize("number", [signal.SIGUSR1, None])
def test_a_rank_that_others_started_stops_as_ours_do(
    number: signal.Signals | None, stage: dict[str, str], tmp_path: Path
) -> None:
    limit = [] if number else ["world.time_limit_minutes=0.2", "world.save_seconds=1"]
    job = start([sys.executable, RUN, *limit], stage | RANK, tmp_path)
    if number:
        wait_for_records(stage, 1)
        job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 5, err
    assert "stopped: step 7 of 9 is saved" in err


def test_killed_launcher_leaves_no_ranks(stage: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, RUN, "--hostfile", hostfile(tmp_path)]
    job = start(command, stage | {"FAKE": "stop"}, tmp_path)
    pids = [record["pid"] for record in wait_for_records(stage, 2)]
    job.kill()
    job.wait()
    wait_until_gone(pids, 5)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["script's hostfile", "deepspeed's hostfile"])
def test_killed_deepspeed_runner_stops_the_job(
    form: str, stage: dict[str, str], tmp_path: Path
) -> None:
    """DeepSpeed's own launcher would run on, adopted by init, and so would every rank."""
    hosts = hostfile(tmp_path)
    script_first = [DEEPSPEED, RUN, "--hostfile", hosts]
    job = start(
        script_first if form == "script's hostfile" else [DEEPSPEED, "--hostfile", hosts, RUN],
        stage | {"FAKE": "stop"},
        tmp_path,
    )
    pids = [record["pid"] for record in wait_for_records(stage, 2)]
    job.kill()
    wait_until_gone(pids, 20)  # type: ignore[arg-type]
    job.communicate(timeout=30)
