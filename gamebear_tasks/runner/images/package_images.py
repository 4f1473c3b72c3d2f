"""Package images: a base plus a set of Debian packages, installed once and cached in the image store under a tag.

The tag is a hash over all inputs: the base's identity, the architecture, the set of packages, the options and the
recipe's version. Annotations of the image record the installed packages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..host.arch import ARCHITECTURE_ANNOTATION
from ..host.buildah import Buildah, BuildahError, ImageError, NoRoomError
from ..host.capabilities import Facts
from ..host.rootfs import Rootfs
from ..host.subprocesses import last_lines
from ..util.free_space import is_full
from ..util.locks import locked
from . import apt_settings
from .apt import POOL, Apt, AptError, Plan, Unfit, trim
from .apt_settings import Settings
from .base_images import MAKE_ROOM, check_runs, resolve

RECIPE = 2
"""Version of the recipe below; a new number causes every package image to be rebuilt."""

NAME = "gamebear-packages"
"""Name of package images in the image store; the tag is the hash."""

ENVIRONMENT = ("env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
"""Prefix of the commands that install something."""

APT = (
    "apt-get",
    "--yes",
    "--option=Acquire::Retries=3",
    "--option=Acquire::Languages=none",
    "--option=Dpkg::Use-Pty=0",
    "--option=Dpkg::Options::=--force-unsafe-io",
)
"""apt-get for the container, without dpkg's fsyncs: these only protect machines that may lose power midway."""

LEFTOVERS = (
    "/tmp/*",
    "/var/cache/apt/*.bin",
    "/var/cache/apt/archives/*.deb",
    "/var/cache/apt/archives/partial/*",
    "/var/cache/debconf/*-old",
    "/var/lib/apt/lists/*",
    "/var/log/alternatives.log",
    "/var/log/apt/*",
    "/var/log/dpkg.log",
)
"""Files that an installation creates and no build needs."""

# Runs inside the container, so that a link in an untrusted image cannot lead outside.
REMOVE_LEFTOVERS = f"rm -rf {' '.join(LEFTOVERS)}"

UPDATE_PAUSES = (3.0, 15.0)
"""Seconds to wait before each retry of fetching the package lists."""

DAY = 86400.0


def packages_image(
    buildah: Buildah,
    facts: Facts,
    base: str,
    packages: Iterable[str],
    *,
    arch: str,
    recommends: bool = False,
    max_age_days: float | None = None,
    rebuild: str = "base",
    settings: Settings = apt_settings.NONE,
) -> str:
    """Return the full id of an image with packages installed into a base; it is built if necessary.

    Args:
        buildah: Runs buildah, inside the namespace.
        facts: Capabilities of the builder.
        base: Name or id of the base image, see `base_images.resolve`.
        packages: Names of Debian packages in any order, also `name=version`, `name/suite` and `name:arch`.
        arch: Debian's name of the job's architecture.
        recommends: Whether to install recommended packages too.
        max_age_days: Days after which the image is rebuilt; None: never because of its age.
        rebuild: `base`: rebuild the image if the base's name refers to another image now; `never`: keep it even then.
        settings: Additional apt settings.

    Raises:
        ImageError: The base or a package cannot be fetched; the attempt leaves no image and no container.
        ValueError: An argument is invalid.
    """
    if rebuild not in ("base", "never"):
        raise ValueError(f"packages_image: rebuild is {rebuild!r}, expected 'base' or 'never'")
    if max_age_days is not None and not max_age_days >= 0:
        raise ValueError(f"packages_image: max_age_days is {max_age_days!r}, expected a number of days or None")
    if rebuild == "never" and max_age_days is not None:
        raise ValueError("packages_image: rebuild='never' excludes max_age_days")
    if isinstance(packages, str):
        raise ValueError("packages_image: names is a string, expected a list of strings")
    wanted = sorted(set(packages))
    for package in wanted:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]*[a-z0-9+.](:[a-z0-9-]+)?([=/][A-Za-z0-9.+:~-]+)?", package):
            raise ValueError(f"packages_image: {package!r} is not the name of a Debian package")
    settings.check()
    with buildah.looking_for_image():
        identity = _found_or_built(
            buildah,
            facts,
            base,
            wanted,
            settings,
            arch=arch,
            recommends=recommends,
            max_age_days=max_age_days,
            rebuild=rebuild,
        )
        buildah.note_use(identity)
        return identity


