"""A hostile builder can neither write other files than the target, nor fill the disk, run code or block the client."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from project import Memory, Project, Run

from gamebear_tasks.builders.base import Pruned
from gamebear_tasks.builders.protocol import client, flood_guard, responses, session
from gamebear_tasks.builders.protocol.client import RunnerBuilder
from gamebear_tasks.builders.transports import local
from gamebear_tasks.cli import jobs
from gamebear_tasks.client import build as building
from gamebear_tasks.doit_plugin import action
from gamebear_tasks.errors import GamebearError
from gamebear_tasks.jobspec import plan
from gamebear_tasks.records import task_log, task_record
from gamebear_tasks.runner.protocol import wire
from gamebear_tasks.util.text import size

MIB = 1 << 20

DATA = b"the artifact"

RUNNER = """#!{python} -IS
import hashlib, json, os, struct, sys, time

DATA = {data!r}
SHA = hashlib.sha256(DATA).hexdigest()

def raw(data):
    view = memoryview(data)
    while view:
        view = view[os.write(1, view):]

def text(text, body=b""):
    raw(struct.pack(">I", len(text)) + text.encode() + body)

def send(body=b"", **header):
    text(json.dumps({{**header, "body": len(body)}} if body else header), body)

def result(**more):
    return {{"state": "done", "attempt": "a1", "outputs": {{"x": {{"size": len(DATA), "sha256": SHA, **more}}}}}}

def receive(size):
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            sys.exit()
        data += more
    return data

def submit(request): send(**result())
def follow(request): send(**result())
def fetch(request): send(DATA[request["offset"]:], size=len(DATA))
def discard(request): send(discarded=False)
def put(request): send(have=0)
def put_small(request): send()
def have(request): send(have=0)
def cancel(request): send(state="cancelled", others=0)
def greet(): raw(b"gamebear-runner: ready\\n")

{replies}

greet()
while True:
    (size,) = struct.unpack(">I", receive(4))
    request = json.loads(receive(size))
    receive(request.get("body", 0))
    with open({asked!r}, "a") as file:
        file.write(request["op"] + "\\n")
    globals()[request["op"]](request)
"""

DODO = """
from gamebear_tasks import artifact
from gamebear_tasks.client import build as building
from gamebear_tasks.records import task_log as tasklog
from gamebear_tasks.builders.transports import local
from gamebear_tasks.builders.protocol import client as remote, session

local.CLOSING = 0.3
remote.TRIES = 1
session.SILENCE = {silence}
tasklog.LIMIT = {log_limit}
building.LATE = 1.0

def task_x():
    return artifact("x.py", outputs=["build/x"])
