"""A connection that all threads share: opened when it is first needed, and again where it was lost, with patience."""

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
"""Seconds for which a lost connection is tried again, unless whoever opened the builder says otherwise."""

FIRST_PATIENCE = 3.0
"""Seconds for which the first connection of a run is tried again."""

CROWD_PATIENCE = 30.0
"""The same where the builder is there, and only takes no further connection at this moment (`MaxStartups`)."""

PAUSES = 0.5, 15.0
"""Seconds, the first and the longest, between two tries; each pause is twice the one before."""


class Reconnecting(Generic[C]):
    """The connection with a builder.

    Args:
        place: what to call the builder.
        connect: opens a connection; raises BuilderLost if it may work later, BuilderError if not.

    Attributes:
        given_up: why the builder is held to be out of reach for the rest of this run.
        met: whether there was a connection in this run.
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
        """The connection, where there is one."""
        return self._open

    def get(self, patience: float | None, wait: float = threading.TIMEOUT_MAX) -> C:
        """Return the connection; open it where there is none.

        Args:
            patience: seconds for which that is tried again; None: it is tried once, and others may try later.
            wait: seconds for which another thread may be at it.

        Raises:
            BuilderError: there is none to be had, for good.
            BuilderLost: the builder is out of reach, and has been for as long as we have patience.
        """
        if not self._connecting.acquire(timeout=min(wait, threading.TIMEOUT_MAX)):
            raise BuilderLost(f"{self._place} is out of reach.", "Run doit again when it is back.")
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
        """Forget a connection that was lost; say whether nobody had done so before. Closing it is the caller's."""
        with self._changing:
            was, self._open = self._open, None if self._open is connection else self._open
        return was is connection

    def _opened(self, patience: float | None) -> C:
        start = time.monotonic()
        pause, longest = PAUSES
        has_said = False
        while True:
            if self.given_up is not None:
                raise self.given_up
            try:
                connection = self._connect()
            except BuilderLost as error:
                if self.given_up is not None:  # it was closed meanwhile, and that may be why
                    raise self.given_up from None
                bound = self._bounded(patience, error)
                left = start + bound - time.monotonic()
                if left <= 0:
                    raise self._out_of_reach(error, patience) from error
                if self.met and not has_said:
                    has_said = True
                    notice(f"lost the connection to {self._place}; trying again for {bound:g} seconds")
                # Not all at the same moment: several processes may have lost it, or wait to be let in.
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
        """Return for how many seconds it is tried, after it failed so."""
        if self.met or patience is None:
            return patience or 0.0
        return min(patience, CROWD_PATIENCE if isinstance(error, BuilderCrowded) else FIRST_PATIENCE)

    def _out_of_reach(self, error: BuilderLost, patience: float | None) -> BuilderLost:
        if patience is None:
            return error
        if self.met:
            error = BuilderLost(
                f"{self._place} has been out of reach for {patience:g} seconds: {error.message}",
                "What it is building goes on; run doit again when it is back, and it is found by its name.",
            )
        self.given_up = error
        return error
