"""Builder `ssh://`: one SSH connection with many channels, established like that of `ssh` itself.

Paramiko is imported only when the first connection is opened. The parts are: `config` resolves the URL, `known_hosts`
verifies the host key, `authentication` logs in, `transport` selects how paramiko is used.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from ....errors import BuilderBusy, BuilderCrowded, BuilderError, BuilderLost, HostKeyError, SettingsError
from ...protocol.bootstrap import bundle
from ...protocol.client import RunnerBuilder
from ...protocol.transport import SEND_SILENCE
from . import config, known_hosts
from .config import Address, Host
from .transport import (
    InvalidHostKeySignature,
    NotAnSSHServer,
    ProgramRefused,
    Session,
    Transport,
    open_transport,
)

if TYPE_CHECKING:
    import paramiko


HANDSHAKE_TIMEOUT = 60.0
"""Seconds for the key exchange: a small board under load needs ten."""

_MOST_JUMPS = 8
_SETTLING = 0.5

_connections: weakref.WeakSet[SSHConnection] = weakref.WeakSet()


class SSHConnection:
    """An SSH connection to a builder, with its jump hosts.

    The host key must be known; unknown keys are never accepted automatically. Several threads may use the connection.
    In a forked process the connection is dead, and closing it there does not affect the parent process.

    Args:
        url: ssh://[user@]host[:port]; the host may be an alias in ~/.ssh/config.
        first: command that is almost certain to be started first; its request is pipelined behind the log-in.

    Attributes:
        described: the server's version and host key, the user, and the log-in method.

    Raises:
        SettingsError: the URL or the configuration is invalid.
        BuilderLost: the builder cannot be reached now (no such host, refused, timeout, `MaxStartups`).
        BuilderError: the host key or the log-in is rejected.
    """

    def __init__(self, url: str, first: str = "") -> None:
        self.place = f"The builder {url}"
        self._first = first
        self._process = os.getpid()
        self._opening = threading.Lock()
        self.described: dict[str, str] = {}
        self._closed = False
        self._failure: BaseException | None = None
        self._has_started = False
        self._transports: list[Transport] = []
        self._proxies: list[subprocess.Popen[bytes]] = []
        self._proxy_errors: list[IO[bytes]] = []
        _connections.add(self)
        try:
            self._transport = self._connect(config.parse_url(url), None, 0)
        except BaseException:
            self.close()
            raise

    def start(self, command: str) -> SSHChannel:
        """Start a program."""
        import paramiko

        # Serialized: paramiko stores only one refusal for all threads.
        with self._opening:
            self._check()
            try:
                channel = self._transport.begin_session(command, HANDSHAKE_TIMEOUT)
            except ProgramRefused as error:
                raise (self.refused() if self.survives() else self.lost(error)) from error
            except TimeoutError as error:
                raise BuilderLost(f"{self.place} does not answer.") from error
            except (paramiko.SSHException, EOFError, OSError) as error:
                if not (self._transport.is_active() or isinstance(error, paramiko.ChannelException)):
                    raise self.lost(error) from error
                if self._has_started:
                    raise BuilderBusy(
                        f"{self.place} rejects another session.", "Raise MaxSessions in its sshd_config."
                    ) from error
                raise BuilderError(
                    f"{self.place} rejects every session: {error}.",
                    "Raise MaxSessions in its sshd_config, and remove `restrict` from the account's authorized_keys.",
                ) from error
            self._has_started = True
        return SSHChannel(self, channel)

    def close(self) -> None:
        """Close the connection and all of its channels. Never raises."""
        self._closed = True
        if os.getpid() != self._process:
            return
        for transport in self._transports:
            transport.cut()
        for transport in reversed(self._transports):
            transport.hang_up()
        for proxy in self._proxies:
            with contextlib.suppress(OSError):
                proxy.terminate()
            try:
                proxy.wait(2.0)
            except subprocess.TimeoutExpired:
                proxy.kill()
                proxy.wait()
        for file in self._proxy_errors:
            file.close()

    @property
    def is_alive(self) -> bool:
        """Whether the connection is still there, as far as is known."""
        return os.getpid() == self._process and not self._closed and self._transport.is_active()

    def survives(self) -> bool:
        """Return whether the connection is still there after a channel has ended unexpectedly.

        Paramiko's thread closes the channels of a broken connection shortly before it marks the connection as broken.
        """
        until = time.monotonic() + _SETTLING
        while self.is_alive and time.monotonic() < until:
            time.sleep(0.01)
        return self.is_alive

    def lost(self, error: BaseException | None = None) -> BuilderLost:
        """Return an error with the reason why the connection is gone."""
        if self._closed:
            return BuilderLost(f"{self.place} is disconnected: the connection was closed here.")
        farewell = self._transport.farewell
        self._failure = cause = self._transport.get_exception() or self._failure or error
        why = f"the server says: {farewell}" if farewell else _why(cause)
        return BuilderLost(f"{self.place} is disconnected: {why}.")

    def refused(self) -> BuilderError:
        """Return the error for a server that starts no programs."""
        return BuilderError(
            f"{self.place} refuses to run programs.",
            "Remove ForceCommand from sshd_config, command= from authorized_keys, or set a login shell.",
        )

    def abandon(self) -> None:
        """Forget the connection without a message to the builder, in a fork of the process that uses it."""
        for transport in self._transports:
            transport.abandon()

    def _check(self) -> None:
        if os.getpid() != self._process:
            raise BuilderLost(f"{self.place} is disconnected: the connection belongs to another process.")
        if self._closed:
            raise self.lost()

    # connecting

    def _connect(self, address: Address, jumps: Sequence[Address] | None, depth: int) -> Transport:
        """Connect and log in to a host, through its configured jump hosts or the specified ones."""
        if depth > _MOST_JUMPS:
            raise SettingsError(
                f"{self.place} is behind more than {_MOST_JUMPS} jump hosts.",
                f"Check ~/.ssh/config for a ProxyJump cycle at {address.host}.",
            )
        loading = threading.Thread(target=_load_paramiko_ahead)
        loading.start()  # in parallel with `ssh -G` and the TCP connection
        try:
            host = config.read(address)
            jumps = host.jumps if jumps is None else jumps
            place = self.place if not depth else f"{self.place}: its jump host {address.host}"
            dial = _Dial(host, place) if not (jumps or host.proxy_command) else None
        finally:
            loading.join()  # must not run during interpreter shutdown
        from . import authentication

        if dial is not None:
            sock: socket.socket | paramiko.Channel = dial.connected()
        elif jumps:
            *before, last = jumps
            # As with ssh -J: the first jump host is reached as configured, each further one through those before it.
            through = self._connect(last, before or None, depth + 1)
            sock = self._forward(through, host, place)
        else:
            sock = self._run_proxy(host)
        try:
            known = known_hosts.known(host)
            transport = open_transport(sock, known_hosts.algorithms(host, known), host)
        except BaseException:
            sock.close()
            raise
        self._transports.append(transport)
        self._shake_hands(transport, host, place)
        self._check_host_key(transport, host, known, place, bool(jumps or host.proxy_command))
        let_in_by = authentication.log_in(transport, host, place, "" if depth else self._first)
        self.described = {
            "server": transport.server or "unknown",
            "host key": known_hosts.fingerprint(transport.host_key_blob),
            "log-in": f"{host.user}, by {let_in_by}",
        }
        return transport

    def _shake_hands(self, transport: Transport, host: Host, place: str) -> None:
        import paramiko
        from paramiko.ssh_exception import IncompatiblePeer, MessageOrderError

        try:
            transport.shake_hands(host.connect_timeout + HANDSHAKE_TIMEOUT)
        except IncompatiblePeer as error:
            raise BuilderError(
                f"{place} has no algorithm in common with this machine: {error}.",
                "Upgrade its OpenSSH, or paramiko here.",
            ) from error
        except (MessageOrderError, InvalidHostKeySignature) as error:
            raise BuilderError(
                f"{place} violates the SSH protocol, possibly an attack: {error}.",
                "Check the network between this machine and the builder before you retry.",
            ) from error
        except NotAnSSHServer as error:
            raise BuilderError(
                f"{place} is not an SSH server: port {host.port} answers with another protocol.",
                "Set the port of its sshd: ssh://user@host:port.",
            ) from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            # paramiko replaces the exception of a failed identification by an SSHException.
            cause = error.__context__ if isinstance(error.__context__, EOFError | OSError) else error
            proxy = self._proxy_says()
            if transport.farewell:
                why = f"the server says: {transport.farewell}"
            elif isinstance(cause, EOFError) and cause is not error:
                why = "the server closed the connection before its identification"
            else:
                why = _why(cause)
            refused = transport.farewell or (cause is not error and isinstance(cause, EOFError | ConnectionError))
            raise (BuilderCrowded if refused else BuilderLost)(
                f"{place} cannot be reached: {why}{proxy}.",
                "Check ProxyCommand and ProxyJump in ~/.ssh/config."
                if proxy
                else f"Run `ssh {host.address.words} true`: it fails while sshd starts, or above its MaxStartups.",
            ) from error

    def _check_host_key(
        self, transport: Transport, host: Host, known: known_hosts.Known, place: str, indirect: bool
    ) -> None:
        blob = transport.host_key_blob
        try:
            known_hosts.check(host, known, blob)
        except (known_hosts.HostKeyRefused, struct.error) as error:
            transport.hang_up()
            if isinstance(error, struct.error):
                raise HostKeyError(
                    f"{place} is rejected: its host key is damaged.",
                    "Check its keys there: ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub",
                ) from error
            raise _host_key_error(error, host, blob, place, indirect) from error

    def _forward(self, through: Transport, host: Host, place: str) -> paramiko.Channel:
        import paramiko

        try:
            return through.forward(host.hostname, host.port, host.connect_timeout)
        except paramiko.ChannelException as error:
            if error.code == 1:
                raise BuilderError(
                    f"{place} cannot be reached: the jump host forbids forwarding.",
                    "Set AllowTcpForwarding yes in the jump host's sshd_config.",
                ) from error
            raise BuilderLost(
                f"{place} cannot be reached: the jump host cannot connect to {host.hostname} port {host.port}.",
                f"Check that sshd runs at {host.hostname} port {host.port}.",
            ) from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise BuilderLost(f"{place} cannot be reached through its jump host: {_why(error)}.") from error

    def _run_proxy(self, host: Host) -> socket.socket:
        """Start `ProxyCommand` at one end of a socket pair; return the other end."""
        ours, theirs = socket.socketpair()
        with theirs:
            errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the connection
            self._proxy_errors.append(errors)
            # It keeps the terminal, because it may have to prompt, but ignores Ctrl-C, which the client handles.
            self._proxies.append(
                subprocess.Popen(
                    ["/bin/sh", "-c", f"trap '' INT; exec {host.proxy_command}"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=errors,
                )
            )
        return ours

    def _proxy_says(self) -> str:
        if not self._proxies:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._proxies[-1].wait(1.0)
        self._proxy_errors[-1].seek(0)
        errors = " ".join(self._proxy_errors[-1].read(500).decode(errors="replace").split())
        return f" (ProxyCommand says: {errors})" if errors else " (through ProxyCommand)"


class SSHChannel:
    """Standard input, output and error of a program on the builder."""

    def __init__(self, connection: SSHConnection, channel: Session) -> None:
        self._connection = connection
        self._channel = channel
        self._closed = False

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`."""
        try:
            self._channel.transmit(memoryview(data).cast("B"), SEND_SILENCE)
        except TimeoutError as error:
            raise BuilderLost(
                f"{self._connection.place} accepts no data: timeout after {SEND_SILENCE:g} seconds."
            ) from error
        except Exception as error:  # any error of paramiko or its socket
            raise self._lost(error) from error

    def receive(self, size: int, timeout: float) -> bytes:
        """Return 1 to `size` bytes, or `b""` once the program has closed its output."""
        try:
            data = self._channel.receive(size, timeout)
        except TimeoutError as error:
            raise BuilderLost(f"{self._connection.place} sends no data: timeout after {timeout:g} seconds.") from error
        except Exception as error:  # any error of paramiko or its socket
            raise self._lost(error) from error
        if (
            not data
            and not self._channel.has_ended
            and (self._closed or self._channel.is_refused or not self._connection.survives())
        ):
            raise self._lost(None)
        return data

    def errors(self) -> bytes:
        """Return the last 64 KiB of the program's standard error."""
        return self._channel.error_output()

    def exit_status(self, timeout: float) -> int | None:
        """Return the program's exit status; None while it runs, or if a signal ended it."""
        status = self._channel.wait(timeout)
        if status != -1:
            return status
        if not self._connection.survives():
            raise self._lost(None)
        return None

    def close(self) -> None:
        """Close the channel. Never raises."""
        self._closed = True
        if self._connection.is_alive:
            with contextlib.suppress(Exception):
                self._channel.close()

    def _lost(self, error: BaseException | None) -> BuilderError:
        if self._channel.is_refused and not self._closed:
            return self._connection.refused()
        if self._closed or self._channel.has_ended or self._connection.survives():
            what = "was closed here" if self._closed else "has ended"
            return BuilderLost(f"{self._connection.place} is disconnected: the runner {what}.", "Run doit again.")
        return self._connection.lost(error)


