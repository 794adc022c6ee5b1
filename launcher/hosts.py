"""Hostfiles: which machines take part, with how many ranks each."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shoal.configs.errors import ConfigError

# A name reaches ssh's command line sooner or later: letters, digits, dots, hyphens and underscores,
# a letter or digit first. A leading hyphen ssh would read as an option (-oProxyCommand=...).
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?")
# DeepSpeed reads `slots=4x` as 4, and passes over whatever follows, as max_slots=4 of MPI.
LINE = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\d+)(\s+(?!slots\b)\w+\s*=\s*\S+)*")
MOST_SLOTS = 1024
EXAMPLE = "write one line a machine, for example: localhost slots=2"


@dataclass(frozen=True)
class Host:
    """One machine of a job and the ranks it runs."""

    name: str
    slots: int
    devices: tuple[int, ...] | None = None
    """The slots that were chosen, by number; None: all of them."""

    @property
    def device_variables(self) -> dict[str, str]:
        """What shows its ranks the chosen devices alone; nothing where they are to run on CPU."""
        if self.devices is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.devices))}


def read_hostfile(path: str | Path) -> list[Host]:
    """Read `NAME slots=N` lines; `#` starts a comment, empty lines are skipped.

    The grammar is DeepSpeed's; what it reads otherwise than it is written is refused.

    Raises:
        ConfigError: file missing, empty or unreadable; a line malformed, hostile or repeated.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError("no such hostfile", where=file, fix=EXAMPLE) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hostfile cannot be read: {error}", where=file, fix=EXAMPLE) from None
    first_seen: dict[str, int] = {}
    hosts = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        host = _parse_line(text, where=f"{file}:{number}")
        key = host.name.lower()
        if key in first_seen:
            raise ConfigError(
                f"{host.name} is named twice (first in line {first_seen[key]})",
                where=f"{file}:{number}",
                fix=f"give it one line with all its ranks: {host.name} slots=N",
            )
        first_seen[key] = number
        hosts.append(host)
    if not hosts:
        raise ConfigError("hostfile names no host", where=file, fix=EXAMPLE)
    return hosts


def _parse_line(text: str, where: str) -> Host:
    """Read one line; nothing but further `key=value` may follow the number."""
    name = text.split()[0]
    if not HOST_NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no host name (letters, digits, dots, hyphens, underscores; it starts and "
            "ends with a letter or digit)",
            where=where,
            fix="users, ports and other ssh options belong into ~/.ssh/config, the plain name here",
        )
    match = LINE.fullmatch(text)
    if not match:
        raise ConfigError(f"expected `NAME slots=N`, found {text!r}", where=where, fix=EXAMPLE)
    slots = int(match["slots"])
    if not 1 <= slots <= MOST_SLOTS:
        raise ConfigError(f"slots={slots} is not between 1 and {MOST_SLOTS}", where=where)
    return Host(name, slots)


def select_hosts(hosts: Sequence[Host], include: str = "", exclude: str = "") -> list[Host]:
    """Return the hosts and slots that are asked for, in the order of the hostfile.

    Args:
        hosts: All there are.
        include: As DeepSpeed has it: `NAME[:SLOT,...]@...`; without slots: all of the host.
        exclude: What is left out, in the same words.

    Raises:
        ConfigError: both are given; a host or slot that there is not; nothing is left.
    """
    if include and exclude:
        raise ConfigError(
            "--include and --exclude together", where="command line", fix="give one of them"
        )
    if not (include or exclude):
        return list(hosts)
    where = "--include" if include else "--exclude"
    named = _parse_selection(include or exclude, {host.name: host for host in hosts}, where)
    chosen = []
    for host in hosts:
        asked = named.get(host.name, set())
        slots = asked if include else set(range(host.slots)) - asked
        if len(slots) == host.slots:
            chosen.append(host)
        elif slots:
            chosen.append(Host(host.name, len(slots), tuple(sorted(slots))))
    if not chosen:
        raise ConfigError("nothing is left to train on", where=where)
    return chosen


