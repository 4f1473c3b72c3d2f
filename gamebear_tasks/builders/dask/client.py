"""Connection with a Dask scheduler: one per run, shared by all threads, reopened after it was lost."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import ssl
import time
from collections.abc import Mapping

from ...errors import BuilderError, BuilderLost
from ...util.messages import notice
from ..protocol.reconnect import Reconnecting
from ..protocol.session import SILENCE, words_of
from .comm import PLUGIN, PROTOCOL, Comm, DaskConnection, Loop, client_tls, closed, connect
from .distributed_api import is_missing_module
from .scheduler_plugin import SchedulerPart

GREETING = 30.0
"""Seconds within which a scheduler must load the plug-in and answer."""

CONNECTING = 5.0
"""Seconds for which a request without patience waits while another thread connects."""

SETTLING = 1.0
"""Seconds within which a scheduler notices that a worker has gone."""


class Stream:
    """One connection with the scheduler plug-in; multiplexes requests and matches replies by number.

    Args:
        comm: open connection after the handshake.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Mapping[str, object]]] = {}
        self.lost: BuilderError | None = None
        self._reading = asyncio.ensure_future(self._read())
        self._writing = asyncio.Lock()

    @classmethod
    async def open(cls, address: str, tls: ssl.SSLContext | None, client: str) -> Stream:
        """Connect to a scheduler, and register the plug-in if the scheduler does not have it yet.

        Raises:
            BuilderLost: the scheduler does not answer.
            BuilderError: the scheduler cannot or may not load the plug-in, or has that of another release.
        """
        comm = await connect(address, tls)
        try:
            return await asyncio.wait_for(cls._greet(comm, address, client), GREETING)
        except asyncio.TimeoutError:
            comm.abort()
            raise BuilderLost(f"The scheduler {address} does not answer within {GREETING:g} seconds.") from None
        except BaseException:
            comm.abort()
            raise

    @classmethod
    async def _greet(cls, comm: Comm, address: str, client: str) -> Stream:
        part = pickle.dumps(SchedulerPart(), protocol=4)  # pickled by reference: only the name is sent
        await comm.write(
            {"op": "register_scheduler_plugin", "plugin": part, "name": PLUGIN, "idempotent": True, "reply": True}
        )
        answer = await comm.read()
        if "exception_text" in answer:
            reason = words_of(answer["exception_text"])
            if is_missing_module(reason):
                raise BuilderError(
                    f"The scheduler {address} has no gamebear-tasks: {reason}.",
                    "On the scheduler's machine: pip install 'gamebear-tasks[dask]', then restart it.",
                )
            raise BuilderError(
                f"The scheduler {address} cannot load gamebear-tasks: {reason}.",
                "Install the same releases of gamebear-tasks and dask there as here, and enable its handler"
                " register_scheduler_plugin.",
            )
        await comm.write({"op": PLUGIN, "protocol": PROTOCOL, "client": client, "reply": True})
        greeting = await comm.read()
        if greeting.get("protocol") != PROTOCOL:
            theirs = words_of(greeting.get("version", ""))
            raise BuilderError(
                f"The scheduler {address} has another release of gamebear-tasks ({theirs or 'an older one'}).",
                "Install the same release on scheduler, workers and here.",
            )
        return cls(comm)

    async def _read(self) -> None:
        try:
            while True:
                answer = await self._comm.read()
                number = answer.get("id")
                waiting = self._answers.get(number) if isinstance(number, int) else None
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except BuilderError as error:
            self.lost = error
        except asyncio.CancelledError:
            self.lost = BuilderLost(_CLOSED)
        finally:
            self._comm.abort()
            for waiting in self._answers.values():
                if not waiting.done():
                    waiting.set_exception(self.lost or BuilderLost(_CLOSED))

    async def ask(self, question: Mapping[str, object]) -> Mapping[str, object]:
        """Send a request and wait for the reply; raises BuilderLost."""
        if self.lost is not None:
            raise self.lost
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            async with self._writing:
                await self._comm.write({**question, "id": number})
            return await self._answers[number]
        finally:
            del self._answers[number]

    def close(self) -> None:
        """Close the connection; call it from the loop's thread."""
        self._reading.cancel()
        self._comm.abort()


