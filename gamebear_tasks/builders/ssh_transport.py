"""Paramiko's transport with its re-keying mended and a peer that has gone silent noticed.

Importing this module imports paramiko; nothing does before a connection is opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import paramiko
from paramiko.auth_handler import AuthHandler
from paramiko.buffered_pipe import BufferedPipe, PipeTimeout
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_WINDOW_ADJUST,
    cMSG_CHANNEL_DATA,
    cMSG_CHANNEL_OPEN,
    cMSG_CHANNEL_REQUEST,
    cMSG_GLOBAL_REQUEST,
    cMSG_REQUEST_FAILURE,
)
from paramiko.message import Message
from paramiko.packet import NeedRekeyException
from paramiko.packet import Packetizer as ParamikoPacketizer

# What goes wrong is told in our own errors; Python would print paramiko's, with their tracebacks, on standard error.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
if logging.getLogger("paramiko").level == logging.NOTSET:
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)

POLL = 0.1
"""Seconds for which paramiko lets one read or write of its socket wait."""

AHEAD = 256 << 10
"""Bytes that are sent to a program before the server has said how many it takes; OpenSSH takes 2 MiB
(`CHAN_SES_WINDOW_DEFAULT`)."""

SMALL = 1024
"""Bytes; pieces of a channel's data below it are put together, for each costs some hundred bytes besides."""

MAX_PACKET = 256 << 10
"""The longest packet that is read, in bytes: OpenSSH's own limit (`PACKET_MAX_SIZE`)."""

_DATA = struct.Struct(">BBII")
"""What a packet with a channel's data begins with: the padding's length, the kind, the channel, the data's length."""
_TAG = 16
_LENGTH = struct.Struct(">I")


class PeerSilent(paramiko.SSHException):
    """The peer has answered nothing for as long as the settings allow."""


