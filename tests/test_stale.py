"""Up-to-date checks: the built content decides, never the mtime alone."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from project import Project

from gamebear_tasks.client import placement_marks
from gamebear_tasks.client.placement_marks import PLACED, is_placed, placing
from gamebear_tasks.config import settings
from gamebear_tasks.jobspec.plan import SAVED, read_lock
from gamebear_tasks.runner.util import atomic_files
from gamebear_tasks.sources.lockfile import GitEntry
from gamebear_tasks.util import file_hashes

DODO = """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", inputs=["in"], outputs=["build/x"])
"""

COPY = "import module\nopen('x', 'w').write(open('in').read() + module.TEXT)\n"

SAME_TIME = 1_600_000_000


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that was not built. It shares its builder's store with the others in this module."""
    project = Project(tmp_path / "project", home=tmp_path_factory.getbasetemp() / "quick-home")
    project.write("dodo.py", DODO)
    project.write("x.py", COPY)
    write(project, "in", "1")
    write(project, "module.py", "TEXT = 'a'\n")
    return project


def write(project: Project, name: str, text: str) -> Path:
    """Write a file with an unchanged mtime, as `cp -p`, `rsync -a` and reproducible tars do."""
    path = project.write(name, text)
    os.utime(path, (SAME_TIME, SAME_TIME))
    return path


def add_actions(project: Project, *actions: str, before: bool = False) -> None:
    """Add commands to the artifact's task, after or before the build."""
    edited = f"{list(actions)!r} + task['actions']" if before else f"task['actions'] + {list(actions)!r}"
    text = DODO.replace("return artifact", "task = artifact")
    project.write("dodo.py", f"{text}    return {{**task, 'actions': {edited}}}\n")


def target(project: Project) -> str:
    return (project.folder / "build/x").read_text()


def settle() -> None:
    """Wait until files are old enough to be cached."""
    time.sleep(2 * file_hashes.SETTLED)


# content, and not mtime


@pytest.mark.system
@pytest.mark.parametrize(
    ("name", "text", "made"),
    [
        pytest.param("in", "2", "2a", id="input"),
        pytest.param("in", "22", "22a", id="input-of-another-size"),
        pytest.param("module.py", "TEXT = 'b'\n", "1b", id="module"),
        pytest.param("x.py", COPY.replace("+ module", "* 2 + module"), "11a", id="script"),
    ],
)
@pytest.mark.parametrize("wait", [settle, lambda: None], ids=["cached", "recent"])
def test_other_content_with_the_same_mtime_is_built(
    project: Project, name: str, text: str, made: str, wait: Callable[[], None]
) -> None:
    write(project, "x.py", COPY)
    project.doit().ok()
    wait()
    assert project.doit().ok().ran == []
    write(project, name, text)
    assert project.doit().ok().ran == ["x"]
    assert target(project) == made
    assert project.doit().ok().ran == []


@pytest.mark.system
def test_a_renamed_file_of_the_same_size_and_mtime_is_built(project: Project) -> None:
    other = write(project, "other", "2")
    project.doit().ok()
    settle()
    project.doit().ok()
    os.rename(other, project.folder / "in")
    assert project.doit().ok().ran == ["x"]
    assert target(project) == "2a"


@pytest.mark.system
def test_a_link_to_other_content_of_the_same_size_and_mtime_is_built(project: Project) -> None:
    write(project, "one", "1")
    write(project, "two", "2")
    link = project.folder / "in"
    link.unlink()
    link.symlink_to("one")
    project.doit().ok()
    settle()
    assert project.doit().ok().ran == []
    link.unlink()
    link.symlink_to("two")
    assert project.doit().ok().ran == ["x"]
    assert target(project) == "2a"


