"""Artifacts as doit tasks: doit's commands, rebuilds, and the cost of loading."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from project import ROOT, Project, Run

DODO = """
from gamebear_tasks import archive, artifact

def task_usbgx():
    \"\"\"the library\"\"\"
    return artifact(
        "scripts/usbgx.py", sources={{"usbgx": archive({url!r}, sha256={sha256!r})}}, outputs=["build/usbgx.tar"]
    )

def task_gt():
    \"\"\"the tool\"\"\"
    return artifact("scripts/gt.py", inputs=["build/usbgx.tar"], outputs=["build/gt.tar"], args={{"man": True}})

def task_umtprd():
    \"\"\"the daemon\"\"\"
    return artifact("scripts/umtprd.py", inputs=["umtprd.conf"], outputs=["build/umtprd"])
"""

SCRIPTS = {
    "scripts/usbgx.py": """
import common
from parts import FLAGS
common.count("usbgx")
open("usbgx.tar", "w").write(open("usbgx/version").read() + FLAGS)
""",
    "scripts/gt.py": """
#| arg: man: bool
import common
common.count("gt")
open("gt.tar", "w").write(f"gt with man pages: {man}, and " + open("usbgx.tar").read())
""",
    "scripts/umtprd.py": 'open("umtprd", "w").write(open("umtprd.conf").read())\n',
    "scripts/common.py": 'def count(name):\n    open({count!r}, "a").write(name + "\\n")\n',
    "scripts/parts/__init__.py": "from .flags import FLAGS\n",
    "scripts/parts/flags.py": "from . import base\nFLAGS = base.FLAGS\n",
    "scripts/parts/base.py": 'FLAGS = "-O2"\n',
    "scripts/unused.py": "",
    "umtprd.conf": "loop_on_disconnect 1\n",
}

ALL = ["usbgx", "gt", "umtprd"]


def tar(path: Path, **files: str) -> str:
    """Write a tar with a folder and files in it; return its SHA-256."""
    folder = path.parent / "tree"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with tarfile.open(path, "w") as archive:
        archive.add(folder, "tree")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def template(system: None, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with three built artifacts."""
    top = tmp_path_factory.mktemp("template")
    project = Project(top / "project", home=tmp_path_factory.getbasetemp() / "quick-home")
    sha256 = tar(top / "usbgx.tar", version="libusbgx 0.3 ")
    project.write("dodo.py", DODO.format(url=(top / "usbgx.tar").as_uri(), sha256=sha256))
    for name, text in SCRIPTS.items():
        project.write(name, text.replace("{count!r}", repr(str(top / "count"))))
    assert project.doit().ok().ran == ALL
    return project


@pytest.fixture
def built(template: Project, tmp_path: Path) -> Project:
    """A copy of the built project in another folder."""
    shutil.copytree(template.folder, tmp_path / "project")
    return Project(tmp_path / "project", home=template.home)


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An empty project that shares its builder's store with the others in this module."""
    return Project(tmp_path / "project", home=tmp_path_factory.getbasetemp() / "quick-home")


def builds(template: Project) -> list[str]:
    return (template.folder.parent / "count").read_text().split()


def edit(project: Project, name: str, old: str, new: str) -> Path:
    text = (project.folder / name).read_text()
    assert old in text
    return project.write(name, text.replace(old, new))


def targets(project: Project) -> dict[str, str]:
    return {path.name: path.read_text() for path in (project.folder / "build").iterdir() if path.is_file()}


# doit's commands


def test_list_shows_the_tasks_with_their_doc_lines(built: Project) -> None:
    assert built.doit("list").ok().out.splitlines() == [
        "gt       the tool",
        "umtprd   the daemon",
        "usbgx    the library",
    ]


def test_list_shows_up_to_date_tasks(built: Project) -> None:
    def status() -> list[str]:
        return [line[:8].rstrip() for line in built.doit("list", "--all", "--status").ok().out.splitlines()]

    assert status() == ["U gt", "U umtprd", "U usbgx"]
    edit(built, "dodo.py", "True", "False")
    assert status() == ["R gt", "U umtprd", "U usbgx"]


