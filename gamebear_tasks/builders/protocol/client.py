"""Builder that uses the runner over any connection that can start programs; shared by `local:`, `ssh:` and `dask:`.

Requests are idempotent: after a lost connection they are retried on another session.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import os
import platform
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import INVALID_REPLY, BuilderError, BuilderLost, SourceError
from ...jobspec.spec import File, Job
from ...records.task_record import expected
from ...runner.protocol import requests
from ...util.text import size
from ..base import JobEntry, Kept, Order, Pruned, Sink, Status
from . import responses
from .flood_guard import Rounds
from .session import CHUNK, Body, Bytes, FileFrom, Take, refusal, words_of
from .session_pool import SessionPool
from .transport import Connection

if TYPE_CHECKING:
    from ...runner.protocol.requests import Progress, Terminal

INLINE = 16 << 10
"""Bytes of small files sent with the first request, because the builder probably lacks them."""

BATCH = 4 << 20
"""Bytes of small files in one request."""

FOLLOW = 20.0
"""Seconds for which a builder holds its answer while there is no news (long polling)."""

SOON = 1.0
"""Seconds for which a builder holds its answer to a new job, because the job may finish within this time."""

ENDS = 16
"""Number of cached job results that arrived with another answer, until they are requested.

One takes up to 128 KiB from the answer to `submit`, and up to 320 KiB from the answer to `follow`.
"""

SHORT = 0.2
"""Minimum seconds before an answer without news. A runner never answers earlier; a faster builder is throttled."""

PAGE = 500
"""Jobs requested at once; `JOBS` limits their total number."""

JOBS = 100_000

EXAMINATION = 300.0
"""Seconds within which a builder must finish its diagnostics; the first run takes a minute on a Pi with a slow card."""

SILENT_SCRIPT = 900.0
"""Seconds for which a script may print nothing: unpacking packages is slow on a memory card."""

TRIES = 8
"""Consecutive failures of a request without progress after which the builder, not the network, is considered broken."""


class RunnerBuilder:
    """A builder reached over a connection that can start programs.

    Args:
        url: the builder's name in messages and settings.
        place: the builder's name in error messages, such as `pi@buildpi`.
        connect: opens a connection. Raises BuilderLost if a retry may succeed, BuilderError if not.
    """

    def __init__(self, url: str, place: str, connect: Callable[[], Connection]) -> None:
        self.url = url
        self.place = place
        self.client = os.urandom(8).hex()
        self._sessions = SessionPool(place, connect)
        self._ends: dict[tuple[str, str], _End] = {}
        self._now: dict[tuple[str, str], Progress] = {}

    @property
    def patience(self) -> float:
        """Seconds for which to retry a lost connection."""
        return self._sessions.patience

    @patience.setter
    def patience(self, seconds: float) -> None:
        self._sessions.patience = seconds

    # builder interface

    def submit(self, order: Order, again: bool = False) -> Status:
        """Start a job, unless it is running or done already."""
        job = order.job
        files = dict(order.files)
        has_trees = job.is_function or any("folder" not in source for source in job.sources.values())
        trees: dict[str, str] | None = None if has_trees else {}
        needs = sorted({file.sha256 for file in _files_of(job)})
        inline = _small_files(needs, files, INLINE)
        end = bytearray()

        def start() -> list[bytes]:
            end.clear()
            return [data for _, data in inline]

        asked: set[str] = set()
        tries = 0
        while tries < TRIES:
            reply = self._request(
                requests.Submit(
                    digest=job.digest,
                    job=job.canonical.decode("ascii"),
                    client=self.client,
                    blobs=[(sha256, len(data)) for sha256, data in inline],
                    trees=trees,
                    needs=needs,
                    time_limit=order.time_limit,
                    base=order.base,
                    python=order.python,
                    again=again,
                    fresh=order.fresh,
                    who=_who(),
                    keep=order.keep_failed,
                    wait=0.0 if self._sessions.are_scarce else SOON,
                ),
                start,
                end.extend,
                limit=CHUNK * 4,
            )
            if reply.get("state") != "absent":
                status = responses.status(self.place, reply, joined=not reply.get("started"))
                self._log_of(job.digest, status, reply, bytes(end), 0)
                return status
            lacks = responses.lacks(self.place, reply)
            wanted = {sha256 for sha256, _ in lacks.blobs}
            tries = 0 if wanted - asked else tries + 1
            asked |= wanted
            if lacks.trees:
                fetched = order.fetch_trees()
                trees = {name: sha256 for name, (sha256, _) in fetched.items()}
                files.update(fetched.values())
                inline = []
                if not lacks.blobs:
                    continue
            inline = self._upload(lacks.blobs, files)
        raise BuilderError(
            f"{self.place} repeatedly loses uploaded files of job {job.digest[:12]}.",
            "Check its disk (df, dmesg), then run doit again.",
        )

    def follow(self, digest: str, attempt: str, offset: int) -> tuple[Status, bytes]:
        """Wait a bounded time for news of a job."""
        known = self._ends.get((digest, attempt))
        if known is not None and known.offset <= offset:
            return known.status, known.log[offset - known.offset :]
        return self._follow(digest, attempt, offset, self.client)

    def _follow(self, digest: str, attempt: str, offset: int, client: str) -> tuple[Status, bytes]:
        body = bytearray()

        def start() -> list[bytes]:
            body.clear()
            return []

        asked = time.monotonic()
        known = self._now.get((digest, attempt))
        reply = self._request(
            requests.Follow(
                digest=digest,
                attempt=attempt,
                client=client,
                offset=offset,
                wait=0.5 if self._sessions.are_scarce else FOLLOW,
                now=known,
            ),
            start,
            body.extend,
            limit=CHUNK * 4,
        )
        if reply.get("attempt") != attempt:
            return Status("lost", attempt), b""
        status = responses.status(self.place, reply)
        log = self._log_of(digest, status, reply, bytes(body), offset) if client else bytes(body)
        has_news = log or status.is_final or self._now.get((digest, attempt)) != known
        if not has_news and time.monotonic() - asked < SHORT:
            time.sleep(SHORT)  # throttle: a runner holds its answer until there is news
        return status, log

    def _log_of(self, digest: str, status: Status, reply: Mapping[str, object], body: bytes, offset: int) -> bytes:
        """Return the log from a reply's body; cache the job's phase, and at the end its status and small outputs."""
        if status.phase:
            self._now[digest, status.attempt] = [status.phase, status.ahead]
        else:
            self._now.pop((digest, status.attempt), None)
        parts = responses.parts(reply)
        log = body if parts.log is None else body[: parts.log]
        if not status.is_final or parts.log_size != offset + len(log):
            return log
        contents = {}
        start = len(log)
        for name, length in parts.contents:
            output = status.outputs.get(name)
            if output is None or length != output.size:
                break
            contents[name] = body[start : start + length]
            start += length
        self._ends[digest, status.attempt] = _End(replace(status, joined=False, expired=""), offset, log, contents)
        for oldest in list(self._ends)[:-ENDS]:
            self._ends.pop(oldest, None)
        return log

    def fetch(self, digest: str, attempt: str, name: str, offset: int, target: Sink, limit: int) -> None:
        """Write an output's content from `offset` on to a sink."""
        known = self._ends.get((digest, attempt))
        content = known.contents.pop(name, b"") if known is not None else b""
        if content and len(content) == offset + limit:
            target.write(content[offset:])
            return
        setbacks = _Setbacks(self)
        rounds = Rounds(f"The bytes of {name} on {self.place}")
        got = 0
        holes: deque[tuple[int, int]] = deque()

        def begun(reply: Mapping[str, object], length: int) -> None:
            holes.clear()
            holes.extend(responses.holes(reply, offset + got, offset + limit, self.place))
            if length + sum(hole for _, hole in holes) > limit - got:
                raise BuilderError(
                    f"{self.place} sends more of {name} than the announced {size(limit)}.",
                    INVALID_REPLY,
                )

        def take(data: bytes) -> None:
            nonlocal got
            while data or (holes and holes[0][0] == offset + got):
                until = holes[0][0] - offset - got if holes else len(data)
                if until:
                    piece, data = data[:until], data[until:]
                    target.write(piece)
                    got += len(piece)
                else:
                    count = holes.popleft()[1]
                    target.skip(count)
                    got += count
                setbacks.count = 0

        while True:
            request = requests.Fetch(digest=digest, attempt=attempt, name=name, offset=offset + got)
            before = got
            try:
                self._request_once(request, None, take, limit - got, begun)
                take(b"")  # holes at the end of the file
                return
            except BuilderLost as error:
                setbacks.another(error)
                rounds.another(got - before >= CHUNK)

    def cancel(self, digest: str, attempt: str) -> bool:
        """Cancel a job, unless another client waits for it."""
        request = requests.Cancel(digest=digest, attempt=attempt, client=self.client, force=False, who="")
        cancelled = responses.cancelled(self._request(request))
        if not cancelled.has_others and cancelled.state == "running":
            raise BuilderError(
                f"{self.place} has not stopped the job yet.", "Run `gamebear jobs` to see whether it still runs."
            )
        return not cancelled.has_others

    def jobs(self, limit: int | None = None, prefix: str = "") -> tuple[list[JobEntry], int]:
        """Return the jobs, queued and running ones first, then the newest; and the total number of jobs."""
        found: dict[str, JobEntry] = {}
        skip = 0
        rounds = Rounds(f"The jobs of {self.place}")
        while True:
            most = PAGE if limit is None else min(PAGE, limit - skip)
            reply = self._request(requests.List(skip=skip, limit=most, prefix=prefix))
            page, total = responses.page(reply, most)
            for entry in page:
                if entry is not None and entry.digest.startswith(prefix):
                    found.setdefault(entry.digest, entry)
            skip += len(page)
            if not page or skip >= min(total, JOBS if limit is None else limit):
                return list(found.values()), max(total, len(found))
            rounds.another(len(page) == most)

    def watch(self, digest: str, attempt: str, offset: int) -> tuple[Status, bytes]:
        """Wait a bounded time for news of a job, without counting as waiting for it."""
        return self._follow(digest, attempt, offset, "")

    def end(self, digest: str, attempt: str, force: bool = False) -> tuple[str, ...]:
        """Cancel a job, unless others wait for it; return those who do."""
        request = requests.Cancel(digest=digest, attempt=attempt, client=self.client, force=force, who=_who())
        cancelled = responses.cancelled(self._request(request))
        if cancelled.others:
            return cancelled.others
        if cancelled.state == "running":
            raise BuilderError(
                f"{self.place} has not stopped the job yet.", "Run `gamebear jobs` to see whether it still runs."
            )
        if cancelled.state != "cancelled":
            how = cancelled.state if cancelled.state in ("done", "failed") else "lost, or begun again"
            raise BuilderError(
                f"{self.place} cannot cancel the job: it is {how}.",
                "Run `gamebear jobs` to list the running jobs.",
            )
        return ()

    def materials(self, digest: str, attempt: str) -> Mapping[str, object]:
        """Return the materials of a result, not validated: see `Materials.of_document`."""
        return self._request(requests.Materials(digest=digest, attempt=attempt))

    def discard(self, digest: str, attempt: str) -> None:
        """Verify a result on the builder, and drop it if it is damaged."""
        self._ends.pop((digest, attempt), None)
        self._request(requests.Discard(digest=digest, attempt=attempt))

    def forget(self, digest: str) -> int | None:
        """Remove a job that does not run; return the bytes freed, None if there is no such job."""
        for key in [key for key in list(self._ends) if key[0] == digest]:
            self._ends.pop(key, None)
        return responses.forgotten(self._request(requests.Forget(digest=digest)))

    @property
    def has_given_up(self) -> bool:
        """Whether the builder counts as unreachable for the rest of this run."""
        return self._sessions.given_up is not None

    def prune(
        self, older: float | None = None, size: int | None = None, keep: int | None = None, images: bool = False
    ) -> Pruned:
        """Remove unused entries of the builder's store."""
        done = Pruned()
        rounds = Rounds(f"The reports of {self.place} on pruned entries")
        while True:
            reply = self._request(requests.Prune(older=older, size=size, keep=keep, images=images))
            before, done = done, responses.pruned(reply, done)
            if not reply.get("more") or replace(done, left=before.left) == before:
                return done
            rounds.another()

    def describe(self) -> Mapping[str, object]:
        """Return properties of the builder by name."""
        reply = self._request(requests.Hello())
        return {words_of(name): value if responses.is_size(value) else words_of(value) for name, value in reply.items()}

    def run_program(self, words: Sequence[str]) -> int:
        """Run a program on the builder with the local terminal; return its exit status."""
        return self._attended(lambda terminal: requests.Run(words=list(words), terminal=terminal))

    def examine(self, arches: Sequence[str], base: str) -> Mapping[str, object]:
        """Return the builder's diagnostics."""
        until = time.monotonic() + EXAMINATION
        while True:
            reply = self._request(requests.Examine(arches=list(arches), base=base, wait=FOLLOW))
            received_at = time.time()
            if not reply.get("more"):
                break
            if time.monotonic() > until:
                raise BuilderError(
                    f"{self.place} does not complete its diagnostics: timeout after {EXAMINATION:g} seconds.",
                    "Check its load there (top, dmesg), then run gamebear doctor again.",
                )
            time.sleep(SHORT)  # throttle: a runner holds its answer until the diagnostics are complete
        about = responses.facts(reply)
        clock = about.pop("time", None)
        about["ahead"] = clock - received_at if isinstance(clock, int | float) and not isinstance(clock, bool) else None
        about["connection"] = self._sessions.described
        return about

    def execute(self, script: str, out: Callable[[bytes], object]) -> int:
        """Run a script on the builder, without a runner; return its exit status."""
        self._sessions.close_idle()  # the builder may allow only one session
        packed = base64.b64encode(script.encode()).decode()
        channel = self._sessions.connection().start(
            f"exec sh -c 'eval \"$(echo {packed} | base64 -d)\" 2>&1 < /dev/null'"
        )
        try:
            while data := channel.receive(CHUNK, SILENT_SCRIPT):
                out(data)
            status = channel.exit_status(10.0)
        finally:
            channel.close()
        if status is None:
            raise BuilderLost(f"{self.place} did not report the exit status of the script.")
        return status

    def kept(self, digest: str) -> Kept | None:
        """Return the retained containers of a failed job."""
        return responses.kept(self.place, self._request(requests.Kept(digest=digest)))

    def enter(self, digest: str, container: int, words: Sequence[str]) -> int:
        """Run a command in a container of a failed job with the local terminal; return its exit status."""
        return self._attended(
            lambda terminal: requests.Enter(digest=digest, container=container, words=list(words), terminal=terminal)
        )

    def _attended(self, request: Callable[[Terminal | None], requests.Run | requests.Enter]) -> int:
        """Start a program that takes over its session, and connect it to the local terminal until it ends."""
        from .tty import attend, local_terminal

        session = self._sessions.borrow()
        broken = False
        try:
            return attend(session, request(local_terminal()), self.place)
        except BuilderLost:
            broken = True
            raise
        finally:
            self._sessions.drop(session, broken)

    def close(self) -> None:
        """Close the connection."""
        self._sessions.close()

    # uploads

    def _upload(self, missing: Sequence[tuple[str, int]], files: Mapping[str, Path]) -> list[tuple[str, bytes]]:
        """Upload missing blobs: resume large ones at the offset that the builder has, batch small ones.

        Returns:
            The last batch of small blobs, to be sent with the next request.
        """
        batch: list[tuple[str, bytes]] = []
        room = BATCH
        expected(_length_of(missing, files))
        for sha256, have in missing:
            path = files.get(sha256)
            if path is None:
                raise BuilderError(
                    f"{self.place} sends an invalid reply: it requests a file that is not part of the job.",
                    INVALID_REPLY,
                )
            length = path.stat().st_size
            if length > CHUNK:
                self._upload_large(sha256, path, length, have)
                continue
            if length > room:
                self._upload_small(batch)
                batch = []
                room = BATCH
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise _changed(path, self.place)
            batch.append((sha256, data))
            room -= len(data)
        return batch

    def _upload_small(self, batch: Sequence[tuple[str, bytes]]) -> None:
        blobs = [(sha256, len(data)) for sha256, data in batch]
        self._request(requests.PutSmall(blobs=blobs), lambda: [data for _, data in batch])

    def _upload_large(self, sha256: str, path: Path, length: int, have: int) -> None:
        setbacks = _Setbacks(self)
        rounds = Rounds(f"The bytes of {path} that {self.place} takes")
        damaged = 0
        while True:
            if not 0 <= have <= length:
                have = 0
            request = requests.Put(sha256=sha256, size=length, offset=have)
            try:
                reply = self._request_once(request, FileFrom(path, have, length))
            except BuilderLost as error:
                before = have
                have = self._size_there(sha256)
                if have > before:
                    setbacks.count = 0
                else:
                    setbacks.another(error)
                rounds.another(have - before >= CHUNK)
                continue
            have = responses.count(reply.get("have"))
            if have == length:
                return
            damaged += 1
            if damaged > 2:
                raise _changed(path, self.place)

    def _size_there(self, sha256: str) -> int:
        return responses.count(self._request(requests.Have(sha256=sha256)).get("have"))

    # requests

    def _request(
        self,
        request: requests.Request,
        body: Callable[[], Sequence[bytes]] | None = None,
        sink: Take | None = None,
        limit: int = 0,
    ) -> dict[str, object]:
        """Send a request, and retry until there is a reply; `body` is called for each attempt."""
        setbacks = _Setbacks(self)
        while True:
            try:
                return self._request_once(request, Bytes(body()) if body is not None else None, sink, limit)
            except BuilderLost as error:
                setbacks.another(error)

    def _request_once(
        self,
        request: requests.Request,
        body: Body | None = None,
        sink: Take | None = None,
        limit: int = 0,
        begun: Callable[[dict[str, object], int], object] | None = None,
    ) -> dict[str, object]:
        session = self._sessions.borrow()
        try:
            reply = session.request(request, body, sink, limit, begun)
        except BuilderLost as error:
            self._sessions.drop(session, broken=True)
            if session.channel_says:
                raise BuilderLost(f"{error.message} {session.channel_says}", error.hint) from error
            raise
        except BaseException:
            self._sessions.drop(session, broken=False)  # the rest of the reply is unread: not reusable
            raise
        self._sessions.give_back(session)
        refused = refusal(reply, self.place)
        if refused is not None:
            raise refused
        return reply


