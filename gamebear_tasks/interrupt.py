"""Ctrl-C means stop: the jobs that we wait for are ended on their builders, or left to go on where that is set."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import GamebearError
from .report import notice

if TYPE_CHECKING:  # an up-to-date run does without builders
    from .builders import Builder

UNSURE = 5.0
"""Seconds for which an interruption waits for a builder that has not said whether it has begun a job."""


class Interest:
    """While the block runs we wait for a job; an interruption in it ends the job (or leaves it, as is set).

    Args:
        builder: where it is built.
        digest: the job.
        name: what to call it.
        interrupt: the setting: `cancel` or `detach`.

    Attributes:
        attempt: which attempt; empty as long as the builder has not said, when it may have begun one all the same.
    """

    def __init__(self, builder: Builder, digest: str, name: str, interrupt: str) -> None:
        self.attempt = ""
        self._builder = builder
        self._digest = digest
        self._name = name
        self._interrupt = interrupt

    def __enter__(self) -> Interest:
        if self._interrupt == "cancel":
            with _waiting_lock:
                _waiting[id(self)] = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with _waiting_lock:
            mine = _waiting.pop(id(self), None)
        if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):
            if self._interrupt == "detach":
                notice(f"{self._name} goes on on {self._builder.url}; run doit again and it is found")
            elif mine is not None:
                self.stop()

    def stop(self) -> None:
        """End the job on the builder; where it is not known to have begun, do not wait long for that."""
        if not self.attempt:
            thread = threading.Thread(target=self._stop, daemon=True)
            thread.start()
            thread.join(UNSURE)
            if thread.is_alive():
                notice(f"{self._builder.url} does not answer; if {self._name} runs there, doit finds it again")
            return
        self._stop()

    def _stop(self) -> None:
        notice(f"ending {self._name} on {self._builder.url} (Ctrl-C again to leave at once)")
        try:
            ended = self._builder.cancel(self._digest, self.attempt)
        except KeyboardInterrupt:
            self.leave()
            raise
        except (GamebearError, RuntimeError) as error:
            notice(f"{self._name} may still run on {self._builder.url}: {error}")
        else:
            if not ended:
                notice(f"{self._name} goes on on {self._builder.url}: somebody else waits for it too")

    def leave(self) -> None:
        """Say that the job is left as it is."""
        notice(f"{self._name} may still run on {self._builder.url}; run doit again and it is found")


_waiting: dict[int, Interest] = {}
_waiting_lock = threading.Lock()

told = threading.Event()
"""Set when it has been said that the run was interrupted."""

ending = threading.Event()
"""Set when the process ends, and with it what its threads wait for."""


def check_not_interrupted(status: int) -> None:
    """Raise KeyboardInterrupt where Ctrl-C has ended a program of ours, which may hear of it before doit does.

    Args:
        status: how the program ended, as `subprocess` has it.
    """
    if status == -signal.SIGINT:
        raise KeyboardInterrupt


def end_what_is_left() -> None:
    """Before the process ends, end what its threads still wait for: doit's threads die with it.

    At exit `building` calls it, before it closes the builders.
    """
    ending.set()
    with _waiting_lock:
        left = list(_waiting.values())
        _waiting.clear()
    while left:
        interest = left.pop()
        try:
            interest.stop()
        except KeyboardInterrupt:
            for other in left:
                other.leave()
            return


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """In a process of `doit -n`, take SIGTERM as Ctrl-C: doit sends it to them when it is interrupted itself."""
    if multiprocessing.parent_process() is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    seen: list[int] = []

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 1 or number == signal.SIGINT:
            raise KeyboardInterrupt  # a SIGTERM after the first signal is doit's, and not a second wish

    before = signal.signal(signal.SIGTERM, interrupt), signal.signal(signal.SIGINT, interrupt)
    try:
        with _heard_by_this_thread():
            yield
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


@contextlib.contextmanager
def _heard_by_this_thread() -> Iterator[None]:
    """Let the first signal end what this thread waits for.

    Of two that come at one moment, as Ctrl-C and doit's SIGTERM do, another thread may take both (signal(7): any one
    of a process may); this one would then go on waiting, and hear of them when that is over.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    me = threading.get_ident()

    def pass_on() -> None:
        if os.read(reader, 1):
            signal.pthread_kill(me, signal.SIGTERM)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)


def say_so_without_a_traceback() -> None:
    """Let an interruption that ends the process end the jobs too, and be one line.

    doit passes it on to Python, which would show both their innards.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            end_what_is_left()  # at exit it may be too late: Python 3.12 starts no thread then
            if not told.is_set():
                notice("interrupted")
        else:
            before(kind, error, trace)

    if getattr(before, "__module__", "") != __name__:
        sys.excepthook = hook
