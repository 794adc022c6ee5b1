"""Whether the machines of a job can meet: the first one listens, and every one connects to it.

A route, or a name that can be resolved, does not prove that a firewall lets a connection through,
or that the name means the same machine everywhere; a secret word that comes back does.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from shoal.launcher.commands import Way, ask_command
from shoal.launcher.hosts import Host, is_local

CONNECT_SECONDS = 5.0
LISTEN_SECONDS = 600.0
"""A listener whose caller was killed beyond a cut link ends by itself."""
OPEN_PORTS = "open the TCP ports above 1023 between the hosts"


@dataclass(frozen=True)
class Meeting:
    """Where the first machine listens, and what it says to those who connect."""

    port: int
    word: str


class Listener:
    """Listens on any free port and says one word to whoever connects."""

    def __init__(self, word: str) -> None:
        """Begin.

        Raises:
            OSError: no port is free.
        """
        self._word = word.encode()
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, name="listener", daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(self._word)

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):  # wakes the thread
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


def listen(word: str) -> None:
    """Listen on this machine until standard input ends; the first line printed tells the port."""
    listener = Listener(word)
    print(json.dumps({"port": listener.port}), flush=True)
    select.select([sys.stdin], [], [], LISTEN_SECONDS)


@contextlib.contextmanager
def open_meeting(first: Host, way: Way, seconds: float) -> Iterator[Meeting | None]:
    """Let the first machine listen for a while; None where it does not come to that.

    Args:
        first: The machine.
        way: How it is reached.
        seconds: What it may take to begin.
    """
    word = secrets.token_hex(16)
    if is_local(first.name):
        listener = Listener(word)
        try:
            yield Meeting(listener.port, word)
        finally:
            listener.close()
        return
    request = json.dumps({"listen": word})
    command = ask_command(way, first.name, "--inspect", request)
    if command is None:
        yield None
        return
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        port = _read_port(process, seconds)
        yield None if port is None else Meeting(port, word)
    finally:
        process.kill()
        process.communicate()


def _read_port(process: subprocess.Popen[str], seconds: float) -> int | None:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], seconds)[0]:
        return None
    for line in process.stdout:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a login script that prints
            return int(json.loads(line)["port"])
    return None


def try_meeting(address: str, port: int, word: str) -> str | None:
    """Connect to the first machine; return what is in the way, None if nothing is."""
    try:
        with socket.create_connection((address, port), CONNECT_SECONDS) as connection:
            said = b""
            while len(said) < len(word) and (more := connection.recv(len(word) - len(said))):
                said += more
    except TimeoutError:
        return f"nothing comes through to {address}, port {port}: a firewall drops it"
    except ConnectionRefusedError:
        return f"{address} refuses port {port}: a firewall, or the name is another machine's here"
    except OSError as error:
        return f"cannot connect to {address}, port {port}: {error}"
    return (
        None if said.decode(errors="replace") == word else f"another program answers at {address}"
    )
