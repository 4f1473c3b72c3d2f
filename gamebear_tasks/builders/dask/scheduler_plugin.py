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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from distributed import Client, Future, Scheduler, wait
from distributed.comm.core import Comm, connect
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import WorkerState
from distributed.security import Security

from ...runner.host.arch import ARCHITECTURES
from . import worker_plugin
from .comm import PLUGIN, PROTOCOL, drained

GRACE = 60.0
"""Seconds within which a disconnected client may return before its interest in jobs expires."""

LOOKING = 5.0
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
        prefer: the only acceptable worker while it is available, because the job already runs on it.
        waiters: clients that want the job.
        future: Dask's future, once the lease is submitted.
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
    future: Future[None] | None = None
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
        asked: time of the query (`time.monotonic`); 0 until the worker has answered, and may not be used.
    """

    jobs: dict[str, str] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    blobs: set[str] = field(default_factory=set)
    error: str = ""
    asked: float = 0.0


class SchedulerPart(SchedulerPlugin):  # type: ignore[misc]  # Dask has no types here
    """Plug-in that installs `Cluster` on a scheduler; clients register it, pickled by reference."""

    def __init__(self) -> None:
        self.name = PLUGIN
        self.cluster: Cluster | None = None

    async def start(self, scheduler: Scheduler) -> None:
        """Install the cluster, without awaiting anything: two clients may register the plug-in concurrently."""
        self.cluster = _clusters.get(id(scheduler))
        if self.cluster is None:
            self.cluster = _clusters[id(scheduler)] = Cluster(scheduler)

    async def before_close(self) -> None:
        """Close the cluster before the scheduler closes."""
        if self.cluster is not None:
            await self.cluster.close()

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Register a new worker."""
        if self.cluster is not None:
            self.cluster.add_worker(worker)

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Unregister a worker that has gone."""
        if self.cluster is not None:
            self.cluster.remove_worker(worker)

    def transition(self, key: Any, start: str, finish: str, *_: Any, **__: Any) -> None:
        """Handle a task without a worker: the workers for its lease may have gone before Dask received it."""
        if self.cluster is None or finish != "no-worker":
            return
        if self.cluster.scheduler.tasks[key].worker_restrictions:
            asyncio.get_running_loop().call_soon(self.cluster.loosen)  # not during the scheduler's own transition


class Cluster:
    """The jobs and workers of one scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.leases: dict[str, Lease] = {}
        self.queue: deque[Lease] = deque()
        self.known: dict[str, Known] = {}
        self.looks: dict[str, asyncio.Task[None]] = {}
        self.present: Counter[str] = Counter()
        self._numbers = itertools.count(int(time.time() * 1000) << 8)  # differ from those of an earlier scheduler
        self._client: Client | None = None
        self._opening = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        scheduler.handlers[PLUGIN] = self.serve
        scheduler.handlers["gamebear_relay"] = self.relay
        scheduler.handlers["gamebear_report"] = self.report
        for worker in scheduler.workers:
            self.add_worker(worker)

    def _begin(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def client(self) -> Client:
        """Return the Dask client that places leases; open it on first use."""
        async with self._opening:
            if self._client is None:
                self._client = await Client(
                    self.scheduler.address,
                    asynchronous=True,
                    security=_as_client(self.scheduler.security),
                    set_as_default=False,
                    name=PLUGIN,
                )
            return self._client

    async def close(self) -> None:
        """Close the Dask client."""
        for task in self._tasks:
            task.cancel()
        if self._client is not None:
            await self._client.close(timeout=1)

    # workers

    def add_worker(self, worker: str) -> None:
        """Register a new worker: query its store, then use it."""
        self.known[worker] = Known()
        self._look(worker)

    def remove_worker(self, worker: str) -> None:
        """Unregister a worker that has gone: Dask places its leases again."""
        self.known.pop(worker, None)
        task = self.looks.pop(worker, None)
        if task is not None:
            task.cancel()
        for lease in self.leases.values():
            if lease.worker == worker:
                lease.worker = lease.prefer = ""
        self.loosen()

    def loosen(self) -> None:
        """Permit any worker of the right architecture for leases whose own workers have gone.

        Dask's `allow_other_workers` does the same, but also ignores the architecture if no worker of it is left.
        """
        for lease in list(self.leases.values()):
            task = self.scheduler.tasks.get(lease.key)
            if task is None or task.state != "no-worker" or not task.worker_restrictions:
                continue
            if not any(worker in self.scheduler.workers for worker in task.worker_restrictions):
                task.worker_restrictions = set()
                self.scheduler.transitions({lease.key: "processing"}, stimulus_id=f"{PLUGIN}-{lease.number}")

    def _look(self, worker: str) -> asyncio.Task[None]:
        if worker not in self.looks:
            self.looks[worker] = task = self._begin(self._look_at(worker))
            task.add_done_callback(lambda _: self.looks.pop(worker, None))
        return self.looks[worker]

    async def _look_at(self, worker: str) -> None:
        known = Known(asked=time.monotonic())
        state = self.scheduler.workers.get(worker)
        if state is None or not _architectures(state):
            return
        try:
            client = await self.client()
            (said,) = (await client.run(worker_plugin.install, workers=[worker], on_error="return")).values()
            if isinstance(said, BaseException):
                known.error = _why(said)
            elif said != version("gamebear-tasks"):
                known.error = f"it has gamebear-tasks {said}, and the scheduler {version('gamebear-tasks')}"
            else:
                found = await self.scheduler.rpc(worker).gamebear_look()
                known.jobs = {digest: state for digest, (state, _) in found["jobs"].items()}
                known.targets = {target for _, target in found["jobs"].values()}
                known.blobs = set(found["blobs"])
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
                    await self.scheduler.rpc(worker).gamebear_stop(digest=digest)

    async def _look_at_all(self, older: float) -> None:
        """Refresh lists of workers' stores older than `older` seconds, for a bounded time."""
        now = time.monotonic()
        looks = [self._look(worker) for worker, known in self.known.items() if now - known.asked > older]
        if looks:
            await asyncio.wait(looks, timeout=LOOKING)

    def _usable(self, arch: str) -> list[WorkerState]:
        return [
            state
            for worker, state in self.scheduler.workers.items()
            if state.resources.get(arch, 0) >= 1
            and (known := self.known.get(worker)) is not None
            and known.asked
            and not known.error
        ]

    def _why_not(self, state: WorkerState) -> str:
        """Return the reason why a worker with slots cannot be used."""
        known = self.known.get(state.address, Known())
        return known.error or ("" if known.asked or not _architectures(state) else "it has not said yet what it has")

    def _holder(self, digest: str, states: Iterable[str]) -> str:
        for worker, known in self.known.items():
            if known.jobs.get(digest, "") in states and worker in self.scheduler.workers:
                return worker
        return ""

    # leases

    def _admit(self) -> None:
        """Submit the leases for which there are slots to Dask, first come first served."""
        for lease in list(self.queue):
            usable = self._usable(lease.arch)
            taken = sum(other.future is not None and other.arch == lease.arch for other in self.leases.values())
            if not lease.prefer and taken >= sum(int(state.resources[lease.arch]) for state in usable):
                continue
            self.queue.remove(lease)
            free = [
                state for state in usable if state.resources[lease.arch] - state.used_resources.get(lease.arch, 0) >= 1
            ]
            places = [lease.prefer] if lease.prefer else self._best(lease, free)
            lease.future = _PLACING  # holds its slot from now on
            self._begin(self._place(lease, places))

    def _best(self, lease: Lease, free: Iterable[WorkerState]) -> list[str]:
        """Return the free workers that have most of a job's needs: first its package images, then its files."""
        scores = {}
        for state in free:
            known = self.known[state.address]
            scores[state.address] = (lease.target in known.targets, len(lease.blobs & known.blobs))
        best = max(scores.values(), default=None)
        return [worker for worker, score in scores.items() if score == best]

    async def _place(self, lease: Lease, places: list[str]) -> None:
        try:
            client = await self.client()
            lease.future = future = client.submit(
                worker_plugin.lease,
                lease.digest,
                lease.number,
                key=lease.key,
                resources={lease.arch: 1},
                workers=[worker for worker in places if worker in self.scheduler.workers] or None,
                pure=False,
            )
            with client.as_current():
                await wait([future])
            if future.status == "error":
                lease.error = _why(await future.exception())
        except asyncio.CancelledError:
            lease.error = "Dask has cancelled it"
        except Exception as error:  # noqa: BLE001 - a task may raise anything
            lease.error = _why(error)
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
        elif not lease.waiters and lease.future is None:
            self._over(lease)

    async def _release(self, lease: Lease) -> None:
        with contextlib.suppress(OSError, AttributeError):
            await self.scheduler.rpc(lease.worker).gamebear_release(number=lease.number)

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

    async def serve(self, comm: Comm, protocol: int, client: str) -> Status:
        """Answer a client's requests concurrently until it disconnects."""
        await comm.write({"protocol": PROTOCOL, "version": version("gamebear-tasks")})
        if protocol != PROTOCOL:
            return Status.dont_reply
        self.present[client] += 1
        looking = self._begin(self._look_at_all(STALE))
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                question = await comm.read()
                task = asyncio.ensure_future(self._answer(comm, client, looking, **question))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except OSError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            self.present[client] -= 1
            asyncio.get_running_loop().call_later(GRACE, self._leave, client)
            comm.abort()
        return Status.dont_reply

    def _leave(self, client: str) -> None:
        if self.present[client] > 0:
            return
        del self.present[client]
        for lease in list(self.leases.values()):
            if client in lease.waiters:
                lease.waiters.discard(client)
                self._drop(lease)

    async def _answer(
        self, comm: Comm, client: str, looking: asyncio.Task[Any], id: int, ask: str, **more: Any
    ) -> None:
        await asyncio.wait([looking], timeout=LOOKING)
        try:
            answer = await getattr(self, f"ask_{ask}")(client, **more)
        except Exception as error:  # noqa: BLE001 - reported to the waiting client
            answer = {"error": f"The scheduler cannot answer ({error!r})."}
        with contextlib.suppress(OSError):
            await comm.write({**answer, "id": id})

    async def ask_place(
        self,
        client: str,
        digest: str,
        arch: str,
        name: str,
        target: str,
        blobs: list[str],
        again: bool,
        wait: float,
    ) -> Mapping[str, Any]:
        """Return the worker for a job; wait up to `wait` seconds for a slot."""
        lease = self.leases.get(digest)
        if lease is None or not lease.worker:
            holder = self._holder(digest, ("done",) if again else ("done", "failed", "cancelled"))
            if holder:
                return {"worker": holder}
        runs_on = self._holder(digest, _RUNS)
        if lease is None and runs_on and not self.scheduler.workers[runs_on].resources.get(arch, 0):
            return {"worker": runs_on}  # it has no slots any more, so no lease can be placed there
        if lease is None:
            lease = Lease(next(self._numbers), digest, arch, name, target, frozenset(blobs), runs_on)
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

    async def ask_release(self, client: str, digest: str) -> Mapping[str, Any]:
        """Note that a client no longer waits for a job, or has seen its end."""
        lease = self.leases.get(digest)
        if lease is not None:
            lease.waiters.discard(client)
            if lease.worker or not lease.waiters:
                self._drop(lease)
        return {}

    async def ask_where(self, client: str, digest: str) -> Mapping[str, Any]:
        """Return the worker that has a job, in any state."""
        lease = self.leases.get(digest)
        if lease is not None and lease.worker:
            return {"worker": lease.worker}
        states = (*_RUNS, "done", "failed", "cancelled", "failed seen", "cancelled seen")
        if not self._holder(digest, states):
            await self._look_at_all(1.0)
        return {"worker": self._holder(digest, states), "queued": lease is not None}

    async def ask_worker(self, client: str, worker: str) -> Mapping[str, Any]:
        """Return whether a worker is available."""
        return {"there": worker in self.scheduler.workers}

    async def ask_workers(self, client: str) -> Mapping[str, Any]:
        """Return the workers with their resources."""
        await self._look_at_all(STALE)
        return {"workers": self._workers()}

    def _workers(self) -> list[Mapping[str, Any]]:
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

    async def relay(self, comm: Comm, worker: str, command: str) -> Status:
        """Relay between a client and a program on a worker that the client cannot reach directly."""
        try:
            if worker not in self.scheduler.workers:
                raise OSError(f"{worker} has gone")
            other = await connect(worker, timeout=LOOKING, deserialize=False, **self.scheduler.connection_args)
        except OSError as error:
            await comm.write({"lost": str(error)})
            return Status.dont_reply
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
        return Status.dont_reply


async def _pump(source: Comm, target: Comm) -> None:
    with contextlib.suppress(OSError):
        while True:
            await target.write(await source.read())
            await drained(target)


_RUNS = ("queued", "running")

_PLACING: Any = object()
"""Placeholder for the future of a lease that is being submitted to Dask."""

_clusters: dict[int, Cluster] = {}


def _architectures(state: WorkerState) -> list[str]:
    return sorted(set(ARCHITECTURES.values()) & set(state.resources))


def _as_client(security: Security | None) -> Security | None:
    """Return a scheduler's TLS settings for a client of it; the scheduler's certificate is the fallback."""
    if security is None or not security.tls_scheduler_cert:
        return security
    return Security(
        tls_ca_file=security.tls_ca_file,
        tls_ciphers=security.tls_ciphers,
        tls_client_cert=security.tls_client_cert or security.tls_scheduler_cert,
        tls_client_key=security.tls_client_key or security.tls_scheduler_key,
        require_encryption=security.require_encryption,
    )


def _why(error: BaseException) -> str:
    if "No module named" in str(error):
        return "it has no gamebear-tasks; there: pip install 'gamebear-tasks[dask]'"
    return f"{type(error).__name__}: {error}"
