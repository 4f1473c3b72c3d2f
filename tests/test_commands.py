"""What all of our commands have in common: where they print to may be gone, or full."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from project import OUR_FRAMES, Project


@pytest.mark.parametrize(
    ("into", "status", "said"),
    [
        (">&-", 0, ""),
        ("| true", 2, ""),
        ("> /dev/full", 2, "ERROR: No space left on device. See that the disk has room"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_takes_is_no_traceback(
    project: Project, into: str, status: int, said: str, unbuffered: str
) -> None:
    command = f"set -o pipefail; {shlex.join(project.command('jobs'))} {into}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=project.folder,
        env={**project.environment, "PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status and not OUR_FRAMES.search(done.stderr), done.stderr
    assert done.stderr.startswith(said) and bool(done.stderr) == bool(said)


def test_a_letter_that_cannot_be_printed_is_no_traceback(project: Project) -> None:
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\ndef task_x():\n    return artifact('x.py', outputs=['build/\\xe9'])\n",
    )
    project.write("x.py", "open('\\xe9', 'w').close()\n")
    project.doit().ok()
    assert "\\xe9" in project.doit("jobs", PYTHONIOENCODING="ascii").ok().out
    assert project.doit("provenance", PYTHONIOENCODING="ascii").ok().out == "build/\\xe9.intoto.json\n"
