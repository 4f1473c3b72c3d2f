"""Probe this builder's capabilities: storage, isolation, namespaces, architecture.

Nothing is configured, and nothing is derived from versions. The probe tests each combination with a container of the
host's own `/usr`, best first. The result is cached until the next boot, or until a relevant program or setting changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..util import atomic_files
from ..util.errors import RunnerError
from ..util.locks import locked
from .arch import ARCHITECTURES
from .buildah import remove_tree
from .capabilities import (
    FACTS_VARIABLE,
    Facts,
    boot,
    environment,
    from_json,
    made_folder,
    namespace,
    own_environment,
    runtime_folder,
)
from .emulation import PROBE_SECONDS, emulated, handlers
from .subprocesses import SYSTEM_FOLDERS, captured, last_lines

REASON = 400
"""Characters of buildah's long error output that a message quotes at most."""

RECIPE = 3
"""Version of the probe; a new number causes every builder to probe again."""

NETWORK_BACKENDS = ("/usr/local/libexec/podman", "/usr/local/lib/podman", "/usr/libexec/podman", "/usr/lib/podman")
"""Default folders of netavark, see `helper_binaries_dir` in containers.conf(5)."""

CNI_PLUGINS = ("/usr/local/libexec/cni", "/usr/libexec/cni", "/usr/local/lib/cni", "/usr/lib/cni", "/opt/cni/bin")
"""Default folders of CNI's plugins, see `cni_plugin_dirs` in containers.conf(5)."""

SUBORDINATE_IDS = ("/etc/subuid", "/etc/subgid")

ENOUGH_IDS = 65536
"""Minimum of subordinate user ids, and of group ids, for installing packages in a container."""


def facts(root: Path) -> Facts:
    """Return this builder's capabilities; probed once, cached in `root/facts.json`.

    Args:
        root: The versioned store folder.

    Raises:
        RunnerError: No container can be run here; the hint is the command that fixes it.
    """
    if FACTS_VARIABLE in os.environ:
        return from_json(json.loads(os.environ[FACTS_VARIABLE]))
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(root / "facts.lock"):
        key, foreign = _key(root), handlers()
        known = atomic_files.read_json(root / "facts.json")
        if isinstance(known, dict) and known.get("key") == key:
            with contextlib.suppress(KeyError, TypeError):
                found = from_json(known["facts"])
                if foreign is not None and foreign == known.get("handlers"):
                    return found
                found = found._replace(emulated=emulated(found.arch))
                if foreign is not None:
                    _remember(root, key, foreign, found)
                return found
        found = _probe(root)
        _remember(root, key, foreign, found)
        _forget_other_boots(root, found)
        return found


def _remember(root: Path, key: dict[str, Any], foreign: list[str] | None, found: Facts) -> None:
    atomic_files.write_json(root / "facts.json", {"key": key, "handlers": foreign, "facts": found._asdict()})


def _forget_other_boots(root: Path, facts: Facts) -> None:
    with contextlib.suppress(OSError, RunnerError):
        for folder in (root / "run").iterdir():
            if folder != runtime_folder(root):
                remove_tree(root, facts, folder)


def _key(root: Path) -> dict[str, Any]:
    """Return the cache key: everything that the result of the probe depends on."""
    path = own_environment(root, False)["PATH"]
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser(), "containers")
    programs = ("buildah", "crun", "runc", "fuse-overlayfs", "newuidmap", "newgidmap", "unshare")
    watched = [shutil.which(program, path=path) or program for program in programs]
    watched += SUBORDINATE_IDS
    for name in ("storage.conf", "containers.conf"):
        watched += [f"{folder}/{name}" for folder in ("/usr/share/containers", "/etc/containers", home)]
    chosen = ("STORAGE_", "CONTAINERS_", "XDG_DATA")
    return {
        "recipe": RECIPE,
        "root": str(root),
        "boot": boot(),
        "kernel": os.uname().release,
        "uid": os.geteuid(),
        "home": str(Path("~").expanduser()),
        "variables": {name: value for name, value in os.environ.items() if name.startswith(chosen)},
        "files": {name: _stamp(name) for name in watched},
    }


