"""What a dodo.py can get wrong, told in one paragraph that says what to do; and odd file names, which are right."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import threading
from pathlib import Path

import pytest
from project import Project, Run

import gamebear_tasks  # noqa: F401 - for the table's arguments
from gamebear_tasks.errors import SettingsError

IMPORTS = "import gamebear_tasks\nfrom gamebear_tasks import archive, artifact, either, git, task_builder, task_lock\n"

PIN = "gamebear_tasks.archive('file:///nowhere.tar', sha256='0' * 64)"


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a script and an input; its builder's store is that of the other quick tests."""
    made = Project(tmp_path / "project", home=tmp_path_factory.getbasetemp() / "quick-home")
    made.write("x.py", f"import shutil\n# {tmp_path}\nshutil.copy('in', 'x')\n")
    made.write("in", "")
    return made


def assert_is_one_paragraph(run: Run, said: str) -> None:
    """See that a run failed saying something, once, and nothing else but what doit says."""
    run.failed(said)
    assert "Traceback" not in run.text
    lines = [
        line for line in run.text.splitlines() if line and not line.startswith((".  ", "TaskError - ", "TaskFailed - "))
    ]
    assert len(lines) == 1, run.text
    assert re.search(r"[.…)]$", lines[0]), "a sentence"


# (arguments of artifact(), what is said)
ARTIFACTS = [
    (
        "'y.py', outputs=['x']",
        "The buildscript y.py cannot be read: No such file or directory. Its path is relative to",
    ),
    ("'build', outputs=['x']", "build cannot be read: Is a directory. It has to be a file."),
    ("'bad.py', outputs=['x']", "bad.py, line 2, is not Python: '(' was never closed."),
    ("3, outputs=['x']", "artifact(3): that is neither a buildscript nor a function. Say artifact("),
    ("None, outputs=['x']", "artifact(None): that is neither a buildscript nor a function."),
    ("'x.py', outputs='build/x'", "outputs= is a list, and got the text 'build/x'. Say outputs=['build/x']."),
    ("'x.py', outputs=[]", "artifact('x.py') has no outputs. Say outputs=[\"build/NAME\"]."),
    ("'x.py', outputs=None", "outputs= is a list of paths, not None."),
    ("'x.py', outputs={'x': 'build/x'}", "outputs= is a list of paths, not {'x': 'build/x'}."),
    ("'x.py', outputs=[3]", "outputs= is a list of paths, and 3 is none."),
    ("'x.py', outputs=['a\\0b']", "outputs= is a list of paths, and 'a\\x00b' is none."),
    ("'x.py', outputs=['\\ud800']", "outputs= is a list of paths, and '\\ud800' is none."),
    ("'\\ud800', outputs=['x']", "artifact('\\ud800'): that is neither a buildscript nor a function."),
    (f"'x.py', outputs=['x'], sources={{'\\ud800': {PIN}}}", "'\\ud800' cannot be the name of a source of x.py."),
    ("'x.py', outputs=['a/x', 'b/x']", "Two outputs have the name 'x': 'a/x' and 'b/x'. In the program's folder they"),
    ("'x.py', outputs=['build/..']", "'..' cannot be the name of an output of x.py. It has to be a file's name,"),
    ("'x.py', outputs=['']", "'' cannot be the name of an output of x.py."),
    ("'x.py', outputs=['x' * 256]", "xx' cannot be the name of an output of x.py."),
    ("'x.py', outputs=['x'], inputs='in'", "inputs= is a list, and got the text 'in'. Say inputs=['in']."),
    ("'x.py', outputs=['x'], inputs=[b'in']", "inputs= is a list of paths, and b'in' is none."),
    ("'x.py', outputs=['x'], inputs={'in': None}", "inputs= is a list of paths, and None is none."),
    ("'x.py', outputs=['x'], inputs={'a/b': 'in'}", "'a/b' cannot be the name of an input of x.py."),
    ("'x.py', outputs=['x'], inputs=['in', 'a/in']", "Two inputs have the name 'in': 'in' and 'a/in'."),
    ("'x.py', outputs=['x'], inputs=['a/x.py']", "'x.py' is an input of x.py, and the program has that name too. Give"),
    ("'x.py', outputs=['x'], args=[1]", "The args of artifact('x.py') are not plain JSON: [1] is no dict. Give a dict"),
    ("'x.py', outputs=['x'], args={'a': {1}}", "The args of artifact('x.py') are not plain JSON: {1} is not JSON."),
    ("'x.py', outputs=['x'], args={'a': {1: 2}}", "are not plain JSON: a key is 1, not a string."),
    ("'x.py', outputs=['x'], args={1: 2}", "are not plain JSON: a key is 1, not a string."),
    ("'x.py', outputs=['x'], args={'a': float('nan')}", "are not plain JSON: Out of range float values are not JSON"),
    ("'x.py', outputs=['x'], args=LOOP", "are not plain JSON: maximum recursion depth exceeded"),
    ("'x.py', outputs=['x'], sources=['up']", "sources= gives each source the name of its folder, and got ['up']. Say"),
    (
        "'x.py', outputs=['x'], sources={'up': 'https://a/b'}",
        "The source 'up' is 'https://a/b', which is no source. See",
    ),
    (f"'x.py', outputs=['x'], sources={{'a/b': {PIN}}}", "'a/b' cannot be the name of a source of x.py."),
    (f"'x.py', outputs=['x'], sources={{'..': {PIN}}}", "'..' cannot be the name of a source of x.py."),
    (f"'x.py', outputs=['x'], sources={{1: {PIN}}}", "1 cannot be the name of a source of x.py."),
    (
        f"'x.py', outputs=['x'], inputs=['in'], sources={{'in': {PIN}}}",
        "'in' is a source of x.py, and an input has that name too. Give one of them another name.",
    ),
    (
        f"'with_modules.py', outputs=['x'], sources={{'pkg': {PIN}}}",
        "'pkg' is a source of with_modules.py, and a package of modules has that name too.",
    ),
    ("'with_modules.py', outputs=['x'], inputs=['a/mod.py']", "is an input of with_modules.py, and a module has that"),
    (
        "'x.py', outputs=['x'], arch='armv7l'",
        "No architecture is called 'armv7l' (from artifact('x.py')). Debian calls it armhf.",
    ),
    (
        "'x.py', outputs=['x'], arch=5",
        "The setting arch is 5, which is no text of one line (from artifact('x.py')). Leave it out, or give it one.",
    ),
    (
        "'x.py', outputs=['x'], time_limit='soon'",
        "The setting time_limit is 'soon' (from",
    ),
    ("locked, outputs=['x']", "uses LOCK, a lock, which has no stable text to be told by, so its job"),
]


