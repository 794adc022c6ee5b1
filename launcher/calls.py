"""Calls: guards that were started by others than us connect back, and prove who they are.

A key in the attempt's log folder, readable by its owner alone, is what both sides prove to hold
(HMAC, as `multiprocessing.connection` does it); that a guard can read it proves, too, that it
shares the folder. Only bytes are exchanged: nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from pathlib import Path

PROOF_SECONDS = 10.0
"""What a caller gets to prove that it holds the key."""
STRANGERS = 16
"""Callers, beside one a machine, that may be about to prove it; more wait in the queue."""
DEAD_SECONDS = 20
"""A call on which nothing gets through for so long has ended (the launcher speaks every 5 s)."""


class CallLine:
    """The line to a guard that calls us; words said before that wait for it."""

    def __init__(self) -> None:
        self.control, self._write = os.pipe()
        os.set_blocking(self.control, False)
        self.last_words: Callable[[], str] = str
        """What to add about what was printed on the way, as `lines.Output` tells."""
        self._connection: Connection | None = None
        self._waiting: list[bytes] = []
        self._closed = False
        self._lock = threading.Lock()

    def send(self, line: bytes) -> None:
        """Send one line, now or when the guard calls; one that is gone does not hear it."""
        with self._lock, contextlib.suppress(OSError):
            if self._connection:
                self._connection.send_bytes(line)
            else:
                self._waiting.append(line)

    def attach(self, connection: Connection) -> None:
        """Hear a guard out; returns when it has hung up."""
        _set_timeout(connection)
        with self._lock:
            if self._connection or self._closed:
                connection.close()
                return
            self._connection = connection
            with contextlib.suppress(OSError):  # gone again: what follows sees that
                for line in self._waiting:
                    connection.send_bytes(line)
        try:
            while True:
                heard = connection.recv_bytes()
                with self._lock:  # the descriptor may be another's once it is closed
                    if self._closed:
                        return
                    os.write(self._write, heard)
        except (EOFError, OSError):
            pass
        finally:
            self.hang_up()

    @property
    def has_called(self) -> bool:
        """Whether the guard has called."""
        return self._connection is not None

    @property
    def is_cut(self) -> bool:
        """Whether the way to the guard is gone and perhaps not the guard: nobody can tell."""
        return self.has_called

    def describe_end(self) -> str:
        """Return how it ended, with the last that was printed on the way there."""
        how = "its guard hung up" if self.has_called else "its guard did not call"
        return how + self.last_words()

    def close(self, deadline: float) -> None:
        """Let go; the guard stops by itself."""
        self.hang_up()
        os.close(self.control)

    def hang_up(self) -> None:
        """End the call, or refuse it when it comes; the other side of `control` sees the end."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._write)
            if self._connection:
                # Wakes the thread in `attach`; closing alone would not.
                with contextlib.suppress(OSError), _socket_of(self._connection) as plain:
                    plain.shutdown(socket.SHUT_RDWR)


class Switchboard:
    """Takes the calls of guards, by the name each gives."""

    def __init__(self, names: Sequence[str], key_file: Path) -> None:
        key = secrets.token_hex(32)
        key_file.unlink(missing_ok=True)
        descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(key)
            os.fsync(file.fileno())
        self.key_file = key_file
        self.lines = {name: CallLine() for name in names}
        self._key = key.encode()
        self._over = False
        self._unproven = threading.Semaphore(len(names) + STRANGERS)
        self._listener = Listener(("0.0.0.0", 0), backlog=len(names) + 8)
        self._thread = threading.Thread(target=self._accept, name="switchboard", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.address[1])

    def close(self) -> None:
        """Take no more calls."""
        self._over = True
        with contextlib.suppress(OSError):  # wakes the thread
            socket.create_connection(("127.0.0.1", self.port), 1.0).close()
        self._thread.join(2.0)
        self._listener.close()
        self.key_file.unlink(missing_ok=True)

    def _accept(self) -> None:
        while not self._over:
            try:
                connection = self._listener.accept()
            except OSError:  # gone before it was taken
                continue
            # One thread a call, for so many and so long: who connects and says nothing keeps
            # nobody waiting, and who does so often keeps others waiting for a while.
            self._unproven.acquire()
            threading.Thread(target=self._take, args=(connection,), daemon=True).start()

    def _take(self, connection: Connection) -> None:
        try:
            try:
                name = self._prove(connection)
            finally:
                self._unproven.release()
            self.lines[name].attach(connection)
        except (AuthenticationError, EOFError, OSError, UnicodeDecodeError, KeyError):
            connection.close()

    def _prove(self, connection: Connection) -> str:
        """Return the name that a caller gives who holds the key; one that is slow is hung up on."""
        with _socket_of(connection) as plain:
            timer = threading.Timer(PROOF_SECONDS, plain.shutdown, [socket.SHUT_RDWR])
            timer.start()
            try:
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
                return connection.recv_bytes(256).decode()
            finally:
                timer.cancel()
                timer.join()


class Call:
    """The guard's side."""

    def __init__(self, endpoint: str, key_file: Path, name: str) -> None:
        """Call the launcher at HOST:PORT.

        Raises:
            OSError: it does not answer, or there is no such key.
            AuthenticationError: it does not hold the same key.
        """
        host, _, port = endpoint.rpartition(":")
        key = key_file.read_bytes()
        self._connection = Client((host, int(port)), authkey=key)
        _set_timeout(self._connection)
        self._connection.send_bytes(name.encode())

    def send(self, line: bytes) -> None:
        """Send one line.

        Raises:
            OSError: the launcher is gone.
        """
        self._connection.send_bytes(line)

    def __iter__(self) -> Iterator[str]:
        """Yield lines until the launcher hangs up."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                yield self._connection.recv_bytes().decode()


def _socket_of(connection: Connection) -> socket.socket:
    """Return a socket of its own for a connection's stream."""
    return socket.socket(fileno=os.dup(connection.fileno()))


def _set_timeout(connection: Connection) -> None:
    with _socket_of(connection) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_SECONDS * 1000)


def address_towards(name: str) -> str:
    """Return the address of this machine that leads to another one.

    Raises:
        OSError: nobody knows the name, or there is no way.
    """
    family, kind, _, _, target = socket.getaddrinfo(name, 9, socket.AF_INET, socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