def _stamp(path: str) -> list[int]:
    try:
        found = Path(path).stat()
    except OSError:
        return []
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _probe(root: Path) -> Facts:
    """Test what works here, best first.

    Raises:
        RunnerError: Nothing works.
    """
    rootless = os.geteuid() != 0
    env = own_environment(root, rootless)
    env["BUILDAH_ISOLATION"] = "chroot"
    if not shutil.which("buildah", path=env["PATH"]):
        raise RunnerError("buildah is not installed on the builder.", "Run there: sudo apt install buildah")
    status, stdout, stderr = captured(["buildah", "--version"], env, timeout=PROBE_SECONDS)
    words = stdout.split()
    if status or words[:2] != ["buildah", "version"] or len(words) < 3:
        raise RunnerError(
            f"buildah does not run on the builder: {last_lines(stderr or stdout) or f'status {status}'}.",
            "Run there: sudo apt install --reinstall buildah",
        )
    if rootless:
        _check_user_namespace(env)
    arch = debian_arch(env)
    found = Facts(
        version=words[2],
        rootless=rootless,
        storage=(),
        driver="",
        isolation="",
        pid_namespace=False,
        arch=arch,
        emulated=emulated(arch),
    )
    failures: list[str] = []
    for driver, storage, graph_root in _stores(root, rootless, env):
        for pid_namespace in (True, False):
            for isolation in ("rootless", "chroot") if rootless else ("oci", "chroot"):
                tried = found._replace(
                    storage=storage,
                    driver=driver,
                    isolation=isolation,
                    pid_namespace=pid_namespace,
                    graph_root=graph_root,
                )
                failure = _try(root, tried)
                if not failure:
                    return tried
                failures.append(f"{driver}, {isolation}{', own PIDs' if pid_namespace else ''}: {failure}")
    # buildah reports the cause only as text. The text is quoted, and the fix covers every common cause.
    raise ContainersError(
        f"the builder cannot run containers: {failures[-1][:REASON]} ({len(failures)} configurations tried).",
        "Check on the builder that `buildah unshare true` works. Inside a container, allow mounts and namespaces (for "
        "example --privileged).",
        "" if _has_network_backend(env) else "netavark",
    )


class ContainersError(RunnerError):
    """No container can be run on this builder.

    Args:
        message: what failed.
        hint: suggested fix.
        package: Debian package that buildah may require and that is not installed; empty if there is none.
    """

    def __init__(self, message: str, hint: str, package: str) -> None:
        super().__init__(message, f"Run there: sudo apt install {package}. If that fails: {hint}" if package else hint)
        self.package = package


def _has_network_backend(env: dict[str, str]) -> bool:
    """Return whether netavark or CNI is installed; buildah may refuse to start without, even if no network is used."""
    if shutil.which("netavark", path=":".join([env["PATH"], *NETWORK_BACKENDS])):
        return True
    return any(shutil.which("loopback", path=folder) for folder in CNI_PLUGINS)


