"""Effects of `.gitattributes` on a git source: Git LFS, line endings, keywords, encodings."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_sources import NOTHING_LOCKED, contents
from upstreams import call_git, commit

from gamebear_tasks.errors import SourceError
from gamebear_tasks.sources.declare import git
from gamebear_tasks.util.subprocesses import run

pytest_plugins = ("upstreams",)

FIRMWARE = bytes(range(256)) * 40


@pytest.fixture
def firmware(upstream: Path) -> Path:
    """A repository with files in Git LFS, one of them in a folder with separate attributes."""
    call_git(upstream, "lfs", "install", "--local")
    (upstream / "blobs").mkdir()
    (upstream / "blobs" / ".gitattributes").write_text("*.fw filter=lfs diff=lfs merge=lfs -text\n")
    (upstream / "blobs" / "größe a.fw").write_bytes(FIRMWARE)
    (upstream / "blobs" / "empty.fw").write_bytes(b"")
    (upstream / "blobs" / "tool.fw").write_bytes(b"#!/bin/sh\n")
    (upstream / "blobs" / "tool.fw").chmod(0o755)
    commit(upstream)
    assert call_git(upstream, "cat-file", "blob", "HEAD:blobs/größe a.fw").startswith("version https://git-lfs")
    return upstream


def head(repository: Path) -> str:
    return call_git(repository, "rev-parse", "HEAD")


def without_lfs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide all programs except git and those that start it."""
    folder.mkdir()
    for name in ("git", "setpriv"):
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def lfs_server() -> Iterator[tuple[dict[str, bytes], str]]:
    """A Git LFS server: its objects by SHA-256, and its URL. See git-lfs's docs/api/batch.md."""
    objects: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["objects"]
            found = [
                {**each, "actions": {"download": {"href": f"{url}/{each['oid']}"}}}
                if each["oid"] in objects
                else {**each, "error": {"code": 404, "message": "gone"}}
                for each in asked
            ]
            self.answer(json.dumps({"transfer": "basic", "objects": found}).encode(), "application/vnd.git-lfs+json")

        def do_GET(self) -> None:
            self.answer(objects[self.path.rpartition("/")[2]], "application/octet-stream")

        def answer(self, data: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/lfs"
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield objects, url
        server.shutdown()
        thread.join()


def test_lfs_files_have_their_content(firmware: Path, cache: Path) -> None:
    path = git(str(firmware), head(firmware)).fetch(cache, NOTHING_LOCKED)
    found = contents(path)
    assert found["blobs/größe a.fw"] == FIRMWARE
    assert found["blobs/empty.fw"] == b""
    assert found["blobs/tool.fw"] == b"#!/bin/sh\n"
    assert found["Makefile"] == b"all:\n"
    assert git(f"file://{firmware}", head(firmware)).fetch(cache.parent / "other", NOTHING_LOCKED).read_bytes() == (
        path.read_bytes()
    )


def test_lfs_files_of_a_submodule_have_their_content(firmware: Path, cache: Path) -> None:
    outer = firmware.parent / "outer"
    outer.mkdir()
    call_git(outer, "init", "--quiet")
    call_git(outer, "submodule", "--quiet", "add", "../upstream", "lib/up")
    commit(outer)
    found = contents(git(str(outer), head(outer)).fetch(cache, NOTHING_LOCKED))
    assert found["lib/up/blobs/größe a.fw"] == FIRMWARE


def test_lfs_files_come_from_the_server_that_the_repository_names(
    firmware: Path,
    cache: Path,
    daemon: Callable[[str], str],
    lfs_server: tuple[dict[str, bytes], str],
    git_settings: Path,
) -> None:
    """All files, regardless of exclusions by the repository or the user."""
    objects, url = lfs_server
    with git_settings.open("a") as settings:
        settings.write("[lfs]\nfetchexclude = *\n")
    (firmware / ".lfsconfig").write_text(f"[lfs]\nurl = {url}\nfetchexclude = *\n")
    commit(firmware)
    for data in (FIRMWARE, b"#!/bin/sh\n"):
        objects[hashlib.sha256(data).hexdigest()] = data
    source = git(daemon("upstream"), head(firmware))
    assert contents(source.fetch(cache, NOTHING_LOCKED))["blobs/größe a.fw"] == FIRMWARE


def test_an_lfs_file_that_its_server_does_not_have_is_named(
    firmware: Path, cache: Path, daemon: Callable[[str], str], lfs_server: tuple[dict[str, bytes], str]
) -> None:
    objects, url = lfs_server
    (firmware / ".lfsconfig").write_text(f"[lfs]\nurl = {url}\nskipdownloaderrors = true\n")
    commit(firmware)
    objects[hashlib.sha256(FIRMWARE).hexdigest()] = FIRMWARE
    with pytest.raises(SourceError, match=r"the Git LFS file blobs/tool\.fw"):
        git(daemon("upstream"), head(firmware)).fetch(cache, NOTHING_LOCKED)
    assert not list(cache.glob("*.tar"))


def test_without_git_lfs_a_source_with_lfs_files_fails_and_names_one(
    firmware: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rev = head(firmware)
    without_lfs(tmp_path / "bin", monkeypatch)
    with pytest.raises(SourceError) as caught:
        git(str(firmware), rev).fetch(cache, NOTHING_LOCKED)
    assert "git-lfs is not installed" in caught.value.message and "blobs/größe a.fw" in caught.value.message
    assert "git-lfs" in caught.value.hint
    assert not list(cache.glob("*.tar"))


def test_without_git_lfs_other_sources_work(upstream: Path, cache: Path, tmp_path: Path) -> None:
    """Also one with the attribute whose files were committed without git-lfs, and one with a pointer for a test."""
    oid = hashlib.sha256(FIRMWARE).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(FIRMWARE)}\n"
    (upstream / "pointer.txt").write_text(pointer)
    (upstream / ".gitattributes").write_text("*.fw filter=lfs -text\n")
    (upstream / "raw.fw").write_bytes(FIRMWARE)
    (upstream / "small.fw").write_bytes(b"raw")
    call_git(upstream, "-c", "filter.lfs.clean=", "-c", "filter.lfs.process=", "add", "--all")
    call_git(upstream, "-c", "filter.lfs.clean=", "-c", "filter.lfs.process=", "commit", "--quiet", "-m", "raw")
    rev = head(upstream)
    with pytest.MonkeyPatch.context() as patch:
        without_lfs(tmp_path / "bin", patch)
        found = contents(git(str(upstream), rev).fetch(cache, NOTHING_LOCKED))
    assert found["pointer.txt"] == pointer.encode()
    assert found["raw.fw"] == FIRMWARE
    assert found["small.fw"] == b"raw"


def test_a_damaged_lfs_object_in_the_cache_is_fetched_again(firmware: Path, cache: Path) -> None:
    source = git(str(firmware), head(firmware))
    path = source.fetch(cache, NOTHING_LOCKED)
    before = path.read_bytes()
    path.unlink()
    oid = hashlib.sha256(FIRMWARE).hexdigest()
    (kept,) = cache.glob(f"git/*.git/lfs/objects/*/*/{oid}")
    kept.unlink()  # git-lfs hard-links it to the object of a local repository
    kept.write_bytes(bytes(len(FIRMWARE)))
    assert source.fetch(cache, NOTHING_LOCKED).read_bytes() == before


@pytest.mark.parametrize("extra", ["ext-0-crypt sha256:" + "1" * 64 + "\n", "x y\n"])
def test_an_lfs_pointer_of_an_unknown_kind_is_rejected(upstream: Path, cache: Path, extra: str) -> None:
    (upstream / ".gitattributes").write_text("*.fw filter=lfs -text\n")
    (upstream / "a.fw").write_text(
        f"version https://git-lfs.github.com/spec/v1\n{extra}oid sha256:{'0' * 64}\nsize 12\n"
    )
    call_git(upstream, "-c", "filter.lfs.clean=", "-c", "filter.lfs.process=", "add", "--all")
    call_git(upstream, "commit", "--quiet", "-m", "pointer")
    with pytest.raises(SourceError, match=r"a\.fw is not a supported Git LFS pointer"):
        git(str(upstream), head(upstream)).fetch(cache, NOTHING_LOCKED)


@pytest.mark.parametrize("url", ["file:///srv/secret", "/srv/secret", "ext::sh -c id", "-oProxyCommand=x:y"])
def test_a_repository_cannot_read_lfs_files_from_a_local_repository(
    firmware: Path, cache: Path, daemon: Callable[[str], str], url: str
) -> None:
    (firmware / ".lfsconfig").write_text(f'[lfs]\nurl = "{url}"\n')
    commit(firmware)
    with pytest.raises(SourceError, match=r"has a Git LFS server with the unsafe URL"):
        git(daemon("upstream"), head(firmware)).fetch(cache, NOTHING_LOCKED)


def test_the_includes_of_an_lfsconfig_are_not_followed(
    firmware: Path, cache: Path, tmp_path: Path, daemon: Callable[[str], str], lfs_server: tuple[dict[str, bytes], str]
) -> None:
    """A FIFO would block for ever; git-lfs reads it in an index, so the file is committed without one."""
    objects, url = lfs_server
    for data in (FIRMWARE, b"#!/bin/sh\n"):
        objects[hashlib.sha256(data).hexdigest()] = data
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "config").write_text(f"[include]\npath = {tmp_path / 'fifo'}\n[lfs]\nurl = {url}\n")
    blob = call_git(firmware, "hash-object", "-w", str(tmp_path / "config"))
    (tmp_path / "listing").write_text(f"{call_git(firmware, 'ls-tree', 'HEAD')}\n100644 blob {blob}\t.lfsconfig\n")
    with (tmp_path / "listing").open("rb") as listing:
        folder = run(["git", "-C", firmware, "mktree"], stdin=listing).decode().strip()
    made = call_git(firmware, "commit-tree", folder, "-p", "HEAD", "-m", "include")
    call_git(firmware, "update-ref", "refs/heads/main", made)
    source = git(daemon("upstream"), made)
    assert contents(source.fetch(cache, NOTHING_LOCKED))["blobs/größe a.fw"] == FIRMWARE


