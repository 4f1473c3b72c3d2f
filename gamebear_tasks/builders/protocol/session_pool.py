"""Pool of sessions with one builder, shared by all threads; it reopens a lost connection."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from ...errors import BuilderBusy, BuilderError, BuilderLost
from ...records.task_record import phase
from .bootstrap import bundle
from .reconnect import PATIENCE, Reconnecting
from .session import Session
from .transport import Connection

SESSIONS = 6
"""Maximum number of sessions with one builder, below sshd's default limit of ten per connection (`MaxSessions`)."""

BUSY_PATIENCE = 10.0
"""Seconds for which to retry the first session: a builder may not have noticed yet that an earlier session has
ended."""


class SessionPool:
    """Sessions with runners over one connection, for all threads of this process.

    A forked process starts with an empty pool, because the open connection belongs to its parent.

    Args:
        place: the builder's name in error messages.
        connect: opens a connection. Raises BuilderLost if a retry may succeed, BuilderError if not.
    """

    def __init__(self, place: str, connect: Callable[[], Connection]) -> None:
        self.patience = PATIENCE
        self._place = place
        self._connect = connect
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._connection = Reconnecting(self._place, self._connect)
        self._idle: list[Session] = []
        self._open = 0
        self._queue: deque[object] = deque()
        self._limit = SESSIONS

    def _leave_to_parent(self) -> None:
        if self._pid != os.getpid():
            self._reset()

    @property
    def are_scarce(self) -> bool:
        """Whether a long-polling request would keep other requests from getting a session."""
        self._leave_to_parent()
        with self._changed:
            return bool(self._queue) or self._open + (not self._idle) >= self._limit

    @property
    def given_up(self) -> BuilderError | None:
        """The reason why the builder counts as unreachable for the rest of this run; None if it does not."""
        return self._connection.given_up

    @property
    def described(self) -> Mapping[str, str]:
        """The connection's description of itself."""
        return dict(getattr(self._connection.open, "described", {}))

    def borrow(self) -> Session:
        """Return a session for one request; the caller must return it with `give_back` or `drop`.

        Raises:
            BuilderError: no session is available, permanently.
            BuilderLost: the builder was unreachable for `patience` seconds.
        """
        self._leave_to_parent()
        until = time.monotonic() + BUSY_PATIENCE
        while True:
            with self._changed:
                self._wait_in_line()
                if self.given_up is not None:
                    raise self.given_up
                if self._idle:
                    return self._idle.pop()
                self._open += 1
            try:
                with phase("connect"):
                    return self._start_session(self.connection())
            except BuilderBusy:
                with self._changed:
                    self._open -= 1
                    alone = self._open < 1
                    if not alone:
                        self._limit = self._open
                if alone:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.1)
            except BaseException:
                with self._changed:
                    self._open -= 1
                    self._changed.notify_all()
                raise

    def _wait_in_line(self) -> None:
        """Wait until a session is idle or may be opened, first come first served; the caller holds `_changed`.

        The order is FIFO to avoid starvation. Otherwise a thread that returns a session and requests one again at once
        gets it before a waiting thread wakes up: a follower would block the cancellation of the job that it follows.
        """
        turn = object()
        self._queue.append(turn)
        try:
            while self._queue[0] is not turn or (not self._idle and self._open >= self._limit):
                self._changed.wait(1.0)
        finally:
            self._queue.remove(turn)
            self._changed.notify_all()

    def give_back(self, session: Session) -> None:
        """Return a session after a complete reply, for reuse."""
        with self._changed:
            if session.connection is self._connection.open:
                self._idle.append(session)
                self._changed.notify_all()
                return
            self._open -= 1
            self._changed.notify_all()
        session.close()

    def drop(self, session: Session, broken: bool) -> None:
        """Close a session; if it broke, also check its connection."""
        session.close()
        with self._changed:
            self._open -= 1
            self._changed.notify_all()
        if broken:
            self._forget(session.connection, close=not session.connection.is_alive)

    def close_idle(self) -> None:
        """Close the idle sessions."""
        self._leave_to_parent()
        with self._changed:
            stale = self._take_idle()
        for session in stale:
            session.close()

    def close(self) -> None:
        """Close the connection, unless it belongs to the parent process."""
        if self._pid != os.getpid():
            return
        self.close_idle()
        connection = self._connection.open
        if connection is not None and self._connection.drop(connection):
            connection.close()

    def _take_idle(self) -> list[Session]:
        """Remove the idle sessions from the pool and return them; the caller holds `_changed`."""
        idle, self._idle = self._idle, []
        self._open -= len(idle)
        self._changed.notify_all()
        return idle

    def _forget(self, connection: Connection, close: bool = True) -> None:
        """Close a broken connection, once for all threads.

        Args:
            connection: the connection.
            close: whether the connection itself broke. Otherwise only the idle sessions are closed, because they may be
                as broken as the session that ended; sessions in use continue.
        """
        with self._changed:
            if not (self._connection.drop(connection) if close else self._connection.open is connection):
                return
            if close:
                self._limit = SESSIONS
            stale = self._take_idle()
        for session in stale:
            session.close()
        if close:
            connection.close()

    def connection(self) -> Connection:
        """Return the connection; reconnect for up to `patience` seconds if it was lost."""
        self._leave_to_parent()
        return self._connection.get(self.patience)

    def _start_session(self, connection: Connection) -> Session:
        try:
            return Session(connection, connection.start(bundle().command), self._place)
        except BuilderLost:
            self._forget(connection)
            raise
