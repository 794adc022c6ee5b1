"""python -m tests.faults --seed N --count K: draw faults, recover, and report what was lost.

With --report FILE every trial is also written to FILE's neighbour with the ending .jsonl; the same
command goes on where it was stopped, and --only does a part of the trials (0-24, or 7).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.faults.campaign import Campaign, Trial, draw_faults
from tests.faults.faults import FAULTS
from tests.faults.lab import LabHost, open_lab, why_not
from tests.faults.report import render

MOST_HOSTS = 3
NOTES = "## Found and mended"


def main() -> int:
    """Run the campaign, or a part of it; 1 if any trial has lost something."""
    given = _parse()
    done = _read(given.report)
    drawn = enumerate(draw_faults(given.seed, given.count, list_kinds()))
    chosen = [
        (number, fault, place)
        for number, (fault, place) in drawn
        if number not in done
        and number in given.only
        and fault in (given.fault or FAULTS)
        and place in (given.place or place)
    ]
    with contextlib.ExitStack() as stack:
        hosts: Sequence[LabHost] = ()
        if any(place == "hosts" for _, _, place in chosen):
            hosts = stack.enter_context(open_lab(MOST_HOSTS))
        # What went wrong stays, to be looked at.
        folder = Path(tempfile.mkdtemp(prefix="faults-"))
        campaign = Campaign(folder, hosts)

        def attempt(number: int, name: str, place: str) -> None:
            trial = campaign.try_fault(number, name, place, given.seed)
            done[number] = trial
            _write(given.report, trial)
            _show(trial)

        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(lambda words: attempt(*words), chosen))
    trials = [done[number] for number in sorted(done)]
    text = render(trials, given.seed, given.count, _notes(given.report))
    if given.report:
        given.report.write_text(text)
    else:
        print(text)
    if any(trial.problem for trial in trials):
        print(f"what is left of the trials that failed: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def list_kinds() -> list[tuple[str, str]]:
    """Return (fault, place) of all that can be tried here, and say what cannot."""
    kinds = []
    reason = why_not()
    if reason:
        print(f"faults of hosts are left out: {reason}", flush=True)
    for fault in FAULTS.values():
        if fault.own_disk and os.geteuid() != 0:
            print(f"{fault.name} is left out: mounting needs root", flush=True)
            continue
        kinds += [(fault.name, place) for place in fault.places if place == "machine" or not reason]
    return kinds


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--count", type=int, default=20, help="trials in all (default: 20)")
    parser.add_argument("--only", type=_parse_range, help="FIRST-LAST or a number: of the trials")
    parser.add_argument("--fault", action="append", choices=sorted(FAULTS), help="only this kind")
    parser.add_argument("--place", choices=["machine", "hosts"], help="only there")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time (default: 1)")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    given = parser.parse_args()
    given.only = range(given.count) if given.only is None else given.only
    return given


def _parse_range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _read(report: Path | None) -> dict[int, Trial]:
    """Return the trials of earlier calls, by number."""
    file = report.with_suffix(".jsonl") if report else None
    if file is None or not file.is_file():
        return {}
    trials = [Trial(**json.loads(line)) for line in file.read_text().splitlines()]
    return {trial.number: trial for trial in trials}


def _write(report: Path | None, trial: Trial) -> None:
    if report:
        with report.with_suffix(".jsonl").open("a") as file:
            file.write(json.dumps(asdict(trial)) + "\n")


def _notes(report: Path | None) -> str:
    """Return what a person has added to an earlier report."""
    text = report.read_text() if report and report.is_file() else ""
    return text[text.index(NOTES) :] if NOTES in text else ""


def _show(trial: Trial) -> None:
    verdict = "FAILED" if trial.problem else "good"
    again = f", trained again after {trial.again:.1f} s" if trial.again else ""
    print(
        f"{trial.number:4} {trial.fault} ({trial.place}) at step {trial.step}: exit codes "
        f"{trial.codes}{again}, {trial.seconds:.0f} s in all; {verdict}",
        flush=True,
    )
    if trial.problem:
        print(trial.problem, flush=True)


if __name__ == "__main__":
    sys.exit(main())
