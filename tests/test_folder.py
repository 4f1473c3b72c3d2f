"""Folder sources: listing, identity, cache. System tests build from folders on a real builder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from project import Project
from upstreams import call_git, commit

from gamebear_tasks import folder
from gamebear_tasks.errors import SettingsError, SourceError
from gamebear_tasks.runner.protocol.manifest import HEADER, Entry, ManifestError, decode, encode
from gamebear_tasks.sources import folder as folders
from gamebear_tasks.sources.folder import Folder
from gamebear_tasks.sources.lockfile import Lock

pytest_plugins = ("upstreams",)

SHA = "0123456789abcdef" * 4
LOCK = Lock({}, {})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a log folder, as the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "SETTLED", -1.0)  # recently written files are cached too
    (tmp_path / "build" / "logs").mkdir(parents=True)
    return tmp_path


def write(top: Path, *paths: str) -> None:
    for path in paths:
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text(path)


def names(source: Folder) -> list[str]:
    return sorted(path for path, *_ in source.listed())


def sha256(source: Folder) -> object:
    """Return the identity as a new process computes it."""
    folders._caches.clear()
    return source.identity(LOCK)["folder"]


# the manifest


paths = st.lists(st.text("ab/. \n\udc80é", min_size=1, max_size=8), unique=True, max_size=6)


@given(paths)
def test_a_manifest_is_decoded_to_what_was_encoded_or_rejected(paths: list[str]) -> None:
    entries = [Entry("f", path, SHA) for path in sorted(paths, key=os.fsencode)]
    try:
        decoded = decode(encode(entries))
    except ManifestError:
        assert any(part in ("", ".", "..") for path in paths for part in path.split("/")) or any(
            other.startswith(f"{path}/") for path in paths for other in paths
        )
    else:
        assert decoded == entries


def test_equal_folders_have_equal_manifests_in_any_order() -> None:
    entries = [Entry("x", "b", SHA), Entry("l", "a", "../t"), Entry("d", "c/d")]
    assert encode(entries) == encode(entries[::-1])


@pytest.mark.parametrize(
    "body",
    [
        b"f %s ../x\0" % SHA.encode(),
        b"f %s /x\0" % SHA.encode(),
        b"f %s a//b\0" % SHA.encode(),
        b"f %s a\0f %s a\0" % (SHA.encode(), SHA.encode()),
        b"l a\0/etc\0f %s a/passwd\0" % SHA.encode(),
        b"f abc x\0",
        b"l a\0\0",
        b"l a\0",
        b"c x\0",
        b"f %s x" % SHA.encode(),
        b"d .\0",
    ],
)
def test_a_manifest_that_leads_out_of_its_folder_or_is_damaged_is_rejected(body: bytes) -> None:
    with pytest.raises(ManifestError):
        decode(HEADER + body)


def test_data_of_another_kind_is_not_a_manifest() -> None:
    with pytest.raises(ManifestError):
        decode(b"\0")


# contents, outside of a checkout


def test_a_folder_contains_files_links_and_empty_folders(project: Path) -> None:
    write(project, "src/a.c", "src/sub/b.c")
    (project / "src/empty").mkdir()
    (project / "src/link").symlink_to("a.c")
    (project / "src/to-folder").symlink_to("sub")
    source = folder("src")
    assert names(source) == ["a.c", "empty", "link", "sub/b.c", "to-folder"]
    assert sha256(source)
    files = source.files()
    [manifest] = [path for path in files.values() if path.is_absolute()]
    entries = {entry.path: entry for entry in decode(manifest.read_bytes())}
    assert entries["link"] == Entry("l", "link", "a.c")
    assert entries["to-folder"].kind == "l"
    assert entries["empty"].kind == "d"
    assert {files[entries[path].value] for path in ("a.c", "sub/b.c")} == {Path("src/a.c"), Path("src/sub/b.c")}
    assert len(files) == 3


def test_the_project_never_contains_its_build_folder_or_databases(project: Path) -> None:
    write(
        project, "a.c", "build/x", ".doit.db.dat", ".doit.db", "lib/.doit.db.dir", "lib/build/kept", "__pycache__/d.pyc"
    )
    assert names(folder()) == ["a.c", "lib/build/kept"]


def test_a_folder_below_build_is_a_source_like_others(project: Path) -> None:
    write(project, "build/tree/a.c")
    assert names(folder("build/tree")) == ["a.c"]


def test_the_tasks_own_targets_are_excluded(project: Path) -> None:
    write(project, "a.c", "out/program", "out/other", "out/program2")
    source = Folder(".", targets=("out/program",))
    assert names(source) == ["a.c", "out/other", "out/program2"]


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["*.o"], ["docs/a.md", "src/a.c", "src/docs/b.md"]),
        (["docs/"], ["a.o", "src/a.c", "src/b.o"]),
        (["/docs/"], ["a.o", "src/a.c", "src/b.o", "src/docs/b.md"]),
        (["src/*.o"], ["a.o", "docs/a.md", "src/a.c", "src/docs/b.md"]),
        (["src/**/b.*"], ["a.o", "docs/a.md", "src/a.c"]),
        (["**/docs/**"], ["a.o", "src/a.c", "src/b.o"]),
        (["[a-b].[!oc]*"], ["a.o", "src/a.c", "src/b.o"]),
        (["src"], ["a.o", "docs/a.md"]),
        (["?.c"], ["a.o", "docs/a.md", "src/b.o", "src/docs/b.md"]),
        (["sr"], ["a.o", "docs/a.md", "src/a.c", "src/b.o", "src/docs/b.md"]),
    ],
)
def test_patterns_exclude_as_in_gitignore(project: Path, patterns: list[str], left: list[str]) -> None:
    write(project, "p/a.o", "p/docs/a.md", "p/src/a.c", "p/src/b.o", "p/src/docs/b.md")
    assert names(folder("p", exclude=patterns)) == left
    everything = names(folder("p"))
    assert names(folder("p", include=patterns)) == [path for path in everything if path not in left]


@pytest.mark.parametrize("patterns", ["*.o", [""], ["/"], ["../x"], [1], 5])
def test_an_invalid_list_of_patterns_is_rejected(patterns: object) -> None:
    with pytest.raises(SettingsError, match="patterns"):
        folder("src", exclude=patterns)  # type: ignore[arg-type]


# identity


def test_every_change_of_content_mode_or_links_changes_the_identity(project: Path) -> None:
    write(project, "src/a.c", "src/sub/b.c")
    source = folder("src")
    seen = [sha256(source)]

    def changed() -> bool:
        seen.append(sha256(source))
        return seen[-1] not in seen[:-1]

    (project / "src/a.c").write_text("src/A.c")  # the same size
    assert changed()
    (project / "src/a.c").chmod(0o755)
    assert changed()
    (project / "src/link").symlink_to("a.c")
    assert changed()
    (project / "src/link").unlink()
    (project / "src/link").symlink_to("b.c")
    assert changed()
    (project / "src/new").mkdir()
    assert changed()
    (project / "src/sub/b.c").rename(project / "src/sub/c.c")
    assert changed()
    (project / "src/sub/c.c").unlink()
    assert changed()


def test_timestamps_and_other_modes_do_not_change_the_identity(project: Path) -> None:
    write(project, "src/a.c")
    before = sha256(folder("src"))
    os.utime(project / "src/a.c", (1, 1))
    (project / "src/a.c").chmod(0o600)
    assert sha256(folder("src")) == before


def test_an_edit_with_unchanged_size_and_mtime_is_detected(project: Path) -> None:
    write(project, "src/a.c")
    before = sha256(folder("src"))
    about = (project / "src/a.c").stat()
    (project / "src/a.c").write_text("SRC/a.c")
    os.utime(project / "src/a.c", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert sha256(folder("src")) != before


def test_an_unchanged_folder_is_not_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, "src/a.c")
    before = sha256(folder("src"))
    monkeypatch.setattr(folders, "_entry", None)
    assert sha256(folder("src")) == before


def test_only_changed_files_are_hashed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, "src/a.c", "src/b.c")
    sha256(folder("src"))
    (project / "src/b.c").write_text("other")
    hashed = []

    def spy(file: BinaryIO) -> str:
        hashed.append(file.read())
        return SHA

    monkeypatch.setattr(folders, "sha256", spy)
    sha256(folder("src"))
    assert hashed == [b"other"]


def test_a_recently_written_file_is_read_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SETTLED", 60.0)
    write(project, "src/a.c")
    sha256(folder("src"))
    monkeypatch.setattr(folders, "_entry", None)
    with pytest.raises(TypeError):
        sha256(folder("src"))


@pytest.mark.parametrize("text", ["", "{", "[]\n[]\n", '{"format":"1"}\n{"a.c":1}\n', '{"format":"0"}\n{}\n'])
def test_a_damaged_cache_file_is_ignored(project: Path, text: str) -> None:
    write(project, "src/a.c")
    before = sha256(folder("src"))
    [place] = (project / "build/logs").glob(".folder-*")
    place.write_text(text)
    assert sha256(folder("src")) == before


def test_a_folder_that_changes_while_it_is_read_is_an_error(project: Path) -> None:
    write(project, "src/a.c")
    source = folder("src")
    source.identity(LOCK)
    folders._cache_of(source)._snapshot = None
    (project / "src/a.c").write_text("other")
    with pytest.raises(SourceError, match="changed"):
        source.files()


def test_an_empty_or_missing_folder_or_a_pipe_is_an_error(project: Path) -> None:
    (project / "empty").mkdir()
    (project / "special").mkdir()
    os.mkfifo(project / "special/pipe")
    for name, cause in {"empty": "no files", "missing": "No such file", "special": "special/pipe"}.items():
        with pytest.raises(SourceError, match=cause):
            folder(name).identity(LOCK)


# checkouts


def repository(folder: Path) -> str:
    """Create a repository with everything that is in a folder, and return the commit."""
    call_git(folder, "init", "--quiet")
    return commit(folder)


def test_a_checkout_contains_tracked_and_not_ignored_files_and_submodules(project: Path, git_settings: Path) -> None:
    module = project / "module"
    write(module, "m.c")
    repository(module)
    top = project / "top"
    write(top, "tracked.c", "deleted.c", "sub/inner.c", ".gitignore", "forced.o", "replaced")
    (top / ".gitignore").write_text("*.o\n")
    call_git(top, "init", "--quiet")
    call_git(top, "submodule", "add", "--quiet", str(module), "vendor/module")
    call_git(top, "add", "--force", "forced.o")
    commit(top)
    (top / "deleted.c").unlink()
    (top / "replaced").unlink()
    write(top, "replaced/by-folder", "untracked.c", "ignored.o", "nested/n.c", "vendor/module/new.c")
    call_git(top / "nested", "init", "--quiet")
    expected = [
        ".gitignore", ".gitmodules", "forced.o", "nested/n.c", "replaced/by-folder", "sub/inner.c", "tracked.c",
        "untracked.c", "vendor/module/m.c", "vendor/module/new.c",
    ]  # fmt: skip
    assert [name for name in names(folder("top")) if name != "vendor/module/.git"] == expected
    assert names(folder("top/sub")) == ["inner.c"]
    assert "vendor/module/.git" not in names(folder("top"))


def test_a_submodule_that_is_not_checked_out_is_an_error(project: Path, git_settings: Path) -> None:
    module = project / "module"
    write(module, "m.c")
    repository(module)
    call_git(project, "init", "--quiet")
    call_git(project, "submodule", "add", "--quiet", str(module), "vendor")
    call_git(project, "commit", "--quiet", "--message", "t")
    call_git(project, "clone", "--quiet", ".", "clone")
    with pytest.raises(SourceError) as caught:
        folder("clone").identity(LOCK)
    assert "vendor" in caught.value.message
    assert "submodule update" in caught.value.hint
    folder("clone", exclude=["vendor"]).identity(LOCK)


def test_a_folder_with_only_ignored_files_is_an_error(project: Path, git_settings: Path) -> None:
    write(project, ".gitignore", "out/a")
    (project / ".gitignore").write_text("out/\n")
    call_git(project, "init", "--quiet")
    with pytest.raises(SourceError, match="no files"):
        folder("out").identity(LOCK)


# on a builder


DODO = """
from gamebear_tasks import artifact, folder