def test_files_equal_those_of_a_clone(upstream: Path, cache: Path, tmp_path: Path, git_settings: Path) -> None:
    """Compared with a clone by an unconfigured git; the user's filters are not run."""
    (upstream / ".gitattributes").write_text(
        "* text=auto\n*.bat eol=crlf\n*.id ident\n*.utf16 text working-tree-encoding=UTF-16LE-BOM\n"
        "*.enc filter=crypt\n*.both eol=crlf filter=crypt\nraw.bat -text\n"
    )
    for name in ("a.bat", "a.sh", "a.enc", "a.both", "raw.bat"):
        (upstream / name).write_bytes(b"one\ntwo\n")
    (upstream / "a.id").write_bytes(b"$Id$\n")
    (upstream / "a.utf16").write_text("größe\n", "utf-16")
    commit(upstream)
    call_git(tmp_path, "clone", "--quiet", str(upstream), "clone")
    with git_settings.open("a") as settings:
        settings.write(f'[filter "crypt"]\nsmudge = touch {tmp_path}/ran\nrequired = true\n')
    found = contents(git(str(upstream), head(upstream)).fetch(cache, NOTHING_LOCKED))
    cloned = {
        str(path.relative_to(tmp_path / "clone")): path.read_bytes()
        for path in (tmp_path / "clone").rglob("*")
        if path.is_file() and not path.is_symlink() and ".git" not in path.parts
    }
    assert {name: data for name, data in found.items() if isinstance(data, bytes)} == cloned
    assert found["a.bat"] == b"one\r\ntwo\r\n" and found["a.id"] != b"$Id$\n" and found["a.both"] == b"one\r\ntwo\r\n"
    assert not (tmp_path / "ran").exists()


def test_a_symlink_named_gitattributes_is_not_read(upstream: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "attributes").write_text("* eol=crlf\n")
    (upstream / ".gitattributes").unlink()
    (upstream / ".gitattributes").symlink_to(tmp_path / "attributes")
    commit(upstream)
    assert contents(git(str(upstream), head(upstream)).fetch(cache, NOTHING_LOCKED))["windows.txt"] == b"one\ntwo\n"
