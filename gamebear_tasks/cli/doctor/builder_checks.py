"""Checks of a builder: findings from the diagnostics that it reports, each failure with its fix."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BuilderError, BuilderLost, HostKeyError, LogInError, PythonError, SettingsError, StoreError
from ...runner.maintenance.performance_warnings import FEW_INODES, LITTLE_ROOM
from ...util.text import size

OK = "ok"
NOTE = "note"
TROUBLE = "trouble"

STAGES = ("reachable", "host key", "log-in", "python", "store")
"""How far one gets with a builder, in order; what comes after these is asked of the runner."""

LITTLE_MEMORY = 900 << 20
"""Bytes of memory and swap that are too few for a C++ compiler or an installation of many packages."""

HOT = 80.0
"""Degrees Celsius at which a Raspberry Pi slows down."""

CLOCK_NOTED = 30.0
CLOCK_WRONG = 300.0
"""Seconds that two clocks may differ before signatures of packages are not valid yet, or no more."""

THROTTLED = {
    0: "too little voltage",
    1: "a lowered clock",
    2: "a throttled processor",
    3: "too much heat",
    16: "too little voltage since it was started",
    17: "a lowered clock since it was started",
    18: "a throttled processor since it was started",
    19: "too much heat since it was started",
}
"""What the bits of a Raspberry Pi's `vcgencmd get_throttled` mean."""

MOST_IDS = 4_000_000_000
"""Below the last id that Linux has, with room for what is given."""

KEYRINGS = ("debian-archive-keyring", "raspbian-archive-keyring")
"""The packages of the keys that a base's packages are signed with."""

SYSCTL_FILE = "/etc/sysctl.d/60-gamebear.conf"

LOGIND_FILE = "/etc/systemd/logind.conf.d/60-gamebear.conf"

WRONG_SETTINGS: Mapping[str, Callable[[int], str]] = {
    "kernel.unprivileged_userns_clone": lambda value: "1" if value == 0 else "",
    "kernel.apparmor_restrict_unprivileged_userns": lambda value: "0" if value == 1 else "",
    "user.max_user_namespaces": lambda value: "15000" if value < 16 else "",
}
"""By setting of the kernel: what it should be instead, where it forbids user namespaces."""


@dataclass(frozen=True)
class Finding:
    """One thing about a builder.

    Attributes:
        name: what it is about.
        state: `ok`, `note` (it costs something) or `trouble` (builds will fail).
        what: how it is.
        remedy: what to do, for a person; empty where nothing has to be done.
        packages: Debian packages that mend it.
        commands: command lines for root's shell that mend it, besides or instead.
    """

    name: str
    state: str
    what: str
    remedy: str = ""
    packages: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def is_mendable(self) -> bool:
        """Whether there are commands that mend it."""
        return bool(self.packages or self.commands)


def stopped(error: BuilderError | SettingsError, by_ssh: bool) -> list[Finding]:
    """Return the findings about a builder that cannot be asked: how far we got, and what stopped us there."""
    if isinstance(error, StoreError):
        failed = "store"
    elif isinstance(error, PythonError):
        failed = "python"
    elif isinstance(error, LogInError):
        failed = "log-in"
    elif isinstance(error, HostKeyError):
        failed = "host key"
    elif isinstance(error, BuilderLost):
        failed = "reachable"
    else:
        failed = "connection"
    before = STAGES[: STAGES.index(failed)] if failed in STAGES and by_ssh else ()
    found = [Finding(stage, OK, "yes") for stage in before]
    packages = ("python3",) if failed == "python" and "3.9" not in error.message else ()
    return [*found, Finding(failed, TROUBLE, error.message, error.hint, packages)]


class _Facts:
    """What a builder says, which may be anything, read as what it should be."""

    def __init__(self, said: object) -> None:
        self._said: Mapping[str, Any] = said if isinstance(said, dict) else {}

    def __contains__(self, name: str) -> bool:
        return self._said.get(name) is not None

    def part(self, name: str) -> _Facts:
        return _Facts(self._said.get(name))

    def parts(self) -> Iterator[tuple[str, _Facts]]:
        return ((name, _Facts(value)) for name, value in self._said.items())

    def text(self, name: str) -> str:
        value = self._said.get(name)
        return " ".join(value.split()) if isinstance(value, str) else ""

    def texts(self, name: str) -> list[str]:
        value = self._said.get(name)
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    def number(self, name: str) -> float | None:
        value = self._said.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def count(self, name: str) -> int:
        return int(self.number(name) or 0)

    def flag(self, name: str) -> bool:
        return self._said.get(name) is True


