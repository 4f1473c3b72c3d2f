"""What is well with this machine and what is not: what a project needs where doit runs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..image.program import PACKAGES, environment
from .findings import NOTE, OK, TROUBLE, Finding

AGENT_SECONDS = 5.0
"""How long the agent may take to say which keys it has."""


def findings(uses: Collection[str], by_ssh: bool) -> list[Finding]:
    """Return what is well here and what is not.

    Args:
        uses: names of ours that `dodo.py` uses, such as `git` and `sd_image`.
        by_ssh: whether a builder is reached by SSH.
    """
    found = [Finding("python", OK, _versions())]
    if {"git", "either"} & set(uses):
        found.append(_program("git", "git", TROUBLE if "git" in uses else NOTE, "sources are fetched with it"))
    if {"debian", "either"} & set(uses):
        state = TROUBLE if "debian" in uses and "either" not in uses else NOTE
        found.append(_program("dpkg-source", "dpkg-dev", state, "Debian's source packages are unpacked with it"))
    if "sd_image" in uses:
        found.append(_image_tools())
    if by_ssh:
        found += _keys()
    return found


def _versions() -> str:
    words = [platform.python_version()]
    for package in ("doit", "gamebear-tasks"):
        try:
            words.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            words.append(f"{package} (not installed)")
    return ", ".join(words)


def _install(*packages: str) -> tuple[str, tuple[str, ...]]:
    if shutil.which("apt-get"):
        return f"sudo apt install {' '.join(packages)}", packages
    return f"Install what Debian calls {' and '.join(packages)}.", ()


def _program(name: str, package: str, state: str, why: str) -> Finding:
    path = shutil.which(name)
    if path is not None:
        return Finding(name, OK, path)
    return Finding(name, state, f"it is not installed; {why}", *_install(package))


def _image_tools() -> Finding:
    path = environment()["PATH"]
    missing = sorted(name for name in PACKAGES if not shutil.which(name, path=path))
    if not missing:
        return Finding("image tools", OK, "all there")
    packages = sorted({PACKAGES[name] for name in missing})
    return Finding("image tools", TROUBLE, f"{', '.join(missing)} are not installed", *_install(*packages))


def _keys() -> Iterator[Finding]:
    """Say which keys there are to log in with; which of them is used, each builder's log-in says."""
    files = [path.stem for path in sorted(Path("~/.ssh").expanduser().glob("id_*.pub"))]
    words = [f"{len(files)} in ~/.ssh ({', '.join(files)})"] if files else []
    held = 0
    program = shutil.which("ssh-add")
    if program and os.environ.get("SSH_AUTH_SOCK"):
        try:
            done = subprocess.run(
                [program, "-l"], stdin=subprocess.DEVNULL, capture_output=True, timeout=AGENT_SECONDS, check=False
            )
            held = len(done.stdout.splitlines()) if done.returncode == 0 else 0
        except (OSError, subprocess.SubprocessError):
            pass
    words += [f"{held} in the agent"] if held else []
    if words:
        yield Finding("keys", OK, ", ".join(words))
    else:
        yield Finding("keys", NOTE, "none in ~/.ssh and none in an agent", "Make one: ssh-keygen")
