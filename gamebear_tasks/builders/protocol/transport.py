"""A channel: a two-way stream of bytes to one program that a builder has started for us."""

from __future__ import annotations

from typing import Protocol

SEND_SILENCE = 300.0
"""Seconds without an accepted byte after which whoever should take what is sent counts as lost.

Longer than for an answer: a slow disk may hold up a runner that has megabytes to write.
"""


class Channel(Protocol):
    """The standard input and output of a program on the builder.

    Every method raises `BuilderLost` when the connection is gone or silent for longer than the time-out.
    """

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`; lost after `SEND_SILENCE` seconds in which none of it is taken."""
        ...

    def receive(self, size: int, timeout: float) -> bytes:
        """Return 1 to `size` bytes, or `b""` when the program has closed its output.

        Args:
            size: the most bytes to return.
            timeout: seconds without a byte after which the connection counts as lost.
        """
        ...

    def errors(self) -> bytes:
        """Return what the program has written to its standard error so far (the last 64 KiB at most)."""
        ...

    def exit_status(self, timeout: float) -> int | None:
        """Return the program's exit status once it has ended, None when it is not known within `timeout` seconds."""
        ...

    def close(self) -> None:
        """Close the stream; the program sees the end of its input. Never raises."""
        ...


class Connection(Protocol):
    """A way to start programs on a builder, kept open for a whole run.

    One that has something to say of itself may have `described`, words by name, which `doit doctor` shows.
    """

    @property
    def is_alive(self) -> bool:
        """Whether further programs can, as far as is known, be started; a channel may break and its connection live."""
        ...

    def start(self, command: str) -> Channel:
        """Start a program.

        Args:
            command: a command line for a POSIX shell or another login shell: words of plain ASCII in single quotes.

        Raises:
            BuilderError: the builder refuses, for good.
            BuilderBusy: no further channel now, but those that are open work (sshd's `MaxSessions`).
            BuilderLost: the connection is gone.
        """
        ...

    def close(self) -> None:
        """Close the connection and all of its channels. Never raises."""
        ...
