"""Builder `dask://scheduler:8786` (`dask+tls://`): a cluster of workers behind one URL.

Dask places the jobs on workers of the right architecture, one slot each. The client then uses the worker directly like
any other builder, with the same runner, store and supervisor. So a job survives the same faults as over SSH. Dask is
imported only when something must be built.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

from ...errors import BuilderError, BuilderLost, SettingsError
from ...runner.host.arch import ARCHITECTURES
from ...runner.store.builder_config import MAX_SLOTS
from ...util.messages import notice
from ...util.text import size
from ...util.urls import shown
from ..base import Builder, JobEntry, Kept, Order, Pruned, Sink, Status
from ..protocol.client import RunnerBuilder
from ..protocol.reconnect import PATIENCE
from ..protocol.session import words_of
from ..protocol.transport import Connection

if TYPE_CHECKING:
    from .client import Link

T = TypeVar("T")

WAIT = 20.0
"""Seconds for which the scheduler holds its answer while there is no free slot; `FIRST_WAIT` for the first request."""

FIRST_WAIT = 2.0

COMING_BACK = 30.0
"""Seconds for which to search for a job whose worker has gone: the worker may return under another address."""

TRIES = 5
"""Consecutive times that a worker may disappear right after the scheduler has named it."""

PAUSE = 0.5
"""Seconds before requesting a worker again after the named one has disappeared."""

WORKERS = 1000
"""Maximum number of workers processed; at most `MAX_REASONS` unusable ones are listed in a message."""

MAX_REASONS = 5

AT_ONCE = 8
"""Number of workers to query concurrently."""

_SCHEMES = {"dask": "tcp", "dask+tls": "tls"}


class WorkerGone(BuilderError):
    """The worker has gone; its jobs may be found on another worker, or are built again."""


@dataclass(frozen=True)
class Member:
    """A worker, as the scheduler describes it, validated.

    Attributes:
        address: Dask address.
        error: reason why it cannot be used.
        slots: number of slots by architecture.
        busy: number of slots in use by architecture.
    """

    address: str
    error: str
    slots: Mapping[str, int]
    busy: Mapping[str, int]


class DaskBuilder:
    """The workers of a Dask scheduler, as one builder.

    Args:
        url: the builder's name in messages and settings.
        address: the scheduler's Dask address.
    """

    def __init__(self, url: str, address: str) -> None:
        self.url = url
        self.address = address
        self.patience = PATIENCE
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._runners: dict[str, RunnerBuilder] = {}
        self._places: dict[str, str] = {}
        self._ended: set[str] = set()
        self._gone: Counter[str] = Counter()
        self._noticed: set[str] = set()

    # builder interface

    def submit(self, order: Order, again: bool = False) -> Status:
        """Start a job, unless it is running or done already; wait for a slot if it must be built."""
        digest = order.job.digest
        self._ended.discard(digest)
        try:
            for count in range(1, TRIES + 1):
                worker = self._place(order, again)
                self._places[digest] = worker
                self._check_wanted(digest)
                try:
                    status = self._runner(worker).submit(order, again)
                    break
                except WorkerGone:
                    self._forget(worker)
                    if count == TRIES:
                        raise
                    time.sleep(PAUSE)
            if status.is_final:
                self._release(digest)
        except Exception:
            self._release(digest)  # free the unused slot for others
            raise
        return self._with_worker(worker, status)

    def follow(self, digest: str, attempt: str, offset: int) -> tuple[Status, bytes]:
        """Wait a bounded time for news of a job, on any worker."""
        news = self._news(digest, attempt, lambda runner: runner.follow(digest, attempt, offset))
        if news is None:
            self._gone[digest] += 1
            if self._gone[digest] < TRIES:
                time.sleep(PAUSE)
                return Status("running", attempt), b""
            del self._gone[digest]
            return Status("lost", attempt), b""
        self._gone.pop(digest, None)
        status, log = news
        if status.is_final and status.state != "lost" and not log:  # a lost job is resubmitted on the same lease
            self._release(digest)
        return news

    def _news(
        self, digest: str, attempt: str, ask: Callable[[RunnerBuilder], tuple[Status, bytes]]
    ) -> tuple[Status, bytes] | None:
        """Ask the worker that has a job; return the state `lost` if none has it, None if the worker disconnects."""
        place = self._find(digest)
        if place is None:
            return Status("lost", attempt), b""
        worker, runner = place
        try:
            status, log = ask(runner)
        except WorkerGone:
            self._forget(worker)
            return None
        return self._with_worker(worker, status), log

    def fetch(self, digest: str, attempt: str, name: str, offset: int, target: Sink, limit: int) -> None:
        """Write an output's content from `offset` on to a sink."""
        got = _Counted(target)
        for _ in range(TRIES):
            place = self._find(digest)
            if place is None:
                break
            worker, runner = place
            try:
                runner.fetch(digest, attempt, name, offset + got.count, got, limit - got.count)
                return
            except WorkerGone:
                self._forget(worker)
                time.sleep(PAUSE)
        raise BuilderLost(
            f"{self.url} has lost the worker of job {digest[:12]}.", "Run doit again: another worker builds it."
        )

    def cancel(self, digest: str, attempt: str) -> bool:
        """Cancel a job, unless another client waits for it."""
        self._ended.add(digest)  # a thread that waits for its placement stops
        worker = self._places.get(digest)
        try:
            return worker is None or self._runner(worker).cancel(digest, attempt)
        except WorkerGone:
            return True
        finally:
            self._release(digest)

    def jobs(self, limit: int | None = None, prefix: str = "") -> tuple[list[JobEntry], int]:
        """Return the workers' jobs; workers that cannot be queried are reported and left out."""
        found: list[JobEntry] = []
        total = 0
        for worker, answer in self._each(lambda runner: runner.jobs(limit, prefix)).items():
            if isinstance(answer, BuilderError):
                self._notice_once(f"{worker} cannot list its jobs: {answer}")
                continue
            entries, count = answer
            total += count
            found += [replace(entry, where=worker) for entry in entries]
        found.sort(key=lambda entry: (entry.is_final, entry.age))
        for entry in reversed(found):
            self._places[entry.digest] = entry.where  # several attempts: prefer the running one
        return (found if limit is None else found[:limit]), total

    def watch(self, digest: str, attempt: str, offset: int) -> tuple[Status, bytes]:
        """Wait a bounded time for news of a job, without counting as waiting for it."""
        news = self._news(digest, attempt, lambda runner: runner.watch(digest, attempt, offset))
        return news or (Status("lost", attempt), b"")

    def end(self, digest: str, attempt: str, force: bool = False) -> tuple[str, ...]:
        """Cancel a job, unless others wait for it; return those who do."""
        place = self._find(digest)
        if place is None:
            raise WorkerGone(
                f"{self.url} has lost the worker of job {digest[:12]}.", "Run `gamebear jobs` to list the jobs."
            )
        return place[1].end(digest, attempt, force)

    def materials(self, digest: str, attempt: str) -> Mapping[str, object]:
        """Return the materials of a result, from the worker that has it."""
        place = self._find(digest)
        if place is None:
            raise BuilderError(f"{self.url} has lost the worker of job {digest[:12]}.", "Build it again.")
        return place[1].materials(digest, attempt)

    def forget(self, digest: str) -> int | None:
        """Remove a job that does not run, from each worker that has it; return the bytes freed, None if none has it."""
        self._places.pop(digest, None)
        found = self._each(lambda runner: runner.forget(digest)).values()
        for error in found:
            if isinstance(error, BuilderError) and not isinstance(error, WorkerGone):
                raise error
        freed = [count for count in found if isinstance(count, int)]
        return sum(freed) if freed else None

    def discard(self, digest: str, attempt: str) -> None:
        """Verify a result on its worker, and drop it if it is damaged."""
        place = self._find(digest)
        if place is None:
            return
        worker, runner = place
        try:
            runner.discard(digest, attempt)
        except WorkerGone:
            self._forget(worker)  # its result is gone too

    def kept(self, digest: str) -> Kept | None:
        """Return the containers that the job's worker retains."""
        runner = self._builder_of(digest)
        return None if runner is None else runner.kept(digest)

    def enter(self, digest: str, container: int, words: Sequence[str]) -> int:
        """Run a command in a retained container, on the worker that has it."""
        runner = self._builder_of(digest)
        if runner is None:
            raise WorkerGone(f"{self.url} has lost the worker with the retained container.", "Restart the worker.")
        return runner.enter(digest, container, words)

    def _builder_of(self, digest: str) -> RunnerBuilder | None:
        """Return the worker that has a job; None if it is not available now."""
        worker = self._places.get(digest) or self._ask("where", digest=digest).get("worker")
        return self._runner(_address(worker, self.url)) if worker else None

    def prune(
        self, older: float | None = None, size: int | None = None, keep: int | None = None, images: bool = False
    ) -> Pruned:
        """Remove unused entries of each worker's store; `size` applies to each worker."""
        total = Pruned()
        for worker, pruned in self._each(lambda runner: runner.prune(older, size, keep, images)).items():
            if isinstance(pruned, BuilderError):
                total = replace(total, left=(*total.left, f"{worker}: {pruned}"))
                continue
            counts = {
                item.name: getattr(total, item.name) + getattr(pruned, item.name)
                for item in fields(Pruned)
                if item.name != "left"
            }
            total = Pruned(**counts, left=(*total.left, *(f"{worker}: {reason}" for reason in pruned.left)))
        return total

    def describe(self) -> Mapping[str, object]:
        """Return the workers and their properties."""
        descriptions = self._each(lambda runner: runner.describe())
        about: dict[str, object] = {"scheduler": self.address}
        for item in self._workers():
            counts = [f"{arch} {item.busy.get(arch, 0)} of {count} busy" for arch, count in sorted(item.slots.items())]
            slots = ", ".join(counts) or "no architecture"
            found = descriptions.get(item.address)
            if item.error or isinstance(found, BuilderError):
                about[item.address] = f"{slots}; {item.error or found}"
                continue
            if found is not None:
                free = found.get("free")
                has = "buildah" if found.get("buildah") in (True, "True") else "no buildah"
                slots += f"; {found.get('host')}, {found.get('machine')}, Python {found.get('python')}, {has}"
                slots += f", {size(free)} free" if type(free) is int else ""
            about[item.address] = slots
        return about

    def members(self) -> Mapping[str, Builder | str]:
        """Return each worker as a builder, or the reason why it cannot be used."""
        return {
            item.address: item.error
            or (self._runner(item.address) if item.slots else "it offers no architecture (--resources)")
            for item in self._workers()
        }

    def close(self) -> None:
        """Close the connections; the next request opens them again."""
        if self._pid != os.getpid():
            return  # the connections belong to the parent process
        with self._lock:
            link, self._link = self._link, None
            runners = list(self._runners.values())
        for runner in runners:
            runner.close()
        if link is not None:
            link.close()

    # placement

    def _place(self, order: Order, again: bool) -> str:
        """Return the worker for a job; wait for a slot, and notify the user of the wait."""
        job = order.job
        target = json.dumps([job.arch, job.program, sorted(job.outputs)])
        until: float | None = None
        wait = FIRST_WAIT
        while True:
            self._check_wanted(job.digest)
            answer = self._ask(
                "place",
                digest=job.digest,
                arch=job.arch,
                name=re.sub(r"[^\w.]+", "_", job.program)[:60] or "job",
                target=target,
                blobs=sorted(order.files)[:1000],
                again=again,
                fresh=bool(order.fresh),
                wait=wait,
            )
            wait = WAIT
            if "worker" in answer:
                return _address(answer["worker"], self.url)
            if answer.get("slots"):
                until = None
                if "workers" in answer:
                    self._notice_once(f"{self.url} has no free slot for {job.arch} now; waiting for one")
                else:
                    time.sleep(0.1)  # the lease has just ended; the scheduler answers this at once
                continue
            there = _known_slots(answer.get("workers"))
            if until is None:
                until = time.monotonic() + self.patience
                self._notice_once(
                    f"{self.url} has no worker for {job.arch} ({there}); waiting for one for {self.patience:g} seconds"
                )
            wait = min(WAIT, max(0.1, until - time.monotonic()))
            if time.monotonic() > until:
                raise BuilderError(
                    f"{self.url} has no worker for {job.arch}: {there}.",
                    f'Start one: dask worker {self.address} --nthreads 1 --resources "{job.arch}=1"',
                )

    def _check_wanted(self, digest: str) -> None:
        """Raise BuilderError if another thread has cancelled the job since it was submitted."""
        if digest in self._ended:
            raise BuilderError(f"{self.url} has removed job {digest[:12]} from its queue.", "Run doit again.")

    def _find(self, digest: str) -> tuple[str, RunnerBuilder] | None:
        """Return the worker that has a job; wait for a worker that may return; None if none has it."""
        until: float | None = None
        while True:
            worker = self._places.get(digest)
            if worker is not None:
                return worker, self._runner(worker)
            answer = self._ask("where", digest=digest)
            if answer.get("worker"):
                self._places[digest] = _address(answer["worker"], self.url)
                continue
            until = until or time.monotonic() + min(COMING_BACK, self.patience)
            if answer.get("queued") or time.monotonic() > until:
                return None
            time.sleep(PAUSE)

    def _forget(self, worker: str) -> None:
        """Forget a worker that has gone."""
        with self._lock:
            runner = self._runners.pop(worker, None)
            for digest in [digest for digest, place in self._places.items() if place == worker]:
                del self._places[digest]
        if runner is not None:
            runner.close()

    def _runner(self, worker: str) -> RunnerBuilder:
        """Return a worker as a builder."""
        self._connected()
        with self._lock:
            runner = self._runners.get(worker)
            if runner is None:
                runner = RunnerBuilder(self.url, f"worker {worker}", lambda: self._connect(worker))
                runner.patience = self.patience
                self._runners[worker] = runner
            return runner

    def _connect(self, worker: str) -> Connection:
        if not self._ask("worker", worker=worker).get("there"):
            raise WorkerGone(f"{self.url} has lost the worker {worker}.", "Run doit again.")
        return self._connected().connection(worker)

    def _release(self, digest: str) -> None:
        """Notify the scheduler that the job's end was seen, or that this client no longer waits for it."""
        with contextlib.suppress(BuilderError):  # best effort: the lease notices by itself
            self._ask("release", patience=0.0, digest=digest)

    # scheduler

    def _connected(self) -> Link:
        if self._pid != os.getpid():
            self._reset()  # forked: the connections belong to the parent process
        with self._lock:
            if self._link is None:
                from .client import Link

                self._link = Link(self.url, self.address)
            return self._link

    def _ask(self, ask: str, patience: float | None = None, **more: object) -> Mapping[str, object]:
        return self._connected().ask(ask, self.patience if patience is None else patience, **more)

    def _workers(self) -> list[Member]:
        return _checked_workers(self._ask("workers").get("workers"), self.url)

    def _each(self, ask: Callable[[RunnerBuilder], T]) -> dict[str, T | BuilderError]:
        """Query each usable worker."""

        def one(worker: str) -> T | BuilderError:
            try:
                return ask(self._runner(worker))
            except BuilderError as error:
                return error

        workers = [item.address for item in self._workers() if item.slots and not item.error]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(workers, pool.map(one, workers), strict=True))

    def _with_worker(self, worker: str, status: Status) -> Status:
        """Return a status whose failure message names the worker."""
        if status.failure is None:
            return status
        return replace(
            status,
            failure=replace(status.failure, message=f"{status.failure.message.removesuffix('.')} (worker {worker})."),
        )

    def _notice_once(self, text: str) -> None:
        """Show a notice once."""
        with self._lock:
            if text in self._noticed:
                return
            self._noticed.add(text)
        notice(text)


