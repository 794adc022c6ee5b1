"""python -m tests.faults --seed N --count K: draw faults, recover, and report what was lost."""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from tests.faults.campaign import FAULTS, OWN_DISK, Campaign, Trial


def main() -> int:
    """Run the campaign; 1 if any trial has lost something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--count", type=int, default=20, help="trials (default: 20)")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    given = parser.parse_args()
    kinds = [fault for fault in FAULTS if fault not in OWN_DISK or os.geteuid() == 0]
    draw, trials = random.Random(given.seed), list[Trial]()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        campaign = Campaign(Path(folder))
        for number in range(given.count):
            # Every kind once before any twice, in an order of its own.
            if number % len(kinds) == 0:
                draw.shuffle(kinds)
            trials.append(campaign.try_fault(kinds[number % len(kinds)], given.seed + number))
            last = trials[-1]
            verdict = "lost something" if last.problem else "nothing lost"
            print(f"{number + 1:4} {last.fault} at step {last.step}: exit codes {last.codes}, "
                  f"{last.seconds:.1f} s; {verdict}", flush=True)  # fmt: skip
            if last.problem:
                print(last.problem, flush=True)
    text = render(trials, given.seed)
    print(text)
    if given.report:
        given.report.write_text(text)
    return int(any(trial.problem for trial in trials))


def render(trials: list[Trial], seed: int) -> str:
    """Return the report."""
    lost = sum(trial.problem is not None for trial in trials)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed"))
    lines = [
        "# Fault campaign",
        "",
        f"`python -m tests.faults --seed {seed} --count {len(trials)}`: {len(trials)} faults at "
        f"random moments of runs of 2 CPU ranks; {len(trials) - lost} recovered or cleanly refused "
        f"with nothing lost, {lost} not. Nothing lost: the losses of all steps and the weights and "
        "moments of the last checkpoint equal those of an undisturbed run bit for bit, no process "
        "and no file is left behind, and no end is silent.",
        "",
        f"{platform.machine()}, {os.cpu_count()} hardware threads, Python "
        f"{platform.python_version()}, {versions}.",
        "",
        "| fault | trials | nothing lost | median seconds to the end that followed |",
        "|---|---|---|---|",
    ]
    for name in sorted({trial.fault for trial in trials}):
        group = [trial for trial in trials if trial.fault == name]
        whole = sum(trial.problem is None for trial in group)
        middle = statistics.median(trial.seconds for trial in group)
        lines.append(f"| {name.replace('_', ' ')} | {len(group)} | {whole} | {middle:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
