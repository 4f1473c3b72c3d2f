"""A project whose builder is behind an unreliable network."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

from project import Project, assert_nothing_is_left
from proxy import Proxy
from sshd import Account, Sshd, public

MIB = 1 << 20
BIG = 4 * MIB

DODO = """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", outputs=["build/x"]{more})
"""

COUNTED = """
import hashlib, os, sys, time
with open({count!r}, "a") as file:
    file.write("built\\n")
{body}
"""

TAKES_BIG = """
with open("big.bin", "rb") as big, open("x", "w") as file:
    file.write(hashlib.sha256(big.read()).hexdigest())
"""

MAKES_BIG = f"""
data = os.urandom({BIG})
print(hashlib.sha256(data).hexdigest())
with open("x", "wb") as file:
    file.write(data)
"""


class Remote:
    """A project built by a builder behind a proxy.

    Attributes:
        project: The client's project.
        proxy: Proxy between client and builder.
        store: Store of the builder.
        scratch: Folder on the builder, for the files by which tests and jobs communicate.
    """

    def __init__(self, project: Project, proxy: Proxy, account: Account) -> None:
        self.project = project
        self.proxy = proxy
        self.store = account.home / ".cache" / "gamebear" / "v1"
        self.scratch = account.home / f"scratch-{time.monotonic_ns()}"
        self.scratch.mkdir()
        os.chown(self.scratch, account.uid, account.uid)

    @property
    def target(self) -> Path:
        return self.project.folder / "build" / "x"

    @property
    def log(self) -> Path:
        return self.project.folder / "build" / "logs" / "x.log"

    @property
    def builds(self) -> int:
        count = self.scratch / "count"
        return len(count.read_text().splitlines()) if count.exists() else 0

    def write(self, body: str, **more: object) -> None:
        self.project.write("dodo.py", DODO.format(more="".join(f", {name}={value!r}" for name, value in more.items())))
        self.project.write("x.py", COUNTED.format(count=str(self.scratch / "count"), body=body))

    def waits(self, before: str = "print('begin', flush=True)", after: str = "print('end')") -> None:
        """Make the job wait for a call of `go`."""
        gate = str(self.scratch / "go")
        self.write(
            f"{before}\nwhile not os.path.exists({gate!r}): time.sleep(0.02)\n{after}\nopen('x', 'w').write('made')"
        )

    def go(self) -> None:
        (self.scratch / "go").touch()

    @property
    def settings(self) -> dict[str, str]:
        return {name: value for name, value in self.project.environment.items() if name.startswith("GAMEBEAR_")}

    def output(self) -> str:
        return (self.project.folder / "doit.out").read_text()

    def assert_nothing_is_left(self) -> None:
        assert_nothing_is_left(self.project, self.store)


def known(home: Path, folder: Path, port: int, server: Sshd) -> Path:
    """Copy a home folder, and add a server to its known_hosts under another port."""
    shutil.copytree(home / ".ssh", folder / ".ssh")
    with (folder / ".ssh" / "known_hosts").open("a") as file:
        file.write(f"[127.0.0.1]:{port} {public(server.host_keys['ed25519'])}\n")
    return folder


def big_input(remote: Remote, size: int = BIG) -> str:
    """Declare a large input of the project's job. Return the expected content of the artifact."""
    data = os.urandom(size)
    (remote.project.folder / "big.bin").write_bytes(data)
    remote.write(TAKES_BIG, inputs=["big.bin"])
    return hashlib.sha256(data).hexdigest()
