"""Checks of this machine: the programs and settings that a project needs where doit runs."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...sdcard.filesystems.program import environment
from ...util.subprocesses import ProgramError, install_hint, run
from .builder_checks import NOTE, OK, TROUBLE, Finding
from .requirements import Need

MOST_NAMED = 5
"""How many tasks are named that need the same."""

AGENT_SECONDS = 5.0
"""How long the agent may take to say which keys it has."""


def findings(needs: Sequence[Need], by_ssh: bool) -> list[Finding]:
    """Return what is well here and what is not.

    Args:
        needs: what the project's tasks need of this machine.
        by_ssh: whether a builder is reached by SSH.
    """
    found = [Finding("python", OK, _versions()), *map(_programs, needs)]
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


def _programs(need: Need) -> Finding:
    path = environment()["PATH"]
    found = {name: shutil.which(name, path=path) for name in need.packages}
    missing = sorted(name for name, where in found.items() if where is None)
    if not missing:
        return Finding(need.name, OK, "all there" if len(found) > 1 else "".join(filter(None, found.values())))
    more = len(need.tasks) - MOST_NAMED
    names = ", ".join(need.tasks[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    one = len(need.tasks) == 1
    what = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed, and needed by"
    what += f" the {'task' if one else 'tasks'} {names}"
    what += "" if need.is_asked_for else f", which {'is' if one else 'are'} not asked for"
    packages = sorted({need.packages[name] for name in missing}) if shutil.which("apt-get") else ()
    state = TROUBLE if need.is_asked_for else NOTE
    return Finding(need.name, state, what, install_hint(missing), tuple(packages))


def _keys() -> Iterator[Finding]:
    """Say which keys there are to log in with; which of them is used, each builder's log-in says."""
    files = [path.stem for path in sorted(Path("~/.ssh").expanduser().glob("id_*.pub"))]
    words = [f"{len(files)} in ~/.ssh ({', '.join(files)})"] if files else []
    held = 0
    program = shutil.which("ssh-add")
    if program and os.environ.get("SSH_AUTH_SOCK"):
        with contextlib.suppress(ProgramError):
            held = len(run([program, "-l"], silence=AGENT_SECONDS).splitlines())
    words += [f"{held} in the agent"] if held else []
    if words:
        yield Finding("keys", OK, ", ".join(words))
    else:
        yield Finding("keys", NOTE, "none in ~/.ssh and none in an agent", "Make one: ssh-keygen")
