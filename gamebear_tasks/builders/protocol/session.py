"""Session with a runner: one channel, one request at a time, untrusted replies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...errors import NONSENSE, BuilderError, BuilderLost, LogInError, PythonError, StoreError
from ...records.task_record import received, sent
from ...runner.protocol import requests, wire
from ...util.text import printable, size
from .bootstrap import bundle
from .transport import Channel, Connection

CHUNK = 256 << 10
"""Bytes to send or receive at once."""

SILENCE = 60.0
"""Seconds without a byte after which the connection of an unanswered request counts as dead."""

QUIET = 1e6
"""Seconds for which a program with a terminal may print nothing: more than a week."""

Take = Callable[[bytes], object]
"""Callback for each piece of a reply's body."""


class Session:
    """One runner, which answers one request at a time.

    The first request follows the command at once, without waiting for the runner to be ready; this saves a round trip.

    Args:
        connection: the connection of the channel.
        channel: channel to the runner, which was just started.
        place: the builder's name in error messages.
    """

    def __init__(self, connection: Connection, channel: Channel, place: str) -> None:
        self.connection = connection
        self.channel_says = ""
        self._channel = channel
        self._place = place
        self._buffer = bytearray()
        self._has_begun = False

    def _begin(self, request: bytes) -> None:
        """Read the runner's preamble; if the runner is missing, upload it and send the request again.

        Raises:
            BuilderError: the builder does not meet the runner's requirements.
            BuilderLost: the connection broke.
        """
        self._has_begun = True
        word = self._preamble()
        if word == "send":
            self._send(bundle().packed + request)
            word = self._preamble()
        if word == "ready":
            return
        if word.startswith("python"):
            raise PythonError(
                f"{self._place} has Python {words_of(word[7:])}, and the runner needs 3.9 or newer.",
                "Upgrade the builder's system (Debian 11 or later has it).",
            )
        if word.startswith("lacks"):
            raise PythonError(
                f"The python3 of {self._place} lacks a part of the standard library ({words_of(word[6:])}).",
                "On the builder: sudo apt install python3 (python3-minimal is not enough).",
            )
        if word == "failed":
            reply, _ = self._message() or ({}, 0)
            raise StoreError(f"On {self._place}: {words_of(reply.get('error'))}", words_of(reply.get("hint", "")))
        raise StoreError(
            f"The runner cannot be put on {self._place}: {words_of(word[7:])}.",
            "See that its disk has room and that ~/.cache there can be written to.",
        )

    def _preamble(self) -> str:
        """Read up to the runner's preamble line and return its text; skip any output of the login shell before it."""
        seen = bytearray()
        while True:
            start = seen.find(wire.PREAMBLE)
            end = seen.find(b"\n", start)
            if start >= 0 and end >= 0:
                self._buffer[:] = seen[end + 1 :]
                return seen[start + len(wire.PREAMBLE) : end].decode("utf-8", "replace").strip()
            data = self._receive(4096)
            if not data:
                raise self._no_runner(bytes(seen))
            seen += data
            if len(seen) > 1 << 20:
                raise BuilderError(
                    f"{self._place} prints without end when we log in.", "See what its shell's start-up files do."
                )

    def _no_runner(self, seen: bytes) -> BuilderError:
        status = self._channel.exit_status(5.0)
        said = last_lines_of(self._channel.errors() or seen)
        if status is None:
            return BuilderLost(f"The connection to {self._place} closed at once. {said}".rstrip())
        if "python3" in (said or "python3") and (status == 127 or "not found" in said):
            return PythonError(f"{self._place} has no python3 ({said}).", "On the builder: sudo apt install python3")
        what = f"No runner can be started on {self._place} (status {status}): {said.rstrip('.')}."
        if "currently not available" in said:  # nologin(8)
            return LogInError(what, "The account has no shell. On the builder: sudo chsh --shell /bin/sh ACCOUNT")
        return BuilderError(what, "See that a shell there can run python3.")

    def ask(
        self,
        request: requests.Request,
        body: Body | None,
        sink: Take | None,
        limit: int,
        begun: Callable[[wire.Header, int], object] | None = None,
    ) -> wire.Header:
        """Send a request and read its reply; pass the reply's body, at most `limit` bytes, to `sink`.

        `begun` is called with the reply and the length of its body before the body is read.
        """
        length = body.length if body is not None else 0
        try:
            start = wire.encode(request.header, length)
        except wire.WireError as error:
            raise BuilderError(
                f"The request to {self._place} is too long ({error}).",
                "A job's args and the list of its files are part of it: put what is large into an input file.",
            ) from error
        if body is not None and length <= CHUNK:
            start += b"".join(body)
            body = None
        if body is not None and not self._has_begun:
            self.ask(requests.Hello(), None, None, 0)  # the bootstrap may need the first request twice: keep it short
        try:
            self._send(start)
            for piece in body or ():
                self._send(piece)
        except BuilderLost as lost:  # the runner may have rejected the body early and ended
            if not self._has_begun:
                self._begin(start)
            raise self._refusal() or lost from lost
        if not self._has_begun:
            self._begin(start)
        message = self._message()
        if message is None:
            self.channel_says = last_lines_of(self._channel.errors())
            raise BuilderLost(f"The connection to {self._place} broke.")
        reply, size_there = message
        if size_there > limit:
            raise BuilderError(
                f"{self._place} sends {size(size_there)} where {size(limit)} at most were to come; nothing was kept.",
                NONSENSE,
            )
        if begun is not None:
            begun(reply, size_there)
        while size_there:
            data = self._some(min(size_there, CHUNK))
            if sink is not None:
                sink(data)
            size_there -= len(data)
        return reply

    def _refusal(self) -> BuilderError | None:
        """Return the runner's last error if that is why it ended."""
        try:
            message = self._message()
        except BuilderError:
            return None
        return None if message is None else refusal(message[0], self._place)

    def _message(self) -> tuple[wire.Header, int] | None:
        try:
            return wire.decode(self._read)
        except wire.CutOff as error:
            raise BuilderLost(f"The connection to {self._place} broke ({error}).") from error
        except wire.WireError as error:
            raise BuilderError(f"{self._place} answers something that makes no sense ({error}).", NONSENSE) from error

    def _read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = self._receive(CHUNK)
            if not data:
                break
            self._buffer += data
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _some(self, count: int) -> bytes:
        if self._buffer:
            return self._read(min(count, len(self._buffer)))
        data = self._receive(count)
        if not data:
            raise BuilderLost(f"The connection to {self._place} broke.")
        return data

    def _send(self, data: bytes) -> None:
        self._channel.send(data)
        sent(len(data))

    def _receive(self, count: int) -> bytes:
        data = self._channel.receive(count, SILENCE)
        received(len(data))
        return data

    def push(self, data: bytes) -> None:
        """Send bytes outside the request protocol; raises BuilderLost."""
        self._send(data)

    def pull(self) -> bytes:
        """Return bytes outside the request protocol, however late they arrive; b"" at the end. Raises BuilderLost."""
        if self._buffer:
            return self._read(len(self._buffer))
        data = self._channel.receive(CHUNK, QUIET)
        received(len(data))
        return data

    def close(self) -> None:
        """Close the channel; the connection stays open."""
        self._channel.close()


