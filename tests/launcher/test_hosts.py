"""Hostfiles: what is read, and every way in which one is refused."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.configs.errors import ConfigError
from shoal.launcher.hosts import (
    Host,
    check_hosts,
    hosts_of_deepspeed,
    is_local,
    read_hostfile,
    select_hosts,
)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "hosts"
    file.write_text(text)
    return file


def test_reads_names_and_slots(tmp_path: Path) -> None:
    text = (
        "# two machines\n\nnode-1 slots=4\n  node_2.example.org\tslots = 8 max_slots=8  # big one\n"
    )
    assert read_hostfile(write(tmp_path, text)) == [
        Host("node-1", 4),
        Host("node_2.example.org", 8),
    ]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("localhost\n", 1, "expected `NAME slots=N`"),
        ("localhost slots=\n", 1, "expected `NAME slots=N`"),
        ("localhost slots=4x\n", 1, "expected `NAME slots=N`"),
        ("localhost slots=2 slots=4\n", 1, "expected `NAME slots=N`"),
        ("localhost slots=2 4\n", 1, "expected `NAME slots=N`"),
        ("localhost slots=-1\n", 1, "expected `NAME slots=N`"),
        ("localhost slots=0\n", 1, "not between 1 and"),
        ("localhost slots=999999\n", 1, "not between 1 and"),
        ("# fine\na slots=1\nb slots=1\nA slots=2\n", 4, "A is named twice (first in line 2)"),
        ("-oProxyCommand=touch${IFS}/tmp/x slots=1\n", 1, "is no host name"),
        ("good slots=1\n-oProxyCommand=true slots=1\n", 2, "is no host name"),
        ("a;reboot slots=1\n", 1, "is no host name"),
        ("$(reboot) slots=1\n", 1, "is no host name"),
        ("`id` slots=1\n", 1, "is no host name"),
        ("root@node slots=1\n", 1, "is no host name"),
        ("node:22 slots=1\n", 1, "is no host name"),
        ("../node slots=1\n", 1, "is no host name"),
        ("node- slots=1\n", 1, "is no host name"),
        ("_node slots=1\n", 1, "starts and ends with a letter or digit"),
        (f"{'n' * 300} slots=1\n", 1, "is no host name"),
        ("kn\u00f6ten slots=1\n", 1, "is no host name"),
    ],
)
def test_bad_line_is_named(text: str, line: int, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(file)
    assert message in caught.value.cause
    assert caught.value.where == f"{file}:{line}"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "\n\n", "# nobody\n"])
def test_empty_file_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no host"):
        read_hostfile(write(tmp_path, text))


def test_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such hostfile") as caught:
        read_hostfile(tmp_path / "hosts")
    assert caught.value.fix is not None
    assert "localhost slots=2" in caught.value.fix
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path)
    (tmp_path / "hosts").write_bytes(b"\xff\xfe slots=1")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1", socket.gethostname()])
def test_this_machine_is_local(name: str) -> None:
    assert is_local(name)


@pytest.mark.parametrize("name", ["192.0.2.7", "no-such-host.invalid"])
def test_other_machines_are_not_local(name: str) -> None:
    assert not is_local(name)


def test_this_machine_under_two_names_is_refused() -> None:
    with pytest.raises(ConfigError, match="names this machine 2 times"):
        check_hosts([Host("localhost", 2), Host("127.0.0.1", 2)], where="hosts")


def test_localhost_among_others_is_refused() -> None:
    check_hosts([Host("localhost", 2)], where="hosts")
    check_hosts([Host("192.0.2.7", 2), Host("192.0.2.8", 2)], where="hosts")
    with pytest.raises(ConfigError, match="names this machine localhost") as caught:
        check_hosts([Host("localhost", 2), Host("192.0.2.7", 4)], where="hosts")
    assert socket.gethostname() in (caught.value.fix or "")


def test_another_machine_under_two_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, *_: object, **__: object) -> list[tuple]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    hosts = [Host("n2", 2), Host("n2.two-names.example", 1)]
    with pytest.raises(ConfigError, match="are one machine") as caught:
        check_hosts(hosts, where="hosts")
    assert "slots=3" in (caught.value.fix or "")


def test_no_deepspeed_no_hosts() -> None:
    assert hosts_of_deepspeed() == []


def test_a_rank_learns_what_deepspeed_was_told(tmp_path: Path) -> None:
    """The launcher's command line is all a rank can look at; imitate one that starts a rank."""
    info = base64.urlsafe_b64encode(json.dumps({"far-away": [0, 1], "b": [1]}).encode()).decode()
    rank = "from shoal.launcher.hosts import hosts_of_deepspeed as f; print(f())"
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[-1]])"
    command = [sys.executable, "-c", launcher]
    command += ["deepspeed.launcher.launch", f"--world_info={info}", rank]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([Host("far-away", 2), Host("b", 1, (1,))])


# Selections, in DeepSpeed's words.

ALL = [Host("n1", 2), Host("n2", 4), Host("n3", 1)]


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        ("n1@n2:0,2", ""),
        ("n2:2,0@n2:2@n1", ""),
        ("n3@n2:3", ""),
        ("", "n2:1"),
        ("", "n2@n1:0"),
        ("", "n2:0,1,2,3"),
        ("", ""),
    ],
)
def test_a_selection_means_what_deepspeed_makes_of_it(include: str, exclude: str) -> None:
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    pool = {host.name: host.slots for host in ALL}
    theirs = parse_inclusion_exclusion(pool, include, exclude)
    ours = {h.name: list(h.devices or range(h.slots)) for h in select_hosts(ALL, include, exclude)}
    assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize(
    ("include", "exclude", "where", "message"),
    [
        ("n1", "n2", "command line", "together"),
        ("n9", "", "--include", "there is no host 'n9'"),
        ("n1@", "", "--include", "there is no host ''"),
        ("n2:4", "", "--include", "n2 has no slot '4'"),
        ("n2:", "", "--include", "n2 has no slot ''"),
        ("n2:-1", "", "--include", "n2 has no slot '-1'"),
        ("", "n1:x", "--exclude", "n1 has no slot 'x'"),
        ("", "n1@n2@n3", "--exclude", "nothing is left"),
    ],
)
def test_a_bad_selection_is_named(include: str, exclude: str, where: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select_hosts(ALL, include, exclude)
    assert message in caught.value.cause
    assert caught.value.where == where


def test_chosen_slots_are_the_devices_that_ranks_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    whole, part = select_hosts(ALL, "n1@n2:0,2")
    assert (whole.device_variables, part.slots) == ({}, 2)
    assert part.device_variables == {"CUDA_VISIBLE_DEVICES": "0,2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert part.device_variables == {}, "on CPU only the count is left"
