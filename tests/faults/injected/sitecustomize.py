"""First on the import path of a job under trial: writes down what its ranks read, and disturbs one.

Every rank notes the rows of each step it has taken or left out, in `rows/` of the job's folder.
`plan.json` there says what is to befall which rank at which step, and how slow the steps are to be.
The job itself knows nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path.cwd()


class Step:
    """Of the data, as the loader counts them; the one that a rank is at."""

    number = -1


def read_plan() -> dict[str, Any]:
    """Return what is to be done; `kind` says what."""
    file = FOLDER / "plan.json"
    return json.loads(file.read_text()) if file.is_file() else {"kind": None}


def claim() -> bool:
    """Whether this is the first process, and the first time, to do it."""
    try:
        os.close(os.open(FOLDER / "done", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def watch_loader(module: ModuleType) -> None:
    """Note which step a rank reads."""
    read = module.Loader.microbatches

    @functools.wraps(read)
    def microbatches(self: Any, step: int) -> Any:
        Step.number = step
        return read(self, step)

    module.Loader.microbatches = microbatches


def watch_engine(module: ModuleType) -> None:
    """Note the rows of each step, and do what the plan has for it."""
    take, plan, rank = module.Engine.train_step, read_plan(), int(os.environ["RANK"])
    attempt = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ["MASTER_PORT"]
    attempt = "".join(letter for letter in attempt if letter.isalnum())
    name = f"{time.time_ns():020d}-{attempt}-{rank}.jsonl"
    (FOLDER / "rows").mkdir(exist_ok=True)
    book = os.open(FOLDER / "rows" / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    @functools.wraps(take)
    def train_step(self: Any, batches: Any, *words: Any, **named: Any) -> Any:
        if plan["kind"] == "skip" and Step.number == plan["step"]:
            words = (*words[:2], lambda loss, norm: False)
        due = plan.get("rank") == rank and Step.number == plan.get("step")
        if due and plan["kind"] in DISTURBANCES and claim():
            DISTURBANCES[plan["kind"]](self, plan)
        result = take(self, batches, *words, **named)
        rows = [row for batch in batches for row in batch.row_ids.tolist() if row >= 0]
        line = json.dumps({"step": Step.number, "rows": rows, "taken": result.taken})
        os.write(book, line.encode() + b"\n")  # at once: what is killed after it has done it
        time.sleep(plan.get("pace", 0.0))
        return result

    module.Engine.train_step = train_step


def choose_parameter(engine: Any, plan: dict[str, Any]) -> Any:
    """Return the parameter that a drawn number stands for."""
    parameters = list(engine.objective.parameters())
    return parameters[plan["parameter"] % len(parameters)]


def spoil_gradient(engine: Any, plan: dict[str, Any]) -> None:
    """Let the gradient of one parameter be no number, in one backward pass."""
    parameter = choose_parameter(engine, plan)
    handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * float("nan"))[1])


def flip_bit(engine: Any, plan: dict[str, Any]) -> None:
    """Flip one bit of one weight, as a bad memory does."""
    import torch

    parameter = choose_parameter(engine, plan)
    bits = parameter.data.view(-1).view(torch.int32)
    bits[plan["element"] % len(bits)] ^= torch.tensor(1 << plan["bit"]).to(torch.int32)


DISTURBANCES: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "nan": spoil_gradient,
    "flip": flip_bit,
}


def alter_config(module: ModuleType) -> None:
    """Let one rank read another learning rate than the others."""
    load, plan = module.load_config, read_plan()

    @functools.wraps(load)
    def load_config(*words: Any, **named: Any) -> Any:
        config = load(*words, **named)
        if plan["kind"] == "config" and plan["rank"] == int(os.environ["RANK"]) and claim():
            rate = {"lr": config.optim.lr * 1.1}
            return config.model_copy(update={"optim": config.optim.model_copy(update=rate)})
        return config

    module.load_config = load_config


def contest_port(module: ModuleType) -> None:
    """Let somebody else reach for the port where hosts are to meet, as soon as it is chosen."""
    held = []

    class Contested(module.TCPStore):  # type: ignore[misc, name-defined]
        def __init__(self, host: str, port: int, *words: Any, **named: Any) -> None:
            super().__init__(host, port, *words, **named)
            if port == 0 and claim():
                other = socket.socket()
                try:
                    other.bind(("", self.port))
                    other.listen()
                except OSError:  # it is held
                    other.close()
                else:
                    held.append(other)

    module.TCPStore = Contested


class Watcher:
    """Finds modules as ever, and lets a function see each of some once it is loaded."""

    def __init__(self, seen_by: dict[str, Callable[[ModuleType], None]]) -> None:
        self.seen_by = seen_by

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find a module."""
        look = self.seen_by.pop(name, None)
        spec = importlib.util.find_spec(name) if look else None
        if look is None or spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            look(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# Of our launcher, or of DeepSpeed's where that is not to start a launcher of ours.
STARTED_BY_DEEPSPEED = any(word.startswith("--local_rank") for word in sys.orig_argv)
if "--worker" in sys.orig_argv or (STARTED_BY_DEEPSPEED and "--hostfile" not in sys.orig_argv):
    sys.meta_path.insert(
        0,
        Watcher(
            {
                "shoal.data_pipeline.loader": watch_loader,
                "shoal.trainer.engine": watch_engine,
                "shoal.configs.load": alter_config,
            }
        ),
    )
elif "shoal.launcher.guard" in sys.orig_argv and read_plan()["kind"] == "port":
    sys.meta_path.insert(0, Watcher({"torch.distributed": contest_port}))
