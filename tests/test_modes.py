"""Modes, hard links, attributes and holes are preserved from source to output, as root and rootless."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import Project
from sshd import Account, Sshd
from upstreams import call_git, commit

from gamebear_tasks import debian
from gamebear_tasks.runner.executor import workspace
from gamebear_tasks.sources.lockfile import Lock

pytestmark = pytest.mark.system

pytest_plugins = ["upstreams"]


@pytest.fixture(params=["local", "ssh"])
def place(
    request: pytest.FixtureRequest, project: Project, server: Sshd, home: Path, account: Account
) -> tuple[Project, Path]:
    """A project and its builder's store."""
    shutil.copy(Path(__file__).with_name("tiny.py"), project.folder)
    cache = str(project.home / ".cache")
    if request.param == "local":
        return Project(project.folder, project.home, XDG_CACHE_HOME=cache), project.store
    environment = {"GAMEBEAR_BUILDER": server.url, "XDG_CACHE_HOME": cache}
    return Project(project.folder, home, **environment), account.home / ".cache" / "gamebear" / "v1"


def build(project: Project) -> None:
    """Run doit with umask 077."""
    done = subprocess.run(
        project.command(), cwd=project.folder, env=project.environment, capture_output=True, text=True, umask=0o077
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def release(tmp_path: Path) -> Iterator[str]:
    """The URL and SHA-256 of an archive whose folders are private."""
    folder = tmp_path / "web"
    folder.mkdir()
    with tarfile.open(folder / "release.tar", "w") as tar:
        for name in ("top", "top/d", "top/d/e"):
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o700
            tar.addfile(member)
        for name, mode in (("top/d/e/f", 0o600), ("top/d/e/tool", 0o700)):
            member = tarfile.TarInfo(name)
            member.size, member.mode = 1, mode
            tar.addfile(member, io.BytesIO(b"x"))
        link = tarfile.TarInfo("top/d/link")
        link.type, link.linkname = tarfile.SYMTYPE, "e/f"
        tar.addfile(link)
    sha256 = subprocess.run(["sha256sum", folder / "release.tar"], check=True, capture_output=True, text=True).stdout
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'archive("http://127.0.0.1:{server.server_port}/release.tar", sha256="{sha256.split()[0]}")'
        server.shutdown()


DODO = """
from gamebear_tasks import archive, artifact, debian, git

def task_x():
    return artifact(
        "x.py",
        outputs=["build/container.tar", "build/folder.tar"],
        sources={{"git": git({url!r}, rev={rev!r}), "release": {release}, "package": debian("umtp-responder")}},
    )
"""

PACK = """
import tarfile

import modules.inner.leaf
import tiny

NAMES = ["git", "release", "package", "modules"]
with tarfile.open("folder.tar", "w") as tar:
    tar.add(".", filter=lambda member: None if member.name == "./folder.tar" else member)
tiny.fill(Path("files"), ("cat", "sh", "tar"))
with Container("scratch") as c:
    c.copy_in("files", "/")
    for name in NAMES:
        c.copy_in(name, f"/{name}")
    c.run(["cat", "/git/d/e/f", "/release/d/e/f"], user="pi")
    c.run(["cat", "/mnt/git/d/e/f", "/mnt/modules/inner/leaf.py"], user="pi", volumes=[(".", "/mnt", "ro")])
    c.run(["tar", "--create", "--file=/container.tar", *NAMES], pwd="/")
    c.copy_out("/container.tar", "container.tar")
"""


def test_folders_of_sources_and_packages_are_755_in_a_container_and_in_a_tar(
    place: tuple[Project, Path],
    upstream: Path,
    release: str,
    apt_cache: tuple[Path, Lock, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project, store = place
    cache, lock, own = apt_cache
    monkeypatch.setenv("APT_CONFIG", str(own))
    debian("umtp-responder").fetch(cache, lock)
    (upstream / "d" / "e").mkdir(parents=True)
    (upstream / "d" / "e" / "f").write_text("x")
    (upstream / "d" / "e" / "tool").write_text("x")
    (upstream / "d" / "e" / "tool").chmod(0o755)
    (upstream / "d" / "link").symlink_to("e/f")
    rev = commit(upstream)
    assert call_git(upstream, "ls-tree", "-r", "HEAD", "d").count("\n") == 2
    project.write("dodo.py", DODO.format(url=f"file://{upstream}", rev=rev, release=release))
    shutil.copy(cache.parent / "gamebear.lock", project.folder)
    shutil.copytree(cache, Path(project.environment["XDG_CACHE_HOME"], "gamebear-tasks", "sources"), symlinks=True)
    project.write("modules/__init__.py", "")
    project.write("modules/inner/__init__.py", "")
    project.write("modules/inner/leaf.py", "")
    project.write("x.py", PACK)
    build(project)
    for name, nested in (("container", ""), ("folder", "./")):
        with tarfile.open(project.folder / "build" / f"{name}.tar") as tar:
            members = {member.name: member for member in tar}
        folders = {path for path, member in members.items() if member.isdir()}
        inside = ("git/d/e", "release/d/e", "package/debian/source", "modules/inner")
        assert {nested + path for path in inside} <= folders, folders
        assert {path for path in folders if members[path].mode != 0o755} == set()
        files = {path: member.mode for path, member in members.items() if member.isreg()}
        assert {path for path, mode in files.items() if mode not in (0o644, 0o755)} == set()
        for source in ("git", "release"):
            assert files[f"{nested}{source}/d/e/f"] == 0o644 and files[f"{nested}{source}/d/e/tool"] == 0o755
            assert members[f"{nested}{source}/d/link"].linkname == "e/f"
    assert "." in folders
    assert {path.stat().st_mode & 0o777 for path in (store / "jobs").iterdir()} == {0o700}


def test_folders_that_a_tar_does_not_name_are_755_too(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a/b/file"))
    before = os.umask(0o077)
    try:
        with tarfile.open(tmp_path / "x.tar") as tar:
            (tmp_path / "out").mkdir()
            workspace.unpack(tar, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {"a": 0o755, "b": 0o755, "file": 0o644}


COPY = """
import json
import os
import subprocess
import struct

import tiny

CAPABILITY = struct.pack("<5I", 0x2000001, 1 << 13, 0, 0, 0)  # cap_net_raw=ep, see linux/capability.h
SIZE = 64 << 20
os.makedirs("tree/sub/deep")
with open("tree/tool", "w") as file:
    file.write("tool")
os.setxattr("tree/tool", "user.note", b"kept")
os.setxattr("tree/tool", "security.capability", CAPABILITY)
os.setxattr("tree/sub", "user.note", b"of a folder")
os.link("tree/tool", "tree/sub/deep/again")
with open("tree/sparse", "wb") as file:
    file.seek(SIZE // 2)
    file.write(b"data")
    file.truncate(SIZE)
os.chmod("tree", 0o1777)
os.chmod("tree/sub", 0o1777)
os.chmod("tree/sub/deep", 0o2750)
seen = {}
tiny.fill(Path("files"), ("getcap", "sh"))


def look(name, root):
    tool, again, sparse = (os.stat(f"{root}/{path}") for path in ("tool", "sub/deep/again", "sparse"))
    with open(f"{root}/sparse", "rb") as file:
        content = file.read()
    seen[name] = {
        "modes": [oct(os.stat(f"{root}/{path}").st_mode & 0o7777) for path in ("", "sub", "sub/deep")],
        "owners": sorted({(os.stat(f"{root}/{path}").st_uid, tool.st_gid) for path in ("tool", "sub", "sparse")}),
        "one file": os.path.samestat(tool, again) and tool.st_nlink,
        "capability": os.getxattr(f"{root}/tool", "security.capability") == CAPABILITY,
        "notes": [os.getxattr(f"{root}/{path}", "user.note").decode() for path in ("tool", "sub")],
        "sparse": sparse.st_size == SIZE and sparse.st_blocks * 512 < 1 << 20,
        "content": content == bytes(SIZE // 2) + b"data" + bytes(SIZE // 2 - 4),
    }


look("first", "tree")
with Container("scratch") as c:
    c.copy_in("files", "/")
    c.copy_in("tree", "/opt/tree")
    with c.mount() as root:
        look("container", root / "opt/tree")
    print(c.run(["getcap", "/opt/tree/sub/deep/again"], stdout=subprocess.PIPE).stdout)
    c.copy_in(FOREIGN, "/foreign")
    with c.mount() as root:
        seen["foreign"] = ["security.capability" in os.listxattr(root / "foreign"), (root / "foreign").read_text()]
    c.copy_out("/opt/tree", "back")
    look("back", "back")
    image = c.commit()
with Container(image) as c:
    c.copy_out("/opt/tree/tool", "tool")
    seen["image"] = os.getxattr("tool", "security.capability") == CAPABILITY
with open("x", "w") as file:
    json.dump(seen, file)
"""


def test_links_attributes_holes_and_folder_modes_are_preserved_both_ways(
    place: tuple[Project, Path], account: Account
) -> None:
    project, store = place
    foreign = account.home / "foreign"
    foreign.write_text("of another namespace")  # user 4242 does not exist outside
    os.setxattr(foreign, "security.capability", struct.pack("<6I", 0x3000001, 1 << 13, 0, 0, 0, 4242))
    project.write(
        "dodo.py", 'from gamebear_tasks import artifact\ndef task_x(): return artifact("x.py", outputs=["x"])'
    )
    project.write("x.py", COPY.replace("FOREIGN", repr(str(foreign))))
    assert "cap_net_raw=ep" in project.doit("-v", "2").ok().text
    seen = json.loads((project.folder / "x").read_text())
    expected = {
        "modes": ["0o1777", "0o1777", "0o2750"],
        "owners": [[0, 0]],
        "one file": 2,
        "capability": True,
        "notes": ["kept", "of a folder"],
        "sparse": True,
        "content": True,
    }
    assert seen.pop("foreign") == [store == project.store, "of another namespace"]
    assert seen == {"first": expected, "container": expected, "back": expected, "image": True}
