"""What the tests run on: this machine as root, a real account on a real sshd, emulated armhf."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from emulation import emulate_armhf
from project import Project
from proxy import Proxy
from remote import Remote, known
from sshd import Account, Sshd, client_home, new_account

NEEDED = {
    "7zz": "7zip",
    "buildah": "buildah",
    "dpkg-source": "dpkg-dev",
    "fsck.fat": "dosfstools",
    "gcc": "gcc",
    "git": "git",
    "git-lfs": "git-lfs",
    "mcopy": "mtools",
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "sfdisk": "fdisk",
    "sshd": "openssh-server",
    "sudo": "sudo",
    "systemctl": "systemd",
    "tmux": "tmux",
    "update-binfmts": "binfmt-support",
    "qemu-arm-static": "qemu-user-static",
    "xz": "xz-utils",
    "zsh": "zsh",
    "zstd": "zstd",
}
"""Debian's package for each program that the tests need."""


def pytest_configure(config: pytest.Config) -> None:
    """Say at once what the machine lacks, rather than once per test."""
    os.umask(0o022)  # what root puts into an account's home is for the account to read
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would have children ignore it
    if not entry_points(group="doit.BACKEND", name="dbm"):
        raise pytest.UsageError("What doit finds of this checkout is an older one's: pip install -e '.[test]'")
    missing = sorted({package for program, package in NEEDED.items() if not shutil.which(program, path=SEARCH)})
    if os.geteuid() != 0:
        raise pytest.UsageError(
            "The tests make users, an sshd and mounts: run them as root, on a machine of their own."
        )
    if missing:
        raise pytest.UsageError(f"The tests need more of Debian: apt-get install {' '.join(missing)}")


OTHERS = ("GAMEBEAR_", "XDG_", "SSH_", "DASK_", "PYTHON")
"""How the variables begin that set what the tests try."""

SHOWN = {"CI", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLORTERM", "COLUMNS", "LINES", "TERM", "TMUX"}
"""The variables by which programs decide how to show something: those of whatever runs the tests are not of a person's
terminal."""

SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the person or CI has set out of the tests, with stores and caches, and the tests out of them."""
    patch = pytest.MonkeyPatch()
    for name in list(os.environ):
        if name in SHOWN or name.startswith(OTHERS):
            patch.delenv(name)
    patch.setenv("HOME", str(tmp_path_factory.mktemp("nobody")))
    patch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # bytecode is of any file as long that was written in the same second
    yield
    patch.undo()


@pytest.fixture(scope="session")
def emulation() -> None:
    """Let this machine run armhf programs, also in containers."""
    emulate_armhf()


@pytest.fixture(scope="session")
def account() -> Iterator[Account]:
    """An unprivileged user with subordinate ids: the builder's."""
    with new_account(f"gamebear-{os.getpid()}") as made:
        yield made


@pytest.fixture(scope="session")
def server(account: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """The builder's sshd."""
    with Sshd(tmp_path_factory.mktemp("sshd"), account) as running:
        yield running


@pytest.fixture(scope="session")
def home(server: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A client's home, from which the builder lets us in."""
    return client_home(tmp_path_factory.mktemp("client"), server)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty project of somebody who uses gamebear-tasks, built on this machine."""
    return Project(tmp_path / "project", home=tmp_path / "home")


@pytest.fixture
def remote_project(tmp_path: Path, server: Sshd, home: Path) -> Project:
    """The same, built by the builder behind sshd."""
    return Project(tmp_path / "project", home=home, GAMEBEAR_BUILDER=server.url)


@pytest.fixture
def remote(tmp_path: Path, server: Sshd, home: Path, account: Account) -> Iterator[Remote]:
    """A project built by the builder behind a proxy."""
    with Proxy(server.port) as proxy:
        own = known(home, tmp_path / "home", proxy.port, server)
        url = f"ssh://{account.name}@127.0.0.1:{proxy.port}"
        yield Remote(Project(tmp_path / "project", home=own, GAMEBEAR_BUILDER=url), proxy, account)
