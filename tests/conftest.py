"""Fixtures and the `system` marker.

Unit tests need Python and a POSIX shell, and run anywhere. System tests run as root on a disposable Debian.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import hypothesis
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
"""Debian package of each required program."""


BASIC = (
    *("cat", "chmod", "cp", "date", "dd", "echo", "env", "false", "grep", "head", "id", "kill", "ln", "ls", "mkdir"),
    *("mv", "ps", "rm", "sed", "sh", "sleep", "sort", "stty", "tail", "touch", "tr", "true", "yes"),
)
"""Programs that unit tests may run. For them, PATH has no others: a missing marker fails on every machine."""

PROGRAMS = pytest.StashKey[Path]()
"""Folder with links to `BASIC`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that updates the error reference."""
    parser.addoption("--write-errors", action="store_true", help="write provoked errors to docs/reference/errors.md")


def pytest_configure(config: pytest.Config) -> None:
    """Undo process settings that the caller may have set."""
    config.stash[PROGRAMS] = Path(tempfile.mkdtemp(prefix="programs-"))
    config.add_cleanup(partial(shutil.rmtree, config.stash[PROGRAMS]))
    for name in BASIC:
        (config.stash[PROGRAMS] / name).symlink_to(shutil.which(name) or name)
    os.umask(0o022)  # accounts must be able to read files that root puts into their homes
    hypothesis.settings.register_profile("gamebear", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("gamebear")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    if not entry_points(group="console_scripts", name="gamebear"):
        raise pytest.UsageError("The checkout is installed as an older release: pip install -e '.[test]'")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test as `system` that uses the fixture `system`, directly or through another fixture."""
    for item in items:
        if isinstance(item, pytest.Function) and "system" in item.fixturenames:
            item.add_marker("system")


PATH = pytest.StashKey[str]()
"""Value of `PATH` before a test."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Undo what a test changes in the environment; hide programs from unit tests that may be missing elsewhere.

    Only for the test itself: a fixture of the whole module may be torn down after a unit test.
    """
    before = dict(os.environ)
    item.stash[PATH] = os.environ["PATH"]
    try:
        if not item.get_closest_marker("system"):
            os.environ["PATH"] = str(item.config.stash[PROGRAMS])
        return (yield)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Restore `PATH` after monkeypatch, which restores the value that it has found during the test."""
    try:
        return (yield)
    finally:
        os.environ["PATH"] = item.stash.get(PATH, os.environ["PATH"])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Check the machine before the first test, if system tests are selected."""
    if session.config.option.collectonly or not any(item.get_closest_marker("system") for item in session.items):
        return
    if os.geteuid() != 0:
        raise pytest.UsageError(
            "System tests create users, mounts and an sshd: run tests/run as root on a disposable Debian"
        )
    if missing := sorted({package for program, package in NEEDED.items() if not shutil.which(program, path=SEARCH)}):
        raise pytest.UsageError(f"System tests need Debian packages: apt-get install {' '.join(missing)}")


OTHERS = ("GAMEBEAR_", "XDG_", "SSH_", "DASK_", "PYTHON")
"""Prefixes of environment variables that influence the tested code."""

SHOWN = {"CI", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLORTERM", "COLUMNS", "LINES", "TERM", "TMUX"}
"""Environment variables that influence how programs display output. The test runner's values do not apply to tests."""

SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Isolate the tests from the settings, stores and caches of the user or CI, and vice versa."""
    patch = pytest.MonkeyPatch()
    for name in list(os.environ):
        if name in SHOWN or name.startswith(OTHERS):
            patch.delenv(name)
    patch.setenv("HOME", str(tmp_path_factory.mktemp("nobody")))
    patch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # stale bytecode is valid for a file of the same size and second
    yield
    patch.undo()


@pytest.fixture(scope="session")
def system() -> None:
    """A disposable Debian with root and the packages of `NEEDED`. Fixtures that need it depend on this one."""


@pytest.fixture(scope="session")
def emulation(system: None) -> None:
    """Enable armhf programs on this machine, also in containers."""
    emulate_armhf()


@pytest.fixture(scope="session")
def account(system: None) -> Iterator[Account]:
    """An unprivileged user with subordinate ids, for the builder."""
    with new_account(f"gamebear-{os.getpid()}") as made:
        yield made


@pytest.fixture(scope="session")
def server(account: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """The builder's sshd."""
    with Sshd(tmp_path_factory.mktemp("sshd"), account) as running:
        yield running


@pytest.fixture(scope="session")
def home(server: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Home folder of a client with access to the builder."""
    return client_home(tmp_path_factory.mktemp("client"), server)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty project of a user of gamebear-tasks, built on this machine."""
    return Project(tmp_path / "project", home=tmp_path / "home")


@pytest.fixture
def remote_project(tmp_path: Path, server: Sshd, home: Path) -> Project:
    """An empty project, built by the builder behind sshd."""
    return Project(tmp_path / "project", home=home, GAMEBEAR_BUILDER=server.url)


@pytest.fixture
def remote(tmp_path: Path, server: Sshd, home: Path, account: Account) -> Iterator[Remote]:
    """A project built by the builder behind a proxy."""
    with Proxy(server.port) as proxy:
        own = known(home, tmp_path / "home", proxy.port, server)
        url = f"ssh://{account.name}@127.0.0.1:{proxy.port}"
        yield Remote(Project(tmp_path / "project", home=own, GAMEBEAR_BUILDER=url), proxy, account)