class _Counted:
    """Sink that counts the bytes written to another sink."""

    def __init__(self, target: Sink) -> None:
        self.count = 0
        self._target = target

    def write(self, data: bytes, /) -> None:
        """Append all of `data`."""
        self._target.write(data)
        self.count += len(data)

    def skip(self, count: int, /) -> None:
        """Append a hole."""
        self._target.skip(count)
        self.count += count


def _address(text: object, url: str) -> str:
    """Validate a worker's address, which is untrusted."""
    if isinstance(text, str) and len(text) < 300 and re.fullmatch(r"(tcp|tls)://[\w.:\[\]%-]+:\d+", text, re.ASCII):
        return text
    raise BuilderError(
        f"{url} sends an invalid worker address: {words_of(text)[:100]}.",
        "Check the scheduler's address, and install the same release of gamebear-tasks on client and workers.",
    )


def _checked_workers(items: object, url: str) -> list[Member]:
    found = []
    for item in items[:WORKERS] if isinstance(items, list) else []:
        item = item if isinstance(item, dict) else {}
        error = words_of(item.get("error") or "")[:1000]
        found.append(
            Member(_address(item.get("worker"), url), error, _counts(item.get("slots")), _counts(item.get("busy")))
        )
    return found


def _counts(value: object) -> dict[str, int]:
    if not isinstance(value, dict):
        return {}
    known = set(ARCHITECTURES.values()) & set(value)
    return {arch: min(value[arch], MAX_SLOTS) for arch in known if type(value[arch]) is int and value[arch] >= 0}