def test_info_shows_files_targets_and_the_reason_to_run(built: Project) -> None:
    info = built.doit("info", "gt").ok().out
    for line in ("the tool", "up-to-date", "scripts/gt.py", "scripts/common.py", "build/usbgx.tar", "build/gt.tar"):
        assert line in info
    edit(built, "dodo.py", "True", "False")
    changed = built.doit("info", "gt")
    assert changed.status == 1
    assert "the job of gt.py: its files, arguments, sources, architecture, names, or the function" in changed.out


def test_the_projects_dodo_lists_the_artifacts_and_the_images(tmp_path: Path) -> None:
    own = Project(tmp_path / "project", home=tmp_path / "home")
    own.take("dodo.py", "buildscripts", "gamebear.lock")
    lines = {line.split()[0]: line.split(None, 1)[1] for line in own.doit("list").ok().out.splitlines()}
    artifacts, images = ["gt", "umtprd", "usbgx"], ["base_image", "gt_image", "image"]
    assert sorted(lines) == sorted([*artifacts, *images])
    assert all(len(doc) > 20 for doc in lines.values())
    info = own.doit("info", "gt").out
    for line in ("buildscripts/gt.py", "buildscripts/common.py", "build/usbgx.tar", "build/gt.tar"):
        assert f" - {line}\n" in info
    assert "umtprd" in own.doit("list", "--all", "--status", "sources=debian").ok().out


def test_clean_removes_the_targets_and_partial_downloads(built: Project) -> None:
    part = built.write(f"build/.gt.tar.{'0' * 16}.part", "half")
    other = built.write("build/mine", "not a target")
    assert "gt - removing file 'build/gt.tar'" in built.doit("clean", "-n", "gt").ok().out
    assert part.exists() and (built.folder / "build/gt.tar").exists()
    built.doit("clean", "gt").ok()
    assert not part.exists()
    assert sorted(targets(built)) == ["mine", "umtprd", "usbgx.tar"]
    built.doit("clean").ok()
    assert sorted(targets(built)) == ["mine"]
    assert other.exists()


@pytest.mark.parametrize("commands", [["clean", "run"], ["forget -a", "run"], ["run -a"]])
def test_missing_targets_and_forgotten_tasks_are_fetched_and_not_built(
    built: Project, template: Project, commands: list[str]
) -> None:
    before = builds(template)
    runs = [built.doit(*command.split()).ok() for command in commands]
    assert runs[-1].ran == ALL
    assert targets(built) == targets(template)
    assert builds(template) == before
    assert built.doit().ok().ran == []


def test_a_task_that_doit_ignores_is_left_alone(built: Project) -> None:
    built.doit("ignore", "gt").ok()
    edit(built, "scripts/gt.py", "man pages", "manuals")
    run = built.doit().ok()
    assert run.ran == [] and "!! gt" in run.out


@pytest.mark.parametrize("arguments", ["-n 4", "-n 4 -P thread"])
def test_parallel_runs_build_every_task_once_and_in_order(
    built: Project, template: Project, arguments: str, request: pytest.FixtureRequest
) -> None:
    for name in ("scripts/usbgx.py", "scripts/umtprd.py"):
        edit(built, name, '"w"', f'"w" {" " * len(arguments)}')  # jobs that no other test uses
    edit(built, "scripts/parts/base.py", "-O2", f"-O2 {arguments}")
    before = builds(template)
    run = built.doit(*arguments.split()).ok()
    assert sorted(run.ran) == sorted(ALL)
    assert builds(template)[len(before) :] == ["usbgx", "gt"]
    assert targets(built)["gt.tar"] == f"gt with man pages: True, and libusbgx 0.3 -O2 {arguments}"
    assert built.doit(*arguments.split()).ok().ran == []


def test_a_failure_in_a_parallel_run_is_shown_once(built: Project) -> None:
    built.write("scripts/umtprd.py", "raise ValueError('upside down')")
    for mode in ("process", "thread"):
        built.doit("-n", "2", "-P", mode).failed("umtprd failed on local: ", "upside down")


def test_doits_json_report_stays_json(built: Project) -> None:
    edit(built, "scripts/gt.py", "man pages", "json pages")
    run = built.doit("run", "-r", "json").ok()
    assert {task["name"]: task["result"] for task in json.loads(run.out)["tasks"]} == {
        "usbgx": "up-to-date",
        "gt": "success",
        "umtprd": "up-to-date",
    }