def _found_or_built(
    buildah: Buildah,
    facts: Facts,
    base: str,
    wanted: Sequence[str],
    settings: Settings,
    *,
    arch: str,
    recommends: bool,
    max_age_days: float | None,
    rebuild: str,
) -> str:
    by_name = _tag(base, arch, wanted, recommends, settings)
    is_base = not wanted and settings == apt_settings.NONE
    if rebuild == "never" and not is_base:
        found = _kept(buildah, by_name, None)
        if found:
            return found
    identity = resolve(buildah, facts, base, arch)
    if is_base:
        return identity
    check_runs(facts, arch)
    tag = _tag(identity, arch, wanted, recommends, settings)
    folder = buildah.root / "images"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(folder / f"{NAME}-{tag.rpartition(':')[2]}.lock"):
        found = _kept(buildah, tag, max_age_days)
        if found:
            return found
        stale = _kept(buildah, tag, None)
        built = _build(buildah, facts, base, identity, wanted, settings, tag, arch=arch, recommends=recommends)
        buildah("tag", built, by_name)
        if stale and stale != built:
            # It stays if a container of another job still uses it.
            with contextlib.suppress(BuildahError):
                buildah("rmi", stale)
        return built


def _tag(
    base: str, arch: str, packages: Sequence[str], recommends: bool, settings: Settings = apt_settings.NONE
) -> str:
    """Return the tag of a package image; `base` is the base's id, or its name for the policy `never`."""
    recipe = {"base": base, "arch": arch, "packages": packages, "recommends": recommends, "recipe": RECIPE}
    recipe |= settings.recipe()
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return f"{NAME}:{hashlib.sha256(text.encode()).hexdigest()}"


def _kept(buildah: Buildah, tag: str, max_age_days: float | None) -> str:
    """Return the id of the image with a tag if there is one and it is recent enough, or an empty string."""
    try:
        inspected = json.loads(buildah("inspect", "--type", "image", f"localhost/{tag}"))
    except BuildahError:
        return ""
    if max_age_days is not None:
        made = (inspected.get("ImageAnnotations") or {}).get("gamebear.created", "")
        try:
            import calendar  # deferred: slow to import; strptime imports it too

            age = time.time() - calendar.timegm(time.strptime(made, "%Y-%m-%dT%H:%M:%SZ"))
        except ValueError:
            return ""
        if age > max_age_days * DAY:
            return ""
    return str(inspected["FromImageID"]).rpartition(":")[2]


class _Unsuitable(Exception):
    """An image with some of the packages cannot be extended."""


def _build(
    buildah: Buildah,
    facts: Facts,
    base: str,
    identity: str,
    packages: Sequence[str],
    settings: Settings,
    tag: str,
    *,
    arch: str,
    recommends: bool,
) -> str:
    started = time.monotonic()
    named = [*packages, *([f"build dependencies of {settings.build_dep}"] if settings.build_dep else [])]
    print(f"Installing into {base} for {arch}: {' '.join(named)}", flush=True)
    notes = {
        "gamebear.base": base,
        "gamebear.base-id": identity,
        "gamebear.packages": " ".join(packages),
        "gamebear.recipe": str(RECIPE),
        "gamebear.recommends": str(recommends).lower(),
        ARCHITECTURE_ANNOTATION: arch,
        **{f"gamebear.{name}": value for name, value in settings.recipe().items()},
    }
    part = _part(buildah, notes)
    built = ""
    if part:
        with contextlib.suppress(_Unsuitable):
            built = _installed(buildah, facts, part, packages, settings, tag, notes, recommends=recommends)
    built = built or _installed(buildah, facts, _Part(identity), packages, settings, tag, notes, recommends=recommends)
    print(f"Installed in {time.monotonic() - started:.0f} s", flush=True)
    return built


class _Part(NamedTuple):  # NamedTuple, not a dataclass: see `capabilities.Facts`
    """An image to start from.

    Attributes:
        identity: Its id.
        packages: The wanted packages that it already has.
        added: Names of all packages in it that its base does not have.
    """

    identity: str
    packages: tuple[str, ...] = ()
    added: frozenset[str] = frozenset()


