"""Cancellation: signal handling for Ctrl-C, SIGTERM and SIGHUP.

A signal ends the run. The jobs that it waits for are cancelled on their builders, or detached if `interrupt=detach` is
set: then they keep running, and the next doit reattaches.

A worker process of `doit -n` ends with doit, however doit ended. If doit was killed (SIGKILL), its jobs keep running,
like those of any client that disappears, and the next doit reattaches.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import GamebearError
from ..util.messages import notice

if TYPE_CHECKING:  # an up-to-date run does not load builders
    from ..builders.base import Builder

UNSURE = 5.0
"""Timeout in seconds for cancelling a job whose submission the builder has not acknowledged."""

BOUNCE = 0.1
"""Seconds within which repeated signals count as one (debounce): key repeat, or one signal sent to all processes."""

HARD = 3
"""Number of further signals during exit after which the process exits immediately."""

POLL_INTERVAL = 1.0
"""Seconds between two checks whether the parent process is alive, and between two SIGTERMs to worker processes."""

GRACE = 5.0
"""Seconds after which a worker process of `doit -n` that should end is ended forcibly."""

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals by which a person, a service manager or a terminal ends a run."""


class Terminated(KeyboardInterrupt, SystemExit):
    """A signal ends the run. The process exits with 128 plus the signal's number.

    It is also a SystemExit, so that Python exits without a traceback where nothing catches it. Python 3.13 and later
    check for KeyboardInterrupt first: there, `gamebear` shows no traceback and plain doit shows one.

    Args:
        number: the signal's number. doit passes it as text.
    """

    def __init__(self, number: int | str) -> None:
        super().__init__(number)
        self.number = int(number)

    @property
    def code(self) -> int:  # type: ignore[override]
        """The exit status. Python reads it if nothing caught the exception: the process is about to exit."""
        if _signals.first and multiprocessing.parent_process() is None:
            end_interrupted(self.number)
        return 128 + self.number

    def __str__(self) -> str:
        return str(self.number)  # doit's main process recreates the exception from this text


class Interest:
    """Context manager around waiting for a job: an interruption of the block cancels or detaches the job.

    Args:
        builder: the builder that runs the job.
        digest: the job's digest.
        name: the job's name in messages.
        interrupt: the setting `interrupt`: `cancel` or `detach`.

    Attributes:
        attempt: the job's attempt; empty until the builder has acknowledged the submission. The builder may have
            started an attempt before that.
    """

    def __init__(self, builder: Builder, digest: str, name: str, interrupt: str) -> None:
        self.attempt = ""
        self._builder = builder
        self._digest = digest
        self._name = name
        self._interrupt = interrupt
        self._settled = False

    def __enter__(self) -> Interest:
        if self._interrupt == "cancel":
            with _waiting_lock:
                _waiting[id(self)] = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or not issubclass(kind, KeyboardInterrupt | SystemExit):
                self._settled = True
            elif self._interrupt == "detach" or _signals.orphaned:
                self._settled = True
                notice(f"{self._name} continues on {self._builder.url}; run doit again to reattach")
            elif id(self) in _waiting:
                self.stop()
        finally:
            if self._settled:  # otherwise a second signal interrupted the cancellation: it is completed at exit
                with _waiting_lock:
                    _waiting.pop(id(self), None)

    def stop(self) -> None:
        """Cancel the job on the builder; wait at most `UNSURE` seconds if the submission was not acknowledged.

        Raises:
            KeyboardInterrupt: another signal arrived; the job may still run.
        """
        try:
            with interruptible():
                if self.attempt:
                    self._stop()
                else:
                    thread = threading.Thread(target=self._stop, daemon=True)
                    thread.start()
                    thread.join(UNSURE)
                    if thread.is_alive():
                        notice(f"{self._builder.url} does not respond; if {self._name} runs there, doit reattaches")
        except KeyboardInterrupt:
            self.leave()
            raise
        finally:
            self._settled = True

    def _stop(self) -> None:
        notice(f"cancelling {self._name} on {self._builder.url} (Ctrl-C again exits at once)")
        try:
            ended = self._builder.cancel(self._digest, self.attempt)
        except (GamebearError, RuntimeError) as error:
            why = error.message if isinstance(error, GamebearError) else error
            notice(f"{self._name} may still run on {self._builder.url}: {why}")
        else:
            if not ended:
                notice(f"{self._name} continues on {self._builder.url}: another client waits for it")

    def leave(self) -> None:
        """Print that the job may still run."""
        notice(f"{self._name} may still run on {self._builder.url}; run doit again to reattach")


_waiting: dict[int, Interest] = {}
_waiting_lock = threading.Lock()