@pytest.mark.system
def test_a_retargeted_script_link_is_built_with_the_modules_beside_its_target(project: Project) -> None:
    for name in ("one", "two"):
        write(project, f"{name}/x.py", COPY)
        write(project, f"{name}/module.py", f"TEXT = '{name}'\n")
    script = project.folder / "x.py"
    script.unlink()
    script.symlink_to("one/x.py")
    project.doit().ok()
    assert target(project) == "1one"
    settle()
    assert project.doit().ok().ran == []
    script.unlink()
    script.symlink_to("two/x.py")
    assert project.doit().ok().ran == ["x"]
    assert target(project) == "1two"


# built inputs, and not those at the end of the task


@pytest.mark.system
@pytest.mark.parametrize(
    "arguments",
    [(), ("--backend", "json"), ("--backend", "sqlite3"), ("-n", "2"), ("-n", "2", "-P", "thread")],
    ids=" ".join,
)
def test_an_input_changed_by_a_later_action_counts_as_not_built(project: Project, arguments: tuple[str, ...]) -> None:
    add_actions(project, "test ! -e change || mv change in")
    write(project, "change", "2")
    project.doit(*arguments).ok()
    assert target(project) == "1a"
    assert project.doit(*arguments).ok().ran == ["x"]
    assert target(project) == "2a"
    assert project.doit(*arguments).ok().ran == []


BUILDER = """
from pathlib import Path
from gamebear_tasks.builders.transports import local

def open_builder(url):
    builder = local.open_builder("local:")
    fetch = builder.fetch

    def fetch_slowly(*arguments):
        Path("in").write_text("2")
        return fetch(*arguments)

    builder.fetch = fetch_slowly
    return builder
"""


@pytest.mark.system
def test_an_input_changed_during_the_download_counts_as_not_built(project: Project) -> None:
    about = project.write("site/slow-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: slow\nVersion: 1\n")
    (about.parent / "entry_points.txt").write_text("[gamebear_tasks.builders]\nslow = slow:open_builder\n")
    project.write("site/slow.py", BUILDER)
    path = f"{project.folder / 'site'}:{project.environment['PYTHONPATH']}"
    project.doit("builder=slow:", PYTHONPATH=path).ok()
    assert target(project) == "1a"
    assert project.doit().ok().ran == ["x"]
    assert target(project) == "2a"


@pytest.mark.system
def test_an_input_made_by_an_earlier_action_is_built(project: Project) -> None:
    add_actions(project, "echo made > in", before=True)
    project.doit().ok()
    assert target(project) == "made\na"
    assert project.doit().ok().ran == []


@pytest.mark.system
def test_a_replaced_build_action_builds_nothing(project: Project) -> None:
    """Nothing was built from the inputs, so later runs do not accept the target."""
    text = DODO.replace("return artifact", "task = artifact")
    project.write("dodo.py", f"{text}    return {{**task, 'actions': ['mkdir -p build && touch build/x']}}\n")
    project.doit().ok()
    assert project.doit().ok().ran == ["x"]
    project.write("dodo.py", DODO)
    assert project.doit().ok().ran == ["x"]
    assert target(project) == "1a"


@pytest.mark.system
def test_an_input_removed_from_file_dep_is_still_checked(project: Project) -> None:
    text = DODO.replace("return artifact", "task = artifact")
    project.write("dodo.py", f"{text}    return {{**task, 'file_dep': ['x.py']}}\n")
    project.doit().ok()
    write(project, "in", "2")
    assert project.doit().ok().ran == ["x"]
    assert target(project) == "2a"


@pytest.mark.system
def test_a_script_and_a_module_made_in_the_same_run_are_built(project: Project) -> None:
    """The modules found when dodo.py was loaded are those of the old script."""
    make = 'echo \'import more; open("x", "w").write(more.TEXT)\' > x.py; echo \'TEXT = "late"\' > more.py'
    project.write("dodo.py", DODO + f"\ndef task_make():\n    return {{'actions': [{make!r}], 'targets': ['x.py']}}\n")
    project.write("x.py", "open('x', 'w').write('early')")
    assert project.doit().ok().ran == ["make", "x"]
    assert target(project) == "late"


