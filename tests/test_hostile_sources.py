"""Hostile and damaged sources: they cannot access other files, do not block, and cause a proper error."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import shutil
import socket
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from project import wait_for
from test_sources import NOTHING_LOCKED, contents, member, packed, put, tar_bytes
from upstreams import call_git

from gamebear_tasks.errors import GamebearError, SourceError
from gamebear_tasks.sources import deterministic_tar
from gamebear_tasks.sources.debian import entries
from gamebear_tasks.sources.declare import archive, git
from gamebear_tasks.sources.git_urls import relative_url
from gamebear_tasks.sources.lockfile import Lock
from gamebear_tasks.util.subprocesses import ProgramError, StalledError, run

pytest_plugins = ("upstreams",)


# Programs


@pytest.mark.system
def test_a_program_that_makes_progress_does_not_time_out(tmp_path: Path) -> None:
    """Progress is output, or growth of a folder."""
    talks = "for i in 1 2 3 4 5; do echo $i >&2; sleep 1; done; echo done"
    writes = f"for i in 1 2 3 4 5; do echo $i >> {tmp_path}/file; sleep 1; done; echo done"
    assert run(["sh", "-c", talks], silence=4) == b"done\n"
    assert run(["sh", "-c", writes], silence=2, growing=tmp_path) == b"done\n"


@pytest.mark.system
def test_a_stalled_program_is_killed_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(StalledError, match=r"no progress for 0\.5 seconds"):
        run(["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid; wait"], silence=0.5)
    child = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    wait_for(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_child_that_holds_the_output_open_does_not_block(tmp_path: Path) -> None:
    """As with ControlPersist of ssh."""
    assert run(["sh", "-c", f"echo out; sleep 1000 & echo $! > {tmp_path}/pid"]) == b"out\n"
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_the_output_of_a_program_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gamebear_tasks.util.subprocesses.OUTPUT_LIMIT", 1 << 20)
    with pytest.raises(ProgramError, match="yes wrote more than 1 MiB"):
        run(["yes"])
    noise = "head -c 3000000 /dev/zero | tr '\\0' x >&2; echo; echo the reason >&2; exit 1"
    with pytest.raises(ProgramError) as caught:
        run(["sh", "-c", noise])
    assert caught.value.output.endswith("the reason\n") and len(caught.value.output) < 100_000


# git


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that accepts connections and never replies."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


@pytest.mark.system
def test_a_server_that_never_replies_times_out(
    silent: socket.socket, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For fetches and lookups; it is not queried again."""
    monkeypatch.setattr("gamebear_tasks.sources.git_repository.SILENCE", 1.0)
    url = f"git://127.0.0.1:{silent.getsockname()[1]}/x"
    with pytest.raises(
        SourceError, match=r"cannot be fetched: no progress for 1 seconds\.\n→ Check the network and the server"
    ):
        git(url, "1" * 40).fetch(cache, NOTHING_LOCKED)
    silent.accept()[0].close()
    with pytest.raises(BlockingIOError):
        silent.accept()
    with pytest.raises(
        SourceError, match=r"cannot be resolved: no progress for 1 seconds\.\n→ Check the network and the server"
    ):
        git(url, "main").resolve()


