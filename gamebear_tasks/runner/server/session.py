"""One client's session: answers requests on standard input and output until the client goes away.

A session builds nothing itself and holds nothing that a job needs: it may end at any byte.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from ..protocol import wire
from ..protocol.wire import NOT_OURS, Reply
from ..store.expiry import seconds_left, why_expired
from ..store.phases import noted
from ..store.slots import line
from ..store.store import (
    COMPANY,
    FINAL,
    WHO,
    Lock,
    State,
    Store,
    StoredJob,
    hold_runner,
    runner_folder,
    size_of,
    storage_failure,
)
from ..util.atomic_files import CHUNK, data_extents, is_file_name, read_json, sync_folder, write_all, write_bytes
from ..util.errors import RunnerError
from .uploads import Body, have, put, size_so_far, take_blob, use

if TYPE_CHECKING:
    from ..protocol.pty import Attended

IDLE_LIMIT = 3600.0
"""Seconds without a request after which a session ends: its client is gone, whatever TCP says."""

SMALL = 64 << 10
"""The most bytes of outputs that come with the answer that the job is done, and of a log that nobody asked for."""

LOG_CHUNK = 256 << 10
"""The most bytes of log in one reply."""

PRUNE_SECONDS = 15.0
"""Seconds after which a prune answers, done or not."""

CANCEL_SECONDS = 30.0
"""Seconds after which a cancel answers, whether the job has ended or not; below what a client waits for an answer."""

USE_NOTED = 10.0
"""Seconds after which it is noted again that an output is being fetched."""

HOLE = 64 << 10
"""The smallest hole of a sparse output that is not sent as zeros, in bytes."""

HOLES = 10_000
"""The most holes of one reply; what follows them is sent whole."""

SKIPPED = 64 << 20
"""The most bytes of a refused upload that are read to their end; of a longer one the stream is ended."""

MEANING_SECONDS = 5.0
"""Seconds that buildah may take to say what the names of all images of a result mean, before it is given as it is; less
than another client waits for the job's lock."""

PIPE = 1 << 20
"""Bytes that may be under way between us and sshd, each way; more is root's privilege."""

F_SETPIPE_SZ = 1031
"""The operation of fcntl(2); Python 3.9 has no name for it."""

Answer = tuple[Reply, Optional[Callable[[Reply], None]]]
"""A reply, and what sends it where it has a body."""