@dataclass(frozen=True)
class _End:
    """The end of a job, cached because it arrived with another answer.

    Attributes:
        status: the final status.
        offset: offset of `log` in the job's log.
        log: the log from there to its end.
        contents: contents of small outputs, by name.
    """

    status: Status
    offset: int
    log: bytes
    contents: dict[str, bytes]


class _Setbacks:
    """Counter of consecutive failures without progress."""

    def __init__(self, builder: RunnerBuilder) -> None:
        self.count = 0
        self._builder = builder

    def another(self, error: BuilderLost) -> None:
        """Count a failure and wait, with exponential backoff; raise BuilderLost if no retry is left."""
        self.count += 1
        if self._builder.has_given_up:
            raise error
        if self.count > TRIES:
            raise BuilderLost(
                f"{self._builder.place} disconnected {self.count} times in a row: {error.message}",
                "Check the builder, then run doit again: it reattaches to the job, which continues.",
            ) from error
        time.sleep(min(0.05 * 2**self.count, 3.0) * random.uniform(0.5, 1.0) if self.count > 1 else 0.0)


def _changed(path: Path, place: str) -> SourceError:
    return SourceError(f"{path} changed while it was sent to {place}.", "Run doit again.")


def _files_of(job: Job) -> Iterable[File]:
    """Yield the files of a job that are not part of a source, and the manifests of its folder sources."""
    yield File(job.identity)
    yield from job.modules.values()
    yield from job.inputs.values()
    yield from (File(str(source["folder"])) for source in job.sources.values() if "folder" in source)


def _length_of(missing: Iterable[tuple[str, int]], files: Mapping[str, Path]) -> int:
    """Return the number of bytes that a builder reports as missing; unknown files are ignored."""
    length = 0
    for sha256, have in missing:
        path = files.get(sha256)
        if path is not None:
            size = path.stat().st_size
            length += size - min(have, size)
    return length


def _small_files(needs: Sequence[str], files: Mapping[str, Path], limit: int) -> list[tuple[str, bytes]]:
    """Return contents of small files by SHA-256, up to `limit` bytes in total.

    The newest are first, because builders lack them most often.
    """
    small = []
    about = {sha256: files[sha256].stat() for sha256 in needs}
    for sha256 in sorted(needs, key=lambda sha256: about[sha256].st_mtime, reverse=True):
        if about[sha256].st_size <= limit:
            data = files[sha256].read_bytes()
            limit -= len(data)
            small.append((sha256, data))
    return small


@cache
def _who() -> str:
    """Return `user@host`, by which people recognize this client."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an account without a name
        user = str(os.getuid())
    return f"{user}@{platform.node()}"
