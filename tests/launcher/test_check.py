"""`shoal check`: what is found, and that each thing that is bad says what to do."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from shoal.configs.errors import ConfigError, DataError, PreflightError
from shoal.configs.load import config_hash
from shoal.configs.schema import (
    DataConfig,
    ModelConfig,
    RunConfig,
    Stream,
    TrainConfig,
    WorldConfig,
)
from shoal.data_pipeline import manifest
from shoal.launcher import check, cli, greeting, inspection
from shoal.launcher.check import (
    check_before_start,
    check_cluster,
    check_order,
    findings_table,
)
from shoal.launcher.findings import Finding, _count_devices
from shoal.launcher.hosts import Host
from shoal.launcher.inspection import Request, inspect
from shoal.launcher.meeting import Listener, open_meeting, try_meeting
from shoal.launcher.refusals import explain_refusal
from shoal.launcher.run import make_order

HERE, THERE = Host("localhost", 2), Host("far-away.invalid", 1)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        output=str(tmp_path / "runs"),
        prepare="corpus.yaml",
        model=ModelConfig(vocab_size=64, width=32, num_heads=2, num_layers=1, context=16),
        data=DataConfig(train=(Stream(path=str(tmp_path / "corpus" / "train")),)),
        train=TrainConfig(tokens=1000),
    )


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The run's shards, several small ones."""
    from shoal.configs.corpus import PrepareConfig
    from shoal.data_pipeline.shards import prepare

    texts = tmp_path / "a.jsonl"
    texts.write_text("".join(json.dumps({"text": f"words {i} " * 9}) + "\n" for i in range(90)))
    tree = {
        "output": str(tmp_path / "corpus"),
        "train": [{"path": str(texts)}],
        "tokenizer": {"vocab_size": 280},
        "context": 16,
        "shard_bytes": 700,
        "processes": 1,
    }
    return prepare(PrepareConfig.model_validate(tree)).train


def found(findings: list[Finding], host: str = "localhost") -> dict[str, Finding]:
    return {finding.check: finding for finding in findings if finding.host == host}


def bad(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.is_good]


def test_a_sound_machine_is_good_and_its_ranks_sum(config: RunConfig) -> None:
    findings = check_cluster(config, [HERE])
    assert not bad(findings)
    checks = {
        "reach", "software", "config", "devices", "clock", "run folder", "disk", "shards", "driver",
        "shared memory",
    }  # fmt: skip
    assert checks == set(found(findings)) - {"leftovers"}
    (probe,) = found(findings, "all").values()
    assert probe.text.startswith("right on 2 ranks, ")
    assert "GB/s bus bandwidth over gloo" in probe.text
    left = [file.name for file in Path(config.output, config.name).iterdir()]
    assert left == [], "nothing is left in the run's folder"


# Other hosts: what ssh says, and how long it may take.


def test_hosts_are_asked_over_ssh(stage: Path, config: RunConfig) -> None:
    findings = check_cluster(config, [Host("127.0.0.1", 1), THERE], probe=False)
    there = found(findings, THERE.name)
    assert all(there[name].is_good for name in ("reach", "run folder", "software", "config"))
    assert not there["network"].is_good, "127.0.0.1 is nobody else's way here"
    assert "loopback" in there["network"].text
    assert there["network"].fix
    assert list(Path(config.output, config.name).iterdir()) == []


