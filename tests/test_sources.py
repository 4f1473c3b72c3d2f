"""Sources: their trees, pins and errors."""

from __future__ import annotations

import bz2
import concurrent.futures
import contextlib
import gzip
import hashlib
import http.server
import io
import lzma
import multiprocessing
import os
import shutil
import subprocess
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from upstreams import COMMIT_TIME, call_git, commit, free_port, no_programs

from gamebear_tasks.errors import SettingsError, SourceError
from gamebear_tasks.sources import deterministic_tar
from gamebear_tasks.sources.alternatives import check_preference, choose
from gamebear_tasks.sources.base import FetchedSource
from gamebear_tasks.sources.debian import _Apt, entries, for_sources
from gamebear_tasks.sources.declare import archive, debian, either, git
from gamebear_tasks.sources.git_urls import relative_url
from gamebear_tasks.sources.lockfile import DebianEntry, GitEntry, Lock

pytest_plugins = ("upstreams",)

NOTHING_LOCKED = Lock()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A web server: its folder and URL. The file `cut` ends halfway."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "web"))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            self.path = self.path.removeprefix("http://proxied.example")
            if self.path == "/cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(bytes(400))
            else:
                super().do_GET()

        def log_message(self, *arguments: object) -> None:
            pass

    (tmp_path / "web").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield tmp_path / "web", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def contents(path: Path) -> dict[str, bytes | str | None]:
    """Return the members of a tar file: bytes of files, targets of links, None for folders."""
    with tarfile.open(path) as tar:
        return {
            member.name: member.linkname
            if member.issym()
            else tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.isreg()
            else None
            for member in tar
        }


def left_over(cache: Path) -> list[str]:
    """Return the entries of a cache besides tar files, lock files and the caches of git and apt."""
    return [
        path.name
        for path in cache.iterdir()
        if path.suffix not in (".tar", ".lock") and path.name not in ("git", "apt")
    ]


# The tar file


def make_file(path: str, content: bytes, executable: bool = False) -> deterministic_tar.File:
    """Create an entry of a tree."""
    return deterministic_tar.File(path, len(content), executable, lambda: contextlib.nullcontext(io.BytesIO(content)))


def test_a_tree_has_the_same_bytes_on_every_machine_and_python() -> None:
    """The recorded hash applies to every Python."""
    out = io.BytesIO()
    entries: list[deterministic_tar.Entry] = [
        make_file("z", b"last"),
        make_file("a/" + "long" * 40 + "/ünï-" + os.fsdecode(b"\xff"), b"x" * 1000, executable=True),
        deterministic_tar.Link("a/link", "../" + "far" * 50),
        deterministic_tar.Folder("a-empty"),
    ]
    deterministic_tar.write(out, entries, 1_600_000_000)
    assert (
        hashlib.sha256(out.getvalue()).hexdigest() == "536622a903a30deefb8746e9b3e75f89d4a2e10a37d5bf8c1809c4bab0bb0fde"
    )
    deterministic_tar.write(again := io.BytesIO(), entries[::-1], 1_600_000_000)
    assert again.getvalue() == out.getvalue()


def test_a_tree_has_no_owners_and_one_timestamp() -> None:
    """It does not depend on the machine."""
    out = io.BytesIO()
    deterministic_tar.write(out, [make_file("bin/run", b"#!", executable=True), make_file("README", b"")], 12345)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        members = [(item.name, item.mode, item.uid, item.gid, item.uname, item.gname, item.mtime) for item in tar]
    assert members == [
        ("README", 0o644, 0, 0, "", "", 12345),
        ("bin", 0o755, 0, 0, "", "", 12345),
        ("bin/run", 0o755, 0, 0, "", "", 12345),
    ]


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a/./b", "nul\0"])
def test_a_tree_rejects_names_outside_its_folder(path: str) -> None:
    """No such tar file is created."""
    with pytest.raises(deterministic_tar.TreeError, match="unsafe name"):
        deterministic_tar.write(io.BytesIO(), [make_file(path, b"")], 0)


def test_a_tree_does_not_write_through_links() -> None:
    """A link to a folder elsewhere, and a file below it."""
    with pytest.raises(deterministic_tar.TreeError, match="'etc/passwd' is below 'etc', which is not a folder"):
        deterministic_tar.write(io.BytesIO(), [deterministic_tar.Link("etc", "/etc"), make_file("etc/passwd", b"")], 0)


# git


