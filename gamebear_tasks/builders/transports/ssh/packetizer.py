"""Paramiko's packets read fast and watched, and what becomes of a channel's data; knows nothing of logging in.

Importing this module imports paramiko; nothing does before a connection is opened.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import paramiko
from paramiko.buffered_pipe import BufferedPipe, PipeTimeout
from paramiko.common import MSG_CHANNEL_DATA
from paramiko.message import Message
from paramiko.packet import NeedRekeyException
from paramiko.packet import Packetizer as ParamikoPacketizer

POLL = 0.1
"""Seconds for which paramiko lets one read or write of its socket wait."""

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


class Owner(Protocol):
    """What a reader of packets asks of the transport that it belongs to."""

    def inflow(self, number: int) -> Inflow | None:
        """Return the buffer of a channel whose data may be put there now."""
        ...

    def is_authenticated(self) -> bool:
        """Say whether we are logged in."""
        ...

    def ask_for_life(self) -> None:
        """Ask the peer for a sign of life."""
        ...


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
        self.is_introduced = False
        self.owner: weakref.ref[Owner] | None = None
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
        owner = self.owner() if self.owner else None
        return owner.inflow(number) if owner is not None else None

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
        if self.is_introduced:  # the introduction is what paramiko begins with
            self.is_introduced = False
            return
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
        owner = self.owner() if self.owner else None
        if owner is None or not owner.is_authenticated():
            return
        now = time.monotonic()
        if now - self._heard < self.alive_interval:
            return
        if self._unanswered >= self.alive_count:
            raise PeerSilent(f"it has answered nothing for {self.alive_interval * (self.alive_count + 1):.0f} seconds")
        self._unanswered += 1
        self._heard = now
        if not self._writing:
            owner.ask_for_life()


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
