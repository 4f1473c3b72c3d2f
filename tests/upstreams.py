"""Upstreams that the tests of sources share: a repository, a git daemon, this machine's apt.

A pytest plug-in that test modules also import from, hence PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gamebear_tasks.sources.debian import apt_sources
from gamebear_tasks.sources.declare import debian
from gamebear_tasks.sources.lockfile import Lock
from gamebear_tasks.sources.resolver import resolve

COMMIT_TIME = 1_600_000_000


@pytest.fixture
def git_settings(system: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configure git for the test only."""
    settings = tmp_path / "gitconfig"
    settings.write_text("[user]\nname = A U Thor\nemail = author@example.com\n[init]\ndefaultBranch = main\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_COMMITTER_DATE", f"{COMMIT_TIME} +0200")
    return settings


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Path of a cache that does not exist yet."""
    return tmp_path / "cache"


def call_git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return its output."""
    return subprocess.run(
        ["git", "-C", folder, "-c", "protocol.file.allow=always", *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def commit(folder: Path, message: str = "change") -> str:
    """Commit everything in a work tree and return the commit."""
    call_git(folder, "add", "--all")
    call_git(folder, "commit", "--quiet", "--allow-empty", "--message", message)
    return call_git(folder, "rev-parse", "HEAD")


@pytest.fixture
def upstream(tmp_path: Path, git_settings: Path) -> Path:
    """A repository with various kinds of files and one commit."""
    folder = tmp_path / "srv" / "upstream"
    folder.mkdir(parents=True)
    call_git(folder, "init", "--quiet")
    (folder / "Makefile").write_bytes(b"all:\n")
    (folder / "windows.txt").write_bytes(b"one\ntwo\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "run").write_bytes(b"#!/bin/sh\n")
    (folder / "tests" / "run").chmod(0o775)
    (folder / "link").symlink_to("tests/run")
    (folder / ".gitattributes").write_text("tests export-ignore\nwindows.txt text eol=crlf\nMakefile export-subst\n")
    commit(folder, "first")
    return folder


@pytest.fixture
def daemon(tmp_path: Path, git_settings: Path) -> Iterator[Callable[[str], str]]:
    """A git daemon for the repositories below srv. The user's git configuration maps another URL to it."""
    srv = tmp_path / "srv"
    srv.mkdir(exist_ok=True)
    with served(srv) as port:
        with git_settings.open("a") as settings:
            settings.write(f'[url "git://127.0.0.1:{port}/"]\ninsteadOf = https://git.example/\n')
        yield lambda name: f"https://git.example/{name}"


STAND_INS = {
    "viveris/uMTP-Responder.git": {
        "Makefile": 'umtprd: umtprd.c\n\tcc $(subst ",,$(CFLAGS)) -o $@ $<\n',
        "umtprd.c": "#ifndef USE_SYSLOG\n#error it is not set\n#endif\nint main(void) { return 0; }\n",
    },
    "libusbgx/libusbgx.git": {
        "configure.ac": (
            "AC_INIT([usbgx], [1])\nAC_CONFIG_MACRO_DIRS([m4])\nAM_INIT_AUTOMAKE([foreign])\nLT_INIT\n"
            "AC_PROG_CC\nAC_CONFIG_FILES([Makefile])\nAC_OUTPUT\n"
        ),
        "Makefile.am": (
            "ACLOCAL_AMFLAGS = -I m4\nlib_LTLIBRARIES = libusbgx.la\nlibusbgx_la_SOURCES = usbgx.c\n"
            "include_HEADERS = usbgx.h\n"
        ),
        "m4/.keep": "",
        "usbgx.c": '#include "usbgx.h"\nint usbgx(void) { return 7; }\n',
        "usbgx.h": "int usbgx(void);\n",
    },
    "kopasiak/gt.git": {
        "source/CMakeLists.txt": (
            "cmake_minimum_required(VERSION 3.5)\nproject(gt C)\nadd_executable(gt gt.c)\n"
            "target_include_directories(gt PRIVATE /usr/local/include)\n"
            "target_link_libraries(gt /usr/local/lib/libusbgx.so)\n"
            "install(TARGETS gt DESTINATION bin)\n"
            "install(FILES gt.1 DESTINATION usr/share/man/man1)\n"
        ),
        "source/gt.c": "#include <usbgx.h>\nint main(void) { return usbgx(); }\n",
        "source/gt.1": ".TH gt 1\n",
    },
}
"""Substitutes for this project's upstreams that build in seconds: files by the repository's path on GitHub."""


@contextlib.contextmanager
def stand_ins(folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Serve `STAND_INS` by git daemon. Yield its port, and the commit of each repository by its path."""
    commits = {}
    for name, files in STAND_INS.items():
        for path, text in files.items():
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / path).write_text(text)
        who = ("-c", "user.name=A U Thor", "-c", "user.email=author@example.com")
        call_git(folder / name, "init", "--quiet")
        call_git(folder / name, "add", "--all")
        call_git(folder / name, *who, "commit", "--quiet", "--message", "all")
        commits[name] = call_git(folder / name, "rev-parse", "HEAD")
    with served(folder) as port:
        yield port, commits


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """Serve the repositories below a folder by git daemon. Yield its port."""
    port = free_port()
    process = subprocess.Popen(
        ["git", "daemon", "--export-all", "--listen=127.0.0.1", f"--port={port}", f"--base-path={folder}", folder],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.01)
    try:
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait()


def free_port() -> int:
    """Return an unused port of the loopback address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide all programs from now on."""
    monkeypatch.setenv("PATH", "/nonexistent")


@pytest.fixture(scope="session")
def apt_cache(system: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lock, Path]:
    """A cache with this machine's lists of source packages, a lock file created with it, and its apt configuration."""
    folder = tmp_path_factory.mktemp("apt")
    own = folder / "own.sources"  # Debian's sources only: the test must not depend on other servers
    texts, _ = apt_sources(None)
    stanzas = [stanza for text in texts.values() for stanza in text.split("\n\n") if "debian-archive-keyring" in stanza]
    (folder / "parts").mkdir()
    (folder / "parts" / "debian.sources").write_text("\n\n".join(stanzas))
    own.write_text(f'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "{folder}/parts";\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_CONFIG", str(own))
        resolve([debian("umtp-responder")], folder / "gamebear.lock", folder / "cache")
    return folder / "cache", Lock.read(folder / "gamebear.lock"), own
