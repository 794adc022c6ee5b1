"""How a job would be started, for each way: commands, environment, a script for Slurm."""

from __future__ import annotations

import base64
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from shoal.configs.errors import ConfigError
from shoal.configs.schema import RunConfig, WorldConfig
from shoal.launcher.commands import Shown, Way, call_commands, guard_command, ssh_command
from shoal.launcher.fanout import make_tasks
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.lines import KEY_FILE
from shoal.launcher.output import LAUNCH_FILE
from shoal.launcher.processes import WORKER
from shoal.launcher.runs import run_folder

if TYPE_CHECKING:
    from shoal.launcher.run import Order

DEEPSPEED_PORT = 29500
WARN_SECONDS = 120
"""How long before its end Slurm warns a job."""


def describe_ways(order: Order, config: RunConfig, hosts: Sequence[Host]) -> list[str]:
    """Return the lines of a dry run that say what would be run where, the chosen way by default."""
    shown = order.show or config.world.launcher
    lines = []
    ways: tuple[Shown, ...] = get_args(Shown)
    for way in ways[:-1] if shown == "all" else (shown,):
        if way == "sbatch" and shown == "all" and len({host.slots for host in hosts}) > 1:
            continue
        if way == "sbatch":
            lines += ["", "a script for sbatch", *_indent(write_batch_script(order, config, hosts))]
        elif way == "deepspeed":
            lines += ["", "start by DeepSpeed itself", *_indent(_start_by_deepspeed(order, hosts))]
        elif is_alone(hosts) and shown == "all" and way != "ssh":
            continue  # nothing but this machine: they are all alike
        elif is_alone(hosts):
            lines += ["", "start on this machine", *_indent(_start_here(config, hosts[0]))]
        else:
            start = _start_by(cast("Way", way), config, hosts)
            lines += ["", f"start by world.launcher={way}", *_indent(start)]
    return lines


def is_alone(hosts: Sequence[Host]) -> bool:
    """Return whether a job needs no guard: this machine is all of it."""
    return len(hosts) == 1 and is_local(hosts[0].name)


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" if line else "" for line in lines]


def _start_here(config: RunConfig, host: Host) -> list[str]:
    torchrun = ["torchrun", "--standalone", f"--nproc-per-node={host.slots}", "--no-python"]
    return [
        shlex.join([*torchrun, *WORKER, _launch_file(config)]),
        *_list_environment(config.world, [host], "127.0.0.1"),
    ]


def _start_by(way: Way, config: RunConfig, hosts: Sequence[Host]) -> list[str]:
    """Return who starts the guards, what those start, and what the ranks find."""
    others = [host.name for host in hosts if not is_local(host.name)]
    lines = [f"{h.name} (this machine)  {shlex.join(guard_command('FD'))}"
             for h in hosts if is_local(h.name)]  # fmt: skip
    if way == "ssh":
        lines += [f"{name}  {shlex.join(ssh_command(name))}" for name in others]
    else:
        key = _log_folder(config) / KEY_FILE
        commands = call_commands(way, others, "LAUNCHER:PORT", key)
        names = others if way == "none" else [",".join(others)]
        for name, command in zip(names, commands, strict=True):
            typed = command[-1] if way == "none" else shlex.join(command)
            lines.append(f"{name}{' (type it)' if way == 'none' else ''}  {typed}")
    torchrun = ["torchrun", "--nproc-per-node=RANKS", "--no-python"]
    lines.append(f"each guard  {shlex.join([*torchrun, *WORKER, _launch_file(config)])}")
    return [*lines, *_list_environment(config.world, hosts, hosts[0].name)]


def _launch_file(config: RunConfig) -> str:
    return str(_log_folder(config) / LAUNCH_FILE)


def _log_folder(config: RunConfig) -> Path:
    return run_folder(config) / "logs" / "attempt-N"


def _list_environment(world: WorldConfig, hosts: Sequence[Host], address: str) -> list[str]:
    """Return what every rank finds in its environment, one line a host."""
    num_ranks = sum(host.slots for host in hosts)
    port = "MASTER_PORT=FREE (another for every attempt)"
    lines = [f"all ranks  MASTER_ADDR={address} WORLD_SIZE={num_ranks} {port}"]
    for task, host in zip(make_tasks(hosts, [], world, os.environ), hosts, strict=True):
        ranks, local_ranks = task.global_ranks, range(task.ranks)
        threads = f"CORES/{host.slots}" if world.threads == "auto" else world.threads
        said = {
            "RANK": ",".join(map(str, ranks)),
            "LOCAL_RANK": ",".join(map(str, local_ranks)),
            "LOCAL_WORLD_SIZE": host.slots,
            "NODE_RANK": task.host,
            "OMP_NUM_THREADS": threads,
            **task.environment,
        }
        words = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in said.items())
        lines.append(f"{host.name}  {words}")
    return lines


