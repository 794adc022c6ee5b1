"""`shoal check --qualify`: the whole of it once, on two ranks, and what it says of failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.configs.errors import DataError, ShoalError
from shoal.configs.load import load_config
from shoal.configs.schema import RunConfig
from shoal.launcher import cli, qualification
from shoal.launcher.hosts import Host
from shoal.launcher.qualification import STEPS, claims_table, compare_runs, drop_rank, qualify
from shoal.launcher.rehearsal import read_claims
from shoal.trainer.qualification import Claim

DEATH = {"rank": 1, "host": "n2"}


@pytest.mark.slow
def test_a_sound_machine_qualifies(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["check", "default.yaml", "--qualify", "--json", "model.vocab_size=4096"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, f"output={tmp_path / 'runs'}", "world.ranks=2"])
    out, err = capfd.readouterr()
    assert caught.value.code == 0, out + err
    claims = {tree["claim"]: tree for tree in map(json.loads, out.splitlines())}
    stages = {f"ZeRO {n}, {p}, {k}" for k in ("dense", "moe") for p in ("fp32", "bf16")
              for n in range(4)} - {f"ZeRO 0, bf16, {k}" for k in ("dense", "moe")}  # fmt: skip
    others = {"checkpoint written", "checkpoint read", "kill and resume"}
    links = {f"all-reduce of {size}" for size in ("64 KiB", "1 MiB", "16 MiB")}
    assert set(claims) == stages | others | links
    assert all(tree["holds"] for tree in claims.values())
    resumed = claims["kill and resume"]
    assert resumed["figure"] <= resumed["limit"] == 1e-5
    assert " of 2 killed on " in resumed["text"]
    assert " on 1: losses of all 40 steps" in resumed["text"]
    assert not list((tmp_path / "runs").glob(".qualify-*")), "nothing is left"
    assert err.count("holds: ") == len(claims) - 1


def write_metrics(folder: Path, losses: list[float], starts: list[tuple[int, int]]) -> Path:
    """Write a run's records: `starts` as (step, ranks), then all losses."""
    folder.mkdir()
    records: list[dict[str, Any]] = [
        {"kind": "start", "step": step, "ranks": ranks, "device": "cpu"} for step, ranks in starts
    ]
    records += [{"kind": "train", "step": n, "loss": loss} for n, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


GOOD = [5.0 - n / 50 for n in range(STEPS)]


@pytest.mark.parametrize(
    ("losses", "starts", "holds", "text"),
    [
        (GOOD, [(0, 2), (15, 1)], True, "rank 1 of 2 killed on n2, resumed after step 15 on 1"),
        ([*GOOD[:-1], GOOD[-1] + 2e-5], [(0, 2), (15, 1)], False, "are not those of a run"),
        ([*GOOD[:-1], float("nan")], [(0, 2), (15, 1)], False, "are not those of a run"),
        (GOOD[:-1], [(0, 2), (15, 1)], False, "steps were lost or repeated"),
        (GOOD, [(0, 2), (0, 1)], False, "did not go on from a checkpoint"),
        (GOOD, [(0, 2)], False, "did not go on from a checkpoint"),
    ],
)
def test_a_resumed_run_is_compared(
    losses: list[float], starts: list[tuple[int, int]], holds: bool, text: str, tmp_path: Path
) -> None:
    whole = write_metrics(tmp_path / "whole", GOOD, [(0, 2)])
    killed = write_metrics(tmp_path / "killed", losses, starts)
    claim = compare_runs(whole, killed, DEATH)
    assert claim.holds is holds
    assert text in claim.text


def test_a_rank_less() -> None:
    assert drop_rank([Host("a", 2), Host("b", 2)]) == [Host("a", 2), Host("b", 1)]
    assert drop_rank([Host("a", 2), Host("b", 1)]) == [Host("a", 2)]
    assert drop_rank([Host("a", 1)]) == [Host("a", 1)]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(RunConfig, "default.yaml", [f"output={tmp_path / 'runs'}"])


def test_ranks_that_cannot_even_start_are_a_claim_that_fails(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ShoalError("rank 0 was killed by SIGSEGV")

    monkeypatch.setattr(qualification, "start_ranks", fail)
    (claim,) = qualify(config, [Host("localhost", 2)], seed=1)
    assert not claim.holds
    assert claim.text == "rank 0 was killed by SIGSEGV"
    assert list(Path(config.output).iterdir()) == []


def test_a_run_that_does_not_go_on_is_a_claim_that_fails(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(hosts: list[Host], words: list[str], *_: Any) -> None:
        order = json.loads(Path(words[1]).read_text())
        if order["doom"] is None:
            assert [host.slots for host in hosts] == [1]
            raise DataError("no checkpoint of this run is whole")
        Path(order["doom"]["marker"]).write_text("{}")
        Path(order["claims"]).write_text('{"claim": "a", "holds": true, "text": "b"}\n{"cla')
        raise ShoalError("rank 1 was killed by SIGKILL")

    monkeypatch.setattr(qualification, "start_ranks", fail)
    first, last = qualify(config, [Host("localhost", 2)], seed=1)
    assert first == Claim("a", True, "b")
    assert not last.holds
    assert last.text == "does not go on: no checkpoint of this run is whole"


def test_claims_have_a_line_each(tmp_path: Path) -> None:
    claims = [
        Claim("checkpoint read", True, "ok", 1.234, "GB/s"),
        Claim("ZeRO 3", False, "[no]", 0.5, "nats off at most", 1e-5),
        Claim("all ranks end their work", False, "why"),
    ]
    table = claims_table(claims)
    assert list(table.columns[2].cells) == ["1.23 GB/s", "5.0e-01 of 1e-05 nats off", ""]
    assert list(read_claims(tmp_path / "absent")) == []
