"""Paramiko's transport with its re-keying mended and a peer that has gone silent noticed.

Importing this module imports paramiko; nothing does before a connection is opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Collection, Sequence

import paramiko
from paramiko.auth_handler import AuthHandler
from paramiko.common import (
    CONNECTION_FAILED_CODE,
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_WINDOW_ADJUST,
    cMSG_CHANNEL_DATA,
    cMSG_CHANNEL_OPEN,
    cMSG_CHANNEL_REQUEST,
    cMSG_GLOBAL_REQUEST,
    cMSG_REQUEST_FAILURE,
)
from paramiko.message import Message

from .packetizer import POLL, ErrorTail, Inflow, Packetizer

# What goes wrong is told in our own errors; Python would print paramiko's, with their tracebacks, on standard error.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
if logging.getLogger("paramiko").level == logging.NOTSET:
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)

AHEAD = 256 << 10
"""Bytes that are sent to a program before the server has said how many it takes; OpenSSH takes 2 MiB
(`CHAN_SES_WINDOW_DEFAULT`)."""

FIRST_SESSION = 0
"""The server's number of a connection's first session: OpenSSH takes the lowest that is free (`channel_new`)."""


class Transport(paramiko.Transport):
    """A client's SSH transport on which re-keying is safe, however many channels and threads there are.

    Args:
        sock: a connected socket, or a channel of another transport.
        introduction: how we have introduced ourselves to the server.
        host_key_algorithms: what to ask the server to identify itself with, best first.
        ciphers: those allowed; empty: all that paramiko has.
        macs: the same for message authentication.
        alive_interval: seconds of silence after which the peer is asked for a sign of life.
        alive_count: how many of these questions may stay unanswered.
    """

    def __init__(
        self,
        sock: socket.socket | paramiko.Channel,
        introduction: str,
        host_key_algorithms: Sequence[str],
        ciphers: Collection[str],
        macs: Collection[str],
        alive_interval: float,
        alive_count: int,
    ) -> None:
        super().__init__(sock, packetizer_class=Packetizer)
        self.local_version = introduction  # which is part of what the key exchange signs
        self.host_key_blob = b""
        """The host key or host certificate that the server has identified itself with."""
        self.farewell = ""
        """Why the server has disconnected, in its words."""
        self._host_key_algorithms = tuple(host_key_algorithms)
        self._ciphers = ciphers
        self._macs = macs
        self._process = os.getpid()
        self._held: list[Message] = []
        self._incarnations: dict[int, int] = {}
        self._closed_channels: set[int] = set()
        self._opened_ahead: Session | None = None
        assert isinstance(self.packetizer, Packetizer)
        self.packetizer.is_introduced = True
        self.packetizer.alive_interval = alive_interval
        self.packetizer.alive_count = alive_count
        self.packetizer.owner = weakref.ref(self)
        # The server's answer to our request for new keys queues up behind what it has sent already: at 50 kB/s that
        # is longer than the 30 s for which paramiko waits. Whether the peer is alive is the packetizer's business.
        self.clear_to_send_timeout = float("inf")

    @property
    def preferred_keys(self) -> Sequence[str]:
        """The host key algorithms to ask for."""
        return self._host_key_algorithms

    @property
    def preferred_ciphers(self) -> Sequence[str]:
        """The ciphers to ask for: GCM first, half as fast again as CTR with a MAC, and at two thirds of its cost."""
        available = super().preferred_ciphers
        allowed = [name for name in available if name in self._ciphers] or available
        return sorted(allowed, key=lambda name: "-gcm@" not in name)

    @property
    def preferred_macs(self) -> Sequence[str]:
        """The message authentication codes to ask for."""
        available = super().preferred_macs
        return [name for name in available if name in self._macs] or available

    def shake_hands(self, timeout: float) -> None:
        """Agree on keys; raises SSHException, EOFError or OSError.

        Args:
            timeout: seconds for all of it.
        """
        done = threading.Event()
        self.handshake_timeout = timeout
        self.start_client(event=done)
        until = time.monotonic() + timeout
        while not done.wait(POLL) and self.active and time.monotonic() < until:
            pass
        # Ends paramiko's timer: it is a thread that would keep a process whose handshake failed from ending.
        self.packetizer.complete_handshake()
        if not self.active:
            raise self.saved_exception or EOFError()
        if not self.initial_kex_done:
            raise TimeoutError

    # Round trips are spared where nothing is waited for that is as good as certain: a session and the program in it are
    # asked for behind the request to log in, and a program's input is sent behind the request to start it.

    @property
    def takes_ahead(self) -> bool:
        """Whether the server is known to take messages that build on an answer which it has not given yet."""
        return "-OpenSSH_" in self.remote_version

    def start_ahead(self, command: str) -> None:
        """Ask for a session with a program before it is known whether we are let in; `begin_session` returns it.

        A server whose first session has another number than `FIRST_SESSION` hangs up.
        """
        if self.takes_ahead and self._opened_ahead is None:
            self._opened_ahead = self._ask_for_session()
            self._opened_ahead.remote_chanid = FIRST_SESSION
            self._opened_ahead.execute(command)

    def forget_ahead(self) -> None:
        """Forget the session that was asked for: we were not let in, and the request for it went unheard."""
        session, self._opened_ahead = self._opened_ahead, None
        if session is not None:
            self.channel_events.pop(session.chanid, None)
            session._unlink()  # type: ignore[attr-defined]

    def begin_session(self, command: str, timeout: float) -> Session:
        """Return a new session with a program.

        Args:
            command: starts it.
            timeout: seconds for the server to give the session; whether the program was started shows later.

        Raises:
            ChannelException: the server gives none.
            TimeoutError: it does not answer.
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
        return session

    def _wait_for(self, session: Session, timeout: float) -> None:
        until = time.monotonic() + timeout
        while not session.answered.wait(POLL):
            if not self.active:
                break
            if time.monotonic() >= until:
                raise TimeoutError
        if not session.active:
            raise session.refusal or self.get_exception() or paramiko.SSHException("the connection broke")

    def _ask_for_session(self) -> Session:
        # What `open_channel` does before it waits.
        with self.lock:
            number = self._next_channel()  # type: ignore[attr-defined]
            session = Session(number, self, self.default_window_size, self.default_max_packet_size)
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

    def inflow(self, number: int) -> Inflow | None:
        """Return the buffer of a channel whose data may be put there now, in the midst of no key exchange."""
        if self._expected_packet:  # type: ignore[attr-defined]
            return None
        channel = self._channels.get(number)  # type: ignore[attr-defined]
        return channel.in_buffer if channel is not None and isinstance(channel.in_buffer, Inflow) else None

    def ask_for_life(self) -> None:
        """Send a request that every server answers, if only by saying that it does not know it."""
        if not self.clear_to_send.is_set():
            return
        request = Message()
        request.add_byte(cMSG_GLOBAL_REQUEST)
        request.add_string("keepalive@openssh.com")
        request.add_boolean(True)
        self._send_user_message(request)

    def cut(self) -> None:
        """Shut the socket down, so that no thread waits for it any more. Never raises."""
        if isinstance(self.sock, socket.socket):
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Close the connection at once, whatever other threads are doing with it. Never raises."""
        self.cut()
        with contextlib.suppress(Exception):
            self.close()

    def abandon(self) -> None:
        """Forget the connection in a process that was forked off: close its copy of the socket, send nothing.

        Locks may be held by threads that the new process does not have, so they are replaced.
        """
        self.active = False
        self._channels._lock = threading.Lock()  # type: ignore[attr-defined]
        for channel in self._channels.values():  # type: ignore[attr-defined]
            channel.lock = threading.Lock()
            channel.out_buffer_cv = threading.Condition(channel.lock)
            channel.active = False
        if isinstance(self.sock, socket.socket):
            self.sock.close()

    # Paramiko's thread, which reads and handles all messages, also answers some of them (a channel's CLOSE with EOF and
    # CLOSE, a failed request) by `_send_user_message`. Between our KEXINIT and the server's, which may still send what
    # it likes, that call waits for the end of the key exchange, which only the waiting thread could bring about: after
    # 30 s the connection dies of "Key-exchange timed out waiting for key negotiation". (paramiko/transport.py,
    # `_send_user_message`, and paramiko/channel.py, `_handle_close`, in 3.4 to 5.1; https://github.com/paramiko/
    # paramiko/issues/822.) The larger a channel's window, the more is under way at that moment, and the likelier it is.
    # So here that thread never waits: what it wants to say is held back and said when the new keys are in use.
    #
    # A message that another thread had ready while the channel's CLOSE went out must not follow it: OpenSSH disconnects
    # a client that writes to a channel that is no more ("nonexistent channel"), and with it every other channel. Such a
    # message is dropped, also where the server has given the channel's number to a new one meanwhile.

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
        if isinstance(session, Session) and session.command and channel != session.remote_chanid:
            raise paramiko.SSHException("the server begins to number its sessions elsewhere")
        with self.clear_to_send_lock:
            self._closed_channels.discard(channel)
            self._incarnations[channel] = self._incarnations.get(channel, 0) + 1
        super()._parse_channel_open_success(message)  # type: ignore[misc]

    def _parse_channel_open_failure(self, message: Message) -> None:
        session = self._channels.get(message.get_int())  # type: ignore[attr-defined]
        reason = message.get_int()
        message.rewind()
        if isinstance(session, Session):  # paramiko keeps it until the server hangs up, as on what was sent ahead
            session.refusal = paramiko.ChannelException(reason, CONNECTION_FAILED_CODE.get(reason, "(unknown code)"))
        super()._parse_channel_open_failure(message)  # type: ignore[misc]

    def _parse_newkeys(self, message: Message) -> None:
        super()._parse_newkeys(message)  # type: ignore[misc]
        held, self._held = self._held, []
        for data in held:
            self._send_user_message(data)

    def _activate_outbound(self) -> None:
        # Paramiko thinks here that the key exchange is over, though the server's NEWKEYS are still to come; reaching
        # its own limit in between it would start the next one in the middle of this one.
        super()._activate_outbound()  # type: ignore[misc]
        self.in_kex = True

    def _parse_global_request(self, message: Message) -> None:
        # Paramiko answers even in the middle of a key exchange, which RFC 4253, section 7.1, forbids.
        message.get_text()
        if message.get_boolean():
            reply = Message()
            reply.add_byte(cMSG_REQUEST_FAILURE)
            self._send_user_message(reply)

    def _verify_key(self, host_key: bytes, signature: bytes) -> None:
        super()._verify_key(host_key, signature)  # type: ignore[misc]
        if self.host_key_blob and host_key != self.host_key_blob:
            raise paramiko.SSHException("the server has changed its host key in the middle of the connection")
        self.host_key_blob = host_key

    def _parse_disconnect(self, message: Message) -> None:
        message.get_int()
        words = message.get_string().decode("utf-8", "replace")
        self.farewell = "".join(char if char.isprintable() else " " for char in words)[:300].rstrip(". ")


class Login(AuthHandler):
    """Paramiko's side of a log-in, which asks for the service once, and waits for no leave before it says who we are.

    Attributes:
        methods: what the server would go on with, after it has refused something.
    """

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self.methods: list[str] = []
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
        """Take note of the leave that was not waited for."""

    def _parse_userauth_failure(self, message: Message) -> None:
        self.methods = message.get_list()
        message.rewind()
        super()._parse_userauth_failure(message)  # type: ignore[misc]


class Session(paramiko.Channel):
    """A channel for one program, which says what it has to say without waiting for answers.

    Args:
        number: ours of the channel.
        transport: the connection.
        window: bytes that the server may send before they are taken.
        packet: the most bytes in one packet.

    Attributes:
        answered: set when the server has given the session or refused it.
        command: what starts its program, once that was asked for.
        refusal: why the server has refused the session.
    """

    def __init__(self, number: int, transport: Transport, window: int, packet: int) -> None:
        super().__init__(number)
        self.owner = transport
        self.answered = threading.Event()
        self.command = ""
        self.refusal: paramiko.ChannelException | None = None
        self._set_transport(transport)  # type: ignore[attr-defined]
        self._set_window(window, packet)  # type: ignore[attr-defined]
        self.errors = ErrorTail(self)
        self.in_stderr_buffer = self.errors
        self.in_buffer = Inflow(self)

    def execute(self, command: str) -> None:
        """Ask for a program to be started; whether it was shows in `is_refused`, and in that the channel is closed."""
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

    def send_ahead(self, data: memoryview) -> int:
        """Send what the server has not said yet that it takes, if it is known that it will; return how many bytes.

        It is taken off the window that the server opens when the program is started.
        """
        with self.lock:
            taken = len(data)
            ahead = self.owner.takes_ahead and self.out_window_size == 0 and not (self.event.is_set() or self.closed)
            if not ahead or taken > AHEAD:
                return 0
            self.out_window_size -= taken
        most = self.out_max_packet_size - 64
        for start in range(0, taken, most):
            message = Message()
            message.add_byte(cMSG_CHANNEL_DATA)
            message.add_int(self.remote_chanid)
            message.add_string(bytes(data[start : start + most]))
            self.owner._send_user_message(message)
        return taken
