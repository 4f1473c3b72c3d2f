"""Diagnostics of a builder as plain data, for `gamebear doctor`. It neither rates nor changes anything.

Every reply arrives within a request's time limit. Slow measurements, such as the size of an image store on a memory
card, have a timeout and are None if it expires.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import pwd
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..host.buildah import ImageError, outside
from ..host.capabilities import Facts, environment, namespace
from ..host.emulation import emulated
from ..host.probe import (
    ENOUGH_IDS,
    SUBORDINATE_IDS,
    ContainersError,
    debian_arch,
    facts,
    subordinate_ids,
    subordinate_ranges,
)
from ..host.subprocesses import captured, last_lines, search_path
from ..images import apt_sources
from ..images.base_images import debian_suite, meaning
from ..images.bootstrap import tag_of
from ..maintenance.performance_warnings import notices
from ..store import builder_config
from ..store.slots import slot_count
from ..store.store import Store, storage_failure
from ..util.errors import RunnerError

PROGRAMS = (
    *("apt-get", "buildah", "crun", "debootstrap", "fuse-overlayfs", "mmdebstrap", "newgidmap", "newuidmap", "runc"),
    *("sudo", "timedatectl", "usermod"),
)
"""Programs to search in the PATH."""

SYSCTLS = (
    "kernel.unprivileged_userns_clone",
    "kernel.apparmor_restrict_unprivileged_userns",
    "user.max_user_namespaces",
)
"""Kernel settings that may forbid user namespaces; not every kernel has all of them."""

MEASURING = 10.0
"""Timeout in seconds of measuring one folder."""

ASKING = 20.0
"""Timeout in seconds of a program such as `buildah`, `unshare` or `dpkg`."""

MIRROR_SECONDS = 5.0
"""Timeout in seconds of a request to the mirror."""

Findings = dict[str, Any]


class Examination:
    """A diagnosis of this builder, which runs in a background thread.

    Args:
        store: the builder's store.
        arches: requested architectures, by Debian's names.
        base: policy that selects the origin of Debian's base images.
    """

    def __init__(self, store: Store, arches: Sequence[str], base: str) -> None:
        self.requested = (tuple(arches), base)
        self._found: Findings = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(store, arches, base), daemon=True)
        self._thread.start()

    def _run(self, store: Store, arches: Sequence[str], base: str) -> None:
        try:
            self._found = examine(store, arches, base)
        except Exception as error:  # noqa: BLE001 - raised again by answer()
            self._error = error

    def answer(self, wait: float) -> Findings:
        """Return the findings, or `more` if they need longer than `wait` seconds: the client then repeats the request.

        Raises:
            OSError: the store cannot be read.
        """
        self._thread.join(wait)
        if self._thread.is_alive():
            return {"more": True}
        if self._error is not None:
            raise self._error
        return {**self._found, "time": time.time()}


def examine(store: Store, arches: Sequence[str], base: str) -> Findings:
    """Collect everything that is known about this builder.

    Args:
        store: the builder's store.
        arches: requested architectures, by Debian's names; at most 8 are checked.
        base: policy that selects the origin of Debian's base images.

    Raises:
        OSError: the store cannot be read.
    """
    found = {
        **_system(),
        "python": platform.python_version(),
        "programs": {name: shutil.which(name, path=search_path()) or "" for name in PROGRAMS},
        "namespaces": _namespaces(),
        "subordinate": _subordinate(),
        "memory": _memory(),
        "heat": _heat(),
        "kills": _kills_user_processes(),
        "disk": _disk(store.root),
        "jobs": _jobs(store),
        "settings": _settings(),
        "own": _own_architecture(),
    }
    known: Facts | None = None
    try:
        known = facts(store.root)
    except RunnerError as error:
        found["failure"] = {"what": error.message, "remedy": error.hint}
        if isinstance(error, ContainersError) and error.package:
            found["failure"]["package"] = error.package
    except OSError as error:
        failure = storage_failure(error)
        found["failure"] = {"what": failure.message, "remedy": failure.hint}
    found["sizes"] = _sizes(store.root, known)
    if known is not None:
        found["containers"] = {
            "version": known.version,
            "driver": known.driver,
            "isolation": known.isolation,
            "arch": known.arch,
            "emulated": list(known.emulated),
        }
        with contextlib.suppress(OSError):
            found["costs"] = notices(store.root, known)
    found["bases"] = {arch: _base(store.root, known, arch, base) for arch in arches[:8]}
    return found


def _own_architecture() -> Findings:
    """Return this machine's architectures, also if containers do not work yet."""
    arch = debian_arch(dict(os.environ))
    return {"arch": arch, "emulated": list(emulated(arch))}


