"""Dask worker plug-in: leases on slots, listings of the store, and channels to runners that clients start.

A *lease* is the task that Dask places, one for each job to build. It takes a slot, reports its worker, and lasts as
long as the job. It does not build anything itself. The client that requested it gives the job to the runner, over a
channel to this worker, as over SSH. From then on the supervisor completes the job even if client, lease, worker or
scheduler disappears.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping

from ...runner.host.arch import ARCHITECTURES
from ...runner.maintenance.garbage_collection import target_of
from ...runner.store.slots import SLOTS_VARIABLE
from ...runner.store.store import FINAL, Store, StoredJob
from ..protocol.session import CHUNK
from . import distributed_api
from .comm import PLUGIN
from .distributed_api import Comm, Worker, drained

ASK_AGAIN = 10.0
"""Seconds after which a lease whose job has not started asks whether any client still wants it."""

PAUSE = 0.25
"""Maximum seconds between two checks of a job."""

CLOSING = 2.0
"""Seconds for which a runner may continue after its input was closed."""

KNOWN = 5000
"""Maximum number of jobs, and of blobs, that a worker lists: the most recently used."""

_ERRORS_KEPT = 64 << 10

Entry = tuple[str, str]
"""A job's state (`failed seen` if a client has seen it), and its target (architecture, program, outputs)."""


class WorkerPart:
    """Request handlers on a worker."""

    def __init__(self, worker: Worker) -> None:
        distributed_api.check_worker(worker)
        self.worker = worker
        self.store = Store()
        self.hints: dict[int, asyncio.Event] = {}
        self._entries: dict[str, tuple[int, Entry]] = {}
        operations: dict[str, distributed_api.Operation] = {
            "gamebear_channel": self.channel,
            "gamebear_look": self.list_store,
            "gamebear_release": self.release,
            "gamebear_stop": self.stop,
        }
        distributed_api.extend(worker, PLUGIN, self, operations)

    async def release(self, number: int) -> None:
        """Make a lease check its job now: the job has ended, or no client will start it."""
        if number in self.hints:
            self.hints[number].set()

    async def stop(self, digest: str) -> None:
        """Stop a job that runs on another worker by now."""
        job = self.store.job(digest)
        if job.state()["state"] in _RUNS:
            job.ask_to_stop(job.written_state()["attempt"])

    async def list_store(self) -> Mapping[str, object]:
        """Return the jobs in the store with their states, and the blobs."""
        return await asyncio.to_thread(self._list_store)

    def _list_store(self) -> Mapping[str, object]:
        jobs = {}
        for digest in _latest(self.store.jobs):
            with contextlib.suppress(OSError, ValueError):
                jobs[digest] = list(self._entry(self.store.job(digest)))
        return {"jobs": jobs, "blobs": _latest(self.store.blobs)}

    def _entry(self, job: StoredJob) -> Entry:
        stamp = (job.folder / "state.json").stat().st_mtime_ns
        known = self._entries.get(job.digest)
        if known is not None and known[0] == stamp and known[1][0] in (*FINAL, "failed seen", "cancelled seen"):
            state, target = known[1]
        else:
            state, target = job.state()["state"], target_of(job)
        if state in ("failed", "cancelled") and job.was_seen(job.written_state()["attempt"]):
            state = f"{state} seen"
        self._entries[job.digest] = stamp, (state, target)
        return state, target

    async def channel(self, comm: Comm, command: str) -> object:
        """Start a program, and connect its standard input and output until it ends or the client disconnects."""
        try:
            process = await asyncio.create_subprocess_exec(
                *("sh", "-c", command),
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env={**os.environ, SLOTS_VARIABLE: str(self._slots())},
                start_new_session=True,  # Ctrl-C at the worker is for the worker only
            )
        except OSError as error:
            await comm.write({"end": None, "error": f"sh cannot be started: {error.strerror}"})
            return distributed_api.DONT_REPLY
        feeding = asyncio.ensure_future(_feed(comm, process))
        complaining = asyncio.ensure_future(_last_of(process))
        try:
            with contextlib.suppress(OSError):
                assert process.stdout
                while data := await process.stdout.read(CHUNK):
                    await comm.write({"data": data})
                    await drained(comm)
                status = await asyncio.wait_for(process.wait(), CLOSING)
                await comm.write({"end": status, "errors": await complaining})
                await drained(comm)
        except asyncio.TimeoutError:
            pass
        finally:
            for task in (feeding, complaining):
                task.cancel()
            asyncio.ensure_future(_end(process))  # noqa: RUF006 - the loop outlives it
            with contextlib.suppress(OSError):
                await comm.close()
        return distributed_api.DONT_REPLY

    def _slots(self) -> int:
        """Return the number of jobs that this worker runs at once: the sum of its architecture resources."""
        total = distributed_api.resources_of(self.worker)
        return max(1, int(sum(total.get(arch, 0) for arch in set(ARCHITECTURES.values()))))


