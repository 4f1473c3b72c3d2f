"""Findings about a builder, derived from its diagnostics; each failed check has a fix."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BuilderError, BuilderLost, HostKeyError, LogInError, PythonError, SettingsError, StoreError
from ...runner.maintenance.performance_warnings import FEW_INODES, LITTLE_ROOM
from ...util.text import size

OK = "ok"
WARNING = "warning"
FAILED = "failed"

STAGES = ("reachable", "host key", "login", "python", "store")
"""Stages of a connection, in order. The diagnostics of the runner follow."""

LITTLE_MEMORY = 900 << 20
"""Bytes of memory and swap below which a C++ compiler or a large installation may run out of memory."""

HOT = 80.0
"""Degrees Celsius at which a Raspberry Pi is throttled."""

COOLING = "Add a heat sink or a fan."

CLOCK_WARNING = 30.0
CLOCK_FAILED = 300.0
"""Seconds between two clocks. Signatures of packages may be invalid for clocks that differ by `CLOCK_FAILED`."""

THROTTLED = {
    0: "undervoltage",
    1: "capped clock frequency",
    2: "throttling",
    3: "temperature limit",
    16: "undervoltage since boot",
    17: "capped clock frequency since boot",
    18: "throttling since boot",
    19: "temperature limit since boot",
}
"""Meaning of the bits of a Raspberry Pi's `vcgencmd get_throttled`."""

MAXIMUM_ID = 4_000_000_000
"""Maximum first id of a new range of subordinate ids; the ids of Linux have 32 bits."""

KEYRINGS = ("debian-archive-keyring", "raspbian-archive-keyring")
"""Packages with the keys that sign the packages of base images."""

SYSCTL_FILE = "/etc/sysctl.d/60-gamebear.conf"

LOGIND_FILE = "/etc/systemd/logind.conf.d/60-gamebear.conf"

