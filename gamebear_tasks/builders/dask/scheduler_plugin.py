"""Dask scheduler plug-in: places one lease for each requested job, and records which worker has which job.

Dask decides the placement of a lease, by resources and load, and places it again if its worker dies. The plug-in only
adds information that Dask lacks: which workers already have a job's result, package image or inputs. It also submits no
more leases than there are slots. Otherwise a lease could wait behind a long job while another slot becomes free. The
plug-in holds the futures, not the clients, so that connecting and disconnecting clients do not affect running jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from ...runner.host.arch import ARCHITECTURES
from . import distributed_api, worker_plugin
from .comm import PLUGIN, PROTOCOL
from .distributed_api import Client, Comm, Future, Scheduler, SchedulerPlugin, WorkerState, drained

GRACE = 60.0
"""Seconds within which a disconnected client may return before its interest in jobs expires."""

REFRESH_TIMEOUT = 5.0
"""Seconds to wait for a worker's list of jobs and blobs before a job is placed without it."""

STALE = 5.0
"""Seconds after which the workers' lists are refreshed when a client connects."""


@dataclass(eq=False)
class Lease:
    """A slot for a job.

    Attributes:
        number: identifier of the lease.
        digest: the job.
        arch: resource of which the lease takes one unit.
        name: name in Dask's dashboard.
        target: see `runner.maintenance.garbage_collection.target_of`.
        blobs: SHA-256 of the job's files.
        prefer: the only acceptable worker while it is available, because the job already runs on it, or has a result
            there that a forced rebuild replaces.
        waiters: clients that want the job.
        places: the only workers on which it was submitted to Dask; empty for any of the architecture.
        task: the task that submits the lease and waits for its end; it holds a slot from then on.
        worker: address of the worker on which the lease was placed.
        error: reason why the lease cannot be placed.
        changed: set when one of these attributes was changed.
    """

    number: int
    digest: str
    arch: str
    name: str
    target: str
    blobs: frozenset[str]
    prefer: str = ""
    waiters: set[str] = field(default_factory=set)
    places: list[str] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    worker: str = ""
    error: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> str:
        """Dask's key of the lease."""
        return f"{self.name}-{self.digest[:12]}-{self.number}"


@dataclass
class Known:
    """Contents of a worker's store.

    Attributes:
        jobs: states of the jobs, by digest.
        targets: targets that it has built before, so that their package images are available.
        blobs: SHA-256 of each blob.
        error: reason why the worker cannot be used.
        requested_at: time of the query (`time.monotonic`); 0 until the worker has answered, and may not be used.
    """

    jobs: dict[str, str] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    blobs: set[str] = field(default_factory=set)
    error: str = ""
    requested_at: float = 0.0


