"""Odd file names, which are right; and what is wrong without being an error of its own (those are in `errors.py`)."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from pathlib import Path

import pytest
from project import Project, Run
from terminal import terminal

import gamebear_tasks  # noqa: F401 - for the table's arguments
from gamebear_tasks.runner.executor.outputs import is_pattern

pytestmark = pytest.mark.system

IMPORTS = "import gamebear_tasks\nfrom gamebear_tasks import archive, artifact, either, git, live\n"


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a script and an input; its builder's store is that of the other quick tests."""
    made = Project(tmp_path / "project", home=tmp_path_factory.getbasetemp() / "quick-home")
    made.write("x.py", f"import shutil\n# {tmp_path}\nshutil.copy('in', 'x')\n")
    made.write("in", "")
    return made


def assert_is_one_paragraph(run: Run, message: str) -> None:
    """See that a run failed saying something, once, and nothing else but what doit says."""
    run.failed(message)
    assert "Traceback" not in run.text
    lines = [
        line for line in run.text.splitlines() if line and not line.startswith((".  ", "TaskError - ", "TaskFailed - "))
    ]
    assert len(lines) == 2, run.text
    assert re.search(r"[.…)]$", lines[0]), "a sentence"
    assert lines[1].startswith("→ ")


TASK = "artifact('x.py', inputs=['in'], outputs=['build/x'])"


def test_an_unknown_source_choice_is_an_error_even_if_all_tasks_are_up_to_date(project: Project) -> None:
    tar = project.folder / "up.tar"
    with tarfile.open(tar, "w") as file:
        file.add(project.folder / "x.py", "up/x.py")
    web = f"archive({tar.as_uri()!r}, sha256={hashlib.sha256(tar.read_bytes()).hexdigest()!r})"
    up = f"either(web={web}, git=git('https://nowhere.invalid/up.git', rev='{'0' * 40}'))"
    project.write(
        "dodo.py",
        f"{IMPORTS}def task_x():\n    return artifact('x.py', inputs=['in'], outputs=['x'], sources={{'up': {up}}})\n",
    )
    project.doit("x").ok()
    assert project.doit("x", "sources=web").ok().ran == []
    message = "sources must be an alternative of a source, got 'debain' (from the doit variable sources)."
    for arguments in (["x"], ["-n", "2", "x"]):
        assert_is_one_paragraph(project.doit(*arguments, "sources=debain"), f"{message} Use one of git, web.")


def test_a_source_choice_without_alternatives_is_accepted(project: Project) -> None:
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return {TASK}\n")
    project.doit("x", GAMEBEAR_SOURCES="debian").ok()


def test_a_file_that_became_a_fifo_since_the_last_build_does_not_block(project: Project) -> None:
    """doit itself would open it, to see whether it has changed; likewise what is at the place of the target."""
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return {TASK}\n")
    project.doit("x").ok()
    (project.folder / "build/x").unlink()
    os.mkfifo(project.folder / "build/x")
    project.doit("-a", "x").ok()
    assert (project.folder / "build/x").is_file()
    (project.folder / "in").unlink()
    os.mkfifo(project.folder / "in")
    project.doit("x").failed("in cannot be read: it is not a regular file.")


def test_a_fifo_in_place_of_a_log_does_not_block(project: Project) -> None:
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return {TASK}\n")
    (project.folder / "build/logs").mkdir(parents=True)
    os.mkfifo(project.folder / "build/logs/x.log")
    project.doit("x", timeout=60).failed("build/logs/x.log", "it is not a regular file")


# names

NAMES = [
    "a b",
    "-rf",
    "--help",
    'it\'s "quoted"',
    "two\nlines",
    "tab\tand\rreturn",
    "größe",
    "\N{SNOWMAN}\N{PILE OF POO}",
    "$(touch owned) `x` $HOME ; & | > * ?",
    "back\\slash",
    "percent%s %(x)s {x}",
    "~",
    ".hidden",
    "#|",
    "[x]*",
    "\x1b[31mred",
    os.fsdecode(b"latin-1 \xe9\xff"),
    "u" + "x" * 254,
]