def test_a_commit_becomes_its_files_without_git(upstream: Path, cache: Path) -> None:
    """As in `git clone`: export-ignore and export-subst are ignored; eol, modes and links apply."""
    path = git(str(upstream), call_git(upstream, "rev-parse", "HEAD")).fetch(cache, NOTHING_LOCKED)
    found = contents(path)
    assert found.pop(".gitattributes")
    assert found == {
        "Makefile": b"all:\n",
        "link": "tests/run",
        "tests": None,
        "tests/run": b"#!/bin/sh\n",
        "windows.txt": b"one\r\ntwo\r\n",
    }
    with tarfile.open(path) as tar:
        assert {member.mtime for member in tar} == {COMMIT_TIME}
        assert tar.getmember("tests/run").mode == 0o755
    assert left_over(cache) == []


def test_the_users_configuration_does_not_change_the_files(upstream: Path, tmp_path: Path, git_settings: Path) -> None:
    """Line endings, filters, hooks, templates and GIT_DIR of the user are ignored."""
    source = git(str(upstream), call_git(upstream, "rev-parse", "HEAD"))
    plain = source.fetch(tmp_path / "one", NOTHING_LOCKED).read_bytes()
    with git_settings.open("a") as settings:
        settings.write(
            "[core]\nautocrlf = true\nhooksPath = /nonexistent\nquotePath = true\n"
            f"attributesFile = {tmp_path / 'attributes'}\n"
            "[init]\ntemplateDir = /nonexistent\n[fetch]\nprune = true\nfsckObjects = true\n[tar]\numask = 0077\n"
        )
    (tmp_path / "attributes").write_text("* eol=crlf\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_DIR", "/nonexistent")
        patch.setenv("TZ", "Asia/Tokyo")
        assert source.fetch(tmp_path / "two", NOTHING_LOCKED).read_bytes() == plain


