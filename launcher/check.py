"""Whether a job over these hosts would run: one line a host and check, each with its remedy."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from shoal.configs.errors import PreflightError, ShoalError
from shoal.configs.schema import RunConfig
from shoal.launcher.fanout import caught_signals, run_attempt
from shoal.launcher.greeting import NoAnswerError, ask_host
from shoal.launcher.hosts import Host, is_local
from shoal.launcher.inspection import Request, inspect
from shoal.launcher.processes import launch_ranks
from shoal.launcher.runs import run_folder

if TYPE_CHECKING:
    from rich.table import Table

    from shoal.launcher.run import Order

CLOCK_SECONDS = 2.0
SMALL_SHARED_MEMORY = 1 << 30
"""NCCL and PyTorch put buffers there; containers give 64 MB by default."""
Facts = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, on one host or over all (`all`)."""

    host: str
    check: str
    is_good: bool
    text: str
    fix: str | None = None


def check_cluster(
    config: RunConfig, hosts: Sequence[Host], *, full: bool = False, probe: bool = True
) -> list[Finding]:
    """Look at every host at once; then, if all is well, let their ranks talk.

    Args:
        config: The run that is planned; its vocabulary size is known.
        hosts: Machines of the job.
        full: Read every byte of the shards.
        probe: Start the ranks for a short all-reduce.
    """
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    streams = [Path(stream.path).absolute() for stream in config.data.train]
    with NamedTemporaryFile(prefix=".check-", dir=folder.absolute()) as token:
        request = Request(
            str(folder.absolute()), token.name, hosts[0].name, list(map(str, streams)), full
        )
        with ThreadPoolExecutor(len(hosts)) as pool:
            answers = list(pool.map(lambda host: _ask(host, config, request), hosts))
    known = [answer for answer in answers if not isinstance(answer, Finding)]
    findings: list[Finding] = []
    for host, answer in zip(hosts, answers, strict=True):
        if isinstance(answer, Finding):
            findings.append(answer)
        else:
            findings += _judge(host, answer, known[0], config, len(hosts))
    if probe and all(finding.is_good for finding in findings):
        findings.append(_probe(config, hosts))
    return findings


def _ask(host: Host, config: RunConfig, request: Request) -> Facts | Finding:
    begun = time.time()
    try:
        if is_local(host.name):
            facts = inspect(request)
        else:
            words = "--inspect", json.dumps(asdict(request))
            facts = ask_host(host.name, config.world.launcher, *words)
    except NoAnswerError as error:
        if config.world.launcher == "none":
            return Finding(host.name, "reach", True, "nothing but its guard can be asked")
        fix = f"`ssh -o BatchMode=yes {host.name} true` must work from here, and this folder and "
        fix += "this Python must be there too"
        return Finding(host.name, "reach", False, str(error), fix)
    ended = time.time()
    facts["seconds"] = ended - begun
    facts["skew"] = max(0.0, begun - facts["time"], facts["time"] - ended)
    return facts


def _judge(host: Host, facts: Facts, first: Facts, config: RunConfig, count: int) -> list[Finding]:
    """Return what is to be said of a host that has answered, beside the first one that has."""

    def say(check: str, problem: str | None, text: str, fix: str | None = None) -> Finding:
        return Finding(host.name, check, problem is None, problem or text, problem and fix)

    found = [say("reach", None, f"answers in {facts['seconds']:.1f} s")]
    found.append(say("software", *_compare_versions(facts["versions"], first["versions"])))
    found.append(say("devices", *_count_devices(host, facts["devices"])))
    skew = facts["skew"]
    slow = f"its clock is {skew:.0f} s off" if skew > CLOCK_SECONDS else None
    found.append(say("clock", slow, "agrees", "let NTP or chrony set it"))
    alone = None if facts["shares"] else f"does not see {run_folder(config)}"
    found.append(
        say("run folder", alone, "is shared", "mount it at the same path, or give output=FOLDER")
    )
    found.append(say("disk", *_weigh_disk(facts, config)))
    found.append(say("shared memory", *_weigh_shared_memory(facts["shared_memory"])))
    if left := facts["leftovers"]:  # in nobody's way
        text = f"{len(left)} folders of killed jobs, {left[0]} and others like it"
        found.append(Finding(host.name, "leftovers", True, text, "remove them: nobody uses them"))
    broken = next((problem for problem in facts["shards"].values() if problem), None)
    found.append(say("shards", broken, "as recorded, where they exist"))
    if count > 1:
        way = facts["interface"]
        found.append(say("network", way.get("error"), f"over {way.get('name')}", way.get("fix")))
    return found