def _parse_selection(text: str, hosts: Mapping[str, Host], where: str) -> dict[str, set[int]]:
    """Return name -> slots of a selection; a host that is named twice has both."""
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        name, colon, numbers = part.partition(":")
        if name not in hosts:
            raise ConfigError(
                f"there is no host {name!r}",
                where=where,
                fix=f"name some of {', '.join(hosts)}, as NAME or NAME:SLOT,SLOT, joined by @",
            )
        count = hosts[name].slots
        slots = [word.strip() for word in numbers.split(",")] if colon else map(str, range(count))
        for slot in slots:
            if not slot.isdecimal() or int(slot) >= count:
                raise ConfigError(
                    f"{name} has no slot {slot!r}",
                    where=where,
                    fix=f"its slots are 0 to {count - 1}" if count > 1 else "its only slot is 0",
                )
            named.setdefault(name, set()).add(int(slot))
    return named


@cache  # asked once: a failing network must not make another machine of this one
def is_local(name: str) -> bool:
    """Return whether a host name means this machine; a name nobody can resolve does not."""
    own = socket.gethostname()
    if name.lower() in {"localhost", own.lower(), own.partition(".")[0].lower()}:
        return True
    addresses = _addresses_of(name)
    return any(map(is_loopback, addresses)) or bool(addresses & _own_addresses())


def is_loopback(address: str) -> bool:
    """Return whether an address means the machine that reads it, and no other."""
    return address.startswith("127.") or address == "::1"


def _addresses_of(name: str) -> set[str]:
    """Return the addresses a name stands for here; none where nobody can resolve it."""
    try:
        found = socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)
    except OSError:
        return set()
    return {str(item[4][0]).partition("%")[0] for item in found}


def _own_addresses() -> set[str]:
    import psutil

    return {
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }


def check_hosts(hosts: Sequence[Host], where: object) -> None:
    """Refuse a hostfile that names a machine twice, or this one as no other can call it.

    Raises:
        ConfigError: it does.
    """
    here = [host for host in hosts if is_local(host.name)]
    if len(here) > 1:
        raise ConfigError(
            f"names this machine {len(here)} times: {', '.join(host.name for host in here)}",
            where=where,
            fix=f"write one line: {here[0].name} slots={sum(host.slots for host in here)}",
        )
    _check_addresses([host for host in hosts if host not in here], where)
    name = here[0].name if here else ""
    if len(hosts) > 1 and (name.lower() == "localhost" or is_loopback(name)):
        raise ConfigError(
            f"names this machine {name}, which means another one on each of the others",
            where=where,
            fix=f"give it the name the others know it by: {socket.gethostname()}",
        )


def _check_addresses(hosts: Sequence[Host], where: object) -> None:
    """Refuse two names of one machine."""
    known: dict[str, Host] = {}
    for host in hosts:
        for address in _addresses_of(host.name):
            other = known.setdefault(address, host)
            if other is not host:
                raise ConfigError(
                    f"{other.name} and {host.name} are one machine ({address})",
                    where=where,
                    fix=f"write one line: {host.name} slots={other.slots + host.slots}",
                )


def check_deepspeeds_hosts(hosts: Sequence[Host]) -> None:
    """Refuse what DeepSpeed makes of a hostfile of one other machine: it trains here instead.

    Raises:
        ConfigError: this is such a rank.
    """
    if len(hosts) == 1 and not is_local(hosts[0].name):
        raise ConfigError(
            f"names {hosts[0].name} alone, and DeepSpeed starts that on this machine instead",
            where="the hostfile DeepSpeed was given",
            fix="put --hostfile after launcher/run.py, or add --force_multi before it",
        )


def hosts_of_deepspeed() -> list[Host]:
    """Return the hosts DeepSpeed's launcher was given, if it is what started this process.

    DeepSpeed starts a hostfile with one line on this machine even if it names another one; the
    rank it starts can only learn that from the launcher's own command line.
    """
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
    except (OSError, UnicodeDecodeError):
        return []
    prefix = "--world_info="
    for argument in command:
        if argument.startswith(prefix) and "deepspeed.launcher.launch" in command:
            slots = json.loads(base64.urlsafe_b64decode(argument.removeprefix(prefix)))
            return [
                Host(str(name), len(ids), None if ids == [*range(len(ids))] else tuple(ids))
                for name, ids in slots.items()
            ]
    return []