"""


LOGS = {".hashes", ".imports", ".placed", "x.log", "x.json", ".x.json", "x.py.log", "x.py.json", ".x.py.json"}
"""Files beside a log, after a run of doit and after its action alone."""


class Hostile:
    """A builder whose replies a test defines, and a project that uses it."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.silence = 20.0
        self.target = project.folder / "build" / "x"
        self._asked = project.folder / "asked"
        (project.folder / "bin").mkdir()
        project.environment["PATH"] = f"{project.folder / 'bin'}:{os.environ['PATH']}"
        project.write("x.py", "open('x', 'w').close()")

    def replies_with(self, replies: str) -> None:
        """Replace replies of an honest builder."""
        self.project.write("dodo.py", DODO.format(log_limit=2 * MIB, silence=self.silence))
        script = RUNNER.format(python=sys.executable, data=DATA, replies=replies, asked=str(self._asked))
        self.project.write("bin/python3", script).chmod(0o755)

    @property
    def asked(self) -> list[str]:
        """The requests that it received."""
        return self._asked.read_text().split() if self._asked.exists() else []

    def doit(self, *arguments: str) -> Run:
        """Build with doit in a separate process. Assert bounds on its time and memory."""
        with self._checked():
            run, memory = self.project.measured(*self.project.command(*arguments))
        assert memory < 200 * MIB, f"{memory / MIB:.0f} MiB"
        assert "\x1b" not in run.text and "\x07" not in run.text
        return run

    def build(self) -> str:
        """Build with doit's action, which is faster. Return the error of a failure."""
        with self._checked(), self._patched() as patch:
            patch.chdir(self.project.folder)
            patch.setattr(building, "_builders", {})
            made = plan.Plan(program=Path("x.py"), targets={"x": "build/x"})
            failure = action.Build(made).execute(None)
            for builder in building._builders.values():
                builder.close()
        message = str(failure.get_msg()) if failure else ""
        assert "\x1b" not in message and "\x07" not in message
        return message

    def request(self, operation: Callable[[RunnerBuilder], object]) -> str:
        """Send a request. Return the error that the reply caused."""
        with self._checked(), self._patched():
            builder = local.open_builder("local:")
            try:
                operation(builder)
            except GamebearError as error:
                return str(error)
            finally:
                builder.close()
        return ""

    @contextlib.contextmanager
    def _patched(self) -> Iterator[pytest.MonkeyPatch]:
        """Install this builder on this machine, with shorter timeouts."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", self.project.environment["PATH"])
            patch.setattr(task_log, "LIMIT", 2 * MIB)
            patch.setattr(local, "CLOSING", 0.3)
            patch.setattr(client, "TRIES", 1)
            patch.setattr(flood_guard, "ROUNDS", 20)
            patch.setattr(session, "SILENCE", self.silence)
            yield patch

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """Assert that only allowed files are written, that the target is correct, and that the time is bounded."""
        outside = self.project.folder.parent
        before = contents(outside)
        start = time.monotonic()
        yield
        assert time.monotonic() - start < 30
        mine = ("measured.", ".doit.db", "asked")
        after = {path: data for path, data in contents(outside).items() if not path.name.startswith(mine)}
        changed = {path for path, data in after.items() if before.get(path) != data}
        logs = self.project.folder / "build" / "logs"
        assert {path for path in changed if logs not in path.parents} <= {self.target}
        assert {path.name for path in changed if path.parent == logs} <= LOGS
        assert all(path in after for path in before if not path.name.startswith(mine))
        assert not self.target.exists() or self.target.read_bytes() == DATA

    def refused(self, replies: str, *words: str) -> None:
        """Assert that the reply is rejected, with an error."""
        self.replies_with(replies)
        message = " ".join(self.build().split())
        assert message
        assert "Traceback" not in message
        for word in words:
            assert word in message
        assert not self.target.exists()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hostile(project: Project) -> Hostile:
    return Hostile(project)


def test_an_honest_builder_is_accepted(hostile: Hostile) -> None:
    hostile.replies_with("")
    hostile.doit().ok()
    assert hostile.target.read_bytes() == DATA


# outputs

OTHERS = "failed on local: the builder returned other outputs"


@pytest.mark.parametrize(
    "name", ["../x", "../../x", "/tmp/x", "x/../../y", "", ".", "\\ud800", "\\0", "\\x1b]0;evil\\x07", "y" * 1000]
)
@pytest.mark.parametrize("besides", [False, True], ids=["instead", "besides"])
def test_an_undeclared_output_is_not_installed(hostile: Hostile, name: str, besides: bool) -> None:
    outputs = f'{{"{name}": result()["outputs"]["x"], **({{}} if not {besides} else result()["outputs"])}}'
    hostile.refused(f"def follow(request): send(**{{**result(), 'outputs': {outputs}}})", OTHERS)
    assert "fetch" not in hostile.asked


@pytest.mark.parametrize("outputs", ["{}", "[]", "['x']", "None", "'x'"])
def test_a_missing_output_is_an_error(hostile: Hostile, outputs: str) -> None:
    hostile.refused(f"def follow(request): send(**{{**result(), 'outputs': {outputs}}})", OTHERS)


INVALID_REPLY = "sends an invalid reply"


@pytest.mark.parametrize(
    "about",
    [
        "size=-1",
        "size='12'",
        "size=True",
        "size=12.0",
        "size=float('nan')",
        "size=float('inf')",
        "size=10**400",
        "size=1 << 63",
        "size=None",
        "size=[]",
        "sha256=None",
        "sha256=1",
        "sha256='../../../../../../tmp/x'",
        "sha256='/../../../x'",
        "sha256='\\0'",
        "sha256=SHA.upper()",
        "sha256=SHA[:-1]",
        "sha256=['x']",
    ],
)
def test_an_invalid_description_of_an_output_is_rejected(hostile: Hostile, about: str) -> None:
    hostile.refused(
        f"def follow(request): send(**result({about}))",
        "this machine sends an invalid reply: output 'x'.",
        "remove ~/.cache/gamebear/v1/runner",
    )


def test_an_output_larger_than_the_free_space_is_not_downloaded(hostile: Hostile) -> None:
    size = shutil.disk_usage(hostile.project.folder).free + 100 * 10**9
    hostile.refused(f"def follow(request): send(**result(size={size}))", "build/x does not fit on the disk: it needs")
    assert "fetch" not in hostile.asked


def test_an_output_longer_than_announced_is_discarded(hostile: Hostile) -> None:
    hostile.refused(
        "def follow(request): send(**result(size=5))",
        "this machine sends 12 bytes, but at most 5 bytes are accepted.",
    )


CORRUPT = "build/x did not arrive intact"


def test_an_output_shorter_than_announced_is_discarded(hostile: Hostile) -> None:
    hostile.refused("def follow(request): send(**result(size=20))", CORRUPT, "12 of 20 bytes")
    assert hostile.asked.count("fetch") == 3, "it was tried again without end, or not at all"


def test_an_output_with_another_hash_than_announced_is_discarded(hostile: Hostile) -> None:
    hostile.refused("def fetch(request): send(b'x' * 12)", CORRUPT, "SHA-256")


@pytest.mark.parametrize("length", [1 << 40, 1 << 62, 10**400], ids=["1 TiB", "the most", "more"])
def test_an_endless_output_is_rejected(hostile: Hostile, length: int) -> None:
    hostile.replies_with(
        f"""