class Session:
    """What a client may ask: each operation is a method, its parameters are the request's fields.

    Args:
        store: the builder's.
        umask: that of the programs which a person runs; -1 for ours.
    """

    def __init__(self, store: Store, umask: int = -1) -> None:
        self.store = store
        self._umask = umask
        self._alive: dict[str, int] = {}
        """By attempt: a pipe from each supervisor that we have started, which ends when its job has ended."""
        self._examination: Any = None

    def run(self) -> None:
        """Answer requests until the client closes the stream."""
        while self._wait_for_request():
            message = wire.decode(_read_exactly)
            if message is None:
                return
            header, body = message
            reader = Body(body)
            try:
                reply, send = self._answer(header, reader)
            except (RunnerError, OSError, ValueError, KeyError, TypeError) as error:
                reply, send = _refusal(error), None
                if reader.left > SKIPPED:
                    _write(wire.encode(reply))
                    return  # the client, which cannot send the rest, finds the answer
            reader.skip()
            if send is None:
                _write(wire.encode(reply))
            else:
                send(reply)

    def _wait_for_request(self) -> bool:
        ready, _, _ = select.select([0], [], [], IDLE_LIMIT)
        return bool(ready)

    def _answer(self, header: wire.Header, body: Body) -> Answer:
        operation = header.pop("op")
        header.pop("body", None)
        if operation == "hello":
            return self._hello(), None
        if operation == "submit":
            return self._submit_and_wait(body, **header)
        if operation == "put":
            return put(self.store, body=body, **header), None
        if operation == "have":
            return have(self.store, **header), None
        if operation == "follow":
            return self._follow(**header)
        if operation == "fetch":
            return self._fetch(**header)
        if operation == "cancel":
            return self._cancel(**header), None
        if operation == "discard":
            return self._discard(**header), None
        if operation == "prune":
            return self._prune(**header), None
        if operation == "examine":
            return self._examine(**header), None
        if operation == "run":
            return self._run(**header)
        if operation == "kept":
            return self._kept(**header), None
        if operation == "enter":
            return self._enter(**header)
        if operation == "list":
            return self._list(**header), None
        if operation == "materials":
            return self._materials(**header), None
        raise RunnerError(f"The runner does not know the operation {operation!r}.", NOT_OURS)

    def _hello(self) -> Reply:
        """Say what this builder is, without touching buildah."""
        import platform  # slow to load, and seldom needed

        return {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "host": platform.node(),
            "buildah": shutil.which("buildah") is not None,
            "store": str(self.store.root),
            "free": shutil.disk_usage(self.store.root).free,
            **self._known(),
        }

    def _known(self) -> Reply:
        """Return what the last job found out about this builder."""
        probed = read_json(self.store.root / "facts.json")
        found = probed.get("facts") if isinstance(probed, dict) else None
        known = {name: found.get(name) for name in ("driver", "isolation")} if isinstance(found, dict) else {}
        costs = read_json(self.store.notices)
        return {**known, **({"costs": "; ".join(map(str, costs))} if costs else {})}

    # jobs

    def _submit_and_wait(self, body: Body, wait: float = 0.0, **order: Any) -> Answer:
        """Take a job, and answer with its end where that is known within `wait` seconds: see `_submit`, `_with_end`."""
        reply = self._submit(body=body, **order)
        stored = self.store.job(order["digest"])
        attempt = reply.get("attempt", "")
        if reply.get("started"):
            until = time.monotonic() + min(wait, 60.0)
            state = self._wait(stored, attempt, until, lambda _: False)
            if state.get("attempt") == attempt and state["state"] in FINAL:
                reply.update(_told(state))
        if reply["state"] in ("queued", "running"):
            reply["now"] = self._now(stored, attempt)
        if reply["state"] not in FINAL or size_of(stored.log) > SMALL:
            return reply, None
        return self._with_end(reply, stored, attempt, 0)

    def _submit(
        self,
        body: Body,
        digest: str,
        job: str,
        client: str,
        blobs: list[list[Any]],
        trees: dict[str, str] | None,
        needs: list[str],
        time_limit: float,
        base: str = "auto",
        python: str | None = None,
        again: bool = False,
        who: str = "",
        keep: bool = False,
    ) -> Reply:
        """Take a job: start it, join it where it runs already, or say what it still lacks.

        Args:
            body: the content of `blobs`, one after the other.
            digest: the job's name.
            job: its canonical text.
            client: a name for this client, the same for all of its sessions.
            blobs: SHA-256 and size of each blob in the body.
            trees: the blobs of the sources, by source name; None when the client has not looked yet.
            needs: the SHA-256 of every other blob that the job needs.
            time_limit: seconds after which the job is ended; 0 for none.
            base: where Debian's base images come from.
            python: the version (major.minor) that a pickled function needs.
            again: start anew even if the last attempt failed and nobody has seen it.
            who: whom people know the client as.
            keep: if it fails, leave its containers to be looked at.

        Returns:
            `state` and `attempt`, or `missing` (SHA-256 and bytes already here of each) and `trees_wanted`. `valid`:
            for how many seconds from now a result holds, where not for ever. `expired`: why an earlier one does not.
        """
        for sha256, size in blobs:
            take_blob(self.store, body, sha256, size)
        stored = self.store.job(digest)
        text = job.encode("ascii")
        if hashlib.sha256(text).hexdigest() != digest:
            raise RunnerError(f"The description of job {digest} is not the one that its name stands for.", NOT_OURS)
        lock = _take_or_join(stored)
        who = str(who)[:WHO]
        stored.touch_client(client, who)
        stored.forget_old_clients()
        if lock is None:
            return _told(stored.written_state())
        try:
            state = stored.written_state()
            expired = ""
            if state["state"] == "done" and self._has_outputs(stored, state):
                until = time.monotonic() + MEANING_SECONDS
                expired = why_expired(state, lambda name, arch: self._meaning(name, arch, base, until))
                if not expired:
                    return _told(state)
            if state["state"] in ("failed", "cancelled") and not again and not stored.was_seen(state["attempt"]):
                return state
            own_python = "{}.{}".format(*sys.version_info[:2])
            if python is not None and python != own_python:
                import platform

                raise RunnerError(
                    f"The function was pickled by Python {python}, and the builder's python3 is"
                    f" {platform.python_version()}: neither reads the other's functions.",
                    f"Run doit with Python {own_python}, or make the function a buildscript.",
                )
            wanted = [*needs, *(trees or {}).values()]
            missing = [
                [sha256, size_so_far(self.store, sha256)]
                for sha256 in sorted(set(wanted))
                if not use(self.store.blob(sha256))
            ]
            if missing or trees is None:
                return {"state": "absent", "missing": missing, "trees_wanted": trees is None}
            if not stored.release_kept():
                raise RunnerError(
                    "Somebody has a shell open in a container that the last attempt of this very job has left.",
                    "Leave that shell (doit shell), then run doit again.",
                )
            write_bytes(stored.folder / "job.json", text)
            order = {"trees": trees, "time_limit": time_limit, "base": base, "who": who, "keep": keep}
            attempt = stored.begin_attempt(order)
            self._start_supervisor(stored, attempt, lock)
            return {"state": "queued", "attempt": attempt, "started": True, "expired": expired}
        finally:
            lock.release()

    def _start_supervisor(self, stored: StoredJob, attempt: str, lock: Lock) -> None:
        """Start the job's supervisor in a session of its own; it inherits the lock, so there is no gap."""
        for name, fd in list(self._alive.items()):
            if select.select([fd], [], [], 0)[0]:  # it has ended, and another session has followed it
                os.close(self._alive.pop(name))
        runner = runner_folder()
        ours, theirs = os.pipe()
        try:
            with (stored.folder / "supervisor.log").open("wb") as errors:
                subprocess.Popen(
                    [
                        sys.executable,
                        "-I",
                        "-S",
                        runner,
                        "supervise",
                        stored.digest,
                        attempt,
                        str(lock.fd),
                        str(theirs),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    cwd=self.store.root,
                    pass_fds=[lock.fd, theirs],
                    start_new_session=True,
                )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._alive[attempt] = ours

    def _meaning(self, name: str, arch: str, base: str, until: float) -> str:
        """Return the id of the image that a name means on this builder now; empty where that cannot be told soon."""
        from ..host.buildah import outside
        from ..host.probe import facts
        from ..images.base_images import meaning  # slow to load, and seldom needed

        def ask(*words: str) -> str:
            return outside(self.store.root, known, *words, timeout=max(0.1, until - time.monotonic()))

        try:
            known = facts(self.store.root)
            return meaning(ask, name, arch, base)
        except (RunnerError, OSError, ValueError):
            return ""  # the result is as good as it was

    def _has_outputs(self, stored: StoredJob, state: State) -> bool:
        folder = stored.outputs(state["attempt"])
        with contextlib.suppress(OSError):
            return all((folder / name).stat().st_size == about["size"] for name, about in state["outputs"].items())
        return False

    def _now(self, stored: StoredJob, attempt: str) -> list[Any]:
        """Return the phase that a job is in, and, where it waits for a slot, how many are before it."""
        phase = noted(stored.folder)
        waiting = line(self.store) if phase == "queue" else []
        return [phase, waiting.index(attempt) if attempt in waiting else None]

    def _follow(
        self, digest: str, attempt: str, client: str, offset: int, wait: float, now: list[Any] | None = None
    ) -> Answer:
        """Give the log from an offset and the state; wait up to `wait` seconds for news: that is also another `now`.

        The state is read before the log, so that a final state comes with the end of the log. Who looks on without a
        name (`client` is empty) does not wait for the job, has not seen how it ended, and gets no outputs.
        """
        stored = self.store.job(digest)
        stored.touch_client(client)
        until = time.monotonic() + min(wait, 60.0)
        state = self._wait(
            stored, attempt, until, lambda size: size > offset or (bool(now) and self._now(stored, attempt) != now)
        )
        if state.get("attempt") != attempt:
            return {**_told(state), "log_size": 0}, None
        if state["state"] in ("queued", "running"):
            state["now"] = self._now(stored, attempt)
        return self._with_end(_told(state), stored, attempt, offset, bool(client))

    def _wait(self, stored: StoredJob, attempt: str, until: float, is_enough: Callable[[int], bool]) -> State:
        """Wait until an attempt is over, the log's size is enough, or it is `until` (monotonic); return the state.

        The supervisor's end wakes the session that has started it; all else is looked for now and then.
        """
        pause = 0.005
        while True:
            state = stored.state()
            over = state.get("attempt") != attempt or state["state"] not in ("queued", "running")
            if over or is_enough(size_of(stored.log)) or time.monotonic() >= until:
                return state
            alive = self._alive.get(attempt, -1)
            ready, _, _ = select.select([0] if alive < 0 else [0, alive], [], [], pause)
            if 0 in ready:
                return state  # a client asks nothing while it waits: its end of the stream is closed
            if ready:
                os.close(self._alive.pop(attempt))
            pause = min(pause * 1.5, 0.25)

    def _with_end(self, reply: Reply, stored: StoredJob, attempt: str, offset: int, waits: bool = True) -> Answer:
        """Return an answer with the log from an offset on, and, where it ends with that, the outputs that are small.

        The body is the log's part, `log` bytes long, and the outputs one after the other; `contents` has the name and
        the size in bytes of each. For a client that does not wait for the job there is the log only.
        """
        size = size_of(stored.log)
        log = _part_of(stored.log, offset, min(size - offset, LOG_CHUNK)) if size > offset else b""
        reply = {**reply, "log": len(log), "log_size": size}
        body = [log]
        if waits and reply["state"] in FINAL and offset + len(log) >= size:
            stored.note_seen(attempt)
            reply["notices"] = read_json(self.store.notices)
            contents = _small_outputs(stored, reply)
            reply["contents"] = [[name, len(data)] for name, data in contents]
            body += [data for _, data in contents]
            stored.touch()
        return reply, lambda reply: _write(b"".join([wire.encode(reply, sum(map(len, body))), *body]))

    def _fetch(self, digest: str, attempt: str, name: str, offset: int) -> Answer:
        """Give an output from an offset to its end; a prune leaves the job alone meanwhile.

        Returns:
            `size`, the output's, and `holes`: offset and length of each part that is zeros and is not in the body.
        """
        stored = self.store.job(digest)
        if not is_file_name(name):
            raise RunnerError(f"{name!r} cannot be the name of an output.", NOT_OURS)
        path = stored.outputs(attempt) / name
        with contextlib.ExitStack() as stack:
            stack.enter_context(stored.held_outputs(attempt))
            if not path.is_file():
                raise RunnerError(
                    f"The builder no longer has the output {name!r} of job {digest[:12]}.", "Run doit again."
                )
            size = path.stat().st_size
            holes = _holes(path, offset, size)
            stored.touch()
            held = stack.pop_all()

        def send(reply: Reply) -> None:
            with held:
                _write_file(reply, path, _between(holes, offset, size), stored.touch)
                stored.touch()

        return {"size": size, **({"holes": holes} if holes else {})}, send

    def _cancel(self, digest: str, attempt: str, client: str, force: bool = False, who: str = "") -> Reply:
        """Stop an attempt, unless another client waits for the same job; wait a while until it has ended.

        Args:
            digest: the job.
            attempt: which; empty for whichever is queued or running.
            client: who asks.
            force: stop it all the same; whoever waits then still has to be told.
            who: whom people know the client as, where it does not wait for the job itself; whoever began it is told.

        Returns:
            `others`, who waits for the job and keeps it from being stopped, and `state`: `running` where it has not
            ended in time.
        """
        stored = self.store.job(digest)
        stored.forget_client(client)
        others = stored.other_clients(client, COMPANY)
        if others and not force and (state := stored.state())["state"] in ("queued", "running"):
            return {"state": state["state"], "others": others}
        asked = ""
        until = time.monotonic() + CANCEL_SECONDS
        while True:
            running = stored.is_locked()  # before the state: what it says then is not older
            state = stored.written_state()
            current = state.get("attempt", "")
            wanted = attempt or current
            if wanted != asked and (running or attempt):
                with contextlib.suppress(FileNotFoundError):  # the job was pruned
                    stored.ask_to_stop(wanted)
                asked = wanted
            if not running or current != wanted or time.monotonic() >= until:
                break
            time.sleep(0.05)
        if current != wanted:
            return {"state": "lost" if current else "absent", "others": []}  # another attempt took its place
        state = stored.state()
        if state["state"] == "cancelled" and not others and who in ("", stored.begun_by()):
            stored.note_seen(wanted)
        return {"state": "running" if state["state"] == "queued" else state["state"], "others": []}

    def _discard(self, digest: str, attempt: str) -> Reply:
        """Look whether the outputs still are what they were, and forget the result where they are not."""
        stored = self.store.job(digest)
        if not stored.folder.is_dir():
            return {"discarded": False}
        lock = stored.lock()
        try:
            if not lock.acquire():
                return {"discarded": False}
            state = stored.written_state()
            if state.get("attempt") != attempt or state["state"] != "done" or stored.output_is_sound(state):
                return {"discarded": False}
            stored.write_state({"state": "lost", "attempt": attempt})
            shutil.rmtree(stored.outputs(attempt), ignore_errors=True)
            return {"discarded": True}
        finally:
            lock.release()

    def _list(self, skip: int, limit: int, prefix: str) -> Reply:
        """Say which jobs there are; see `listing`."""
        from .job_list import listing  # seldom needed

        return listing(self.store, int(skip), int(limit), str(prefix))

    def _materials(self, digest: str, attempt: str) -> Reply:
        """Say what a result was built in; see `materials`."""
        from .materials import materials  # seldom needed

        return materials(self.store, digest, attempt)

    def _prune(self, older: float | None, size: int | None, keep: int | None, images: bool) -> Reply:
        """Remove what a policy says, for as long as a client may wait for an answer; `more`: ask again for the rest.

        Args:
            older: seconds.
            size: bytes.
            keep: results per target.
            images: whether images go too.
        """
        import dataclasses  # slow to load, and seldom needed

        from ..maintenance.garbage_collection import Policy, Prune

        for number in (older, size, keep):
            if number is not None and (isinstance(number, bool) or not number >= 0):
                raise RunnerError(f"{number!r} is no age, size or number.", NOT_OURS)
        return dataclasses.asdict(Prune(self.store, Policy(older, size, keep, images), PRUNE_SECONDS).run())

    # with a terminal

    def _kept(self, digest: str) -> Reply:
        """Say which containers are kept of a job."""
        from ..maintenance.retained_containers import listed

        return listed(self.store.job(digest))

    def _run(self, words: list[str], terminal: dict[str, Any] | None = None) -> Answer:
        """Start a program of this machine's, see `terminal`."""
        from ..protocol.pty import started

        return self._attended(started(words, dict(os.environ), Path.home(), terminal, umask=self._umask))

    def _enter(self, digest: str, container: int, words: list[str], terminal: dict[str, Any] | None = None) -> Answer:
        """Start a command in a container that is kept of a job, see `kept`."""
        from ..maintenance.retained_containers import entered

        return self._attended(entered(self.store.job(digest), container, words, terminal))

    def _attended(self, program: Attended) -> Answer:
        """Answer that a program runs; from then on the session is its input and output, and ends with it."""

        def attend(reply: Reply) -> None:
            _write(wire.encode(reply))
            program.attend(0, 1)
            raise SystemExit(0)

        return {}, attend

    def _examine(self, arches: list[str], base: str, wait: float) -> Reply:
        """Say what this builder is and has; see `examine`."""
        from .diagnostics import Examination  # slow to load, and seldom needed

        if self._examination is None or self._examination.asked != (tuple(arches), base):
            self._examination = Examination(self.store, [str(arch) for arch in arches], str(base))
        asked, self._examination = self._examination, None
        reply: Reply = asked.answer(min(wait, 30.0))
        if reply.get("more"):
            self._examination = asked
        return reply


def _part_of(path: Path, offset: int, length: int) -> bytes:
    """Return part of a file, or what there is of it; raises OSError."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(length)


def _small_outputs(stored: StoredJob, state: State) -> list[tuple[str, bytes]]:
    """Return the names and contents of a done job's smallest outputs, `SMALL` bytes of them at the most."""
    found: list[tuple[str, bytes]] = []
    left = SMALL
    with stored.held_outputs(state["attempt"]), contextlib.suppress(OSError):
        for name, about in sorted((state.get("outputs") or {}).items(), key=lambda item: item[1]["size"]):
            left -= about["size"]
            if left < 0:
                break
            data = _part_of(stored.outputs(state["attempt"]) / name, 0, about["size"] + 1)
            if len(data) == about["size"]:  # otherwise the client finds it out as it fetches
                found.append((name, data))
    return found


def _told(state: State) -> Reply:
    """Return a state as a client is told it: for how long it holds in seconds from now, for clocks differ."""
    left = seconds_left(state)
    told = {name: value for name, value in state.items() if name != "policies"}
    return told if left is None else {**told, "valid": left}


def _take_or_join(stored: StoredJob) -> Lock | None:
    """Return a job's lock, held, and its folder made where it is not there; None where the job runs."""
    while True:
        if not stored.folder.is_dir():
            with contextlib.suppress(FileExistsError):
                stored.folder.mkdir(mode=0o700)
            sync_folder(stored.store.jobs)
        try:
            lock = stored.lock()
        except FileNotFoundError:
            continue  # it was pruned in this moment
        try:
            runs = not _acquire_or_join(stored, lock)
        except BaseException:
            lock.release()
            raise
        if not runs and lock.is_current():
            return lock
        lock.release()
        if runs:
            return None


def _acquire_or_join(stored: StoredJob, lock: Lock) -> bool:
    """Take a job's lock, or find that the job runs.

    The lock is busy for a moment, too, when another session only looks, starts the job, or when its supervisor has
    written the final state and is about to end: none of that is a running job.
    """
    until = time.monotonic() + 10.0
    while not lock.acquire():
        if stored.written_state()["state"] in ("queued", "running") and time.monotonic() > until - 9.5:
            return False
        if time.monotonic() > until:
            raise RunnerError(f"Job {stored.digest[:12]} is held by a process that does nothing.", "Run doit again.")
        time.sleep(0.02)
    return True


def _refusal(error: Exception) -> Reply:
    if isinstance(error, RunnerError):
        return {"error": error.message, "hint": error.hint, "kind": error.kind}
    if isinstance(error, OSError):
        failure = storage_failure(error)
        return {"error": failure.message, "hint": failure.hint, "kind": failure.kind}
    return {"error": f"The runner cannot make sense of a request ({error!r}).", "hint": NOT_OURS, "kind": "request"}


def _read_exactly(size: int) -> bytes:
    parts = []
    while size:
        data = os.read(0, min(size, CHUNK))
        if not data:
            break
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def _write(data: bytes) -> None:
    write_all(1, data)


def _pass_on(fd: int, most: int) -> int:
    """Send the next bytes of a file without a look at them; return how many."""
    return os.sendfile(1, fd, None, most)


def _holes(path: Path, start: int, end: int) -> list[list[int]]:
    """Return offset and length of the holes of a file between two offsets, as far as they are worth leaving out."""
    holes: list[list[int]] = []
    with path.open("rb", buffering=0) as file:
        done = start
        for first, last in chain(data_extents(file.fileno(), start, end), [(end, end)]):
            if first - done >= HOLE:
                holes.append([done, first - done])
            if len(holes) == HOLES:
                break
            done = last
    return holes


def _between(holes: list[list[int]], start: int, end: int) -> list[tuple[int, int]]:
    """Return start and end of each part of a file between two offsets that is not in a hole."""
    parts = []
    for offset, length in (*holes, (max(start, end), 0)):
        if offset > start:
            parts.append((start, offset))
        start = offset + length
    return parts


def _write_file(reply: Reply, path: Path, parts: list[tuple[int, int]], note_use: Callable[[], None]) -> None:
    """Send a reply with parts of a file, start and end of each, as its body; call `note_use` now and then."""
    _write(wire.encode(reply, sum(end - start for start, end in parts)))
    noted = time.monotonic()
    with path.open("rb", buffering=0) as file:
        for start, end in parts:
            file.seek(start)
            while start < end:
                if time.monotonic() > noted + USE_NOTED:
                    note_use()
                    noted = time.monotonic()
                sent = _pass_on(file.fileno(), min(end - start, CHUNK))
                if not sent:
                    raise SystemExit(1)  # the file has shrunk under us: end the stream rather than send something else
                start += sent


def _widen(pipe: int) -> None:
    """Let more be under way in a pipe than the usual 64 KiB, so that its ends wait for each other less."""
    with contextlib.suppress(OSError):  # no pipe, or the user has many
        fcntl.fcntl(pipe, F_SETPIPE_SZ, PIPE)


def main() -> int:
    """Serve the client on standard input and output until it goes away."""
    umask = os.umask(0o077)
    _widen(0)
    _widen(1)
    store = Store()
    hold_runner()
    try:
        store.prepare()
    except OSError as error:
        _write(wire.PREAMBLE + b" failed\n" + wire.encode(_refusal(error)))
        return 1
    _write(wire.PREAMBLE + b" ready\n")
    with contextlib.suppress(BrokenPipeError, wire.WireError):
        Session(store, umask).run()
    return 0
