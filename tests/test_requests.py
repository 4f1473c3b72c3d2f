"""The wire protocol's requests and replies: each side validates what it receives."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamebear_tasks.builders.base import Pruned
from gamebear_tasks.builders.protocol import responses
from gamebear_tasks.errors import BuilderError
from gamebear_tasks.runner.protocol import requests, wire
from gamebear_tasks.runner.protocol.requests import (
    LINE,
    OPERATIONS,
    TOKEN,
    Cancel,
    Discard,
    Enter,
    Examine,
    Fetch,
    Follow,
    Forget,
    Have,
    Hello,
    Kept,
    List,
    Materials,
    Prune,
    Put,
    PutSmall,
    Request,
    RequestError,
    Run,
    Submit,
    fields_of,
    received,
)
from gamebear_tasks.runner.server import session, uploads
from gamebear_tasks.runner.store.store import Store
from gamebear_tasks.runner.util.locks import Lock

DIGEST = "ab" * 32

EMPTY = hashlib.sha256(b"").hexdigest()

VALID: list[Request] = [
    Hello(),
    Submit(
        digest=DIGEST,
        job="{}",
        client="me",
        blobs=[(EMPTY, 0)],
        trees={"linux": DIGEST},
        needs=[DIGEST],
        time_limit=0.0,
        base="auto",
        python="3.11",
        again=False,
        fresh="a1",
        who="me@here",
        keep=True,
        wait=0.0,
    ),
    Put(sha256=EMPTY, size=0, offset=0),
    PutSmall(blobs=[(EMPTY, 0)]),
    Have(sha256=DIGEST),
    Follow(digest=DIGEST, attempt="a1", client="", offset=0, wait=0.0, now=["queue", 3]),
    Fetch(digest=DIGEST, attempt="a1", name="x", offset=0),
    Cancel(digest=DIGEST, attempt="", client="me", force=True, who="me@here"),
    Discard(digest=DIGEST, attempt="a1"),
    Forget(digest=DIGEST),
    Prune(older=1.5, size=10, keep=3, images=False),
    Examine(arches=["armhf"], base="auto", wait=0.0),
    List(skip=0, limit=10, prefix="ab"),
    Materials(digest=DIGEST, attempt="a1"),
    Kept(digest=DIGEST),
    Enter(digest=DIGEST, container=0, words=[], terminal={"term": "xterm", "rows": 24, "columns": 80}),
    Run(words=["true"], terminal=None),
]

FIELDS = [(request, name) for request in VALID for name in fields_of(type(request))]

by_field = pytest.mark.parametrize(("request_", "name"), FIELDS, ids=[f"{r.op}-{name}" for r, name in FIELDS])

by_operation = pytest.mark.parametrize("request_", VALID, ids=[request.op for request in VALID])

INVALID: dict[str, list[object]] = {
    "Sha256": ["", DIGEST[1:], DIGEST + "a", DIGEST.upper(), "g" * 64, "../" * 20 + "abcd"],
    "FileName": ["", ".", "..", "a/b", "/", "a\0", "x" * 256, "\u00e9" * 128, "\ud800"],
    "Attempt": [".", "..", "a/b", "/", "a\0", "x" * 256],
    "Client": [".", "..", "a/b", "/", "a\0", "x" * 256],
    "Token": ["a/b", "a-b", ".", "a\0", "x" * (TOKEN + 1), "\u00e9"],
    "Ascii": ["\u00e9", "\ud800"],
    "Line": ["x" * (LINE + 1)],
    "Flag": [0, 1, "true"],
    "Size": [-1, wire.MAX_BODY + 1, 1.0, True, False, "1"],
    "Seconds": [-1, -0.5, float("nan"), 2.0 * wire.MAX_NUMBER, True, "1"],
    "Words": ["true", ["true", 1], [None], {"true": 1}],
    "Hashes": [DIGEST, [DIGEST[1:]], [DIGEST, None]],
    "Blobs": [[DIGEST], [[DIGEST]], [[DIGEST, -1]], [[DIGEST, 1, 1]], [["x", 1]], [{"a": 1, "b": 2}], [[DIGEST, True]]],
    "Trees": [[], {"linux": "x"}, {"linux": None}, {"x" * (LINE + 1): DIGEST}],
    "Progress": [[], ["queue"], ["queue", -1], ["queue", True], [1, 1], ["queue", 1, 1], "ab", {"a": 1, "b": 2}],
    "Terminal": [
        {},
        {"term": "xterm", "rows": 24},
        {"term": "xterm", "rows": 24, "columns": 80, "more": 1},
        {"term": None, "rows": 24, "columns": 80},
        {"term": "x" * (LINE + 1), "rows": 24, "columns": 80},
        {"term": "xterm", "rows": -1, "columns": 80},
        {"term": "xterm", "rows": 24, "columns": 65536},
        {"term": "xterm", "rows": True, "columns": 80},
        {"term": "xterm", "rows": "24", "columns": 80},
        ["xterm", 24, 80],
    ],
}
"""Invalid values of a field by its annotation, besides those of another JSON type."""

LIMITS: dict[str, list[object]] = {
    "FileName": ["x", "x" * 255, "..."],
    "Attempt": ["", "x" * 255],
    "Client": ["", "x" * 255],
    "Token": ["", "x" * TOKEN],
    "Line": ["", "x" * LINE, "\ud800"],
    "Size": [0, wire.MAX_BODY],
    "Seconds": [0, 0.0, 7, wire.MAX_NUMBER, float(wire.MAX_NUMBER)],
    "Words": [[], [""], ["\0"]],
    "Hashes": [[]],
    "Blobs": [[], [[DIGEST, wire.MAX_BODY]]],
    "Trees": [{}],
    "Progress": [["", None], ["queue", 0]],
    "Terminal": [{"term": "", "rows": 0, "columns": 65535}],
}
"""Valid values of a field at its limits, by its annotation."""

words = st.text("ab/.\0\x1b\u00e9\ud800", max_size=3)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.just(DIGEST),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=4,
)


def on_the_wire(header: dict[str, object]) -> dict[str, object]:
    """Return a header as the other side receives it."""
    decoded = wire.decode(io.BytesIO(wire.encode(header)).read)
    assert decoded is not None
    return decoded[0]


def test_every_operation_is_tested() -> None:
    assert [request.op for request in VALID] == sorted(OPERATIONS, key=[r.op for r in VALID].index)
    annotations = {alias.partition(" | ")[0] for kind in OPERATIONS.values() for alias in fields_of(kind).values()}
    assert annotations == INVALID.keys() == requests._CHECKS.keys()


@by_operation
def test_a_valid_request_is_received_as_it_was_sent(request_: Request) -> None:
    header = on_the_wire(request_.header)
    assert type(received(header)) is type(request_)
    assert received(header).header == header
    assert received({**header, "body": 7}).header == header


@by_field
def test_a_field_that_is_missing_is_named(request_: Request, name: str) -> None:
    header = on_the_wire(request_.header)
    del header[name]
    with pytest.raises(RequestError) as caught:
        received(header)
    assert caught.value.message == f"Invalid request {request_.op}: the field {name} is missing."
    assert caught.value.hint


@by_operation
def test_an_unknown_field_is_rejected(request_: Request) -> None:
    for name in ("x", "self", "", "x" * 1000, "\x1b[2J", "store"):
        with pytest.raises(RequestError, match="unknown field") as caught:
            received({**on_the_wire(request_.header), name: 1})
        assert len(caught.value.message) < 120 and "\x1b" not in caught.value.message


@by_field
def test_a_field_that_is_invalid_is_named(request_: Request, name: str) -> None:
    header = on_the_wire(request_.header)
    alias, _, none = fields_of(type(request_))[name].partition(" | ")
    values = [*INVALID[alias], object, *([] if none else [None])]
    values += [] if alias in ("Trees", "Terminal") else [{}]
    values += [] if alias in ("Words", "Hashes", "Blobs") else [[]]
    values += [] if alias == "Size" or alias == "Seconds" else [7]
    for value in values:
        with pytest.raises(RequestError) as caught:
            received({**header, name: value})
        assert f"Invalid request {request_.op}: {name} is not of type {alias}" in caught.value.message, value


@by_field
def test_a_field_may_have_each_value_up_to_its_limits(request_: Request, name: str) -> None:
    header = on_the_wire(request_.header)
    alias, _, none = fields_of(type(request_))[name].partition(" | ")
    for value in [*LIMITS.get(alias, []), *([None] if none else [])]:
        assert received({**header, name: value}).header[name] == value


@pytest.mark.parametrize("op", [None, 1, [], {}, "", "Hello", "submit ", "x" * 10_000, "\x1b[2J"])
def test_an_unknown_operation_is_rejected(op: object) -> None:
    for header in ({"op": op}, {"op": op, "digest": DIGEST}):
        with pytest.raises(RequestError, match="Unknown operation") as caught:
            received(header)
        assert len(caught.value.message) < 120 and "\x1b" not in caught.value.message
    with pytest.raises(RequestError, match="Unknown operation"):
        received({})


NAMES = sorted({"op", "body", "x", *(name for _, name in FIELDS)})


@settings(deadline=None)
@given(st.sampled_from(VALID), st.dictionaries(st.sampled_from(NAMES), json_values, max_size=4))
def test_a_request_is_valid_or_rejected(request_: Request, changes: dict[str, object]) -> None:
    header = {**on_the_wire(request_.header), **changes}
    try:
        found = received(header)
    except RequestError:
        return
    assert found.header == {name: value for name, value in header.items() if name != "body"}


# a session


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Callable[[dict[str, object]], dict[str, object]]]:
    """Send a header to a real session, and return the header of its reply."""
    folder = Path(session.__file__).parents[2]
    program = f"import sys; sys.path.insert(0, {str(folder)!r}); from runner.server import session; session.main()"
    with subprocess.Popen(
        [sys.executable, "-I", "-c", program],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as runner:
        assert runner.stdin is not None and runner.stdout is not None and runner.stderr is not None
        stdin, stdout = runner.stdin, runner.stdout
        assert stdout.readline() == wire.PREAMBLE + b" ready\n"

        def asked(header: dict[str, object]) -> dict[str, object]:
            stdin.write(wire.encode(header))
            stdin.flush()
            reply = wire.decode(stdout.read)
            assert reply is not None
            stdout.read(reply[1])
            return reply[0]

        yield asked
        runner.stdin.close()
        assert runner.stderr.read() == b""
        assert runner.wait(10) == 0


def test_a_session_rejects_invalid_requests_and_answers_the_next(
    ask: Callable[[dict[str, object]], dict[str, object]],
) -> None:
    invalid: list[dict[str, object]] = [
        {},
        {"op": "explode"},
        {"op": ["hello"]},
        {"op": "hello", "self": 1},
        {"op": "have"},
        {"op": "have", "sha256": 1},
        {"op": "put", "blobs": [[DIGEST, 0]]},
        {"op": "follow", "digest": DIGEST},
        {**VALID[1].header, "trees": {"x": []}},
    ]
    for header in invalid:
        reply = ask(header)
        assert reply.keys() == {"error", "hint", "kind"}
        assert (reply["kind"], reply["hint"]) == ("request", wire.INVALID_REQUEST)
        assert "Error" not in str(reply["error"]) and "_" not in str(reply["error"])
    assert ask({"op": "hello"})["machine"] == os.uname().machine


def test_a_session_answers_every_operation(ask: Callable[[dict[str, object]], dict[str, object]]) -> None:
    for request in VALID:
        assert ask(request.header).get("kind") in (None, "runner"), request.op


def test_an_offset_beyond_the_size_of_a_file_is_rejected(tmp_path: Path) -> None:
    store = Store(tmp_path / "v1")
    store.prepare()
    with pytest.raises(RequestError, match="offset is larger than size"):
        uploads.put(store, Put(sha256=DIGEST, size=1, offset=2), uploads.Body(0))


def test_a_session_that_stops_waiting_for_a_blob_does_not_stop_the_receiving_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "v1")
    store.prepare()
    monkeypatch.setattr(uploads, "TAKE_OVER", 0.15)
    with Lock(store.tmp / f"{DIGEST}.part"), pytest.raises(SystemExit):
        uploads.put(store, Put(sha256=DIGEST, size=1, offset=0), uploads.Body(0))
    assert [path.name for path in store.tmp.iterdir()] == [f"{DIGEST}.part"]


# replies

REPLIES = (
    "state attempt outputs failure valid expired notices now phases missing trees_wanted log log_size contents others"
    " jobs blobs images freed left more total containers last age holes"
)
"""The fields of replies."""

replies = st.dictionaries(
    st.sampled_from(REPLIES.split(" ")),
    json_values | st.sampled_from(responses.STATES) | st.just("a1") | st.lists(st.tuples(words, st.integers())),
    max_size=6,
)


def received_by_client(reply: dict[str, object]) -> dict[str, object]:
    decoded: dict[str, object] = json.loads(json.dumps(reply))
    return decoded


@settings(deadline=None)
@given(replies)
def test_a_reply_is_valid_or_rejected(sent: dict[str, object]) -> None:
    reply = received_by_client(sent)
    for validate in (
        lambda: responses.lacks("here", reply),
        lambda: responses.status("here", reply),
        lambda: responses.kept("here", reply),
        lambda: responses.holes(reply, 0, 10, "here"),
    ):
        try:
            validate()
        except BuilderError as error:
            assert error.message.startswith("here ")
    parts = responses.parts(reply)
    assert parts.log is None or (type(parts.log) is int and parts.log >= 0)
    assert all(isinstance(name, str) and type(length) is int and length >= 0 for name, length in parts.contents)
    cancelled = responses.cancelled(reply)
    assert cancelled.state in ("", *responses.STATES) and len(cancelled.others) <= responses.WAITING
    pruned = dataclasses.asdict(responses.pruned(reply, Pruned()))
    assert all(type(count) is int and count >= 0 for name, count in pruned.items() if name != "left")
    entries, total = responses.page(reply, 2)
    assert len(entries) <= 2 and total >= 0


def test_the_missing_blobs_of_a_reply() -> None:
    missing = [[DIGEST, 3], [EMPTY, -1]]
    assert responses.lacks("here", {"missing": missing, "trees_wanted": True}) == responses.Lacks(
        ((DIGEST, 3), (EMPTY, 0)), True
    )
    for wrong in (None, 1, {"a": 1}, [DIGEST], [[DIGEST]], [["x", 1]], [[DIGEST, True]], [[DIGEST, 1.0]]):
        with pytest.raises(BuilderError):
            responses.lacks("here", {"missing": wrong})


def test_the_parts_of_a_body() -> None:
    given_ = {"log": 3, "log_size": 5, "contents": [["x", 2], ["y", True], ["z", 1]]}
    assert responses.parts(given_) == responses.Parts(3, 5, (("x", 2),))
    assert responses.parts({"contents": [["x", -1]]}).contents == ()
    for wrong in (-1, True, "3", 3.0, None):
        assert responses.parts({"log": wrong}).log is None


def test_the_sum_of_pruned_entries() -> None:
    first = responses.pruned({"jobs": 1, "blobs": 2, "images": 3, "others": 4, "freed": 5, "left": ["a"]}, Pruned())
    assert first == Pruned(1, 2, 3, 4, 5, ("a",))
    second = responses.pruned({"jobs": 10, "blobs": -1, "images": True, "others": "4", "freed": 1, "left": [7]}, first)
    assert second == Pruned(11, 2, 3, 4, 6, ("7",))


def test_a_page_has_at_most_the_requested_number_of_jobs() -> None:
    assert responses.page({"jobs": [{}, {}, {}], "total": 7}, 2) == ([None, None], 7)
    assert responses.page({"jobs": {"a": 1}, "total": -1}, 2) == ([], 0)


def test_the_reasons_that_prevent_a_cancellation() -> None:
    assert responses.cancelled({"state": "done", "others": []}) == responses.Cancelled("done", (), False)
    assert responses.cancelled({"state": [], "others": ["me", 1]}) == responses.Cancelled("", ("me", "1"), True)
    assert responses.cancelled({"others": ["x"] * 1000}).others == ("x",) * responses.WAITING
    assert responses.cancelled({"others": 7}).has_others
