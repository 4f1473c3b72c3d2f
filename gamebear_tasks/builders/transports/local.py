"""Builder `local:`: this machine, with the same runner and store as over SSH, through pipes."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import threading

from ...errors import BuilderError, BuilderLost, SettingsError
from ...util.urls import shown
from ..protocol.client import RunnerBuilder
from ..protocol.transport import SEND_SILENCE, Channel

CLOSING = 2.0
"""Seconds for which a runner may continue after its input was closed."""

_ERRORS_KEPT = 64 << 10


class ProcessChannel:
    """Channel to a program on this machine."""

    def __init__(self, argv: list[str]) -> None:
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # the client handles Ctrl-C
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin = self._process.stdin.fileno()
        self._stdout = self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        self._errors = bytearray()
        self._drain = threading.Thread(target=self._read_errors, daemon=True)
        self._drain.start()

    def _read_errors(self) -> None:
        assert self._process.stderr
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(self._process.stderr.fileno(), 4096):
                self._errors += data
                del self._errors[:-_ERRORS_KEPT]

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`."""
        view = memoryview(data)
        try:
            while view:
                if not select.select([], [self._stdin], [], SEND_SILENCE)[1]:
                    raise BuilderLost(
                        f"The runner on this machine accepts no data: timeout after {SEND_SILENCE:g} seconds."
                    )
                with contextlib.suppress(BlockingIOError):
                    view = view[os.write(self._stdin, view) :]
        except OSError as error:
            raise BuilderLost(f"The runner on this machine has ended: {error.strerror}.") from error

    def receive(self, size: int, timeout: float) -> bytes:
        """Return 1 to `size` bytes, or `b""` at the end."""
        if not select.select([self._stdout], [], [], timeout)[0]:
            raise BuilderLost(f"The runner on this machine sends no data: timeout after {timeout:g} seconds.")
        try:
            return os.read(self._stdout, size)
        except OSError as error:
            raise BuilderLost(f"The runner on this machine has ended: {error.strerror}.") from error

    def errors(self) -> bytes:
        """Return the end of the program's standard error."""
        self._drain.join(0.2)
        return bytes(self._errors)

    def exit_status(self, timeout: float) -> int | None:
        """Return the program's exit status; None while it runs."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Close the channel."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._process.wait(CLOSING)
        except subprocess.TimeoutExpired:  # safe at any moment: supervisors are outside its process group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._drain.join(1.0)
        assert self._process.stderr
        if not self._drain.is_alive():
            self._process.stderr.close()


class ProcessConnection:
    """Starts programs with a command line on this machine.

    Args:
        prefix: words before `sh -c COMMAND`, such as `["sudo", "-u", "builder"]`.
    """

    is_alive = True

    def __init__(self, prefix: tuple[str, ...] = ()) -> None:
        self._prefix = prefix

    def start(self, command: str) -> Channel:
        """Start a program."""
        try:
            return ProcessChannel([*self._prefix, "sh", "-c", command])
        except OSError as error:
            command = " ".join([*self._prefix, "sh"])
            hint = "Install it, or add its folder to PATH."
            if error.errno == errno.EAGAIN:
                hint = "End some of your programs, or raise the limit: ulimit -u."
            raise BuilderError(f"{command} cannot be started: {error.strerror}.", hint) from error

    def close(self) -> None:
        """Do nothing: only the channels hold resources."""


def open_builder(url: str) -> RunnerBuilder:
    """Open `local:`.

    Raises:
        SettingsError: the URL has text after the colon.
    """
    if url != "local:":
        raise SettingsError(
            f"The builder {shown(url)!r} is invalid: `local:` takes no address.", "Use builder=local: for this machine."
        )
    return RunnerBuilder(url, "this machine", ProcessConnection)
