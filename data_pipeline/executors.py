"""Who does the tasks of a stage: processes of this machine, or a cluster by datatrove's executors.

The door to datatrove and ray. On a cluster every machine sees the output's folder under the same
path and has the same Shoal; the tasks, and the bytes they leave, are those of one machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from shoal.configs.corpus import ExecutorConfig, SlurmConfig
from shoal.configs.errors import ConfigError, DataError, PreflightError, ShoalError
from shoal.data_pipeline.stages import Progress, Run, Stage, WeighedStage
from shoal.data_pipeline.store import write_whole
from shoal.data_pipeline.workers import Pool

POLL_SECONDS = 5.0
"""Between two looks at Slurm's queue."""

GRACE_SECONDS = 60.0
"""Files that a task wrote may show that much later through a network file system."""

MAX_JOBS = 1000
"""In one array of Slurm, whose usual limit is 1,001; more tasks than that share jobs."""


@contextlib.contextmanager
def open_executor(
    config: ExecutorConfig, processes: int, logs: Path, progress: Progress
) -> Iterator[Run]:
    """Give a function that does the tasks of a stage, and raises if one fails.

    Args:
        config: Where tasks run.
        processes: Of this machine; for `local`.
        logs: Folder that receives the logs of tasks; for clusters.
        progress: Told how far a stage is.

    Raises:
        PreflightError: what the executor needs is missing.
    """
    if config.kind == "local":
        with Pool(processes) as pool:
            yield _LocalRun(pool, progress)
    elif config.kind == "slurm":
        assert config.slurm is not None  # the schema sees to it
        _check_slurm()
        yield _ClusterRun(logs, progress, _SlurmSubmission(config.slurm))
    else:
        with _connect_ray(config.ray_address):
            yield _ClusterRun(logs, progress, _run_on_ray)


@dataclass(frozen=True)
class _LocalRun:
    """Does the tasks of a stage in processes of this machine."""

    pool: Pool
    progress: Progress

    def __call__(self, stage: Stage) -> None:
        todo = _list_todo(stage)
        tell = _Teller(stage, todo, self.progress)
        if self.pool.processes == 1 or len(todo) == 1:  # a worker takes seconds to start
            for task in todo:
                stage.run(task)
                tell(task)
            return
        packed = bytes(ForkingPickler.dumps(stage))
        for task in self.pool.map(_run_task, ((packed, task) for task in todo)):
            tell(task)


def _run_task(packed: bytes, task: int) -> int:
    """Do a task in a worker; the stage may be a list of many files, so it is unpacked once."""
    _unpack_stage(packed).run(task)
    return task


@lru_cache(maxsize=1)
def _unpack_stage(packed: bytes) -> Stage:
    stage: Stage = ForkingPickler.loads(packed)
    return stage


def _list_todo(stage: Stage) -> list[int]:
    return [task for task in range(stage.tasks) if not stage.is_done(task)]


class _Teller:
    """Tells how far a stage is, in bytes where the stage knows them."""

    def __init__(self, stage: Stage, todo: list[int], progress: Progress) -> None:
        self._progress = progress
        self._weigh = stage.task_bytes if isinstance(stage, WeighedStage) else _count_one
        self._what = f"{stage.name} (bytes)" if isinstance(stage, WeighedStage) else stage.name
        self._total = sum(map(self._weigh, range(stage.tasks)))
        self._done = self._total - sum(map(self._weigh, todo))

    def __call__(self, task: int) -> None:
        """Say that a task is done."""
        self._done += self._weigh(task)
        self._progress(self._what, self._done, self._total)


def _count_one(task: int) -> int:
    return 1


# On a cluster


