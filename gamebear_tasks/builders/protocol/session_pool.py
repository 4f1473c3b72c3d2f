"""The sessions with one builder: a few, kept open and borrowed; where their connection is lost, it is opened again."""

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
"""The most sessions with one builder: below the ten that sshd allows a connection by default (`MaxSessions`)."""

BUSY_PATIENCE = 10.0
"""Seconds for which a builder may need to notice that a session of ours has ended, before it gives the next."""


class SessionPool:
    """Sessions with runners over one connection, for all threads of this process.

    A process that was forked begins with an empty pool: what its parent has open is the parent's.

    Args:
        place: what to call the builder.
        connect: opens a connection; raises BuilderLost if it may work later, BuilderError if not.
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
        """Whether a request that is held back would keep others from a session."""
        self._leave_to_parent()
        with self._changed:
            return bool(self._queue) or self._open + (not self._idle) >= self._limit

    @property
    def given_up(self) -> BuilderError | None:
        """Why the builder is held to be out of reach for the rest of this run."""
        return self._connection.given_up

    @property
    def described(self) -> Mapping[str, str]:
        """What the connection says of itself."""
        return dict(getattr(self._connection.open, "described", {}))

    def borrow(self) -> Session:
        """Return a session, for one request; whoever has it gives it back, or drops it.

        Raises:
            BuilderError: there is none to be had, for good.
            BuilderLost: the builder is out of reach, and has been for as long as we have patience.
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
        """Wait until there is a session to be had, first come first served; the caller holds `_changed`.

        In line, because whoever gives a session back and asks again at once would have it again before one that waits
        wakes up: a follower would keep out what ends the job that it follows.
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
        """Return a session that has answered."""
        with self._changed:
            if session.connection is self._connection.open:
                self._idle.append(session)
                self._changed.notify_all()
                return
            self._open -= 1
            self._changed.notify_all()
        session.close()

    def drop(self, session: Session, broken: bool) -> None:
        """Close a session; where it broke, see whether its connection did."""
        session.close()
        with self._changed:
            self._open -= 1
            self._changed.notify_all()
        if broken:
            self._forget(session.connection, close=not session.connection.is_alive)

    def close_idle(self) -> None:
        """Close the sessions that nobody uses."""
        self._leave_to_parent()
        with self._changed:
            stale = self._take_idle()
        for session in stale:
            session.close()

    def close(self) -> None:
        """Close the connection, unless it is our parent's."""
        if self._pid != os.getpid():
            return
        self.close_idle()
        connection = self._connection.open
        if connection is not None and self._connection.drop(connection):
            connection.close()

    def _take_idle(self) -> list[Session]:
        """Return the sessions that nobody uses, no longer counted; the caller holds `_changed`."""
        idle, self._idle = self._idle, []
        self._open -= len(idle)
        self._changed.notify_all()
        return idle

    def _forget(self, connection: Connection, close: bool = True) -> None:
        """Close a connection that broke, once, for all who use it.

        Args:
            connection: the one.
            close: whether it did break; otherwise only the sessions are closed that nobody uses, which may be no better
                than the one that has ended, and those in use go on.
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
        """Return the connection; open it again where it was lost, for as long as we have patience."""
        self._leave_to_parent()
        return self._connection.get(self.patience)

    def _start_session(self, connection: Connection) -> Session:
        try:
            return Session(connection, connection.start(bundle().command), self._place)
        except BuilderLost:
            self._forget(connection)
            raise
