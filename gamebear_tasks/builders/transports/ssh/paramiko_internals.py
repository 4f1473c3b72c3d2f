"""Accelerated paramiko: the only module that uses private and undocumented names of paramiko.

`transport` selects it for paramiko's tested versions only. It fixes re-keying and closing of channels, detects a
silent peer, and pipelines requests. `paramiko_public` does the same work with the public API.

Importing this module imports paramiko, so it is imported only when a connection is opened.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import paramiko
from paramiko.auth_handler import AuthHandler
from paramiko.buffered_pipe import BufferedPipe
from paramiko.common import (
    CONNECTION_FAILED_CODE,
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_WINDOW_ADJUST,
    cMSG_CHANNEL_OPEN,
    cMSG_CHANNEL_REQUEST,
    cMSG_GLOBAL_REQUEST,
    cMSG_REQUEST_FAILURE,
)
from paramiko.message import Message
from paramiko.packet import Packetizer as ParamikoPacketizer

from .config import Host
from .paramiko_public import PublicSession
from .transport import INTRODUCTION, LOG, Handler, InvalidHostKeySignature, NotAnSSHServer

FIRST_SESSION = 0
"""The server's number of a connection's first session: OpenSSH uses the lowest free one (`channel_new`)."""


POLL = 0.1
"""Seconds after which paramiko interrupts one read or write of its socket."""

LONGEST_IDENTIFICATION = 64 << 10
"""Bytes that the peer may send before its identification."""


class PeerSilent(paramiko.SSHException):
    """The peer did not answer for as long as the settings allow."""


class Packetizer(ParamikoPacketizer):
    """Paramiko's packet reader and writer, with keepalive requests and a bounded identification.

    Keepalive requests work as in OpenSSH (`ServerAliveInterval`, `ServerAliveCountMax`). Paramiko's own keepalive
    expects no answer, and its `write_all` retries without limit if the peer accepts nothing.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._socket = sock
        self.alive_interval = 15.0
        self.alive_count = 3
        self.owner: weakref.ref[InternalsTransport] | None = None
        self.greeting = ""
        """The peer's last line before its identification; sshd sends its reason for refusing a connection as one."""
        self._identification = 0
        self._received_at = time.monotonic()
        self._unanswered = 0
        self._writing = False

    def readline(self, timeout: float) -> str:
        """Return a line of the peer's identification; `timeout` is in seconds."""
        line: str = super().readline(timeout)
        if not line.startswith("SSH-"):
            self.greeting = line
        return line

    def _read_timeout(self, timeout: float) -> bytes:
        data: bytes = super()._read_timeout(timeout)  # type: ignore[misc]
        self._identification += len(data)
        if self._identification > LONGEST_IDENTIFICATION:
            self.greeting = self.greeting or "a line that is too long"
            raise paramiko.SSHException("the peer sends no identification")
        return data

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        """Read exactly `n` bytes; raises EOFError, or NeedRekeyException if requested and nothing was received yet."""
        data: bytes = super().read_all(n, check_rekey)
        self._received_at = time.monotonic()
        self._unanswered = 0
        return data

    def write_all(self, out: bytes) -> None:  # type: ignore[override]
        """Write bytes; raises EOFError if the connection is gone or the peer accepts nothing any more."""
        waited = 0.0
        self._writing = True
        try:
            while out:
                try:
                    sent = self._socket.send(out)
                except (TimeoutError, BlockingIOError):
                    waited += POLL
                    if self.closed or waited > self.alive_interval * (self.alive_count + 1):
                        raise EOFError from None
                    continue
                except OSError as error:
                    raise EOFError from error
                if not sent:
                    raise EOFError
                waited = 0.0
                out = out[sent:]
        finally:
            self._writing = False

    def _check_keepalive(self) -> None:
        """Send a keepalive request after a period of silence (paramiko calls this when a read has timed out).

        It counts requests, not time: if the process was stopped for an hour, the peer still gets the chance to answer.
        """
        owner = self.owner() if self.owner else None
        if owner is None or not owner.is_authenticated():
            return
        now = time.monotonic()
        if now - self._received_at < self.alive_interval:
            return
        if self._unanswered >= self.alive_count:
            raise PeerSilent(f"it has answered nothing for {self.alive_interval * (self.alive_count + 1):.0f} seconds")
        self._unanswered += 1
        self._received_at = now
        if not self._writing:
            owner.ask_for_life()


