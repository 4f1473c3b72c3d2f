"""Session with a runner: one channel, one request at a time, untrusted replies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...errors import INVALID_REPLY, BuilderError, BuilderLost, PythonError, StoreError
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
                f"{self._place} has Python {words_of(word[7:])}, but the runner requires 3.9.",
                "Upgrade the builder to Debian 11 or later.",
            )
        if word.startswith("lacks"):
            raise PythonError(
                f"{self._place} has an incomplete Python: {words_of(word[6:])} is missing.",
                "On the builder: sudo apt install python3 (python3-minimal is not enough).",
            )
        if word == "failed":
            reply, _ = self._message() or ({}, 0)
            raise StoreError(f"{self._place}: {words_of(reply.get('error'))}", words_of(reply.get("hint", "")))
        raise StoreError(
            f"{self._place} cannot store the runner: {words_of(word[7:])}.",
            "Free disk space there, and make ~/.cache writable.",
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
                    f"{self._place} prints more than 1 MiB at log-in.", "Correct the start-up files of its login shell."
                )

    def _no_runner(self, seen: bytes) -> BuilderError:
        status = self._channel.exit_status(5.0)
        errors = last_lines_of(self._channel.errors() or seen)
        if status is None:
            return BuilderLost(f"{self._place} closed the connection before the runner started. {errors}".rstrip())
        # Login shells differ in status and words, so one fix fits all.
        return PythonError(
            f"{self._place} cannot start python3 (exit status {status}): {errors.rstrip('.')}.",
            "On the builder: sudo apt install python3. If the account has no login shell: "
            "sudo chsh --shell /bin/sh ACCOUNT",
        )

    def request(
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
                "A job's args and the list of its files are part of it: pass large data in an input file.",
            ) from error
        if body is not None and length <= CHUNK:
            start += b"".join(body)
            body = None
        if body is not None and not self._has_begun:
            self.request(
                requests.Hello(), None, None, 0
            )  # the bootstrap may need the first request twice: keep it short
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
                f"{self._place} sends {size(size_there)}, but at most {size(limit)} are accepted.",
                INVALID_REPLY,
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
            raise BuilderError(f"{self._place} sends an invalid reply: {error}.", INVALID_REPLY) from error

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
