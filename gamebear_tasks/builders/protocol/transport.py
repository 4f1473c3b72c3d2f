"""Interface of a transport: a connection that starts programs on a builder, and a channel to each of them."""

from __future__ import annotations

from typing import Protocol

SEND_SILENCE = 300.0
"""Seconds without an accepted byte after which the receiver counts as lost.

Longer than the timeout for an answer, because a slow disk may delay a runner that has megabytes to write.
"""


class Channel(Protocol):
    """Standard input and output of a program on the builder.

    Every method raises `BuilderLost` if the connection is gone or is silent for longer than the timeout.
    """

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`; raises BuilderLost after `SEND_SILENCE` seconds in which no byte is accepted."""
        ...

    def receive(self, size: int, timeout: float) -> bytes:
        """Return 1 to `size` bytes, or `b""` once the program has closed its output.

        Args:
            size: maximum number of bytes to return.
            timeout: seconds without a byte after which the connection counts as lost.
        """
        ...

    def errors(self) -> bytes:
        """Return the standard error of the program so far (at most the last 64 KiB)."""
        ...

    def exit_status(self, timeout: float) -> int | None:
        """Return the exit status once the program has ended; None if it is not known within `timeout` seconds."""
        ...

    def close(self) -> None:
        """Close the channel, so that the program reads end-of-file. Never raises."""
        ...


class Connection(Protocol):
    """A connection that starts programs on a builder and stays open for a whole run.

    A connection may have an attribute `described`, a mapping of names to texts, which `gamebear doctor` shows.
    """

    @property
    def is_alive(self) -> bool:
        """Whether further programs can be started, as far as is known.

        A channel may break while its connection lives.
        """
        ...

    def start(self, command: str) -> Channel:
        """Start a program.

        Args:
            command: command line for a POSIX shell or another login shell: plain ASCII words in single quotes.

        Raises:
            BuilderError: the builder refuses permanently.
            BuilderBusy: no further channel is available now, but the open ones work (sshd's `MaxSessions`).
            BuilderLost: the connection is gone.
        """
        ...

    def close(self) -> None:
        """Close the connection and all of its channels. Never raises."""
        ...