def _part(buildah: Buildah, notes: Mapping[str, str]) -> _Part | None:
    """Return the package image of the same base that has the most of the wanted packages and no other ones."""
    same = ["gamebear.base-id", "gamebear.recipe", "gamebear.recommends", ARCHITECTURE_ANNOTATION]
    same += ["gamebear.sources", "gamebear.keys", "gamebear.snapshot"]
    wanted = set(notes["gamebear.packages"].split())
    parts = []
    for image in buildah.images():
        if not any(str(name).startswith(f"localhost/{NAME}:") for name in image["names"]):
            continue
        with contextlib.suppress(BuildahError):  # race: it may have been removed
            identity = image["id"]
            found = json.loads(buildah("inspect", "--type", "image", identity)).get("ImageAnnotations") or {}
            has = tuple(found.get("gamebear.packages", "").split())
            is_subset = set(has) <= wanted if "gamebear.build-dep" in notes else set(has) < wanted
            if "gamebear.build-dep" in found or not has or not is_subset:
                continue
            if all(found.get(key) == notes.get(key) for key in same):
                parts.append(_Part(identity, has, frozenset(found.get("gamebear.added", "").split())))
    return max(parts, key=lambda part: (len(part.packages), part.identity), default=None)


def _installed(
    buildah: Buildah,
    facts: Facts,
    part: _Part,
    packages: Sequence[str],
    settings: Settings,
    tag: str,
    notes: Mapping[str, str],
    *,
    recommends: bool,
) -> str:
    """Install the missing packages into an image, commit it and return its id.

    Raises:
        ImageError: The installation failed.
        _Unsuitable: The packages in the image differ from those that would be installed today.
    """
    base, arch = notes["gamebear.base"], notes[ARCHITECTURE_ANNOTATION]
    container = f"{buildah.prefix}packages-{os.urandom(4).hex()}"
    folder = Path(tempfile.mkdtemp(prefix="apt-", dir=buildah.environment["TMPDIR"]))
    rootfs = None
    try:
        buildah("from", "--name", container, part.identity)
        rootfs_folder = buildah("mount", container).rstrip("\n")
        rootfs = Rootfs(rootfs_folder)
        before = _versions(installed(rootfs, folder))
        control = folder / "build-dep"
        apt_settings.apply(settings, rootfs, folder, base)
        if settings.control:
            apt_settings.write_control(settings, control)
        elif settings.build_dep:
            apt_settings.add_source_indexes(rootfs, folder)
        steps = _steps(packages, settings, str(control), bool(part.added))
        try:
            apt = Apt(folder / "apt", buildah.root / POOL, rootfs, buildah.environment)
            _update(apt.update, lambda: is_full(folder, rootfs_folder))
            if part.added:
                if part.added & apt.outdated():
                    raise _Unsuitable
                print(f"Extending the image with {' '.join(part.packages)}", flush=True)
            for number, step in enumerate(steps):
                if number:
                    apt.refresh(rootfs)
                plan = apt.plan(step.names, recommends, step.action)
                apt.fetch(plan, unpacked=apt.arch != facts.arch)
                _install(buildah, facts, container, apt, plan, base, arch)
                if step.action[0] == "install":
                    _mark_automatic(rootfs, folder, apt, plan, packages)
            trim(apt.pool)
        except Unfit as reason:
            if part.added:
                raise _Unsuitable from None
            print(f"Using the image's apt instead of the builder's: {reason}", flush=True)
            if settings.control:
                rootfs.copy_in(control, apt_settings.CONTROL)
            steps = _steps(packages, settings, apt_settings.CONTROL, False)
            _install_inside(buildah, facts, container, steps, recommends, base, arch)
        apt_settings.remove_source_indexes(rootfs)
        now = installed(rootfs, folder)
        after = _versions(now)
        own = {name.partition(":")[0] for name in after if after[name] != before.get(name)}
        notes = {
            **notes,
            "gamebear.begun-from": part.identity,
            "gamebear.added": " ".join(sorted(part.added | own)),
            "gamebear.created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "gamebear.installed": " ".join(f"{name}={after[name]}" for name in sorted(after)),
            "gamebear.all": " ".join(package.name for package in now if package.arch == "all"),
        }
        options = [word for key, value in notes.items() for word in ("--annotation", f"{key}={value}")]
        buildah("config", *options, container)
        print("Committing the image", flush=True)
        return buildah("commit", "--quiet", container, tag).strip().rpartition(":")[2]
    except AptError as error:
        if is_full(folder, rootfs_folder):
            raise _no_room(base, arch) from None
        raise _installation_error(base, arch, error.status, error.said, _missing(apt.runs, steps)) from None
    finally:
        if rootfs is not None:
            rootfs.close()
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(BuildahError):
            buildah("rm", container)


