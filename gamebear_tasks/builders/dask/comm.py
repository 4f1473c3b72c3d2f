"""Client-side Dask connections to untrusted peers: messages are numbers, texts and bytes, and are never unpickled.

Dask's own client unpickles data from schedulers and workers: results, exceptions, even parts of its own messages. Data
from a builder is untrusted, so neither Dask's client nor its message reader is used here. This module opens Dask's
connections (with its TLS), and parses the frames itself. The first frame is parsed as plain msgpack; the parts from
which Dask would rebuild objects are ignored. The frames are those of `distributed.comm.tcp`: total length, number of
frames, length of each frame (64 bits each), frames.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import struct
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgpack
from distributed.comm.core import Comm
from distributed.comm.registry import backends
from distributed.security import Security

from ...errors import BuilderError, BuilderLost
from ..protocol.session import CHUNK, words_of
from ..protocol.transport import SEND_SILENCE, Channel

T = TypeVar("T")

PLUGIN = "gamebear"
"""Name of the scheduler plug-in and of the operation that addresses it."""

PROTOCOL = 1
"""Version of the protocol between this package's clients, schedulers and workers."""

LIMIT = 2 << 20
"""Maximum length of a received message in bytes. Outputs are sent in pieces of `CHUNK`."""

FRAMES = 4096
"""Maximum number of frames in a message."""

CONNECTING = 10.0
"""Seconds within which a connection must open."""

_LENGTH = struct.Struct("Q")