class Link:
    """A run's requests to a scheduler.

    Args:
        url: the builder's URL.
        address: the scheduler's Dask address.
    """

    def __init__(self, url: str, address: str) -> None:
        self.url = url
        self.address = address
        self._tls = client_tls(address)
        self.loop = Loop()
        self._client = os.urandom(8).hex()
        self._stream = Reconnecting(url, self._connect)
        self._relayed: set[str] = set()

    def ask(self, ask: str, patience: float, **more: object) -> Mapping[str, object]:
        """Send a request to the scheduler plug-in; retry after a lost connection.

        Args:
            ask: name of the request.
            patience: seconds for which to retry a lost connection.
            more: fields of the request.

        Raises:
            BuilderLost: the scheduler stays unreachable.
            BuilderError: the scheduler refuses.
        """
        until = time.monotonic() + patience
        while True:
            stream = self._connected(patience)
            try:
                answer = self.loop.wait_for(stream.ask({"ask": ask, **more}), SILENCE)
            except TimeoutError:
                self._forget(stream)
                if time.monotonic() > until:
                    raise BuilderLost(
                        f"The scheduler {self.address} does not answer: timeout after {SILENCE:g} seconds."
                    ) from None
            except BuilderLost:
                self._forget(stream)
                if time.monotonic() > until:
                    raise
            else:
                if "error" in answer:
                    raise BuilderError(f"{self.url}: {words_of(answer['error']).rstrip('.')}.", _SEE)
                return answer

    def connection(self, worker: str) -> DaskConnection:
        """Return a connection that starts programs on a worker: direct, with the scheduler as relay as a fallback."""
        if not worker.startswith(self.address.partition("://")[0] + "://"):
            raise BuilderError(
                f"{self.url} names a worker {words_of(worker)[:100]}, which uses another protocol than the scheduler.",
                "Start its workers with the scheduler's address, such as tls://HOST:8786.",
            )
        if worker not in self._relayed and not self._reaches(worker):
            time.sleep(SETTLING)  # the scheduler may not have noticed yet that it ended
            if self.ask("worker", 0.0, worker=worker).get("there") and not self._reaches(worker):
                self._relayed.add(worker)
                notice(f"{worker} cannot be reached from here; what it builds comes through {self.url}")
        relay = self.address if worker in self._relayed else ""
        return DaskConnection(self.loop, worker, self._tls, relay)

    def _reaches(self, worker: str) -> bool:
        try:
            comm = self.loop.wait_for(connect(worker, self._tls), 30.0)
        except (BuilderLost, TimeoutError):
            return False
        self.loop.begin(closed(comm))
        return True

    def _connected(self, patience: float) -> Stream:
        if (stream := self._stream.open) is not None and stream.lost is not None:
            self._stream.drop(stream)
        return self._stream.get(patience or None, max(patience, CONNECTING))

    def _connect(self) -> Stream:
        try:
            return self.loop.wait_for(Stream.open(self.address, self._tls, self._client), 3 * GREETING)
        except (BuilderLost, TimeoutError) as error:
            reason = error if isinstance(error, BuilderLost) else BuilderLost(f"{self.address} does not answer.")
            if self._stream.met:
                raise reason from error
            raise BuilderLost(
                f"The scheduler of {self.url} cannot be reached: {reason.message}",
                "Check that it runs (dask scheduler) and that its port is open to this machine.",
            ) from error

    def _forget(self, stream: Stream) -> None:
        stream.lost = stream.lost or BuilderLost(_CLOSED)  # makes `_connected` reconnect
        self.loop.begin(_closed(stream))

    def close(self) -> None:
        """Close the connection. Never raises."""
        self._stream.given_up = BuilderLost(_CLOSED)  # stops a thread that is connecting now
        self.loop.close()


async def _closed(stream: Stream) -> None:
    stream.close()


_CLOSED = "The connection to Dask was closed."

_SEE = "See the scheduler's dashboard (port 8787), or its log."
