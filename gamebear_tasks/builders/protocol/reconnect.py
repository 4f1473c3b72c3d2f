"""Connection shared by all threads: opened on first use, and reopened with backoff after it was lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from ...errors import BuilderCrowded, BuilderError, BuilderLost
from ...util.messages import notice

C = TypeVar("C")

PATIENCE = 600.0
"""Seconds for which to retry a lost connection, unless the code that opens the builder sets another value."""

FIRST_PATIENCE = 3.0
"""Seconds for which to retry the first connection of a run."""

CROWD_PATIENCE = 30.0
"""Seconds for which to retry the first connection if the builder accepts no further one now (`MaxStartups`)."""

PAUSES = 0.5, 15.0
"""Seconds, first and longest, between two attempts (exponential backoff: each pause is twice the one before)."""


class Reconnecting(Generic[C]):
    """The connection with a builder.

    Args:
        place: the builder's name in error messages.
        connect: opens a connection. Raises BuilderLost if a retry may succeed, BuilderError if not.

    Attributes:
        given_up: the reason why the builder counts as unreachable for the rest of this run; None if it does not.
        met: whether this run had a connection before.
    """

    def __init__(self, place: str, connect: Callable[[], C]) -> None:
        self.given_up: BuilderError | None = None
        self.met = False
        self._place = place
        self._connect = connect
        self._connecting = threading.Lock()
        self._changing = threading.Lock()
        self._open: C | None = None

    @property
    def open(self) -> C | None:
        """The open connection; None if there is none."""
        return self._open

    def get(self, patience: float | None, wait: float = threading.TIMEOUT_MAX) -> C:
        """Return the connection; open it if there is none.

        Args:
            patience: seconds for which to retry. None: try once, and permit later attempts by others.
            wait: seconds to wait for another thread that is connecting.

        Raises:
            BuilderError: no connection is possible, permanently.
            BuilderLost: the builder was unreachable for `patience` seconds, or another thread is still connecting.
        """
        if not self._connecting.acquire(timeout=min(wait, threading.TIMEOUT_MAX)):
            raise BuilderLost(f"{self._place} cannot be reached.", "Run doit again when it is reachable.")
        try:
            connection = self._open
            if connection is None:
                connection = self._opened(patience)
                with self._changing:
                    self._open = connection
            return connection
        finally:
            self._connecting.release()

    def drop(self, connection: C) -> bool:
        """Forget a lost connection; return whether this call is the first to do so. The caller closes it."""
        with self._changing:
            was, self._open = self._open, None if self._open is connection else self._open
        return was is connection

    def _opened(self, patience: float | None) -> C:
        start = time.monotonic()
        pause, longest = PAUSES
        has_reported = False
        while True:
            if self.given_up is not None:
                raise self.given_up
            try:
                connection = self._connect()
            except BuilderLost as error:
                if self.given_up is not None:  # `given_up` may be the cause: set by `close` meanwhile
                    raise self.given_up from None
                bound = self._bounded(patience, error)
                left = start + bound - time.monotonic()
                if left <= 0:
                    raise self._out_of_reach(error, patience) from error
                if self.met and not has_reported:
                    has_reported = True
                    notice(f"lost the connection to {self._place}; trying again for {bound:g} seconds")
                # Random jitter: several processes may have lost the connection at once, or wait for admission.
                time.sleep(min(pause * random.uniform(0.5, 1.0), max(left, 0.05)))
                pause = min(pause * 2, longest)
            except BuilderError as error:
                self.given_up = error
                raise
            else:
                if self.met:
                    notice(f"connected to {self._place} again")
                self.met = True
                return connection

    def _bounded(self, patience: float | None, error: BuilderLost) -> float:
        """Return the seconds for which to retry after an error."""
        if self.met or patience is None:
            return patience or 0.0
        return min(patience, CROWD_PATIENCE if isinstance(error, BuilderCrowded) else FIRST_PATIENCE)

    def _out_of_reach(self, error: BuilderLost, patience: float | None) -> BuilderLost:
        if patience is None:
            return error
        if self.met:
            error = BuilderLost(
                f"{self._place} cannot be reached for {patience:g} seconds: {error.message}",
                "Run doit again when it is reachable: it reattaches to the job, which continues.",
            )
        self.given_up = error
        return error