async def _feed(comm: Comm, process: Process) -> None:
    assert process.stdin
    try:
        while isinstance(data := (await comm.read()).get("data"), bytes) and data:
            process.stdin.write(data)
            await process.stdin.drain()
    except OSError:
        pass  # one end is gone
    finally:
        process.stdin.close()  # a runner ends when its client is gone


async def _last_of(process: Process) -> bytes:
    assert process.stderr
    last = b""
    while data := await process.stderr.read(4096):
        last = (last + data)[-_ERRORS_KEPT:]
    return last


async def _end(process: Process) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), CLOSING)
        return
    with contextlib.suppress(ProcessLookupError):  # detached programs are outside its process group
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _latest(folder: os.PathLike[str]) -> list[str]:
    """Return the names of the most recently changed entries of a folder."""
    with contextlib.suppress(OSError):
        with os.scandir(folder) as entries:
            stamps = []
            for entry in entries:
                with contextlib.suppress(OSError):
                    stamps.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name))
        return [name for _, name in sorted(stamps)[-KNOWN:]]
    return []


_RUNS = ("queued", "running")


def install(dask_worker: Worker) -> str:
    """Install the handlers on a worker, unless they are there already; return the release of this package."""
    from importlib.metadata import version

    _part_of(dask_worker)
    return version("gamebear-tasks")


def _part_of(worker: Worker) -> WorkerPart:
    part = distributed_api.extension(worker, PLUGIN)
    return part if isinstance(part, WorkerPart) else WorkerPart(worker)


async def lease(digest: str, number: int) -> None:
    """Hold a slot for a job until the job has ended, or no client wants it any more.

    Args:
        digest: the job.
        number: identifier of the lease.
    """
    worker = distributed_api.current_worker()
    part = _part_of(worker)
    hint = part.hints[number] = asyncio.Event()
    job = part.store.job(digest)
    report: dict[str, object] = {"digest": digest, "number": number, "worker": worker.address}
    try:
        state = before = await asyncio.to_thread(job.state)
        begun = before["state"] in _RUNS
        wanted = await distributed_api.call_scheduler(worker, "gamebear_report", **report)
        asked = time.monotonic()
        pause = 0.02
        while begun or wanted:
            hinted = hint.is_set()
            hint.clear()  # before the check and the request, so that no later hint is missed
            state = await asyncio.to_thread(job.state)
            begun = begun or state.get("attempt") != before.get("attempt") or state["state"] in _RUNS
            if begun and state["state"] not in _RUNS:
                break
            if not begun and (hinted or time.monotonic() > asked + ASK_AGAIN):
                wanted = await distributed_api.call_scheduler(worker, "gamebear_report", **report)
                asked = time.monotonic()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(hint.wait(), pause)
            pause = min(pause * 1.3, PAUSE)
    finally:
        del part.hints[number]
    entry = [state["state"], target_of(job)] if begun else None
    await distributed_api.call_scheduler(worker, "gamebear_report", **report, entry=entry)