class _Step(NamedTuple):  # NamedTuple, not a dataclass: see `capabilities.Facts`
    """A command of apt-get: its words before `--`, and those after it."""

    action: tuple[str, ...]
    names: tuple[str, ...]


def _steps(packages: Sequence[str], settings: Settings, control: str, is_extended: bool) -> list[_Step]:
    """Return the commands that install everything.

    Args:
        packages: Names of the packages.
        settings: Additional settings.
        control: Folder with the debian/control that states the build dependencies.
        is_extended: Whether the image already has some of the packages.
    """
    steps = []
    if settings.snapshot and not is_extended:
        steps.append(_Step(("dist-upgrade", "--allow-downgrades"), ()))
    if packages:
        # A pinned version, and the dependencies of a snapshot's packages, may be older than the installed ones.
        may_downgrade = settings.snapshot or any("=" in name for name in packages)
        steps.append(_Step(("install", *(["--allow-downgrades"] if may_downgrade else [])), tuple(packages)))
    if settings.build_dep:
        steps.append(_Step(("build-dep",), (control if settings.control else settings.build_dep,)))
    return steps


def _install(buildah: Buildah, facts: Facts, container: str, apt: Apt, plan: Plan, base: str, arch: str) -> None:
    """Install the downloaded packages with the container's dpkg, in the order that apt planned.

    Raises:
        ImageError: dpkg failed.
    """
    dpkg = ["dpkg", "--force-unsafe-io", *apt.dpkg_options]
    lines = ["set -e"]
    for step, packages in plan.steps:
        if step == "unpack":
            files = [f"/mnt/{package.file}" for package in packages]
            lines.append(shlex.join([*dpkg, "--no-triggers", "--unpack", "--auto-deconfigure", *files]))
        else:
            names = [package.dpkg_name for package in packages]
            lines.append(shlex.join([*dpkg, "--no-triggers", "--configure", *names]))
    lines.append(shlex.join([*dpkg, "--configure", "--pending"]))
    (apt.debs / "install.sh").write_text("\n".join([*lines, REMOVE_LEFTOVERS, ""]))
    mounts = ["--volume", f"{apt.debs}:/mnt:ro"]
    # dpkg syncs each change of a package's state, about ten per package. That is not needed: an interrupted container
    # is removed.
    mounts += ["--mount", "type=tmpfs,dst=/var/lib/dpkg/updates"]
    status, said = buildah.logged_in(container, [*ENVIRONMENT, "sh", "/mnt/install.sh"], *_network(facts), *mounts)
    if status:
        if buildah.is_disk_full():
            raise _no_room(base, arch)
        raise _installation_error(base, arch, status, said, program="dpkg")


def _mark_automatic(rootfs: Rootfs, folder: Path, apt: Apt, plan: Plan, wanted: Sequence[str]) -> None:
    """Record, as apt does, the packages that are installed only as dependencies."""
    named = {re.split("[:=/]", name)[0] for name in wanted}
    known = apt.folder / "state/extended_states"
    text = known.read_text() if known.exists() else ""
    for package in plan.packages:
        if package.name not in named:
            arch = apt.arch if package.arch == "all" else package.arch
            text += f"Package: {package.name}\nArchitecture: {arch}\nAuto-Installed: 1\n\n"
    aside = folder / "extended_states"
    aside.write_text(text)
    aside.chmod(0o644)
    rootfs.copy_in(aside, "/var/lib/apt/extended_states")


def _install_inside(
    buildah: Buildah, facts: Facts, container: str, steps: Sequence[_Step], recommends: bool, base: str, arch: str
) -> None:
    """Install packages with the container's own apt.

    Raises:
        ImageError: apt failed.
    """

    def run(*words: str) -> tuple[int, str]:
        return buildah.logged_in(container, [*ENVIRONMENT, *words], *_network(facts))

    def runs(*words: str) -> bool:
        words = (*ENVIRONMENT, *APT, *words)
        return buildah.run_in(container, words, *_network(facts), out=lambda _: None) == 0

    _update(lambda *options: run(*APT, *options, "update"), buildah.is_disk_full)
    # An explicit value instead of --no-install-recommends overrides the base's own configuration in both cases.
    option = f"--option=APT::Install-Recommends={'true' if recommends else 'false'}"
    for step in steps:
        status, said = run(*APT, option, *step.action, "--", *step.names)
        if status:
            if buildah.is_disk_full():
                raise _no_room(base, arch)
            raise _installation_error(base, arch, status, said, _missing(runs, steps))
    run("sh", "-c", REMOVE_LEFTOVERS)