class Loop:
    """Event loop in its own thread, for blocking callers."""

    def __init__(self) -> None:
        for name in ("distributed.comm", "distributed.core"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are reported by this package
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gamebear-dask", daemon=True)
        self._thread.start()

    def wait_for(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
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

    def begin(self, work: Coroutine[Any, Any, object]) -> None:
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


def connection_args(address: str) -> Mapping[str, Any]:
    """Return the arguments for opening a Dask connection: TLS settings from Dask's configuration or `DASK_…` variables.

    Raises:
        BuilderError: the settings are missing or invalid.
    """
    try:
        args: dict[str, Any] = Security().get_connection_args("client")
    except (OSError, ValueError, TypeError) as error:
        raise BuilderError(f"Dask's TLS settings cannot be used: {error}.", _TLS) from error
    if address.startswith("tls:") and args.get("ssl_context") is None:
        raise BuilderError(f"{address} wants TLS, and Dask's configuration names no certificates.", _TLS)
    if address.startswith("tcp:") and args.get("require_encryption"):
        raise BuilderError(f"Dask's configuration wants encryption, and {address} has none.", "Say dask+tls://…")
    return args


_TLS = (
    "Set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and"
    " DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY, or distributed.comm.tls in ~/.config/dask/."
)


async def connect(address: str, args: Mapping[str, Any]) -> Comm:
    """Open a connection to a scheduler or worker.

    Raises:
        BuilderLost: nothing answers there now.
        BuilderError: one side rejects the other's certificate, or the address is invalid.
    """
    scheme, _, place = address.partition("://")
    connector = backends[scheme].get_connector()
    try:
        comm: Comm = await asyncio.wait_for(connector.connect(place, deserialize=False, **args), CONNECTING)
    except asyncio.TimeoutError:
        raise BuilderLost(f"{address} does not answer within {CONNECTING:g} seconds.") from None
    except OSError as error:
        if "TLS" in str(error) or "certificate" in f"{error} {error.__cause__}".lower():
            raise BuilderError(
                f"{address} and we do not trust each other: {error.__cause__ or error}.", _TLS
            ) from error
        raise BuilderLost(f"{address} cannot be reached: {_reason(error)}.") from error
    except (ValueError, OverflowError) as error:  # an invalid host name or port
        raise BuilderError(
            f"{address} is no address to connect to: {words_of(error)}.",
            "See which HOST:PORT the builder's URL names, and its workers say (dask worker --host).",
        ) from error
    try:
        await write(comm, {**comm.handshake_info(), "compression": None})
        await asyncio.wait_for(read(comm), CONNECTING)
    except asyncio.TimeoutError:
        comm.abort()
        raise BuilderLost(f"{address} takes a connection, and says nothing.") from None
    except BaseException:
        comm.abort()
        raise
    return comm


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return words_of(getattr(error, "strerror", None) or error).rstrip(".")


async def write(comm: Comm, message: Mapping[str, Any]) -> None:
    """Send a message, and wait until it is flushed, so that at most one message is buffered in memory.

    Raises:
        BuilderLost: the connection broke.
    """
    try:
        await comm.write(message)
        await drained(comm)
    except OSError as error:
        raise BuilderLost(f"The connection to {comm.peer_address} broke ({_reason(error)}).") from error


async def drained(comm: Comm) -> None:
    """Wait until all data written to a connection is flushed; raises OSError."""
    stream = getattr(comm, "stream", None)
    if stream is not None and stream.writing():
        await stream.write(b"")


async def read(comm: Comm) -> Any:
    """Read a message as plain msgpack.

    Raises:
        BuilderLost: the connection broke.
        BuilderError: the data is not a message, or the message is too long.
    """
    stream = getattr(comm, "stream", None)
    try:
        if stream is None:
            raise OSError("closed")
        (length,) = _LENGTH.unpack(await stream.read_bytes(_LENGTH.size))
        if not _LENGTH.size <= length <= LIMIT:
            raise ValueError(f"{length} bytes")
        data = await stream.read_bytes(length)
        (count,) = _LENGTH.unpack_from(data)
        if not 1 <= count <= FRAMES or length < _LENGTH.size * (1 + count):
            raise ValueError(f"{count} frames")
        lengths = struct.unpack_from(f"{count}Q", data, _LENGTH.size)
        start = _LENGTH.size * (1 + count)
        rest = start + sum(lengths) - length  # frames that Dask reads into separate buffers
        if not 0 <= rest <= LIMIT or start + lengths[0] > length:
            raise ValueError(f"frames of {sum(lengths)} bytes")
        if rest:
            await stream.read_bytes(rest)
        return msgpack.unpackb(data[start : start + lengths[0]], raw=False, strict_map_key=False)
    except OSError as error:
        raise BuilderLost(f"The connection to {comm.peer_address} broke ({_reason(error)}).") from error
    except (ValueError, TypeError, struct.error) as error:
        comm.abort()
        raise BuilderError(
            f"{comm.peer_address} answers something that makes no sense ({words_of(error)}).",
            "See that a Dask scheduler and workers of about this version run there.",
        ) from error


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
            self._wait(write(self._comm, {"data": piece}), SEND_SILENCE)

    def receive(self, size: int, timeout: float) -> bytes:
        """Return 1 to `size` bytes, or `b""` at the end."""
        while not self._buffer and not self._ended:
            message = self._wait(read(self._comm), timeout)
            message = message if isinstance(message, dict) else {}
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
                    "What it built is given to another; run doit again to find it.",
                )
            if "error" in message or "exception_text" in message:
                said = message.get("error") or message.get("exception_text")
                raise BuilderError(
                    f"{self._comm.peer_address} starts no runner: {words_of(said)}.",
                    "See the worker's own log, and start it again.",
                )
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def _wait(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        try:
            return self._loop.wait_for(work, seconds)
        except TimeoutError:
            self._broken()
            raise BuilderLost(f"{self._comm.peer_address} has been silent for {seconds:g} seconds.") from None
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
        args: arguments for opening a Dask connection.
        relay: the scheduler's address if the worker cannot be reached directly; otherwise empty.
    """

    is_alive = True

    def __init__(self, loop: Loop, address: str, args: Mapping[str, Any], relay: str = "") -> None:
        self._loop = loop
        self._address = address
        self._args = args
        self._relay = relay

    def start(self, command: str) -> Channel:
        """Start a program."""
        try:
            return DaskChannel(self._loop, self._loop.wait_for(self._start(command), 2 * CONNECTING), self._broken)
        except TimeoutError:
            self._broken()
            raise BuilderLost(f"{self._address} starts nothing within {2 * CONNECTING:g} seconds.") from None
        except BuilderLost:
            self._broken()
            raise

    async def _start(self, command: str) -> Comm:
        comm = await connect(self._relay or self._address, self._args)
        if self._relay:
            await write(comm, {"op": "gamebear_relay", "worker": self._address, "command": command, "reply": True})
        else:
            await write(comm, {"op": "gamebear_channel", "command": command, "reply": True})
        return comm

    def _broken(self) -> None:
        self.is_alive = False

    def close(self) -> None:
        """Do nothing: only the channels hold resources."""


async def closed(comm: Comm) -> None:
    """Close a connection, broken or not."""
    with contextlib.suppress(OSError):
        await comm.close()
