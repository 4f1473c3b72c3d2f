"""Interactive programs: start one on the builder, in a pseudo-terminal or with pipes, and relay its input and output.

The pseudo-terminal belongs to the runner, not to sshd. It therefore works the same over every kind of connection, needs
no second command on the builder, and does not depend on sshd's `PermitTTY`. Once the program has started, the session
carries frames instead of requests: a letter, the length as a 4-byte big-endian integer, and that many bytes.

    i   to the program: its input              o   from it: its output
    e   to the program: end of input           x   from it: its stderr, if it has no terminal
    w   the window's rows and columns,         s   its exit status, or 128 plus the number of a signal;
        two bytes each                             two bytes, the last frame of the session
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..util.errors import RunnerError
from ..util.processes import descendants

if TYPE_CHECKING:
    from .requests import Terminal

INPUT, END, WINDOW = b"i", b"e", b"w"
OUTPUT, ERRORS, STATUS = b"o", b"x", b"s"

SIZES = struct.Struct(">HH")
"""Rows and columns of a window."""

STATUSES = struct.Struct(">H")
"""An exit status."""

LONGEST = 1 << 20
"""Maximum length of a frame, in bytes."""

HELD = 256 << 10
"""Bytes buffered in each direction for a side that does not read; above that the other side has to wait."""

GRACE = 1.0
"""Seconds between SIGHUP and SIGKILL to a program whose client has gone; shorter than the time that `local:` grants a
runner."""

_HEAD = struct.Struct(">cI")
_PIECE = 64 << 10


class FrameError(Exception):
    """The received data is not a valid frame."""


def frame(kind: bytes, data: bytes = b"") -> bytes:
    """Encode a frame."""
    return _HEAD.pack(kind, len(data)) + data


class Frames:
    """Decoder of a stream of frames."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Add received data; yield letter and content of each frame that is now complete.

        Raises:
            FrameError: a frame claims to be longer than `LONGEST`.
        """
        self._rest += data
        while len(self._rest) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._rest)
            if length > LONGEST:
                raise FrameError(f"a frame declares {length} bytes")
            if len(self._rest) < _HEAD.size + length:
                return
            piece = bytes(self._rest[_HEAD.size : _HEAD.size + length])
            del self._rest[: _HEAD.size + length]
            yield kind, piece


class Attended:
    """An interactive program, attached to a pseudo-terminal or to pipes.

    Args:
        words: the command line.
        environment: its complete environment.
        folder: its working directory.
        terminal: `term`, `rows` and `columns` of the client's terminal; None to use pipes.
        within: whether the program creates another terminal for its child and does not propagate size changes to it.
        umask: its umask, see umask(2); -1 for this process's.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        terminal: Terminal | None = None,
        within: bool = False,
        umask: int = -1,
    ) -> None:
        self._within = within
        self._to_program = bytearray()
        self._to_client = bytearray()
        self._ended = False
        """Whether the program receives no further input."""
        if terminal is None:
            self._process = subprocess.Popen(
                words,
                env=dict(environment),
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                umask=umask,
            )
            assert self._process.stdin and self._process.stdout and self._process.stderr
            self._input = os.dup(self._process.stdin.fileno())
            self._process.stdin.close()
            self._outputs = {self._process.stdout.fileno(): OUTPUT, self._process.stderr.fileno(): ERRORS}
            self._master = -1
        else:
            self._master, slave = os.openpty()
            try:
                self._outer = _identity(slave)
                _resize(slave, terminal["rows"], terminal["columns"])
                self._process = subprocess.Popen(
                    words,
                    env={**environment, "TERM": term_of(terminal)},
                    cwd=folder,
                    stdin=slave,
                    stdout=slave,
                    stderr=slave,
                    start_new_session=True,
                    umask=umask,
                    preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
                )
            except BaseException:
                os.close(self._master)
                raise
            finally:
                os.close(slave)
            self._input = self._master
            self._outputs = {self._master: OUTPUT}
        for fd in {self._input, *self._outputs}:
            os.set_blocking(fd, False)

    def attend(self, source: int, target: int) -> None:
        """Relay input and output until the program has ended; end it if the client disconnects.

        Args:
            source: file descriptor to read frames from.
            target: file descriptor to write frames to.
        """
        os.set_blocking(target, False)
        frames = Frames()
        ended = os.pidfd_open(self._process.pid)
        try:
            while self._process.poll() is None:
                ready = self._wait(source, target, ended)
                for fd in [fd for fd in self._outputs if ready.get(fd)]:
                    self._read(fd)
                if ready.get(target):
                    self._write(target)
                if ready.get(source):
                    data = os.read(source, _PIECE) if ready[source] & select.POLLIN else b""
                    if not data:
                        raise ConnectionError
                    for kind, piece in frames.feed(data):
                        self._take(kind, piece)
                self._feed()
            for fd in list(self._outputs):
                left = LONGEST  # bounded, because background processes may keep printing
                while left > 0 and (count := self._read(fd)):
                    left -= count
            status = self._process.returncode
            self._to_client += frame(STATUS, STATUSES.pack(status if status >= 0 else 128 - status))
            os.set_blocking(target, True)
            while self._to_client:
                self._write(target)
        except (OSError, FrameError):
            self._hang_up()
        finally:
            os.close(ended)
            for fd in {self._input, *self._outputs} - {-1}:
                with contextlib.suppress(OSError):
                    os.close(fd)

    def _wait(self, source: int, target: int, ended: int) -> dict[int, int]:
        """Wait until a file descriptor is ready; return the events by file descriptor, as poll(2) does."""
        wanted = {source: select.POLLIN if len(self._to_program) < HELD else 0, ended: select.POLLIN}
        if self._to_client:
            wanted[target] = select.POLLOUT
        for fd in self._outputs:
            wanted[fd] = select.POLLIN if len(self._to_client) < HELD else 0
        if self._to_program and self._input >= 0:
            wanted[self._input] = wanted.get(self._input, 0) | select.POLLOUT
        poll = select.poll()
        for fd, events in wanted.items():
            if events or fd == source:
                poll.register(fd, events)
        return dict(poll.poll())

    def _read(self, fd: int) -> int:
        """Read some of the program's output; return the number of bytes."""
        try:
            data = os.read(fd, _PIECE)
        except BlockingIOError:
            return 0
        except OSError:  # a terminal reports its end as EIO
            data = b""
        if data:
            self._to_client += frame(self._outputs[fd], data)
        elif fd == self._master:
            if self._process.poll() is None:  # no process has it open at this moment
                select.select([], [], [], 0.02)
        else:
            del self._outputs[fd]
        return len(data)

    def _write(self, target: int) -> None:
        with contextlib.suppress(BlockingIOError):
            del self._to_client[: os.write(target, self._to_client[:_PIECE])]

    def _take(self, kind: bytes, piece: bytes) -> None:
        if kind == INPUT:
            self._to_program += piece
        elif kind == END:
            self._ended = True
        elif kind == WINDOW and self._master >= 0 and len(piece) == SIZES.size:
            _resize(self._master, *SIZES.unpack(piece))
            if self._within:
                _resize_within(self._process.pid, self._outer, *SIZES.unpack(piece))

    def _feed(self) -> None:
        """Write pending input to the program, as far as it accepts it."""
        if self._input < 0:
            return
        try:
            if self._to_program:
                del self._to_program[: os.write(self._input, self._to_program[:_PIECE])]
        except BlockingIOError:
            return
        except OSError:  # it has closed its input
            self._ended = True
            self._to_program.clear()
        if self._ended and not self._to_program and self._master < 0:
            os.close(self._input)
            self._input = -1

    def _hang_up(self) -> None:
        """End the program as a disconnected terminal does: SIGHUP, then SIGKILL after `GRACE` seconds."""
        if self._master >= 0:
            os.close(self._master)
            self._input, self._outputs = -1, {}
        for number in (signal.SIGHUP, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
                return


def started(
    words: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    terminal: Terminal | None,
    within: bool = False,
    umask: int = -1,
) -> Attended:
    """Start an interactive program and return it; the parameters are those of `Attended`.

    Raises:
        RunnerError: it cannot be started.
    """
    if not words:
        raise RunnerError("The command is empty.", "Specify a program and its arguments.")
    try:
        return Attended(words, environment, folder, terminal, within, umask)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RunnerError(
            f"{words[0]} cannot be started: {why}.", "Check that it is installed there, and in the PATH."
        ) from error


def term_of(terminal: Terminal) -> str:
    """Return a valid value of `TERM` for a client's terminal; `dumb` if the client sends an invalid one."""
    term = terminal["term"]
    return term if re.fullmatch(r"[\w.+-]{1,64}", term, re.ASCII) else "dumb"


def _resize(fd: int, rows: int, columns: int) -> None:
    with contextlib.suppress(OSError, struct.error):
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _resize_within(ancestor: int, outer: tuple[int, int], rows: int, columns: int) -> None:
    """Resize the terminal that a descendant of the program has created for its child.

    `buildah run --terminal` creates a terminal for the container's program. With chroot isolation it copies the size of
    the outer terminal only at the start. It is found through the first process that has it as its standard input,
    because a container may number its terminals independently.
    """
    for pid in (ancestor, *descendants(ancestor)):
        with contextlib.suppress(OSError):
            fd = os.open(f"/proc/{pid}/fd/0", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if os.isatty(fd) and _identity(fd) != outer:
                    _resize(fd, rows, columns)
                    return
            finally:
                os.close(fd)


def _identity(fd: int) -> tuple[int, int]:
    """Return a key that identifies a terminal, even among terminals of the same number in a container."""
    about = os.fstat(fd)
    return about.st_dev, about.st_rdev
