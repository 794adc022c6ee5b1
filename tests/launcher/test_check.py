"""`shoal check`: what is found, and that each thing that is bad says what to do."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from shoal.configs.schema import DataConfig, ModelConfig, RunConfig, Stream, TrainConfig
from shoal.launcher import check, greeting
from shoal.launcher.check import Finding, check_cluster, check_order, findings_table
from shoal.launcher.hosts import Host
from shoal.launcher.inspection import Request, inspect
from shoal.launcher.outcomes import scratch_folder
from shoal.launcher.run import make_order

THERE = Host("far-away.invalid", 1)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        output=str(tmp_path / "runs"),
        model=ModelConfig(vocab_size=64, width=32, num_heads=2, num_layers=1, context=16),
        data=DataConfig(train=(Stream(path=str(tmp_path / "shards")),)),
        train=TrainConfig(tokens=1000),
    )


def found(findings: list[Finding], host: str = "localhost") -> dict[str, Finding]:
    return {finding.check: finding for finding in findings if finding.host == host}


def test_a_sound_machine_is_good_and_its_ranks_sum(config: RunConfig) -> None:
    findings = check_cluster(config, [Host("localhost", 2)])
    assert not [finding for finding in findings if not finding.is_good]
    checks = {"reach", "software", "devices", "clock", "run folder", "disk", "shared memory"}
    assert checks < set(found(findings))
    (probe,) = found(findings, "all").values()
    assert probe.text.startswith("right on 2 ranks, ")
    assert "GB/s bus bandwidth over gloo" in probe.text
    left = [file.name for file in Path(config.output, config.name).iterdir()]
    assert left == [], "nothing is left in the run's folder"


def test_hosts_are_asked_over_ssh(stage: Path, config: RunConfig) -> None:
    findings = check_cluster(config, [Host("127.0.0.1", 1), THERE], probe=False)
    there = found(findings, THERE.name)
    assert there["reach"].is_good
    assert there["run folder"].is_good
    assert there["software"].is_good
    assert not there["network"].is_good, "127.0.0.1 is nobody else's way here"
    assert "loopback" in there["network"].text
    assert there["network"].fix


def test_a_host_that_does_not_answer_is_named(stage: Path, config: RunConfig) -> None:
    (stage / "ssh").write_text("#!/bin/sh\necho Permission denied >&2; exit 255\n")
    findings = check_cluster(config, [Host("127.0.0.1", 1), THERE])
    (reach,) = found(findings, THERE.name).values()
    assert not reach.is_good
    assert reach.text == "Permission denied (exit code 255)"
    assert not found(findings, "all"), "nothing is started where something is bad"


BAD: dict[str, tuple[str, Any, str]] = {
    "software": ("versions", {"python": "3.11", "torch": "2.0", "code": "x"}, "torch 2.0, on the"),
    "devices": ("devices", {"count": 1, "names": ["H100"], "error": None}, "2 ranks are asked"),
    "clock": ("skew", 99.0, "99 s off"),
    "run folder": ("shares", False, "does not see"),
    "disk": ("free_bytes", 10, "0.0 GB free"),
    "shared memory": ("shared_memory", {"total": 1 << 26, "free": 1 << 26}, "0.1 of 0.1 GB"),
    "shards": ("shards", {"a": "shard.00000.mds: cut"}, "shard.00000.mds"),
    "network": ("interface", {"error": "cannot reach n1", "fix": "name it"}, "cannot reach n1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_said_with_its_remedy(
    name: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = inspect(Request(str(tmp_path), str(tmp_path), "localhost", []))
    sound |= {"interface": {"name": "eth0"}, "seconds": 1.0, "skew": 0.0, "leftovers": []}
    sound["shared_memory"] = {"total": 1 << 33, "free": 1 << 33}
    key, value, text = BAD[name]
    hosts = [Host("n1.invalid", 2), Host("n2.invalid", 2)]
    answers = {"n1.invalid": sound, "n2.invalid": {**sound, key: value}}
    monkeypatch.setattr(check, "_ask", lambda host, *_: answers[host.name])
    findings = check_cluster(config, hosts, probe=False)
    assert all(finding.is_good for finding in found(findings, "n1.invalid").values())
    bad = [finding for finding in findings if not finding.is_good]
    assert [finding.check for finding in bad] == [name]
    assert text in bad[0].text
    assert bad[0].fix or name == "shards", "a shard's error names it; the remedy is to copy it"


def test_what_a_killed_job_left_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: RunConfig
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "shoal-dead").mkdir()
    (tmp_path / "shoal-dead" / "alive.lock").touch()
    with scratch_folder() as alive:
        assert alive.parent == tmp_path
        assert list(tmp_path.glob("shoal-*")) == [alive], "the next start clears it away"
        (tmp_path / "shoal-dead").mkdir()
        (tmp_path / "shoal-dead" / "alive.lock").touch()
        facts = inspect(Request(str(tmp_path), str(tmp_path), "localhost", []))
        assert facts["leftovers"] == [str(tmp_path / "shoal-dead")]


def test_findings_as_json_and_an_exit_code(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    one = Finding("n1", "disk", False, "full", "free some")
    monkeypatch.setattr(check, "check_cluster", lambda *_, **__: [one])
    order = make_order(["default.yaml", "model.vocab_size=64", f"output={tmp_path}"])
    assert check_order(order, full=False, probe=False, as_json=True) == 4
    assert json.loads(capsys.readouterr().out)["fix"] == "free some"
    assert check_order(order, full=False, probe=False, as_json=False) == 4
    assert "free some" in capsys.readouterr().out
    assert findings_table([one]).row_count == 1


def test_another_checkout_is_another_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = greeting.describe_installation()
    assert set(ours) > {"python", "shoal", "torch", "code"}
    assert len(ours["code"]) == 12
