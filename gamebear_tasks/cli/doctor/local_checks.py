"""Checks of this machine: the programs and settings that a project needs where doit runs."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...builders.transports.ssh.transport import TESTED, is_tested
from ...sdcard.filesystems.program import environment
from ...util.subprocesses import ProgramError, install_hint, run
from .builder_checks import FAILED, OK, WARNING, Finding
from .requirements import Need

MAXIMUM_TASKS = 5
"""Maximum number of tasks that a finding names."""

AGENT_TIMEOUT = 5.0
"""Seconds until an agent that does not list its keys is ignored."""


def findings(needs: Sequence[Need], by_ssh: bool) -> list[Finding]:
    """Check this machine.

    Args:
        needs: Programs that the project's tasks need.
        by_ssh: Whether a builder is reached by SSH.
    """
    found = [Finding("python", OK, _versions()), *map(_programs, needs)]
    if by_ssh:
        found += [_paramiko(), *_keys()]
    return found


def _versions() -> str:
    words = [platform.python_version()]
    for package in ("doit", "gamebear-tasks"):
        try:
            words.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            words.append(f"{package} (not installed)")
    return ", ".join(words)


def _paramiko() -> Finding:
    installed = version("paramiko")
    if is_tested(installed):
        return Finding("paramiko", OK, f"{installed}, accelerated")
    first, last = (".".join(map(str, numbers)) for numbers in TESTED)
    return Finding(
        "paramiko",
        WARNING,
        f"{installed} is not tested, so connections use its public API, which is slower",
        f"Install a release from {first} to {last}: pip install 'paramiko>={first},<={last}.99'",
    )


def _programs(need: Need) -> Finding:
    path = environment()["PATH"]
    found = {name: shutil.which(name, path=path) for name in need.packages}
    missing = sorted(name for name, where in found.items() if where is None)
    if not missing:
        return Finding(need.name, OK, "installed" if len(found) > 1 else "".join(filter(None, found.values())))
    more = len(need.tasks) - MAXIMUM_TASKS
    tasks = f"{'task' if len(need.tasks) == 1 else 'tasks'} {', '.join(need.tasks[:MAXIMUM_TASKS])}"
    tasks += f" and {more} more" if more > 0 else ""
    message = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; required by {tasks}"
    message += "" if need.is_required else " (not selected)"
    packages = sorted({need.packages[name] for name in missing}) if shutil.which("apt-get") else ()
    state = FAILED if need.is_required else WARNING
    return Finding(need.name, state, message, install_hint(missing), tuple(packages))


def _keys() -> Iterator[Finding]:
    """Count the available SSH keys. The finding `login` of each builder names the key that was used."""
    files = [path.stem for path in sorted(Path("~/.ssh").expanduser().glob("id_*.pub"))]
    words = [f"{len(files)} in ~/.ssh ({', '.join(files)})"] if files else []
    agent_keys = 0
    program = shutil.which("ssh-add")
    if program and os.environ.get("SSH_AUTH_SOCK"):
        with contextlib.suppress(ProgramError):
            agent_keys = len(run([program, "-l"], silence=AGENT_TIMEOUT).splitlines())
    words += [f"{agent_keys} in the SSH agent"] if agent_keys else []
    if words:
        yield Finding("keys", OK, ", ".join(words))
    else:
        yield Finding("keys", WARNING, "no SSH key in ~/.ssh or in an agent", "Create one: ssh-keygen")