class Body:
    """Body of a request: its length in bytes, and its pieces."""

    length: int

    def __iter__(self) -> Iterator[bytes]:
        raise NotImplementedError


class Bytes(Body):
    """Body that is in memory."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.length = sum(map(len, pieces))
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        gathered: list[bytes] = []
        length = 0
        for piece in self._pieces:  # each yielded piece costs a packet on both sides
            gathered.append(piece)
            length += len(piece)
            if length >= CHUNK:
                yield b"".join(gathered)
                gathered, length = [], 0
        if gathered:
            yield b"".join(gathered)


class FileFrom(Body):
    """Content of a file from an offset on.

    It is truncated or zero-padded to the specified length if the file changed; the digest check detects that.
    """

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self.length = length - offset
        self._path = path
        self._offset = offset

    def __iter__(self) -> Iterator[bytes]:
        left = self.length
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._offset)
            while left:
                data = file.read(min(CHUNK, left)) or b"\0" * min(CHUNK, left)
                left -= len(data)
                yield data


def refusal(reply: wire.Header, place: str) -> BuilderError | None:
    """Return the error that a reply reports; None if the request succeeded."""
    if "error" not in reply:
        return None
    return BuilderError(f"On {place}: {words_of(reply['error'])}", words_of(reply.get("hint", "")))


def words_of(value: object) -> str:
    """Sanitize untrusted text of a builder: bound its length, and remove terminal control characters."""
    return printable(str(value)[:4000])


def last_lines_of(data: bytes) -> str:
    """Return the last three non-empty lines as one line."""
    lines = words_of(data[-4000:].decode("utf-8", "replace")).splitlines()
    lines = [line.strip()[:300] for line in lines if line.strip(" ^~\t")]  # without the underlines of Python tracebacks
    return " / ".join(lines[-3:])
