"""What this builder can do, and what the programs on it are started with."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from .subprocesses import search_path

FACTS_VARIABLE = "GAMEBEAR_FACTS"
"""Environment variable that carries the facts into the namespace, where they could not be found out again."""

KEPT_VARIABLES = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TZ|LANG|LC_\w+|XDG_\w+|STORAGE_\w+|CONTAINERS_\w+|_CONTAINERS_\w+"
    r"|REGISTRY_AUTH_FILE|DBUS_SESSION_BUS_ADDRESS|(?:https?|ftp|all|no)_proxy|(?:HTTPS?|FTP|ALL|NO)_PROXY|SSL_CERT_(?:FILE|DIR)"
    r"|PYTHON(?:UNBUFFERED|DONTWRITEBYTECODE|UTF8)|GAMEBEAR_\w+"
)
"""What of our environment the programs we start may see; all else, tokens and keys among it, stays out."""


class Facts(NamedTuple):  # a dataclass takes as long to import as all else that a supervisor needs of ours
    """What this builder can do.

    Attributes:
        version: buildah's version.
        rootless: whether an ordinary user's user namespace is needed.
        storage: buildah's global options that select the image store.
        driver: the store's driver: `overlay`, `vfs`, ...
        isolation: how `buildah run` works here: `oci`, `rootless` or `chroot`.
        pid_namespace: whether a build can be process 1 of a PID namespace, so that its end is the end of all.
        arch: Debian's name of the builder's architecture.
        emulated: Debian's names of other architectures whose programs run here, by emulation or by the CPU.
    """

    version: str
    rootless: bool
    storage: tuple[str, ...]
    driver: str
    isolation: str
    pid_namespace: bool
    arch: str
    emulated: tuple[str, ...]


def from_json(value: Any) -> Facts:
    """Return facts that were written down; raises KeyError or TypeError where they are not."""
    value = dict(value)
    for name in ("storage", "emulated"):
        value[name] = tuple(value[name])
    return Facts(**value)


def stay_with(facts: Facts) -> None:
    """Have this process go by what it knows, whatever is changed meanwhile: its containers are where that says."""
    os.environ[FACTS_VARIABLE] = json.dumps(facts._asdict())


def namespace(facts: Facts) -> list[str]:
    """Return the words before a command that put it where buildah can work (user, mount and PID namespace).

    With `facts.pid_namespace` the command is process 1 of its namespace: when it ends, however it ends, the
    kernel kills all that it started. Of the signals from outside, only SIGKILL and those it handles reach it.
    To kill it, start it in a session of its own and kill its process group: its parents don't pass SIGKILL on.
    """
    words: list[str] = []
    if facts.rootless:
        words += ["buildah", "unshare"]
    if facts.pid_namespace:
        words += ["unshare", "--fork", "--pid", "--kill-child", "--mount-proc", "--"]
    return words


def environment(root: Path, facts: Facts) -> dict[str, str]:
    """Return the whole environment for what runs on this builder: no secrets, TMPDIR in the store."""
    env = own_environment(root, facts.rootless)
    env["BUILDAH_ISOLATION"] = facts.isolation
    env[FACTS_VARIABLE] = json.dumps(facts._asdict())
    return env


def own_environment(root: Path, rootless: bool) -> dict[str, str]:
    """Return the environment for what runs on this builder before it is known what works: see `environment`."""
    env = {name: value for name, value in os.environ.items() if KEPT_VARIABLES.fullmatch(name)}
    env["PATH"] = search_path()
    env["LC_ALL"] = "C.UTF-8"
    env["DEBIAN_FRONTEND"] = "noninteractive"
    given = os.environ.get("TMPDIR", "")  # a job's own, which goes with it
    env["TMPDIR"] = str(made_folder(Path(given) if Path(given).parent == root / "tmp" else root / "tmp"))
    if rootless or os.geteuid():
        # The session's own folder goes away when its last connection closes; a build outlives that.
        session = env.get("XDG_RUNTIME_DIR")
        login = Path(session or "/nonexistent", "containers", "auth.json")
        with contextlib.suppress(OSError):
            if login.exists() and session != str(runtime_folder(root)):
                env.setdefault("REGISTRY_AUTH_FILE", str(login))
        env["XDG_RUNTIME_DIR"] = str(made_folder(runtime_folder(root)))
    return env


def boot() -> str:
    """Return what tells this boot of the machine from others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def runtime_folder(root: Path) -> Path:
    """Where state lives that must not outlive a reboot: what is mounted, above all."""
    return root / "run" / boot()


def made_folder(path: Path) -> Path:
    """Return a folder that is only ours, made if need be."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