@pytest.mark.system
def test_a_module_that_appears_in_the_same_run_is_built(project: Project) -> None:
    """The script is unchanged; its import is new."""
    project.write(
        "x.py",
        "try:\n    from extra import TEXT\nexcept ImportError:\n    TEXT = 'none'\nopen('x', 'w').write(TEXT)\n",
    )
    project.write(
        "dodo.py",
        DODO.replace("return artifact", "task = artifact")
        + "    return {**task, 'task_dep': ['make']}\n\n"
        + "def task_make():\n    return {'actions': ['test ! -e more || mv more extra.py']}\n",
    )
    project.doit().ok()
    assert target(project) == "none"
    project.write("more", "TEXT = 'more'\n")
    assert project.doit().ok().ran == ["make", "x"]
    assert target(project) == "more"


# a success that doit's database does not know


@pytest.mark.system
def test_targets_of_a_killed_run_are_not_mistaken_for_those_before_it(project: Project) -> None:
    """doit is killed between the build and the end of the task, and the input is restored."""
    add_actions(project, "test ! -e kill || kill -9 $PPID")
    project.doit().ok()
    write(project, "in", "2")
    project.write("kill", "")
    assert project.doit().status == -signal.SIGKILL
    assert target(project) == "2a"
    (project.folder / "kill").unlink()
    write(project, "in", "1")
    assert project.doit().ok().ran == ["x"]
    assert target(project) == "1a"
    assert project.doit().ok().ran == []


@pytest.mark.system
def test_targets_of_an_interrupted_run_are_not_mistaken_for_those_before_it(project: Project) -> None:
    add_actions(project, "test ! -e kill || kill -2 $PPID")
    project.doit().ok()
    write(project, "in", "2")
    project.write("kill", "")
    assert project.doit().status != 0
    assert target(project) == "2a"
    (project.folder / "kill").unlink()
    write(project, "in", "1")
    assert project.doit().ok().ran == ["x"]
    assert target(project) == "1a"


@pytest.mark.system
@pytest.mark.parametrize("change", ["another database", "another task's name"])
def test_targets_of_another_database_or_task_are_not_mistaken_for_those_before(project: Project, change: str) -> None:
    arguments = ("--db-file", "other.db") if change == "another database" else ()
    project.doit().ok()
    write(project, "in", "2")
    if not arguments:
        project.write("dodo.py", DODO.replace("task_x", "task_y"))
    project.doit(*arguments).ok()
    assert target(project) == "2a"
    assert project.doit(*arguments).ok().ran == []
    project.write("dodo.py", DODO)
    write(project, "in", "1")
    assert project.doit().ok().ran == ["x"]
    assert target(project) == "1a"


@pytest.mark.system
def test_a_failed_run_does_not_count(project: Project) -> None:
    add_actions(project, "test ! -e fail")
    project.doit().ok()
    write(project, "in", "2")
    project.write("fail", "")
    project.doit().failed()
    (project.folder / "fail").unlink()
    assert project.doit().ok().ran == ["x"]
    write(project, "in", "1")
    write(project, "x.py", "raise SystemExit(1)")
    project.doit().failed()
    write(project, "x.py", COPY)
    assert project.doit().ok().ran == ["x"]
    assert target(project) == "1a"


@pytest.mark.system
def test_reset_dep_does_not_mark_unbuilt_targets_as_built(project: Project) -> None:
    project.doit().ok()
    write(project, "in", "2")
    assert "processed x" in project.doit("reset-dep").ok().out
    assert project.doit().ok().ran == ["x"]
    assert target(project) == "2a"
    assert "skip x" in project.doit("reset-dep").ok().out
    project.doit("forget", "x").ok()
    project.doit("reset-dep").ok()
    assert project.doit().ok().ran == ["x"]