# rebuilds


def change_pin(project: Project) -> None:
    upstream = project.folder.parent / "new"
    upstream.mkdir()
    sha256 = tar(upstream / "usbgx.tar", version="libusbgx 0.4 ")
    text = (project.folder / "dodo.py").read_text()
    (start, end) = (text.index("archive('"), text.index("')}"))
    url = (upstream / "usbgx.tar").as_uri()
    project.write("dodo.py", f"{text[:start]}archive({url!r}, sha256={sha256!r}{text[end + 1 :]}")


def append(name: str, text: str) -> Callable[[Project], object]:
    return lambda project: project.write(name, (project.folder / name).read_text() + text)


def replace(name: str, old: str, new: str) -> Callable[[Project], object]:
    return lambda project: edit(project, name, old, new)


def touch_all(project: Project) -> None:
    """Change only the timestamps of the files."""
    for path in project.folder.rglob("*.*"):
        os.utime(path, (1, 1))


@pytest.mark.parametrize(
    ("change", "again"),
    [
        pytest.param(replace("scripts/usbgx.py", "+ FLAGS", "+ FLAGS + '!'"), ["usbgx", "gt"], id="script"),
        pytest.param(replace("scripts/usbgx.py", "\nimport", "\n# why\nimport"), ["usbgx"], id="comment-in-script"),
        pytest.param(append("scripts/common.py", "# why\n"), ["usbgx", "gt"], id="module-of-two"),
        pytest.param(append("scripts/parts/__init__.py", "# why\n"), ["usbgx"], id="package"),
        pytest.param(append("scripts/parts/flags.py", "# why\n"), ["usbgx"], id="relative-import"),
        pytest.param(replace("scripts/parts/base.py", "-O2", "-O3"), ["usbgx", "gt"], id="transitive-import"),
        pytest.param(change_pin, ["usbgx", "gt"], id="pin"),
        pytest.param(replace("dodo.py", "True", "False"), ["gt"], id="argument"),
        pytest.param(replace("umtprd.conf", "1", "0"), ["umtprd"], id="input"),
        pytest.param(lambda project: (project.folder / "umtprd.conf").chmod(0o755), ["umtprd"], id="input's-mode"),
        pytest.param(replace("dodo.py", "build/gt.tar", "build/gt/gt.tar"), ["gt"], id="target's-place"),
    ],
)
def test_a_change_rebuilds_exactly_its_dependents(
    built: Project, change: Callable[[Project], object], again: list[str]
) -> None:
    change(built)
    assert built.doit().ok().ran == again


def test_changes_outside_a_job_rebuild_nothing(built: Project) -> None:
    for change in (
        append("scripts/unused.py", "x = 1\n"),
        append("dodo.py", "\n# why\n"),
        replace("dodo.py", '{"man": True}', '{ "man":True }'),
        replace("dodo.py", '["umtprd.conf"]', '{"umtprd.conf": "umtprd.conf"}'),
        replace("dodo.py", 'outputs=["build/gt.tar"]', 'outputs=["build/gt.tar"], time_limit=9'),
        lambda project: (project.folder / "scripts/gt.py").chmod(0o755),
        lambda project: project.write("pyproject.toml", '[tool.gamebear]\npatience = 5\ninterrupt = "detach"\n'),
        touch_all,
    ):
        change(built)
    assert built.doit("base=bootstrap").ok().ran == []


def test_another_architecture_is_another_artifact(built: Project) -> None:
    def would_run(*arguments: str) -> list[str]:
        lines = built.doit("list", "--all", "--status", *arguments).ok().out.splitlines()
        return [line.split()[1] for line in lines if line.startswith("R")]

    assert would_run("arch=s390x") == sorted(ALL)
    assert would_run() == []
    edit(built, "dodo.py", 'outputs=["build/umtprd"]', 'outputs=["build/umtprd"], arch="s390x"')
    assert would_run() == ["umtprd"]


def test_another_builder_rebuilds_nothing(built: Project) -> None:
    assert built.doit("builder=ssh://nobody@nowhere.invalid").ok().ran == []