def test_a_stalled_git_does_not_remove_the_cached_repository(
    upstream: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file server that does not respond."""
    source = git(str(upstream), call_git(upstream, "rev-parse", "HEAD"))
    source.fetch(cache, NOTHING_LOCKED).unlink()
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "git"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *ls-tree*) exec sleep 1000;; esac\nexec {shutil.which("git")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("gamebear_tasks.sources.git_repository.SILENCE", 2.0)
    (repository,) = (cache / "git").glob("*.git")
    before = repository.stat().st_ino
    with pytest.raises(SourceError, match="no progress for 2 seconds"):
        source.fetch(cache, NOTHING_LOCKED)
    assert repository.stat().st_ino == before


def with_gitmodules(upstream: Path, text: str) -> str:
    """Commit a submodule and a `.gitmodules`; return the commit."""
    (upstream / ".gitmodules").unlink(missing_ok=True)
    (upstream / ".gitmodules").write_text(text)
    head = call_git(upstream, "rev-parse", "HEAD")
    call_git(upstream, "add", "--all")
    call_git(upstream, "update-index", "--add", "--cacheinfo", f"160000,{head},lib")
    call_git(upstream, "commit", "--quiet", "--message", "modules")
    return call_git(upstream, "rev-parse", "HEAD")


def test_the_includes_of_gitmodules_are_not_followed(upstream: Path, cache: Path, tmp_path: Path) -> None:
    """Neither to a local file, which would contain the URL here, nor to a FIFO, which would block."""
    (tmp_path / "ours").write_text(f'[submodule "x"]\npath = lib\nurl = {upstream}\n')
    os.mkfifo(tmp_path / "fifo")
    for name in ("ours", "fifo"):
        rev = with_gitmodules(upstream, f"[include]\npath = {tmp_path / name}\n")
        with pytest.raises(SourceError, match=r"has a submodule lib without a URL in its \.gitmodules"):
            git(str(upstream), rev).fetch(cache, NOTHING_LOCKED)


def test_a_symlink_named_gitmodules_is_not_read(upstream: Path, cache: Path) -> None:
    with_gitmodules(upstream, "")
    (upstream / ".gitmodules").unlink()
    (upstream / ".gitattributes").unlink()  # for these, git uses an index, which cannot contain such a link
    (upstream / ".gitmodules").symlink_to('[submodule "x"]\npath = lib\nurl = ./\n')
    call_git(upstream, "add", ".gitmodules", ".gitattributes")
    call_git(upstream, "commit", "--quiet", "--message", "link")
    rev = call_git(upstream, "rev-parse", "HEAD")
    with pytest.raises(SourceError, match=r"has a submodule lib without a URL in its \.gitmodules"):
        git(str(upstream), rev).fetch(cache, NOTHING_LOCKED)


@pytest.mark.parametrize("text", ["[submodule", "\0\xff[[["])
def test_an_invalid_gitmodules_is_rejected_and_the_cache_retained(upstream: Path, cache: Path, text: str) -> None:
    rev = with_gitmodules(upstream, text)
    with pytest.raises(SourceError, match=r"is rejected: its \.gitmodules: bad config line \d"):
        git(str(upstream), rev).fetch(cache, NOTHING_LOCKED)
    assert list((cache / "git").glob("*.git"))


def test_an_oversized_gitmodules_is_rejected(upstream: Path, cache: Path) -> None:
    rev = with_gitmodules(upstream, "# \n" * 400_000)
    with pytest.raises(SourceError, match=r"is rejected: its \.gitmodules has 1200000 bytes"):
        git(str(upstream), rev).fetch(cache, NOTHING_LOCKED)


@pytest.mark.parametrize(
    ("parent", "url"),
    [
        ("https://git.example/a", "../../evil.example/x"),
        ("https://git.example/a", "../../../x"),
        ("ssh://git@git.example/a", "../../-oProxyCommand=id/x"),
        ("git@git.example:a", "../../x"),
        ("git@git.example:a", ".././../ext::sh -c id"),
    ],
)
def test_a_relative_url_cannot_lead_out_of_its_host(parent: str, url: str) -> None:
    assert relative_url(parent, url) == ""


def test_a_submodule_recursion_over_older_commits_terminates(
    upstream: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each commit doubles the content of its predecessor."""
    monkeypatch.setattr("gamebear_tasks.sources.git_checkout.SUBMODULES", 5)
    for number in range(4):
        head = call_git(upstream, "rev-parse", "HEAD")
        modules = "".join(f'[submodule "{name}"]\npath = {name}\nurl = ../upstream\n' for name in "ab")
        (upstream / ".gitmodules").write_text(modules)
        call_git(upstream, "add", ".gitmodules")
        for name in "ab":
            call_git(upstream, "update-index", "--add", "--cacheinfo", f"160000,{head},{name}")
        call_git(upstream, "commit", "--quiet", "--allow-empty", "--message", str(number))
    with pytest.raises(SourceError, match="has more than 5 submodules"):
        git(str(upstream), call_git(upstream, "rev-parse", "HEAD")).fetch(cache, NOTHING_LOCKED)


def test_a_tree_with_a_git_folder_is_rejected_as_by_git(upstream: Path, cache: Path) -> None:
    blob = call_git(upstream, "hash-object", "-w", str(upstream / "Makefile"))
    inner = call_git_with(upstream, f"100644 blob {blob}\tconfig\n", "mktree")
    outer = call_git_with(upstream, f"040000 tree {inner}\t.GIT\n", "mktree")
    rev = call_git(upstream, "commit-tree", outer, "-m", "git")
    call_git(upstream, "update-ref", "refs/heads/odd", rev)
    with pytest.raises(SourceError, match=r"unsafe name '\.GIT/config'"):
        git(str(upstream), rev).fetch(cache, NOTHING_LOCKED)


def call_git_with(folder: Path, text: str, *arguments: str) -> str:
    """Run git in a folder with an input."""
    (folder.parent / "input").write_text(text)
    with (folder.parent / "input").open("rb") as file:
        return run(["git", "-C", folder, *arguments], stdin=file).decode().strip()


def test_the_target_of_a_link_is_bounded(upstream: Path, cache: Path) -> None:
    """The target is a blob of any size."""
    (upstream.parent / "long").write_bytes(b"x" * 5000)
    blob = call_git(upstream, "hash-object", "-w", str(upstream.parent / "long"))
    call_git(upstream, "update-index", "--add", "--cacheinfo", f"120000,{blob},long")
    call_git(upstream, "commit", "--quiet", "--message", "long")
    with pytest.raises(SourceError, match="its link 'long' has a target of 5000 bytes"):
        git(str(upstream), call_git(upstream, "rev-parse", "HEAD")).fetch(cache, NOTHING_LOCKED)


@pytest.mark.parametrize("target", ["", "a\0b", "x" * 4096, "\ud800"])
def test_a_tree_rejects_an_invalid_link(target: str) -> None:
    with pytest.raises(deterministic_tar.TreeError, match="has no valid target"):
        deterministic_tar.write(io.BytesIO(), [deterministic_tar.Link("link", target)], 0)


def test_git_environment_variables_do_not_change_the_tree(
    upstream: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = git(str(upstream), with_gitmodules(upstream, '[submodule "x"]\npath = lib\nurl = ../x\nupdate = none\n'))
    plain = source.fetch(cache / "one", NOTHING_LOCKED).read_bytes()
    for name, value in {
        "GIT_DEFAULT_HASH": "sha256",
        "GIT_CONFIG": "/nonexistent",
        "GIT_ATTR_SOURCE": "nonexistent",
        "GIT_ICASE_PATHSPECS": "1",
        "GIT_LFS_SKIP_SMUDGE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert source.fetch(cache / "two", NOTHING_LOCKED).read_bytes() == plain


# Archives


def fetched(data: bytes, folder: Path, strip: int = 0) -> dict[str, bytes | str | None]:
    """Return the tree or the error of an archive."""
    folder.mkdir(exist_ok=True)
    digest = put(folder, data)
    return contents(archive((folder / "release").as_uri(), digest, strip=strip).fetch(folder / "cache", NOTHING_LOCKED))


def zip_bytes(*members: tuple[str | zipfile.ZipInfo, bytes], host: int = 3, attributes: int = 0) -> bytes:
    """Create a zip file like those of an operating system."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in members:
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            info.create_system = host
            info.external_attr = info.external_attr or attributes
            file.writestr(info, content)
    return out.getvalue()


def test_a_zip_from_windows_has_folders_for_backslashes(tmp_path: Path) -> None:
    data = zip_bytes(("p-1\\", b""), ("p-1\\src\\x.c", b"x"), ("p-1\\src/y.c", b"y"), ("p-1/README", b"r"), host=0)
    assert fetched(data, tmp_path, strip=1) == {"README": b"r", "src": None, "src/x.c": b"x", "src/y.c": b"y"}


def test_a_zip_from_unix_may_have_backslashes_in_names(tmp_path: Path) -> None:
    """As in unzip."""
    assert fetched(zip_bytes(("a\\b", b"x"), host=3), tmp_path) == {"a\\b": b"x"}


@pytest.mark.parametrize("name", ["..\\x", "a\\..\\..\\x", "\\x", "C:\\x", "c:x", "\\\\host\\share\\x"])
def test_a_zip_from_windows_cannot_escape_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="it contains the unsafe name"):
        fetched(zip_bytes((name, b"x"), host=0), tmp_path)


def test_a_zip_may_mark_folders_in_several_ways(tmp_path: Path) -> None:
    """By the DOS attribute or the Unix mode, without a slash."""
    assert fetched(zip_bytes(("a", b""), ("a/b", b"x"), host=0, attributes=0x10), tmp_path / "dos")["a"] is None
    unix = zip_bytes(("a", b""), host=3, attributes=0o040755 << 16)
    assert fetched(unix, tmp_path / "unix") == {"a": None}


def raw_zip(name: bytes, host: int, flags: int = 0, extra: bytes = b"") -> bytes:
    """Create a zip file with one empty member, whose name has arbitrary bytes."""
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, flags, 0, 0, 33, 0, 0, 0, len(name), 0) + name
    central = struct.pack(
        "<4s2B5H3I5H2I", b"PK\1\2", 20, host, 20, flags, 0, 0, 33, 0, 0, 0, len(name), len(extra), 0, 0, 0, 0, 0
    )
    central += name + extra
    return local + central + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local), 0)


def test_zip_names_are_decoded_as_by_unzip(tmp_path: Path) -> None:
    """Code page 437 from DOS, bytes from Unix, UTF-8 with a flag or an extra field; on every Python."""
    raw = "größe".encode("cp437")
    field = b"\1" + struct.pack("<I", zlib.crc32(raw)) + "größer".encode()
    extra = struct.pack("<2H", 0x7075, len(field)) + field
    stale = extra.replace(field[1:5], bytes(4))
    assert list(fetched(raw_zip(raw, 0), tmp_path / "1")) == ["größe"]
    assert list(fetched(raw_zip("größe".encode(), 3), tmp_path / "2")) == ["größe"]
    assert list(fetched(raw_zip("größe".encode(), 0, 0x800), tmp_path / "3")) == ["größe"]
    assert list(fetched(raw_zip(raw, 0, extra=extra), tmp_path / "4")) == ["größer"]
    assert list(fetched(raw_zip(raw, 0, extra=stale), tmp_path / "5")) == ["größe"]
    with pytest.raises(SourceError, match="cannot be unpacked: it is damaged"):
        fetched(raw_zip(b"\xff", 0, 0x800), tmp_path / "6")


def test_the_last_of_two_members_with_one_name_counts(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zip_bytes(("./a", b"first"), ("a", b"second"), ("a", b"third"))
    assert fetched(data, tmp_path) == {"a": b"third"}


def test_a_links_target_in_a_zip_is_not_read_into_memory(tmp_path: Path) -> None:
    """Its uncompressed size may be large."""
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    data = zip_bytes((info, bytes(64 << 20)))
    tracemalloc.start()
    with pytest.raises(SourceError, match="its link 'link' has a target of more than 4095 bytes"):
        fetched(data, tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16 << 20


def pax(size: str) -> bytes:
    """Create a tar file with a member whose size is in a PAX header."""
    record = f" size={size}\n"
    length = len(record) + len(str(len(record) + 3))
    body = f"{length}{record}".encode()
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(body)
    member = tarfile.TarInfo("a")
    member.size = 3
    return b"".join(
        [
            header.tobuf(tarfile.USTAR_FORMAT),
            body.ljust(512, b"\0"),
            member.tobuf(),
            b"abc".ljust(512, b"\0"),
            bytes(1024),
        ]
    )


@pytest.mark.parametrize("size", ["-5", "-600", "9" * 30, "1" + "0" * 18, "1" * 5000, "x", "1e3", "", "nan"])
def test_a_tar_file_with_an_impossible_size_is_damaged(size: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot be (used|unpacked)"):
        fetched(pax(size), tmp_path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize("size", [64 << 20, -(64 << 20)])
def test_an_oversized_tar_header_is_not_read_into_memory(kind: bytes, size: int, tmp_path: Path) -> None:
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, size
    data = gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + b"x" * (65 << 20), 1)
    tracemalloc.start()
    with pytest.raises(SourceError, match="it is damaged"):
        fetched(data, tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16 << 20


def test_an_archive_that_is_a_fifo_or_a_device_is_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(SourceError, match="it is not a regular file"):
            archive(path.as_uri(), "0" * 64).fetch(tmp_path / "cache", NOTHING_LOCKED)


SEEDS = {
    "tar": tar_bytes([member("a/b", b"x" * 600), member("a/l", type=tarfile.SYMTYPE, linkname="b")]),
    "pax": pax("3"),
    "gz": packed("gz"),
    "bz2": packed("bz2"),
    "xz": packed("xz"),
    "zip": packed("zip"),
    "dos": zip_bytes(("a\\b", b"x"), host=0),
}


def mutated(seed: bytes, seed_of_random: int) -> bytes:
    """Return bytes with a few typical mutations that break parsers."""
    chance = random.Random(seed_of_random)
    data = bytearray(seed)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(len(data) or 1)
        kind = chance.randrange(5)
        if kind == 0:
            data[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            data[place : place + chance.randrange(16)] = b""
        elif kind == 2:
            data[place:place] = bytes(chance.randrange(256) for _ in range(chance.randrange(16)))
        elif kind == 3:
            size = chance.choice([1, 2, 4, 8])
            data[place : place + size] = chance.choice([b"\0", b"\xff", b"\x80", b"-", b"9"]) * size
        else:
            del data[place:]
    return bytes(data)


@pytest.mark.parametrize("kind", SEEDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_archive_is_unpacked_or_rejected(kind: str, seed: int, tmp_path: Path) -> None:
    data = mutated(SEEDS[kind], seed)
    with contextlib.suppress(SourceError):
        fetched(data, tmp_path)


# Other files


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_lock_file_is_read_or_rejected(seed: int, tmp_path: Path) -> None:
    good = (
        b'{"version": 1, "git": {"https://git.example/x main": {"commit": "'
        + b"a" * 40
        + b'", "tag": "v1"}}, "debian":'
        b' {"hello": {"version": "1-1", "files": {"hello.dsc": "' + b"b" * 64 + b'"}}}}'
    )
    path = tmp_path / "gamebear.lock"
    path.write_bytes(mutated(good, seed))
    with contextlib.suppress(SourceError):
        Lock.read(path)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_list_of_source_packages_yields_its_intact_entries(seed: int) -> None:
    good = b"Package: x\nVersion: 1-1\nChecksums-Sha256:\n " + b"a" * 64 + b" 10 x_1-1.dsc\n\nPackage: y\n"
    with contextlib.suppress(GamebearError):
        entries(mutated(good, seed).decode(errors="replace"), "x")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_gitmodules_is_read_or_rejected(seed: int, upstream: Path, tmp_path: Path) -> None:
    good = b'[submodule "x"]\n\tpath = lib\n\turl = ../gone\n\tupdate = none\n'
    (upstream / ".gitmodules").write_bytes(mutated(good, seed))
    head = call_git(upstream, "rev-parse", "HEAD")
    call_git(upstream, "add", ".gitmodules")
    call_git(upstream, "update-index", "--add", "--cacheinfo", f"160000,{head},lib")
    call_git(upstream, "commit", "--quiet", "--allow-empty", "--message", str(seed))
    with contextlib.suppress(SourceError):
        git(str(upstream), call_git(upstream, "rev-parse", "HEAD")).fetch(tmp_path / "cache", NOTHING_LOCKED)
