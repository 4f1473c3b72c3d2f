"""The tutorial and how-tos work as written: files, commands and their outputs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from project import OUR_FRAMES, ROOT
from sshd import Account, Sshd
from upstreams import served, stand_ins

from gamebear_tasks.config import own_architecture

pytestmark = pytest.mark.system

TUTORIAL = ROOT / "docs" / "tutorial.md"

UPSTREAM = "https://github.com/"

ENOUGH = ["git", "ca-certificates", "gcc", "libc6-dev", "make", "autoconf", "automake", "libtool", "cmake"]
"""Packages that the substitutes need. The seed's test needs them too, so they are installed once."""

SSH = """#!/bin/sh
exec /usr/bin/ssh -F "$HOME/.ssh/config" -o "UserKnownHostsFile=$HOME/.ssh/known_hosts" \\
    -o "IdentityFile=$HOME/.ssh/id_ed25519" "$@"
"""
"""ssh reads the user's home folder from the passwd database, not from HOME."""


class Reader:
    """Simulated reader of a document who follows its instructions.

    Args:
        folder: initial working folder.
        environment: environment of the reader's shell.
        change: function that adapts the document's text to the test's environment.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], change: Callable[[str], str]) -> None:
        folder.mkdir()
        self.folder = folder
        self.environment = environment
        self.change = change
        self.printed = ""

    def follow(self, document: Path) -> int:
        """Write the document's files, run its commands, and compare their output. Return the number of commands."""
        count = 0
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", self.change(document.read_text()), re.M | re.S):
            if name := re.match(r"# (\S+\.(?:py|toml))\n", text):
                (self.folder / name[1]).write_text(text)
            elif language == "sh":
                self._type(text)
                count += len(text.splitlines())
            elif language == "text":
                shown = "".join(_pattern(line) for line in text.splitlines())
                assert re.fullmatch(shown, self.printed), f"{text}\nis not what is printed:\n{self.printed}"
        return count

    def _type(self, commands: str) -> None:
        where = Path(self.environment["HOME"], "where")
        done = subprocess.run(
            ["bash", "-e", "-c", f"{commands}pwd > {where}"],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.printed = done.stdout
        assert done.returncode == 0 and not OUR_FRAMES.search(self.printed), self.printed
        self.folder = Path(where.read_text().strip())


def _pattern(line: str) -> str:
    """Return the pattern of a line of the document; … matches any text, and any lines if it is alone."""
    return "(.*\n)*" if line == "…" else ".*".join(map(re.escape, line.split("…"))) + "\n"


@pytest.fixture
def laptop(tmp_path: Path, home: Path, server: Sshd) -> dict[str, str]:
    """Environment of a user with doit whose `ssh buildpi` connects to the builder."""
    own = tmp_path / "home"
    shutil.copytree(home / ".ssh", own / ".ssh")
    (own / ".ssh" / "config").write_text(f"Host buildpi\n HostName 127.0.0.1\n Port {server.port}\n")
    (own / "bin").mkdir()
    (own / "bin" / "ssh").write_text(SSH)
    (own / "bin" / "ssh").chmod(0o755)
    given = {name: value for name, value in os.environ.items() if not name.startswith(("GAMEBEAR_", "XDG_"))}
    return {
        **given,
        "HOME": str(own),
        "PATH": f"{own}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GAMEBEAR_BASE": "bootstrap",
    }


def lead_to(port: int, laptop: dict[str, str]) -> None:
    """Redirect git from GitHub to a daemon on this machine."""
    config = Path(laptop["HOME"], ".gitconfig")
    config.write_text(f'[url "git://127.0.0.1:{port}/"]\n\tinsteadOf = {UPSTREAM}\n')
    laptop["GIT_CONFIG_GLOBAL"] = str(config)


def test_the_tutorial_works_with_substitute_upstreams(tmp_path: Path, laptop: dict[str, str], account: Account) -> None:
    with stand_ins(tmp_path / "srv") as (port, commits):
        lead_to(port, laptop)

        def changed(text: str) -> str:
            for name, commit in commits.items():
                text = re.sub(rf'({re.escape(name)}",\s+rev=)"\w+"', rf'\1"{commit}"', text)
            text = text.replace("pi@buildpi", f"{account.name}@buildpi")
            text = text.replace('arch = "armhf"', f'arch = "{own_architecture()}"')
            enough = f'packages_image("debian:bookworm", {ENOUGH}))'
            return re.sub(r'packages_image\("debian:bookworm", .*\)\)', enough, text)

        reader = Reader(tmp_path / "begin", laptop, changed)
        assert reader.follow(TUTORIAL) > 10
    assert sorted(path.name for path in (reader.folder / "build").iterdir() if path.is_file()) == [
        "gt.tar",
        "umtprd",
        "usbgx.tar",
    ]


HOW_TO = """
from gamebear_tasks import artifact

def task_hello():
    return artifact("hello.py", outputs=["build/hello"])
"""


@pytest.mark.parametrize("name", ["ci", "completion", "offline", "prune"])
def test_a_how_to_works_as_written(tmp_path: Path, laptop: dict[str, str], name: str) -> None:
    reader = Reader(tmp_path / "project", laptop, str)
    (reader.folder / "dodo.py").write_text(HOW_TO)
    (reader.folder / "hello.py").write_text("open('hello', 'w').close()")
    assert reader.follow(ROOT / "docs" / "how-to" / f"{name}.md")


@pytest.mark.slow  # a quarter of an hour, mostly of emulation
def test_the_tutorial_works_with_its_real_upstreams(
    tmp_path: Path, laptop: dict[str, str], account: Account, emulation: None
) -> None:
    """The upstreams are GitHub's, or mirrors in the folder that the environment's UPSTREAMS names."""
    origin = os.environ.get("UPSTREAMS", UPSTREAM).rstrip("/")
    for name, commit in re.findall(rf'git\(\s*"{UPSTREAM}([^"]+)",\s+rev="(\w+)"', TUTORIAL.read_text()):
        mirror = tmp_path / "srv" / name
        if not mirror.exists():
            subprocess.run(["git", "clone", "--quiet", "--bare", f"{origin}/{name}", str(mirror)], check=True)
            subprocess.run(["git", "-C", str(mirror), "update-ref", "refs/heads/pinned", commit], check=True)
    with served(tmp_path / "srv") as port:
        lead_to(port, laptop)
        reader = Reader(tmp_path / "begin", laptop, lambda text: text.replace("pi@buildpi", f"{account.name}@buildpi"))
        reader.follow(TUTORIAL)
    about = subprocess.run(["readelf", "--file-header", reader.folder / "build" / "umtprd"], capture_output=True)
    assert b"ARM" in about.stdout
