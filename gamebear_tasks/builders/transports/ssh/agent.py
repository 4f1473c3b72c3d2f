"""Client of an SSH agent, at any socket: draft-ietf-sshm-ssh-agent. paramiko's own uses only $SSH_AUTH_SOCK.

Importing this module imports paramiko, so it is imported only when a connection is opened.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

import paramiko
from paramiko.message import Message
from paramiko.pkey import PKey

_REQUEST_IDENTITIES = b"\x0b"
_IDENTITIES_ANSWER = 12
_SIGN_REQUEST = b"\x0d"
_SIGN_RESPONSE = 14
_FLAGS = {"rsa-sha2-256": 2, "rsa-sha2-512": 4}
_LONGEST = 256 << 10
"""Maximum length of an answer in bytes, as in OpenSSH."""
_MOST = 2048
"""Maximum number of keys, as in OpenSSH."""


class AgentKey(PKey):
    """A private key that an agent holds.

    Attributes:
        blob: the public key or the certificate.
        comment: the key's comment.
    """

    def __init__(self, connection: socket.socket, blob: bytes, comment: str) -> None:
        self.blob = blob
        self.comment = comment
        self._connection = connection
        self._name = Message(blob).get_binary().decode("ascii", "replace")

    def get_name(self) -> str:
        """Return the kind of the key."""
        return self._name

    def asbytes(self) -> bytes:
        """Return the public key or the certificate."""
        return self.blob

    def sign_ssh_data(self, data: bytes, algorithm: str | None = None) -> bytes:  # type: ignore[override]
        """Return the agent's signature; raises SSHException if it refuses, or OSError."""
        request = Message()
        request.add_string(self.blob)
        request.add_string(data)
        request.add_int(_FLAGS.get((algorithm or "").removesuffix("-cert-v01@openssh.com"), 0))
        kind, answer = _ask(self._connection, _SIGN_REQUEST + request.asbytes())
        if kind != _SIGN_RESPONSE:
            raise paramiko.SSHException("the agent refuses to sign with this key")
        return answer.get_binary()


def keys(connection: socket.socket) -> Sequence[AgentKey]:
    """Return the keys of the agent at a connected socket; raises SSHException or OSError."""
    kind, answer = _ask(connection, _REQUEST_IDENTITIES)
    if kind != _IDENTITIES_ANSWER:
        raise paramiko.SSHException("the agent refuses to list its keys")
    pairs = [(answer.get_binary(), answer.get_binary()) for _ in range(min(answer.get_int(), _MOST))]
    return [AgentKey(connection, blob, comment.decode("utf-8", "replace")) for blob, comment in pairs]


def _ask(connection: socket.socket, request: bytes) -> tuple[int, Message]:
    connection.sendall(struct.pack(">I", len(request)) + request)
    (length,) = struct.unpack(">I", _read(connection, 4))
    if not 0 < length <= _LONGEST:
        raise paramiko.SSHException(f"the agent's answer has a length of {length} bytes")
    answer = _read(connection, length)
    return answer[0], Message(answer[1:])


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise paramiko.SSHException("the agent has closed the connection")
        data += more
    return data
