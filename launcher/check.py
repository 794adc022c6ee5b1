"""Whether a job over these hosts would run: every host is asked at once, and its ranks sum."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import TYPE_CHECKING

from shoal.configs.errors import (
    ConfigError,
    DataError,
    PreflightError,
    ShoalError,
    StoppedOnRequest,
)
from shoal.configs.load import config_hash, dump_config
from shoal.configs.schema import RunConfig
from shoal.launcher.endings import Interrupted
from shoal.launcher.fanout import run_attempt
from shoal.launcher.findings import Facts, Finding, judge_host
from shoal.launcher.greeting import LOOK_SECONDS, NoAnswerError, ask_host
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.inspection import Request, inspect
from shoal.launcher.meeting import open_meeting
from shoal.launcher.processes import launch_ranks
from shoal.launcher.refusals import explain_refusal
from shoal.launcher.runs import run_folder
from shoal.launcher.world import caught_signals

if TYPE_CHECKING:
    from rich.table import Table

    from shoal.launcher.run import Order

ANSWER_SECONDS = 60.0
FULL_SECONDS = 3600.0
"""Every byte of the shards is read."""
SCREEN_LINES = 40


def check_cluster(
    config: RunConfig,
    hosts: Sequence[Host],
    *,
    full: bool = False,
    probe: bool = True,
    quick: bool = False,
    called_off: Callable[[], bool] = lambda: False,
) -> list[Finding]:
    """Look at every host at once; then, if all is well, let their ranks talk.

    Args:
        config: The run that is planned; its vocabulary size is known, or disks are not weighed.
        hosts: Machines of the job.
        full: Read every byte of the shards.
        probe: Start the ranks for a short all-reduce.
        quick: Look only at what takes no time, and start nothing.
        called_off: Whether nobody waits for it any more; what was not heard then counts as bad.
    """
    folder = run_folder(config).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", prefix=".check-", dir=folder) as token:
        token.write(dump_config(config))
        token.flush()
        request = _make_request(config, folder, token.name, hosts[0])
        request = replace(request, full=full, quick=quick)
        answers = _ask_all(hosts, config, request, called_off)
    for late in folder.glob(f"{Path(token.name).name}-*"):
        late.unlink(missing_ok=True)
    known = [answer for answer in answers if not isinstance(answer, Finding)]
    findings: list[Finding] = []
    for index, answer in enumerate(answers):
        if isinstance(answer, Finding):
            findings.append(answer)
        else:
            try:
                findings += judge_host(hosts, index, answer, known[0], config, quick=quick)
            except (KeyError, TypeError) as error:  # another version answers something else
                findings.append(_explain_crash(hosts[index], error))
    if probe and not quick and all(finding.is_good for finding in findings):
        findings.append(_probe(config, hosts))
    return findings


def _make_request(config: RunConfig, folder: Path, token: str, first: Host) -> Request:
    """Return what every machine is asked about a run; paths are the same on all of them."""
    shards = [str(Path(folder).absolute()) for folder in config.data.local_folders]
    own_disk = config.checkpoint.copies != "shared"
    return Request(str(folder), token, first=first.name, shards=shards, own_disk=own_disk)


def check_before_start(
    hosts: Sequence[Host], config: RunConfig, called_off: Callable[[], bool] = lambda: False
) -> None:
    """Refuse to begin on fewer machines than were asked for, or where one could not train.

    Raises:
        ConfigError: more are asked for than are named.
        DataError: a machine has other shards than the first, or broken ones.
        PreflightError: a machine does not answer, has other versions or files, too few devices...
    """
    if len(hosts) < config.world.min_hosts:
        raise ConfigError(
            f"{config.world.min_hosts} hosts are to be left at least, and {len(hosts)} are named",
            where="world.min_hosts",
        )
    with suppress(ShoalError):  # known once the corpus is prepared; disks are weighed then
        config = resolve_vocab(config)
    found = check_cluster(config, hosts, quick=True, called_off=called_off)
    bad = [one for one in found if not one.is_good]
    if not bad:
        return
    first, others = bad[0], dict.fromkeys(one.host for one in bad[1:] if one.host != bad[0].host)
    more = f" ({len(others)} more: {', '.join(others)})" if others else ""
    kind = DataError if first.check == "shards" else PreflightError
    raise kind(first.text + more, where=first.host, fix=first.fix)


def _ask_all(
    hosts: Sequence[Host], config: RunConfig, request: Request, called_off: Callable[[], bool]
) -> list[Facts | Finding]:
    """Ask all machines side by side; one that hangs is given up without waiting for it."""
    seconds = FULL_SECONDS if request.full else ANSWER_SECONDS
    answers: dict[int, Facts | Finding] = {}
    meeting = None if len(hosts) == 1 or request.quick else (
        open_meeting(hosts[0], config.world.launcher, seconds)
    )  # fmt: skip

    def ask(index: int, host: Host, request: Request) -> None:
        answers[index] = _ask(host, config, request, seconds, called_off)

    def ask_each(request: Request) -> None:
        threads = []
        for index, host in enumerate(hosts):
            mine = replace(request, mark=f"{request.token}-{index}")
            thread = threading.Thread(target=ask, args=(index, host, mine), daemon=True)
            thread.start()
            threads.append(thread)
        deadline = time.monotonic() + seconds + 5  # what is asked for here has no limit of its own
        for thread in threads:
            while thread.is_alive() and time.monotonic() < deadline and not called_off():
                thread.join(LOOK_SECONDS)
        # What reaches other machines is ended by whoever asks.
        for thread in threads if called_off() else ():
            thread.join(2 * LOOK_SECONDS)

    if meeting is None:
        ask_each(request)
    else:
        with meeting as place:
            ask_each(replace(request, meeting=(place.port, place.word)) if place else request)
    lost = f"did not answer within {seconds:.0f} s"
    found = dict(answers)  # who answers from now on is too late
    return [found.get(index) or _refuse(host, lost) for index, host in enumerate(hosts)]


def _ask(
    host: Host,
    config: RunConfig,
    request: Request,
    seconds: float,
    called_off: Callable[[], bool],
) -> Facts | Finding:
    begun = time.time()
    try:
        if is_local(host.name):
            facts = inspect(request)
        else:
            words, way = json.dumps(asdict(request)), config.world.launcher
            facts = ask_host(
                host.name, way, "--inspect", words, seconds=seconds, called_off=called_off
            )
    except NoAnswerError as error:
        if config.world.launcher == "none":
            text = "not looked at: under world.launcher=none nothing but its guard can be asked"
            return Finding(host.name, "reach", True, text, is_known=False)
        found = error.refusal or explain_refusal(host.name, str(error), None)
        return Finding(host.name, "reach", False, found.cause, found.fix)
    except ShoalError as error:  # no srun here
        return Finding(host.name, "reach", False, str(error).splitlines()[0], error.fix)
    except Exception as error:  # of the look at this machine; another one's comes as its answer
        return _explain_crash(host, error)
    ended = time.time()
    facts["seconds"] = ended - begun
    facts["skew"] = max(0.0, begun - facts["time"], facts["time"] - ended)
    facts["marked"] = _take_mark(request)
    facts["expected_config"] = config_hash(config)
    return facts


def _explain_crash(host: Host, error: Exception) -> Finding:
    """Return what is to be said where looking at a host, or at what it says, failed."""
    text = f"cannot be looked at: {type(error).__name__}: {error}"
    fix = "the same checkout of Shoal everywhere; if it is, this is a bug in Shoal"
    return Finding(host.name, "reach", False, text, fix)


def _refuse(host: Host, text: str) -> Finding:
    found = explain_refusal(host.name, text, None)
    return Finding(host.name, "reach", False, found.cause, found.fix)


def _take_mark(request: Request) -> bool:
    """Return whether what a machine has written is seen here, too; and remove it."""
    mark = Path(request.mark or "")
    try:
        seen = mark.read_text(encoding="utf-8") == request.mark
    except OSError:
        return False
    with suppress(OSError):
        mark.unlink()
    return seen


def start_ranks(hosts: Sequence[Host], argv: Sequence[str], config: RunConfig, logs: Path) -> None:
    """Start all ranks once, as a training would, and wait for their end; `logs` is a folder.

    Raises:
        ShoalError: as a training would.
    """
    if len(hosts) == 1 and is_local(hosts[0].name):
        launch_ranks(
            hosts[0].slots,
            argv,
            threads=config.world.threads,
            timeout=config.world.timeout_seconds,
            environment=hosts[0].device_variables,
        )
        return
    with caught_signals() as caught:
        end = run_attempt(hosts, argv, config.world, logs, caught, lambda: False)
    if end.error:
        raise end.error


def _probe(config: RunConfig, hosts: Sequence[Host]) -> Finding:
    """Start all ranks as a training would, and let them sum a tensor."""
    begun = time.monotonic()
    try:
        # Not among the logs of the run: it may be training, and only the newest of them stay.
        with TemporaryDirectory(prefix=".probe-", dir=run_folder(config).absolute()) as name:
            out = Path(name) / "found.json"
            start_ranks(hosts, ["--probe", str(out)], config, Path(name))
            found = json.loads(out.read_text(encoding="utf-8"))
    except (Interrupted, StoppedOnRequest):
        raise
    except ShoalError as error:
        return Finding("all", "all-reduce", False, str(error).splitlines()[0], error.fix)
    except (OSError, ValueError) as error:
        return Finding("all", "all-reduce", False, f"its result cannot be read: {error}")
    seconds = time.monotonic() - begun
    rate = f"{found['bytes_per_second'] / 1e9:.2f} GB/s bus bandwidth over {found['backend']}"
    if found["ranks"] == 1:
        rate = "nothing to send"
    text = f"right on {found['ranks']} ranks, {rate}; started and ended in {seconds:.0f} s"
    return Finding("all", "all-reduce", True, text)


def resolve_vocab(config: RunConfig) -> RunConfig:
    """Return the config with the vocabulary that its model will have; disks are weighed by it.

    Raises:
        ConfigError, DataError: neither the shards nor their config tell.
    """
    from shoal.launcher.plan import find_vocab_size

    model = config.model.with_vocab(find_vocab_size(config))
    return config.model_copy(update={"model": model})


def plan_check(order: Order) -> tuple[RunConfig, list[Host]]:
    """Return the run and the machines that a command line names, as a check needs them."""
    from shoal.launcher.run import find_hosts

    (config,) = order.load()
    config = resolve_vocab(config)
    return config, find_hosts(order, config)


def check_order(order: Order, *, full: bool, probe: bool, as_json: bool) -> int:
    """Look at the hosts of a job that a command line asks for; show it, return the exit code."""
    config, hosts = plan_check(order)
    findings = check_cluster(config, hosts, full=full, probe=probe)
    show_findings(findings, as_json=as_json)
    return 0 if all(finding.is_good for finding in findings) else PreflightError.exit_code


def show_findings(findings: Sequence[Finding], *, as_json: bool) -> None:
    """Print what was found, as a table or as a line of JSON each."""
    from shoal.launcher.tables import show

    if as_json:
        for finding in findings:
            print(json.dumps(asdict(finding)))
    else:
        show(findings_table(findings))


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return a line for each, with remedies behind what is wrong.

    Where that were more than a screen, what is good and alike on several hosts is one line.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    for column in ("host", "check", "", "what was found"):
        table.add_column(column)
    alike: dict[object, list[Finding]] = {}
    for number, finding in enumerate(findings):
        folds = finding.is_good and len(findings) > SCREEN_LINES
        key = (finding.check, finding.text, finding.fix) if folds else number
        alike.setdefault(key, []).append(finding)
    for group in alike.values():
        one = group[0]
        host = one.host if len(group) == 1 else f"{one.host} and {len(group) - 1} more"
        mark = "[green]good[/green]" if one.is_good else "[bold red]BAD[/bold red]"
        mark = mark if one.is_known else "[yellow]?[/yellow]"
        text = one.text + (f"\n  fix: {one.fix}" if one.fix else "")
        table.add_row(host, one.check, mark, escape(text))
    return table