@dataclass(frozen=True)
class ClusterTask:
    """A step of a datatrove pipeline: its rank's share of a stage's tasks, here one.

    What goes wrong is written down for the process that waits: a cluster returns no exceptions.
    """

    stage: Stage
    todo: tuple[int, ...]
    logs: Path
    folder: Path
    """That the paths of the config are relative to."""

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Do the task of a rank."""
        os.chdir(self.folder)
        os.environ.update(
            OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
        )
        task = self.todo[rank]
        try:
            self.stage.run(task)
        except BaseException as error:
            write_whole(_failure_file(self.logs, task), json.dumps(_describe(error)))
            raise


def _failure_file(logs: Path, task: int) -> Path:
    return logs / f"failed-{task:06d}.json"


def _describe(error: BaseException) -> dict[str, Any]:
    if isinstance(error, ShoalError):
        given = {"cause": error.cause, "where": error.where, "fix": error.fix}
        return {"kind": type(error).__name__, **given}
    cause = traceback.format_exception_only(error)[-1].strip()
    return {"kind": "PreflightError", "cause": cause, "where": None, "fix": None}


Look = Callable[[], bool]
"""Tells progress; returns whether tasks are left."""

Submit = Callable[[ClusterTask, Look], None]
"""Has the tasks done and returns when none are left or nothing runs any more."""


@dataclass(frozen=True)
class _ClusterRun:
    """Does the tasks of a stage on a cluster, and proves that they were done."""

    logs: Path
    progress: Progress
    submit: Submit

    def __call__(self, stage: Stage) -> None:
        todo = _list_todo(stage)
        if not todo:
            return
        logs = (self.logs / stage.name.replace(" ", "-").replace(":", "")).absolute()
        if logs.exists():  # datatrove takes what it once noted there for done
            shutil.rmtree(logs)
        logs.mkdir(parents=True)
        tell, left = _Teller(stage, todo, self.progress), list(todo)

        def look() -> bool:
            found = {task for task in left if stage.is_done(task)}
            left[:] = [task for task in left if task not in found]
            for task in sorted(found):
                tell(task)
            return bool(left)

        self.submit(ClusterTask(stage, tuple(todo), logs, Path.cwd()), look)
        # datatrove returns also when tasks failed, by Ray even when all did: their files decide.
        deadline = time.monotonic() + GRACE_SECONDS
        while look() and not any(logs.glob("failed-*.json")) and time.monotonic() < deadline:
            time.sleep(min(1.0, POLL_SECONDS))
        if left:
            raise _make_error(stage, todo, left, logs)


def _make_error(stage: Stage, todo: list[int], left: list[int], logs: Path) -> ShoalError:
    """Make the error of a stage of which some tasks are not done."""
    failed = [task for task in left if _failure_file(logs, task).is_file()]
    task = (failed or left)[0]
    log = logs / "logs" / f"task_{todo.index(task):05d}.log"
    said = {
        "kind": "PreflightError",
        "cause": "it was killed, or ended without a word",
        "where": None,
        "fix": None,
    }
    if failed:
        said = json.loads(_failure_file(logs, task).read_text())
    kinds: dict[str, type[ShoalError]] = {"ConfigError": ConfigError, "DataError": DataError}
    where = log if log.is_file() else logs
    return kinds.get(str(said["kind"]), PreflightError)(
        f"{stage.name}: task {task} failed, {len(left)} of {stage.tasks} are not done: "
        f"{said['cause']}",
        where=f"{said['where']}; its log is {where}" if said["where"] else where,
        fix=said["fix"] or "see the log; run the same command again: what is done is kept",
    )


def _need_cluster(kind: str) -> None:
    """Check that the libraries of an executor are there, and quiet datatrove in this process."""
    try:
        import datatrove.utils.logging

        if kind == "ray":
            import ray  # noqa: F401
    except ImportError as error:
        raise PreflightError(
            f"executor.kind {kind} needs a library that is not installed: {error}",
            where="executor",
            fix="pip install 'shoal[cluster]'",
        ) from None
    datatrove.utils.logging.logger.disable("datatrove")


# Slurm


def _check_slurm() -> None:
    """Check that jobs can be submitted from here."""
    _need_cluster("slurm")
    missing = [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]
    if missing:
        raise PreflightError(
            f"executor.kind slurm needs {' and '.join(missing)}, not found on this machine",
            where="executor",
            fix="run on a machine that submits jobs, or set executor.kind=local",
        )
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise PreflightError(
            "tasks cannot be submitted from a task of a job array", where="executor"
        )


@dataclass(frozen=True)
class _SlurmSubmission:
    """Submits the tasks of a stage as one job array, and waits until it has left the queue."""

    config: SlurmConfig

    def __call__(self, task: ClusterTask, look: Look) -> None:
        executor = self.make_executor(task)
        executor.run()
        try:
            while look() and _is_queued(executor.job_id):
                time.sleep(POLL_SECONDS)
        except BaseException:  # Ctrl-C: nobody would wait for the job any more
            subprocess.run(["scancel", str(executor.job_id)], capture_output=True)
            raise

    def make_executor(self, task: ClusterTask) -> Any:
        """Return datatrove's executor for a task."""
        from datatrove.executor.slurm import SlurmPipelineExecutor

        config = self.config
        account = {"account": config.account} if config.account else {}
        per_job = -(-len(task.todo) // MAX_JOBS)
        # datatrove's own command is beside this Python, which a job's PATH need not hold.
        path = f'export PATH="{Path(sys.executable).parent}:$PATH"'
        executor = SlurmPipelineExecutor(
            pipeline=[task],
            tasks=len(task.todo),
            tasks_per_job=per_job,
            workers=min(config.tasks_at_once, -(-len(task.todo) // per_job)),
            time=config.time,
            partition=config.partition,
            cpus_per_task=config.cpus,
            mem_per_cpu_gb=-(-config.memory_gb // config.cpus),
            job_name=f"shoal-{task.logs.name}",
            qos=config.qos,
            env_command="; ".join(line for line in (config.setup, path) if line),
            sbatch_args={**account, **config.options},
            logging_dir=str(task.logs),
            requeue=False,  # the same command, run again, does what is left
            requeue_signals=None,
        )
        executor.launch_merge_stats = _merge_nothing
        return executor


def _merge_nothing() -> None:
    """Stand in for datatrove's job that adds up its statistics, of which we have none."""


def _is_queued(job: str) -> bool:
    """Whether any task of a job array waits or runs."""
    command = ["squeue", "--noheader", "--jobs", str(job), "--format=%T"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return bool(done.stdout.strip())
    # That of a job which has been over for some minutes is unknown. If the controller does not
    # answer, the job goes on without it.
    return "Invalid job id" not in done.stderr


# Ray


@contextlib.contextmanager
def _connect_ray(address: str | None) -> Iterator[None]:
    """Connect to a cluster of Ray, or start one on this machine for the while."""
    _need_cluster("ray")
    import ray

    ours = not ray.is_initialized()
    if ours:
        cpus = None if address else len(os.sched_getaffinity(0))
        try:
            ray.init(
                address or "local", include_dashboard=False, log_to_driver=False, num_cpus=cpus
            )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise PreflightError(f"Ray does not start: {error}", where="executor") from None
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _run_on_ray(task: ClusterTask, look: Look) -> None:
    """Run the tasks of a stage on Ray's cluster."""
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    executor = RayPipelineExecutor(
        pipeline=[task],
        tasks=len(task.todo),
        workers=max(1, int(ray.cluster_resources().get("CPU", 1))),
        mem_per_cpu_gb=1,
        logging_dir=str(task.logs),
    )
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(executor.run)
        while not wait([running], timeout=POLL_SECONDS).done:
            look()
        running.result()