def fetch(request):
    text(json.dumps({{"body": {length}}}))
    while True:
        raw(bytes(1 << 20))
"""
    )
    hostile.doit().failed("this machine")


def test_an_endless_stream_is_read_up_to_the_announced_size(hostile: Hostile) -> None:
    hostile.replies_with(
        """
def follow(request): send(**result(size=32 << 20))
def fetch(request):
    text(json.dumps({"body": 32 << 20}))
    while True:
        raw(bytes(1 << 20))
"""
    )
    hostile.doit().failed(CORRUPT)


@pytest.mark.parametrize(
    "holes",
    ["7", "[7]", "[[0, -1]]", "[[-4, 4]]", "[[0, 1 << 62]]", "[[0, 2], [1, 2]]", "[['0', 2]]", "[[0, True]]"],
)
def test_invalid_holes_are_rejected(hostile: Hostile, holes: str) -> None:
    hostile.refused(f"def fetch(request): send(DATA[2:], holes={holes})", "holes of a file")


def test_holes_do_not_extend_the_announced_size(hostile: Hostile) -> None:
    hostile.refused("def fetch(request): send(DATA, holes=[[0, 2]])", "sends more of x")


@pytest.mark.parametrize("valid", ["1e300", "10**400", "float('inf')"])
def test_the_validity_of_a_result_is_bounded(hostile: Hostile, valid: str) -> None:
    hostile.replies_with(f"def follow(request): send(**{{**result(), 'valid': {valid}}})")
    hostile.doit().ok()
    assert responses.VALID == 10 * 365 * 86400
    assert f'"seconds": {responses.VALID}' in hostile.project.doit("dumpdb").out.replace("'", '"')


def test_a_builders_description_of_itself_is_bounded_and_sanitized(hostile: Hostile) -> None:
    hostile.replies_with(
        r"""