REFUSALS = {
    "ssh: Could not resolve hostname n7: Name or service not known": ("knows its name", "hostfile"),
    "ssh: connect to host n7 port 22: No route to host": ("cannot be reached", "firewall"),
    "ssh: connect to host n7 port 22: Connection timed out": ("cannot be reached", "ping n7"),
    "ssh: connect to host n7 port 22: Connection refused": ("no ssh server", "start sshd"),
    "No ED25519 host key is known for n7\nHost key verification failed.": ("not known", "say yes"),
    "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.": (
        "not the one in known_hosts", "ssh-keygen -R n7"
    ),
    "me@n7: Permission denied (publickey,password).": ("refuses our key", "ssh-copy-id n7"),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals_of_ssh_are_told_apart(words: str) -> None:
    cause, fix = REFUSALS[words]
    refusal = explain_refusal("n7", words, 255)
    assert cause in refusal.cause
    assert words.splitlines()[-1] in refusal.cause
    assert fix in refusal.fix


@pytest.mark.parametrize(
    ("words", "code", "cause", "fix"),
    [
        ("sh: line 0: cd: /x: No such file or directory", 1, "has no folder", "mount it"),
        ("sh: 1: exec: /x/python: not found", 127, "has no", "make install"),
        ("/x/python: No module named shoal", 1, "has no Shoal", "make install"),
        ("did not answer within 9 s", None, "did not answer", "ssh -o BatchMode=yes n7 true"),
        ("{oops}", 3, "{oops} (exit code 3)", "must work from here"),
        ("", 255, "no answer (exit code 255)", "must work from here"),
    ],
)
def test_what_else_a_host_may_lack(words: str, code: int | None, cause: str, fix: str) -> None:
    refusal = explain_refusal("n7", words, code)
    assert cause in refusal.cause
    assert fix in refusal.fix


def test_a_host_that_does_not_answer_is_named(stage: Path, config: RunConfig) -> None:
    (stage / "ssh").write_text("#!/bin/sh\necho 'Host key verification failed.' >&2; exit 255\n")
    findings = check_cluster(config, [Host("127.0.0.1", 1), THERE])
    (reach,) = found(findings, THERE.name).values()
    assert not reach.is_good
    assert reach.fix and reach.fix.startswith(f"`ssh {THERE.name}` once by hand")
    assert not found(findings, "all"), "nothing is started where something is bad"


def test_what_cannot_be_asked_is_not_called_good(config: RunConfig) -> None:
    by_hand = config.model_copy(update={"world": WorldConfig(launcher="none")})
    (reach,) = found(check_cluster(by_hand, [HERE, THERE], quick=True), THERE.name).values()
    assert reach.is_good and not reach.is_known
    assert reach.text.startswith("not looked at")
    table = findings_table([reach])
    assert [list(column.cells) for column in table.columns][2] == ["[yellow]?[/yellow]"]


def test_a_look_that_fails_is_a_finding(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "inspect", lambda request: 1 // 0)
    (reach,) = check_cluster(config, [HERE], quick=True)
    assert not reach.is_good
    assert (
        reach.text == "cannot be looked at: ZeroDivisionError: integer division or modulo by zero"
    )
    monkeypatch.setattr(check, "inspect", lambda request: {"time": time.time()})
    (reach,) = check_cluster(config, [HERE], quick=True)
    assert "KeyError" in reach.text, "as another version of Shoal would answer"


def test_a_host_that_hangs_holds_nobody(
    stage: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stage / "ssh").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(check, "ANSWER_SECONDS", 3.0)
    begun = time.monotonic()
    findings = check_cluster(config, [Host("127.0.0.1", 1), THERE, Host("n3.invalid", 1)])
    assert time.monotonic() - begun < 20, "both at once, and not for their sleep"
    hung = [finding for finding in bad(findings) if finding.check == "reach"]
    assert [finding.host for finding in hung] == [THERE.name, "n3.invalid"]
    assert all("did not answer within 3 s" in finding.text for finding in hung)


def test_a_job_of_one_other_host_needs_no_way_to_it(stage: Path, config: RunConfig) -> None:
    findings = check_cluster(config, [THERE], probe=False)
    assert not bad(findings)
    assert "network" not in found(findings, THERE.name)


# The first machine listens.


def test_a_meeting_is_a_connection_and_a_word(stage: Path) -> None:
    listener = Listener("word")
    assert try_meeting("127.0.0.1", listener.port, "word") is None
    assert "another program answers" in str(try_meeting("127.0.0.1", listener.port, "worm"))
    listener.close()
    assert "refuses port" in str(try_meeting("127.0.0.1", listener.port, "word"))
    with open_meeting(THERE, "ssh", 60) as meeting:  # by our ssh: on this machine
        assert meeting is not None
        assert try_meeting("127.0.0.1", meeting.port, meeting.word) is None
    with open_meeting(THERE, "none", 60) as nowhere:
        assert nowhere is None


def test_a_firewall_is_told_from_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        monkeypatch.setattr("shoal.launcher.meeting.CONNECT_SECONDS", 0.3)
        port = deaf.getsockname()[1]
        assert "a firewall drops it" in str(try_meeting("127.0.0.1", port, "word"))


# What is bad, and its remedy.

NO_GPU = {"count": 0, "names": [], "error": None, "cores": 2}
H100 = {"count": 1, "names": ["H100"], "error": None, "cores": 2}
BAD: dict[str, tuple[str, Any, str]] = {
    "software": ("versions", {"python": "3.11", "torch": "2.0", "NCCL": "2.1"}, "NCCL 2.1, on the"),
    "config": ("config", "abc", "reads the config as abc"),
    "devices: other": ("devices", H100, "1 GPUs, and none on the first host"),
    "devices: broken": ("devices", {**NO_GPU, "error": "driver too old?"}, "driver too old?"),
    "clock": ("skew", 99.0, "99 s off"),
    "run folder": ("shares", False, "does not share the run folder"),
    "run folder: read-only": ("writes", "Read-only file system", "Read-only file system"),
    "run folder: one way": ("marked", False, "is not seen here"),
    "disk": ("free_bytes", 10, "0.0 GB free"),
    "shards: cut": ("problem", "shard.00000.mds: cut", "shard.00000.mds"),
    "shards: other": ("identity", "1234", "other rows: 1234, on the first host"),
    "driver": ("driver", {"version": "580", "problems": ["GPU 3: 1 ECC"], "remarks": []}, "GPU 3"),
    "network": ("interface", {"error": "cannot reach n1", "fix": "name it"}, "cannot reach n1"),
    "network: silent": ("interface", {"name": "eth0"}, "has opened no port"),
}
QUICK = set(BAD) - {"driver", "network", "network: silent"}


def make_answers(config: RunConfig, name: str) -> dict[str, Any]:
    """What a sound machine and one with something wrong say."""
    folder = Path(config.output)
    folder.mkdir()
    sound = inspect(Request(str(folder), str(folder / "no token"), "localhost", ["s"]))
    sound["shards"] = {"s": {"is_there": True, "problem": None, "identity": "56", "read": "all"}}
    expected = config_hash(config)
    sound |= {
        "interface": {"name": "eth0", "port": "5"}, "seconds": 1.0, "skew": 0.0, "leftovers": [],
        "shares": True, "marked": True, "expected_config": expected, "config": expected,
        "devices": NO_GPU, "driver": None,
    }  # fmt: skip
    key, value, _ = BAD[name]
    broken = {**sound, key: value}
    if name.startswith("shards"):
        broken = {**sound, "shards": {"s": {**sound["shards"]["s"], key: value}}}
    return {"n1.invalid": sound, "n2.invalid": broken}


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_said_with_its_remedy(
    name: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = make_answers(config, name)
    monkeypatch.setattr(check, "_ask", lambda host, *_: answers[host.name])
    hosts = [Host("n1.invalid", 2), Host("n2.invalid", 2)]
    monkeypatch.setattr(check, "open_meeting", lambda *_: open_meeting(hosts[0], "none", 0))
    findings = check_cluster(config, hosts, probe=False)
    assert not bad(list(found(findings, "n1.invalid").values()))
    (one,) = bad(findings)
    assert one.check == name.partition(":")[0]
    assert BAD[name][2] in one.text
    assert one.fix
    if name not in QUICK:
        check_before_start(hosts, config)
        return
    kind = DataError if name.startswith("shards") else PreflightError
    with pytest.raises(kind) as caught:
        check_before_start(hosts, config)
    assert (caught.value.where, caught.value.fix) == ("n2.invalid", one.fix)


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        (Host("n1.invalid", 2), None),
        (Host("n1.invalid", 3), "2 x H100, and 3 ranks are asked for"),
        (Host("n1.invalid", 1, (1,)), None),
        (Host("n1.invalid", 1, (2,)), "2 x H100, and slot 2 is chosen"),
    ],
)
def test_ranks_have_devices(host: Host, problem: str | None) -> None:
    devices = {**H100, "count": 2}
    assert _count_devices(host, devices, devices)[0] == problem


def test_small_shared_memory_matters_to_several_gpus(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = make_answers(config, "clock")
    one = answers["n1.invalid"] | {"shared_memory": {"total": 1 << 26, "free": 1 << 26}}
    monkeypatch.setattr(check, "_ask", lambda *_: one)
    assert not bad(check_cluster(config, [HERE], probe=False))
    one["devices"] = {**H100, "count": 2}
    (small,) = bad(check_cluster(config, [HERE], probe=False))
    assert small.check == "shared memory"
    assert "0.1 of 0.1 GB" in small.text


def test_more_hosts_are_asked_for_than_named(config: RunConfig) -> None:
    world = config.world.model_copy(update={"min_hosts": 2})
    with pytest.raises(ConfigError, match="2 hosts are to be left"):
        check_before_start([HERE], config.model_copy(update={"world": world}))


def test_a_start_is_not_held_up(
    config: RunConfig, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked that takes time: drivers, shared memory, shards, ranks."""

    def refuse(*_: object) -> None:
        raise AssertionError("takes time")

    for name in ("read_driver", "find_leftovers", "find_shared_leftovers", "_find_interface"):
        monkeypatch.setattr(inspection, name, refuse)
    monkeypatch.setattr(manifest, "check_shard", refuse)
    monkeypatch.setattr(check, "launch_ranks", refuse)
    check_before_start([HERE], config)
    (shards / "manifest.json").write_text("{")
    with pytest.raises(DataError):
        check_before_start([HERE], config)


# Shards.


def test_a_broken_shard_is_found_by_a_sample_or_in_full(config: RunConfig, shards: Path) -> None:
    assert "3 of" in found(check_cluster(config, [HERE], probe=False))["shards"].text
    files = sorted(shards.glob("shard.*"))
    assert len(files) > 3
    for file in files[1:]:  # whichever three are looked at, one of them at least
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    (sampled,) = bad(check_cluster(config, [HERE], probe=False))
    assert "SHA-256" in sampled.text
    (full,) = bad(check_cluster(config, [HERE], probe=False, full=True))
    assert files[1].name in full.text
    check_before_start([HERE], config)  # the manifest alone is read


def test_shards_that_nobody_prepares_are_missed(config: RunConfig) -> None:
    (one,) = bad(check_cluster(config.model_copy(update={"prepare": None}), [HERE], probe=False))
    assert one.text.endswith("holds no shards")


# What is shown.


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


def test_what_is_bad_is_the_commands_exit_code(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for found in (True, False):
        one = Finding("n1", "disk", found, "text")
        monkeypatch.setattr(check, "check_cluster", lambda *_, one=one, **__: [one])
        with pytest.raises(SystemExit) as caught:
            cli.main(["check", "default.yaml", "model.vocab_size=64", f"output={config.output}"])
        assert caught.value.code == (0 if found else 4)


def test_many_lines_that_say_the_same_are_one() -> None:
    findings = [Finding(f"n{n}", "disk", n != 7, "1 GB" if n != 7 else "full") for n in range(50)]
    table = findings_table(findings)
    assert table.row_count == 2
    assert list(table.columns[0].cells) == ["n0 and 48 more", "n7"]
    assert findings_table(findings[:20]).row_count == 20


def test_another_checkout_is_another_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = greeting.describe_installation()
    assert set(ours) > {"python", "shoal", "torch", "code"}
    assert len(ours["code"]) == 12
