"""The documented command: `deepspeed launcher/run.py --hostfile hosts [CONFIG] [key=value ...]`.

This file runs in three places. As the launcher it starts the ranks of the hostfile; as a rank of
that launcher (--worker), or of DeepSpeed's or torchrun's own, it trains. DeepSpeed hands options
after the script's name to the script, so in the command above its own ranks become launchers: the
first acts, the others leave.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

# `python launcher/run.py` puts this folder first on the import path, where its files (hosts.py,
# study.py, ...) would hide other people's modules of those names.
if not __package__:
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

try:
    from shoal.configs.errors import ConfigError, ShoalError
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}\n  fix: run `make install` once, or `pip install -e .`")

from shoal.configs.load import load_config
from shoal.configs.schema import RunConfig, WorldConfig
from shoal.launcher.commands import Shown

if TYPE_CHECKING:
    from shoal.launcher.hosts import Host
    from shoal.launcher.watchdog import Watchdog
    from shoal.launcher.world import StopRequest

DEFAULT_CONFIG = "default.yaml"
OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=")
EPILOG = """\
examples:
  deepspeed launcher/run.py --hostfile hosts
      train configs/default.yaml with the ranks that the file `hosts` asks for
      (one line: localhost slots=2); its corpus is prepared first if absent
  python launcher/run.py --hostfile hosts configs/default.yaml name=fast optim.lr=3e-3
      the same without DeepSpeed's launcher, another config, one value changed
  deepspeed launcher/run.py --hostfile hosts --include "n1@n2:0,2"
      all slots of n1 and two of n2, in the words DeepSpeed has for it
  deepspeed launcher/run.py --hostfile hosts --dry-run
      print ranks, devices, batch, commands and environment; start nothing
  python launcher/run.py --hostfile hosts --show sbatch > job.sh
      the same job as a script for Slurm

The same command again continues from the newest checkpoint. Ctrl-C, SIGTERM, SIGUSR1 (Slurm's
warning) and world.time_limit_minutes save and stop.
exit codes: 0 done, 2 usage or configuration, 3 data, 4 preflight,
            5 stopped on request with a checkpoint saved (start it again), 128 + N ended by
            signal N before there was anything to save, 6 every attempt failed, 1 other