def judge(said: Mapping[str, Any], arches: Sequence[str], base: str) -> list[Finding]:
    """Return what is well with a builder and what is not, in the order in which it matters.

    Args:
        said: what it says of itself (`runner/server/diagnostics.py`), checked for size only.
        arches: the architectures that are wanted of it.
        base: where Debian's base images come from.
    """
    facts = _Facts(said)
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
        yield Finding("host key", OK, f"{facts.text('host key')}, as it is known here")
        yield Finding("log-in", OK, facts.text("log-in"))


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
            "log-out",
            TROUBLE,
            "logind ends what an account runs when its last connection closes, builds too (KillUserProcesses=yes)",
            f"Let it not, in {LOGIND_FILE}: KillUserProcesses=no under [Login].",
            commands=(
                f"mkdir -p {LOGIND_FILE.rpartition('/')[0]}",
                f"printf '{lines}' > {LOGIND_FILE}",
                "systemctl reload systemd-logind || systemctl restart systemd-logind",
            ),
        )


def _clock(facts: _Facts) -> Finding:
    ahead = facts.number("ahead")
    if ahead is None or abs(ahead) < CLOCK_NOTED:
        return Finding("clock", OK, "as here")
    seconds = abs(round(ahead))
    long = f"{seconds // 86400} days" if seconds >= 2 * 86400 else f"{seconds} seconds"
    what = f"{long} {'ahead of' if ahead > 0 else 'behind'} the clock here"
    remedy = "See which of the two is wrong (date), and have it set: sudo timedatectl set-ntp true"
    if abs(ahead) < CLOCK_WRONG:
        return Finding("clock", NOTE, what, remedy)
    commands = ("timedatectl set-ntp true",) if facts.part("programs").text("timedatectl") else ()
    return Finding(
        "clock", TROUBLE, f"{what}; signatures of packages and certificates may not be valid", remedy, commands=commands
    )


def _memory(facts: _Facts) -> Finding:
    about = facts.part("memory")
    total, swap = about.count("total"), about.count("swap")
    what = f"{size(total)}, and {size(swap)} of swap" if swap else f"{size(total)}, no swap"
    if total + swap >= LITTLE_MEMORY or not total:
        return Finding("memory", OK, what)
    return Finding(
        "memory",
        NOTE,
        f"{what}: large compilations may run out of it",
        "Give it more swap; on Raspberry Pi OS: CONF_SWAPSIZE=1024 in /etc/dphys-swapfile, then sudo systemctl restart"
        " dphys-swapfile.",
    )


def _heat(facts: _Facts) -> Iterator[Finding]:
    degrees, throttled = facts.number("degrees"), facts.count("throttled")
    complaints = [text for bit, text in THROTTLED.items() if throttled >> bit & 1]
    now = {text for bit, text in THROTTLED.items() if bit < 16}
    complaints = [
        text for text in complaints if text in now or text.removesuffix(" since it was started") not in complaints
    ]
    if complaints:
        voltage = any("voltage" in text for text in complaints)
        yield Finding(
            "power",
            NOTE,
            f"the firmware complains of {', '.join(complaints)}",
            "Use a stronger power supply and a short cable." if voltage else "Give it a heat sink or a fan.",
        )
    if degrees is not None:
        what = f"{degrees:.0f} °C"
        if degrees >= HOT:
            yield Finding("temperature", NOTE, f"{what}: it slows down", "Give it a heat sink or a fan.")
        else:
            yield Finding("temperature", OK, what)


def _disk(facts: _Facts) -> Iterator[Finding]:
    disk, costs = facts.part("disk"), facts.part("costs")
    free, files = disk.number("free"), disk.number("files")
    folder = disk.text("folder")
    what = f"{size(int(free or 0))} free of {size(disk.count('total'))}, in {folder}"
    room = "Make room there, say with gamebear prune --older 30 --images."
    if free is not None and free < LITTLE_ROOM:
        yield Finding("disk", TROUBLE, f"{what}; one image of packages takes about a GiB", room)
    elif files is not None and files < FEW_INODES:
        yield Finding("disk", TROUBLE, f"{what}, but it can hold only {files:.0f} more files (df -i)", room)
    elif disk.text("folder") and not disk.flag("executes"):
        yield Finding(
            "disk",
            TROUBLE,
            f"{what}; programs on it cannot be run (noexec)",
            "Mount it without noexec, or have the store elsewhere: XDG_CACHE_HOME=/a/folder in /etc/environment there.",
        )
    else:
        yield Finding("disk", OK, what)
    if speed := costs.text("disk speed"):
        yield _cost("disk speed", speed)