def test_an_argument_that_is_changed_back_is_fetched(built: Project, template: Project) -> None:
    edit(built, "dodo.py", "True", "False")
    built.doit().ok()
    before = builds(template)
    edit(built, "dodo.py", "False", "True")
    assert built.doit().ok().ran == ["gt"]
    assert builds(template) == before
    assert targets(built) == targets(template)


@pytest.mark.system
def test_a_pin_that_gamebear_lock_writes_counts(project: Project) -> None:
    upstream = project.folder / "upstream"
    upstream.mkdir()
    (upstream / "version").write_text("1")

    def git(*arguments: str) -> None:
        author = ["-c", "user.name=A U Thor", "-c", "user.email=author@example.com"]
        subprocess.run(["git", "-C", upstream, *author, *arguments], check=True, capture_output=True)

    git("init", "--initial-branch=main")
    git("add", "version")
    git("commit", "--message=1")
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact, git\n"
        "def task_x():\n"
        f"    return artifact('x.py', sources={{'up': git({upstream.as_uri()!r}, rev='main')}}, outputs=['x'])\n",
    )
    project.write("x.py", "import shutil; shutil.copy('up/version', 'x')")
    project.doit("x").failed("not pinned", "gamebear lock")
    project.gamebear("lock").ok()
    assert project.doit("x").ok().ran == ["x"]
    assert project.doit("x").ok().ran == []
    (upstream / "version").write_text("2")
    git("commit", "--all", "--message=2")
    assert project.doit("x").ok().ran == []
    project.gamebear("lock", "--update").ok()
    assert project.doit("x").ok().ran == ["x"]
    assert (project.folder / "x").read_text() == "2"


# cost of loading

WATCH = """
import atexit, os, sys
log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
EVENTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "pty.")

def watch(event, arguments):
    if event == "compile" and arguments[1] == "script":
        os.write(log, b"read\\n")
    if event.startswith(EVENTS):
        os.write(log, f"event {event} {arguments!r}\\n".encode())

def tell():
    os.write(log, "".join(f"module {name}\\n" for name in list(sys.modules)).encode())

sys.addaudithook(watch)
atexit.register(tell)
"""

CONTROL = """
def task_x():
    return {"actions": None, "uptodate": [True]}
"""


def watched(project: Project, *arguments: str) -> tuple[Run, list[str], set[str]]:
    """Run doit. Return the sockets and programs that it opened, and the modules that it imported."""
    site = project.folder.parent / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(WATCH)
    log = project.folder.parent / "watch.log"
    log.unlink(missing_ok=True)
    run = project.doit(*arguments, HOME="/dev/null/home", PYTHONPATH=f"{site}:{ROOT}", WATCH_LOG=str(log)).ok()
    lines = log.read_text().splitlines()
    modules = {line[7:] for line in lines if line.startswith("module ")}
    assert "doit" in modules
    return run, [line for line in lines if line.startswith("event ")], modules


@pytest.mark.parametrize("command", [["run"], ["list", "--all", "--status"]])
def test_loading_and_an_up_to_date_run_start_no_program_and_use_no_network(built: Project, command: list[str]) -> None:
    run, events, _ = watched(built, *command, "builder=ssh://pi@buildpi")
    assert run.ran == []
    assert events == []


def test_the_watch_sees_programs(built: Project) -> None:
    built.write("dodo.py", CONTROL + "import subprocess; subprocess.run(['true'])\n")
    _, events, _ = watched(built, "list")
    assert any("subprocess.Popen" in event for event in events)


def test_an_up_to_date_run_imports_only_the_standard_library_and_the_package(built: Project) -> None:
    _, _, ours = watched(built, "run", "builder=ssh://pi@buildpi")
    built.write("control.py", CONTROL)
    _, _, plain = watched(built, "-f", "control.py", "run")
    new = {name.partition(".")[0] for name in ours - plain}
    assert new - set(sys.stdlib_module_names) == {"gamebear_tasks", "dodo"}
    assert not HEAVY & new


HEAVY = {
    "asyncio",
    "concurrent",
    "ctypes",
    "difflib",
    "email",
    "http",
    "logging",
    "random",
    "sqlite3",
    "ssl",
    "tarfile",
    "urllib",
    "zipfile",
}
"""Standard modules whose import takes longer than that of the whole package."""