"""


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    configs: tuple[str, ...]
    overrides: tuple[str, ...]
    hostfile: str | None = None
    include: str = ""
    exclude: str = ""
    dry_run: bool = False
    worker: bool = False
    probe: str | None = None
    """File that says what the ranks do instead of training, or gets what they find; `rehearsal`."""

    show: Shown | None = None
    """The way of starting that a dry run shows; None: the one that is configured."""

    @property
    def words(self) -> list[str]:
        """Configs and overrides, as they were given."""
        return [*self.configs, *self.overrides]

    def load(self) -> list[RunConfig]:
        """Load the configs with the overrides applied to each."""
        return [load_config(RunConfig, config, self.overrides) for config in self.configs]


def parse_order(argv: Sequence[str]) -> Order:
    """Read the command line; `key=value` words are overrides, the others are configs."""
    parser = argparse.ArgumentParser(
        prog="launcher/run.py",
        description="Train one model on the ranks of a hostfile, or of this machine without one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-H", "--hostfile", metavar="FILE", help="lines `NAME slots=RANKS`")
    for flag, help_text in {"include": "train on `NAME[:SLOT,...]@...` alone",
                            "exclude": "train on all but these"}.items():  # fmt: skip
        names = (f"-{flag[0]}", f"--{flag}")
        parser.add_argument(*names, metavar="SELECTION", default="", help=help_text)
    parser.add_argument("--dry-run", action="store_true", help="show the plan, start nothing")
    parser.add_argument(
        "--show",
        choices=get_args(Shown),
        help="the plan for this way of starting; sbatch: a script to submit",
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG | key=value", help="see examples")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--probe", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args(argv)
    options = {k: v for k, v in vars(given).items() if k not in ("words", "local_rank")}
    return make_order(given.words, **options)


def make_order(words: Sequence[str], **options: Any) -> Order:
    """Sort words into overrides and configs; only a worker takes several configs.

    `options` are further fields of the order.

    Raises:
        ConfigError: more than one config.
    """
    overrides = tuple(word for word in words if OVERRIDE.match(word))
    configs = tuple(word for word in words if not OVERRIDE.match(word))
    if len(configs) > 1 and not options.get("worker"):
        raise ConfigError(
            f"one config at a time, not {len(configs)}: {', '.join(configs)}",
            where="command line",
            fix="overrides are written key=value, without spaces",
        )
    order = Order(configs or (DEFAULT_CONFIG,), overrides, **options)
    return replace(order, dry_run=True) if order.show else order


def execute(order: Order) -> None:
    """Be the launcher, one of its ranks, or a rank of another launcher.

    Raises:
        ShoalError: named; before anything was started where that is possible.
    """
    from shoal.launcher.adoption import adopt_rank, find_pod, run_pod
    from shoal.launcher.runs import check_may_begin

    if order.worker:
        run_rank(order)
    foreign, pod = adopt_rank(), find_pod()
    if pod and order.hostfile is None and not order.dry_run:
        (config,) = order.load()
        if pod.host == 0:
            check_may_begin(config)
        with _naming_checkpoint(config):
            run_pod(pod, order.words, config.world)
        return
    first = os.environ.get("RANK", "0") == "0"
    if foreign and order.hostfile is None and not order.dry_run:
        run_foreign_rank(order)
    if foreign and order.hostfile:
        _check_single_launch()
    if first or not foreign:
        launch(order, watch=_ancestors() if foreign else ())


def find_hosts(order: Order, config: RunConfig) -> list[Host]:
    """Return the machines of a job: of the hostfile, of the Slurm allocation, or this one alone.

    Raises:
        ConfigError: the hostfile or the selection cannot be used, or there is no allocation.
    """
    from shoal.launcher.hosts import check_hosts, read_hostfile, select_hosts

    if order.hostfile is None:
        return select_hosts(_find_hosts(order, config), order.include, order.exclude)
    hosts = select_hosts(read_hostfile(order.hostfile), order.include, order.exclude)
    check_hosts(hosts, where=order.hostfile)
    return hosts


def _find_hosts(order: Order, config: RunConfig) -> list[Host]:
    """Return the machines of a job without a hostfile."""
    from shoal.launcher.hosts import Host, hosts_of_deepspeed
    from shoal.launcher.slurm import allocated_hosts, in_allocation
    from shoal.launcher.world import foreign_ranks, resolve_ranks, under_foreign_launcher

    if order.dry_run and under_foreign_launcher():
        return hosts_of_deepspeed() or [Host("localhost", foreign_ranks()[0])]
    ranks = config.world.ranks
    if config.world.launcher == "slurm" and not (order.dry_run and not in_allocation()):
        return allocated_hosts(slots=None if ranks == "auto" else ranks)
    return [Host("localhost", resolve_ranks(ranks))]


def launch(order: Order, watch: Sequence[int] = ()) -> None:
    """Start the ranks and wait for them; with --dry-run only say what would be."""
    from shoal.launcher.plan import print_plan
    from shoal.launcher.runs import check_may_begin

    config = order.load()[0]
    hosts = find_hosts(order, config)
    if order.dry_run:
        print_plan(order, config, hosts)
        return
    from shoal.launcher.supervision import supervise

    check_may_begin(config)
    with _naming_checkpoint(config):
        supervise(hosts, config, watch)


@contextmanager
def _naming_checkpoint(config: RunConfig) -> Iterator[None]:
    """Let an error say where the newest checkpoint is."""
    from shoal.launcher.runs import run_folder
    from shoal.launcher.screen import newest_checkpoint_note

    try:
        yield
    except ShoalError as error:
        note = newest_checkpoint_note(run_folder(config))
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def run_rank(order: Order) -> NoReturn:
    """Train as a rank that `launch` started: dies with it, and tells it how this ended."""
    from shoal.launcher.outcomes import die_with_parent, report_hang, report_mark, report_outcome
    from shoal.launcher.watchdog import Watchdog
    from shoal.launcher.world import STOP_SIGNALS, StopRequest

    die_with_parent()
    stop = StopRequest()
    stop.install(STOP_SIGNALS)
    _leave(report_outcome(lambda: _train(order, stop, Watchdog(report_hang, report_mark))))


def run_foreign_rank(order: Order) -> NoReturn:
    """Train as a rank that DeepSpeed's launcher or torchrun started.

    Those may be killed without their ranks noticing, so the ranks watch them; and DeepSpeed starts
    a hostfile of one other machine on this one, so the ranks look at what it was told.
    """
    from shoal.launcher.adoption import complete_environment
    from shoal.launcher.hosts import check_deepspeeds_hosts, hosts_of_deepspeed
    from shoal.launcher.runs import check_may_begin
    from shoal.launcher.screen import guard, show_error
    from shoal.launcher.watchdog import Watchdog
    from shoal.launcher.world import STOP_SIGNALS, StopRequest, command_age, seconds_to_train

    stop = StopRequest()
    stop.install(STOP_SIGNALS)

    def work() -> None:
        check_deepspeeds_hosts(hosts_of_deepspeed())
        config = order.load()[0]
        if os.environ["RANK"] == "0":
            check_may_begin(config)
        complete_environment(config.world.threads)
        stop.request_in(seconds_to_train(config.world) - command_age())
        stop.request_when_gone(_ancestors())
        try:
            with _naming_checkpoint(config):
                _train(order, stop, Watchdog(lambda error, _: show_error(error)))
        except ShoalError as error:
            error.add_note(f"rank {os.environ['RANK']} on {socket.gethostname()}")
            raise

    _leave(guard(work))


def _train(order: Order, stop: StopRequest, watchdog: Watchdog) -> None:
    from shoal.launcher.world import World

    if order.probe:
        from shoal.launcher.rehearsal import rehearse

        world = World.detect(stop, watchdog)
        world.setup(WorldConfig())
        rehearse(world, Path(order.probe))
        return
    configs = order.load()
    world = World.detect(stop, watchdog)
    world.setup(configs[0].world)
    from shoal.launcher.training import train

    train(configs, world)


def _leave(code: int) -> NoReturn:
    """End now: what a broken process group does in destructors may hang or crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_single_launch() -> None:
    """Refuse to be the launcher inside a job that already spans hosts."""
    hosts = int(os.environ.get("CROSS_SIZE", "1"))
    if hosts > 1:
        raise ConfigError(
            f"--hostfile after the script's name, inside a job already started on {hosts} hosts",
            where="command line",
            fix="give the hostfile once: deepspeed launcher/run.py --hostfile hosts",
        )


def _ancestors() -> list[int]:
    """Return the process ids of what started this rank: the launcher, and DeepSpeed's runner.

    When the runner alone is killed its launcher is adopted and runs on, so the parent is not
    enough to watch. What started torchrun is no business of its ranks: a shell may log out.
    """
    import psutil

    def is_deepspeed(process: psutil.Process) -> bool:
        try:
            return any("deepspeed" in word for word in process.cmdline())
        except psutil.Error:
            return False

    parents = psutil.Process().parents()
    watched = parents[:1] + [parent for parent in parents[1:2] if is_deepspeed(parent)]
    return [process.pid for process in watched if process.pid > 1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    from shoal.launcher.screen import guard

    order: list[Order] = []
    code = guard(lambda: order.append(parse_order(sys.argv[1:] if argv is None else argv)))
    if code:
        return code
    return guard(lambda: execute(order[0]))


if __name__ == "__main__":
    sys.exit(main())