words = "a line\n" * 3 + "\x1b]0;evil\x07" + "x" * 9999
def follow(request): send(**{**result(), "notices": [f"{n} {words}" for n in range(40)] + [7, None, ["x"]]})
"""
    )
    message = hostile.project.doit().ok().err
    assert (message.count("gamebear: on local: "), len(message.splitlines())) == (10, 11)
    assert len(message) < 10 * 600 and "\x1b" not in message
    hostile.replies_with("def follow(request): send(**{**result(), 'notices': {'a': 1}})")
    hostile.project.doit("clean").ok()
    assert "gamebear: on" not in hostile.project.doit().ok().err


# messages


@pytest.mark.parametrize(
    "answer",
    [
        r"raw(b'\xff\xff\xff\xff' + bytes(1 << 20))",
        "text('hello')",
        "text('[]')",
        "text('{\"a\":' * 100_000)",
        "text('[' * 1_000_000)",
        "text('{\"state\": ' + '9' * 100_000 + '}')",
        r"raw(struct.pack('>I', 4) + b'\xff\xfe\x00\x80')",
        "text('{\"body\": -1}')",
        "text('{\"body\": true}')",
        "text('{\"body\": 1.5}')",
        "text('{\"body\": NaN}')",
        "send(**{**result(), 'state': ['done']})",
        "send(**{**result(), 'state': 'excellent'})",
        "send(**{**result(), 'valid': -1})",
        "send(**{**result(), 'valid': float('nan')})",
        "send(**{**result(), 'valid': '7'})",
        "send(**{**result(), 'valid': True})",
        "send(**{**result(), 'attempt': ['a']})",
        "send(**{**result(), 'attempt': 7})",
        r"send(**{**result(), 'attempt': '\ud800'})",
        "send(**{**result(), 'attempt': '../' * 9})",
        "send(**{**result(), 'attempt': 'a' * 300})",
        "send()",
    ],
)
def test_an_invalid_reply_is_an_immediate_error(hostile: Hostile, answer: str) -> None:
    hostile.refused(f"def submit(request): {answer}", INVALID_REPLY, "this machine")
    assert hostile.asked == ["submit"]


@pytest.mark.parametrize("depth", [900, 990, 100_000])
def test_deeply_nested_json_is_rejected_everywhere(hostile: Hostile, depth: int) -> None:
    nested = f"'[' * {depth} + ']' * {depth}"
    hostile.refused(
        f"""
def submit(request):
    text('{{"state": "failed", "attempt": "a", "failure": {{"message": ' + {nested} + '}}}}')
follow = submit
"""
    )
    hostile.refused(f"""def submit(request): text('{{"error": ' + {nested} + '}}')""")
    hostile.refused(f"""def submit(request): text('{{"state": ' + {nested} + '}}')""")


def test_invalid_phases_are_ignored(hostile: Hostile) -> None:
    spans = (
        "[['build', 1.5, 2.5], ['build', float('nan'), 1], ['build', 0, 10**400], ['build', 0, float('inf')], ['keep'],"
        " ['build', -1, 1], ['build', True, 1], ['build', '1', 1], ['\\x1b', 0, 1], [['build'], 0, 1], 'build', {},"
        " ['keep', 0, 1e12]] + [['queue', 0, 1]] * 9999"
    )
    submit = "def submit(request): send(**result(), started=True)"
    hostile.replies_with(f"{submit}\ndef follow(request): send(**result(), phases={spans})")
    hostile.doit().ok()
    assert hostile.target.read_bytes() == DATA
    record = json.loads((hostile.project.folder / "build/logs/x.json").read_text())
    phases = [(phase["name"], phase["seconds"]) for phase in record["phases"] if phase["name"] in task_record.BUILDER]
    assert phases.count(("build", 2.5)) == 1
    assert set(phases) == {("build", 2.5), ("queue", 1.0)}
    assert len(phases) <= 128
    hostile.replies_with("def follow(request): send(**result(), phases={'build': 1.0})")
    hostile.doit("-a").ok()


def test_a_header_of_maximum_length_uses_little_memory(hostile: Hostile) -> None:
    reply = """text(json.dumps(result())[:-1] + ', "x": [' + '0,' * 2_000_000 + '0]}')"""
    hostile.replies_with(f"def follow(request): {reply}")
    hostile.doit().ok()


JOB: dict[str, Any] = {"digest": "ab" * 32, "state": "done", "attempt": "a1", "log": 100}

NO_END = "arrive in too many small pieces."


def test_a_builder_that_always_reports_more_is_not_queried_forever(hostile: Hostile) -> None:
    hostile.replies_with(f"""
