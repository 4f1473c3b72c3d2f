"""Folder outputs: their archive, hostile archives, installation, clean. System tests build them on a real builder."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from project import Project

from gamebear_tasks import artifact
from gamebear_tasks.client import installed_folders
from gamebear_tasks.client.installed_folders import check_replaceable, is_complete, remove, swap_in
from gamebear_tasks.client.unpacking import ArchiveError, unpack
from gamebear_tasks.errors import JobError, SettingsError
from gamebear_tasks.runner.util.folder_archive import FolderError, entries, sha256_of_folder, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files, links and modes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    top = tmp_path / "dist"
    (top / "bin").mkdir(parents=True)
    (top / "empty").mkdir(mode=0o700)
    (top / "bin/program").write_text("#!/bin/sh")
    (top / "bin/program").chmod(0o750)
    (top / "bin/again").symlink_to("program")
    (top / "bin/up").symlink_to("../empty")
    (top / ("long" * 50)).write_text("x")
    (top / "odd \udcff\n").write_text("")
    (top / "empty").chmod(0o555)
    return top


def archived(top: Path) -> Path:
    path = top.with_suffix(".tar")
    with path.open("wb") as out:
        write(out, str(top), entries(str(top)))
    return path


def test_an_unpacked_folder_equals_the_archived_one(folder: Path) -> None:
    unpack(archived(folder), folder.with_name("new"))
    assert entries("new") == entries("dist")
    assert sha256_of_folder("new") == sha256_of_folder("dist")
    assert (folder.with_name("new") / "bin/program").stat().st_mode & 0o7777 == 0o750
    assert os.readlink("new/bin/up") == "../empty"
    installed_folders.remove_tree(folder.with_name("new"))
    assert not os.path.lexists("new")


def test_equal_folders_have_equal_archives_regardless_of_timestamps(folder: Path) -> None:
    before = sha256_of_folder("dist")
    os.utime("dist/bin/program", (1, 1))
    assert sha256_of_folder("dist") == before
    os.chmod("dist/bin/program", 0o755)
    assert sha256_of_folder("dist") != before


@pytest.mark.parametrize("target", ["/etc/passwd", "../..", "../../x", "a/../../.."])
def test_a_link_that_leads_out_of_the_folder_is_not_archived(folder: Path, target: str) -> None:
    (folder / "bin/out").symlink_to(target)
    with pytest.raises(FolderError, match="leads out"):
        sha256_of_folder("dist")


def test_a_fifo_is_not_archived(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(FolderError, match="pipe"):
        sha256_of_folder("dist")


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    info.size = len(data)
    return info, data


@pytest.mark.parametrize(
    "members",
    [
        [member("../x")],
        [member("/x")],
        [member("a/b")],
        [member("a"), member("a")],
        [member("a", tarfile.DIRTYPE), member("a", tarfile.SYMTYPE, ".")],
        [member("l", tarfile.SYMTYPE, "/etc")],
        [member("l", tarfile.SYMTYPE, "..")],
        [member("l", tarfile.SYMTYPE, "sub"), member("l/x")],
        [member("h", tarfile.LNKTYPE, "/etc/passwd")],
        [member("d", tarfile.CHRTYPE)],
        [member("p", tarfile.FIFOTYPE)],
        [member("x", tarfile.XHDTYPE, data=b"17 path=/etc/foo\n")],
        [member("s", tarfile.GNUTYPE_SPARSE)],
        [member("long", tarfile.GNUTYPE_LONGNAME, data=b"a" * (1 << 17))],
    ],
)
def test_a_hostile_archive_is_rejected_and_writes_nothing_outside(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    archive = tmp_path / "inner" / "x.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ArchiveError):
        unpack(archive, tmp_path / "inner" / "new")
    assert {path.name for path in tmp_path.rglob("*")} <= {"inner", "x.tar", "new", "a", "l"}


@pytest.mark.parametrize("cut", [1, 511, 700])
def test_a_truncated_or_damaged_archive_is_rejected(folder: Path, cut: int) -> None:
    archive = archived(folder)
    data = archive.read_bytes()
    archive.write_bytes(b"\xff" * cut + data[cut:1000])
    with pytest.raises(ArchiveError):
        unpack(archive, folder.with_name("new"))


# installation


def install(files: dict[str, str]) -> None:
    new = Path("new")
    new.mkdir()
    for path, text in files.items():
        (new / path).parent.mkdir(parents=True, exist_ok=True)
        (new / path).write_text(text)
    swap_in(new, Path("build/dist"), Path("build/.old"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    return tmp_path


def test_old_content_is_replaced_as_a_whole(project: Path) -> None:
    install({"a": "1", "sub/b": "1"})
    install({"a": "2", "c": "2"})
    assert entries("build/dist") == ["a", "c"]
    assert sorted(os.listdir("build")) == ["dist", "logs"]


def test_a_folder_with_a_foreign_file_is_not_replaced(project: Path) -> None:
    install({"a": "1"})
    (project / "build/dist/mine").write_text("precious")
    with pytest.raises(JobError, match="mine"):
        install({"a": "2"})
    assert (project / "build/dist/mine").read_text() == "precious"
    assert (project / "build/dist/a").read_text() == "1"


def test_a_folder_that_no_task_has_created_is_not_replaced(project: Path) -> None:
    (project / "build/dist").mkdir()
    check_replaceable(Path("build/dist"))
    (project / "build/dist/mine").write_text("precious")
    with pytest.raises(JobError, match="mine"):
        check_replaceable(Path("build/dist"))


def test_clean_removes_what_was_installed_and_nothing_else(project: Path) -> None:
    install({"a": "1", "sub/b": "1", "other/c": "1"})
    (project / "build/dist/sub/mine").write_text("precious")
    remove(Path("build/dist"))
    assert entries("build/dist") == ["sub", "sub/mine"]


def test_clean_removes_a_folder_that_has_become_empty(project: Path) -> None:
    install({"a": "1", "sub/b": "1"})
    remove(Path("build/dist"))
    assert not (project / "build/dist").exists()


def test_a_missing_file_makes_the_folder_incomplete(project: Path) -> None:
    install({"a": "1", "sub/b": "1"})
    assert is_complete("build/dist")
    (project / "build/dist/sub/b").unlink()
    assert not is_complete("build/dist")


@pytest.mark.parametrize("step", range(4))
def test_the_folder_can_be_installed_after_a_crash_at_any_step(
    project: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    install({"a": "1", "b": "1"})
    steps = iter(range(100))

    def crash(real: object) -> object:
        def call(*words: object) -> object:
            if next(steps) == step:
                raise KeyboardInterrupt
            return real(*words)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash(os.rename))
        patch.setattr(installed_folders, "_write", crash(installed_folders._write))
        with pytest.raises(KeyboardInterrupt):
            install({"a": "2", "c": "2"})
    found = entries("build/dist") if Path("build/dist").exists() else []
    assert found in ([], ["a", "b"], ["a", "c"])
    installed_folders.remove_tree(Path("new"))
    installed_folders.remove_tree(Path("build/.old"))
    install({"a": "3"})
    assert entries("build/dist") == ["a"]


# on a builder


DODO = """
from gamebear_tasks import artifact