@pytest.fixture
def folder(project: Project, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a dodo.py with scripts right and wrong, while it is loaded."""
    project.write("bad.py", "a = 1\nc.run(\n")
    project.write("with_modules.py", "import mod, pkg.deep\n")
    for name in ("mod.py", "pkg/deep.py"):
        project.write(name, "")
    (project.folder / "build").mkdir()
    monkeypatch.chdir(project.folder)
    return project.folder


LOCK = threading.Lock()


def locked() -> None:
    LOCK.acquire()


LOOP: dict[str, object] = {}
LOOP["a"] = LOOP


@pytest.mark.parametrize(("arguments", "said"), ARTIFACTS)
def test_an_artifact_that_makes_no_sense_is_told_when_dodo_is_loaded(folder: Path, arguments: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        eval(f"gamebear_tasks.artifact({arguments})")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "said"), ARTIFACTS[:-1:9])
def test_doit_shows_it_as_its_own_errors(project: Project, folder: Path, arguments: str, said: str) -> None:
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return artifact({arguments})\n")
    run = project.doit("list")
    assert_is_one_paragraph(run, said)
    assert run.status == 3
    assert run.err.startswith("ERROR: ")


TASK = "artifact('x.py', inputs=['in'], outputs=['build/x'])"


# (doit's arguments, what is said)
SETTINGS = [
    (
        ["x", "builder=nowhere"],
        "The builder 'nowhere' is not a URL. Say builder=local: or builder=ssh://user@host, for",
    ),
    (["x", "builder="], "The setting builder is empty (from the doit variable builder)."),
    (["x", "builder=shh://pi@buildpi"], "No installed builder has the scheme 'shh' of 'shh://pi@buildpi'. There are:"),
    (
        ["x", "builder=local:x"],
        "The builder 'local:x' is not known. This machine is `local:`, nothing after the colon.",
    ),
    (["builder", "builder=shh:"], "No installed builder has the scheme 'shh' of 'shh:'."),
    (["x", "arch=armv7l"], "No architecture is called 'armv7l' (from the doit variable arch). Debian calls it armhf."),
    (["x", "time_limit=soon"], "The setting time_limit is 'soon'"),
]


@pytest.mark.parametrize(("arguments", "said"), SETTINGS)
def test_a_setting_that_makes_no_sense_is_told(project: Project, arguments: list[str], said: str) -> None:
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return {TASK}\n")
    run = project.doit(*arguments)
    run.failed(said)
    assert "Traceback" not in run.text
    assert "returned False" not in run.text
    assert not (project.folder / "build/x").exists()


def test_an_input_that_does_not_exist_is_told(project: Project) -> None:
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return artifact('x.py', inputs=['no'], outputs=['x'])\n")
    assert_is_one_paragraph(
        project.doit(), "no cannot be read: No such file or directory. A job needs all of its files."
    )
    (project.folder / "no").mkdir()
    assert_is_one_paragraph(project.doit(), "no cannot be read: Is a directory. A job needs all of its files.")


def test_a_target_that_is_a_folder_is_told_before_anything_is_built(project: Project) -> None:
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return {TASK}\n")
    project.write("build/x/file", "")
    assert_is_one_paragraph(project.doit(), "build/x is a folder, and should become a file. Move it out of the way.")
    assert not (project.folder / "build/logs").exists()


def test_a_targets_folder_that_is_a_file_is_told_before_anything_is_built(project: Project) -> None:
    project.write(
        "dodo.py", f"{IMPORTS}def task_x():\n    return artifact('x.py', inputs=['in'], outputs=['in/a/x'])\n"
    )
    assert_is_one_paragraph(project.doit(), "in is a file, and should be a folder for in/a/x. Move it out of the way.")
    project.write("build", "")
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return artifact('x.py', inputs=['in'], outputs=['x'])\n")
    assert_is_one_paragraph(project.doit(), "build is a file, and should be a folder for build/logs/x.log. Move it out")


def test_a_source_that_is_not_pinned_is_told(project: Project) -> None:
    source = "sources={'up': git('https://nowhere.invalid/up.git', rev='main')}"
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return artifact('x.py', outputs=['x'], {source})\n")
    project.doit("list").ok()
    assert_is_one_paragraph(project.doit("x"), "is not pinned: gamebear.lock has no entry for it. Run `doit lock` and")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "gamebear.lock is damaged: "),
        ('{"version": 2}', "gamebear.lock has version 2; this gamebear-tasks knows version 1 only. Upgrade"),
    ],
)
def test_a_lock_file_that_cannot_be_used_is_told(project: Project, content: str, said: str) -> None:
    source = "sources={'up': git('https://nowhere.invalid/up.git', rev='main')}"
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return artifact('x.py', outputs=['x'], {source})\n")
    project.write("gamebear.lock", content)
    for arguments in (["x"], ["-n", "2", "x"]):
        assert_is_one_paragraph(project.doit(*arguments), said)


def test_a_choice_of_sources_that_there_is_not_is_told_even_if_all_is_up_to_date(project: Project) -> None:
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
    said = "The setting sources=debain names no alternative of any source. There are: git, web."
    for arguments in (["x"], ["-n", "2", "x"]):
        assert_is_one_paragraph(project.doit(*arguments, "sources=debain"), said)


def test_a_choice_where_there_is_none_is_nothing_to_complain_of(project: Project) -> None:
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return {TASK}\n")
    project.doit("x", GAMEBEAR_SOURCES="debian").ok()


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
def test_files_with_odd_names_go_there_and_come_back(project: Project, tmp_path: Path, locale: str) -> None:
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
        "        outputs=['build/out/' + name for name in NAMES],\n"
        "    )\n",
    )
    project.doit("x", LC_ALL=locale).ok()
    out = {os.fsencode(path.name): path.read_bytes() for path in (project.folder / "build/out").iterdir()}
    assert out == {os.fsencode(name): b"made " + os.fsencode(name) for name in NAMES}
    assert project.doit("x", LC_ALL=locale).ok().ran == []
    project.doit("clean", "x", LC_ALL=locale).ok()
    assert list((project.folder / "build/out").iterdir()) == []
    assert not list(tmp_path.rglob("owned"))


def test_an_odd_name_in_an_error_is_told_so_that_a_terminal_can_show_it(project: Project) -> None:
    odd = os.fsdecode(b"\xff\x1b[31m")
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return artifact('x.py', inputs=['in'], outputs=[{odd!r}])\n")
    (project.folder / odd).mkdir()
    run = project.doit("x", LC_ALL="C.UTF-8")
    assert_is_one_paragraph(run, "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[31m is a folder")
    (project.folder / odd).rmdir()
    project.write("x.py", "pass")
    project.doit("x", LC_ALL="C.UTF-8").failed("its output", "is not in its working directory")


def test_a_folder_and_a_home_with_odd_names_work(tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s a "b" -x $HOME\nü'
    project = Project(odd / "project", home=odd / "home")
    project.write("dodo.py", f"{IMPORTS}def task_x():\n    return {TASK}\n")
    project.write("x.py", "import shutil; shutil.copy('in', 'x')")
    project.write("in", "content")
    project.doit("x").ok()
    assert (project.folder / "build/x").read_text() == "content"
