"""Client-side Dask connections to untrusted peers: messages are numbers, texts and bytes, and are never unpickled.

Dask's own client unpickles data from schedulers and workers: results, exceptions, even parts of its own messages. Data
from a builder is untrusted, so neither Dask's client nor its connections are used here. This module speaks Dask's
framing (https://distributed.dask.org/en/stable/protocol.html) over asyncio's streams, with the TLS settings of Dask's
configuration: total length, number of frames, length of each frame (64 bits each), frames. The first frame is plain
msgpack; the parts from which Dask would rebuild objects are ignored.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import pickle
import re
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import TypeVar

import msgpack

from ...errors import BuilderError, BuilderLost
from ..protocol.session import CHUNK, words_of
from ..protocol.transport import SEND_SILENCE, Channel
from . import distributed_api

T = TypeVar("T")

PLUGIN = "gamebear"
"""Name of the scheduler plug-in and of the operation that addresses it."""

PROTOCOL = 2
"""Version of the protocol between this package's clients, schedulers and workers."""

LIMIT = 2 << 20
"""Maximum length of a received message in bytes. Outputs are sent in pieces of `CHUNK`."""

FRAMES = 4096
"""Maximum number of frames in a message."""

CONNECTING = 10.0
"""Seconds within which a connection must open."""

_LENGTH = struct.Struct("Q")

_HANDSHAKE = {
    "compression": None,
    "python": tuple(sys.version_info[:3]),
    "pickle-protocol": pickle.HIGHEST_PROTOCOL,
}
"""Handshake message of each side of a Dask connection. Nothing is pickled; Dask requires the entry."""


class Loop:
    """Event loop in its own thread, for blocking callers."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gamebear-dask", daemon=True)
        self._thread.start()

    def wait_for(self, work: Coroutine[object, None, T], seconds: float) -> T:
        """Run a coroutine and return its result.

        Raises:
            TimeoutError: it did not finish in time, and was cancelled.
            BuilderLost: the loop was closed.
        """
        if not self._thread.is_alive():
            work.close()
            raise BuilderLost("The connection to Dask was closed.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError:
            if not future.done():
                future.cancel()
            raise TimeoutError from None
        except concurrent.futures.CancelledError:
            raise BuilderLost("The connection to Dask was closed.") from None
        except BaseException:
            future.cancel()
            raise

    def begin(self, work: Coroutine[object, None, object]) -> None:
        """Start a coroutine without waiting for it."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(work, self._loop)
        else:
            work.close()

    def close(self) -> None:
        """Cancel all tasks, and end the thread."""

        async def end() -> None:
            mine = asyncio.current_task()
            while others := [task for task in asyncio.all_tasks() if task is not mine]:
                for task in others:
                    task.cancel()
                await asyncio.wait(others, timeout=0.05)  # repeat: Python 3.11's wait_for may swallow a cancellation

        with contextlib.suppress(Exception):
            self.wait_for(end(), 2.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2.0)
        if not self._thread.is_alive():
            self._loop.close()


def client_tls(address: str) -> ssl.SSLContext | None:
    """Return the TLS context for connections to an address, from Dask's configuration or `DASK_…` variables.

    Raises:
        BuilderError: the settings are missing or invalid.
    """
    try:
        context, encrypted = distributed_api.tls_of_client()
    except (OSError, ValueError, TypeError) as error:
        raise BuilderError(f"Dask's TLS settings are invalid: {error}.", _TLS) from error
    if address.startswith("tls:"):
        if context is None:
            raise BuilderError(f"{address} requires TLS, but Dask's configuration has no certificates.", _TLS)
        return context
    if encrypted:
        raise BuilderError(
            f"{address} is not encrypted, but Dask's configuration requires it.", "Use builder=dask+tls://…"
        )
    return None


_TLS = (
    "Set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and"
    " DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY, or distributed.comm.tls in ~/.config/dask/."
)