def _network(facts: Facts) -> list[str]:
    return [] if facts.isolation == "chroot" else ["--network", "host"]


class Installed(NamedTuple):
    """An installed package.

    Attributes:
        name: Its name.
        version: Its version.
        arch: Its own architecture, `all` if it is independent of it.
        shown: Its name in dpkg's output: with the architecture if several can be installed.
    """

    name: str
    version: str
    arch: str
    shown: str


def installed(rootfs: Rootfs, folder: Path) -> list[Installed]:
    """Return the packages that are installed according to the container's dpkg, sorted by name.

    Args:
        rootfs: The container's file system.
        folder: Folder for a temporary file.
    """
    aside = folder / "status"
    try:
        rootfs.copy_out("/var/lib/dpkg/status", aside)
    except FileNotFoundError:
        return []
    found = []
    for stanza in aside.read_text("utf-8", "replace").split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Architecture|Multi-Arch|Version): (.*)$", stanza, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            name, arch = fields["Package"], fields.get("Architecture", "")
            several = f":{arch}" if fields.get("Multi-Arch") == "same" else ""
            found.append(Installed(name, fields["Version"], arch, name + several))
    return sorted(found, key=lambda package: package.shown)


def _versions(packages: Iterable[Installed]) -> dict[str, str]:
    """Return the version of each package, by its name in dpkg's output."""
    return {package.shown: package.version for package in packages}


def _update(update: Callable[..., tuple[int, str]], is_disk_full: Callable[[], bool]) -> None:
    """Fetch the package lists, with retries because a mirror may be busy.

    Args:
        update: Runs `apt-get update` with some options; returns its status and output.
        is_disk_full: Returns whether the disk is full.

    Raises:
        NoRoomError: The disk is full.
        ImageError: All attempts failed.
    """
    for pause in (*UPDATE_PAUSES, None):
        # Without the option a missing list is only a warning, and its packages are "not found" later. The last attempt
        # accepts that.
        status, said = update(*(["--option=APT::Update::Error-Mode=any"] if pause is not None else []))
        if not status:
            return
        if is_disk_full():
            raise NoRoomError("the package lists cannot be stored: the disk is full.", MAKE_ROOM)
        if pause is not None:
            print(f"apt-get update failed; retrying in {pause:.0f} s", flush=True)
            time.sleep(pause)
    raise ImageError(
        f"the package lists cannot be fetched: {_reasons(said)}.",
        "Check that the builder reaches the mirrors in the base image's /etc/apt/sources.list.",
    )


def _missing(runs: Callable[..., bool], steps: Iterable[_Step]) -> list[str]:
    """Return the packages that apt has no candidate for.

    apt-get exits with 100 for every error, so each package is tested alone.

    Args:
        runs: Returns whether `apt-get` succeeds with some arguments.
        steps: The commands that name the packages.
    """
    # `download` does not resolve dependencies; `install` also accepts a virtual package.
    options = ("--quiet", "--print-uris")
    missing = []
    for action, names in steps:
        for name in sorted(names):
            if action[0] == "build-dep":
                if "/" not in name and not runs(*options, "source", "--", name):
                    missing.append(f"src:{name}")
            elif not runs(*options, "download", "--", name) and not runs("--simulate", *action, "--", name):
                missing.append(name)
    return missing


def _installation_error(
    base: str, arch: str, status: int, said: str, missing: Sequence[str] = (), program: str = "apt-get"
) -> ImageError:
    if missing:
        return ImageError(
            f"package {', '.join(missing)} for {arch} is not available in {base}.",
            "Look up its name in the base's release: https://packages.debian.org",
        )
    return ImageError(
        f"packages cannot be installed into {base} for {arch}: {_reasons(said)} ({program}: status {status}).",
        "Read the log of the task.",
    )


def _no_room(base: str, arch: str) -> NoRoomError:
    return NoRoomError(f"packages cannot be installed into {base} for {arch}: the disk is full.", MAKE_ROOM)


def _reasons(said: str) -> str:
    """Return apt's error lines, or the last lines if there are none."""
    errors = [line for line in said.splitlines() if line.startswith("E: ")]
    return last_lines("\n".join(errors) or said)
