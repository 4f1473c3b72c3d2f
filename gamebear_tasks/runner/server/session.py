"""One client's session: answers requests on standard input and output until the client disconnects.

A session does not build anything and holds no state that a job needs, so the connection may be cut at any byte.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..protocol import requests, wire
from ..protocol.requests import Request, received
from ..protocol.wire import INVALID_REQUEST
from ..store.store import Store, hold_runner, storage_failure
from ..util.atomic_files import read_json
from ..util.errors import RunnerError
from .cancellation import cancel
from .channel import read_exactly, widen, write
from .following import follow, submit_and_wait
from .outputs import discard, fetch
from .submission import Supervisors
from .uploads import Body, have, put, put_small

if TYPE_CHECKING:
    from ..protocol.pty import Attended
    from ..protocol.replies import (
        ForgetReply,
        HelloReply,
        KeptReply,
        ListReply,
        MaterialsReply,
        PruneReply,
        RefusalReply,
        Reply,
    )
    from .channel import Answer
    from .diagnostics import Examination

IDLE_LIMIT = 3600.0
"""Seconds without a request after which a session ends: the client has gone, even if TCP does not report it."""

PRUNE_SECONDS = 15.0
"""Seconds after which a prune replies, whether it is complete or not."""

SKIPPED = 64 << 20
"""Maximum bytes of a refused upload that are read and dropped. For a longer one the session ends."""


class Session:
    """The operations of a client: each is a method.

    Args:
        store: the builder's store.
        umask: umask of the programs that a person runs through this session; -1 for the runner's umask.
    """

    def __init__(self, store: Store, umask: int = -1) -> None:
        self.store = store
        self._umask = umask
        self._supervisors = Supervisors(store)
        self._examination: Examination | None = None

    def run(self) -> None:
        """Answer requests until the client closes the stream."""
        while self._wait_for_request():
            message = wire.decode(read_exactly)
            if message is None:
                return
            header, body = message
            reader = Body(body)
            try:
                reply, send = self._answer(received(header), reader)
            except (RunnerError, OSError, ValueError, KeyError, TypeError) as error:
                reply, send = _refusal(error), None
                if reader.left > SKIPPED:
                    write(wire.encode(reply))
                    return  # the client cannot send the rest; it reads this reply
            reader.skip()
            if send is None:
                write(wire.encode(reply))
            else:
                send(reply)

    def _wait_for_request(self) -> bool:
        ready, _, _ = select.select([0], [], [], IDLE_LIMIT)
        return bool(ready)

    def _answer(self, request: Request, body: Body) -> Answer:
        if isinstance(request, requests.Hello):
            return self._hello(), None
        if isinstance(request, requests.Submit):
            return submit_and_wait(self._supervisors, request, body)
        if isinstance(request, requests.Put):
            return put(self.store, request, body), None
        if isinstance(request, requests.PutSmall):
            return put_small(self.store, request, body), None
        if isinstance(request, requests.Have):
            return have(self.store, request), None
        if isinstance(request, requests.Follow):
            return follow(self._supervisors, request)
        if isinstance(request, requests.Fetch):
            return fetch(self.store, request)
        if isinstance(request, requests.Cancel):
            return cancel(self.store, request), None
        if isinstance(request, requests.Discard):
            return discard(self.store, request), None
        if isinstance(request, requests.Forget):
            return self._forget(request), None
        if isinstance(request, requests.Prune):
            return self._prune(request), None
        if isinstance(request, requests.Examine):
            return self._examine(request), None
        if isinstance(request, requests.Run):
            return self._run(request)
        if isinstance(request, requests.Kept):
            return self._kept(request), None
        if isinstance(request, requests.Enter):
            return self._enter(request)
        if isinstance(request, requests.List):
            return self._list(request), None
        if isinstance(request, requests.Materials):
            return self._materials(request), None
        raise AssertionError(f"the operation {request.op} is not implemented")

    def _hello(self) -> HelloReply:
        """Describe this builder, without running buildah."""
        import platform  # slow to import, and rarely needed

        return {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "host": platform.node(),
            "buildah": shutil.which("buildah") is not None,
            "store": str(self.store.root),
            "free": shutil.disk_usage(self.store.root).free,
            **self._known(),
        }

    def _known(self) -> HelloReply:
        """Return the builder facts that the last job stored."""
        probed = read_json(self.store.root / "facts.json")
        found = probed.get("facts") if isinstance(probed, dict) else None
        known: HelloReply = {}
        if isinstance(found, dict):
            known = {"driver": found.get("driver"), "isolation": found.get("isolation")}
        costs = read_json(self.store.notices)
        if costs:
            known["costs"] = "; ".join(map(str, costs))
        return known

    def _list(self, request: requests.List) -> ListReply:
        """List the jobs in the store; see `job_list.listing`."""
        from .job_list import listing  # rarely needed

        return listing(self.store, request.skip, request.limit, request.prefix)

    def _materials(self, request: requests.Materials) -> MaterialsReply:
        """Return the images and packages that a result was built in; see `materials`."""
        from .materials import materials  # rarely needed

        return materials(self.store, request.digest, request.attempt)

    def _forget(self, request: requests.Forget) -> ForgetReply:
        """Remove a job that does not run; see `garbage_collection.forget`."""
        from ..maintenance.garbage_collection import forget  # slow to import, and rarely needed

        freed = forget(self.store, request.digest)
        return {"removed": freed is not None, "freed": freed or 0}

    def _prune(self, request: requests.Prune) -> PruneReply:
        """Prune the store for a bounded time; if the reply has `more`, the client requests the rest."""
        from ..maintenance.garbage_collection import Policy, Prune  # slow to import, and rarely needed

        policy = Policy(request.older, request.size, request.keep, request.images)
        pruned = Prune(self.store, policy, PRUNE_SECONDS).run()
        return {
            "jobs": pruned.jobs,
            "blobs": pruned.blobs,
            "images": pruned.images,
            "others": pruned.others,
            "freed": pruned.freed,
            "left": pruned.left,
            "more": pruned.more,
        }

    def _kept(self, request: requests.Kept) -> KeptReply:
        """Return the retained containers of a job."""
        from ..maintenance.retained_containers import listed

        return listed(self.store.job(request.digest))

    def _run(self, request: requests.Run) -> Answer:
        """Start a program on this machine; see `pty`."""
        from ..protocol.pty import started

        environment = dict(os.environ)
        return self._attended(started(request.words, environment, Path.home(), request.terminal, umask=self._umask))

    def _enter(self, request: requests.Enter) -> Answer:
        """Start a command in a retained container of a job; see `retained_containers`."""
        from ..maintenance.retained_containers import entered

        stored = self.store.job(request.digest)
        return self._attended(entered(stored, request.container, request.words, request.terminal))

    def _attended(self, program: Attended) -> Answer:
        """Reply that a program is running. From then on the session carries its input and output, and ends with it."""

        def attend(reply: Reply) -> None:
            write(wire.encode(reply))
            program.attend(0, 1)
            raise SystemExit(0)

        return {}, attend

    def _examine(self, request: requests.Examine) -> Reply:
        """Return a description of this builder for `doctor`; see `diagnostics`."""
        from .diagnostics import Examination  # slow to import, and rarely needed

        if self._examination is None or self._examination.requested != (tuple(request.arches), request.base):
            self._examination = Examination(self.store, request.arches, request.base)
        examination, self._examination = self._examination, None
        reply = examination.answer(min(request.wait, 30.0))
        if reply.get("more"):
            self._examination = examination
        return reply


def _refusal(error: Exception) -> RefusalReply:
    if isinstance(error, RunnerError):
        return {"error": error.message, "hint": error.hint, "kind": error.kind}
    if isinstance(error, OSError):
        failure = storage_failure(error)
        return {"error": failure.message, "hint": failure.hint, "kind": failure.kind}
    return {"error": f"The runner failed to process a request: {error!r}.", "hint": INVALID_REQUEST, "kind": "request"}


def main() -> int:
    """Serve the client on standard input and output until it disconnects; return the exit status."""
    umask = os.umask(0o077)
    widen(0)
    widen(1)
    store = Store()
    hold_runner()
    try:
        store.prepare()
    except OSError as error:
        write(wire.PREAMBLE + b" failed\n" + wire.encode(_refusal(error)))
        return 1
    write(wire.PREAMBLE + b" ready\n")
    with contextlib.suppress(BrokenPipeError, wire.WireError):
        Session(store, umask).run()
    return 0
