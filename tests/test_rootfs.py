"""Files copied into and out of a container's file system, which may be laid out to lead us astray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gamebear_tasks.runner.rootfs import Rootfs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A container's root; `host-secret` is outside of it."""
    (tmp_path / "host-secret").write_text("secret")
    folder = tmp_path / "root"
    (folder / "etc").mkdir(parents=True)
    (folder / "etc" / "os-release").write_text("container")
    return folder


@pytest.fixture
def rootfs(root: Path) -> Iterator[Rootfs]:
    found = Rootfs(root)
    yield found
    found.close()


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("absolute", "/host-secret"),
        ("relative", "../host-secret"),
        ("deep", "etc/../../../host-secret"),
        ("real", "{tmp}/host-secret"),
        ("through-proc", "/proc/self/root{tmp}/host-secret"),
    ],
)
def test_a_link_never_leads_out_of_the_container(
    root: Path, rootfs: Rootfs, tmp_path: Path, link: str, target: str
) -> None:
    (root / link).symlink_to(target.format(tmp=tmp_path))
    with pytest.raises(FileNotFoundError):
        rootfs.copy_out(link, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_link_is_found_inside_the_container(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    (root / "lib").symlink_to("/etc")
    rootfs.copy_out("/lib/os-release", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "container"


def test_dot_dot_stops_at_the_root(rootfs: Rootfs, tmp_path: Path) -> None:
    rootfs.copy_out("/../../etc/../../etc/./os-release", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "container"


def test_a_loop_of_links_is_an_error(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("/a")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        rootfs.copy_out("/a/x", tmp_path / "out")


def test_what_goes_in_does_not_go_through_a_link_to_the_host(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "opt").symlink_to(outside)
    (root / "file").symlink_to(tmp_path / "host-secret")
    (tmp_path / "new").write_text("new")
    rootfs.copy_in(tmp_path / "new", "/opt/new")
    rootfs.copy_in(tmp_path / "new", "/file")
    assert list(outside.iterdir()) == []
    assert (tmp_path / "host-secret").read_text() == "secret"
    assert (root / str(outside)[1:] / "new").read_text() == "new"
    assert (root / "file").read_text() == "new" and not (root / "file").is_symlink()


def test_mode_and_time_are_kept_both_ways(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_bytes(b"x" * 3_000_000)
    tool.chmod(0o4751)
    os.utime(tool, ns=(1_000_000_001, 2_000_000_002))
    rootfs.copy_in(tool, "/usr/bin/")
    inside = (root / "usr/bin/tool").stat()
    assert (inside.st_mode & 0o7777, inside.st_mtime_ns) == (0o4751, 2_000_000_002)
    rootfs.copy_out("/usr/bin/tool", tmp_path / "out" / "tool")
    outside = (tmp_path / "out/tool").stat()
    assert (outside.st_mode & 0o7777, outside.st_mtime_ns) == (0o751, 2_000_000_002)
    assert (tmp_path / "out/tool").read_bytes() == tool.read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tool"]


def test_a_file_goes_into_a_folder_that_is_there(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    rootfs.copy_out("/etc/os-release", tmp_path)
    assert (tmp_path / "os-release").read_text() == "container"
    rootfs.copy_in(tmp_path / "host-secret", "/etc")
    assert (root / "etc/host-secret").exists()


def test_a_folder_goes_in_with_its_links_and_merges(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    (root / "usr/lib").mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    tree = tmp_path / "tree"
    (tree / "lib" / "sub").mkdir(parents=True)
    (tree / "lib" / "sub").chmod(0o700)
    (tree / "lib" / "a.so").symlink_to("sub/a.so.1")
    (tree / "lib" / "sub" / "a.so.1").write_text("a")
    rootfs.copy_in(tree, "/")
    rootfs.copy_in(tree, "/")
    assert (root / "lib").is_symlink()
    assert os.readlink(root / "usr/lib/a.so") == "sub/a.so.1"
    assert (root / "usr/lib/sub").stat().st_mode & 0o777 == 0o700
    assert (root / "usr/lib/sub/a.so.1").read_text() == "a"


def test_a_folder_comes_out_with_links_that_lead_nowhere_else(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    tree = root / "opt" / "tree"
    (tree / "lib").mkdir(parents=True)
    (tree / "lib" / "a.so.1").write_text("a")
    (tree / "lib" / "a.so").symlink_to("a.so.1")
    (tree / "up").symlink_to("lib/../../outside")
    (tree / "lib" / "top").symlink_to("../lib/a.so")
    (tree / "release").symlink_to("/etc/os-release")
    (root / "opt" / "outside").write_text("outside")
    rootfs.copy_out("opt/tree", tmp_path / "out")
    out = tmp_path / "out"
    assert os.readlink(out / "lib/a.so") == "a.so.1"
    assert os.readlink(out / "lib/top") == "../lib/a.so"
    assert not (out / "release").is_symlink() and (out / "release").read_text() == "container"
    assert not (out / "up").is_symlink() and (out / "up").read_text() == "outside"


def test_a_folder_that_links_to_what_holds_it_is_an_error(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    (root / "etc" / "again").symlink_to("/etc")
    with pytest.raises(OSError, match="leads back"):
        rootfs.copy_out("/etc", tmp_path / "out")


def test_what_came_out_before_does_not_lead_the_next_copy_astray(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "sub").symlink_to(elsewhere)
    (root / "opt" / "sub").mkdir(parents=True)
    (root / "opt" / "sub" / "file").write_text("x")
    rootfs.copy_out("/opt", out)
    assert list(elsewhere.iterdir()) == []
    assert (out / "sub" / "file").read_text() == "x"


def test_a_pipe_is_refused_without_waiting_for_a_writer(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    os.mkfifo(root / "pipe")
    with pytest.raises(OSError, match="neither a file"):
        rootfs.copy_out("/pipe", tmp_path / "out")


def test_a_missing_file_is_named_by_its_path_in_the_container(rootfs: Rootfs, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="/tmp/nothing/here"):
        rootfs.copy_out("/tmp/nothing/here", tmp_path / "out")