def task_tree():
    return artifact("list.py", sources={"src": folder("src")}, outputs=["build/list"])
"""

SCRIPT = """
import os, stat
lines = []
for top, folders, names in os.walk("src"):
    for name in folders + names:
        path = os.path.join(top, name)
        about = os.lstat(path)
        lines.append(f"{path!r} {about.st_mode:o} {int(about.st_mtime)}")
        if stat.S_ISREG(about.st_mode):
            lines[-1] += " " + open(path).read()
            open(path, "a").write("changed by the script")
        elif stat.S_ISLNK(about.st_mode):
            lines[-1] += " " + os.readlink(path)
open("list", "w").write("\\n".join(sorted(lines)))
"""


@pytest.fixture
def built(tmp_path: Path, system: None) -> Project:
    """A project that builds a list of the files of its folder `src`."""
    project = Project(tmp_path / "project", tmp_path / "home")
    write(project.folder, "src/a.c", "src/sub/deep/b.c")
    (project.folder / "src/odd \udcff\nname").write_text("odd")
    (project.folder / "src/a.c").chmod(0o750)
    (project.folder / "src/link").symlink_to("sub/nowhere")
    (project.folder / "src/empty").mkdir()
    project.write("dodo.py", DODO)
    project.write("list.py", SCRIPT)
    project.doit().ok()
    return project


def test_a_job_receives_the_folder_and_may_change_it(built: Project) -> None:
    lines = (built.folder / "build/list").read_text().splitlines()
    expected = [
        "'src/a.c' 100755 315532800 src/a.c",
        "'src/empty' 40755 315532800",
        "'src/link' 120777 315532800 sub/nowhere",
        "'src/odd \\udcff\\nname' 100644 315532800 odd",
        "'src/sub' 40755 315532800",
        "'src/sub/deep' 40755 315532800",
        "'src/sub/deep/b.c' 100644 315532800 src/sub/deep/b.c",
    ]
    assert lines == expected
    (built.folder / "src/sub/new").write_text("new")
    assert built.doit().ok().ran == ["tree"]
    assert (built.folder / "build/list").read_text().splitlines() == [*expected, "'src/sub/new' 100644 315532800 new"]
    assert built.doit().ok().ran == []


def test_an_edit_of_one_file_uploads_that_file_and_the_manifest(built: Project) -> None:
    blobs = {path.name for path in (built.store / "blobs").iterdir()}
    (built.folder / "src/a.c").write_text("edited")
    built.doit().ok()
    assert len({path.name for path in (built.store / "blobs").iterdir()} - blobs) == 2


def test_a_removed_or_damaged_blob_or_manifest_is_sent_again(built: Project) -> None:
    blobs = built.store / "blobs"
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.unlink() if number % 2 else path.write_bytes(path.read_bytes()[:-1] + b"!")
        (built.folder / "src/a.c").write_text(f"edit {number}")
        built.doit().ok()
        assert f"edit {number}" in (built.folder / "build/list").read_text()


def test_a_prune_retains_the_files_of_retained_jobs(built: Project) -> None:
    kept = {path.name for path in (built.store / "blobs").iterdir()}
    for path in (built.store / "blobs").iterdir():
        os.utime(path, (0, 0))
    built.gamebear("prune", "--older", "1").ok()
    assert {path.name for path in (built.store / "blobs").iterdir()} == kept


def test_a_build_of_a_local_checkout_warns_if_its_files_differ_from_the_pinned_commit(
    tmp_path: Path, git_settings: Path
) -> None:
    project = Project(tmp_path / "project", tmp_path / "home")
    write(project.folder, "up/a.c")
    pinned = repository(project.folder / "up")
    project.write("x.py", "open('x', 'w').write(open('up/a.c').read())")
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact, git\n"
        f"def task_x(): return artifact('x.py', sources={{'up': git('up', '{pinned}')}}, outputs=['x'])\n",
    )
    assert "pinned" not in project.doit("x").ok().text
    (project.folder / "up/a.c").write_text("edited")
    run = project.doit("-a", "x").ok()
    assert "up has uncommitted changes" in run.err and "folder('up')" in run.err
    commit(project.folder / "up")
    assert f"pinned commit {pinned[:12]}" in project.doit("-a", "x").ok().err


def test_a_build_warns_if_the_folder_leaves_out_tracked_files(project: Path, git_settings: Path) -> None:
    write(project, "a.c", "build/generated.c")
    assert folder().warning(LOCK) == ""  # not a checkout
    call_git(project, "init", "--quiet")
    assert folder().warning(LOCK) == ""
    call_git(project, "add", "build/generated.c")
    assert "build/" in folder().warning(LOCK)
    assert folder("build").warning(LOCK) == ""