WRONG_SETTINGS: Mapping[str, Callable[[int], str]] = {
    "kernel.unprivileged_userns_clone": lambda value: "1" if value == 0 else "",
    "kernel.apparmor_restrict_unprivileged_userns": lambda value: "0" if value == 1 else "",
    "user.max_user_namespaces": lambda value: "15000" if value < 16 else "",
}
"""Kernel settings that may forbid user namespaces: a function that returns a better value, or an empty string."""


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        name: Name of the check.
        state: `ok`, `warning` (builds are slower, or may fail) or `failed` (builds fail).
        message: Result.
        fix: Suggested fix for a person; empty if none is needed.
        packages: Debian packages whose installation fixes it.
        commands: Shell commands that fix it as root.
    """

    name: str
    state: str
    message: str
    fix: str = ""
    packages: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def is_fixable(self) -> bool:
        """Whether `--fix` can fix it."""
        return bool(self.packages or self.commands)


def connection_findings(error: BuilderError | SettingsError, by_ssh: bool) -> list[Finding]:
    """Return findings about a builder without diagnostics: the stages that succeeded, and the one that failed."""
    if isinstance(error, StoreError):
        failed = "store"
    elif isinstance(error, PythonError):
        failed = "python"
    elif isinstance(error, LogInError):
        failed = "login"
    elif isinstance(error, HostKeyError):
        failed = "host key"
    elif isinstance(error, BuilderLost):
        failed = "reachable"
    else:
        failed = "connection"
    before = STAGES[: STAGES.index(failed)] if failed in STAGES and by_ssh else ()
    found = [Finding(stage, OK, "yes") for stage in before]
    packages = ("python3",) if failed == "python" and "3.9" not in error.message else ()
    return [*found, Finding(failed, FAILED, error.message, error.hint, packages)]


class _Facts:
    """Untrusted diagnostics of a builder. Values of an unexpected type count as absent."""

    def __init__(self, values: object) -> None:
        self._values: Mapping[str, Any] = values if isinstance(values, dict) else {}

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def part(self, name: str) -> _Facts:
        return _Facts(self._values.get(name))

    def parts(self) -> Iterator[tuple[str, _Facts]]:
        return ((name, _Facts(value)) for name, value in self._values.items())

    def text(self, name: str) -> str:
        value = self._values.get(name)
        return " ".join(value.split()) if isinstance(value, str) else ""

    def texts(self, name: str) -> list[str]:
        value = self._values.get(name)
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    def number(self, name: str) -> float | None:
        value = self._values.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def count(self, name: str) -> int:
        return int(self.number(name) or 0)

    def flag(self, name: str) -> bool:
        return self._values.get(name) is True


def findings_of(diagnostics: Mapping[str, Any], arches: Sequence[str], base: str) -> list[Finding]:
    """Return the findings about a builder.

    Args:
        diagnostics: The builder's diagnostics (`runner/server/diagnostics.py`), untrusted, of bounded size.
        arches: Architectures that the builder has to build for.
        base: The setting `base`, see `config.Settings`.
    """
    facts = _Facts(diagnostics)
    return [
        *_connection(facts.part("connection")),
        *_machine(facts),
        *_disk(facts),
        *_containers(facts),
        *_architectures(facts, arches),
        *_bases(facts, arches, base),
        *_store(facts),
    ]


def _connection(facts: _Facts) -> Iterator[Finding]:
    if "log-in" in facts:
        yield Finding("reachable", OK, facts.text("server") or "yes")
        yield Finding("host key", OK, f"{facts.text('host key')}, matches known_hosts")
        yield Finding("login", OK, facts.text("log-in"))


def _machine(facts: _Facts) -> Iterator[Finding]:
    yield Finding("python", OK, facts.text("python"))
    words = [facts.text("model"), facts.text("system"), f"Linux {facts.text('kernel')}", facts.text("machine")]
    yield Finding("system", OK, ", ".join(word for word in words if word))
    yield _clock(facts)
    yield _memory(facts)
    yield from _heat(facts.part("heat"))
    if facts.flag("kills"):
        lines = "[Login]\\nKillUserProcesses=no\\n"
        yield Finding(
            "logout",
            FAILED,
            "logind ends builds when the connection closes (KillUserProcesses=yes)",
            f"Add to {LOGIND_FILE}, below [Login]: KillUserProcesses=no",
            commands=(
                f"mkdir -p {LOGIND_FILE.rpartition('/')[0]}",
                f"printf '{lines}' > {LOGIND_FILE}",
                "systemctl reload systemd-logind || systemctl restart systemd-logind",
            ),
        )


def _clock(facts: _Facts) -> Finding:
    ahead = facts.number("ahead")
    if ahead is None or abs(ahead) < CLOCK_WARNING:
        return Finding("clock", OK, "same as this machine")
    seconds = abs(round(ahead))
    difference = f"{seconds // 86400} days" if seconds >= 2 * 86400 else f"{seconds} seconds"
    message = f"{difference} {'ahead of' if ahead > 0 else 'behind'} this machine"
    fix = "Run date on both machines, and on the one with the wrong time: sudo timedatectl set-ntp true"
    if abs(ahead) < CLOCK_FAILED:
        return Finding("clock", WARNING, message, fix)
    commands = ("timedatectl set-ntp true",) if facts.part("programs").text("timedatectl") else ()
    return Finding(
        "clock", FAILED, f"{message}; signatures of packages and certificates may be invalid", fix, commands=commands
    )


def _memory(facts: _Facts) -> Finding:
    about = facts.part("memory")
    total, swap = about.count("total"), about.count("swap")
    message = f"{size(total)}, {size(swap)} of swap" if swap else f"{size(total)}, no swap"
    if total + swap >= LITTLE_MEMORY or not total:
        return Finding("memory", OK, message)
    return Finding(
        "memory",
        WARNING,
        f"{message}: large compilations may run out of memory",
        "Add swap; on Raspberry Pi OS: CONF_SWAPSIZE=1024 in /etc/dphys-swapfile, then sudo systemctl restart"
        " dphys-swapfile",
    )


def _heat(facts: _Facts) -> Iterator[Finding]:
    degrees, throttled = facts.number("degrees"), facts.count("throttled")
    reports = [text for bit, text in THROTTLED.items() if throttled >> bit & 1]
    now = {text for bit, text in THROTTLED.items() if bit < 16}
    reports = [text for text in reports if text in now or text.removesuffix(" since boot") not in reports]
    if reports:
        voltage = any("voltage" in text for text in reports)
        yield Finding(
            "power",
            WARNING,
            f"the firmware reports {', '.join(reports)}",
            "Use a stronger power supply and a short cable." if voltage else COOLING,
        )
    if degrees is not None:
        message = f"{degrees:.0f} °C"
        if degrees >= HOT:
            yield Finding("temperature", WARNING, f"{message}: the processor is throttled", COOLING)
        else:
            yield Finding("temperature", OK, message)


def _disk(facts: _Facts) -> Iterator[Finding]:
    disk, costs = facts.part("disk"), facts.part("costs")
    free, files = disk.number("free"), disk.number("files")
    folder = disk.text("folder")
    message = f"{size(int(free or 0))} of {size(disk.count('total'))} free in {folder}"
    fix = "Free disk space: gamebear prune --older 30 --images"
    if free is not None and free < LITTLE_ROOM:
        yield Finding("disk", FAILED, f"{message}; a package image needs about 1 GiB", fix)
    elif files is not None and files < FEW_INODES:
        yield Finding("disk", FAILED, f"{message}, but only {files:.0f} free inodes (df -i)", fix)
    elif disk.text("folder") and not disk.flag("executes"):
        yield Finding(
            "disk",
            FAILED,
            f"{message}; it is mounted with noexec",
            "Mount it without noexec, or move the store: XDG_CACHE_HOME=/a/folder in the builder's /etc/environment",
        )
    else:
        yield Finding("disk", OK, message)
    if speed := costs.text("disk speed"):
        yield _cost("disk speed", speed)


def _cost(name: str, text: str) -> Finding:
    """Return the finding of a performance warning: `<cause>: <fix>`."""
    message, _, fix = text.partition(": ")
    return Finding(name, WARNING, message, _sentence(fix))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _install(facts: _Facts, *packages: str) -> tuple[str, tuple[str, ...]]:
    """Return the command that installs packages on the builder, and the packages if `--fix` can install them."""
    if facts.part("programs").text("apt-get"):
        return f"sudo apt install {' '.join(packages)}", packages
    return f"Install on the builder (names of Debian's packages): {', '.join(packages)}", ()


def _containers(facts: _Facts) -> Iterator[Finding]:
    programs, known, failure = facts.part("programs"), facts.part("containers"), facts.part("failure")
    user = facts.text("user") or "the account"
    explained = False
    if programs.text("buildah"):
        yield Finding("buildah", OK, known.text("version") or programs.text("buildah"))
    else:
        explained = True
        yield Finding("buildah", FAILED, "not installed", *_install(facts, "buildah"))
    if facts.flag("root"):
        yield Finding("rootless", OK, "not needed: builds run as root")
    else:
        for finding in _rootless(facts, user, "isolation" in known):
            explained = explained or finding.state == FAILED
            yield finding
    if "isolation" in known:
        yield Finding("isolation", OK, known.text("isolation"))
        if text := facts.part("costs").text("processes"):
            yield _cost("processes", text)
        yield _storage(facts, known)
    elif not explained and failure:
        packages = ("netavark",) if failure.text("package") == "netavark" else ()
        yield Finding(
            "isolation",
            FAILED,
            failure.text("what") or "containers do not work",
            failure.text("remedy") or "Run on the builder, and fix its errors: buildah unshare true",
            packages if programs.text("apt-get") else (),
        )


def _rootless(facts: _Facts, user: str, works: bool) -> Iterator[Finding]:
    programs, ids, spaces = facts.part("programs"), facts.part("subordinate"), facts.part("namespaces")
    missing = [name for name in ("newuidmap", "newgidmap") if not programs.text(name)]
    if missing:
        yield Finding(
            "rootless",
            FAILED,
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            *_install(facts, "uidmap"),
        )
    else:
        yield Finding("rootless", OK, f"as {user}, with newuidmap")
    uids, gids, enough = ids.count("uids"), ids.count("gids"), ids.count("enough")
    message = f"{uids} subordinate user ids, {gids} subordinate group ids"
    if min(uids, gids) >= enough or works:
        yield Finding("subuids", OK, message)
    else:
        first = max(100000, ids.count("free"))
        # Root runs this command, so it contains no unchecked text of the builder.
        is_plain = re.fullmatch(r"[A-Za-z_][\w.-]{0,31}", user, re.ASCII) and first < MAXIMUM_ID
        ids_range = f"{first}-{first + 65535}"
        command = f"usermod --add-subuids {ids_range} --add-subgids {ids_range} {user if is_plain else 'ACCOUNT'}"
        yield Finding(
            "subuids",
            FAILED,
            f"{user} has {message} (/etc/subuid, /etc/subgid); installing packages needs 65536 of each",
            f"sudo {command}",
            commands=(command,) if programs.text("usermod") and is_plain else (),
        )
    if not (works or spaces.flag("works")):
        yield _namespaces(facts, spaces)


def _namespaces(facts: _Facts, spaces: _Facts) -> Finding:
    """Return the reason why users cannot create user namespaces, if kernel settings forbid them."""
    wrong = {}
    for name, better in WRONG_SETTINGS.items():
        value = spaces.part("settings").number(name)
        if value is not None and (should := better(int(value))):
            wrong[name] = (int(value), should)
    reason = f" ({spaces.text('said')})" if spaces.text("said") else ""
    if not wrong:
        return Finding(
            "user namespaces",
            FAILED,
            f"users cannot create them{reason}",
            "If the builder is a container, start it with --privileged; else use a kernel with user namespaces.",
        )
    lines = [f"{name}={should}" for name, (_, should) in wrong.items()]
    printed = "".join(f"{line}\\n" for line in lines)
    return Finding(
        "user namespaces",
        FAILED,
        f"forbidden by {', '.join(f'{name}={value}' for name, (value, _) in wrong.items())}{reason}",
        f"Add to {SYSCTL_FILE}: {', '.join(lines)}; then run: sudo sysctl --system",
        commands=(f"printf '{printed}' >> {SYSCTL_FILE}", f"sysctl -p {SYSCTL_FILE}"),
    )


def _storage(facts: _Facts, known: _Facts) -> Finding:
    text = facts.part("costs").text("storage")
    if not text:
        return Finding("storage", OK, known.text("driver"))
    if facts.part("programs").text("fuse-overlayfs"):
        return Finding(
            "storage",
            WARNING,
            text.partition(": ")[0],
            "fuse-overlayfs is installed, but does not work: check /dev/fuse and its permissions.",
        )
    return Finding("storage", WARNING, text.partition(": ")[0], *_install(facts, "fuse-overlayfs"))


def _architectures(facts: _Facts, arches: Sequence[str]) -> Iterator[Finding]:
    known = facts.part("containers" if "containers" in facts else "own")
    own, emulated = known.text("arch"), known.texts("emulated")
    missing = [arch for arch in arches if arch != own and arch not in emulated]
    message = own + (f"; compatible or emulated: {', '.join(emulated)}" if emulated else "")
    if missing and own:
        yield Finding(
            "architecture",
            FAILED,
            f"{message}; programs for {', '.join(missing)} do not run",
            *_install(facts, "qemu-user-static", "binfmt-support"),
        )
    else:
        yield Finding("architecture", OK, message)


def _bases(facts: _Facts, arches: Sequence[str], policy: str) -> Iterator[Finding]:
    programs = facts.part("programs")
    tools = [tool for tool in ("mmdebstrap", "debootstrap") if programs.text(tool)]
    for arch in arches:
        base = facts.part("bases").part(arch)
        name = f"base image {arch}" if len(arches) > 1 else "base image"
        image = f"Debian {base.text('suite')} for {arch}"
        lacks = base.part("lacks")
        if base.flag("there"):
            yield Finding(name, OK, f"{image} exists")
        elif policy == "registry":
            yield Finding(name, OK, f"{image} will be pulled from its registry by the first build")
        elif tools and "lacks" not in base:
            if reason := base.text("unreachable"):
                yield Finding(
                    name,
                    WARNING,
                    f"{image} cannot be created: {base.text('mirror')} cannot be reached ({reason})",
                    "Check the builder's network and its Debian mirror: sudo apt-get update",
                )
            else:
                yield Finding(name, OK, f"{image} will be created from {base.text('mirror')} by the first build")
        else:
            state = FAILED if policy == "bootstrap" else WARNING
            fallback = "" if policy == "bootstrap" else "; it can only be pulled from a registry"
            packages: tuple[str, ...] = ()
            if "lacks" in base:
                reason, fix = lacks.text("what").rstrip("."), lacks.text("remedy")
                if (keyring := base.text("keyring")) in KEYRINGS:
                    fix, packages = _install(facts, keyring, *([] if tools else ["mmdebstrap"]))
            else:
                reason = "the builder has neither mmdebstrap nor debootstrap"
                fix, packages = _install(facts, "mmdebstrap")
            yield Finding(name, state, f"{image} cannot be created: {reason}{fallback}", fix, packages)
    if not programs.text("apt-get"):
        yield Finding(
            "apt",
            WARNING,
            "not installed: packages are installed by the apt of each image, which is slow under emulation",
            "Use a builder with Debian or Raspberry Pi OS.",
        )


def _store(facts: _Facts) -> Iterator[Finding]:
    jobs = facts.part("jobs")
    slots, stored = jobs.count("slots"), jobs.count("kept")
    yield Finding(
        "slots",
        OK,
        f"{slots} {'job' if slots == 1 else 'jobs'} at the same time; {jobs.count('running')} running,"
        f" {jobs.count('queued')} queued",
    )
    settings = facts.part("settings")
    if wrong := settings.text("wrong"):
        yield Finding("builder.json", WARNING, wrong, _sentence(settings.text("remedy")))
    sizes = facts.part("sizes")
    words = [f"{name} {size(sizes.count(name)) if name in sizes else 'not measured'}" for name, _ in sizes.parts()]
    yield Finding("store", OK, f"{stored} {'job' if stored == 1 else 'jobs'}; {', '.join(words)}")
