"""Ctrl-C, SIGTERM and SIGHUP end a run: its jobs are cancelled on their builders, or go on where that is set.

A process of `doit -n` ends with doit, however doit ended. Where doit had no time to say so (SIGKILL), its jobs go on,
as those of any client that is gone, and the next doit finds them.
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

if TYPE_CHECKING:  # an up-to-date run does without builders
    from ..builders.base import Builder

UNSURE = 5.0
"""Seconds for which an interruption waits for a builder that has not said whether it has begun a job."""

BOUNCE = 0.1
"""Seconds within which several signals are one wish: a key that repeats, or one signal sent to all of our processes."""

HARD = 3
"""After how many more signals, once the process is on its way out, it no longer waits for anything."""

LOOK = 1.0
"""Seconds between two looks whether our parent is still there."""

GRACE = 5.0
"""Seconds that a process of `doit -n` may take to end, once it has nothing left to do."""

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals by which a person, a service manager or a terminal ends a run."""


class Terminated(KeyboardInterrupt, SystemExit):
    """A signal ends the run as Ctrl-C does; its exit status, 128 and the signal's number, is the process's."""

    def __init__(self, number: int | str) -> None:
        super().__init__(number)
        self.number = int(number)
        self.code = 128 + self.number

    def __str__(self) -> str:
        return str(self.number)  # doit makes it from this again in its own process


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
                notice(f"{self._name} goes on on {self._builder.url}; run doit again and it is found")
            elif id(self) in _waiting:
                self.stop()
        finally:
            if self._settled:  # otherwise a second signal came before the job was seen to: that is done at exit
                with _waiting_lock:
                    _waiting.pop(id(self), None)

    def stop(self) -> None:
        """End the job on the builder; where it is not known to have begun, do not wait long for that.

        Raises:
            KeyboardInterrupt: another signal came; it is left as it is.
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
                        notice(f"{self._builder.url} does not answer; if {self._name} runs there, doit finds it again")
        except KeyboardInterrupt:
            self.leave()
            raise
        finally:
            self._settled = True

    def _stop(self) -> None:
        notice(f"ending {self._name} on {self._builder.url} (Ctrl-C again to leave at once)")
        try:
            ended = self._builder.cancel(self._digest, self.attempt)
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


def end_what_is_left() -> None:
    """Before the process ends, end what its threads still wait for: doit's threads die with it.

    At exit `build` calls it, before it closes the builders.
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
    """What this process knows of the signals that end it.

    Attributes:
        pid: the process; a fork has to begin anew.
        before: the handlers that ours have replaced, by signal.
        came: the first signal that came, 0 for none.
        last: when the last one that counted came (monotonic).
        waits: the main thread waits for something that a further signal is to end.
        exiting: the process is on its way out: a signal ends those waits and nothing else.
        further: how many came since then.
        uncaught: Ctrl-C is what ends the process.
        orphaned: our parent died.
        watched: we end with our parent.
        has_processes: doit starts processes.
        forking: a process is being forked.
        pending: the signal that came meanwhile.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.before: dict[int, Any] = {}
        self.came = 0
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


_signals = _Signals()


def begin_run() -> bool:
    """From now on, have SIGTERM and SIGHUP end this process as Ctrl-C does, and no number of signals show a traceback.

    It is called before a task of ours runs, by the main thread where there are several. A handler of somebody else, and
    a signal that is ignored (nohup), stay as they are. The processes that `doit -n` starts from now on end with us.

    Returns:
        Whether it was not so before.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if _signals.pid != os.getpid():
        _after_fork(_signals)
    end_with_parent()
    if _signals.before:
        return False
    _signals.came = 0
    _take_signals()
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)  # the last one is called first
    util = sys.modules.get("multiprocessing.util")
    if util is not None:  # doit has made its queues with it: these forks are its own
        _prepare_forks(util)
    return True


