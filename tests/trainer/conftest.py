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


@pytest.fixture(scope="session")
def only_rank() -> Iterator[dict[str, str]]:
    """A group of this process alone; once, because DeepSpeed does not survive a second one."""
    import torch
    from rank_groups import free_port, rank_environment

    from shoal.trainer.engine import start_process_group, stop_process_group

    facts = rank_environment(0, 1, free_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in facts.items():
            patch.setenv(name, value)
        start_process_group(torch.device("cpu"), timeout_seconds=60)
    yield facts
    stop_process_group()


@pytest.fixture(scope="module")
def process_group(only_rank: dict[str, str]) -> Iterator[None]:
    """Be that rank, as long as a module's tests last: others look for no rank here."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in only_rank.items():
            patch.setenv(name, value)
        yield
