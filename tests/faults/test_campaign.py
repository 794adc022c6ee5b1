"""A short campaign of fixed faults, and whether its judgement would notice a loss."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign, draw_faults
from tests.faults.faults import FAULTS
from tests.faults.job import STEPS, Job
from tests.faults.judgement import LostError, check_same, count_lost
from tests.faults.lab import open_lab, why_not

SEED = 7


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("campaign"))


@pytest.fixture
def campaign_with_hosts(campaign: Campaign) -> Iterator[Campaign]:
    if reason := why_not():
        pytest.skip(reason)
    with open_lab(2) as hosts:
        campaign.hosts = hosts
        yield campaign


def run_trial(campaign: Campaign, fault: str, place: str) -> None:
    trial = campaign.try_fault(list(FAULTS).index(fault), fault, place, SEED)
    assert trial.problem is None, trial.problem


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["kill while saving", "fill disk", "spoil gradient", "flip weight"]
)
def test_nothing_is_lost(fault: str, campaign: Campaign) -> None:
    if FAULTS[fault].own_disk and os.geteuid() != 0:
        pytest.skip("mounting needs root")
    run_trial(campaign, fault, "machine")


@pytest.mark.slow
def test_nothing_is_lost_with_an_agent(campaign_with_hosts: Campaign) -> None:
    run_trial(campaign_with_hosts, "kill guard", "hosts")


def test_every_kind_is_drawn_before_any_comes_again() -> None:
    kinds = [(fault, "machine") for fault in FAULTS]
    drawn = draw_faults(3, 2 * len(kinds), kinds)
    assert sorted(drawn[: len(kinds)]) == sorted(drawn[len(kinds) :]) == sorted(kinds)
    assert draw_faults(3, 10, kinds) == drawn[:10], "a longer campaign begins as a shorter one"
    assert draw_faults(4, 10, kinds) != drawn[:10]


def make_finished(folder: Path, attempts: dict[str, range], losses: float = 1.0) -> Job:
    """Return a job of two ranks that has left what a campaign looks at, but for checkpoints."""
    job = Job(folder)
    (folder / "rows").mkdir()
    job.run.mkdir(parents=True)
    for number, (attempt, steps) in enumerate(attempts.items()):
        for rank in range(2):
            lines = [{"step": s, "rows": [2 * s + rank], "taken": True} for s in steps]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "rows" / f"{number:020d}-{attempt}-{rank}.jsonl").write_text(text)
    records = [{"kind": "start", "step": 0, "ranks": 2}]
    records += [{"kind": "train", "step": s + 1, "loss": losses} for s in range(STEPS)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (job.run / "metrics.jsonl").write_text(text)
    return job


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ({"a": range(STEPS)}, (0, 0)),
        ({"a": range(50), "b": range(40, STEPS)}, (0, 0)),
        ({"a": range(50), "b": range(51, STEPS)}, (2, 0)),
        ({"a": range(STEPS + 1)}, (0, 2)),
        ({"a": range(30), "b": range(20, 90), "c": range(60, STEPS)}, (0, 0)),
    ],
)
def test_rows_that_are_lost_or_repeated_are_counted(
    attempts: dict[str, range], expected: tuple[int, int], tmp_path: Path
) -> None:
    reference = make_finished(tmp_path / "reference", {"a": range(STEPS)})
    job = make_finished(tmp_path / "job", attempts)
    assert count_lost(job, reference) == expected


def test_a_row_that_two_ranks_have_read_is_repeated(tmp_path: Path) -> None:
    reference = make_finished(tmp_path / "reference", {"a": range(STEPS)})
    job = make_finished(tmp_path / "job", {"a": range(STEPS)})
    (file,) = job.folder.glob("rows/*-1.jsonl")
    file.write_text(file.read_text().replace('"rows": [21]', '"rows": [21, 20]'))
    assert count_lost(job, reference) == (0, 1)


def test_other_losses_or_steps_are_noticed(tmp_path: Path) -> None:
    whole = {"a": range(STEPS)}
    reference = make_finished(tmp_path / "reference", whole)
    with pytest.raises(LostError, match="other losses"):
        check_same(make_finished(tmp_path / "other", whole, losses=1.0 + 1e-7), reference)
    job = make_finished(tmp_path / "job", whole)
    file = job.run / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 50,', '"step": 49,'))
    with pytest.raises(LostError, match="steps twice"):
        check_same(job, reference)