def _system() -> Findings:
    about = {}
    with contextlib.suppress(OSError):
        for line in Path("/etc/os-release").read_text(errors="replace").splitlines():  # os-release(5)
            key, _, value = line.partition("=")
            about[key] = value.strip("\"'")
    model = ""
    with contextlib.suppress(OSError):
        model = Path("/proc/device-tree/model").read_text(errors="replace").strip("\0\n ")
    return {
        "host": platform.node(),
        "system": about.get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "model": model,
        "processors": os.cpu_count() or 1,
        "user": _user(),
        "root": os.geteuid() == 0,
    }


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _namespaces() -> Findings:
    """Return whether an unprivileged user can create a user namespace, and the kernel settings that may forbid it."""
    settings: dict[str, int] = {}
    for name in SYSCTLS:
        with contextlib.suppress(OSError, ValueError):
            settings[name] = int(Path("/proc/sys", name.replace(".", "/")).read_text())
    env = {"PATH": search_path(), "LC_ALL": "C"}
    status, _, output = captured(["unshare", "--user", "--map-root-user", "true"], env, timeout=ASKING)
    return {"works": status == 0, "said": last_lines(output, 1), "settings": settings}


def _subordinate() -> Findings:
    """Return how many subordinate ids this user has, and the first id that is not assigned to any user."""
    uids, gids = subordinate_ids(_user())
    ends = [start + count for path in SUBORDINATE_IDS for _, start, count in subordinate_ranges(path)]
    return {"uids": uids, "gids": gids, "enough": ENOUGH_IDS, "free": max([100000, *ends])}


def _memory() -> Findings:
    """Return the bytes of memory and swap, from proc_meminfo(5)."""
    sizes = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("MemTotal", "SwapTotal"):
                sizes[name] = int(rest.split()[0]) * 1024
    return {"total": sizes.get("MemTotal"), "swap": sizes.get("SwapTotal")}


def _heat() -> Findings:
    """Return the processor's temperature in degrees Celsius and, on a Raspberry Pi, the firmware's throttling bits.

    The bits are those of `vcgencmd get_throttled`, in Raspberry Pi's documentation of config.txt.
    """
    degrees = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*"):
        with contextlib.suppress(OSError, ValueError):
            if re.search("cpu|soc|pkg", (zone / "type").read_text(), re.IGNORECASE):
                degrees.append(int((zone / "temp").read_text()) / 1000)
    text = ""
    with contextlib.suppress(OSError):
        text = "0x" + Path("/sys/devices/platform/soc/soc:firmware/get_throttled").read_text().strip()
    program = shutil.which("vcgencmd", path=search_path())
    if not text and program:
        _, text, _ = captured([program, "get_throttled"], dict(os.environ), timeout=5.0)
    match = re.search(r"0x([0-9a-fA-F]{1,8})", text)
    return {"degrees": max(degrees, default=None), "throttled": int(match.group(1), 16) if match else None}


def _kills_user_processes() -> bool:
    """Return whether logind kills a session's processes when it ends (KillUserProcesses, logind.conf(5))."""
    if not Path("/run/systemd/system").is_dir():
        return False
    kills = False
    folders = ("/usr/lib/systemd", "/usr/local/lib/systemd", "/run/systemd", "/etc/systemd")
    parts = {path.name: path for folder in folders for path in Path(folder, "logind.conf.d").glob("*.conf")}
    for path in [Path("/etc/systemd/logind.conf"), *(parts[name] for name in sorted(parts))]:
        with contextlib.suppress(OSError):
            for value in re.findall(
                r"^\s*KillUserProcesses\s*=\s*(\w+)", path.read_text(errors="replace"), re.MULTILINE
            ):
                kills = value.lower() in ("yes", "true", "on", "1")
    return kills


