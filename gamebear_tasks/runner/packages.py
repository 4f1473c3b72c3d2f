"""Package images: a base plus a set of Debian packages, installed once and kept in the image store under a tag.

The tag is a hash over everything the image comes from: the base's identity, the architecture, the set of packages,
the options and this recipe's version. What was installed is written on the image as annotations.
"""

from __future__ import annotations

import calendar
import contextlib
import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterable, Sequence

from .bases import ARCHITECTURE_ANNOTATION, ImageError, check_runs, resolve
from .buildah import Buildah, BuildahError, Facts, last_lines, streamed
from .files import locked

RECIPE = 1
"""Version of what is done below; another number makes every package image be built anew."""

NAME = "gamebear-packages"
"""The name under which package images are kept; the tag is the hash."""

APT = (
    "env",
    "DEBIAN_FRONTEND=noninteractive",
    "LC_ALL=C",
    "apt-get",
    "--yes",
    "--option=Acquire::Retries=3",
    "--option=Acquire::Languages=none",
    "--option=Dpkg::Use-Pty=0",
    "--option=Dpkg::Options::=--force-unsafe-io",
)
"""apt-get as it is run in the container; dpkg's fsyncs are for machines that may lose power halfway."""

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
"""What an installation leaves that no build needs."""

UPDATE_PAUSES = (3.0, 15.0)
"""Seconds to wait before each further attempt to fetch the package lists."""

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
) -> str:
    """Return the full id of the image of a base with packages installed; built where it is not there yet.

    Args:
        buildah: to run buildah with, inside the namespace.
        facts: what the builder can do.
        base: the base image's name or id, see `bases.resolve`.
        packages: names of Debian packages, `name=version` and `name:arch` too; their order means nothing.
        arch: Debian's name of the job's architecture.
        recommends: whether to install what the packages recommend as well.
        max_age_days: build it anew when it is older than this; None: however old it is.
        rebuild: `base`: build it anew when the base's name has come to mean another image; `never`: not even then.

    Raises:
        ImageError: the base or a package cannot be had; no image and no container is left of the attempt.
        ValueError: an argument makes no sense.
    """
    if rebuild not in ("base", "never"):
        raise ValueError(f"rebuild is {rebuild!r}; it may be 'base' or 'never'")
    if max_age_days is not None and not max_age_days >= 0:
        raise ValueError(f"max_age_days is {max_age_days!r}; it is a number of days, or None")
    if rebuild == "never" and max_age_days is not None:
        raise ValueError("rebuild='never' and max_age_days contradict each other")
    if isinstance(packages, str):
        raise ValueError("the packages are one string; they should be a list of names")
    wanted = sorted(set(packages))
    for package in wanted:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]*[a-z0-9+.](:[a-z0-9-]+)?([=/][A-Za-z0-9.+:~-]+)?", package):
            raise ValueError(f"{package!r} is not the name of a Debian package")
    with buildah.looking_for_image():
        identity = _found_or_built(
            buildah, facts, base, wanted, arch=arch, recommends=recommends, max_age_days=max_age_days, rebuild=rebuild
        )
        buildah.note_use(identity)
        return identity


def _found_or_built(
    buildah: Buildah,
    facts: Facts,
    base: str,
    wanted: Sequence[str],
    *,
    arch: str,
    recommends: bool,
    max_age_days: float | None,
    rebuild: str,
) -> str:
    by_name = _tag(base, arch, wanted, recommends)
    if rebuild == "never" and wanted:
        found = _kept(buildah, by_name, None)
        if found:
            return found
    identity = resolve(buildah, facts, base, arch)
    if not wanted:
        return identity
    check_runs(facts, arch)
    tag = _tag(identity, arch, wanted, recommends)
    folder = buildah.root / "images"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(folder / f"{NAME}-{tag.rpartition(':')[2]}.lock"):
        found = _kept(buildah, tag, max_age_days)
        if found:
            return found
        stale = _kept(buildah, tag, None)
        built = _build(buildah, facts, base, identity, wanted, tag, arch=arch, recommends=recommends)
        buildah("tag", built, by_name)
        if stale and stale != built:
            # It stays where a container of another job is still made from it.
            with contextlib.suppress(BuildahError):
                buildah("rmi", stale)
        return built


def _tag(base: str, arch: str, packages: Sequence[str], recommends: bool) -> str:
    """Return the tag of a package image; `base` is the base's id, or its name for the policy `never`."""
    recipe = {"base": base, "arch": arch, "packages": packages, "recommends": recommends, "recipe": RECIPE}
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return f"{NAME}:{hashlib.sha256(text.encode()).hexdigest()}"