class Packetizer(ParamikoPacketizer):
    """Paramiko's reader and writer of packets, which reads fast, and asks a silent peer whether it is still there.

    Paramiko reads each packet with two calls and copies it many times on its way to whoever waits for it. Here as much
    is read at once as is there, and with AES-GCM, which every OpenSSH since 2013 speaks, a channel's data goes from the
    cipher's output to the channel's buffer. All other packets, and all those of other ciphers, go paramiko's way.

    OpenSSH asks for signs of life as well (`ServerAliveInterval`, `ServerAliveCountMax`). Paramiko's own keep-alive
    expects no answer, and its `write_all` tries for ever where the peer takes nothing.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._socket = sock
        self.alive_interval = 15.0
        self.alive_count = 3
        self.owner: weakref.ref[Transport] | None = None
        self._heard = time.monotonic()
        self._unanswered = 0
        self._writing = False
        self._buffer = bytearray(2 * MAX_PACKET)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        """What is read and not used yet is between these in the buffer."""
        self._engine: Any = None
        """The cipher of what comes in, where it is AES-GCM."""
        self._nonce = b""
        self._compressed = False
        self._sequence = 0
        self._received = 0
        self._fed: set[Inflow] = set()

    # reading

    def set_inbound_cipher(self, *args: Any, **kwargs: Any) -> None:
        """Take a new cipher for what comes in."""
        super().set_inbound_cipher(*args, **kwargs)
        self._engine = kwargs.get("block_engine") if kwargs.get("aead") else None
        self._nonce = kwargs.get("iv_in") or b""
        self._received = 0

    def set_inbound_compressor(self, compressor: Any) -> None:
        """Take a compressor for what comes in."""
        super().set_inbound_compressor(compressor)
        self._compressed = True

    def reset_seqno_in(self) -> None:
        """Count packets from 0 again."""
        super().reset_seqno_in()
        self._sequence = 0

    def readline(self, timeout: float) -> str:
        """Read a line of the peer's introduction, without its end; raises EOFError, and TimeoutError after seconds."""
        until = time.monotonic() + timeout
        while (end := self._buffer.find(b"\n", self._start, self._end)) < 0:
            if self._end - self._start > 8192:
                raise paramiko.SSHException("Invalid SSH banner: a line without end")
            if not self._read_more():
                if self.closed:
                    raise EOFError
                if time.monotonic() >= until:
                    raise TimeoutError
        line = bytes(self._view[self._start : end])
        self._start = end + 1
        return line.removesuffix(b"\r").decode("utf-8", "replace")

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        """Read exactly `n` bytes; raises EOFError, and NeedRekeyException if asked to and nothing came yet."""
        if n > MAX_PACKET:
            raise paramiko.SSHException(f"a packet of {n} bytes is longer than any")
        self._await(n, check_rekey)
        data = bytes(self._view[self._start : self._start + n])
        self._start += n
        return data

    def read_message(self) -> tuple[int, Message]:
        """Read the next message that is not a channel's data; that is put into its channel's buffer on the way."""
        if self._engine is None or self._compressed:
            kind, message = super().read_message()
            self._sequence = message.seqno + 1
            return kind, message
        while True:
            packet = self._decrypted()
            padding, kind, number, length = _DATA.unpack_from(packet)
            if kind == MSG_CHANNEL_DATA and (inflow := self._inflow(number)) is not None:
                if length > len(packet) - 10 - padding:
                    raise paramiko.SSHException("Mangled packet: more data than it has")
                inflow.put(memoryview(packet)[10 : 10 + length])
                self._fed.add(inflow)
                if self.need_rekey():
                    raise NeedRekeyException
                continue
            message = Message(packet[2 : len(packet) - padding])
            message.seqno = self._sequence - 1
            return kind, message

    def _inflow(self, number: int) -> Inflow | None:
        """Return the buffer of a channel whose data may be put there now, in the midst of no key exchange."""
        transport = self.owner() if self.owner else None
        if transport is None or transport._expected_packet:  # type: ignore[attr-defined]
            return None
        channel = transport._channels.get(number)  # type: ignore[attr-defined]
        return channel.in_buffer if channel is not None and isinstance(channel.in_buffer, Inflow) else None

    def _decrypted(self) -> bytes:
        """Read and decrypt a packet: RFC 5647, as OpenSSH's PROTOCOL says; from its padding's length on."""
        self._await(_LENGTH.size, True)
        (length,) = _LENGTH.unpack_from(self._buffer, self._start)
        if not 16 <= length <= MAX_PACKET or length % 16:
            raise paramiko.SSHException(f"Mangled packet: its length is {length}")
        whole = _LENGTH.size + length + _TAG
        self._await(whole, False)
        start = self._start + _LENGTH.size
        packet: bytes = self._engine.decrypt(
            self._nonce, self._view[start : start + length + _TAG], self._view[self._start : start]
        )
        self._start += whole
        # Its last eight bytes count the packets.
        self._nonce = self._nonce[:4] + (int.from_bytes(self._nonce[4:], "big") + 1 & (1 << 64) - 1).to_bytes(8, "big")
        if packet[0] > length - 2:
            raise paramiko.SSHException("Mangled packet: nothing but padding")
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        self._received += whole
        if self._received >= self.REKEY_BYTES:
            if not self.need_rekey():
                self._trigger_rekey()  # type: ignore[attr-defined]
            elif self._received >= self.REKEY_BYTES + self.REKEY_BYTES_OVERFLOW_MAX:
                raise paramiko.SSHException("Remote transport is ignoring rekey requests")
        return packet

    def _await(self, count: int, at_start: bool) -> None:
        """Read until there are as many bytes.

        Args:
            count: of bytes.
            at_start: whether they are a packet's first.
        """
        while self._end - self._start < count:
            if self.handshake_timed_out():
                raise EOFError
            if self._read_more():
                continue
            if self.closed:
                raise EOFError
            if at_start and self._start == self._end and self.need_rekey():
                raise NeedRekeyException
            self._check_keepalive()

    def _read_more(self) -> bool:
        """Read what is there; say whether it was anything. Raises EOFError at the end, OSError."""
        for inflow in self._fed:
            inflow.wake()
        self._fed.clear()
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._buffer) - self._end < MAX_PACKET // 2:
            self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
        try:
            if isinstance(self._socket, socket.socket):
                count = self._socket.recv_into(self._view[self._end :])
            else:  # a channel of the connection to a jump host
                data = self._socket.recv(len(self._buffer) - self._end)
                count = len(data)
                self._view[self._end : self._end + count] = data
        except (TimeoutError, BlockingIOError):
            return False
        except OSError as error:
            if self.closed:
                raise EOFError from error
            raise
        if not count:
            raise EOFError
        self._end += count
        self._heard = time.monotonic()
        self._unanswered = 0
        return True

    # writing, and whether the peer is alive

    def write_all(self, out: bytes) -> None:  # type: ignore[override]
        """Write bytes; raises EOFError where the connection is gone or takes nothing any more."""
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
        """Ask for a sign of life where there was none for a while (paramiko calls this when a read has waited).

        It counts questions and not time: after the process has been stopped for an hour the peer gets its chance.
        """
        transport = self.owner() if self.owner else None
        if transport is None or not transport.is_authenticated():
            return
        now = time.monotonic()
        if now - self._heard < self.alive_interval:
            return
        if self._unanswered >= self.alive_count:
            raise PeerSilent(f"it has answered nothing for {self.alive_interval * (self.alive_count + 1):.0f} seconds")
        self._unanswered += 1
        self._heard = now
        if not self._writing:
            transport.ask_for_life()


