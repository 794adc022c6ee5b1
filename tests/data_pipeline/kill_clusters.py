"""Kills `make_clusters` at one renaming after another; run by test_data_clusters.py.

    python kill_clusters.py CORPORA FOLDER

Prints the folder of each result that was finished after a kill. Children are forked, so that the
libraries are imported once.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from pathlib import Path

from topics import make_config

from shoal.data_pipeline.clustering import make_clusters

STRIDE = 4


def main() -> None:
    """Kill before renaming 0, 4, 8, ... until one is never reached, and finish each."""
    corpora, folder = map(Path, sys.argv[1:])
    make_clusters(make_config(corpora, folder / "whole" / "out"))  # imports what the children need
    for moment in count(0, STRIDE):
        output = folder / f"at-{moment}" / "out"
        killed = attempt(corpora, output, moment)
        assert not (killed and (output / "manifest.json").exists())
        assert not attempt(corpora, output, None)
        print(output, flush=True)
        if not killed:
            break


def attempt(corpora: Path, output: Path, kill_before: int | None) -> bool:
    """Make clusters in a child, killed before a renaming; return whether it was."""
    child = os.fork()
    if child == 0:
        if kill_before is not None:
            left = count(kill_before, -1)

            def hook(event: str, arguments: tuple) -> None:
                if event == "os.rename" and next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
        make_clusters(make_config(corpora, output))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    main()
