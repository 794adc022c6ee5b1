"""Kills `prepare` at any change it makes to the file system; run by test_data_kill.py.

    python kill_prepare.py CONFIG REFERENCE FOLDER STRIDE

CONFIG is a JSON PrepareConfig, REFERENCE its undisturbed result. Prints a JSON line for every kill.
Children are forked, so that the libraries are imported once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from shoal.configs.corpus import PrepareConfig
from shoal.data_pipeline import pieces
from shoal.data_pipeline.mds import import_streaming
from shoal.data_pipeline.proof import verify
from shoal.data_pipeline.shards import prepare

CHANGES = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"}


def run_child(work: Callable[[], object], kill_before: int | None = None) -> bool:
    """Call `work` in a child, killed before change number `kill_before`; True if it was."""
    child = os.fork()
    if child == 0:
        if kill_before is not None:
            _kill_before(kill_before)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def _kill_before(number: int) -> None:
    left = count(number, -1)

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_WRONLY
        if (event in CHANGES or writes) and next(left) == 0:
            if writes:  # killed while it was written: nothing can trust what lies under this name
                os.write(os.open(arguments[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), b"{")
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def same_files(left: Path, right: Path) -> bool:
    """Whether two folders hold the same files, hidden ones aside."""
    trees = [
        {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file() and not file.name.startswith(".")
        }
        for folder in (left, right)
    ]
    return trees[0] == trees[1]


def main() -> None:
    """Kill at one moment after another until one is never reached; then over and over."""
    config_file, reference, folder, stride = sys.argv[1:]
    tree = json.loads(Path(config_file).read_text())
    pieces.MIN_PIECE_BYTES = 30_000  # several chunks
    import_streaming()

    def attempt(output: Path, kill_before: int | None = None) -> bool:
        config = PrepareConfig.model_validate(tree | {"output": str(output)})
        return run_child(lambda: prepare(config), kill_before)

    def report(**facts: object) -> None:
        print(json.dumps(facts), flush=True)

    for moment in count(0, int(stride)):
        output = Path(folder) / f"at-{moment}" / "corpus"
        killed = attempt(output, moment)
        if output.exists():  # then it must be whole
            verify(output / "train")
        there = output.exists()
        attempt(output)
        left = [file.name for file in output.parent.iterdir() if file.name.startswith(".partial")]
        same = same_files(output, Path(reference))
        report(moment=moment, killed=killed, there=there, same=same, left=left)
        if not killed:
            break
    output = Path(folder) / "again" / "corpus"
    kills = 0
    while attempt(output, 30 * kills):
        kills += 1
    report(kills=kills, same=same_files(output, Path(reference)))


if __name__ == "__main__":
    main()
