"""Root folders of other Debian releases, unpacked but not installed.

This needs a few seconds only, because no maintainer scripts run. The required results of these scripts are written
here.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

BASE = ("base-files", "base-passwd", "coreutils", "dash", "libc-bin", "mount", "util-linux")

ENTER = """
set -e
root=$1; shift
mount --rbind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
while [ "$1" != -- ]; do mount --bind /dev/null "$root$1"; shift; done; shift
cd "$root"
pivot_root . mnt
umount --lazy /mnt
exec chroot . env --ignore-environment "$@"
"""
"""Script that makes a folder the root of a mount namespace, which disappears with its last process."""

LIMITS = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Debian:
    """Root folder of a release. Unpacking begins in the constructor.

    Args:
        suite: Debian suite, such as `trixie`.
        root: The folder.
        packages: Packages in addition to the minimum for a shell.
    """

    def __init__(self, suite: str, root: Path, packages: Collection[str]) -> None:
        self.suite = suite
        self.root = root
        self._process = subprocess.Popen(
            [
                "mmdebstrap",
                "--quiet",
                "--variant=extract",
                "--format=directory",
                f"--include={','.join([*BASE, *packages])}",
                '--aptopt=Acquire::Languages "none"',
                suite,
                str(root),
                mirror(),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def ready(self) -> Debian:
        """Wait until the release is unpacked."""
        _, errors = self._process.communicate()
        assert self._process.returncode == 0, errors.decode()
        for name in ("passwd", "group"):
            shutil.copy(self.root / "usr/share/base-passwd" / f"{name}.master", self.root / "etc" / name)
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost\n")
        (self.root / "etc/resolv.conf").touch()
        (self.root / "mnt").mkdir(exist_ok=True)
        certificates = sorted(self.root.glob("usr/share/ca-certificates/mozilla/*.crt"))
        if certificates:
            text = "".join(path.read_text() for path in certificates)
            (self.root / "etc/ssl/certs/ca-certificates.crt").write_text(text)
        # Newer releases of buildah raise these limits, which root is not allowed to do everywhere.
        limits = (f"{name}={':'.join(map(str, resource.getrlimit(number)))}" for name, number in LIMITS.items())
        containers = self.root / "etc/containers/containers.conf"
        containers.parent.mkdir(parents=True, exist_ok=True)
        containers.write_text(f"[containers]\ndefault_ulimits = {json.dumps(list(limits))}\n")
        return self

    def remove(self) -> None:
        """Remove the folder."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        subprocess.run(["rm", "-rf", "--one-file-system", self.root], check=False)

    def enter(self, *, hidden: Collection[str] = (), **environment: str) -> tuple[str, ...]:
        """Return the prefix of a command that runs it in the release as root.

        Args:
            hidden: Files that can be neither read nor executed by the command.
            environment: All environment variables. HOME and PATH have defaults.
        """
        variables = {"HOME": "/root", "PATH": PATH, **environment}
        return (
            *("unshare", "--mount", "--propagation", "private"),
            *("sh", "-c", ENTER, "enter", str(self.root), *hidden, "--"),
            *(f"{name}={value}" for name, value in variables.items()),
        )

    def run(self, *command: str, **environment: str) -> str:
        """Run a command in the release, assert success, and return its output."""
        done = subprocess.run(
            [*self.enter(**environment), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


def mirror() -> str:
    """Return the Debian mirror that this machine's apt uses."""
    filters = ("Created-By: Packages", "Origin: Debian", "Label: Debian")
    known = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", *filters], capture_output=True, text=True, check=False
    ).stdout.split()
    assert known, "this machine's apt knows no mirror of Debian: apt-get update"
    return known[0]
