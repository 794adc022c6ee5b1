"""Worker processes: results in order, errors as they were, and no worker outlives its parent."""

from __future__ import annotations

import math
import operator
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from shoal.configs.errors import DataError, PreflightError
from shoal.data_pipeline.sources import resolve_path
from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.data_pipeline.workers import Pool, choose_processes

PARENT = """
import os, time
from shoal.data_pipeline.workers import Pool
if __name__ == "__main__":
    with Pool(2) as pool:
        workers = list(pool.map(os.getpid, [()] * 8))
        print(*set(workers), flush=True)
        list(pool.map(time.sleep, [(600,)] * 4))
"""


def test_one_process_means_this_one():
    with Pool(1) as pool:
        assert list(pool.map(os.getpid, [()])) == [os.getpid()]


def test_tasks_are_taken_no_faster_than_they_are_done():
    taken = []

    def tasks():
        for number in range(100):
            taken.append(number)
            yield (number,)

    with Pool(1) as pool:
        results = pool.map(math.sqrt, tasks())
        next(results)
        next(results)
    assert taken == [0, 1]


@pytest.mark.slow
def test_results_come_in_order_and_errors_as_they_were(tmp_path):
    taken = []

    def tasks():
        for number in range(100):
            taken.append(number)
            yield number, 1

    with Pool(2) as pool:
        results = pool.map(operator.add, tasks())
        assert next(results) == 1
        assert len(taken) <= 6
        assert list(results) == list(range(2, 101))
        assert os.getpid() not in set(pool.map(os.getpid, [()] * 8))
        assert list(pool.map(os.getenv, [("OMP_NUM_THREADS",)])) == ["1"]
        with pytest.raises(DataError, match="no tokenizer there") as caught:
            list(pool.map(Tokenizer.load, [(tmp_path,)]))
        assert caught.value.where == str(tmp_path)
        assert list(pool.map(resolve_path, [("x",)])) == ["x"]  # the pool still works


@pytest.mark.slow
def test_killed_worker_is_a_preflight_error():
    begin = time.monotonic()
    with Pool(2) as pool, pytest.raises(PreflightError, match="ended abruptly") as caught:
        list(pool.map(signal.raise_signal, [(signal.SIGKILL,)] * 5))
    assert caught.value.exit_code == 4
    assert "processes=" in str(caught.value.fix)
    assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_workers_die_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert workers
        parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_choose_processes():
    assert choose_processes(3, 10) == 3
    assert choose_processes("auto", 1000) == 1
    everything = len(os.sched_getaffinity(0))
    assert choose_processes("auto", 10**9) == choose_processes("auto", None) == everything