def _cost(name: str, text: str) -> Finding:
    """Return what a builder says that costs it much; its remedy stands behind the first colon."""
    what, _, remedy = text.partition(": ")
    return Finding(name, NOTE, what, _sentence(remedy))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _install(facts: _Facts, *packages: str) -> tuple[str, tuple[str, ...]]:
    """Return how a person installs packages there, and the packages where we can."""
    if facts.part("programs").text("apt-get"):
        return f"sudo apt install {' '.join(packages)}", packages
    return f"Install there what Debian calls {' and '.join(packages)}.", ()


def _containers(facts: _Facts) -> Iterator[Finding]:
    programs, known, failure = facts.part("programs"), facts.part("containers"), facts.part("failure")
    user = facts.text("user") or "the account"
    explained = False
    if programs.text("buildah"):
        yield Finding("buildah", OK, known.text("version") or programs.text("buildah"))
    else:
        explained = True
        yield Finding("buildah", TROUBLE, "it is not installed", *_install(facts, "buildah"))
    if facts.flag("root"):
        yield Finding("rootless", OK, "not needed: builds run as root")
    else:
        for finding in _rootless(facts, user, "isolation" in known):
            explained = explained or finding.state == TROUBLE
            yield finding
    if "isolation" in known:
        yield Finding("isolation", OK, known.text("isolation"))
        if text := facts.part("costs").text("processes"):
            yield _cost("processes", text)
        yield _storage(facts, known)
    elif not explained and failure:
        packages = ("netavark",) if "without netavark" in failure.text("what") else ()
        yield Finding(
            "isolation",
            TROUBLE,
            failure.text("what") or "no container can be run",
            failure.text("remedy") or "See on the builder that `buildah unshare true` works.",
            packages if programs.text("apt-get") else (),
        )


def _rootless(facts: _Facts, user: str, works: bool) -> Iterator[Finding]:
    programs, ids, spaces = facts.part("programs"), facts.part("subordinate"), facts.part("namespaces")
    missing = [name for name in ("newuidmap", "newgidmap") if not programs.text(name)]
    if missing:
        yield Finding("rootless", TROUBLE, f"{' and '.join(missing)} are not there", *_install(facts, "uidmap"))
    else:
        yield Finding("rootless", OK, f"as {user}, with newuidmap")
    uids, gids, enough = ids.count("uids"), ids.count("gids"), ids.count("enough")
    what = f"{uids} of users and {gids} of groups"
    if min(uids, gids) >= enough or works:
        yield Finding("subuids", OK, what)
    else:
        first = max(100000, ids.count("free"))
        # What root is to run is made of nothing that a builder might have thought up.
        is_plain = re.fullmatch(r"[A-Za-z_][\w.-]{0,31}", user, re.ASCII) and first < MOST_IDS
        ids_range = f"{first}-{first + 65535}"
        command = f"usermod --add-subuids {ids_range} --add-subgids {ids_range} {user if is_plain else 'ACCOUNT'}"
        yield Finding(
            "subuids",
            TROUBLE,
            f"{user} has {what} (/etc/subuid, /etc/subgid); packages are installed only with 65536 of each",
            f"sudo {command}",
            commands=(command,) if programs.text("usermod") and is_plain else (),
        )
    if not (works or spaces.flag("works")):
        yield _namespaces(facts, spaces)


def _namespaces(facts: _Facts, spaces: _Facts) -> Finding:
    """Return why an ordinary user gets no user namespace, as far as settings tell."""
    wrong = {}
    for name, better in WRONG_SETTINGS.items():
        value = spaces.part("settings").number(name)
        if value is not None and (should := better(int(value))):
            wrong[name] = (int(value), should)
    said = f" ({spaces.text('said')})" if spaces.text("said") else ""
    if not wrong:
        return Finding(
            "user namespaces",
            TROUBLE,
            f"an ordinary user gets none{said}",
            "The builder may be a container itself, which must be started with --privileged; or its kernel has none.",
        )
    lines = [f"{name}={should}" for name, (_, should) in wrong.items()]
    printed = "".join(f"{line}\\n" for line in lines)
    return Finding(
        "user namespaces",
        TROUBLE,
        f"forbidden by {', '.join(f'{name}={value}' for name, (value, _) in wrong.items())}{said}",
        f"Allow them for every account, in {SYSCTL_FILE}: {', '.join(lines)}; then sudo sysctl --system",
        commands=(f"printf '{printed}' >> {SYSCTL_FILE}", f"sysctl -p {SYSCTL_FILE}"),
    )


