"""The report of a campaign, from the trials that were written down."""

from __future__ import annotations

import os
import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata

from tests.faults.campaign import Trial


def render(trials: Sequence[Trial], seed: int, count: int, notes: str = "") -> str:
    """Return it as Markdown: of those tried so far out of `count`; `notes` says what was found."""
    failed = [trial for trial in trials if trial.problem]
    refused = sum(trial.codes[-2:-1] in ([2], [3], [4]) for trial in trials if not trial.problem)
    hosts = [trial for trial in trials if trial.place != "machine"]
    so_far = "" if len(trials) == count else f", {len(trials)} of them so far"
    lines = [
        "# Fault campaign",
        "",
        f"`python -m tests.faults --seed {seed} --count {count}`{so_far}: "
        f"**{len(trials)} faults at random moments of short runs, {len(trials) - len(failed)} "
        f"recovered or cleanly refused ({refused} refused), {len(failed)} failed; "
        f"{sum(t.lost for t in trials)} rows lost, {sum(t.repeated for t in trials)} repeated.**",
        "",
        f"{len(trials) - len(hosts)} on one machine (2 ranks), {len(hosts)} over two or three "
        "hosts of network namespaces with an sshd each, one or two ranks a host. A trial is good "
        "if the command ended as it should, with an error text wherever it did not end with 0; if "
        "the run then came to its end, by itself or by the same command again; if every row was "
        "read once, as the ranks themselves wrote down, and losses, weights and moments equal "
        "those of an undisturbed run bit for bit (of one that leaves out the same steps, where a "
        "fault makes steps left out; where hosts were lost, and so the count of ranks changed: "
        "losses within 1e-5, weights within 1e-4); if no process is left on any host, and nothing "
        "in /dev/shm or in the temporary folders.",
        "",
        describe_machine(),
        f"{sum(trial.seconds for trial in trials) / 60:.0f} minutes of trials.",
        "",
        *_table(trials),
        "",
        "*Training again*: seconds from the fault until ranks that were started anew have taken "
        "a step, for trials where the job got over it by itself. *Ended*: seconds to the end of "
        "the command, where the fault asks for one or makes one necessary.",
    ]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- trial {t.number}, {t.fault} ({t.place}): {_first_line(t)}" for t in failed]
    if notes:
        lines += ["", notes.strip()]
    return "\n".join(lines) + "\n"


def describe_machine() -> str:
    """Return hardware and versions."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed"))
    return (
        f"{platform.machine()}, {os.cpu_count()} hardware threads, Linux {platform.release()}, "
        f"Python {platform.python_version()}, {versions}."
    )


def _table(trials: Sequence[Trial]) -> list[str]:
    lines = [
        "| fault | where | trials | good | exit codes | training again, median (most) | "
        "ended, median (most) |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        where = "machine" if trial.place == "machine" else "hosts"
        groups.setdefault((trial.fault, where), []).append(trial)
    for (fault, where), group in sorted(groups.items()):
        codes = Counter(", ".join(map(str, trial.codes)) for trial in group)
        cells = [
            fault,
            where,
            str(len(group)),
            str(sum(trial.problem is None for trial in group)),
            "; ".join(f"{code}" for code, _ in codes.most_common()),
            _summarise(trial.again for trial in group),
            _summarise(trial.ended for trial in group),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _summarise(seconds: Iterable[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return f"{statistics.median(known):.0f} s ({max(known):.0f} s)" if known else "–"


def _first_line(trial: Trial) -> str:
    return (trial.problem or "").partition("\n")[0]
