"""A killed `prepare` leaves nothing that looks finished, and goes on to the very same bytes."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from shoal.data_pipeline.proof import verify
from shoal.data_pipeline.shards import prepare

PREPARE = """
import sys
from pathlib import Path
from shoal.configs.corpus import PrepareConfig
from shoal.data_pipeline import pieces
from shoal.data_pipeline.shards import prepare

if __name__ == "__main__":
    pieces.MIN_PIECE_BYTES = 4000
    config = PrepareConfig.model_validate_json(Path(sys.argv[1]).read_text())
    prepare(config, lambda what, done, total: print(what, flush=True))
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that prepares a corpus in small chunks and says what it does."""
    script = tmp_path / "prepare.py"
    script.write_text(PREPARE)

    def start(config):
        file = tmp_path / "config.json"
        file.write_text(config.model_dump_json())
        command = [sys.executable, str(script), str(file)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    return start


def finish(process):
    process.communicate(timeout=120)
    assert process.returncode == 0


@pytest.mark.slow
def test_killed_at_any_moment(prepared, make_config, tmp_path):
    """With every stage there is: also cleaning, and training the tokenizer."""
    clean = {"filters": None, "decontaminate": None}
    config = make_config(tmp_path / "undisturbed", clean=clean, shard_bytes=20_000)
    prepare(config)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = Path(__file__).with_name("kill_prepare.py")
    arguments = [tmp_path / "config.json", config.output, tmp_path, "15"]
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *moments, again = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(moments) > 20  # or the kills came to nothing
    assert [m["killed"] for m in moments] == [True] * (len(moments) - 1) + [False]
    assert not moments[0]["there"]
    assert [m["moment"] for m in moments if not m["same"]] == []
    assert [m["left"] for m in moments if m["left"]] == []
    assert again["kills"] > 3
    assert again["same"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["tokenise", "write"])
def test_killed_with_its_workers(phase, prepared, make_config, start, tree, tmp_path):
    config = make_config(tmp_path / "out" / "corpus", processes=2)
    with start(config) as process:
        assert process.stdout is not None
        said = (line for line in process.stdout if line.startswith(phase))
        next(said)  # it begins
        next(said)  # a task of it is done
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert [w for w in alive if w.status() != psutil.STATUS_ZOMBIE] == []
    output = Path(config.output)
    assert not output.exists()
    (partial,) = output.parent.glob(".partial-*")
    kept = [file for file in partial.rglob("*.tokens.npy") if not file.name.startswith(".")]
    assert kept
    finish(start(make_config(output, processes=1)))
    assert tree(output) == tree(prepared.output)
    verify(output / "train")


@pytest.mark.slow
def test_three_processes_give_the_same_bytes(make_config, start, tree, tmp_path):
    """With every stage there is."""
    clean = {"filters": None, "decontaminate": None}
    alone = prepare(make_config(tmp_path / "alone", clean=clean, processes=1))
    finish(start(make_config(tmp_path / "corpus", clean=clean, processes=3)))
    assert tree(tmp_path / "corpus") == tree(alone.output)


@pytest.mark.slow
def test_a_second_process_waits_for_the_first(make_config, start, tmp_path):
    config = make_config(tmp_path / "corpus")
    with (tmp_path / ".corpus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(config)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("wait for another process")
        time.sleep(0.2)
        assert process.poll() is None
        assert not list(tmp_path.glob(".partial-*"))
    finish(process)
    verify(tmp_path / "corpus" / "train")