class _Dial(threading.Thread):
    """Thread that connects to a host's port, while paramiko is imported."""

    def __init__(self, host: Host, place: str) -> None:
        super().__init__(daemon=True)
        self._host = host
        self._place = place
        self._outcome: socket.socket | Exception | None = None
        self.start()

    def run(self) -> None:
        """Connect."""
        try:
            self._outcome = _dial(self._host, self._place)
        except Exception as error:  # noqa: BLE001 - `connected` raises it
            self._outcome = error

    def connected(self) -> socket.socket:
        """Return the connected socket; raises the errors of `_dial`."""
        self.join()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


def _load_paramiko_ahead() -> None:
    """Import paramiko in the background; a failure is reported by the code that needs it."""
    with contextlib.suppress(ImportError, OSError, MemoryError):
        import paramiko  # noqa: F401


def _dial(host: Host, place: str) -> socket.socket:
    """Connect to a host's port, trying each of its addresses in turn."""
    try:
        addresses = socket.getaddrinfo(host.hostname, host.port, host.family, socket.SOCK_STREAM)
    except UnicodeError as error:
        raise SettingsError(
            f"{place} has an invalid host name: {host.hostname!r}.", "Correct HostName in ~/.ssh/config."
        ) from error
    except OSError as error:
        raise BuilderLost(
            f"{place} cannot be reached: host name {host.hostname} cannot be resolved: {error.strerror}.",
            "Correct the host name, or check the network.",
        ) from error
    failure: OSError = TimeoutError()
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(host.connect_timeout)
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock
    why = (
        f"no answer within {host.connect_timeout:g} seconds"
        if isinstance(failure, TimeoutError)
        else (failure.strerror or str(failure)).lower()
    )
    raise BuilderLost(
        f"{place} cannot be reached: {host.hostname} port {host.port}: {why}.",
        "Check that it is switched on, connected, and runs an SSH server.",
    ) from failure