def task_dist():
    return artifact("dist.py", outputs=["build/dist/", "build/wheels/*.whl", "build/plain"], inputs=["given.whl"])
"""

SCRIPT = """
import os
os.makedirs("dist/sub")
open("dist/sub/program", "w").write("VERSION")
os.chmod("dist/sub/program", 0o755)
os.symlink("sub/program", "dist/link")
open("a-VERSION.whl", "w").write("wheel")
open("b.whl", "w").write("wheel")
open("plain", "w").write("plain")
"""


@pytest.fixture
def built(tmp_path: Path, system: None) -> Project:
    project = Project(tmp_path / "project", tmp_path / "home")
    project.write("dodo.py", DODO)
    project.write("dist.py", SCRIPT.replace("VERSION", "1"))
    project.write("given.whl", "")
    project.doit().ok()
    return project


def test_a_folder_and_matching_files_are_installed(built: Project) -> None:
    build = built.folder / "build"
    assert entries(str(build / "dist")) == ["link", "sub", "sub/program"]
    assert os.readlink(build / "dist/link") == "sub/program"
    assert (build / "dist/sub/program").stat().st_mode & 0o777 == 0o755
    assert entries(str(build / "wheels")) == ["a-1.whl", "b.whl"]
    assert built.doit().ok().ran == []
    assert not list(build.glob(".*.part")) + list(build.glob(".*.tree")) + list(build.glob(".*.old"))


def test_a_rebuild_removes_files_that_are_no_longer_produced(built: Project) -> None:
    built.write("dist.py", SCRIPT.replace("VERSION", "2").replace("sub", "other"))
    assert built.doit().ok().ran == ["dist"]
    assert entries(str(built.folder / "build/dist")) == ["link", "other", "other/program"]
    assert entries(str(built.folder / "build/wheels")) == ["a-2.whl", "b.whl"]


def test_clean_removes_exactly_what_was_installed_and_doit_fetches_it_again(built: Project) -> None:
    built.write("build/wheels/mine.whl", "precious")
    built.doit("clean").ok()
    build = built.folder / "build"
    assert not (build / "dist").exists()
    assert entries(str(build / "wheels")) == ["mine.whl"]
    built.doit().failed("wheels", "mine.whl")
    (build / "wheels/mine.whl").unlink()
    assert built.doit().ok().ran == ["dist"]
    assert entries(str(build / "wheels")) == ["a-1.whl", "b.whl"]


def test_a_file_that_is_missing_in_the_folder_is_fetched_again(built: Project) -> None:
    (built.folder / "build/dist/link").unlink()
    assert built.doit().ok().ran == ["dist"]
    assert os.readlink(built.folder / "build/dist/link") == "sub/program"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("import shutil; shutil.rmtree('dist')", ["dist", "missing"]),
        ("import shutil; shutil.rmtree('dist'); open('dist', 'w')", ["dist", "not a folder"]),
        ("import shutil; shutil.rmtree('dist'); os.mkdir('dist')", ["dist", "empty"]),
        ("os.symlink('/etc/passwd', 'dist/out')", ["out", "leads out"]),
        ("os.mkfifo('dist/pipe')", ["pipe"]),
        ("[os.remove(each) for each in os.listdir() if each.endswith('.whl')]", ["*.whl"]),
        ("os.mkdir('c.whl')", ["c.whl", "folder"]),
    ],
)
def test_an_output_that_is_not_a_folder_fails_and_leaves_the_old_folder(
    built: Project, change: str, words: list[str]
) -> None:
    built.write("dist.py", SCRIPT.replace("VERSION", "2") + change)
    built.doit().failed(*words)
    assert (built.folder / "build/dist/sub/program").read_text() == "1"
    assert entries(str(built.folder / "build/wheels")) == ["a-1.whl", "b.whl"]


@pytest.mark.parametrize("output", ["build/", "./", "*.whl", "build/*.whl", "../*.whl", "build/logs/"])
def test_a_folder_that_has_other_files_is_rejected(project: Path, output: str) -> None:
    (project / "x.py").touch()
    with pytest.raises(SettingsError, match="other files" if output != "./" else "name"):
        artifact("x.py", outputs=[output])


def test_a_target_in_another_target_is_rejected(project: Path) -> None:
    (project / "x.py").touch()
    with pytest.raises(SettingsError, match="other files"):
        artifact("x.py", outputs=["out/dist/", "out/dist/inner"])