def _disk(root: Path) -> Findings:
    about = os.statvfs(root)
    return {
        "folder": str(root),
        "total": about.f_blocks * about.f_frsize,
        "free": about.f_bavail * about.f_frsize,
        "files": about.f_favail if about.f_files else None,
        "executes": not about.f_flag & os.ST_NOEXEC,
    }


def _jobs(store: Store) -> Findings:
    """Return the number of slots, and of stored, running and queued jobs."""
    states = [store.job(path.name).state()["state"] for path in store.live.iterdir() if len(path.name) == 64]
    return {
        "slots": slot_count(),
        "running": states.count("running"),
        "queued": states.count("queued"),
        "kept": sum(1 for _ in store.jobs.iterdir()),
    }


def _settings() -> Findings:
    """Return which of the builder's own settings is ignored, and how to fix it."""
    config = builder_config.read()
    return {"wrong": config.wrong, "remedy": config.remedy}


def _sizes(root: Path, known: Facts | None) -> dict[str, int | None]:
    """Return the bytes on disk of each part of the store and of the images; None: not measured."""
    names = {"inputs": "blobs", "jobs": "jobs", "packages": "debs", "compiler caches": "ccache", "caches": "caches"}
    sizes: dict[str, int | None] = {
        name: _size([], root / folder) for name, folder in names.items() if (root / folder).is_dir()
    }
    if known is None:
        return sizes
    try:
        about = json.loads(outside(root, known, "info", timeout=ASKING))
        sizes["images"] = _size(namespace(known), Path(about["store"]["GraphRoot"]), environment(root, known))
    except (RunnerError, ValueError, KeyError, TypeError):
        sizes["images"] = None
    return sizes


def _size(before: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> int | None:
    """Return the bytes that a folder occupies on the disk; None after a timeout or an error.

    Args:
        before: command prefix that enters a namespace; empty for none.
        folder: the folder.
        env: environment of the command; None for this process's.
    """
    status, output, _ = captured([*before, "du", "-skx", "--", str(folder)], dict(env or os.environ), timeout=MEASURING)
    words = output.split()
    # Status 1: something was removed or unreadable; the sum of the rest is close enough.
    return int(words[0]) * 1024 if status in (0, 1) and words and words[0].isdigit() else None


def _base(root: Path, known: Facts | None, arch: str, policy: str) -> Findings:
    """Return whether the base image `debian` exists for an architecture, and from which mirror it would be made."""
    suite = debian_suite("debian") or apt_sources.STABLE
    found: Findings = {"name": tag_of(suite, arch), "suite": suite, "there": None}
    if known is not None:
        until = time.monotonic() + ASKING

        def ask(*words: str) -> str:
            return outside(root, known, *words, timeout=max(0.1, until - time.monotonic()))

        with contextlib.suppress(RunnerError, ValueError, OSError):
            found["there"] = bool(meaning(ask, f"debian:{suite}", arch, policy))
    distribution = apt_sources.distribution_for(arch)
    try:
        main = apt_sources.main_archive(suite, distribution)
        found["mirror"] = main.uri
        apt_sources.keyrings_for(main, distribution)
    except ImageError as error:
        found["lacks"] = {"what": error.message, "remedy": error.hint}
        found["keyring"] = f"{distribution}-archive-keyring" if "mirror" in found else ""
        return found
    if not found["there"]:
        found["unreachable"] = _unreachable(f"{main.uri}/dists/{main.suite}/InRelease")
    return found


def _unreachable(url: str) -> str:
    """Return why a URL cannot be fetched; empty if it can."""
    answer = [f"no answer within {MIRROR_SECONDS:g} seconds"]

    def ask() -> None:
        import urllib.error  # slow to import on a small machine
        import urllib.request

        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=MIRROR_SECONDS).close()
            answer[0] = ""
        except urllib.error.URLError as error:
            answer[0] = str(error.reason)
        except (OSError, ValueError) as error:
            answer[0] = str(error)

    asking = threading.Thread(target=ask, daemon=True)  # in a thread, because name resolution has no timeout
    asking.start()
    asking.join(MIRROR_SECONDS + 1.0)
    return answer[0]