def follow(request): send(b"x", **result())
def prune(request): send(jobs=1, more=True)
def list(request): send(total=10**9, jobs=[{{**{JOB}, "digest": "%064x" % request["skip"]}}])
""")
    assert hostile.build().startswith(f"The lines of the log of x.py on local: {NO_END}")
    assert hostile.asked.count("follow") == 21
    assert NO_END in hostile.request(lambda builder: builder.jobs())
    assert hostile.asked.count("list") == 21
    assert NO_END in hostile.request(lambda builder: builder.prune())
    entry = responses.entry(JOB)
    assert entry is not None
    for lines in (-1, 10):
        assert NO_END in hostile.request(lambda builder: jobs._follow(jobs.Found(builder, entry), lines))  # noqa: B023


@pytest.mark.parametrize(
    ("freed", "read"),
    [
        ("10**400", 0),
        ("1 << 63", 0),
        ("(1 << 63) - 1", (1 << 63) - 1),
        ("-5", 0),
        ("True", 0),
        ("1.5", 0),
        ("1e400", 0),
        ("float('nan')", 0),
        ("'5'", 0),
        ("[5]", 0),
    ],
)
def test_the_counts_of_a_prune_are_bounded(hostile: Hostile, freed: str, read: int) -> None:
    hostile.replies_with(f"def prune(request): send(jobs={freed}, freed={freed}, images=-1, left=None)")
    found: list[Pruned] = []
    assert hostile.request(lambda builder: found.append(builder.prune())) == ""
    assert found == [Pruned(jobs=read, freed=read)]
    assert size(found[0].freed)


@pytest.mark.parametrize("number", ["10**400", "-1", "True", "1.0", "'1'", "None"])
def test_invalid_counts_of_retained_containers_are_rejected(hostile: Hostile, number: str) -> None:
    containers = "[{'image': 'x', 'command': ['true'], 'status': 10**400}] * 2"
    hostile.replies_with(f"def kept(request): send(containers={containers}, last={number}, age=1)")
    assert INVALID_REPLY in hostile.request(lambda builder: builder.kept("ab" * 32))
    for age in ("10**400", "-1", "float('nan')", "True", "None"):
        hostile.replies_with(f"def kept(request): send(containers={containers}, last=1, age={age})")
        assert INVALID_REPLY in hostile.request(lambda builder: builder.kept("ab" * 32))
    hostile.replies_with(f"def kept(request): send(containers={containers}, last=1, age=3)")
    assert hostile.request(lambda builder: builder.kept("ab" * 32)) == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9" * 4_000_000, wire.MAX_NUMBER),
        ("-" + "9" * 5000, -wire.MAX_NUMBER),
        (str(1 << 63), wire.MAX_NUMBER),
        (str((1 << 63) - 1), (1 << 63) - 1),
        ("1e999", float(wire.MAX_NUMBER)),
        ("-Infinity", -float(wire.MAX_NUMBER)),
        ("1." + "3" * 3_000_000, 4 / 3),
    ],
    ids=["long", "negative", "one more", "most", "float", "infinite", "long float"],
)
def test_a_number_of_a_message_is_bounded(text: str, value: float) -> None:
    message = f'{{"n": {text}}}'.encode()
    found = wire.decode(io.BytesIO(len(message).to_bytes(4, "big") + message).read)
    assert found == ({"n": value}, 0)


@pytest.mark.parametrize("nested", ["[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40])
def test_a_message_is_not_nested_deeply(nested: str) -> None:
    message = f'{{"n": {nested}}}'.encode()
    with pytest.raises(wire.WireError, match="nested deeper"):
        wire.decode(io.BytesIO(len(message).to_bytes(4, "big") + message).read)


def test_a_builder_that_disconnects_after_each_piece_is_not_retried_forever(hostile: Hostile) -> None:
    hostile.replies_with("""
def fetch(request):
    text(json.dumps({"body": 10**9 - request["offset"]}), b"x" * 5000)
    sys.exit()