class Transport(paramiko.Transport):
    """A client's SSH transport on which re-keying is safe, however many channels and threads there are.

    Args:
        sock: a connected socket, or a channel of another transport.
        host_key_algorithms: what to ask the server to identify itself with, best first.
        ciphers: those allowed; empty: all that paramiko has.
        macs: the same for message authentication.
        alive_interval: seconds of silence after which the peer is asked for a sign of life.
        alive_count: how many of these questions may stay unanswered.
    """

    def __init__(
        self,
        sock: socket.socket | paramiko.Channel,
        host_key_algorithms: Sequence[str],
        ciphers: Collection[str],
        macs: Collection[str],
        alive_interval: float,
        alive_count: int,
    ) -> None:
        super().__init__(sock, packetizer_class=Packetizer)
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

    # Round trips are spared where nothing is waited for that is as good as certain: a session is asked for behind the
    # request to log in, and a program's input is sent behind the request to start it.

    @property
    def takes_ahead(self) -> bool:
        """Whether the server is known to take messages that build on an answer which it has not given yet."""
        return "-OpenSSH_" in self.remote_version

    def open_ahead(self) -> None:
        """Ask for a session before it is known whether we are let in; `begin_session` returns it."""
        if self.takes_ahead and self._opened_ahead is None:
            self._opened_ahead = self._ask_for_session()

    def forget_ahead(self) -> None:
        """Forget the session that was asked for: we were not let in, and the request for it went unheard."""
        session, self._opened_ahead = self._opened_ahead, None
        if session is not None:
            self.channel_events.pop(session.chanid, None)
            session._unlink()  # type: ignore[attr-defined]

    def begin_session(self, timeout: float) -> Session:
        """Return a new session.

        Args:
            timeout: seconds for the server to answer.

        Raises:
            ChannelException: the server gives none.
            TimeoutError: it does not answer.
            SSHException: the connection is gone.
        """
        session, self._opened_ahead = self._opened_ahead, None
        if session is None:
            session = self._ask_for_session()
        until = time.monotonic() + timeout
        while not session.answered.wait(POLL):
            if not self.active:
                break
            if time.monotonic() >= until:
                raise TimeoutError
        if not session.active:
            raise self.get_exception() or paramiko.SSHException("the connection broke")
        return session

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
        message.get_int()
        channel = message.get_int()
        message.rewind()
        with self.clear_to_send_lock:
            self._closed_channels.discard(channel)
            self._incarnations[channel] = self._incarnations.get(channel, 0) + 1
        super()._parse_channel_open_success(message)  # type: ignore[misc]

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
    """

    def __init__(self, number: int, transport: Transport, window: int, packet: int) -> None:
        super().__init__(number)
        self.owner = transport
        self.answered = threading.Event()
        self._set_transport(transport)  # type: ignore[attr-defined]
        self._set_window(window, packet)  # type: ignore[attr-defined]
        self.errors = ErrorTail(self)
        self.in_stderr_buffer = self.errors
        self.in_buffer = Inflow(self)

    def execute(self, command: str) -> None:
        """Ask for a program to be started; whether it was shows in `is_refused`, and in that the channel is closed."""
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


if TYPE_CHECKING:
    _BytePipe = BufferedPipe[bytes]
else:
    _BytePipe = BufferedPipe  # generic in its stub only


class ErrorTail(_BytePipe):
    """The last of what a program has written to its standard error; takes the place of a channel's own buffer.

    It takes everything at once and tells the server so: both streams share one window, and a program that writes much
    to its standard error would otherwise come to a halt.
    """

    LIMIT = 64 * 1024

    def __init__(self, channel: paramiko.Channel) -> None:
        super().__init__()
        self._channel = weakref.ref(channel)
        self.tail = b""

    def feed(self, data: bytes) -> None:
        """Keep the last of the data and widen the window by all of it (called by paramiko's thread)."""
        super().feed(data)
        channel = self._channel()
        if channel is not None:
            self.tail = (self.tail + channel.recv_stderr(len(data)))[-self.LIMIT :]


class Inflow(_BytePipe):
    """What a channel has received and nobody has taken yet; takes the place of a channel's own buffer.

    It keeps the pieces as they come and gives many at once, where paramiko's copies each twice.

    Args:
        channel: whose; its window is what may be in here.
    """

    def __init__(self, channel: paramiko.Channel) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._pieces: deque[memoryview] = deque()
        self._ended = False
        self._size = 0
        self._most = 2 * channel.in_window_size
        channel.in_window_threshold = channel.in_window_size // 2  # each time that it widens costs a packet

    def put(self, data: memoryview) -> None:
        """Add data, without waking who waits for it; raises SSHException for more than was allowed."""
        with self._changed:
            if self._pieces and len(self._pieces[-1]) + len(data) <= SMALL:
                self._pieces[-1] = memoryview(b"".join((self._pieces[-1], data)))
            else:
                self._pieces.append(data)
            self._size += len(data)
            if self._size > self._most:
                raise paramiko.SSHException("the server sends more than it was allowed to")

    def wake(self) -> None:
        """Wake who waits for data."""
        with self._changed:
            self._changed.notify_all()

    def feed(self, data: bytes) -> None:
        """Add data (called by paramiko's thread)."""
        self.put(memoryview(data))
        self.wake()

    def close(self) -> None:
        """Note that no more comes."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def read_ready(self) -> bool:
        """Say whether there is anything."""
        return bool(self._size)

    def read(self, nbytes: int, timeout: float | None = None) -> bytes:
        """Return 1 to `nbytes` bytes, b"" at the end; raises PipeTimeout after seconds without any."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._pieces or self._ended, timeout):
                raise PipeTimeout
            taken = []
            while self._pieces and nbytes:
                piece = self._pieces.popleft()
                if len(piece) > nbytes:
                    self._pieces.appendleft(piece[nbytes:])
                    piece = piece[:nbytes]
                taken.append(piece)
                nbytes -= len(piece)
                self._size -= len(piece)
        return b"".join(taken)

    def empty(self) -> bytes:
        """Return all that there is."""
        return self.read(self._size, 0.0) if self._size else b""

    def __len__(self) -> int:
        return self._size