if TYPE_CHECKING:
    _BytePipe = BufferedPipe[bytes]
else:
    _BytePipe = BufferedPipe  # generic in its stub only


class _BoundedPipe(_BytePipe):
    """Unread data of a channel. Paramiko does not check that the server respects the window."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def feed(self, data: bytes) -> None:
        """Append data; raises SSHException if it exceeds the limit."""
        if len(self) + len(data) > self._limit:
            raise paramiko.SSHException("the server sends more than its window permits")
        super().feed(data)


class InternalsTransport(paramiko.Transport):
    """SSH client transport with safe re-keying for any number of channels and threads; see `Transport`."""

    def __init__(self, sock: socket.socket | paramiko.Channel, host_key_algorithms: Sequence[str], host: Host) -> None:
        super().__init__(sock, packetizer_class=Packetizer)
        self.set_log_channel(LOG)
        self.local_version = INTRODUCTION
        self.banner_timeout = host.connect_timeout
        self.host_key_blob = b""
        self.farewell = ""
        self.permitted: list[str] = []
        self._host_key_algorithms = tuple(host_key_algorithms)
        self._ciphers = host.ciphers
        self._macs = host.macs
        self._process = os.getpid()
        self._held: list[Message] = []
        self._incarnations: dict[int, int] = {}
        self._closed_channels: set[int] = set()
        self._opened_ahead: _Channel | None = None
        self._login: _Login | None = None
        assert isinstance(self.packetizer, Packetizer)
        self._reader = self.packetizer
        self._reader.alive_interval = host.alive_interval
        self._reader.alive_count = host.alive_count
        self._reader.owner = weakref.ref(self)
        # The server's answer to a re-key request queues behind the data that it has sent already: at 50 kB/s that
        # exceeds paramiko's timeout of 30 s. The packetizer detects a dead peer instead.
        self.clear_to_send_timeout = float("inf")

    @property
    def server(self) -> str:
        """The server's identification string."""
        return self.remote_version

    @property
    def preferred_keys(self) -> Sequence[str]:
        """Host key algorithms to request."""
        return self._host_key_algorithms

    @property
    def preferred_ciphers(self) -> Sequence[str]:
        """Ciphers to request: GCM first, 50 % faster than CTR with a MAC, at two thirds of its cost."""
        available = super().preferred_ciphers
        allowed = [name for name in available if name in self._ciphers] or available
        return sorted(allowed, key=lambda name: "-gcm@" not in name)

    @property
    def preferred_macs(self) -> Sequence[str]:
        """Message authentication codes to request."""
        available = super().preferred_macs
        return [name for name in available if name in self._macs] or available

    def shake_hands(self, timeout: float) -> None:
        """Perform the key exchange; raises SSHException, EOFError or OSError.

        Args:
            timeout: seconds for the whole handshake.
        """
        done = threading.Event()
        self.handshake_timeout = timeout
        self.start_client(event=done)
        until = time.monotonic() + timeout
        while not done.wait(POLL) and self.active and time.monotonic() < until:
            pass
        # Stop paramiko's timer thread, which would keep a process from exiting after a failed handshake.
        self.packetizer.complete_handshake()
        if not self.active:
            error = self.saved_exception or EOFError()
            if self._reader.greeting and not self.remote_version:
                self.farewell = self.farewell or _quoted(self._reader.greeting)
                if isinstance(error, paramiko.SSHException) and not isinstance(error.__context__, EOFError | OSError):
                    raise NotAnSSHServer from error
            raise error
        if not self.initial_kex_done:
            raise TimeoutError

    # log-in

    def is_authenticated(self) -> bool:
        """Return whether the log-in has succeeded, even if the server has disconnected since."""
        return self._login is not None and self._login.is_authenticated()

    def set_auth_timeout(self, seconds: float) -> None:
        """Set how long the server may take for one method."""
        self.auth_timeout = seconds

    def auth_none(self, username: str) -> list[str]:
        """Query the permitted methods."""
        return self._authenticate(lambda login, done: login.auth_none(username, done))

    def auth_key(self, username: str, key: paramiko.PKey, command: str) -> list[str]:
        """Authenticate with a key; a request to start `command` may be pipelined behind it."""

        def send(login: _Login, done: threading.Event) -> None:
            login.auth_publickey(username, key, done)
            if command:
                self._start_ahead(command)

        return self._authenticate(send)

    def auth_secret(self, username: str, password: str) -> list[str]:
        """Authenticate with a password."""
        return self._authenticate(lambda login, done: login.auth_password(username, password, done))

    def auth_interactive(self, username: str, handler: Handler, submethods: str = "") -> list[str]:
        """Answer the server's prompts."""
        return self._authenticate(lambda login, done: login.auth_interactive(username, handler, done, submethods))

    def _authenticate(self, send: Callable[[_Login, threading.Event], None]) -> list[str]:
        if self._login is None:
            self._login = _Login(self)
        self.permitted = []
        done = threading.Event()
        try:
            send(self._login, done)
            further = self._login.wait_for_response(done)
        except Exception:
            if self.is_active() and not self.is_authenticated():
                self._forget_ahead()
            raise
        if further:
            self._forget_ahead()
        return list(further)

    # Pipelining: the requests for a session and its program follow the log-in request at once, which does not wait for
    # the acceptance of its service request. This saves 3 of the client's 7 turns: without it, a short job takes 1.13
    # times as long with a round trip of 50 ms.

    def _start_ahead(self, command: str) -> None:
        """Request a session with a program before the log-in result is known; `begin_session` returns it.

        A server whose first session has another number than `FIRST_SESSION` disconnects.
        """
        if "-OpenSSH_" in self.remote_version and self._opened_ahead is None:
            self._opened_ahead = self._ask_for_session()
            self._opened_ahead.remote_chanid = FIRST_SESSION
            self._opened_ahead.execute(command)

    def _forget_ahead(self) -> None:
        """Forget the pipelined session: the log-in failed, so the server has ignored the request."""
        session, self._opened_ahead = self._opened_ahead, None
        if session is not None:
            self.channel_events.pop(session.chanid, None)
            session._unlink()  # type: ignore[attr-defined]

    def begin_session(self, command: str, timeout: float) -> InternalsSession:
        """Return a new session with a program.

        Args:
            command: command line of the program.
            timeout: seconds within which the server must open the session; a failure to start the program shows later.

        Raises:
            ChannelException: the server refuses the session.
            TimeoutError: the server does not answer.
            SSHException: the connection is gone.
        """
        session, self._opened_ahead = self._opened_ahead, None
        if session is not None and session.command != command:
            self._wait_for(session, timeout)
            session.close()
            session = None
        if session is None:
            session = self._ask_for_session()
        self._wait_for(session, timeout)
        if not session.command:
            session.execute(command)
        return InternalsSession(session)

    def _wait_for(self, session: _Channel, timeout: float) -> None:
        until = time.monotonic() + timeout
        while not session.answered.wait(POLL):
            if not self.active:
                break
            if time.monotonic() >= until:
                raise TimeoutError
        if not session.active:
            raise session.refusal or self.get_exception() or paramiko.SSHException("the connection broke")

    def _ask_for_session(self) -> _Channel:
        # Paramiko's `open_channel` up to the point where it waits.
        with self.lock:
            number = self._next_channel()  # type: ignore[attr-defined]
            session = _Channel(number, self, self.default_window_size, self.default_max_packet_size)
            self._channels.put(number, session)  # type: ignore[attr-defined]
            self.channel_events[number] = session.answered
            self.channels_seen[number] = True
        request = Message()
        request.add_byte(cMSG_CHANNEL_OPEN)
        request.add_string("session")
        request.add_int(number)
        request.add_int(self.default_window_size)
        request.add_int(self.default_max_packet_size)
        self._send_user_message(request)
        return session

    def ask_for_life(self) -> None:
        """Send a keepalive request, which every server answers, if only with a failure."""
        if not self.clear_to_send.is_set():
            return
        request = Message()
        request.add_byte(cMSG_GLOBAL_REQUEST)
        request.add_string("keepalive@openssh.com")
        request.add_boolean(True)
        self._send_user_message(request)

    def forward(self, host: str, port: int, timeout: float) -> paramiko.Channel:
        """Open a connection from the server to a port."""
        return self.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout)

    def cut(self) -> None:
        """Shut down the socket, so that no thread blocks on it any more. Never raises."""
        if isinstance(self.sock, socket.socket):
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Close the connection at once, even while other threads use it. Never raises."""
        self.cut()
        with contextlib.suppress(Exception):
            self.close()
            self.sock.close()  # paramiko does not, before its thread has started

    def abandon(self) -> None:
        """Forget the connection in a forked process: close its copy of the socket without sending anything.

        Threads that do not exist in the forked process may hold locks, so the locks are replaced.
        """
        self.active = False
        self._channels._lock = threading.Lock()  # type: ignore[attr-defined]
        for channel in self._channels.values():  # type: ignore[attr-defined]
            channel.lock = threading.Lock()
            channel.out_buffer_cv = threading.Condition(channel.lock)
            channel.active = False
        if isinstance(self.sock, socket.socket):
            self.sock.close()

    # Re-key deadlock: paramiko's reader thread handles all messages, and also answers some of them by
    # `_send_user_message` (a channel's CLOSE with EOF and CLOSE, a failed request). Between the client's KEXINIT and
    # the server's, which may send any message before its own, that call waits for the end of the key exchange. Only the
    # waiting thread could complete it, so after 30 s the connection fails with "Key-exchange timed out waiting for key
    # negotiation". See paramiko/transport.py, `_send_user_message`, and paramiko/channel.py, `_handle_close`, in 3.4 to
    # 5.1; https://github.com/paramiko/paramiko/issues/822. A larger channel window means more data in flight, and makes
    # it more likely. Here the reader thread never waits: its messages are queued, and sent when the new keys are in
    # use.
    #
    # Close race: a message that another thread had ready while the channel's CLOSE was sent must not follow it. OpenSSH
    # disconnects a client that writes to a closed channel ("nonexistent channel"), which ends all other channels too.
    # Such a message is dropped, even if the server has assigned the channel's number to a new channel meanwhile.

    def _send_user_message(self, data: Message) -> None:
        if os.getpid() != self._process:
            return
        ours = threading.current_thread() is self
        if ours and not self.clear_to_send.is_set():
            self._held.append(data)
            return
        head = data.packet.getbuffer()[:5]
        kind, channel = head[0], int.from_bytes(head[1:], "big")
        head.release()
        of_channel = MSG_CHANNEL_WINDOW_ADJUST <= kind <= MSG_CHANNEL_FAILURE
        incarnation = self._incarnations.get(channel, 0)
        while True:
            self.clear_to_send.wait(POLL)
            if not self.active:
                return
            with self.clear_to_send_lock:
                if not self.clear_to_send.is_set():
                    continue
                if of_channel:
                    if channel in self._closed_channels or self._incarnations.get(channel, 0) != incarnation:
                        return
                    if kind == MSG_CHANNEL_CLOSE:
                        self._closed_channels.add(channel)
                self.packetizer.send_message(data)
                return

    def _parse_channel_open_success(self, message: Message) -> None:
        session = self._channels.get(message.get_int())  # type: ignore[attr-defined]
        channel = message.get_int()
        message.rewind()
        if isinstance(session, _Channel) and session.command and channel != session.remote_chanid:
            raise paramiko.SSHException("the server assigned an unexpected session number")
        with self.clear_to_send_lock:
            self._closed_channels.discard(channel)
            self._incarnations[channel] = self._incarnations.get(channel, 0) + 1
        super()._parse_channel_open_success(message)  # type: ignore[misc]

    def _parse_channel_open_failure(self, message: Message) -> None:
        session = self._channels.get(message.get_int())  # type: ignore[attr-defined]
        reason = message.get_int()
        message.rewind()
        if isinstance(session, _Channel):  # a later disconnect overwrites paramiko's copy
            session.refusal = paramiko.ChannelException(reason, CONNECTION_FAILED_CODE.get(reason, "(unknown code)"))
        super()._parse_channel_open_failure(message)  # type: ignore[misc]

    def _parse_newkeys(self, message: Message) -> None:
        super()._parse_newkeys(message)  # type: ignore[misc]
        held, self._held = self._held, []
        for data in held:
            self._send_user_message(data)

    def _activate_outbound(self) -> None:
        # Paramiko considers the key exchange complete here, but the server's NEWKEYS is still to come. Reaching
        # paramiko's re-key limit before that would start the next key exchange within this one.
        super()._activate_outbound()  # type: ignore[misc]
        self.in_kex = True

    def _parse_global_request(self, message: Message) -> None:
        # Paramiko replies even during a key exchange, which RFC 4253, section 7.1, forbids.
        message.get_text()
        if message.get_boolean():
            reply = Message()
            reply.add_byte(cMSG_REQUEST_FAILURE)
            self._send_user_message(reply)

    def _verify_key(self, host_key: bytes, signature: bytes) -> None:
        try:
            super()._verify_key(host_key, signature)  # type: ignore[misc]
        except paramiko.SSHException as error:
            raise InvalidHostKeySignature(str(error)) from error
        if self.host_key_blob and host_key != self.host_key_blob:
            raise paramiko.SSHException("the server has changed its host key in the middle of the connection")
        self.host_key_blob = host_key

    def _parse_disconnect(self, message: Message) -> None:
        message.get_int()
        words = message.get_string().decode("utf-8", "replace")
        self.farewell = _quoted(words)


def _quoted(text: str) -> str:
    """Return untrusted text as one printable line of bounded length."""
    return "".join(char if char.isprintable() else " " for char in text)[:300].rstrip(". ")


class _Login(AuthHandler):
    """Authentication handler that requests the service once, and does not wait for its acceptance."""

    def __init__(self, transport: InternalsTransport) -> None:
        super().__init__(transport)
        self._owner = transport
        self._has_service = False
        transport.auth_handler = self

    def _request_auth(self) -> None:
        if not self._has_service:
            super()._request_auth()  # type: ignore[misc]
            self._has_service = True
        accepted = Message()
        accepted.add_string("ssh-userauth")
        accepted.rewind()
        super()._parse_service_accept(accepted)  # type: ignore[misc]

    def _parse_service_accept(self, message: Message) -> None:
        """Ignore the acceptance, for which `_request_auth` does not wait."""

    def _parse_userauth_failure(self, message: Message) -> None:
        self._owner.permitted = message.get_list()
        message.rewind()
        super()._parse_userauth_failure(message)  # type: ignore[misc]


class _Channel(paramiko.Channel):
    """Channel for one program; sends its requests without waiting for replies.

    Args:
        number: client-side channel number.
        transport: the connection.
        window: bytes that the server may send before they are read.
        packet: maximum bytes in one packet.

    Attributes:
        answered: set once the server has opened or refused the session.
        command: command line of the program, once it was requested.
        refusal: the server's reason for refusing the session.
    """

    def __init__(self, number: int, transport: InternalsTransport, window: int, packet: int) -> None:
        super().__init__(number)
        self.owner = transport
        self.answered = threading.Event()
        self.command = ""
        self.refusal: paramiko.ChannelException | None = None
        self._set_transport(transport)  # type: ignore[attr-defined]
        self._set_window(window, packet)  # type: ignore[attr-defined]
        self.in_buffer = _BoundedPipe(2 * window)
        self.in_stderr_buffer = _BoundedPipe(2 * window)

    def execute(self, command: str) -> None:
        """Request the start of a program; a refusal shows in `is_refused`, and in that the channel is closed."""
        self.command = command
        request = Message()
        request.add_byte(cMSG_CHANNEL_REQUEST)
        request.add_int(self.remote_chanid)
        request.add_string("exec")
        request.add_boolean(True)
        request.add_string(command)
        self._event_pending()  # type: ignore[attr-defined]
        self.owner._send_user_message(request)

    @property
    def is_refused(self) -> bool:
        """Whether the server has refused to start the program."""
        return self.event.is_set() and not self.event_ready and self.owner.is_active()


class InternalsSession(PublicSession):
    """One program on the server; see `Session`. A refusal shows after the start, which does not wait for an answer."""

    _channel: _Channel

    @property
    def is_refused(self) -> bool:
        """Whether the server has refused to start the program."""
        return self._channel.is_refused

    @property
    def has_ended(self) -> bool:
        """Whether the server has announced the end of the output."""
        return bool(self._channel.eof_received)