ODD = """
import os, sys
NAMES = {names!r}
for name in NAMES:
    with open("in " + name[:252], "rb") as file:
        assert file.read() == os.fsencode(name)
    with open(name, "wb") as file:
        file.write(b"made " + os.fsencode(name))
"""


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_files_with_odd_names_are_uploaded_and_downloaded(project: Project, tmp_path: Path, locale: str) -> None:
    outputs = [name for name in NAMES if not is_pattern(name)]
    for name in NAMES:
        (project.folder / "in").unlink(missing_ok=True)
        path = project.folder / "ins" / f"in {name[:252]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.fsencode(name))
    project.write("script -x 'y'.py", ODD.format(names=NAMES) + f"# {project.folder} {locale}\n")
    project.write(
        "dodo.py",
        f"{IMPORTS}NAMES = {NAMES!r}\n"
        "def task_x():\n"
        "    return artifact(\n"
        "        \"script -x 'y'.py\",\n"
        "        inputs=['ins/in ' + name[:252] for name in NAMES],\n"
        f"        outputs=['build/out/' + name for name in {outputs!r}],\n"
        "    )\n",
    )
    project.doit("x", LC_ALL=locale).ok()
    out = {os.fsencode(path.name): path.read_bytes() for path in (project.folder / "build/out").iterdir()}
    assert out == {os.fsencode(name): b"made " + os.fsencode(name) for name in outputs}
    assert project.doit("x", LC_ALL=locale).ok().ran == []
    project.doit("clean", "x", LC_ALL=locale).ok()
    assert list((project.folder / "build/out").iterdir()) == []
    assert not list(tmp_path.rglob("owned"))


def test_an_odd_name_in_an_error_is_escaped_for_the_terminal(project: Project) -> None:
    odd = os.fsdecode(b"\xff\x1b[31m")
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return artifact('x.py', inputs=['in'], outputs=[{odd!r}])\n")
    (project.folder / odd).mkdir()
    run = project.doit("x", LC_ALL="C.UTF-8")
    assert_is_one_paragraph(
        run, "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[31m cannot be written: it is a folder"
    )
    (project.folder / odd).rmdir()
    project.write("x.py", "pass")
    project.doit("x", LC_ALL="C.UTF-8").failed("output ", "is missing from the working directory")


def test_names_with_newlines_do_not_break_lines(project: Project) -> None:
    odd = "two\nlines\x1b[31m\r"
    project.write(
        "dodo.py",
        f"{IMPORTS}ODD = {odd!r}\nDOIT_CONFIG = {{'reporter': live}}\n"
        "def task_x():\n"
        "    yield {'basename': ODD, **artifact('x.py', inputs=['in'], outputs=[f'build/{ODD}/x'])}\n"
        "    yield {'basename': f'bad {ODD}', **artifact('x.py', inputs=[], outputs=[f'build/{ODD}/y'])}\n",
    )
    message = [project.doit(*words).text for words in ([], [odd], ["shell", odd], ["jobs"], ["provenance"])]
    assert "two lines" in message[0] and "two lines" in message[2]
    assert "removing file 'build/two lines" in project.doit("clean").ok().out
    with terminal(project, 100, 30) as seen:
        seen.type("clear; doit -n 2", "Enter")
        message.append(seen.showed("failed: bad two lines"))
    for text in message:
        assert not re.search(r"^ *lines", text, re.MULTILINE) and "\x1b" not in text and "\r" not in text, text


def test_a_folder_and_a_home_with_odd_names_work(tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s a "b" -x $HOME\nü'
    project = Project(odd / "project", home=odd / "home")
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return {TASK}\n")
    project.write("x.py", "import shutil; shutil.copy('in', 'x')")
    project.write("in", "content")
    project.doit("x").ok()
    assert (project.folder / "build/x").read_text() == "content"