""")
    sink = Memory()
    assert NO_END in hostile.request(lambda builder: builder.fetch(JOB["digest"], "a1", "x", 0, sink, 10**9))
    assert hostile.asked.count("fetch") == 21 and len(sink.getvalue()) == 21 * 5000


def test_text_from_a_builder_is_sanitized_for_the_terminal(hostile: Hostile) -> None:
    evil = r"'\x1b]0;evil\x07 \x1b[2J up' + 'x' * 100_000"
    hostile.replies_with(
        f"""
def submit(request):
    send(state="failed", attempt="a1", failure={{"kind": {evil}, "message": {evil}, "hint": {evil}}})
def follow(request):
    log = b"" if request["offset"] else b"\\x1b[2J the log"
    send(log, state="failed", attempt="a1", failure={{"kind": {evil}, "message": {evil}, "hint": {evil}}})
"""
    )
    run = hostile.doit("run", "-v", "0").failed("x failed on local: ", "evil", "2J up", "the log")
    assert len(run.text) < 20_000
    hostile.refused(f"def submit(request): send(error={evil}, hint={evil})", "On this machine: ", "evil")
    hostile.refused(f"def greet(): raw(b'gamebear-runner: failed ' + ({evil})[:99].encode() + b'\\n')", "evil")
    hostile.refused(f"def greet(): raw(b'gamebear-runner: python ' + ({evil})[:99].encode() + b'\\n')", "evil")


LOG = b"\x1b]0;evil\x07\x1b[2J\x1b[31mred\x1b[0m\r\n1%\r99%\r\n\x9b2Jend \x1b"

SEEN = "red\n1%\n99%\n\N{REPLACEMENT CHARACTER}2Jend \N{REPLACEMENT CHARACTER}\n"


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("words", [("run", "-v", "2", "-r", "console"), ("jobs", "follow", "ab" * 32)])
def test_a_log_is_sanitized_for_the_terminal_in_every_view(
    hostile: Hostile, piece: int, words: tuple[str, ...]
) -> None:
    hostile.replies_with(f"""
def submit(request): send(state="running", attempt="a1", started=True)
def list(request): send(total=1, jobs=[{JOB}])
def follow(request):
    log = {LOG!r}[request["offset"]:][:{piece}]
    send(log, **(result() if request["offset"] + {piece} > len({LOG!r}) else dict(state="running", attempt="a1")))
""")
    assert SEEN in hostile.doit(*words).ok().out
    if words[0] == "run":
        assert (hostile.project.folder / "build/logs/x.log").read_bytes() == LOG, "what is kept is as it came"


# waiting


@pytest.mark.system
def test_a_builder_that_never_replies_times_out(hostile: Hostile) -> None:
    hostile.silence = 1.0
    hostile.refused(
        "def submit(request): time.sleep(600)",
        "this machine disconnected 2 times in a row",
        "sends no data: timeout after 1 seconds.",
        "run doit again",
    )
    assert set(hostile.asked) == {"submit"}


@pytest.mark.system
def test_a_builder_that_never_sends_its_greeting_times_out(hostile: Hostile) -> None:
    hostile.silence = 1.0
    hostile.refused("def greet(): time.sleep(600)", "sends no data: timeout after 1 seconds.")


@pytest.mark.system
def test_a_builder_that_stalls_during_an_output_times_out(hostile: Hostile) -> None:
    hostile.silence = 1.0
    hostile.replies_with(
        """
def fetch(request):
    text('{"body": %d}' % (12 - request["offset"]))
    raw(DATA[:4] if not request["offset"] else b"")
    time.sleep(600)
"""
    )
    hostile.project.doit().failed("disconnected 2 times in a row", "sends no data: timeout after 1 seconds.")
    assert not hostile.target.exists()
    assert hostile.asked.count("fetch") <= 2


def test_endless_output_before_the_greeting_is_rejected(hostile: Hostile) -> None:
    hostile.refused(
        """
def greet():
    while True:
        raw(b"Welcome! " * 1000)
