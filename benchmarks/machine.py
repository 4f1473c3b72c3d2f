"""Benchmark environment: accounts of this machine as builders behind a real sshd, and their clients."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from project import Project
from proxy import Proxy
from remote import known
from sshd import Account, Sshd, client_home, new_account

from .measure import checked

BASES = {"amd64": "debian:bookworm", "arm64": "debian:bookworm", "armhf": "arm32v7/debian"}
"""Base image of each architecture in the other side's scripts."""

_numbers = itertools.count()


class Builder:
    """An account behind its own sshd, and the home of a client with access.

    Attributes:
        account: The unprivileged user.
        server: Its sshd.
        folder: Folder for client files.
        home: Home folder of the client.
    """

    def __init__(self, account: Account, server: Sshd, folder: Path) -> None:
        self.account = account
        self.server = server
        self.folder = folder
        self.home = client_home(folder, server)

    @property
    def bin(self) -> Path:
        """Folder of the account's own programs."""
        return self.account.home / "bin"

    @property
    def store(self) -> Path:
        """Store of our runner."""
        return self.account.home / ".cache" / "gamebear" / "v1"

    def project(self, name: str, **environment: str) -> Project:
        """Create a client project that uses this builder."""
        folder = self.folder / f"{name}-{next(_numbers)}"
        return Project(folder, self.home, **{"GAMEBEAR_BUILDER": self.server.url, **environment})

    def words(self, *command: str) -> list[str]:
        """Return the command line that runs a command as the account, without SSH."""
        variables = {
            "HOME": str(self.account.home),
            "LC_ALL": "C.UTF-8",
            "LOGNAME": self.account.name,
            "PATH": search_path(self.account),
            "USER": self.account.name,
            "XDG_RUNTIME_DIR": str(self.account.home / "run"),
        }
        given = (f"{name}={value}" for name, value in variables.items())
        return ["runuser", "--user", self.account.name, "--", "env", "--ignore-environment", *given, *command]

    def run(self, *command: str) -> str:
        """Run a command as the account, without SSH, and return its output."""
        return checked(self.words(*command), cwd=self.account.home)

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        """Write a file in the account's home."""
        path = self.account.home / name
        for folder in reversed([each for each in path.parents if not each.exists()]):
            folder.mkdir()
            os.chown(folder, self.account.uid, self.account.uid)
        path.write_text(text)
        path.chmod(mode)
        os.chown(path, self.account.uid, self.account.uid)
        return path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Capabilities of this account as detected by the runner: storage, isolation, architecture."""
        project = self.project("facts")
        project.write(
            "dodo.py",
            "from gamebear_tasks import artifact\n\ndef task_x():\n    return artifact('x.py', outputs=['x'])\n",
        )
        project.write("x.py", "open('x', 'w').close()\n")
        project.doit().ok()
        found = json.loads((self.store / "facts.json").read_text())["facts"]
        assert isinstance(found, dict)
        return found

    def make_base(self, arch: str) -> None:
        """Bootstrap Debian's base image for our side, so that it exists before any measurement."""
        project = self.project("base", GAMEBEAR_BASE="bootstrap", GAMEBEAR_ARCH=arch)
        project.write(
            "dodo.py",
            "from gamebear_tasks import artifact\n\ndef task_x():\n    return artifact('x.py', outputs=['x'])\n",
        )
        project.write("x.py", "with Container('debian:bookworm') as c:\n    c.run(['true'])\nopen('x', 'w').close()\n")
        project.doit().ok()

    def export_base(self, arch: str, target: Path) -> Path:
        """Export our side's base image to an archive."""
        storage = self.facts["storage"]
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            os.chown(folder, self.account.uid, self.account.uid)
            made = Path(folder, "base.tar")
            name = f"localhost/gamebear-base:debian-bookworm-{arch}"
            self.run("buildah", "unshare", "buildah", *storage, "push", "--quiet", name, f"oci-archive:{made}")
            shutil.move(made, target)
        target.chmod(0o644)
        return target

    def import_base(self, arch: str, archive: Path, gitconfig: str = "") -> None:
        """Import a base image into the account's default store, under its name in the other side's scripts.

        Args:
            arch: Architecture of the image.
            archive: Archive that contains the image.
            gitconfig: Content of the image's /etc/gitconfig, unless empty.
        """
        name = BASES[arch]
        full = f"docker.io/{name if '/' in name else f'library/{name}'}"
        image = self.run("buildah", "pull", "--quiet", f"oci-archive:{archive}").split()[-1]
        container = self.run("buildah", "from", image).strip()
        if gitconfig:
            file = self.write("gitconfig", gitconfig)
            self.run("buildah", "copy", container, str(file), "/etc/gitconfig")
        self.run("buildah", "commit", "--quiet", container, full)
        self.run("buildah", "rm", container)

    def ssh_config(self, port: int | None = None) -> Path:
        """Write a configuration for `ssh -F` that defines the host `builder` and keeps OpenSSH's other defaults."""
        port = port or self.server.port
        path = self.folder / f"ssh_config-{port}"
        path.write_text(
            f"Host builder\nHostName 127.0.0.1\nPort {port}\nUser {self.account.name}\nHostKeyAlias builder\n"
            f"IdentityFile {self.home}/.ssh/id_ed25519\nUserKnownHostsFile {self.folder}/known_hosts\n"
        )
        key = self.server.known_hosts.split(" ", 1)[1]
        (self.folder / "known_hosts").write_text(f"builder {key}")
        return path

    @contextlib.contextmanager
    def far(self, seconds: float) -> Iterator[tuple[int, dict[str, str]]]:
        """Add latency in each direction. Yield the proxy's port, and the environment for our client."""
        with Proxy(self.server.port) as proxy:
            proxy.latency = seconds
            home = known(self.home, self.folder / f"home-{proxy.port}", proxy.port, self.server)
            url = f"ssh://{self.account.name}@127.0.0.1:{proxy.port}"
            yield proxy.port, {"HOME": str(home), "GAMEBEAR_BUILDER": url}


def search_path(account: Account) -> str:
    """Return the PATH of an account's programs."""
    return f"{account.home}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@contextlib.contextmanager
def new_builder(folder: Path, *, overlay: bool = False, slots: int = 1) -> Iterator[Builder]:
    """Create a builder, and remove it with all its files at the end.

    Args:
        folder: Parent folder for the files of the sshd and the client.
        overlay: Set the overlay driver in the account's storage.conf, instead of keeping Debian's default.
        slots: Number of our jobs that run at once.
    """
    number = next(_numbers)
    folder = folder / f"builder-{number}"
    folder.mkdir(parents=True)
    with new_account(f"gamebear-bench-{os.getpid()}-{number}") as account:
        try:
            with Sshd(folder / "sshd", account, SetEnv=f"PATH={search_path(account)}") as server:
                builder = Builder(account, server, folder)
                (account.home / "run").mkdir(mode=0o700)
                os.chown(account.home / "run", account.uid, account.uid)
                builder.write(".config/gamebear/builder.json", json.dumps({"slots": slots}))
                if overlay:
                    builder.write(".config/containers/storage.conf", '[storage]\ndriver = "overlay"\n')
                yield builder
        finally:
            # files of rootless containers belong to other ids; overlay mounts are in namespaces that have ended
            shutil.rmtree(account.home / ".local", ignore_errors=True)
