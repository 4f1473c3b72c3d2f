"""SSH transport on paramiko's public API, for releases with which `paramiko_internals` is not tested.

It is slower: three more round trips until the first program starts, about 12 % of a short job at a distance of 50 ms. A
connection may break when paramiko exchanges keys while it is busy (https://github.com/paramiko/paramiko/issues/822);
the request is then retried on another one. The server's reason for disconnecting is unknown, so errors show paramiko's.

Importing this module imports paramiko, so it is imported only when a connection is opened.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
import weakref
from collections.abc import Collection, Sequence

import paramiko

from .config import Host
from .transport import LOG, PIECE, Handler, ProgramRefused

_POLL = 0.1
"""Seconds after which a blocked read or write checks its time limit."""

_TAIL = 64 * 1024

_abandoned: list[object] = []
"""Connections of the parent process: in a fork, paramiko's destructors would wait for locks that nobody releases."""


class PublicTransport:
    """An SSH connection; see `Transport`."""

    def __init__(self, sock: socket.socket | paramiko.Channel, host_key_algorithms: Sequence[str], host: Host) -> None:
        self.farewell = ""
        self.host_key_blob = b""
        self.permitted: list[str] = []
        self.server = ""
        self._sock = sock
        self._sessions: weakref.WeakSet[PublicSession] = weakref.WeakSet()
        self._connect_timeout = host.connect_timeout
        self._alive_interval = host.alive_interval
        self._transport = transport = paramiko.Transport(sock)
        transport.set_log_channel(LOG)
        # Documented as parameters of SSHClient.connect.
        transport.banner_timeout = host.connect_timeout
        options = transport.get_security_options()
        options.ciphers = tuple(sorted(_allowed(options.ciphers, host.ciphers), key=lambda name: "-gcm@" not in name))
        options.digests = _allowed(options.digests, host.macs)
        supported = []
        for name in host_key_algorithms:
            with contextlib.suppress(ValueError):
                options.key_types = (name,)
                supported.append(name)
        options.key_types = tuple(supported)

    def shake_hands(self, timeout: float) -> None:
        """Perform the key exchange."""
        if isinstance(self._sock, socket.socket) and not select.select([self._sock], [], [], self._connect_timeout)[0]:
            raise TimeoutError
        done = threading.Event()
        self._transport.start_client(event=done)
        if not done.wait(timeout):
            raise TimeoutError
        if not self._transport.is_active():
            raise self._transport.get_exception() or EOFError()
        key = self._transport.get_remote_server_key()
        certificate = getattr(key, "public_blob", None)  # set by PKey.load_certificate, and for certificates
        self.host_key_blob = certificate.key_blob if certificate else key.asbytes()
        self._transport.set_keepalive(max(1, round(self._alive_interval)))

    def is_active(self) -> bool:
        """Return whether the connection is open."""
        return self._transport.is_active()

    def is_authenticated(self) -> bool:
        """Return whether the log-in has succeeded."""
        return self._transport.is_authenticated()

    def get_exception(self) -> Exception | None:
        """Return the reason why the connection ended, and forget it."""
        return self._transport.get_exception()

    def set_auth_timeout(self, seconds: float) -> None:
        """Set how long the server may take for one method."""
        self._transport.auth_timeout = seconds  # documented as a parameter of SSHClient.connect

    def auth_none(self, username: str) -> list[str]:
        """Query the permitted methods."""
        try:
            return list(self._transport.auth_none(username) or ())
        except paramiko.BadAuthenticationType as error:
            self.permitted = list(error.allowed_types)
            raise

    def auth_key(self, username: str, key: paramiko.PKey, command: str) -> list[str]:
        """Authenticate with a key."""
        try:
            return list(self._transport.auth_publickey(username, key))
        except paramiko.BadAuthenticationType as error:
            self.permitted = list(error.allowed_types)
            raise

    def auth_secret(self, username: str, password: str) -> list[str]:
        """Authenticate with a password."""
        return list(self._transport.auth_password(username, password, fallback=False))

    def auth_interactive(self, username: str, handler: Handler) -> list[str]:
        """Answer the server's prompts."""
        return list(self._transport.auth_interactive(username, handler))

    def begin_session(self, command: str, timeout: float) -> PublicSession:
        """Start a program."""
        start = time.monotonic()
        try:
            channel = self._transport.open_session(timeout=timeout)
        except paramiko.ChannelException:
            raise
        except paramiko.SSHException as error:
            if self.is_active() and time.monotonic() - start >= timeout:
                raise TimeoutError from error
            raise
        watchdog = threading.Timer(timeout, self.hang_up)  # `exec_command` waits without a limit
        watchdog.daemon = True
        watchdog.start()
        try:
            channel.exec_command(command)
        except paramiko.SSHException as error:
            if self.is_active():
                raise ProgramRefused from error
            raise
        finally:
            watchdog.cancel()
        session = PublicSession(channel)
        self._sessions.add(session)
        return session

    def forward(self, host: str, port: int, timeout: float) -> paramiko.Channel:
        """Open a connection from the server to a port."""
        return self._transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout)

    def cut(self) -> None:
        """Shut down the socket. Never raises."""
        if isinstance(self._sock, socket.socket):
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Close the connection at once. Never raises."""
        self.cut()
        with contextlib.suppress(Exception):
            self._transport.close()
            self._sock.close()  # paramiko does not, before its thread has started

    def abandon(self) -> None:
        """Forget the connection in a forked process."""
        _abandoned.append((self, list(self._sessions)))
        if isinstance(self._sock, socket.socket):
            self._sock.close()


class PublicSession:
    """One program on the server; see `Session`."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        channel.settimeout(_POLL)
        self._tail = b""
        self._drain = threading.Thread(target=self._read_errors, daemon=True)
        self._drain.start()

    @property
    def is_refused(self) -> bool:
        """Whether the server has refused to start the program; `begin_session` raises this."""
        return False

    @property
    def has_ended(self) -> bool:
        """Whether the server has announced the end of the output, which the public API does not report."""
        return False

    def _read_errors(self) -> None:
        # Both streams share one window, so a program that writes much to its standard error would block otherwise.
        while True:
            try:
                data = self._channel.recv_stderr(PIECE)
            except TimeoutError:
                continue
            except Exception:  # noqa: BLE001 - the connection broke, which `receive` reports
                return
            if not data:
                return
            self._tail = (self._tail + data)[-_TAIL:]

    def transmit(self, data: memoryview, silence: float) -> None:
        """Send all of `data`."""
        until = time.monotonic() + silence
        while data:
            try:
                sent = self._channel.send(bytes(data[:PIECE]))
            except TimeoutError:
                if time.monotonic() >= until:
                    raise
                continue
            if not sent:
                raise EOFError
            data = data[sent:]
            until = time.monotonic() + silence

    def receive(self, size: int, timeout: float) -> bytes:
        """Return 1 to `size` bytes, or b"" at the end."""
        until = time.monotonic() + timeout
        while True:
            try:
                return self._channel.recv(size)
            except TimeoutError:
                if time.monotonic() >= until:
                    raise

    def error_output(self) -> bytes:
        """Return the last 64 KiB of standard error."""
        self._drain.join(0.2)
        return self._tail

    def wait(self, timeout: float) -> int | None:
        """Return the exit status."""
        until = time.monotonic() + timeout
        while not self._channel.exit_status_ready():
            if time.monotonic() >= until:
                return None
            time.sleep(0.01)
        return self._channel.recv_exit_status()

    def close(self) -> None:
        """Close the session."""
        self._channel.close()


def _allowed(available: Collection[str], permitted: Collection[str]) -> tuple[str, ...]:
    """Return those of the available algorithms that the configuration permits; all if it permits none of them."""
    return tuple(name for name in available if name in permitted) or tuple(available)