""",
        "this machine prints more than 1 MiB at log-in.",
    )


@pytest.mark.system
def test_an_endless_log_is_stored_up_to_a_limit_and_the_job_times_out(hostile: Hostile) -> None:
    hostile.replies_with(
        """
def submit(request): send(state="running", attempt="a1")
def follow(request): send(b"all is well\\n" * 20_000, state="running", attempt="a1")
"""
    )
    run = hostile.doit("-v", "0", "time_limit=1").failed(
        "failed on local: it still runs", "after its time limit of 1 s."
    )
    assert "build/logs/x.log has the first 2.0 MiB of the log; the rest is only shown" in run.err
    assert (hostile.project.folder / "build" / "logs" / "x.log").stat().st_size == 2 * MIB
    assert not hostile.target.exists()


def test_an_endless_log_of_a_finished_job_is_cut_off(hostile: Hostile) -> None:
    hostile.refused(
        """
def submit(request): send(state="failed", attempt="a1")
def follow(request): send(b"all is well\\n" * 20_000, state="failed", attempt="a1")
""",
        "exceeds the limit of a job",
    )


def test_the_last_lines_of_a_long_log_are_shown_although_not_stored(hostile: Hostile) -> None:
    hostile.refused(
        """
LOG = b"all is well\\n" * 300_000 + b"it is not\\n"
def submit(request): send(state="running", attempt="a1")
def follow(request):
    part = LOG[request["offset"]:][:250_000]
    send(part, state="failed", attempt="a1", failure={"kind": "script", "message": "It failed."})
""",
        "| it is not",
    )


@pytest.mark.system
def test_polling_backs_off_if_the_builder_replies_immediately_without_news(hostile: Hostile) -> None:
    hostile.replies_with(
        """
def submit(request): send(state="running", attempt="a1")
def follow(request): send(state="running", attempt="a1")
"""
    )
    hostile.doit("time_limit=1").failed("failed on local: it still runs")
    assert hostile.asked.count("follow") < 30


def test_an_oversized_log_chunk_is_rejected(hostile: Hostile) -> None:
    hostile.refused(
        """
def submit(request): send(state="running", attempt="a1")
def follow(request): send(bytes(8 << 20), state="running", attempt="a1")
""",
        "sends 8.0 MiB, but at most 1.0 MiB are accepted",
    )


def test_a_job_that_is_lost_again_and_again_fails(hostile: Hostile) -> None:
    hostile.refused(
        "def follow(request): send(state='running', attempt='another')", "failed on local: the job was lost 3 times"
    )


# requests of the builder


@pytest.mark.parametrize("missing", ["['/etc/shadow', 0]", "['0' * 64, 0]", "[None, 0]", "'x'", "[[], 0]", "['x']"])
def test_a_builder_receives_only_files_of_the_job(hostile: Hostile, missing: str) -> None:
    hostile.refused(
        f"def submit(request): send(state='absent', missing=[{missing}])",
        "it requests a file that is not part of the job.",
    )
    assert "put" not in hostile.asked


@pytest.mark.parametrize("missing", ["None", "7", "{}"])
def test_a_builder_that_does_not_list_missing_files_is_rejected(hostile: Hostile, missing: str) -> None:
    hostile.refused(
        f"def submit(request): send(state='absent', missing={missing})",
        "this machine sends an invalid reply: no list of missing files.",
    )


def test_a_builder_that_requests_the_same_file_repeatedly_is_rejected(hostile: Hostile) -> None:
    hostile.refused(
        "def submit(request): send(state='absent', missing=[[request['needs'][0], 0]])",
        "this machine repeatedly loses uploaded files",
    )
    assert len(hostile.asked) < 20


@pytest.mark.parametrize("there", ["-1", "10**30", "'x'", "None", "[]", "0", "1000"])
def test_a_builder_that_never_completes_a_file_is_rejected(hostile: Hostile, there: str) -> None:
    hostile.project.write("x.py", "#" * (3 * MIB))
    hostile.refused(
        f"""
def submit(request): send(state='absent', missing=[[request['needs'][0], {there if there.isdigit() else 0}]])
def put(request): send(have={there})
""",
        "Run doit again.",
    )
    assert len(hostile.asked) < 30