def _start_by_deepspeed(order: Order, hosts: Sequence[Host]) -> list[str]:
    """Return DeepSpeed's own order of words, and what it runs then."""
    selection = [word for flag, text in (("--include", order.include), ("--exclude", order.exclude))
                 if text for word in (flag, text)]  # fmt: skip
    options = ["--hostfile", order.hostfile or "hosts", *selection]
    script = [script_path(), *order.words]
    slots = {host.name: list(host.devices or range(host.slots)) for host in hosts}
    info = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    launch = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={info}"]
    where = [f"--master_addr=ADDRESS_OF_{hosts[0].name}", f"--master_port={DEEPSPEED_PORT}"]
    lines = [shlex.join(["deepspeed", *options, *script])]
    if len(hosts) == 1:
        lines.append(f"{hosts[0].name}  {shlex.join([*launch, *where, *script])}")
    else:
        names = ",".join(slots)
        remote = shlex.join([*launch, "--node_rank=%n", *where, *script])
        command = f"export NAME=VALUE; cd {shlex.quote(str(Path.cwd()))}; {remote}"
        lines.append(f"{names}  pdsh -S -f 1024 -w {names} {shlex.quote(command)}")
    says = "RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE CROSS_RANK CROSS_SIZE CUDA_VISIBLE_DEVICES"
    return [
        *lines,
        f"all ranks  {says} MASTER_ADDR MASTER_PORT={DEEPSPEED_PORT} are DeepSpeed's; "
        "LOCAL_WORLD_SIZE NODE_RANK OMP_NUM_THREADS are added in each rank",
        "It asks the first host by ssh for its address. Attempts, host checks and logs of each "
        "rank are what the other order of words adds.",
    ]


def script_path() -> str:
    """Return run.py as a user can name it from here."""
    script, here = Path(__file__).with_name("run.py"), Path("launcher/run.py")
    return str(here if here.is_file() and here.samefile(script) else script)


def write_batch_script(order: Order, config: RunConfig, hosts: Sequence[Host]) -> list[str]:
    """Return the lines of a script that sbatch takes as it is.

    The launcher runs on the first node. Slurm's warning lets it save and end with exit code 5, and
    the job is queued again; a job that was cancelled is not.

    Raises:
        ConfigError: hosts with different numbers of ranks, which one allocation does not give.
    """
    own = ("world.launcher=", "world.ranks=")
    words = [word for word in order.words if not word.startswith(own)]
    words += ["world.launcher=slurm", f"world.ranks={_count_slots(hosts)}"]
    on_cpu = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    command = shlex.join([sys.executable, script_path(), *words])
    return [
        "#!/bin/bash",
        *(f"#SBATCH {word}" for word in _ask_of_slurm(config, hosts, on_cpu=on_cpu)),
        "",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        *(["export CUDA_VISIBLE_DEVICES="] if on_cpu else []),
        # Before the launcher, which a signal that comes first would leave behind alone.
        "trap 'kill -USR1 $!; again=1' USR1  # the end is near: save",
        "trap 'kill -TERM $!; again=1; cancelled=1' TERM",
        f"{command} &",
        "again=1",
        'while [ "$again" ]; do again=; wait $!; code=$?; done  # a trap ends a wait',
        'state=$(scontrol show job "$SLURM_JOB_ID" | grep -o "JobState=[A-Z]*")',
        'if [ "$code" = 5 ] && [ -z "$cancelled" ] && [ "$state" = JobState=RUNNING ]; then',
        '    scontrol requeue "$SLURM_JOB_ID"  # saved, and not done',
        "fi",
        'exit "$code"',
    ]


def _count_slots(hosts: Sequence[Host]) -> int:
    """Return how many ranks every host has; see `write_batch_script` for what it raises."""
    counts = sorted({host.slots for host in hosts})
    if len(counts) > 1:
        raise ConfigError(
            f"Slurm gives every node alike, and the hosts have {', '.join(map(str, counts))} slots",
            where="--show sbatch",
            fix="give all hosts of the hostfile the same number of slots",
        )
    return counts[0]


def _ask_of_slurm(config: RunConfig, hosts: Sequence[Host], *, on_cpu: bool) -> list[str]:
    """Return the options of a batch script."""
    limit = config.world.time_limit_minutes
    return [
        f"--job-name={config.name}",
        f"--nodes={len(hosts)}",
        "--ntasks-per-node=1",
        *([] if on_cpu else [f"--gpus-per-node={_count_slots(hosts)}"]),
        "--exclusive",
        *([f"--time={math.ceil((limit * 60 + WARN_SECONDS) / 60)}"] if limit else []),
        "--no-kill",
        "--requeue",
        f"--signal=B:USR1@{WARN_SECONDS}",
        "--open-mode=append",
        f"--output={config.name}-%j.log",
    ]