def test_cached_sources_need_neither_network_nor_programs(
    upstream: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first fetch."""
    source = git(str(upstream), call_git(upstream, "rev-parse", "HEAD"))
    first = source.fetch(cache, NOTHING_LOCKED)
    shutil.rmtree(upstream)
    shutil.rmtree(cache / "git")
    no_programs(monkeypatch)
    assert source.fetch(cache, NOTHING_LOCKED) == first


def test_the_identities_of_2000_sources_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need no program and no network, and are fast."""
    no_programs(monkeypatch)
    lock = Lock(
        {"https://git.example/x main": GitEntry("a" * 40)}, {"hello": DebianEntry("1-1", {"hello.dsc": "b" * 64})}
    )
    started = time.process_time()
    for number in range(2000):
        git(f"https://git.example/{number}", f"{number:040x}").identity(lock)
        git("https://git.example/x", "main").identity(lock)
        archive(f"https://web.example/{number}.tar.gz", f"{number:064x}").identity(lock)
        debian("hello").identity(lock)
    assert time.process_time() - started < 1


def test_an_identity_covers_the_content_and_never_the_location() -> None:
    """The same content from different locations has the same identity."""
    lock = Lock(
        {"https://git.example/x main": GitEntry("a" * 40)}, {"hello/sid": DebianEntry("1-1", {"h.dsc": "b" * 64})}
    )
    assert git("https://git.example/x", "main").identity(lock) == {"git": "a" * 40}
    assert git("file:///elsewhere", "A" * 40).identity(lock) == {"git": "a" * 40}
    assert git("x", "a" * 40, submodules=False).identity(lock) == {"git": "a" * 40, "submodules": False}
    assert archive("http://x/y.zip", "C" * 64).identity(lock) == {"archive": "c" * 64, "strip": 1}
    assert debian("hello", suite="sid").identity(lock) == {"debian": "hello", "version": "1-1", "dsc": "b" * 64}


def test_only_the_commit_is_fetched_not_its_history(upstream: Path, cache: Path, daemon: Callable[[str], str]) -> None:
    """An old commit of a server that permits fetches by hash, through the user's insteadOf."""
    wanted = call_git(upstream, "rev-parse", "HEAD~0")
    for number in range(3):
        (upstream / "new").write_text(str(number))
        commit(upstream)
    assert "new" not in contents(git(daemon("upstream"), wanted).fetch(cache, NOTHING_LOCKED))
    newest = call_git(upstream, "rev-parse", "HEAD")
    assert contents(git(daemon("upstream"), newest).fetch(cache, NOTHING_LOCKED))["new"] == b"2"
    (repository,) = (cache / "git").glob("*.git")
    assert call_git(repository, "rev-list", "--all", "--count") == "2"


def test_without_single_commit_fetches_all_commits_are_fetched(
    upstream: Path, cache: Path, daemon: Callable[[str], str], git_settings: Path
) -> None:
    """The old protocol only offers branches and tags; also after a first, shallow fetch."""
    with git_settings.open("a") as settings:
        settings.write("[protocol]\nversion = 0\n")
    old = call_git(upstream, "rev-parse", "HEAD")
    (upstream / "new").write_text("new")
    tip = commit(upstream)
    assert "new" in contents(git(daemon("upstream"), tip).fetch(cache, NOTHING_LOCKED))
    assert "new" not in contents(git(daemon("upstream"), old).fetch(cache, NOTHING_LOCKED))


def test_a_commit_that_upstream_lacks_is_an_error(upstream: Path, cache: Path, daemon: Callable[[str], str]) -> None:
    """The error names the source and the commit."""
    with pytest.raises(SourceError) as caught:
        git(daemon("upstream"), "1" * 40).fetch(cache, NOTHING_LOCKED)
    assert caught.value.message.startswith(f"git source https://git.example/upstream {'1' * 40} cannot be fetched: ")
    assert f"no branch or tag contains the commit {'1' * 40}" in caught.value.message
    assert left_over(cache) == []
    assert not list(cache.glob("*.tar"))


@pytest.fixture
def other_words(tmp_path: Path, git_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A git whose messages all read the same, as if in an unknown language."""
    wrapper = tmp_path / "bin" / "git"
    wrapper.parent.mkdir()
    wrapper.write_text(f"""#!/bin/sh
{shutil.which("git")} "$@" 2>/dev/null && exit
status=$?
echo "fatal: ei onnistu" >&2
exit $status
""")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """Yield the URL of a web server that requires a login."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/x"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("method", ["fetch", "resolve"])
@pytest.mark.parametrize("cause", ["unreachable host", "unknown repository", "refused login"])
def test_the_fix_for_a_repository_that_cannot_be_queried(
    cause: str, method: str, cache: Path, daemon: Callable[[str], str], other_words: None
) -> None:
    """git's exit status does not distinguish the causes. The hint applies to each, and its command shows the cause."""
    with refusing() as url:
        if cause != "refused login":
            url = f"git://127.0.0.1:{free_port()}/x" if cause == "unreachable host" else daemon("unknown")
        with pytest.raises(SourceError) as caught:
            if method == "fetch":
                git(url, "2" * 40).fetch(cache, NOTHING_LOCKED)
            else:
                git(url, "main").resolve()
    assert caught.value.message.endswith(": ei onnistu."), "the cause is git's last line"
    assert caught.value.hint == f"Check URL, network and login: `git ls-remote {url}`."


def test_the_fix_for_a_commit_that_does_not_exist(
    upstream: Path, cache: Path, daemon: Callable[[str], str], other_words: None
) -> None:
    with pytest.raises(SourceError) as caught:
        git(daemon("upstream"), "1" * 40).fetch(cache, NOTHING_LOCKED)
    assert f"no branch or tag contains the commit {'1' * 40}" in caught.value.message
    assert caught.value.hint.startswith("Check the commit: `git ls-remote https://git.example/upstream`")


@pytest.mark.parametrize("is_full_before", [True, False])
def test_the_fix_for_a_full_disk(
    is_full_before: bool, upstream: Path, tmp_path: Path, daemon: Callable[[str], str], other_words: None
) -> None:
    """A disk that is full initially, and one that git fills."""
    (upstream / "big").write_bytes(os.urandom(20 << 20))
    head = commit(upstream)
    cache = tmp_path / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6M", "tmpfs", cache], check=True)
    try:
        if is_full_before:
            with contextlib.suppress(OSError), (cache / "filling").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        with pytest.raises(SourceError) as caught:
            git(daemon("upstream"), head).fetch(cache, NOTHING_LOCKED)
        assert caught.value.hint.startswith(f"Make room in {cache}")
        assert not list(cache.glob("git/*.git/objects/pack/tmp_*")), "the rest of the disk is free again"
    finally:
        subprocess.run(["umount", cache], check=True)


@pytest.mark.system
def test_an_unreachable_repository_is_an_error(cache: Path) -> None:
    """The error has git's message, the fix and the alternative."""
    port = free_port()
    source = choose(either(git=git(f"git://127.0.0.1:{port}/x", "2" * 40), debian=debian("hello")), None)
    assert isinstance(source, FetchedSource)
    with pytest.raises(SourceError) as caught:
        source.fetch(cache, NOTHING_LOCKED)
    assert "Connection refused" in caught.value.message
    assert "network" in caught.value.hint
    assert "`doit sources=debian`" in caught.value.hint


def test_missing_git_is_reported_with_the_fix(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without git."""
    no_programs(monkeypatch)
    with pytest.raises(SourceError, match=r"git is not installed\.\n→ Install .*: git$"):
        git("https://git.example/x", "2" * 40).fetch(cache, NOTHING_LOCKED)


def test_a_branch_without_a_pin_is_an_error() -> None:
    """No default is assumed."""
    with pytest.raises(SourceError) as caught:
        git("https://git.example/x", "main").identity(NOTHING_LOCKED)
    assert caught.value.message.startswith("git source https://git.example/x main is not pinned")
    assert "`gamebear lock`" in caught.value.hint


@pytest.mark.parametrize(
    "url",
    [
        "ssh://git@git.example/x",
        "git@git.example:x",
        "https://git.example/@x/y@z",
        "https://git.example:8080/x@y",
        "https://[::1]:8080/x@y",
    ],
)
def test_a_user_name_for_ssh_is_not_a_secret(url: str) -> None:
    """Also an @ in a path is not a secret."""
    assert git(url, "main").url == url


@pytest.fixture
def nested(upstream: Path) -> Path:
    """A repository with a submodule by relative URL, which has a submodule too."""
    srv = upstream.parent
    for name, module in (("middle", "upstream"), ("outer", "middle")):
        (srv / name).mkdir()
        call_git(srv / name, "init", "--quiet")
        (srv / name / f"{name}.c").write_text(name)
        commit(srv / name)
        call_git(srv / name, "submodule", "--quiet", "add", "--name", "a b", f"../{module}", f"lib/{module}")
        commit(srv / name)
    return srv / "outer"


def test_nested_submodules_are_included(nested: Path, cache: Path, daemon: Callable[[str], str]) -> None:
    """By relative URLs, over the network and from a path."""
    rev = call_git(nested, "rev-parse", "HEAD")
    found = contents(git(daemon("outer"), rev).fetch(cache, NOTHING_LOCKED))
    assert found["outer.c"] == b"outer"
    assert found["lib/middle/middle.c"] == b"middle"
    assert found["lib/middle/lib/upstream/Makefile"] == b"all:\n"
    assert contents(git(str(nested), rev).fetch(cache.parent / "other", NOTHING_LOCKED)) == found


def test_submodules_can_be_left_out(nested: Path, cache: Path) -> None:
    """Their folder exists, as in git."""
    source = git(str(nested), call_git(nested, "rev-parse", "HEAD"), submodules=False)
    found = contents(source.fetch(cache, NOTHING_LOCKED))
    assert [name for name in found if name.startswith("lib")] == ["lib", "lib/middle"]


@pytest.mark.parametrize("url", ["ext::sh -c id", "file:///srv/secret", "/srv/secret", "-oProxyCommand=x:y", "fd::17"])
def test_a_submodule_cannot_name_a_command_or_local_files(
    nested: Path, cache: Path, daemon: Callable[[str], str], url: str
) -> None:
    """The .gitmodules of an upstream is untrusted."""
    call_git(nested, "config", "--file", ".gitmodules", "submodule.a b.url", url)
    rev = commit(nested)
    with pytest.raises(SourceError) as caught:
        git(daemon("outer"), rev).fetch(cache, NOTHING_LOCKED)
    assert f"has a submodule with the unsafe URL {url!r}" in caught.value.message


@pytest.mark.parametrize(
    ("parent", "url", "result"),
    [
        ("https://git.example/a/b.git", "../c.git", "https://git.example/a/c.git"),
        ("https://git.example/a/b/", "../../c", "https://git.example/c"),
        ("git@git.example:a/b.git", "../c.git", "git@git.example:a/c.git"),
        ("git@git.example:b.git", "../c.git", "git@git.example:c.git"),
        ("/srv/a", "./c", "/srv/a/c"),
    ],
)
def test_relative_urls_are_resolved_as_git_does(parent: str, url: str, result: str) -> None:
    """See git-submodule(1)."""
    assert relative_url(parent, url) == result


@pytest.mark.usefixtures("git_settings")
def test_a_repository_of_sha256_commits(tmp_path: Path, cache: Path) -> None:
    """64 digits instead of 40."""
    folder = tmp_path / "new"
    folder.mkdir()
    call_git(folder, "init", "--quiet", "--object-format=sha256")
    (folder / "a").write_text("a")
    assert contents(git(str(folder), commit(folder)).fetch(cache, NOTHING_LOCKED)) == {"a": b"a"}


def test_concurrent_fetches_of_one_source_fetch_once(
    upstream: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads and processes."""
    source = git(str(upstream), call_git(upstream, "rev-parse", "HEAD"))
    trace = tmp_path / "trace"
    monkeypatch.setenv("GIT_TRACE", str(trace))
    with (
        concurrent.futures.ThreadPoolExecutor(6) as threads,
        concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes,
    ):
        asked = [pool.submit(source.fetch, cache, NOTHING_LOCKED) for pool in (threads, processes) for _ in range(6)]
        assert len({answer.result() for answer in asked}) == 1
    assert trace.read_text().count("built-in: git fetch") == 1
    assert left_over(cache) == []


def test_leftovers_of_a_killed_fetch_are_removed(upstream: Path, cache: Path) -> None:
    """Temporary files, half a repository and git's locks."""
    source = git(str(upstream), call_git(upstream, "rev-parse", "HEAD"))
    path = source.fetch(cache, NOTHING_LOCKED)
    name = path.name
    path.unlink()
    (cache / f".{name}.abc.tmp").write_text("half")
    (cache / f".{name}.scratch").mkdir()
    (repository,) = (cache / "git").glob("*.git")
    (repository / "shallow.lock").touch()
    shutil.rmtree(repository / "refs" / "gamebear")
    assert "Makefile" in contents(source.fetch(cache, NOTHING_LOCKED))
    assert left_over(cache) == []


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_damaged_tree_in_the_cache_is_fetched_again(upstream: Path, cache: Path, damage: bytes | None) -> None:
    source = git(str(upstream), call_git(upstream, "rev-parse", "HEAD"))
    tar = source.fetch(cache, NOTHING_LOCKED)
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1] + b"!" if damage is None else damage)
    assert source.fetch(cache, NOTHING_LOCKED).read_bytes() == whole
    assert len([*cache.glob("*.tar")]) == 1


def test_a_damaged_repository_in_the_cache_is_fetched_again(upstream: Path, cache: Path) -> None:
    """An object is missing."""
    source = git(str(upstream), call_git(upstream, "rev-parse", "HEAD"))
    path = source.fetch(cache, NOTHING_LOCKED)
    before = path.read_bytes()
    path.unlink()
    (repository,) = (cache / "git").glob("*.git")
    blob = call_git(upstream, "rev-parse", "HEAD:windows.txt")
    for pack in (repository / "objects" / "pack").glob("*.pack"):
        moved = pack.rename(repository / pack.name)
        with moved.open("rb") as file:
            subprocess.run(["git", "-C", repository, "unpack-objects", "-q"], stdin=file, check=True)
        moved.unlink()
    for index in (repository / "objects" / "pack").iterdir():
        index.unlink()
    (repository / "objects" / blob[:2] / blob[2:]).unlink()
    assert source.fetch(cache, NOTHING_LOCKED).read_bytes() == before


# Archives


def tar_bytes(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """Create a plain tar file of members in their order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """Create a member of a tar file."""
    info = tarfile.TarInfo(name)
    info.mtime = COMMIT_TIME
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


RELEASE = [
    member("hello-1/", type=tarfile.DIRTYPE),
    member("hello-1/src/main.c", b"int main;", uname="somebody", uid=1000),
    member("./hello-1/configure", b"#!/bin/sh", mode=0o755),
    member("hello-1/link", type=tarfile.SYMTYPE, linkname="src/main.c"),
    member("hello-1/same.c", type=tarfile.LNKTYPE, linkname="hello-1/src/main.c"),
]


def packed(form: str, members: list[tuple[tarfile.TarInfo, bytes]] | None = None) -> bytes:
    """Pack a release in one of the supported formats."""
    plain = tar_bytes(members or RELEASE)
    if form == "zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file, tarfile.open(fileobj=io.BytesIO(plain)) as tar:
            for item in tar:
                info = zipfile.ZipInfo(item.name + "/" * item.isdir(), time.gmtime(COMMIT_TIME)[:6])
                info.create_system = 3
                info.external_attr = ((0o120000 if item.issym() else 0) | item.mode) << 16
                content = None if item.issym() else tar.extractfile(item)
                file.writestr(info, content.read() if content else item.linkname.encode())
        return out.getvalue()
    compress: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    return compress[form](plain) if form in compress else plain


def put(web: Path, data: bytes, name: str = "release") -> str:
    """Add a file to the web server. Return its SHA-256."""
    (web / name).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("form", ["plain", "gz", "bz2", "xz", "zip"])
def test_an_archive_of_any_format_becomes_the_same_tree(form: str, web: tuple[Path, str], cache: Path) -> None:
    """Without its top folder and the packager's name; a hard link is a file."""
    folder, url = web
    path = archive(f"{url}/release", put(folder, packed(form))).fetch(cache, NOTHING_LOCKED)
    assert contents(path) == {
        "configure": b"#!/bin/sh",
        "link": "src/main.c",
        "same.c": b"int main;",
        "src": None,
        "src/main.c": b"int main;",
    }
    with tarfile.open(path) as tar:
        assert {(item.uid, item.uname, item.mtime) for item in tar} == {(0, "", COMMIT_TIME)}
        assert tar.getmember("configure").mode == 0o755
    assert left_over(cache) == []


def test_an_archive_with_the_wrong_hash_is_rejected(web: tuple[Path, str], cache: Path) -> None:
    """The error shows both hashes, and nothing is cached."""
    folder, url = web
    actual = put(folder, packed("gz"))
    with pytest.raises(SourceError) as caught:
        archive(f"{url}/release", "0" * 64).fetch(cache, NOTHING_LOCKED)
    assert caught.value.message == (
        f"archive source {url}/release does not match its pin: its SHA-256 is {actual}, not {'0' * 64}."
    )
    assert not list(cache.glob("*.tar"))
    assert left_over(cache) == []


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (member("top/../../x", b"x"), "unsafe name 'top/../../x'"),
        (member("/etc/x", b"x"), "unsafe name '/etc/x'"),
        (member("top/null", type=tarfile.CHRTYPE), "a device or a pipe"),
        (member("top/same", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "unsafe name '/etc/passwd'"),
        (member("top/same", type=tarfile.LNKTYPE, linkname="top/none"), "a hard link to 'top/none'"),
        (member("top/file/below", b"x"), "is below 'file', which is not a folder"),
    ],
)
def test_an_archive_that_would_escape_its_folder_is_rejected(
    bad: tuple[tarfile.TarInfo, bytes], what: str, web: tuple[Path, str], cache: Path
) -> None:
    """Names, devices, links."""
    folder, url = web
    digest = put(folder, packed("gz", [member("top/file", b"x"), bad]))
    with pytest.raises(SourceError) as caught:
        archive(f"{url}/release", digest).fetch(cache, NOTHING_LOCKED)
    assert what in caught.value.message
    assert not list(cache.glob("*.tar"))


def test_an_archive_without_a_top_folder_is_an_error_that_suggests_strip_0(web: tuple[Path, str], cache: Path) -> None:
    """No file is omitted silently."""
    folder, url = web
    digest = put(folder, packed("gz", [member("README", b"x"), member("src/a.c", b"a")]))
    with pytest.raises(SourceError, match=r"it has no single folder at level 1 but README, src; use strip=0"):
        archive(f"{url}/release", digest).fetch(cache, NOTHING_LOCKED)
    found = contents(archive(f"{url}/release", digest, strip=0).fetch(cache, NOTHING_LOCKED))
    assert list(found) == ["README", "src", "src/a.c"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none", "HTTP status 404 File not found"),
        ("cut", "the connection ended after 400 of 1000 bytes"),
    ],
)
def test_a_failed_download_of_an_archive_is_an_error(
    name: str, reason: str, web: tuple[Path, str], cache: Path
) -> None:
    """The error has the server's message, or the received number of bytes."""
    with pytest.raises(SourceError) as caught:
        archive(f"{web[1]}/{name}", "0" * 64).fetch(cache, NOTHING_LOCKED)
    assert caught.value.message == f"archive source {web[1]}/{name} cannot be downloaded: {reason}."
    assert left_over(cache) == []


