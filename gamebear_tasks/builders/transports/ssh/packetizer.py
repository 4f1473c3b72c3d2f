"""Fast packet reader with keepalive, and receive buffers of channels; independent of authentication.

Importing this module imports paramiko, so it is imported only when a connection is opened.
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
"""Seconds after which paramiko interrupts one read or write of its socket."""

SMALL = 1024
"""Bytes; smaller pieces of a channel's data are merged, because each piece has an overhead of some hundred bytes."""

MAX_PACKET = 256 << 10
"""Maximum length of a packet in bytes: OpenSSH's own limit (`PACKET_MAX_SIZE`)."""

_DATA = struct.Struct(">BBII")
"""Start of a packet with channel data: padding length, message number, channel, data length."""
_TAG = 16
_LENGTH = struct.Struct(">I")


class PeerSilent(paramiko.SSHException):
    """The peer did not answer for as long as the settings allow."""


class Owner(Protocol):
    """Methods of the transport that its packet reader uses."""

    def inflow(self, number: int) -> Inflow | None:
        """Return a channel's buffer if it may receive data directly now."""
        ...

    def is_authenticated(self) -> bool:
        """Return whether the log-in has succeeded."""
        ...

    def ask_for_life(self) -> None:
        """Send a keepalive request."""
        ...


class Packetizer(ParamikoPacketizer):
    """Paramiko's packet reader and writer, with fast reads and keepalive requests.

    Paramiko reads each packet with two calls and copies it many times. This class reads all available bytes at once.
    With AES-GCM, which every OpenSSH since 2013 supports, it passes a channel's data from the cipher's output directly
    to the channel's buffer. All other packets, and all packets of other ciphers, use paramiko's code.

    Keepalive requests work as in OpenSSH (`ServerAliveInterval`, `ServerAliveCountMax`). Paramiko's own keepalive
    expects no answer, and its `write_all` retries without limit if the peer accepts nothing.
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
        """Bounds of the unread bytes in the buffer."""
        self._engine: Any = None
        """Cipher for incoming packets if it is AES-GCM."""
        self._nonce = b""
        self._compressed = False
        self._sequence = 0
        self._received = 0
        self._fed: set[Inflow] = set()

    # reading

    def set_inbound_cipher(self, *args: Any, **kwargs: Any) -> None:
        """Set the cipher for incoming packets."""
        super().set_inbound_cipher(*args, **kwargs)
        self._engine = kwargs.get("block_engine") if kwargs.get("aead") else None
        self._nonce = kwargs.get("iv_in") or b""
        self._received = 0

    def set_inbound_compressor(self, compressor: Any) -> None:
        """Set the compressor for incoming packets."""
        super().set_inbound_compressor(compressor)
        self._compressed = True

    def reset_seqno_in(self) -> None:
        """Reset the sequence number of incoming packets to 0."""
        super().reset_seqno_in()
        self._sequence = 0

    def readline(self, timeout: float) -> str:
        """Return a line of the peer's identification, without its end.

        Args:
            timeout: seconds to wait.

        Raises:
            EOFError: the peer has closed the connection.
            TimeoutError: no complete line was received in time.
            SSHException: the line is too long.
        """
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
        """Read exactly `n` bytes; raises EOFError, or NeedRekeyException if requested and nothing was received yet."""
        if n > MAX_PACKET:
            raise paramiko.SSHException(f"a packet of {n} bytes is longer than any")
        self._await(n, check_rekey)
        data = bytes(self._view[self._start : self._start + n])
        self._start += n
        return data

    def read_message(self) -> tuple[int, Message]:
        """Return the next message other than channel data; channel data goes directly into the channel's buffer."""
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
        """Return a channel's buffer if it may receive data directly now; None during a key exchange."""
        owner = self.owner() if self.owner else None
        return owner.inflow(number) if owner is not None else None

    def _decrypted(self) -> bytes:
        """Read and decrypt a packet (RFC 5647, as in OpenSSH's PROTOCOL); return it from the padding length on."""
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
        # The last eight bytes are the invocation counter.
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
        """Read until the buffer has enough bytes.

        Args:
            count: number of bytes.
            at_start: whether they are the first bytes of a packet.
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
        """Read the available bytes; return whether there were any. Raises EOFError at the end, or OSError."""
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

    # writing and keepalive

    def write_all(self, out: bytes) -> None:  # type: ignore[override]
        """Write bytes; raises EOFError if the connection is gone or the peer accepts nothing any more."""
        if self.is_introduced:  # skip paramiko's identification string: it was sent already
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
        """Send a keepalive request after a period of silence (paramiko calls this when a read has timed out).

        It counts requests, not time: if the process was stopped for an hour, the peer still gets the chance to answer.
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
    """End of a program's standard error; replaces the channel's own buffer.

    It accepts all data at once and widens the window accordingly. Both streams share one window, so a program that
    writes much to its standard error would block otherwise.
    """

    LIMIT = 64 * 1024

    def __init__(self, channel: paramiko.Channel) -> None:
        super().__init__()
        self._channel = weakref.ref(channel)
        self.tail = b""

    def feed(self, data: bytes) -> None:
        """Keep the end of the data and widen the window by its length (called by paramiko's thread)."""
        super().feed(data)
        channel = self._channel()
        if channel is not None:
            self.tail = (self.tail + channel.recv_stderr(len(data)))[-self.LIMIT :]


class Inflow(_BytePipe):
    """Unread data of a channel; replaces the channel's own buffer.

    It stores pieces as received and returns many at once, whereas paramiko's buffer copies each twice.

    Args:
        channel: the channel; twice its window limits the size of this buffer.
    """

    def __init__(self, channel: paramiko.Channel) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._pieces: deque[memoryview] = deque()
        self._ended = False
        self._size = 0
        self._most = 2 * channel.in_window_size
        channel.in_window_threshold = channel.in_window_size // 2  # each widening costs a packet

    def put(self, data: memoryview) -> None:
        """Append data without waking readers; raises SSHException if it exceeds the limit."""
        with self._changed:
            if self._pieces and len(self._pieces[-1]) + len(data) <= SMALL:
                self._pieces[-1] = memoryview(b"".join((self._pieces[-1], data)))
            else:
                self._pieces.append(data)
            self._size += len(data)
            if self._size > self._most:
                raise paramiko.SSHException("the server sends more than it was allowed to")

    def wake(self) -> None:
        """Wake the threads that wait for data."""
        with self._changed:
            self._changed.notify_all()

    def feed(self, data: bytes) -> None:
        """Append data (called by paramiko's thread)."""
        self.put(memoryview(data))
        self.wake()

    def close(self) -> None:
        """Mark the end of the data."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def read_ready(self) -> bool:
        """Return whether there is any data."""
        return bool(self._size)

    def read(self, nbytes: int, timeout: float | None = None) -> bytes:
        """Return 1 to `nbytes` bytes, or b"" at the end; raises PipeTimeout after `timeout` seconds without data."""
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
        """Return all available data."""
        return self.read(self._size, 0.0) if self._size else b""

    def __len__(self) -> int:
        return self._size
