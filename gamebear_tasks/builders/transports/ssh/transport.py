"""SSH transport: the interface to paramiko, and the choice between its two implementations.

Importing this module does not import paramiko.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import socket

    import paramiko

    from .config import Host

LOG = "gamebear_tasks.ssh"
"""Logger of the connections. Failures are raised as this package's errors, so it shows nothing by default.

paramiko's own logger, which other code may use, stays as it is.
"""

logging.getLogger(LOG).addHandler(logging.NullHandler())

INTRODUCTION = "SSH-2.0-gamebear_tasks"
"""Identification string (RFC 4253, section 4.2)."""

PIECE = 32 * 1024
"""Most bytes of a program's input in one packet."""

TESTED = ((3, 4, 1), (5, 1))
"""First and last release of paramiko that is tested with `paramiko_internals`: `nox -- -m system tests/test_ssh.py`."""

Handler = Callable[[str, str, list[tuple[str, bool]]], list[str]]
"""Answers a server's prompts: title, instructions, (prompt, whether the answer is shown) → answers."""


class NotAnSSHServer(Exception):
    """The peer's first lines are not an SSH identification."""


class InvalidHostKeySignature(Exception):
    """The server cannot prove that it has its host key."""


class ProgramRefused(Exception):
    """The server opened a session, but refused to start the program."""


class Session(Protocol):
    """One program on the server. Failures are raised as paramiko's or the socket's exceptions."""

    @property
    def has_ended(self) -> bool:
        """Whether the server has announced the end of the output."""
        ...

    @property
    def is_refused(self) -> bool:
        """Whether the server has refused to start the program."""
        ...

    def transmit(self, data: memoryview, silence: float) -> None:
        """Send all of `data`; raises TimeoutError if the server accepts nothing for `silence` seconds."""
        ...

    def receive(self, size: int, timeout: float) -> bytes:
        """Return 1 to `size` bytes, or b"" at the end; raises TimeoutError after `timeout` seconds without data."""
        ...

    def error_output(self) -> bytes:
        """Return the last 64 KiB of standard error."""
        ...

    def wait(self, timeout: float) -> int | None:
        """Return the exit status; -1 if there is none, None if it is unknown after `timeout` seconds."""
        ...

    def close(self) -> None:
        """Close the session."""
        ...


class Transport(Protocol):
    """An SSH connection.

    Attributes:
        farewell: the server's reason for disconnecting, in its own words, or "".
        host_key_blob: the server's host key or host certificate, after the handshake.
        permitted: authentication methods that the server listed with its last refusal.
        server: the server's identification string, or "" if it is unknown.
    """

    farewell: str
    host_key_blob: bytes
    permitted: list[str]

    @property
    def server(self) -> str:
        """Identification string."""
        ...

    def shake_hands(self, timeout: float) -> None:
        """Perform the key exchange within `timeout` seconds; raises SSHException, NotAnSSHServer, EOFError, OSError."""
        ...

    def is_active(self) -> bool:
        """Return whether the connection is open."""
        ...

    def is_authenticated(self) -> bool:
        """Return whether the log-in has succeeded."""
        ...

    def get_exception(self) -> Exception | None:
        """Return the reason why the connection ended, and forget it."""
        ...

    # Each method returns the methods with which the log-in continues, [] on success, or raises AuthenticationException.

    def set_auth_timeout(self, seconds: float) -> None:
        """Set how long the server may take for one method."""
        ...

    def auth_none(self, username: str) -> list[str]:
        """Query the permitted methods."""
        ...

    def auth_key(self, username: str, key: paramiko.PKey, command: str) -> list[str]:
        """Authenticate with a key; a request to start `command`, if any, may be pipelined behind it."""
        ...

    def auth_secret(self, username: str, password: str) -> list[str]:
        """Authenticate with a password."""
        ...

    def auth_interactive(self, username: str, handler: Handler) -> list[str]:
        """Answer the server's prompts."""
        ...

    def begin_session(self, command: str, timeout: float) -> Session:
        """Start a program.

        Raises:
            ChannelException: the server refuses the session.
            ProgramRefused: it refuses the program.
            TimeoutError: it does not answer within `timeout` seconds.
            SSHException: the connection is gone.
        """
        ...

    def forward(self, host: str, port: int, timeout: float) -> paramiko.Channel:
        """Open a connection from the server to a port; raises ChannelException or SSHException."""
        ...

    def cut(self) -> None:
        """Shut down the socket, so that no thread blocks on it. Never raises."""
        ...

    def hang_up(self) -> None:
        """Close the connection at once. Never raises."""
        ...

    def abandon(self) -> None:
        """Forget the connection in a forked process, without a message to the server."""
        ...


def is_tested(version: str) -> bool:
    """Return whether a release of paramiko is one with which `paramiko_internals` is tested."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    first, last = TESTED
    return first <= numbers and numbers[: len(last)] <= last


def uses_internals() -> bool:
    """Return whether connections use `paramiko_internals`; imports paramiko."""
    import paramiko

    return is_tested(paramiko.__version__)


def open_transport(sock: socket.socket | paramiko.Channel, host_key_algorithms: Sequence[str], host: Host) -> Transport:
    """Return a transport on a connected socket or a channel of another transport, before its key exchange.

    Args:
        sock: the socket; the transport closes it.
        host_key_algorithms: host key algorithms to request, best first.
        host: ciphers, MACs, timeouts and keepalive of the connection.
    """
    if uses_internals():
        from .paramiko_internals import InternalsTransport

        return InternalsTransport(sock, host_key_algorithms, host)
    from .paramiko_public import PublicTransport

    return PublicTransport(sock, host_key_algorithms, host)
