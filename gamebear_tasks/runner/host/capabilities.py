"""Capabilities of this builder, and the environment of the programs that run on it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from .subprocesses import search_path

FACTS_VARIABLE = "GAMEBEAR_FACTS"
"""Environment variable that passes the facts into the namespace, where they cannot be probed."""

KEPT_VARIABLES = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TZ|LANG|LC_\w+|XDG_\w+|STORAGE_\w+|CONTAINERS_\w+|_CONTAINERS_\w+"
    r"|REGISTRY_AUTH_FILE|DBUS_SESSION_BUS_ADDRESS|(?:https?|ftp|all|no)_proxy|(?:HTTPS?|FTP|ALL|NO)_PROXY|SSL_CERT_(?:FILE|DIR)"
    r"|PYTHON(?:UNBUFFERED|DONTWRITEBYTECODE|UTF8)|GAMEBEAR_\w+"
)
"""Names of environment variables that programs inherit; all others, including tokens and keys, are removed."""


class Facts(NamedTuple):  # importing dataclasses is as slow as all other imports of a supervisor
    """Capabilities of this builder.

    Attributes:
        version: Version of buildah.
        rootless: Whether the user is not root, so that a user namespace is needed.
        storage: Global options of buildah that select the image store.
        driver: Driver of the store: `overlay`, `vfs`, ...
        isolation: Isolation of `buildah run` that works here: `oci`, `rootless` or `chroot`.
        pid_namespace: Whether a build can be process 1 of a PID namespace, so that all its processes end with it.
        arch: Debian's name of the builder's architecture.
        emulated: Debian's names of other architectures whose programs run here, by emulation or by the CPU.
        graph_root: Folder of the image store; empty if unknown.
    """

    version: str
    rootless: bool
    storage: tuple[str, ...]
    driver: str
    isolation: str
    pid_namespace: bool
    arch: str
    emulated: tuple[str, ...]
    graph_root: str = ""


def from_json(value: Any) -> Facts:
    """Return facts from their JSON form.

    Raises:
        KeyError: A field is missing.
        TypeError: The value is not a dict of the right fields.
    """
    value = dict(value)
    for name in ("storage", "emulated"):
        value[name] = tuple(value[name])
    return Facts(**value)


def stay_with(facts: Facts) -> None:
    """Fix the facts for this process and its children, even if the machine's configuration changes meanwhile.

    The reason is that existing containers are in the store that these facts select.
    """
    os.environ[FACTS_VARIABLE] = json.dumps(facts._asdict())


def namespace(facts: Facts) -> list[str]:
    """Return the command prefix that enters the namespaces in which buildah can work (user, mount and PID).

    With `facts.pid_namespace` the command is process 1 of its namespace. When it ends, however it ends, the kernel
    kills all its descendants. Of the signals from outside, only SIGKILL and those that it handles reach it. To kill it,
    start it in a new session and kill its process group: its parents do not forward SIGKILL.
    """
    words: list[str] = []
    if facts.rootless:
        words += ["buildah", "unshare"]
    if facts.pid_namespace:
        words += ["unshare", "--fork", "--pid", "--kill-child", "--mount-proc", "--"]
    return words


def environment(root: Path, facts: Facts) -> dict[str, str]:
    """Return the complete environment for programs on this builder: without secrets, with TMPDIR in the store."""
    env = own_environment(root, facts.rootless)
    env["BUILDAH_ISOLATION"] = facts.isolation
    env[FACTS_VARIABLE] = json.dumps(facts._asdict())
    return env


def own_environment(root: Path, rootless: bool) -> dict[str, str]:
    """Return the environment for programs on this builder before the probe has finished; see `environment`."""
    env = {name: value for name, value in os.environ.items() if KEPT_VARIABLES.fullmatch(name)}
    env["PATH"] = search_path()
    env["LC_ALL"] = "C.UTF-8"
    env["DEBIAN_FRONTEND"] = "noninteractive"
    given = os.environ.get("TMPDIR", "")  # a job's own folder is removed with the job
    env["TMPDIR"] = str(made_folder(Path(given) if Path(given).parent == root / "tmp" else root / "tmp"))
    if rootless or os.geteuid():
        # The login session's folder is removed when its last connection closes, and a build outlives that.
        session = env.get("XDG_RUNTIME_DIR")
        login = Path(session or "/nonexistent", "containers", "auth.json")
        with contextlib.suppress(OSError):
            if login.exists() and session != str(runtime_folder(root)):
                env.setdefault("REGISTRY_AUTH_FILE", str(login))
        env["XDG_RUNTIME_DIR"] = str(made_folder(runtime_folder(root)))
    return env


def boot() -> str:
    """Return an id of the machine's current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def runtime_folder(root: Path) -> Path:
    """Return the folder for state that must not survive a reboot, mounts in particular."""
    return root / "run" / boot()


def made_folder(path: Path) -> Path:
    """Return a folder with mode 0700, created if missing."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
