"""The failure record of a job: cause and fix, from the runner to the error that doit shows."""

from __future__ import annotations

import socket
import types
import urllib.error
from pathlib import Path
from typing import Any, cast

import pytest

from gamebear_tasks.builders.base import Failure, Status
from gamebear_tasks.builders.protocol import responses
from gamebear_tasks.client.build import Building
from gamebear_tasks.errors import JobError
from gamebear_tasks.jobspec.plan import Plan
from gamebear_tasks.runner.executor import worker
from gamebear_tasks.runner.executor.workspace import JobFailed
from gamebear_tasks.runner.host.buildah import BuildahError
from gamebear_tasks.runner.script.context import CommandError
from gamebear_tasks.runner.script.image import ImageNotFoundError
from gamebear_tasks.runner.util.errors import RunnerError, ended_by

HASH = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("status", "how"),
    [
        (2, "exited with 2"),
        (-9, "was killed by SIGKILL"),
        (137, "was killed by SIGKILL"),
        (255, "exited with 255"),
        (128, "exited with 128"),
    ],
)
def test_an_exit_status_is_shown_as_a_number_or_a_signal(status: int, how: str) -> None:
    assert ended_by(status) == how


@pytest.mark.parametrize(
    ("error", "cause", "fix"),
    [
        (CommandError(2, ["make", "-j4"], "a container of x"), "`make -j4` exited with 2.", "Fix the command"),
        (CommandError(137, ["make"]), "`make` was killed by SIGKILL.", "ran out of memory"),
        (CommandError(127, ["meson"]), "`meson` exited with 127.", "packages_image"),
        (CommandError(1, ["cc"], "x", None, b"a\nbad\n"), "`cc` exited with 1: bad.", "Fix the command"),
        (
            CommandError(125, ["buildah", "commit", "--rm", "gamebear-1", HASH], "x", stderr=f"Error: no {HASH}\n"),
            "`buildah commit` exited with 125: no ….",
            "the log has buildah's whole message",
        ),
        (BuildahError(["rm", HASH], 125, f"Error: {HASH}: busy"), "`buildah rm` exited with 125: …: busy.", "Fix the"),
        (RunnerError("No buildah.", "Install it."), "No buildah.", "Install it."),
        (ImageNotFoundError("No image x.", "Pull it."), "No image x.", "Pull it."),
        (SystemExit(3), "sys.exit(3).", "Fix the cause"),
        (SystemExit("no luck"), "no luck.", "Fix the cause"),
        (ValueError("upside down"), "ValueError: upside down", "Fix the script"),
        (ModuleNotFoundError("No module named 'x'"), "ModuleNotFoundError", "`#| pip:`"),
        (FileNotFoundError(2, "gone", "config"), "FileNotFoundError", "inputs="),
        (MemoryError(), "MemoryError", "ran out of memory"),
        (ConnectionRefusedError(), "ConnectionRefusedError", "network"),
        (socket.gaierror(), "gaierror", "network"),
        (urllib.error.URLError("refused"), "URLError", "network"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_exception_of_a_script_has_a_cause_and_a_fix(error: BaseException, cause: str, fix: str) -> None:
    failure = worker._failure(error)
    assert cause in failure["message"] and fix in failure["hint"]
    assert failure["hint"] not in failure["message"]
    assert HASH not in failure["message"] + failure["hint"]


def test_internal_commands_of_buildah_are_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    worker._failure(CommandError(125, ["buildah", "commit", HASH], "a container", stderr="no room"))
    assert f"`buildah commit {HASH}` exited with 125 in a container: no room" in capfd.readouterr().err


def test_a_long_command_is_truncated() -> None:
    failure = worker._failure(CommandError(1, ["sh", "-c", "echo " * 1000]))
    assert len(failure["message"]) < 250 and failure["message"].endswith("…` exited with 1.")


def test_texts_of_a_failure_are_bounded_and_encodable() -> None:
    failure = JobFailed("script", "\udc80" + "x" * 10_000, "y" * 10_000).failure
    assert failure["message"].startswith("\\udc80x") and failure["message"].encode()
    assert len(failure["message"]) < 5000 and len(failure["hint"]) == 1000


def replied(**failure: object) -> Failure:
    reply = {"state": "failed", "attempt": "a", "failure": failure}
    found = responses.status("ssh://pi", reply).failure
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        ("Install it.", "Install it."),
        ("\x1b[2J", "\N{REPLACEMENT CHARACTER}[2J"),
        ("x" * 5000, "x" * 1000),
        (7, "7"),
        (["x"], "['x']"),
    ],
    ids=["text", "escape", "long", "number", "list"],
)
def test_the_hint_of_a_builder_is_untrusted(hint: object, expected: str) -> None:
    assert replied(message="no", hint=hint).hint == expected


def test_a_failure_without_a_hint_from_an_older_builder_is_accepted() -> None:
    assert replied(message="no") == Failure("", "no")


def error_of(failure: Failure | None, state: str = "failed", url: str = "ssh://pi") -> JobError:
    """Return the error for a job that ended, whose log was not shown and ends with a line of a program."""
    building = Building(cast(Plan, types.SimpleNamespace(name="umtprd.py")), "umtprd", None)
    building._url = url
    log = types.SimpleNamespace(is_shown=False, path=Path("log"), last_lines=lambda count: ["gamebear: x", "gcc: no"])
    return building._failure(cast(Any, object()), Status(state, "a", failure=failure), cast(Any, log))


def test_an_error_shows_the_failure_the_fix_and_the_log_in_this_order() -> None:
    failure = Failure("command", "`make -j4` exited with 2.", hint="Fix the command.")
    assert str(error_of(failure)).splitlines() == [
        "umtprd failed on ssh://pi: `make -j4` exited with 2.",
        "→ Fix the command.",
        "The log is log and ends with:",
        "  | gcc: no",
    ]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("ValueError: x", "umtprd failed on local: ValueError: x."),
        ("two\nlines", "umtprd failed on local: two lines."),
        ("What now?", "umtprd failed on local: What now?"),
        ("", "umtprd failed on local: the builder reported no cause."),
    ],
)
def test_a_failure_without_a_hint_is_one_sentence_with_a_fix(message: str, line: str) -> None:
    error = error_of(Failure("script", message), url="local:")
    assert error.message == line
    assert error.hint == "Read the log, fix the cause, then run doit again."


def test_a_cancelled_job_is_built_again_by_the_named_command() -> None:
    error = error_of(None, "cancelled")
    assert error.message == "umtprd was cancelled on ssh://pi."
    assert error.hint == "Build it again: doit umtprd"
