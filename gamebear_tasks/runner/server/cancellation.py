"""Cancel a job."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from ..protocol import requests
from ..store.store import COMPANY, Store

if TYPE_CHECKING:
    from ..protocol.replies import CancelReply

CANCEL_SECONDS = 30.0
"""Seconds after which a cancel replies, whether the job has ended or not. Shorter than the client's reply timeout."""


def cancel(store: Store, request: requests.Cancel) -> CancelReply:
    """Stop an attempt unless another client waits for the same job; wait up to `CANCEL_SECONDS` for its end.

    The state in the reply is `running` if the attempt has not ended in time.
    """
    stored = store.job(request.digest)
    stored.forget_client(request.client)
    others = stored.other_clients(request.client, COMPANY)
    if others and not request.force and (state := stored.state())["state"] in ("queued", "running"):
        return {"state": state["state"], "others": others}
    requested = ""
    until = time.monotonic() + CANCEL_SECONDS
    while True:
        running = stored.is_locked()  # read before the state, so that the state is not older
        state = stored.written_state()
        current = state.get("attempt", "")
        wanted = request.attempt or current
        if wanted != requested and (running or request.attempt):
            with contextlib.suppress(FileNotFoundError):  # race: the job was pruned
                stored.ask_to_stop(wanted)
            requested = wanted
        if not running or current != wanted or time.monotonic() >= until:
            break
        time.sleep(0.05)
    if current != wanted:
        return {"state": "lost" if current else "absent", "others": []}  # another attempt took its place
    state = stored.state()
    if state["state"] == "cancelled" and not others and request.who in ("", stored.begun_by()):
        stored.note_seen(wanted)
    return {"state": "running" if state["state"] == "queued" else state["state"], "others": []}