def _known_slots(workers: object) -> str:
    """Return a summary of the available slots and unusable workers, for the message that no worker fits."""
    total: dict[str, int] = {}
    broken: list[str] = []
    count = 0
    for item in workers[:WORKERS] if isinstance(workers, list) else []:
        count += 1
        item = item if isinstance(item, dict) else {}
        for arch, slots in _counts(item.get("slots")).items():
            total[arch] = total.get(arch, 0) + slots
        if item.get("error") and len(broken) < MAX_REASONS:
            broken.append(f"{words_of(item.get('worker'))[:100]} cannot be used: {words_of(item['error'])[:400]}")
    if not count:
        return "no worker is there"
    offers = ", ".join(f"{arch}={slots}" for arch, slots in sorted(total.items())) or "no architecture"
    return "; ".join([f"its {count} workers offer {offers}" if count > 1 else f"its worker offers {offers}", *broken])


def open_builder(url: str) -> DaskBuilder:
    """Open `dask://scheduler[:port]`, or `dask+tls://`.

    Raises:
        SettingsError: the URL does not name a scheduler, or Dask is not installed here.
    """
    scheme, _, place = url.partition("://")
    host, _, port = place.rpartition(":") if re.search(r":\d{,5}\Z", place, re.ASCII) else (place, "", "8786")
    named = re.fullmatch(r"\[[0-9a-fA-F:.%]+\]|[\w.-]+", host, re.ASCII)
    if scheme not in _SCHEMES or not named or not 1 <= int(port or 8786) <= 65535:
        raise SettingsError(
            f"The builder {shown(url)!r} is not the address of a Dask scheduler.",
            "Use builder=dask://HOST:8786, or dask+tls://HOST:8786 with the certificates in Dask's configuration.",
        )
    if importlib.util.find_spec("distributed") is None:
        raise SettingsError(
            f"The builder {shown(url)!r} requires Dask, which is not installed.",
            "Run pip install 'gamebear-tasks[dask]'",
        )
    return DaskBuilder(url, f"{_SCHEMES[scheme]}://{host}:{port or 8786}")