def end_run() -> None:
    """Have the signals do what they did before, unless one came: then the process is about to end."""
    if _signals.came or threading.current_thread() is not threading.main_thread():
        return
    for number, handler in _signals.before.items():
        if signal.getsignal(number) is _end:
            signal.signal(number, handler)
    _signals.before.clear()


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Be ended by signals while one of our tasks runs, also in a process of `doit -n`."""
    begun = begin_run()
    is_child = multiprocessing.parent_process() is not None
    try:
        if is_child and threading.current_thread() is threading.main_thread():
            with _heard_by_this_thread():
                yield
        else:
            yield
    finally:
        if is_child and _signals.came:
            # What it has left to do is doit's, whose queue may be locked by a process that was killed.
            threading.Thread(target=_leave_soon, daemon=True).start()
        elif begun:
            end_run()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal end what the block waits for, also when the process is on its way out."""
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
    """Raise what ends the run; on the way out, only where somebody waits for something."""
    if os.getpid() != _signals.pid:  # a process that somebody else has forked
        signal.signal(number, _signals.before.get(number, signal.SIG_DFL))
        os.kill(os.getpid(), number)
        return
    if _signals.forking:
        _signals.pending = number
        return
    now = time.monotonic()
    is_child = multiprocessing.parent_process() is not None
    if _signals.came and is_child and number != signal.SIGINT:
        return  # doit sends SIGTERM to its processes: that is no second wish
    if _signals.came and not _signals.waits and now - _signals.last < BOUNCE:
        return
    _signals.came = _signals.came or number
    _signals.last = now
    if not _signals.exiting or _signals.waits:
        # A process of `doit -n` shows a KeyboardInterrupt with a traceback, and none that is a SystemExit too.
        raise Terminated(number) if is_child or number != signal.SIGINT else KeyboardInterrupt
    _signals.further += 1
    for process in multiprocessing.active_children():
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
    if _signals.further > HARD:
        _flush()
        os._exit(128 + number)


def _exiting() -> None:
    """Raise nothing any more: whoever ends now, such as Python itself, would show it with a traceback."""
    _signals.exiting = True
    if not _signals.before and threading.current_thread() is threading.main_thread():
        _take_signals()


def _at_exit() -> None:
    if _signals.pid != os.getpid():
        return
    _exiting()
    if _signals.came:
        end_processes()
    if _signals.came and not told.is_set():
        told.set()
        how = "interrupted" if _signals.came == signal.SIGINT else f"ended by {signal.Signals(_signals.came).name}"
        notice(how)


@atexit.register  # as the module is loaded early, it is called late
def _die_of_ctrl_c() -> None:
    """End as a program that does not handle Ctrl-C, so that a shell ends the loop that we are in.

    Python does it too, unless something has called exec() meanwhile, as imports of dataclasses do.
    """
    if _signals.uncaught and _signals.pid == os.getpid():
        _flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
            stream.flush()


def say_so_without_a_traceback() -> None:
    """Let an interruption that ends the process end the jobs too, and be one line.

    doit passes it on to Python, which would show both their innards.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            _exiting()
            _signals.uncaught = True
            end_what_is_left()  # at exit it may be too late: Python 3.12 starts no thread then
            end_processes()
            if not told.is_set():
                told.set()
                notice("interrupted")
        else:
            before(kind, error, trace)

    if getattr(before, "__module__", "") != __name__:
        sys.excepthook = hook


# processes of `doit -n`


def end_processes() -> None:
    """Have the processes of `doit -n` end, and wait for them.

    doit tells them once, and only if it was not interrupted while it started them. A process that was just forked may
    lose the signal (Python clears those that came before it was set up), and one that has heard it minds no other.
    """
    while _signals.has_processes and (left := multiprocessing.active_children()):
        for process in left:
            process.terminate()
        left[0].join(LOOK)


def end_with_parent() -> None:
    """In a process of `doit -n`, end when doit does, however that happens; its job goes on, as any killed client's."""
    parent = multiprocessing.parent_process()
    if parent is not None and not _signals.watched:
        _signals.watched = True
        threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


@cache
def _prepare_forks(util: types.ModuleType) -> None:
    """Have each process that doit forks begin anew, and no signal lost meanwhile."""
    _signals.has_processes = True
    util.register_after_fork(_signals, _after_fork)
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_here)


def _before_fork() -> None:
    """Put signals off: Python swallows what is raised by a function that it calls around a fork, as logging's are."""
    _signals.forking = True


def _after_fork_here() -> None:
    _signals.forking = False
    number, _signals.pending = _signals.pending, 0
    if number:
        threading.Thread(target=_send_again, args=(number,), daemon=True).start()


def _send_again(number: int) -> None:
    """Send the main thread a signal, once it had time to note which process it has forked."""
    time.sleep(BOUNCE)
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _after_fork(signals: _Signals) -> None:
    """Begin anew in a process that was just forked. As long as it builds nothing, doit's SIGTERM just ends it."""
    before = signals.before
    signals.__init__()  # type: ignore[misc]
    for number, handler in before.items():
        if number != signal.SIGINT and signal.getsignal(number) is _end:
            signal.signal(number, handler)
    end_with_parent()


def _watch(parent: Any) -> None:
    """Wait for the parent's end; then end the main thread's work, and with it the process."""
    from multiprocessing.connection import wait

    # Processes that were forked after us hold the sentinel too. A fork server is no parent whose number would tell.
    is_child = os.getppid() == parent.pid
    while not wait([parent.sentinel], LOOK) and (not is_child or os.getppid() == parent.pid):
        pass
    _signals.orphaned = True
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    _leave_soon()


def _leave_soon() -> None:
    """End the process, if it does not by itself."""
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


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