def _storage(facts: _Facts, known: _Facts) -> Finding:
    text = facts.part("costs").text("storage")
    if not text:
        return Finding("storage", OK, known.text("driver"))
    if facts.part("programs").text("fuse-overlayfs"):
        return Finding(
            "storage",
            NOTE,
            text.partition(": ")[0],
            "fuse-overlayfs is there and does not work: see that /dev/fuse is, and that the account may use it.",
        )
    return Finding("storage", NOTE, text.partition(": ")[0], *_install(facts, "fuse-overlayfs"))


def _architectures(facts: _Facts, arches: Sequence[str]) -> Iterator[Finding]:
    known = facts.part("containers" if "containers" in facts else "own")
    own, emulated = known.text("arch"), known.texts("emulated")
    lacking = [arch for arch in arches if arch != own and arch not in emulated]
    what = own + (f"; by emulation or its processor: {', '.join(emulated)}" if emulated else "")
    if lacking and own:
        yield Finding(
            "architecture",
            TROUBLE,
            f"{what}; programs for {', '.join(lacking)} do not run",
            *_install(facts, "qemu-user-static", "binfmt-support"),
        )
    else:
        yield Finding("architecture", OK, what)


def _bases(facts: _Facts, arches: Sequence[str], policy: str) -> Iterator[Finding]:
    programs = facts.part("programs")
    tools = [tool for tool in ("mmdebstrap", "debootstrap") if programs.text(tool)]
    for arch in arches:
        base = facts.part("bases").part(arch)
        name = f"base image {arch}" if len(arches) > 1 else "base image"
        what = f"Debian {base.text('suite')} for {arch}"
        lacks = base.part("lacks")
        if base.flag("there"):
            yield Finding(name, OK, f"{what} is there")
        elif policy == "registry":
            yield Finding(name, OK, f"{what} comes from its registry with the first build")
        elif tools and "lacks" not in base:
            if reason := base.text("unreachable"):
                yield Finding(
                    name,
                    NOTE,
                    f"{what} would be made from {base.text('mirror')}, which cannot be reached ({reason})",
                    "See that the builder has a network, and a mirror that works: sudo apt-get update",
                )
            else:
                yield Finding(name, OK, f"{what} is made with the first build, from {base.text('mirror')}")
        else:
            state = TROUBLE if policy == "bootstrap" else NOTE
            only = "" if policy == "bootstrap" else "; only a registry can give it"
            packages: tuple[str, ...] = ()
            if "lacks" in base:
                reason, remedy = lacks.text("what").rstrip("."), lacks.text("remedy")
                if (keyring := base.text("keyring")) in KEYRINGS:
                    remedy, packages = _install(facts, keyring, *([] if tools else ["mmdebstrap"]))
            else:
                reason = "the builder has neither mmdebstrap nor debootstrap"
                remedy, packages = _install(facts, "mmdebstrap")
            yield Finding(name, state, f"{what} cannot be made there: {reason}{only}", remedy, packages)
    if not programs.text("apt-get"):
        yield Finding(
            "apt",
            NOTE,
            "the builder has no apt: that of each image installs its packages, slowly where it is emulated",
            "A builder with Debian or Raspberry Pi OS is the faster one.",
        )


def _store(facts: _Facts) -> Iterator[Finding]:
    jobs = facts.part("jobs")
    slots, kept = jobs.count("slots"), jobs.count("kept")
    yield Finding(
        "slots",
        OK,
        f"{slots} {'job' if slots == 1 else 'jobs'} at once; {jobs.count('running')} running,"
        f" {jobs.count('queued')} waiting",
    )
    settings = facts.part("settings")
    if wrong := settings.text("wrong"):
        yield Finding("builder.json", NOTE, wrong, _sentence(settings.text("remedy")))
    sizes = facts.part("sizes")
    words = [f"{name} {size(sizes.count(name)) if name in sizes else 'not measured'}" for name, _ in sizes.parts()]
    yield Finding("store", OK, f"{kept} {'job' if kept == 1 else 'jobs'} kept; {', '.join(words)}")
