"""What a guard holds, whom it believes, and how long it lives."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import psutil
import pytest

from shoal.configs.errors import NotMetError
from shoal.configs.schema import WorldConfig
from shoal.launcher import guard as guard_module
from shoal.launcher.commands import guard_command
from shoal.launcher.fanout import Guard, make_tasks
from shoal.launcher.guard import Orders, is_guard
from shoal.launcher.hosts import Host

if TYPE_CHECKING:
    from shoal.launcher.lines import Line


def test_a_launcher_is_lost_that_has_not_had_our_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words may be late: it gives us up by our last answer that it has."""
    monkeypatch.setattr(guard_module, "SILENCE_SECONDS", 1.0)
    said: queue.Queue[str] = queue.Queue()
    answers: list[float] = []
    orders = Orders(iter(said.get, ""), 60, [], lambda: answers.append(time.monotonic()))
    for _ in range(8):
        said.put("beat")
        time.sleep(0.2)
        assert orders.advise() == "go"
    said.put("beat")
    while len(answers) < 9:
        time.sleep(0.01)
    time.sleep(0.8)
    said.put("beat")  # had been on its way for long
    while len(answers) < 10:
        time.sleep(0.01)
    assert orders.advise() == "go"
    time.sleep(0.4)
    assert orders.advise() == "stop"


def test_a_guard_gives_its_launcher_up_where_nobody_reads_what_it_prints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard_module, "SILENCE_SECONDS", 0.1)
    reader = threading.Event()
    full = SimpleNamespace(write=lambda text: reader.wait(), flush=lambda: None)
    monkeypatch.setattr(sys, "stderr", full)
    orders = Orders(iter(()), 0.2, [], lambda: None)
    threading.Timer(10, reader.set).start()
    begun = time.monotonic()
    while orders.advise() != "kill":
        time.sleep(0.05)
    assert time.monotonic() - begun < 5
    reader.set()


def test_a_guard_is_asked_again_once_it_has_answered() -> None:
    host = Host("127.0.0.1", 1)
    control, theirs = os.pipe()
    os.set_blocking(control, False)
    line = SimpleNamespace(control=control, send=lambda line: said.append(line.decode().strip()))
    said: list[str] = []
    guard = Guard(host, make_tasks([host], [], WorldConfig(), {})[0], cast("Line", line))
    said.clear()
    guard.ask(100.0)
    guard.ask(105.0)
    os.write(theirs, b'{"started": 7}\n')
    assert guard.hear() and not guard.is_silent(time.monotonic()), "it was not there before"
    os.write(theirs, b'{"meeting": 1, "met": 0}\n')
    assert guard.hear()
    guard.ask(110.0)
    assert said == ["beat"], "it would take that for a receipt"
    os.write(theirs, b'{"alive": true}\n')
    assert guard.hear()
    guard.ask(115.0)
    assert said == ["beat", "beat"]
    os.close(control)
    os.close(theirs)


def test_the_port_where_hosts_meet_is_held_before_it_is_told() -> None:
    store = guard_module._open_store(2, 10)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", store.port))
    guard_module._check_way("127.0.0.1", store.port)
    from torch.distributed import TCPStore

    agent = TCPStore("127.0.0.1", store.port, 1, is_master=True, multi_tenant=True)
    agent.set("key", "value")
    assert store.get("key") == b"value", "torchrun's agent finds the same one"


def test_a_first_machine_that_cannot_be_reached_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        with pytest.raises(NotMetError, match=r"cannot reach 127\.0\.0\.1:.*refused") as caught:
            guard_module._check_way("127.0.0.1", free.getsockname()[1])
    assert caught.value.where == socket.gethostname()


def test_a_guard_lives_until_it_is_gone() -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    guard = subprocess.Popen(guard_command("1"), stdin=subprocess.PIPE)
    try:
        assert not is_guard(other.pid)
        deadline = time.monotonic() + 60
        while not is_guard(guard.pid) and time.monotonic() < deadline:  # forked, and not yet itself
            time.sleep(0.05)
        assert is_guard(guard.pid)
        guard.send_signal(signal.SIGSTOP)
        while psutil.Process(guard.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.05)
        assert not is_guard(guard.pid)
        assert guard.wait(60) == -signal.SIGKILL, "who hears nothing is ended"
    finally:
        for process in (other, guard):
            process.kill()
            process.communicate()
    assert not is_guard(guard.pid)
