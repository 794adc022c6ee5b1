"""Which tasks there are, and how a configuration becomes them."""

from __future__ import annotations

from shoal.configs.errors import ConfigError
from shoal.configs.study import TasksConfig
from shoal.eval.tasks.brainbench import BrainBenchTask
from shoal.eval.tasks.multiple_choice import MultipleChoiceTask
from shoal.eval.tasks.perplexity import PerplexityTask
from shoal.eval.tasks.task import Task

BRAINBENCH = "brainbench"


def load_tasks(config: TasksConfig) -> list[Task]:
    """Read every task file; call it before training starts, for it finds every fault in them.

    Raises:
        ConfigError: no tasks, or two of one name.
        DataError: a file is missing or broken; names file and line.
    """
    tasks: list[Task] = [
        PerplexityTask(name, path, config.max_items) for name, path in config.perplexity.items()
    ]
    if config.brainbench:
        tasks.append(BrainBenchTask(BRAINBENCH, config.brainbench, config.max_items))
    tasks += [
        MultipleChoiceTask(name, path, config.max_items)
        for name, path in config.multiple_choice.items()
    ]
    names = [task.name for task in tasks]
    if not tasks:
        raise ConfigError("there is nothing to score", where="tasks", fix="name at least one task")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two tasks are called {name!r}", where="tasks")
    return tasks
