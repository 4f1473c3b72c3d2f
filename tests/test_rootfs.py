"""Files copied into and out of a container, whose file system may be hostile."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gamebear_tasks.runner.host.rootfs import Rootfs


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


def test_copying_in_never_follows_a_link_to_the_host(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
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


def test_mode_and_time_are_preserved_both_ways(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
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
    os.link(root / "usr/bin/tool", root / "usr/bin/again")
    rootfs.copy_out("/usr", tmp_path / "usr")
    for name in ("tool", "again"):
        assert (tmp_path / "usr/bin" / name).stat().st_mode & 0o7777 == 0o751


@pytest.fixture(params=[0o000, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    """An unusual umask."""
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.system
def test_created_folders_have_mode_755_regardless_of_the_umask(
    root: Path, rootfs: Rootfs, tmp_path: Path, umask: None
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").touch()
    tree.chmod(0o700)
    (root / "srv").mkdir()
    os.chown(root / "srv", -1, 7)
    (root / "srv").chmod(0o2775)
    rootfs.copy_in(tree / "file", "/srv/a/b/file")
    rootfs.copy_in(tree, "/c/d")
    (root / "c/d").chmod(0o700)
    rootfs.copy_out("/srv/a/b/file", tmp_path / "e" / "f" / "file")
    rootfs.copy_out("/c/d", tmp_path / "g" / "h")
    made = [root / "srv/a", root / "srv/a/b", root / "c", root / "c/d/..", tmp_path / "e", tmp_path / "e/f"]
    made += [tmp_path / "g", tmp_path / "g/h"]
    assert {path: oct(mode(path)) for path in made if mode(path) != 0o755} == {}
    assert {path.stat().st_gid for path in made} == {os.getegid()}


def test_all_mode_bits_of_a_folder_are_preserved_both_ways(
    root: Path, rootfs: Rootfs, tmp_path: Path, umask: None
) -> None:
    tree = tmp_path / "tree"
    modes = {"": 0o1777, "sticky": 0o1777, "sticky/group": 0o2770, "sticky/group/closed": 0o500}
    for path in modes:
        (tree / path).mkdir()
    for path, bits in modes.items():
        (tree / path).chmod(bits)
    (root / "there/sticky/group").mkdir(parents=True)
    (root / "there").chmod(0o711)
    (root / "there/sticky").chmod(0o750)
    os.setxattr(tree, "user.a", b"1")
    os.utime(tree, ns=(1, 2))
    rootfs.copy_in(tree, "/opt/tree")
    rootfs.copy_in(tree, "/there")
    rootfs.copy_out("/opt/tree", tmp_path / "out")
    assert {path: mode(root / "opt/tree" / path) for path in modes} == modes
    assert {path: mode(tmp_path / "out" / path) for path in modes} == modes
    assert (mode(root / "there"), mode(root / "there/sticky")) == (0o711, 0o750)
    for copy in (root / "opt/tree", tmp_path / "out"):
        assert copy.stat().st_mtime_ns == 2 and os.getxattr(copy, "user.a") == b"1"


def both_ways(rootfs: Rootfs, tree: Path, root: Path, out: Path) -> tuple[Path, Path]:
    """Copy a folder in, and the copy out. Return both copies."""
    rootfs.copy_in(tree, "/opt/tree")
    rootfs.copy_out("/opt/tree", out)
    return root / "opt" / "tree", out


def test_hard_links_are_preserved_both_ways(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/b/first").write_text("one")
    for name in ("a/second", "third"):
        os.link(tree / "a/b/first", tree / name)
    (tree / "alone").write_text("one")
    os.link(tree / "third", tmp_path / "elsewhere")
    for _ in range(2):  # the second copy replaces the first
        for copy in both_ways(rootfs, tree, root, tmp_path / "out"):
            assert {(copy / name).stat().st_nlink for name in ("a/b/first", "a/second", "third")} == {3}
            assert (copy / "alone").stat().st_nlink == 1
            assert (copy / "third").read_text() == "one"
            assert sorted(path.name for path in copy.rglob("*")) == ["a", "alone", "b", "first", "second", "third"]


def test_hard_links_into_one_folder_by_two_paths(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    """/lib of the container is a link to /usr/lib, so two names of the tree may be one of the container."""
    (root / "usr/lib").mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    tree = tmp_path / "tree"
    for path in ("lib", "usr/lib", "usr/share", "var"):
        (tree / path).mkdir(parents=True)
    (tree / "lib/same").write_text("same")
    os.link(tree / "lib/same", tree / "usr/lib/same")
    (tree / "lib/other").write_text("first")
    (tree / "usr/lib/other").write_text("second")
    os.link(tree / "lib/other", tree / "usr/share/other")
    os.link(tree / "lib/other", tree / "var/other")
    rootfs.copy_in(tree, "/")
    assert (root / "usr/lib/same").stat().st_nlink == 1
    assert (root / "usr/lib/other").read_text() == "second"
    assert (root / "usr/share/other").read_text() == (root / "var/other").read_text() == "first"
    assert os.path.samefile(root / "usr/share/other", root / "var/other")
    assert sorted(os.listdir(root / "usr/lib")) == ["other", "same"]


@pytest.mark.system
def test_content_is_copied_if_it_cannot_be_linked(
    root: Path, rootfs: Rootfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    (tree / "mounted").mkdir(parents=True)
    (tree / "file").write_text("one")
    os.link(tree / "file", tree / "mounted" / "file")
    (root / "mounted").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", root / "mounted"], check=True)
    try:
        rootfs.copy_in(tree, "/")
        assert (root / "mounted/file").read_text() == "one"
        assert os.listdir(root / "mounted") == ["file"]
    finally:
        subprocess.run(["umount", root / "mounted"], check=True)


@pytest.mark.system
def test_portable_attributes_are_preserved_both_ways(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    capability = (0x2000001).to_bytes(4, "little") + (1 << 13).to_bytes(4, "little") + bytes(12)
    tree = tmp_path / "tree"
    (tree / "folder").mkdir(parents=True)
    (tree / "tool").touch(mode=0o444)
    os.setxattr(tree / "tool", "user.a", b"")
    os.setxattr(tree / "tool", "security.capability", capability)
    os.setxattr(tree / "tool", "trusted.a", b"of this machine")
    os.setxattr(tree / "folder", "user.b", b"\0\xff")
    (root / "etc/group").touch()
    (root / "opt/tree").mkdir(parents=True)
    os.chown(root / "opt/tree", -1, 7)
    (root / "opt/tree").chmod(0o2755)  # so the group of the copy must be changed
    for copy in both_ways(rootfs, tree, root, tmp_path / "out"):
        found = {name: os.getxattr(copy / "tool", name) for name in os.listxattr(copy / "tool")}
        assert found == {"user.a": b"", "security.capability": capability}
        assert os.getxattr(copy / "folder", "user.b") == b"\0\xff"


@pytest.mark.system
def test_an_attribute_that_cannot_be_preserved_is_named(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    (tmp_path / "tool").touch()
    os.setxattr(tmp_path / "tool", "user.a", b"1")
    (root / "mounted").mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", root / "mounted"], check=True)
    try:
        with pytest.raises(OSError, match=r"attribute user\.a cannot be set.*/tool'") as raised:
            rootfs.copy_in(tmp_path / "tool", "/mounted/tool")
        assert raised.value.errno == errno.ENOTSUP
        assert os.listdir(root / "mounted") == []
    finally:
        subprocess.run(["umount", root / "mounted"], check=True)


def test_holes_are_preserved_both_ways(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    size = 1 << 30
    places = {0: b"begin", size // 2: b"x" * 3_000_000, size - 4: b"last"}
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, where in (("all", list(places)), ("inner", [size // 2]), ("none", [])):
        with (tree / name).open("wb") as file:
            for start in where:
                file.seek(start)
                file.write(places[start])
            file.truncate(size)
    for copy in both_ways(rootfs, tree, root, tmp_path / "out"):
        for name in ("all", "inner", "none"):
            info = (copy / name).stat()
            assert info.st_size == size and info.st_blocks * 512 < 4_000_000
        for name, where in (("all", list(places)), ("inner", [size // 2])):
            with (copy / name).open("rb") as file:
                for start in where:
                    file.seek(max(0, start - 4096))
                    before = bytes(min(start, 4096))
                    assert file.read(len(before) + len(places[start])) == before + places[start]


def test_files_of_the_kernel_are_copied_to_their_end(root: Path, rootfs: Rootfs) -> None:
    """Their size is not meaningful: 0 below /proc, a page below /sys."""
    for path in ("/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/kernel/profiling"):
        if Path(path).exists():
            rootfs.copy_in(Path(path), "/copy")
            assert (root / "copy").read_bytes() == Path(path).read_bytes() != b""
    assert (root / "copy").exists()


def test_a_deep_folder_needs_few_file_descriptors(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    deep = Path(*["d"] * 120)
    (tmp_path / "tree" / deep).mkdir(parents=True)
    (tmp_path / "tree" / deep / "file").write_text("deep")
    for copy in both_ways(rootfs, tmp_path / "tree", root, tmp_path / "out"):
        assert (copy / deep / "file").read_text() == "deep"


def test_a_file_is_copied_into_an_existing_folder(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    rootfs.copy_out("/etc/os-release", tmp_path)
    assert (tmp_path / "os-release").read_text() == "container"
    rootfs.copy_in(tmp_path / "host-secret", "/etc")
    assert (root / "etc/host-secret").exists()


def test_a_folder_is_copied_in_with_its_links_and_merged(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
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


def test_links_of_a_copied_out_folder_stay_inside_it(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
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


def test_a_link_to_a_parent_folder_is_an_error(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    (root / "etc" / "again").symlink_to("/etc")
    with pytest.raises(OSError, match="parent folder of itself"):
        rootfs.copy_out("/etc", tmp_path / "out")


def test_an_earlier_copy_does_not_redirect_the_next_one(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "sub").symlink_to(elsewhere)
    (root / "opt" / "sub").mkdir(parents=True)
    (root / "opt" / "sub" / "file").write_text("x")
    rootfs.copy_out("/opt", out)
    assert list(elsewhere.iterdir()) == []
    assert (out / "sub" / "file").read_text() == "x"


def test_a_pipe_is_rejected_without_waiting_for_a_writer(root: Path, rootfs: Rootfs, tmp_path: Path) -> None:
    os.mkfifo(root / "pipe")
    with pytest.raises(OSError, match="neither a file"):
        rootfs.copy_out("/pipe", tmp_path / "out")


def test_a_missing_file_is_named_by_its_path_in_the_container(rootfs: Rootfs, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="/tmp/nothing/here"):
        rootfs.copy_out("/tmp/nothing/here", tmp_path / "out")