def _stores(root: Path, rootless: bool, env: dict[str, str]) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield each image store to try, best first: driver, buildah's options, folder."""
    runtime = ("--runroot", str(made_folder(runtime_folder(root)) / "containers"))
    status, stdout, _ = captured(["buildah", "info"], env, timeout=PROBE_SECONDS)
    try:
        store = json.loads(stdout)["store"] if not status else {}
        default, place = store.get("GraphDriverName", ""), str(store.get("GraphRoot", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        default, place = "", ""
    if default and default != "vfs":
        yield default, runtime if rootless else (), place
    folder = str(made_folder(root / "storage"))
    own = ("--root", folder, *runtime, "--storage-driver")
    yield "overlay", (*own, "overlay"), folder
    fuse = shutil.which("fuse-overlayfs", path=env["PATH"])
    if fuse:
        yield "overlay", (*own, "overlay", "--storage-opt", f"overlay.mount_program={fuse}"), folder
    yield "vfs", (*own, "vfs"), folder


def _try(root: Path, tried: Facts) -> str:
    """Run the host's own `true` in a container; return the reason of a failure, or an empty string."""
    env = environment(root, tried)
    before = [*namespace(tried), "buildah", *tried.storage]
    name = f"gamebear-probe-{os.urandom(6).hex()}"
    true = shutil.which("true", path=":".join(SYSTEM_FOLDERS)) or "/bin/true"
    volumes: list[str] = []
    for folder in ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32"):
        if Path(folder).is_dir():
            volumes += ["--volume", f"{folder}:{folder}:ro"]
    network = [] if tried.isolation == "chroot" else ["--network", "host"]
    status, _, stderr = captured([*before, "from", "--name", name, "scratch"], env, timeout=PROBE_SECONDS)
    if status:
        return last_lines(stderr, 1) or f"status {status}"
    try:
        status, _, stderr = captured([*before, "run", *network, *volumes, name, "--", true], env, timeout=PROBE_SECONDS)
        return (last_lines(stderr, 3) or f"status {status}") if status else ""
    finally:
        captured([*before, "rm", name], env, timeout=PROBE_SECONDS)


def _check_user_namespace(env: dict[str, str]) -> None:
    """Verify that an ordinary user gets a user namespace with at least 65536 user ids and group ids.

    Raises:
        RunnerError: There is no such namespace, or a program for it is missing.
    """
    import getpass  # deferred: slow to import, and rarely needed

    user = getpass.getuser()
    missing = [name for name in ("newuidmap", "newgidmap") if not shutil.which(name, path=env["PATH"])]
    if missing:
        raise RunnerError(
            f"{user} cannot run containers on the builder: {' and '.join(missing)} not installed.",
            "Run there: sudo apt install uidmap",
        )
    status, stdout, stderr = captured(
        ["buildah", "unshare", "cat", "/proc/self/uid_map", "/proc/self/gid_map"], env, timeout=PROBE_SECONDS
    )
    maps = [line.split() for line in stdout.splitlines()]
    lengths = [int(words[2]) for words in maps if len(words) == 3 and words[2].isdigit()]
    if not status and sum(lengths) >= 2 * ENOUGH_IDS:
        return
    counts = subordinate_ids(user)
    if min(counts) < ENOUGH_IDS:
        raise RunnerError(
            f"{user} has too few subordinate ids on the builder: {counts[0]} user ids and {counts[1]} group ids "
            f"(/etc/subuid, /etc/subgid), {ENOUGH_IDS} of each are required.",
            f"Run there: sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user} "
            "(choose another range if another user has this one).",
        )
    raise RunnerError(
        f"{user} cannot create a user namespace on the builder: {last_lines(stderr)}.",
        "Check there the kernel's settings (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
        "kernel.apparmor_restrict_unprivileged_userns), and that newuidmap is set-uid root "
        "(sudo apt install --reinstall uidmap).",
    )


def subordinate_ids(user: str) -> tuple[int, int]:
    """Return the numbers of subordinate user ids and group ids of a user, by name or by the process's user id."""
    names = (user, str(os.geteuid()))
    uids, gids = (
        sum(count for name, _, count in subordinate_ranges(path) if name in names) for path in SUBORDINATE_IDS
    )
    return uids, gids


def subordinate_ranges(path: str) -> list[tuple[str, int, int]]:
    """Return the ranges in a file like /etc/subuid: owner, first id, count; see subuid(5)."""
    try:
        lines = [line.split(":") for line in Path(path).read_text(errors="replace").splitlines()]
    except OSError:
        return []
    return [(words[0], int(words[1]), int(words[2])) for words in lines if len(words) == 3 and _are_digits(words[1:])]


def _are_digits(words: Sequence[str]) -> bool:
    return all(word.isascii() and word.isdigit() and len(word) < 11 for word in words)


def debian_arch(env: dict[str, str]) -> str:
    """Return this machine's Debian architecture, also without dpkg."""
    status, stdout, _ = captured(["dpkg", "--print-architecture"], env, timeout=PROBE_SECONDS)
    if not status and stdout.strip():
        return stdout.strip()
    machine = os.uname().machine
    return ARCHITECTURES.get(machine, machine)