NEEDED = {
    "client",
    "client.cancellation",
    "client.placement_marks",
    "config",
    "doit_plugin",
    "doit_plugin.action",
    "doit_plugin.artifact",
    "errors",
    "jobspec",
    "jobspec.module_finder",
    "jobspec.plan",
    "jobspec.canonical_json",
    "records",
    "records.run_journal",
    "runner",
    "runner.host",
    "runner.host.arch",
    "runner.util",
    "runner.util.atomic_files",
    "runner.util.locks",
    "sources",
    "sources.declare",
    "util",
    "util.file_hashes",
    "util.locations",
    "util.messages",
    "util.process",
    "util.text",
}
"""Modules of the package that a dodo.py with artifacts imports."""


def test_an_up_to_date_run_imports_only_modules_that_dodo_needs(built: Project) -> None:
    def loaded() -> set[str]:
        _, _, modules = watched(built, "run")
        return {name.partition(".")[2] for name in modules if name.startswith("gamebear_tasks.")}

    sources = {"sources.alternatives", "sources.archive", "sources.base", "sources.lockfile", "util.subprocesses"}
    sources.add("runner.util.processes")
    assert loaded() <= NEEDED | sources | {"doit_plugin.reporter", "sources.deterministic_tar"}
    built.write("x.py", "open('x', 'w').close()")
    built.write("dodo.py", "from gamebear_tasks import artifact\ndef task_x(): return artifact('x.py', outputs=['x'])")
    built.doit().ok()
    assert loaded() == NEEDED


def reads(project: Project, *arguments: str) -> int:
    watched(project, *arguments)
    return (project.folder.parent / "watch.log").read_text().splitlines().count("read")


def test_each_script_and_module_is_read_once_in_a_run(built: Project) -> None:
    edit(
        built,
        "dodo.py",
        "def task_umtprd",
        """def task_more():
    for size in range(20):
        yield {**artifact("scripts/gt.py", outputs=[f"build/{size}"], args={"size": size}), "name": str(size)}

def task_umtprd""",
    )
    time.sleep(0.2)  # files that were just modified are not cached
    assert reads(built, "list") == 7


def test_cached_imports_of_a_file_do_not_hide_its_current_imports(built: Project) -> None:
    time.sleep(0.2)
    built.doit("list").ok()
    append("scripts/umtprd.py", "import late\n")(built)
    assert "scripts/late.py" not in built.doit("info", "umtprd").out
    built.write("scripts/late.py", "")
    assert "scripts/late.py" in built.doit("info", "umtprd").out


def test_listing_writes_no_files_in_a_project_without_builds(project: Project) -> None:
    project.write("dodo.py", "from gamebear_tasks import artifact\ndef task_x(): return artifact('x', outputs=['y'])")
    project.write("x", "")
    time.sleep(0.2)
    project.doit("list").ok()
    assert not (project.folder / "build").exists()


# changes by an author


@pytest.mark.system
def test_an_artifact_is_a_plain_task_that_may_be_edited(project: Project) -> None:
    project.write(
        "dodo.py",
        """
from doit.tools import config_changed
from gamebear_tasks import artifact

def note(text):
    with open("notes", "a") as file:
        file.write(text)

def task_x():
    task = artifact("x.py", inputs=["in"], outputs=["build/x"])
    task["basename"] = "renamed"
    task["doc"] = "an author's own words"
    task["file_dep"].append("extra")
    task["targets"].append("build/size")
    task["uptodate"].append(config_changed("1"))
    task["actions"].insert(0, "echo made > in")
    task["actions"].append((note, ["after "]))
    task["actions"].append("wc -c < build/x > build/size")
    task["verbosity"] = 0
    return task
""",
    )
    project.write("extra", "1")
    project.write("in", "")
    project.write("x.py", "print('loud'); open('x', 'w').write(open('in').read())")
    first = project.doit().ok()
    assert first.ran == ["renamed"]
    assert "loud" not in first.text
    assert (project.folder / "build/x").read_text() == "made\n"
    assert (project.folder / "build/size").read_text().strip() == "5"
    assert (project.folder / "notes").read_text() == "after "
    assert project.doit("list").ok().out == "renamed   an author's own words\n"
    assert project.doit().ok().ran == []
    project.write("extra", "2")
    assert project.doit().ok().ran == ["renamed"]
    edit(project, "dodo.py", 'config_changed("1")', 'config_changed("2")')
    assert project.doit().ok().ran == ["renamed"]
    assert project.doit().ok().ran == []
    project.doit("clean").ok()
    assert [path.name for path in (project.folder / "build").iterdir()] == ["logs"]