def test_an_archive_from_an_unreachable_server_is_an_error(cache: Path) -> None:
    """Without a traceback."""
    with pytest.raises(SourceError, match=r"cannot be downloaded: .*Connection refused\.\n→ .*network"):
        archive(f"http://127.0.0.1:{free_port()}/x", "0" * 64).fetch(cache, NOTHING_LOCKED)


def test_archives_are_downloaded_through_the_users_proxy(
    web: tuple[Path, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the environment."""
    folder, url = web
    monkeypatch.setenv("http_proxy", url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    source = archive("http://proxied.example/release", put(folder, packed("gz")))
    assert "configure" in contents(source.fetch(cache, NOTHING_LOCKED))


@pytest.mark.parametrize("data", [b"<html>Please log in</html>", packed("gz")[:100], packed("zip")[:200], b""])
def test_a_file_that_is_not_an_archive_is_rejected(data: bytes, tmp_path: Path, cache: Path) -> None:
    """Although its hash matches."""
    digest = put(tmp_path, data)
    with pytest.raises(SourceError, match=r"cannot be unpacked: .*\n→ Use a tar file"):
        archive((tmp_path / "release").as_uri(), digest).fetch(cache, NOTHING_LOCKED)


def test_a_damaged_bzip2_archive_is_not_mistaken_for_a_full_disk(tmp_path: Path, cache: Path) -> None:
    """Python raises OSError for both."""
    data = bytearray(bz2.compress(os.urandom(300_000)))
    data[5000:5100] = bytes(100)
    digest = put(tmp_path, bytes(data))
    with pytest.raises(SourceError, match=r"cannot be unpacked: it is damaged \(Invalid data stream\)"):
        archive((tmp_path / "release").as_uri(), digest).fetch(cache, NOTHING_LOCKED)


@pytest.mark.parametrize("mtime", ["nan", "inf", "-inf"])
def test_an_archive_with_an_invalid_time_is_damaged(tmp_path: Path, cache: Path, mtime: str) -> None:
    """PAX writes times as text."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("x/y")
        member.pax_headers = {"mtime": mtime}
        tar.addfile(member)
    digest = put(tmp_path, out.getvalue())
    with pytest.raises(SourceError, match=rf"it is damaged: its entry 'x/y' has the time {mtime}\."):
        archive((tmp_path / "release").as_uri(), digest).fetch(cache, NOTHING_LOCKED)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, web: tuple[Path, str]) -> None:
    """A file where the folder should be."""
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(SourceError, match=r"/cache/sources cannot be used: Not a directory"):
        archive(f"{web[1]}/x", "0" * 64).fetch(tmp_path / "cache" / "sources", NOTHING_LOCKED)


# Debian


def test_a_debian_source_package_is_unpacked_with_its_patches(
    apt_cache: tuple[Path, Lock, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real package; after the first time without any program."""
    cache, lock, own = apt_cache
    monkeypatch.setenv("APT_CONFIG", str(own))
    path = debian("umtp-responder").fetch(cache, lock)
    found = contents(path)
    assert "src/umtprd.c" in found
    assert found[".pc/applied-patches"]
    with tarfile.open(path) as tar:
        assert tar.getmember("debian/rules").mode == 0o755
        assert len({item.mtime for item in tar}) == 1
        assert tar.getmember("Makefile").mtime > 1_500_000_000  # the changelog's
    assert left_over(cache) == []
    no_programs(monkeypatch)
    assert debian("umtp-responder").fetch(cache, lock) == path


def test_a_debian_file_with_the_wrong_hash_is_rejected(
    apt_cache: tuple[Path, Lock, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although apt accepted its signature."""
    cache, lock, own = apt_cache
    monkeypatch.setenv("APT_CONFIG", str(own))
    entry = lock.debian["umtp-responder"]
    other = DebianEntry(entry.version, {**entry.files, entry.dsc: "0" * 64})
    with pytest.raises(SourceError) as caught:
        debian("umtp-responder").fetch(cache, Lock({}, {"umtp-responder": other}))
    assert f"the SHA-256 of {entry.dsc} is {entry.files[entry.dsc]}, not 000" in caught.value.message


def test_a_broken_apt_configuration_is_not_an_unknown_package(
    system: None, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apt.conf").write_text('#include "/nonexistent";')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    with pytest.raises(SourceError) as caught:
        debian("hello").resolve(cache)
    assert caught.value.message.startswith("debian source hello cannot be resolved: ")
    assert "`apt-config dump`" in caught.value.hint


def test_an_apt_that_fails_is_not_an_unknown_package(
    apt_cache: tuple[Path, Lock, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _, own = apt_cache
    monkeypatch.setenv("APT_CONFIG", str(own))
    broken = tmp_path / "bin" / "apt-cache"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'E: ei onnistu' >&2\nexit 100\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:{os.environ['PATH']}")
    with pytest.raises(SourceError, match="cannot be resolved: ei onnistu"):
        debian("hello").resolve(cache, refresh=False)


def test_a_cache_that_is_a_file_cannot_be_used(system: None, cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(SourceError, match=f"{cache} cannot be used: File exists"):
        debian("hello").resolve(cache)


def test_a_removed_debian_version_is_an_error(
    apt_cache: tuple[Path, Lock, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names other places that may have it."""
    cache, _, own = apt_cache
    monkeypatch.setenv("APT_CONFIG", str(own))
    lock = Lock({}, {"umtp-responder": DebianEntry("0.1-1", {"x.dsc": "0" * 64})})
    with pytest.raises(SourceError) as caught:
        debian("umtp-responder").fetch(cache, lock)
    assert "debian source umtp-responder cannot be fetched: version 0.1-1: " in caught.value.message
    assert "snapshot.debian.org" in caught.value.hint


def test_an_unknown_package_or_suite_is_an_error(
    apt_cache: tuple[Path, Lock, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error lists the available ones."""
    cache, _, own = apt_cache
    monkeypatch.setenv("APT_CONFIG", str(own))
    with pytest.raises(SourceError, match="no apt source of this machine has such a source package"):
        debian("no-such-package-anywhere").resolve(cache, refresh=False)
    with pytest.raises(
        SourceError, match=r"no apt source of this machine has the suite nosuch\.\n→ Use one of the suites \w"
    ):
        debian("umtp-responder", suite="nosuch").resolve(cache, refresh=False)
    with pytest.raises(SourceError, match=r"the apt sources of this machine have only 1\.3\.10-\S+"):
        debian("umtp-responder", version="0.1-1").resolve(cache, refresh=False)


@pytest.mark.system
def test_apt_is_not_run_on_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt would wait forever."""
    monkeypatch.setattr("gamebear_tasks.sources.debian.SPACE", 1 << 60)
    with pytest.raises(SourceError, match=r"needs \d+ MiB .*\n→ Make room in"):
        debian("hello").resolve(cache)


def test_missing_apt_is_reported_with_alternatives(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS or Fedora."""
    no_programs(monkeypatch)
    lock = Lock({}, {"hello": DebianEntry("1-1", {"hello.dsc": "b" * 64})})
    with pytest.raises(SourceError) as caught:
        debian("hello").resolve(cache)
    assert "apt is not installed" in caught.value.message
    assert "`doit sources=git`" in caught.value.hint
    with pytest.raises(SourceError, match=r"dpkg-source is not installed"):
        debian("hello").fetch(cache, lock)


@pytest.mark.system
def test_incomplete_apt_lists_are_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/apt-get"
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    apt = _Apt(tmp_path / "apt", {})
    for status, is_updated in ((100, False), (0, True)):
        program.write_text(f"#!/bin/sh\nexit {status}\n")
        program.chmod(0o755)
        apt.update()
        assert apt.updated is is_updated


def test_lines_of_sources_list_become_deb_src() -> None:
    """Architecture options are removed, keys retained, lines unique, CD-ROMs ignored."""
    text = """\
# deb http://no.example/debian sid main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib # why
deb-src [signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib
deb cdrom:[Debian]/ bookworm main
deb http://mirror.example/flat ./
"""
    assert for_sources(text, ".list", None) == (
        (
            "deb-src [signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib\n"
            "deb-src http://mirror.example/flat ./\n"
        ),
        {"bookworm", "./"},
    )
    assert for_sources(text, ".list", "sid") == ("", {"bookworm", "./"})


def test_stanzas_of_deb822_sources_become_deb_src() -> None:
    """An inline key is unchanged; disabled sources remain disabled."""
    text = """\
Types: deb
# why
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Architectures: amd64
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQENBF
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: sid
Components: main
"""
    converted, suites = for_sources(text, ".sources", "bookworm-updates")
    assert suites == {"bookworm", "bookworm-updates"}
    assert converted == (
        "Types: deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm-updates\nComponents: main\n"
        "Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQENBF\n -----END PGP PUBLIC KEY BLOCK-----\n"
    )


def test_one_version_with_two_contents_is_rejected() -> None:
    """If two archives differ, the suite must be specified."""
    stanza = "Package: x\nVersion: 1-1\nChecksums-Sha256:\n {} 10 x_1-1.dsc\n"
    assert entries(stanza.format("a" * 64) + "\n" + stanza.format("a" * 64), "x") == {
        "1-1": DebianEntry("1-1", {"x_1-1.dsc": "a" * 64})
    }
    with pytest.raises(SourceError, match=r"is ambiguous: .* 1-1\.\n→ Select one"):
        entries(stanza.format("a" * 64) + "\n" + stanza.format("b" * 64), "x")


# Alternatives


def test_the_setting_chooses_between_alternatives() -> None:
    """The first is the default, also if the setting has no matching name."""
    declared = either(git=git("https://git.example/x", "main"), debian=debian("hello"))
    assert choose(declared, None) == git("https://git.example/x", "main")
    assert choose(declared, "debian") == debian("hello")
    assert choose(declared, "archive") == git("https://git.example/x", "main")
    assert choose(debian("hello"), "git") == debian("hello")
    check_preference("debian", [declared])
    with pytest.raises(
        SettingsError, match=r"sources must be an alternative of a source, got 'debain' .*\n→ Use one of debian, git"
    ):
        check_preference("debain", [declared])
