"""Who does the tasks of a stage: processes of this machine, or a cluster by datatrove's executors.

The door to datatrove and ray.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shoal.data_pipeline.stages import Progress, Run, Stage, WeighedStage
from shoal.data_pipeline.workers import Pool


@contextlib.contextmanager
def run_locally(processes: int, progress: Progress) -> Iterator[Run]:
    """Give a function that does the tasks of a stage in processes of this machine."""
    with Pool(processes) as pool:

        def run(stage: Stage) -> None:
            todo = [task for task in range(stage.tasks) if not stage.is_done(task)]
            tell = Teller(stage, todo, progress)
            # A worker takes seconds to start: not for a single task.
            workers = pool if len(todo) > 1 else Pool(1)
            for task in workers.map(run_task, ((stage, task) for task in todo)):
                tell(task)

        yield run


def run_task(stage: Stage, task: int) -> int:
    """Do one task; return its number."""
    stage.run(task)
    return task


class Teller:
    """Tells how far a stage is, in bytes where the stage knows them."""

    def __init__(self, stage: Stage, todo: list[int], progress: Progress) -> None:
        self._progress = progress
        self._weigh = stage.task_bytes if isinstance(stage, WeighedStage) else _count_one
        self._what = f"{stage.name} (bytes)" if isinstance(stage, WeighedStage) else stage.name
        self._total = sum(map(self._weigh, range(stage.tasks)))
        self._done = self._total - sum(map(self._weigh, todo))
        if todo:
            progress(self._what, self._done, self._total)

    def __call__(self, task: int) -> None:
        """Say that a task is done."""
        self._done += self._weigh(task)
        self._progress(self._what, self._done, self._total)


def _count_one(task: int) -> int:
    return 1