def _compare_versions(theirs: dict[str, str], ours: dict[str, str]) -> tuple[str | None, str, str]:
    odd = [f"{name} {theirs.get(name)}, on the first host {version}"
           for name, version in ours.items() if theirs.get(name) != version]  # fmt: skip
    text = f"Python {theirs['python']}, torch {theirs['torch']}, Shoal's code {theirs['code']}"
    return "; ".join(odd) or None, text, "`make install` from the same checkout everywhere"


def _count_devices(host: Host, devices: Facts) -> tuple[str | None, str, str]:
    fix = f"write {host.name} slots={devices['count']}, or set CUDA_VISIBLE_DEVICES= for CPU ranks"
    if devices["error"]:
        return devices["error"], "", "see `nvidia-smi` there; a newer driver or an older PyTorch"
    if not devices["count"]:
        return None, f"no GPU: {host.slots} CPU ranks on {devices['cores']} cores", fix
    text = f"{devices['count']} x {devices['names'][0]}"
    few = devices["count"] < host.slots
    return f"{text}, and {host.slots} ranks are asked for" if few else None, text, fix


def _weigh_disk(facts: Facts, config: RunConfig) -> tuple[str | None, str, str]:
    from shoal.launcher.training import needed_bytes

    needed, free = needed_bytes(run_folder(config), config) / 1e9, facts["free_bytes"] / 1e9
    text = f"checkpoints need {needed:.2f} GB of {free:.1f} GB free"
    return text if needed > free else None, text, "free some, or lower checkpoint.keep"


def _weigh_shared_memory(memory: dict[str, int]) -> tuple[str | None, str, str]:
    text = f"{memory['free'] / 1e9:.1f} of {memory['total'] / 1e9:.1f} GB free"
    small = memory["free"] < SMALL_SHARED_MEMORY
    return text if small else None, text, "give the container more: docker run --shm-size=8g"


def _probe(config: RunConfig, hosts: Sequence[Host]) -> Finding:
    """Start all ranks as a training would, and let them sum a tensor."""
    folder = run_folder(config)
    out = folder.absolute() / ".probe.json"
    out.unlink(missing_ok=True)
    argv = ["--probe", str(out)]
    begun = time.monotonic()
    try:
        if len(hosts) == 1 and is_local(hosts[0].name):
            launch_ranks(hosts[0].slots, argv, threads=config.world.threads)
        else:
            with caught_signals() as caught:
                end = run_attempt(hosts, argv, config.world, folder, caught, lambda: False)
            if end.error:
                raise end.error
    except ShoalError as error:
        return Finding("all", "all-reduce", False, str(error).splitlines()[0], error.fix)
    seconds = time.monotonic() - begun
    found = json.loads(out.read_text())
    out.unlink()
    rate = f"{found['bytes_per_second'] / 1e9:.2f} GB/s bus bandwidth over {found['backend']}"
    if found["ranks"] == 1:
        rate = "nothing to send"
    text = f"right on {found['ranks']} ranks, {rate}; started and ended in {seconds:.0f} s"
    return Finding("all", "all-reduce", True, text)


def check_order(order: Order, *, full: bool, probe: bool, as_json: bool) -> int:
    """Look at the hosts of a job that a command line asks for; show it, return the exit code."""
    from shoal.launcher.plan import find_vocab_size
    from shoal.launcher.run import find_hosts
    from shoal.launcher.tables import show

    (config,) = order.load()
    model = config.model.with_vocab(find_vocab_size(config))
    config = config.model_copy(update={"model": model})
    findings = check_cluster(config, find_hosts(order, config), full=full, probe=probe)
    if as_json:
        for finding in findings:
            print(json.dumps(asdict(finding)))
    else:
        show(findings_table(findings))
    return 0 if all(finding.is_good for finding in findings) else PreflightError.exit_code


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return a line for each; remedies are behind what is wrong."""
    from rich.table import Table

    table = Table(box=None)
    for column in ("host", "check", "", "what was found"):
        table.add_column(column)
    for finding in findings:
        mark = "[green]good[/green]" if finding.is_good else "[bold red]BAD[/bold red]"
        text = finding.text + (f"\n  fix: {finding.fix}" if finding.fix else "")
        table.add_row(finding.host, finding.check, mark, text)
    return table