class SchedulerPart(SchedulerPlugin):
    """Plug-in that installs `Cluster` on a scheduler; clients register it, pickled by reference."""

    def __init__(self) -> None:
        self.name = PLUGIN
        self.cluster: Cluster | None = None

    async def start(self, scheduler: Scheduler) -> None:
        """Install the cluster, without awaiting anything: two clients may register the plug-in concurrently."""
        cluster = distributed_api.extension(scheduler, PLUGIN)
        self.cluster = cluster if isinstance(cluster, Cluster) else Cluster(scheduler)

    async def before_close(self) -> None:
        """Close the cluster before the scheduler closes."""
        if self.cluster is not None:
            await self.cluster.close()
            self.cluster = None  # Dask keeps closed schedulers and their plug-ins

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Register a new worker."""
        if self.cluster is not None:
            self.cluster.add_worker(worker)

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: object) -> None:
        """Unregister a worker that has gone."""
        if self.cluster is not None:
            self.cluster.remove_worker(worker)


class Cluster:
    """The jobs and workers of one scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        distributed_api.check_scheduler(scheduler)
        self.scheduler = scheduler
        self.leases: dict[str, Lease] = {}
        self.queue: deque[Lease] = deque()
        self.known: dict[str, Known] = {}
        self.refreshes: dict[str, asyncio.Task[None]] = {}
        self.present: Counter[str] = Counter()
        self._numbers = itertools.count(int(time.time() * 1000) << 8)  # differ from those of an earlier scheduler
        self._client: Client | None = None
        self._opening = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._closed = False
        self._asks: Mapping[str, Callable[..., Awaitable[Mapping[str, object]]]] = {
            "place": self.ask_place,
            "release": self.ask_release,
            "where": self.ask_where,
            "worker": self.ask_worker,
            "workers": self.ask_workers,
        }
        operations: dict[str, distributed_api.Operation] = {
            PLUGIN: self.serve,
            "gamebear_relay": self.relay,
            "gamebear_report": self.report,
        }
        distributed_api.extend(scheduler, PLUGIN, self, operations)
        for worker in scheduler.workers:
            self.add_worker(worker)

    def _begin(self, work: Coroutine[object, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def client(self) -> Client:
        """Return the Dask client that places leases; open it on first use."""
        async with self._opening:
            if self._client is None:
                self._client = await distributed_api.open_client(self.scheduler, PLUGIN)
            return self._client

    async def close(self) -> None:
        """Cancel all tasks and timers, close the Dask client, and detach from the scheduler."""
        self._closed = True
        distributed_api.retract(self.scheduler, PLUGIN)
        for timer in self._leaving.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1)
        if self._client is not None:
            await self._client.close(timeout=1)

    # workers

    def add_worker(self, worker: str) -> None:
        """Register a new worker: query its store, then use it."""
        self.known[worker] = Known()
        self._start_refresh(worker)

    def remove_worker(self, worker: str) -> None:
        """Unregister a worker that has gone: Dask places its leases again."""
        self.known.pop(worker, None)
        task = self.refreshes.pop(worker, None)
        if task is not None:
            task.cancel()
        for lease in self.leases.values():
            if lease.worker == worker:
                lease.worker = lease.prefer = ""
        self.loosen()

    def loosen(self) -> None:
        """Submit leases whose own workers have gone again, for any worker of the right architecture.

        Dask's `allow_other_workers` does the same, but also ignores the architecture if no worker of it is left.
        """
        for lease in list(self.leases.values()):
            if lease.task is not None and lease.places and not self._present(lease.places):
                lease.task.cancel()
                lease.places = []
                lease.number = next(self._numbers)  # Dask may not have forgotten the key of the first one yet
                lease.task = self._begin(self._place(lease, []))

    def _present(self, workers: Iterable[str]) -> list[str]:
        return [worker for worker in workers if worker in self.scheduler.workers]

    def _start_refresh(self, worker: str) -> asyncio.Task[None]:
        if worker not in self.refreshes:
            self.refreshes[worker] = task = self._begin(self._refresh(worker))
            task.add_done_callback(lambda _: self.refreshes.pop(worker, None))
        return self.refreshes[worker]

    async def _refresh(self, worker: str) -> None:
        known = Known(requested_at=time.monotonic())
        state = self.scheduler.workers.get(worker)
        if state is None or not _architectures(state):
            return
        try:
            client = await self.client()
            (answer,) = (await client.run(worker_plugin.install, workers=[worker], on_error="return")).values()
            if isinstance(answer, BaseException):
                known.error = _why(answer)
            elif answer != version("gamebear-tasks"):
                known.error = f"it has gamebear-tasks {answer}, and the scheduler {version('gamebear-tasks')}"
            else:
                jobs, known.blobs = _checked_listing(
                    await distributed_api.call_worker(self.scheduler, worker, _LIST_STORE)
                )
                known.jobs = {digest: state for digest, (state, _) in jobs.items()}
                known.targets = {target for _, target in jobs.values()}
        except Exception as error:  # noqa: BLE001 - after any error the worker is not used
            known.error = f"it does not answer ({error})"
        if worker in self.known:
            self.known[worker] = known
            await self._end_orphans(worker)
            self._admit()

    async def _end_orphans(self, worker: str) -> None:
        """Stop jobs on a returned worker that were started elsewhere meanwhile."""
        for digest, state in list(self.known[worker].jobs.items()):
            lease = self.leases.get(digest)
            if state in _RUNS and lease is not None and lease.worker not in ("", worker):
                with contextlib.suppress(OSError):
                    await distributed_api.call_worker(self.scheduler, worker, "gamebear_stop", digest=digest)

    async def _refresh_all(self, older: float) -> None:
        """Refresh lists of workers' stores older than `older` seconds, for a bounded time."""
        now = time.monotonic()
        old = [worker for worker, known in self.known.items() if now - known.requested_at > older]
        if old:
            await asyncio.wait([self._start_refresh(worker) for worker in old], timeout=REFRESH_TIMEOUT)

    def _usable(self, arch: str) -> list[WorkerState]:
        return [
            state
            for worker, state in self.scheduler.workers.items()
            if state.resources.get(arch, 0) >= 1
            and (known := self.known.get(worker)) is not None
            and known.requested_at
            and not known.error
        ]

    def _why_not(self, state: WorkerState) -> str:
        """Return the reason why a worker with slots cannot be used."""
        known = self.known.get(state.address, Known())
        is_listed = known.requested_at or not _architectures(state)
        return known.error or ("" if is_listed else "its store has not been listed yet")

    def _holder(self, digest: str, states: Iterable[str]) -> str:
        for worker, known in self.known.items():
            if known.jobs.get(digest, "") in states and worker in self.scheduler.workers:
                return worker
        return ""

    # leases

    def _admit(self) -> None:
        """Submit the leases for which there are slots to Dask, first come first served."""
        if self._closed:
            return
        for lease in list(self.queue):
            usable = self._usable(lease.arch)
            taken = sum(other.task is not None and other.arch == lease.arch for other in self.leases.values())
            if not lease.prefer and taken >= sum(int(state.resources[lease.arch]) for state in usable):
                continue
            self.queue.remove(lease)
            free = [
                state for state in usable if state.resources[lease.arch] - state.used_resources.get(lease.arch, 0) >= 1
            ]
            places = [lease.prefer] if lease.prefer else self._best(lease, free)
            lease.task = self._begin(self._place(lease, places))

    def _best(self, lease: Lease, free: Iterable[WorkerState]) -> list[str]:
        """Return the free workers that have most of a job's needs: first its package images, then its files."""
        scores = {}
        for state in free:
            known = self.known[state.address]
            scores[state.address] = (lease.target in known.targets, len(lease.blobs & known.blobs))
        best = max(scores.values(), default=None)
        return [worker for worker, score in scores.items() if score == best]

    async def _place(self, lease: Lease, places: list[str]) -> None:
        """Submit a lease to Dask, and wait for its end."""
        future: Future | None = None
        try:
            client = await self.client()
            lease.places = self._present(places)
            future = client.submit(
                worker_plugin.lease,
                lease.digest,
                lease.number,
                key=lease.key,
                resources={lease.arch: 1},
                workers=lease.places or None,
                pure=False,
            )
            await distributed_api.wait(client, future)
            if future.status == "error":
                lease.error = _why(await future.exception())
        except asyncio.CancelledError:
            if lease.task is asyncio.current_task():
                lease.error = "Dask has cancelled it"
        except Exception as error:  # noqa: BLE001 - a task may raise anything
            lease.error = _why(error)
        finally:
            if future is not None:
                future.release()
        if lease.task is asyncio.current_task():
            self._over(lease)

    def _over(self, lease: Lease) -> None:
        if self.leases.get(lease.digest) is lease:
            del self.leases[lease.digest]
        if lease in self.queue:
            self.queue.remove(lease)
        lease.error = lease.error or "over"
        lease.changed.set()
        self._admit()

    def _drop(self, lease: Lease) -> None:
        """End a lease that no client wants, or whose job has ended."""
        if lease.worker:
            self._begin(self._release(lease))
        elif not lease.waiters and lease.task is None:
            self._over(lease)

    async def _release(self, lease: Lease) -> None:
        with contextlib.suppress(OSError, AttributeError):
            await distributed_api.call_worker(self.scheduler, lease.worker, "gamebear_release", number=lease.number)

    async def report(self, digest: str, number: int, worker: str, entry: list[str] | str | None = "") -> bool:
        """Handle a report from a lease on its worker: its placement, or, with `entry`, the result of its job."""
        lease = self.leases.get(digest)
        if lease is None or lease.number != number:
            return False
        known = self.known.get(worker)
        if entry == "":
            if lease.worker != worker:
                lease.worker = worker
                if known is not None:
                    known.blobs |= lease.blobs
                lease.changed.set()
            return bool(lease.waiters)
        if isinstance(entry, (list, tuple)) and known is not None:
            known.jobs[digest] = entry[0]
            known.targets.add(entry[1])
        return True

    # clients

    async def serve(self, comm: Comm, protocol: int, client: str) -> object:
        """Answer a client's requests concurrently until it disconnects."""
        await comm.write({"protocol": PROTOCOL, "version": version("gamebear-tasks")})
        if protocol != PROTOCOL:
            return distributed_api.DONT_REPLY
        self.present[client] += 1
        refresh = self._begin(self._refresh_all(STALE))
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                question = await comm.read()
                task = asyncio.ensure_future(self._answer(comm, client, refresh, question))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except OSError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            self.present[client] -= 1
            if not self._closed:
                if (timer := self._leaving.get(client)) is not None:
                    timer.cancel()
                self._leaving[client] = asyncio.get_running_loop().call_later(GRACE, self._leave, client)
            comm.abort()
        return distributed_api.DONT_REPLY

    def _leave(self, client: str) -> None:
        self._leaving.pop(client, None)
        if self.present[client] > 0:
            return
        del self.present[client]
        for lease in list(self.leases.values()):
            if client in lease.waiters:
                lease.waiters.discard(client)
                self._drop(lease)

    async def _answer(
        self, comm: Comm, client: str, refresh: asyncio.Task[None], question: Mapping[str, object]
    ) -> None:
        await asyncio.wait([refresh], timeout=REFRESH_TIMEOUT)
        fields = {name: value for name, value in question.items() if name not in ("ask", "id")}
        try:
            answer: Mapping[str, object] = await self._asks[str(question["ask"])](client, **fields)
        except Exception as error:  # noqa: BLE001 - reported to the waiting client
            answer = {"error": f"The scheduler cannot answer ({error!r})."}
        with contextlib.suppress(OSError):
            await comm.write({**answer, "id": question.get("id")})

    async def ask_place(
        self,
        client: str,
        digest: str,
        arch: str,
        name: str,
        target: str,
        blobs: list[str],
        again: bool,
        fresh: bool,
        wait: float,
    ) -> Mapping[str, object]:
        """Return the worker for a job; wait up to `wait` seconds for a slot. `fresh` forces a rebuild."""
        lease = self.leases.get(digest)
        holder = self._holder(digest, ("done",) if again else ("done", "failed", "cancelled"))
        if holder and not fresh and (lease is None or not lease.worker):
            return {"worker": holder}
        runs_on = self._holder(digest, _RUNS)
        if lease is None and runs_on and not self.scheduler.workers[runs_on].resources.get(arch, 0):
            return {"worker": runs_on}  # it has no slots any more, so no lease can be placed there
        if lease is None:
            lease = Lease(next(self._numbers), digest, arch, name, target, frozenset(blobs), runs_on)
            if fresh and not runs_on and holder in {state.address for state in self._usable(arch)}:
                lease.prefer = holder  # the new result replaces the old one; two workers would have two results
            self.leases[digest] = lease
            self.queue.append(lease)
            lease.waiters.add(client)
            self._admit()
        elif not lease.worker and runs_on:
            return {"worker": runs_on}
        lease.waiters.add(client)
        until = time.monotonic() + wait
        while not lease.worker and not lease.error and time.monotonic() < until:
            lease.changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(lease.changed.wait(), until - time.monotonic())
        if lease.worker and not lease.error:
            return {"worker": lease.worker}
        if lease.error == "over":
            return {"waiting": True, "slots": 1}  # the lease has just ended: request again
        if lease.error:
            return {"error": lease.error}
        slots = sum(int(state.resources[arch]) for state in self._usable(arch))
        return {"waiting": True, "slots": slots, "workers": self._workers()}

    async def ask_release(self, client: str, digest: str) -> Mapping[str, object]:
        """Note that a client no longer waits for a job, or has seen its end."""
        lease = self.leases.get(digest)
        if lease is not None:
            lease.waiters.discard(client)
            if lease.worker or not lease.waiters:
                self._drop(lease)
        return {}

    async def ask_where(self, client: str, digest: str) -> Mapping[str, object]:
        """Return the worker that has a job, in any state."""
        lease = self.leases.get(digest)
        if lease is not None and lease.worker:
            return {"worker": lease.worker}
        states = (*_RUNS, "done", "failed", "cancelled", "failed seen", "cancelled seen")
        if not self._holder(digest, states):
            await self._refresh_all(1.0)
        return {"worker": self._holder(digest, states), "queued": lease is not None}

    async def ask_worker(self, client: str, worker: str) -> Mapping[str, object]:
        """Return whether a worker is available."""
        return {"there": worker in self.scheduler.workers}

    async def ask_workers(self, client: str) -> Mapping[str, object]:
        """Return the workers with their resources."""
        await self._refresh_all(STALE)
        return {"workers": self._workers()}

    def _workers(self) -> list[Mapping[str, object]]:
        return [
            {
                "worker": worker,
                "name": str(state.name),
                "slots": {arch: int(state.resources[arch]) for arch in _architectures(state)},
                "busy": {arch: int(state.used_resources.get(arch, 0)) for arch in _architectures(state)},
                "error": self._why_not(state),
            }
            for worker, state in self.scheduler.workers.items()
        ]

    async def relay(self, comm: Comm, worker: str, command: str) -> object:
        """Relay between a client and a program on a worker that the client cannot reach directly."""
        try:
            if worker not in self.scheduler.workers:
                raise OSError(f"{worker} has gone")
            other = await distributed_api.connect_to_worker(self.scheduler, worker, REFRESH_TIMEOUT)
        except OSError as error:
            await comm.write({"lost": str(error)})
            return distributed_api.DONT_REPLY
        tasks = [asyncio.ensure_future(_pump(comm, other)), asyncio.ensure_future(_pump(other, comm))]
        try:
            await other.write({"op": "gamebear_channel", "command": command, "reply": True})
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            other.abort()
            with contextlib.suppress(OSError):
                await comm.close()
        return distributed_api.DONT_REPLY


async def _pump(source: Comm, target: Comm) -> None:
    with contextlib.suppress(OSError):
        while True:
            await target.write(await source.read())
            await drained(target)


_RUNS = ("queued", "running")

_LIST_STORE = "gamebear_look"


def _architectures(state: WorkerState) -> list[str]:
    return sorted(set(ARCHITECTURES.values()) & set(state.resources))


def _checked_listing(found: object) -> tuple[dict[str, tuple[str, str]], set[str]]:
    """Validate a worker's list of jobs (state and target, by digest) and blobs; raises ValueError."""
    jobs, blobs = (found.get("jobs"), found.get("blobs")) if isinstance(found, Mapping) else (None, None)
    if not isinstance(jobs, Mapping) or not isinstance(blobs, (list, tuple)):
        raise ValueError("it lists no jobs and blobs")
    return {str(digest): (str(state), str(target)) for digest, (state, target) in jobs.items()}, set(map(str, blobs))


def _why(error: BaseException | None) -> str:
    # Dask sends `Exception(repr(error))` for an error that the worker cannot pickle.
    answer = str(error) if type(error) is Exception else repr(error)
    if distributed_api.is_missing_module(answer):
        return f"gamebear-tasks or a dependency is missing ({answer}); there: pip install 'gamebear-tasks[dask]'"
    return f"{type(error).__name__}: {error}"
