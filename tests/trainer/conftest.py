"""Ranks that the trainer's tests share: started once for every number of ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.append(str(Path(__file__).parent))  # the tests import the helpers beside them

if TYPE_CHECKING:
    from rank_groups import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """Return a function from a number of ranks to the one group of that size."""
    from rank_groups import Ranks

    groups: dict[int, Ranks] = {}

    def start(number: int) -> Ranks:
        group = groups.get(number)
        if group is None or not all(process.is_alive() for process in group.processes):
            groups[number] = Ranks(number, tmp_path_factory.mktemp(f"ranks-{number}-"))
        return groups[number]

    yield start
    for group in groups.values():
        group.close()