announced = threading.Event()
"""Set once the user has been notified that the run was interrupted."""

ending = threading.Event()
"""Set when the process starts to exit: the threads' waits end with it."""


def cancel_waiting() -> None:
    """Cancel the jobs that threads still wait for, because doit's threads die with the process.

    `build` calls this at exit, before it closes the builders.
    """
    ending.set()
    with _waiting_lock:
        left = list(_waiting.values())
        _waiting.clear()
    while left and not _signals.orphaned:
        interest = left.pop()
        try:
            interest.stop()
        except KeyboardInterrupt:
            for other in left:
                other.leave()
            return


# signals


class _Signals:
    """Signal state of this process.

    Attributes:
        pid: id of the process; a forked process resets the state.
        before: the replaced signal handlers, by signal.
        first: the first signal received, 0 for none.
        last: monotonic time of the last signal that counted.
        waits: the main thread is in an interruptible wait, which a further signal ends.
        exiting: the process is exiting: a signal ends interruptible waits and nothing else.
        further: number of signals received since then.
        uncaught: the process ends because of an uncaught KeyboardInterrupt.
        orphaned: the parent process died.
        watched: a thread watches the parent process.
        has_processes: doit starts worker processes.
        forking: a fork is in progress.
        pending: the signal received during the fork, 0 for none.
        whole: the handlers stay installed between tasks.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.before: dict[int, Any] = {}
        self.first = 0
        self.last = 0.0
        self.waits = False
        self.exiting = False
        self.further = 0
        self.uncaught = False
        self.orphaned = False
        self.watched = False
        self.has_processes = False
        self.forking = False
        self.pending = 0
        self.whole = False


_signals = _Signals()


def begin_run(*, whole: bool = False) -> bool:
    """Install the signal handlers: SIGTERM and SIGHUP end this process like Ctrl-C, and never with a traceback.

    Call this before a task runs. Outside the main thread it does nothing. Handlers of other code and ignored signals
    (nohup) are kept. Worker processes that `doit -n` starts from now on end with this process.

    Args:
        whole: until `end_run`, and not just until the next artifact task has ended.

    Returns:
        Whether the handlers were not installed before.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if _signals.pid != os.getpid():
        _after_fork(_signals)
    end_with_parent()
    _signals.whole = _signals.whole or whole
    util = sys.modules.get("multiprocessing.util")
    if util is not None:  # doit has made its queues with it: these forks are its own
        _prepare_forks(util)
    if _signals.before:
        return False
    _signals.first = 0
    _take_signals()
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)  # atexit calls the function that was registered last first
    return True