class Comm:
    """A connection with a scheduler or worker. All methods run in the loop's thread.

    Args:
        peer_address: the peer's Dask address.
        reader: received data.
        writer: data to send.
    """

    def __init__(self, peer_address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peer_address = peer_address
        self._reader = reader
        self._writer = writer
        writer.transport.set_write_buffer_limits(high=1, low=0)  # drain() waits; with 0, asyncio's TLS pauses forever

    async def write(self, message: Mapping[str, object]) -> None:
        """Send a message, and wait until it is flushed, so that at most one message is buffered in memory.

        Raises:
            BuilderLost: the connection broke.
            BuilderError: one side rejects the other's certificate.
        """
        data: bytes = msgpack.packb(message, use_bin_type=True)
        try:
            self._writer.write(struct.pack("3Q", 2 * _LENGTH.size + len(data), 1, len(data)) + data)
            await self._writer.drain()
        except OSError as error:
            raise self._broken(error) from error

    async def read(self) -> Mapping[str, object]:
        """Receive a message; one that is not a map is returned as an empty map.

        Raises:
            BuilderLost: the connection broke.
            BuilderError: the data is not a message, the message is too long, or one side rejects the other's
                certificate.
        """
        try:
            message: object = msgpack.unpackb(await self._read_frame(), raw=False, strict_map_key=False)
        except (OSError, EOFError) as error:
            raise self._broken(error) from error
        except (ValueError, TypeError, struct.error) as error:
            self.abort()
            raise BuilderError(
                f"{self.peer_address} sends an invalid message: {words_of(error)}.",
                "Check that a Dask scheduler and workers of the same release run there.",
            ) from error
        return {str(name): value for name, value in message.items()} if isinstance(message, dict) else {}

    async def _read_frame(self) -> bytes:
        """Read a message, and return its first frame."""
        (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
        if not _LENGTH.size <= length <= LIMIT:
            raise ValueError(f"{length} bytes")
        data = await self._reader.readexactly(length)
        (count,) = _LENGTH.unpack_from(data)
        if not 1 <= count <= FRAMES or length < _LENGTH.size * (1 + count):
            raise ValueError(f"{count} frames")
        lengths = struct.unpack_from(f"{count}Q", data, _LENGTH.size)
        start = _LENGTH.size * (1 + count)
        rest = start + sum(lengths) - length  # frames that Dask sends in separate buffers
        if not 0 <= rest <= LIMIT or start + lengths[0] > length:
            raise ValueError(f"frames of {sum(lengths)} bytes")
        if rest:
            await self._reader.readexactly(rest)
        return data[start : start + lengths[0]]

    def _broken(self, error: OSError | EOFError) -> BuilderError:
        if _is_distrust(error):
            return _distrusted(self.peer_address, error)
        return BuilderLost(f"The connection to {self.peer_address} broke ({_reason(error)}).")

    def abort(self) -> None:
        """Close the connection without flushing."""
        self._writer.transport.abort()


async def connect(address: str, tls: ssl.SSLContext | None) -> Comm:
    """Open a connection to a scheduler or worker.

    Raises:
        BuilderLost: nothing answers there now.
        BuilderError: one side rejects the other's certificate, or the address is invalid.
    """
    try:
        reader, writer = await asyncio.wait_for(_open(address, tls), CONNECTING)
    except asyncio.TimeoutError:
        raise BuilderLost(f"{address} does not answer within {CONNECTING:g} seconds.") from None
    except OSError as error:
        if _is_distrust(error):
            raise _distrusted(address, error) from error
        raise BuilderLost(f"{address} cannot be reached: {_reason(error)}.") from error
    except (ValueError, OverflowError) as error:  # an invalid host name or port
        raise BuilderError(
            f"{address} is not a valid address: {words_of(error)}.",
            "Correct HOST:PORT in the builder's URL, or at the workers (dask worker --host).",
        ) from error
    comm = Comm(address, reader, writer)
    try:
        # Read first: data that a peer has not read when it rejects our certificate turns its alert into a reset.
        await asyncio.wait_for(comm.read(), CONNECTING)
        await comm.write(_HANDSHAKE)
    except asyncio.TimeoutError:
        comm.abort()
        raise BuilderLost(f"{address} accepts a connection, but does not answer.") from None
    except BaseException:
        comm.abort()
        raise
    return comm


async def _open(address: str, tls: ssl.SSLContext | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    _, _, place = address.partition("://")
    host, _, port = place.rpartition(":")
    return await asyncio.open_connection(re.sub(r"\A\[(.*)\]\Z", r"\1", host), int(port), ssl=tls)


def _is_distrust(error: BaseException) -> bool:
    """Return whether one side of a TLS connection rejects the other, rather than the connection having broken."""
    ended = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    return isinstance(error, ssl.SSLError) and not isinstance(error, ended)


def _distrusted(address: str, error: BaseException) -> BuilderError:
    return BuilderError(f"The TLS handshake with {address} failed: {words_of(error)}.", _TLS)


def _reason(error: OSError | EOFError) -> str:
    if isinstance(error, EOFError):
        return "closed by the peer"
    if error.errno and not isinstance(error, (ssl.SSLError, socket.gaierror)):  # those have numbers of their own
        return os.strerror(error.errno)  # asyncio's text names the address once more
    return words_of(error.strerror or error).rstrip(".")


class DaskChannel:
    """Standard input and output of a program that a worker has started."""

    def __init__(self, loop: Loop, comm: Comm, broken: Callable[[], None]) -> None:
        self._loop = loop
        self._comm = comm
        self._broken = broken
        self._buffer = b""
        self._ended = False
        self._status: int | None = None
        self._errors = b""

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`."""
        for start in range(0, len(data), CHUNK):
            piece = bytes(data[start : start + CHUNK])
            self._wait(self._comm.write({"data": piece}), SEND_SILENCE)

    def receive(self, size: int, timeout: float) -> bytes:
        """Return 1 to `size` bytes, or `b""` at the end."""
        while not self._buffer and not self._ended:
            message = self._wait(self._comm.read(), timeout)
            data = message.get("data")
            if isinstance(data, bytes) and data:
                self._buffer = data
                continue
            self._ended = True
            status, errors = message.get("end"), message.get("errors")
            self._status = status if type(status) is int else None
            self._errors = errors if isinstance(errors, bytes) else b""
            if "lost" in message:
                self._broken()
                raise BuilderLost(
                    f"{self._comm.peer_address} has lost the worker: {words_of(message['lost'])}.",
                    "Run doit again: another worker builds it.",
                )
            if "error" in message or "exception_text" in message:
                reason = message.get("error") or message.get("exception_text")
                raise BuilderError(
                    f"{self._comm.peer_address} cannot start the runner: {words_of(reason)}.",
                    "Read the worker's log, then restart it.",
                )
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def _wait(self, work: Coroutine[object, None, T], seconds: float) -> T:
        try:
            return self._loop.wait_for(work, seconds)
        except TimeoutError:
            self._broken()
            raise BuilderLost(
                f"{self._comm.peer_address} does not answer: timeout after {seconds:g} seconds."
            ) from None
        except BuilderLost:
            self._broken()
            raise

    def errors(self) -> bytes:
        """Return the end of the program's standard error, once it has ended."""
        return self._errors

    def exit_status(self, timeout: float) -> int | None:
        """Return the program's exit status; None if it has not ended."""
        return self._status

    def close(self) -> None:
        """Close the channel."""
        self._loop.begin(closed(self._comm))


class DaskConnection:
    """Starts programs on a worker.

    Args:
        loop: event loop of the connections.
        address: the worker's Dask address.
        tls: TLS context of the connections.
        relay: the scheduler's address if the worker cannot be reached directly; otherwise empty.
    """

    is_alive = True

    def __init__(self, loop: Loop, address: str, tls: ssl.SSLContext | None, relay: str = "") -> None:
        self._loop = loop
        self._address = address
        self._tls = tls
        self._relay = relay

    def start(self, command: str) -> Channel:
        """Start a program."""
        try:
            return DaskChannel(self._loop, self._loop.wait_for(self._start(command), 2 * CONNECTING), self._broken)
        except TimeoutError:
            self._broken()
            raise BuilderLost(
                f"{self._address} does not start the runner: timeout after {2 * CONNECTING:g} seconds."
            ) from None
        except BuilderLost:
            self._broken()
            raise

    async def _start(self, command: str) -> Comm:
        comm = await connect(self._relay or self._address, self._tls)
        if self._relay:
            await comm.write({"op": "gamebear_relay", "worker": self._address, "command": command, "reply": True})
        else:
            await comm.write({"op": "gamebear_channel", "command": command, "reply": True})
        return comm

    def _broken(self) -> None:
        self.is_alive = False

    def close(self) -> None:
        """Do nothing: only the channels hold resources."""


async def closed(comm: Comm) -> None:
    """Close a connection from another thread, with `Loop.begin`."""
    comm.abort()