def _kept(buildah: Buildah, tag: str, max_age_days: float | None) -> str:
    """Return the id of the image under a tag where there is one that is young enough, else nothing."""
    try:
        inspected = json.loads(buildah("inspect", "--type", "image", f"localhost/{tag}"))
    except BuildahError:
        return ""
    if max_age_days is not None:
        made = (inspected.get("ImageAnnotations") or {}).get("gamebear.created", "")
        try:
            age = time.time() - calendar.timegm(time.strptime(made, "%Y-%m-%dT%H:%M:%SZ"))
        except ValueError:
            return ""
        if age > max_age_days * DAY:
            return ""
    return str(inspected["FromImageID"]).rpartition(":")[2]


def _build(
    buildah: Buildah,
    facts: Facts,
    base: str,
    identity: str,
    packages: Sequence[str],
    tag: str,
    *,
    arch: str,
    recommends: bool,
) -> str:
    container = f"{buildah.prefix}packages-{uuid.uuid4().hex[:8]}"
    network = [] if facts.isolation == "chroot" else ["--network", "host"]
    run = ["run", *network, container, "--"]
    started = time.monotonic()
    print(f"Installing into {base} for {arch}: {' '.join(packages)}", flush=True)
    try:
        buildah("from", "--name", container, identity)
        _update(buildah, run)
        # Not with --no-install-recommends, so that what a base's own configuration says does not count either.
        option = f"--option=APT::Install-Recommends={'true' if recommends else 'false'}"
        command = [*run, *APT, option, "install", "--", *packages]
        status, said = streamed(buildah.command(*command), buildah.environment)
        if status:
            raise _installation_error(base, arch, status, said)
        listed = buildah(*run, "dpkg-query", "--show", "--showformat=${binary:Package}=${Version}\\n")
        # In the container, where a link that a strange image has put there cannot lead out of it.
        buildah(*run, "sh", "-c", f"rm -rf {' '.join(LEFTOVERS)}")
        annotations = {
            "gamebear.base": base,
            "gamebear.base-id": identity,
            "gamebear.created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "gamebear.installed": " ".join(sorted(listed.split())),
            "gamebear.packages": " ".join(packages),
            "gamebear.recipe": str(RECIPE),
            "gamebear.recommends": str(recommends).lower(),
            ARCHITECTURE_ANNOTATION: arch,
        }
        options = [word for key, value in annotations.items() for word in ("--annotation", f"{key}={value}")]
        buildah("config", *options, container)
        print("Keeping it in the image store", flush=True)
        built = buildah("commit", "--quiet", container, tag).strip().rpartition(":")[2]
    finally:
        with contextlib.suppress(BuildahError):
            buildah("rm", container)
    print(f"Installed in {time.monotonic() - started:.0f} s", flush=True)
    return built


def _update(buildah: Buildah, run: Sequence[str]) -> None:
    """Fetch the package lists; a mirror may be busy for a moment."""
    for pause in (*UPDATE_PAUSES, None):
        # Without the option a list that is missing is a warning, and its packages are "not found" later on.
        strict = ["--option=APT::Update::Error-Mode=any"] if pause is not None else []
        status, said = streamed(buildah.command(*run, *APT, *strict, "update"), buildah.environment)
        if not status:
            return
        if pause is not None:
            print(f"The package lists could not be fetched; again in {pause:.0f} s", flush=True)
            time.sleep(pause)
    raise ImageError(
        f"The package lists could not be fetched: {_reasons(said)}",
        "See that the builder reaches the mirrors in the base image's /etc/apt/sources.list.",
    )


def _installation_error(base: str, arch: str, status: int, said: str) -> ImageError:
    missing: list[str] = []
    for pattern in (
        r"^E: Unable to locate package (\S+)",
        r"^E: Package '?([^\s']+)'? has no installation candidate",
        r"^E: (?:Version|Release) '\S+' for '([^\s']+)' was not found",
    ):
        missing += re.findall(pattern, said, re.MULTILINE)
    if missing:
        return ImageError(
            f"{base} has no package {', '.join(sorted(set(missing)))} for {arch}.",
            "See how it is called in the base's release: https://packages.debian.org",
        )
    return ImageError(
        f"The packages could not be installed into {base} for {arch} (apt-get: status {status}): {_reasons(said)}",
        "The log above has the details.",
    )


def _reasons(said: str) -> str:
    """Return apt's own error lines, else the last lines of all."""
    errors = [line for line in said.splitlines() if line.startswith("E: ")]
    return last_lines("\n".join(errors) or said)