def end_run() -> None:
    """Restore the previous signal handlers, unless a signal was received: then the process is about to exit."""
    if _signals.first or threading.current_thread() is not threading.main_thread():
        return
    for number, handler in _signals.before.items():
        if signal.getsignal(number) is _end:
            signal.signal(number, handler)
    _signals.before.clear()
    _signals.whole = False


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Handle signals while the block runs a task, also in a worker process of `doit -n`."""
    begun = begin_run()
    is_child = multiprocessing.parent_process() is not None
    try:
        if is_child and threading.current_thread() is threading.main_thread():
            with _heard_by_this_thread():
                yield
        else:
            yield
    except KeyboardInterrupt as error:
        if isinstance(error, Terminated):
            raise
        raise Terminated(signal.SIGINT) from None  # a program received Ctrl-C before doit did; no traceback
    finally:
        if is_child and _signals.first:
            # The rest is doit's code, which may deadlock on a queue that a killed process has locked.
            threading.Thread(target=_leave_soon, daemon=True).start()
        elif begun or not (is_child or _signals.whole):
            end_run()  # also what the task's uptodate has begun; the main thread runs one artifact task at a time


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal end the waits in the block, also while the process exits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = _signals.waits
    try:
        _signals.waits = True
        yield
    finally:
        _signals.waits = outer


def _take_signals() -> None:
    for number in ENDS:
        before = signal.getsignal(number)
        if before in (signal.SIG_DFL, signal.default_int_handler):
            _signals.before[number] = before
            signal.signal(number, _end)


def _end(number: int, frame: types.FrameType | None) -> None:
    """Raise the exception that ends the run; during exit, only within an interruptible wait."""
    if os.getpid() != _signals.pid:  # forked by other code
        signal.signal(number, _signals.before.get(number, signal.SIG_DFL))
        os.kill(os.getpid(), number)
        return
    if _signals.forking:
        _signals.pending = number
        return
    now = time.monotonic()
    is_child = multiprocessing.parent_process() is not None
    if _signals.first and is_child and number != signal.SIGINT:
        return  # doit sends SIGTERM to its worker processes: this is not a second request of the user
    if _signals.first and not _signals.waits and now - _signals.last < BOUNCE:
        return
    _signals.first = _signals.first or number
    _signals.last = now
    if not _signals.exiting or _signals.waits:
        raise Terminated(number)
    _signals.further += 1
    for process in multiprocessing.active_children():
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
    if _signals.further > HARD:
        _flush()
        os._exit(128 + number)


def _exiting() -> None:
    """Stop raising exceptions: during exit, Python and other callers would show them with a traceback."""
    _signals.exiting = True
    if not _signals.before and threading.current_thread() is threading.main_thread():
        _take_signals()


def _at_exit() -> None:
    if _signals.pid != os.getpid():
        return
    _exiting()
    if _signals.first:
        end_processes()
        _announce(_signals.first)


@atexit.register  # this module is loaded early, so the function is called late
def _die_of_ctrl_c() -> None:
    """Die of SIGINT like a program that does not handle Ctrl-C, so that a shell ends a loop around doit.

    Python does this too, unless code has called exec() in the meantime, as imports of dataclasses do.
    """
    if _signals.uncaught and _signals.pid == os.getpid():
        _flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
            stream.flush()


def end_interrupted(number: int = signal.SIGINT) -> int:
    """Cancel the jobs and end the worker processes of an interrupted run, and report the interruption once.

    Args:
        number: the signal.

    Returns:
        The exit status.
    """
    _exiting()
    _signals.uncaught = number == signal.SIGINT
    cancel_waiting()  # not at exit: Python 3.12 and later start no thread then
    end_processes()
    _announce(number)
    return 128 + number


def _announce(number: int) -> None:
    if not announced.is_set():
        announced.set()
        notice("interrupted" if number == signal.SIGINT else f"terminated by {signal.Signals(number).name}")


# worker processes of `doit -n`


def end_processes() -> None:
    """Terminate the worker processes of `doit -n` and wait for them.

    doit sends SIGTERM once, and only if it was not interrupted while it started them. A process that was just forked
    may lose the signal, because Python clears signals that arrive before its setup. So the signal is repeated, which is
    safe: a process that has handled one ignores further ones.
    """
    while _signals.has_processes and (left := multiprocessing.active_children()):
        for process in left:
            process.terminate()
        left[0].join(POLL_INTERVAL)


def end_with_parent() -> None:
    """In a worker process of `doit -n`, exit when doit exits, even if it was killed; the job keeps running."""
    parent = multiprocessing.parent_process()
    if parent is not None and not _signals.watched:
        _signals.watched = True
        threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


@cache
def _prepare_forks(util: types.ModuleType) -> None:
    """Reset the signal state in each process that doit forks, and lose no signal during the fork."""
    _signals.has_processes = True
    util.register_after_fork(_signals, _after_fork)
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_here)


def _before_fork() -> None:
    """Postpone signals: Python swallows exceptions raised in at-fork functions, such as those of logging."""
    _signals.forking = True


def _after_fork_here() -> None:
    _signals.forking = False
    number, _signals.pending = _signals.pending, 0
    if number:
        threading.Thread(target=_send_again, args=(number,), daemon=True).start()


def _send_again(number: int) -> None:
    """Send the main thread a signal after a delay in which it registers the process that it has forked."""
    time.sleep(BOUNCE)
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _after_fork(signals: _Signals) -> None:
    """Reset the signal state in a forked process. Until it runs a task, doit's SIGTERM has its default effect."""
    before = signals.before
    signals.__init__()  # type: ignore[misc]
    for number, handler in before.items():
        if number != signal.SIGINT and signal.getsignal(number) is _end:
            signal.signal(number, handler)
    end_with_parent()


def _watch(parent: Any) -> None:
    """Wait until the parent process ends; then interrupt the main thread and end this process."""
    from multiprocessing.connection import wait

    # Processes forked later hold the sentinel open too, so also compare the parent's id. With a fork server, the parent
    # by id is the fork server, so only the sentinel counts.
    is_child = os.getppid() == parent.pid
    while not wait([parent.sentinel], POLL_INTERVAL) and (not is_child or os.getppid() == parent.pid):
        pass
    _signals.orphaned = True
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    _leave_soon()


def _leave_soon() -> None:
    """End the process if it is still alive after `GRACE` seconds."""
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def _heard_by_this_thread() -> Iterator[None]:
    """Ensure that the first signal interrupts a blocking wait of this thread.

    If two signals arrive at once, as Ctrl-C and doit's SIGTERM do, the kernel may deliver both to another thread
    (signal(7): any thread of a process may get them). This thread would then handle them only after its wait.
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