@pytest.mark.system
def test_a_project_is_up_to_date_without_its_caches(project: Project) -> None:
    project.doit().ok()
    settle()
    project.doit().ok()
    logs = project.folder / "build/logs"
    assert (logs / ".hashes").exists()
    for text in ("{", '{"version": "1", "files": []}', '{"version": "0", "files": {"in": ""}}'):
        (logs / ".hashes").write_text(text)
        assert project.doit().ok().ran == []
    for path in sorted(logs.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert project.doit().ok().ran == []


@pytest.mark.system
def test_a_target_that_another_program_changed_is_left_as_doit_leaves_it(project: Project) -> None:
    """For example, a booted card image or a stripped program."""
    project.doit().ok()
    project.write("build/x", "mine")
    assert project.doit().ok().ran == []
    assert target(project) == "mine"


@pytest.mark.system
def test_a_target_in_another_place_is_built_although_a_file_is_there(project: Project) -> None:
    project.doit().ok()
    project.write("dodo.py", DODO.replace("build/x", "build/other/x"))
    project.write("build/other/x", "something else")
    assert project.doit().ok().ran == ["x"]
    assert (project.folder / "build/other/x").read_text() == "1a"


# marks


def test_a_target_has_the_mark_of_the_state_that_it_was_placed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = "1" * 64, "2" * 64
    assert is_placed(["a", "b"], first), "there are no marks yet"
    with placing(["a", "b"], first):
        assert not is_placed(["b"], first)
    assert is_placed(["a", "b"], first) and is_placed(["c"], second)
    with placing(["b"], second):
        pass
    assert is_placed(["a"], first) and is_placed(["b"], second)
    assert not is_placed(["a", "b"], first) and not is_placed(["a", "b"], second)
    assert len(os.listdir(PLACED)) == 2


def test_a_target_that_could_not_be_installed_has_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = "1" * 64
    with placing(["a"], state):
        pass
    with pytest.raises(KeyboardInterrupt), placing(["a"], "2" * 64):
        raise KeyboardInterrupt
    assert not is_placed(["a"], state) and not is_placed(["a"], "2" * 64)
    with placing(["a"], state):
        pass
    assert is_placed(["a"], state)


def test_a_target_installed_by_two_concurrent_runs_has_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = "1" * 64, "2" * 64
    with placing(["a"], first), placing(["a"], second):
        pass
    assert not is_placed(["a"], first) and not is_placed(["a"], second)


def test_a_target_installed_by_another_run_meanwhile_is_not_mistaken_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs: list[dict[str, str]] = [{}, {}, {}]

    def be(number: int) -> None:
        monkeypatch.setattr(placement_marks, "variables_of_this_run", lambda: runs[number])

    first, second = "1" * 64, "2" * 64
    with placing(["a"], first):
        pass
    be(0)
    assert is_placed(["a"], first)
    seen = placement_marks._listing
    be(1)
    with placing(["a"], second):
        pass
    be(0)
    monkeypatch.setattr(placement_marks, "_listing", seen)  # the first run is another process
    with placing(["a"], first):
        pass
    be(2)
    assert is_placed(["a"], first) and not is_placed(["a"], second)


def test_a_target_whose_path_is_written_in_several_ways_has_one_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = "1" * 64, "2" * 64
    for path in (str(tmp_path / "build/a"), "other/../build/a"):
        with placing(["build/a"], first):
            pass
        with placing([path], second):
            pass
        assert not is_placed(["build/a"], first)


# the cache of hashes


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that are read for hashing, in a folder without a cache."""
    monkeypatch.chdir(tmp_path)
    found: list[str] = []
    real = atomic_files.sha256

    def read(file: object) -> str:
        found.append(os.readlink(f"/proc/self/fd/{file.fileno()}").rpartition("/")[2])  # type: ignore[attr-defined]
        return real(file)  # type: ignore[arg-type]

    monkeypatch.setattr(file_hashes, "sha256", read)
    return found


@pytest.mark.system
def test_hashes_are_cached_from_one_doit_to_the_next(project: Project) -> None:
    """A wrong hash of an unchanged file shows that the cache is used; a cache of another version is not."""
    project.doit().ok()
    settle()
    project.doit().ok()
    cache = project.folder / "build/logs/.hashes"
    text = cache.read_text()
    files = json.loads(text)["files"]
    assert set(files) == {"x.py", "in", "module.py"}
    wrong = text.replace(files["in"], files["in"][:-64] + "0" * 64)
    cache.write_text(wrong)
    assert project.doit("list", "--status").ok().out.split() == ["R", "x"]
    cache.write_text(wrong.replace('"version": "1"', '"version": "0"'))
    assert project.doit("list", "--status").ok().out.split() == ["U", "x"]


@pytest.mark.parametrize("name", ["st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"])
def test_a_file_version_has_all_attributes_that_change_with_the_content(name: str) -> None:
    about = {"st_dev": 1, "st_ino": 2, "st_size": 3, "st_mtime_ns": 4, "st_ctime_ns": 5}
    before = file_hashes.version(cast(os.stat_result, SimpleNamespace(**about)))
    assert file_hashes.version(cast(os.stat_result, SimpleNamespace(**about | {name: 6}))) != before


@pytest.mark.parametrize("content", [file_hashes.content_of, file_hashes.opened_content_of])
def test_a_file_is_read_again_only_if_its_inode_size_or_times_changed(
    reads: list[str], content: Callable[[str], tuple[str, bool]]
) -> None:
    path = Path("file")
    path.write_text("1")
    settle()
    first = content("file")
    assert content("file") == first
    assert reads == ["file"]
    path.chmod(0o755)  # a new ctime
    settle()
    assert content("file") == (first[0], True)
    assert len(reads) == 2
    os.utime(path, (1, 1))
    settle()
    content("file")
    assert len(reads) == 3


def test_a_file_that_has_just_changed_is_not_cached(reads: list[str]) -> None:
    for text in "12345":
        Path("file").write_text(text)
        os.utime("file", (1, 1))
        sha256, _ = file_hashes.content_of("file")
        assert sha256 == file_hashes.content_of("file")[0]
    assert len(reads) == 10


def test_times_of_whole_seconds_are_not_trusted() -> None:
    """A file system without finer timestamps hides a second write within a second."""
    about = os.stat("/")
    coarse = os.stat_result([*about[:10]], {"st_ctime": 1e9, "st_ctime_ns": 10**18})
    fine = os.stat_result([*about[:10]], {"st_ctime": 1e9, "st_ctime_ns": 10**18 + 1})
    assert not file_hashes.is_settled(coarse) and file_hashes.is_settled(fine)


def test_an_input_that_is_not_a_regular_file_is_rejected_without_blocking(project: Project) -> None:
    (project.folder / "in").unlink()
    os.mkfifo(project.folder / "in")
    with pytest.raises(OSError, match="it is not a regular file"):
        file_hashes.content_of(str(project.folder / "in"))
    with pytest.raises(IsADirectoryError):
        file_hashes.content_of(str(project.folder))
    project.doit().failed("in cannot be read: it is not a regular file.")


def test_settings_and_pins_are_read_again_despite_equal_size_and_mtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lock = Path("gamebear.lock")
    project = Path("pyproject.toml")
    for arch, digit in (("armhf", "a"), ("amd64", "b")):
        project.write_text(f'[tool.gamebear]\narch = "{arch}"\n')
        lock.write_text(f'{{"version": 1, "git": {{"u main": {{"commit": "{digit * 40}"}}}}}}')
        for path in (project, lock):
            os.utime(path, (SAME_TIME, SAME_TIME))
        assert settings().arch == arch
        assert read_lock(lock).git == {"u main": GitEntry(digit * 40)}
        settle()


def test_doit_saves_the_state_under_the_packages_name() -> None:
    """Databases contain it: another name would rebuild everything."""
    assert SAVED == "gamebear"