def _host_key_error(
    refused: known_hosts.HostKeyRefused, host: Host, blob: bytes, place: str, indirect: bool
) -> HostKeyError:
    """Return the error for a rejected host key, with the command that fixes it."""
    shown = known_hosts.fingerprint(blob)
    words = host.address.words
    places = ", ".join(line.place for line in refused.lines)
    file = host.known_hosts[0] if host.known_hosts else "known_hosts"
    if refused.reason == "changed":
        return HostKeyError(
            f"{place} is rejected: its host key has changed to {shown}, known is "
            f"{', '.join(known_hosts.fingerprint(line.blob) for line in refused.lines)} ({places}). "
            "This may be an attack, or the builder was reinstalled.",
            f"Only if it was reinstalled: `ssh-keygen -R '{host.known_as}' -f {file}`, then `ssh {words}` and "
            "compare the fingerprint.",
        )
    if refused.reason == "revoked":
        return HostKeyError(
            f"{place} is rejected: its host key {shown} is revoked ({refused.detail or places}).",
            "Create a new host key on the builder.",
        )
    if refused.reason == "certificate":
        return HostKeyError(
            f"{place} is rejected: its host certificate is not trusted: {refused.detail}.",
            "Sign the builder's host key again with the authority in known_hosts.",
        )
    other = ""
    if refused.reason == "other":
        other = f" known_hosts has only keys of another kind ({places}), which it no longer has."
    scan = (
        ""
        if indirect or host.alias
        else f", or `ssh-keyscan {f'-p {host.port} ' if host.port != 22 else ''}{host.hostname} >> {file}`"
    )
    return HostKeyError(
        f"{place} is rejected: its host key {shown} is unknown.{other}",
        "Compare the fingerprint with the builder's own (on it: `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub`), "
        f"then run `ssh {words}` once and accept it{scan}.",
    )


def _why(error: BaseException | None) -> str:
    """Return the reason in an exception of paramiko or a socket, in a few words."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = str(error or "").rstrip(".")
    return text or "the connection broke"


def _abandon_in_child() -> None:
    for connection in list(_connections):
        connection.abandon()


os.register_at_fork(after_in_child=_abandon_in_child)


def open_builder(url: str) -> RunnerBuilder:
    """Open `ssh://[user@]host[:port]`.

    Raises:
        SettingsError: the URL is invalid.
    """
    address = config.parse_url(url)
    place = f"{address.user}@{address.host}" if address.user else address.host
    first = [bundle().command]  # first connection only: a server may disconnect because of the pipelined request

    def connect() -> SSHConnection:
        return SSHConnection(url, first.pop() if first else "")

    return RunnerBuilder(url, place, connect)