@pytest.mark.system
@pytest.mark.parametrize("arguments", [(), ("-n", "2")])
def test_artifacts_may_be_subtasks_and_created_late(project: Project, arguments: tuple[str, ...]) -> None:
    project.write(
        "dodo.py",
        f"""
# {arguments}
from doit import create_after
from gamebear_tasks import artifact

def task_generate():
    return {{"actions": ["echo 'open(\\"late\\", \\"w\\").close()' > late.py"], "targets": ["late.py"]}}

@create_after(executed="generate", target_regex="build/late")
def task_late():
    return artifact("late.py", outputs=["build/late"])

def task_size():
    for size in (1, 2):
        yield {{
            **artifact("x.py", args={{"size": size, "of": {list(arguments)!r}}}, outputs=[f"build/{{size}}/x"]),
            "name": str(size),
        }}
""",
    )
    project.write("x.py", "#| arg: size: int\n#| arg: of\nopen('x', 'w').write('x' * size)")
    run = project.doit(*arguments).ok()
    assert sorted(run.ran) == ["generate", "late", "size:1", "size:2"]
    assert (project.folder / "build/2/x").read_text() == "xx"
    assert (project.folder / "build/late").read_text() == ""
    assert (project.folder / "build/logs/size%3a2.log").exists()
    assert project.doit(*arguments, "size").ok().ran == []


@pytest.mark.system
def test_a_later_task_may_use_an_artifacts_digest(project: Project) -> None:
    project.write(
        "dodo.py",
        """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", outputs=["x"])

def task_tell():
    return {"actions": ["echo %(digest)s > told"], "getargs": {"digest": ("x", "digest")}}
""",
    )
    project.write("x.py", "open('x', 'w').close()")
    project.doit().ok()
    digest = (project.folder / "told").read_text().strip()
    assert (project.home / ".cache/gamebear/v1/jobs" / digest).is_dir()


@pytest.mark.system
def test_a_task_that_depends_on_an_artifacts_result_detects_other_outputs_of_the_job(project: Project) -> None:
    project.write(
        "dodo.py",
        """
from doit.tools import result_dep
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", outputs=["x"])

def task_tell():
    return {"actions": ["cp x told"], "uptodate": [result_dep("x")]}
""",
    )
    project.write("x.py", "import time; open('x', 'w').write(str(time.time_ns()))")
    project.doit().ok()
    assert project.doit().ok().ran == []
    shutil.rmtree(project.store / "jobs")
    (project.folder / "x").unlink()
    assert project.doit().ok().ran == ["x", "tell"]
    assert (project.folder / "told").read_text() == (project.folder / "x").read_text()


@pytest.mark.system
def test_an_input_made_by_another_task_is_made_first(project: Project) -> None:
    project.write(
        "dodo.py",
        """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", inputs={"data": "made/input.bin"}, outputs=["x"])

def task_input():
    return {"actions": ["mkdir -p made", "echo 1 > made/input.bin"], "targets": ["made/input.bin"], "uptodate": [True]}
""",
    )
    project.write("x.py", "import os; os.rename('data', 'x')")
    assert project.doit("x").ok().ran == ["input", "x"]
    assert (project.folder / "x").read_text() == "1\n"
    assert project.doit("x").ok().ran == []


def test_a_plain_python_can_import_dodo(built: Project) -> None:
    with contextlib.suppress(FileNotFoundError):
        (built.folder / "pyproject.toml").unlink()
    done = subprocess.run(
        [sys.executable, "-c", "import dodo; print(dodo.task_gt()['targets'])"],
        cwd=built.folder,
        env=built.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "['build/gt.tar']\n", done.stderr
