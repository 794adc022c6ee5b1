"""What ranks print reaches the screen behind their names, and a file each; none of it is lost."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shoal.configs.errors import ShoalError
from shoal.launcher import output
from shoal.launcher.output import ATTEMPTS_KEPT, Screen, next_log_folder
from shoal.launcher.processes import launch_ranks

WORKER = """
import os, signal, sys
from shoal.launcher.outcomes import report_outcome

def work():
    rank = os.environ["RANK"]
    print(f"hello from {rank}", "on a terminal" if os.isatty(1) else "in a pipe")
    print("trouble", file=sys.stderr)
    if sys.argv[1] == "killed" and rank == "1":
        for line in range(20_000):
            print("line", line)
        print("half a li", end="")
        os.kill(os.getpid(), signal.SIGKILL)

os._exit(report_outcome(work))
"""
LAUNCHER = """
import sys
from pathlib import Path
from shoal.launcher.processes import launch_ranks
command = [sys.executable, "-P", sys.argv[1]]
launch_ranks(2, ["fine"], command=command, logs=Path(sys.argv[2]))
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "worker.py").write_text(WORKER)
    return [sys.executable, "-P", str(tmp_path / "worker.py")]


def test_lines_come_behind_their_rank_and_are_kept(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launch_ranks(2, ["fine"], command=command, logs=tmp_path)
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [f"[rank {n}] hello from {n} in a pipe" for n in (0, 1)]
    assert sorted(err.splitlines()) == ["[rank 0] trouble", "[rank 1] trouble"]
    for rank in (0, 1):
        kept = (tmp_path / f"rank-{rank:05d}.log").read_text().splitlines()
        assert sorted(kept) == [f"hello from {rank} in a pipe", "trouble"]


def test_a_single_rank_is_itself(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launch_ranks(1, ["fine"], command=command, logs=tmp_path / "nobody made it")
    assert capfd.readouterr().out == "hello from 0 in a pipe\n"


def test_the_last_words_of_a_rank_that_is_killed(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ShoalError, match="rank 1 was killed by SIGKILL"):
        launch_ranks(2, ["killed"], command=command, logs=tmp_path)
    expected = [f"line {n}" for n in range(20_000)]
    kept = (tmp_path / "rank-00001.log").read_text().splitlines()
    assert [line for line in kept if line.startswith("line ")] == expected
    assert kept[-1] == "half a li"
    assert capfd.readouterr().out.splitlines()[-1] == "[rank 1] half a li"


def test_the_display_of_rank_0_has_the_terminal(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    master, slave = pty.openpty()
    words = [sys.executable, "-P", str(tmp_path / "launcher.py"), command[-1], str(tmp_path)]
    done = subprocess.run(words, stdout=slave, stderr=subprocess.PIPE, text=True, check=False)
    shown = os.read(master, 10_000).decode()
    os.close(master)
    os.close(slave)
    assert done.returncode == 0, done.stderr
    other = "[rank 1] hello from 1 in a pipe"
    assert other in shown
    # The two write to one terminal: a line may come in the midst of the other.
    assert shown.replace(other, "").replace("\r\n", "") == "hello from 0 on a terminal"
    assert (tmp_path / "rank-00000.log").read_text() == "trouble\n"


def test_a_job_whose_output_nobody_reads_ends(command: list[str], tmp_path: Path) -> None:
    """Its screen is a pipe that is full: what is not shown is in the files."""
    (tmp_path / "launcher.py").write_text(LAUNCHER.replace("fine", "killed"))
    words = [sys.executable, "-P", str(tmp_path / "launcher.py"), command[-1], str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.wait(60) == 1, "a rank was killed"
    kept = (tmp_path / "rank-00001.log").read_text().splitlines()
    assert kept[-2:] == ["line 19999", "half a li"]


def test_who_reads_nothing_misses_lines_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "HELD_BYTES", 1000)
    monkeypatch.setattr(output, "PATIENCE_SECONDS", 0.3)
    read, write = os.pipe()
    count = 10_000  # more than the pipe holds
    lines = [b"%05d\n" % number for number in range(2 * count)]
    screen, begun = Screen(), time.monotonic()
    for line in lines[: 2 * count]:
        screen.show(write, line)
    assert time.monotonic() - begun < 10, "waited for once"
    seen = b""
    while b"00001\n" not in seen or select.select([read], [], [], 1)[0]:
        seen += os.read(read, 1 << 16)
    screen.show(write, b"again\n")
    screen.close()
    seen += os.read(read, 1 << 16)
    *shown, told, last = seen.splitlines(keepends=True)
    assert shown == lines[: len(shown)], "the first ones, in order"
    missed = 2 * count - len(shown)
    assert told == b"(%d lines are not shown here, where nobody read them)\n" % missed
    assert last == b"again\n"
    os.close(read)
    deadline = time.monotonic() + 10
    while any(thread.name == "screen" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "its thread is left"
        time.sleep(0.05)


def test_a_reader_that_is_slow_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "HELD_BYTES", 1000)
    read, write = os.pipe()
    lines = [b"%05d\n" % number for number in range(20_000)]

    def show() -> None:
        for line in lines:
            screen.show(write, line)
        screen.close()
        os.close(write)

    screen = Screen()
    thread = threading.Thread(target=show)
    thread.start()
    seen = b""
    while data := os.read(read, 1 << 14):
        seen += data
        time.sleep(0.02)
    thread.join()
    assert seen.splitlines(keepends=True) == lines


def test_two_commands_at_once_have_a_folder_each(tmp_path: Path) -> None:
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(next_log_folder(tmp_path)))
               for _ in range(8)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8


def test_every_attempt_has_its_folder_and_old_ones_go(tmp_path: Path) -> None:
    (tmp_path / "logs/mine").mkdir(parents=True)
    made = [next_log_folder(tmp_path) for _ in range(ATTEMPTS_KEPT + 3)]
    left = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert left == [*(folder.name for folder in made[-ATTEMPTS_KEPT:]), "mine"]
