"""What is to be said of a host that has answered a check: good or bad, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.configs.schema import RunConfig
from shoal.launcher.hosts import Host
from shoal.launcher.meeting import OPEN_PORTS
from shoal.launcher.runs import run_folder

CLOCK_SECONDS, START_CLOCK_SECONDS = 2.0, 60.0
"""Off by so much a clock is worth a word; by so much no job is begun."""
SMALL_SHARED_MEMORY = 1 << 30
"""NCCL and PyTorch put buffers there; containers give 64 MB by default."""
SLOW_SECONDS = 20.0
Facts = dict[str, Any]
Verdict = tuple[str | None, str, str]
"""What is wrong, if anything; what to say otherwise; the remedy."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, on one host or over all (`all`)."""

    host: str
    check: str
    is_good: bool
    text: str
    fix: str | None = None
    is_known: bool = True
    """Whether it could be looked at."""


def judge_host(
    hosts: Sequence[Host], index: int, facts: Facts, first: Facts, config: RunConfig, *, quick: bool
) -> list[Finding]:
    """Return what is to be said of a host, beside the first one that has answered.

    Args:
        hosts: Machines of the job.
        index: Which of them it is.
        facts: What it says (`inspection.inspect`), and how that took.
        first: What the first one says.
        config: The run that is planned.
        quick: Only what was looked at before a start, and only what would stop it.
    """
    host = hosts[index]
    limit = START_CLOCK_SECONDS if quick else CLOCK_SECONDS
    verdicts: dict[str, Verdict] = {
        "reach": (None, _describe_answer(facts["seconds"]), ""),
        "software": _compare_versions(facts["versions"], first["versions"]),
        "config": _compare_config(facts),
        "devices": _count_devices(host, facts["devices"], first["devices"]),
        "clock": _read_clock(facts["skew"], limit),
        "run folder": _judge_folder(facts, config),
        "disk": _weigh_disk(facts, config, is_first=index == 0),
        "shards": _judge_shards(facts["shards"], first["shards"], config, quick=quick),
    }
    if not quick:
        verdicts["driver"] = _judge_driver(facts["driver"])
        several_gpus = host.slots > 1 and facts["devices"]["count"] > 1
        verdicts["shared memory"] = _weigh_shared_memory(facts["shared_memory"], several_gpus)
        if len(hosts) > 1:  # one alone meets on its own loopback
            tried = config.world.launcher != "none"
            verdicts["network"] = _judge_way(facts["interface"], tried)
    found = [
        Finding(host.name, check, problem is None, problem or text, (problem or None) and fix)
        for check, (problem, text, fix) in verdicts.items()
    ]
    return found if quick else found + _mention(host, facts)


def _mention(host: Host, facts: Facts) -> list[Finding]:
    """Return what is in nobody's way, and worth a word."""
    found = []
    if left := facts["leftovers"]:
        what = f"{len(left)} of killed jobs: {left[0]}" + (" and others" if left[1:] else "")
        fix = "nobody uses them: `shoal runs --clean` there, or remove them"
        found.append(Finding(host.name, "leftovers", True, what, fix))
    if remarks := (facts["driver"] or {}).get("remarks"):
        fix = "`nvidia-smi -pm 1` as root: devices wake up faster, and errors are kept"
        found.append(Finding(host.name, "driver", True, remarks[0], fix))
    return found


def _describe_answer(seconds: float) -> str:
    return f"answers in {seconds:.1f} s" if seconds > SLOW_SECONDS else "answers"


def _compare_versions(theirs: dict[str, str], ours: dict[str, str]) -> Verdict:
    odd = [f"{name} {theirs.get(name)}, on the first host {version}"
           for name, version in ours.items() if theirs.get(name) != version]  # fmt: skip
    text = ", ".join(f"{word} {theirs[name]}" for word, name in {
        "Python": "python", "torch": "torch", "CUDA": "CUDA", "NCCL": "NCCL",
        "DeepSpeed": "deepspeed", "Shoal": "shoal", "code": "code",
    }.items() if name in theirs)  # fmt: skip
    return "; ".join(odd) or None, text, "`make install` from the same checkout everywhere"


def _compare_config(facts: Facts) -> Verdict:
    theirs, ours = facts["config"], facts["expected_config"]
    if theirs is None:  # the run folder says why
        return None, "not seen", ""
    fix = "the same checkout of Shoal everywhere, and a run folder that is really shared"
    return (
        None if theirs == ours else f"reads the config as {theirs}, here it is {ours}",
        f"resolves to {ours}",
        fix,
    )


