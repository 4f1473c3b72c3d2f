"""Commands whose standard output is closed or full."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
from project import OUR_FRAMES, Project


@pytest.fixture(scope="module")
def built(system: None, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose task x was built."""
    folder = tmp_path_factory.mktemp("built")
    project = Project(folder / "project", home=folder / "home")
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\ndef task_x():\n    return artifact('x.py', outputs=['build/x'])\n",
    )
    project.write("x.py", "print('hello', flush=True)\nopen('x', 'w').close()\n")
    project.doit("x").ok()
    return project


def unread(project: Project, *words: str, errors: bool = False, **environment: str) -> tuple[int, str]:
    """Run gamebear with a standard output whose reader has exited; return its status and standard error.

    Args:
        project: The project.
        words: Command line.
        errors: Whether standard error has no reader either.
        environment: Additional variables.
    """
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            project.gamebear_command(*words),
            cwd=project.folder,
            env={**project.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer if errors else subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize(
    ("words", "status", "errors"),
    [
        ("jobs", 141, False),
        ("jobs follow x", 141, True),
        ("doctor", 141, False),
        ("provenance", 141, False),
        ("provenance z", 2, True),
        ("report", 141, False),
        ("help doctor", 141, False),
        ("list", 141, False),
        ("info x", 141, False),
        ("dumpdb", 141, False),
        ("run -r console -a x", 141, False),
        ("run -r live -a x", 0, True),
        ("run -r live -a -v 2 -n 2 x", 0, False),
    ],
)
def test_a_closed_standard_output_causes_no_traceback(built: Project, words: str, status: int, errors: bool) -> None:
    unbuffered = {"PYTHONUNBUFFERED": "1"} if "-n" in words else {}
    found, message = unread(built, *words.split(), errors=errors, **unbuffered)
    assert found == status, message
    assert "Error" not in message and "Traceback" not in message


@pytest.mark.system
@pytest.mark.parametrize(
    ("into", "status", "message"),
    [
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("> /dev/full", 2, "ERROR: No space left on device. Check free disk space (df -h)"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_causes_no_traceback(
    project: Project, into: str, status: int, message: str, unbuffered: str
) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(project.command('jobs'))} {into}"],
        cwd=project.folder,
        env={**project.environment, "PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status and not OUR_FRAMES.search(done.stderr), done.stderr
    assert done.stderr.replace("\n→ ", " ").startswith(message) and bool(done.stderr) == bool(message)


@pytest.mark.system
def test_a_character_that_cannot_be_encoded_causes_no_traceback(project: Project) -> None:
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\ndef task_x():\n    return artifact('x.py', outputs=['build/\\xe9'])\n",
    )
    project.write("x.py", "open('\\xe9', 'w').close()\n")
    project.doit().ok()
    assert "\\xe9" in project.gamebear("jobs", PYTHONIOENCODING="ascii").ok().out
    assert project.gamebear("provenance", PYTHONIOENCODING="ascii").ok().out == "build/\\xe9.intoto.json\n"