def _count_devices(host: Host, devices: Facts, first: Facts) -> Verdict:
    count = devices["count"]
    fix = f"write {host.name} slots={count}, or set CUDA_VISIBLE_DEVICES= for CPU ranks"
    if devices["error"]:
        return devices["error"], "", "see `nvidia-smi` there; a newer driver or an older PyTorch"
    if bool(count) != bool(first["count"]):
        problem = f"{count or 'no'} GPUs, and {first['count'] or 'none'} on the first host"
        return problem, "", "leave it out, or set CUDA_VISIBLE_DEVICES= for CPU ranks on all hosts"
    if not count:
        return None, f"no GPU: {host.slots} CPU ranks on {devices['cores']} cores", fix
    text = f"{count} x {(devices['names'] or ['GPU'])[0]}"
    highest = max(host.devices or range(host.slots))
    if highest >= count:
        asked = f"slot {highest} is chosen" if host.devices else f"{host.slots} ranks are asked for"
        return f"{text}, and {asked}", "", fix
    return None, text, fix


def _read_clock(skew: float, limit: float) -> Verdict:
    slow = f"its clock is {skew:.0f} s off" if skew > limit else None
    return slow, "agrees", "let NTP or chrony set it"


def _judge_folder(facts: Facts, config: RunConfig) -> Verdict:
    folder = run_folder(config).absolute()
    fix = "mount it at the same path everywhere, or give output=FOLDER; checkpoint.copies=every "
    fix += "where each host has a disk of its own"
    is_shared = config.checkpoint.copies == "shared"
    if is_shared and not facts["shares"]:
        problem = f"does not share the run folder {folder}: no checkpoint would be whole"
    elif facts["writes"]:
        fix = "check how it is mounted there, and who owns it"
        problem = f"cannot write to the run folder {folder}: {facts['writes']}"
    elif is_shared and not facts["marked"]:
        problem = f"what it writes to the run folder {folder} is not seen here"
    else:
        return None, "is shared, both ways" if is_shared else "can be written", ""
    return problem, "", fix


def _weigh_disk(facts: Facts, config: RunConfig, *, is_first: bool) -> Verdict:
    from shoal.launcher.training import needed_bytes

    free = facts["free_bytes"] / 1e9
    if config.model.vocab_size is None:  # known once the corpus is prepared
        return None, f"{free:.1f} GB free", ""
    needed = needed_bytes(run_folder(config), config, is_first=is_first) / 1e9
    text = f"checkpoints need {needed:.2f} GB of {free:.1f} GB free"
    fix = "free some, write elsewhere (output=FOLDER), or lower checkpoint.keep"
    return text if needed > free else None, text, fix


def _judge_shards(theirs: Facts, ours: Facts, config: RunConfig, *, quick: bool) -> Verdict:
    """Compare the shards of a host with the manifest, and with those of the first host."""
    fix = "copy them from a host that has them, or prepare the corpus again"
    for folder, facts in theirs.items():
        first = ours[folder]
        if facts["problem"]:
            return facts["problem"], "", fix
        # Before a start: the ranks say so at once, and better.
        missing = first["is_there"] if quick else True
        if not facts["is_there"] and not config.prepare and missing:
            fix = "`shoal prepare CORPUS` there, or mount them at the same path"
            return f"{folder} holds no shards", "", fix
        if first["identity"] and facts["identity"] not in (None, first["identity"]):
            odd = f"{facts['identity']}, on the first host {first['identity']}"
            return f"{folder} holds other rows: {odd}", "", fix
    seen = {facts["read"] for facts in theirs.values() if facts["is_there"]}
    if len(seen) < 1:
        return None, "not there yet: prepared when training starts", ""
    return None, f"as recorded ({', '.join(sorted(seen))} read)", ""


def _judge_driver(driver: Facts | None) -> Verdict:
    if driver is None:
        return None, "no nvidia-smi here", ""
    problems = driver["problems"]
    more = f" ({len(problems) - 1} more)" if problems[1:] else ""
    fix = (
        "leave that device out (CUDA_VISIBLE_DEVICES), reset it or restart the host, and have its "
    )
    fix += "memory and links tested if it comes back"
    return (
        f"{problems[0]}{more}" if problems else None,
        f"NVIDIA {driver['version']}, no errors",
        fix,
    )


def _weigh_shared_memory(memory: dict[str, int], several_gpus: bool) -> Verdict:
    text = f"{memory['free'] / 1e9:.1f} of {memory['total'] / 1e9:.1f} GB free"
    small = memory["free"] < SMALL_SHARED_MEMORY and several_gpus
    return text if small else None, text, "give the container more: docker run --shm-size=8g"


def _judge_way(way: Facts, tried: bool) -> Verdict:
    """Judge the way to the first host, where it has opened a port if that was tried."""
    text = f"over {way.get('name')}"
    if "port" in way:
        text += f", reaches the first host on port {way['port']}"
    elif tried and "error" not in way:
        return "the first host has opened no port to try", "", "see what is said of that host"
    return way.get("error"), text, way.get("fix") or OPEN_PORTS
