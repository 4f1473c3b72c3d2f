"""Base images: resolve a name to an image of an architecture, from the local store, a registry or a bootstrap.

Short names are resolved as by Docker (`debian` is `docker.io/library/debian`). Debian's official images can be
bootstrapped on the builder instead, from its own apt mirror, verified with Debian's keys. A bootstrapped image is
stored as `gamebear-base:debian-<suite>-<arch>`; its labels record its origin.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..host.arch import ARCHITECTURE_ANNOTATION, PLATFORMS
from ..host.buildah import Buildah, BuildahError, ImageError, NoRoomError
from ..host.capabilities import Facts, made_folder
from ..host.subprocesses import last_lines, streamed
from ..util.atomic_files import read_json
from ..util.errors import RunnerError
from ..util.locks import locked
from .apt_sources import RELEASES, STABLE, own_release
from .bootstrap import bootstrap, tag_of

POLICY_VARIABLE = "GAMEBEAR_BASE"
"""Environment variable: `auto` (local, registry, bootstrap), `registry` (no bootstrap) or `bootstrap` (no registry)."""

REGISTRY_FOLDERS = {
    "amd64": "amd64",
    "arm32v5": "armel",
    "arm32v7": "armhf",
    "arm64v8": "arm64",
    "i386": "i386",
    "ppc64le": "ppc64el",
    "riscv64": "riscv64",
    "s390x": "s390x",
}
"""Docker Hub's folders of official images for one architecture, mapped to Debian's name of the architecture."""

FIRST_ANSWER_SECONDS = 30.0
"""Seconds that a registry may be silent until it has sent an image's manifest."""

LAYER_SECONDS = 1800.0
"""Seconds that a registry may be silent while it sends a layer."""

MAKE_ROOM = "Free space on the builder: gamebear prune --older 30"
"""Suggested fix for a full disk."""


def resolve(buildah: Buildah, facts: Facts, name: str, arch: str) -> str:
    """Return the full id of the image with a name; it is pulled or bootstrapped if necessary.

    Args:
        buildah: Runs buildah, inside the namespace.
        facts: Capabilities of the builder.
        name: Id or name of an image, as in `FROM`.
        arch: Debian's name of the architecture; an architecture in the name (`arm32v7/debian`) has precedence.

    Raises:
        ImageError: The image cannot be found, pulled or bootstrapped; the error lists each attempt and its failure.
        RunnerError: Programs of that architecture do not run here, or the policy is invalid.
    """
    with buildah.looking_for_image():
        identity = _resolve(buildah, facts, name, arch)
        buildah.note_use(identity)
        return identity


def _resolve(buildah: Buildah, facts: Facts, name: str, arch: str) -> str:
    policy = os.environ.get(POLICY_VARIABLE) or "auto"
    if policy not in ("auto", "registry", "bootstrap"):
        raise RunnerError(
            f"{POLICY_VARIABLE} is invalid on the builder: {policy!r}.", "Set it to auto, registry or bootstrap."
        )
    by_id = _by_id(buildah, name)
    if by_id:
        return by_id
    _check_name(name)
    wanted = _named_architecture(name) or arch
    suite = debian_suite(name)
    places = _places(name, wanted, suite if policy != "registry" else "")
    folder = buildah.root / "images"
    found = _local(buildah, places, wanted, arch, folder)
    if found:
        return found
    if is_local_only(name):
        raise ImageError(
            f"image {name} for {wanted} is not on the builder.", "The name is local: build the image and tag it first."
        )
    check_runs(facts, wanted)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = f"{suite}-{wanted}" if suite else hashlib.sha256(f"{qualified(name)} {wanted}".encode()).hexdigest()
    with locked(folder / f"base-{key}.lock"):
        found = _local(buildah, places, wanted, arch, folder)
        if found:
            return found
        failures: list[str] = []
        if policy != "bootstrap" or not suite:
            try:
                return _pull(buildah, name, wanted)
            except BuildahError as error:
                cause = last_lines(error.stderr, 1).removeprefix("Error: ")
                if buildah.is_disk_full():
                    raise NoRoomError(
                        f"base image {name} for {wanted} cannot be stored: the disk is full ({cause}).", MAKE_ROOM
                    ) from error
                failures.append(f"registry: {cause}")
        if policy != "registry" and suite:
            try:
                return bootstrap(buildah, suite, wanted)
            except NoRoomError:
                raise
            except ImageError as error:
                failures.append(f"bootstrap: {error}")
    hint = "Check that the builder reaches the registry"
    if suite and policy != "registry":
        hint += ", or can bootstrap Debian (sudo apt install mmdebstrap, and an apt mirror)"
    raise ImageError(
        f"base image {name} for {wanted} not found: not in the builder's store; {'; '.join(failures).rstrip('.')}.",
        f"{hint}, or pull the image there: {shlex.join(buildah.command('pull', qualified(name)))}",
    )


def local(buildah: Buildah, name: str, arch: str) -> str:
    """Return the id of the local image with an id or a name, or an empty string. Uses no network.

    Args:
        buildah: Runs buildah, inside the namespace.
        name: Id or name of the image, as in the script.
        arch: Debian's name of the job's architecture.
    """
    return _by_id(buildah, name) or meaning(buildah, name, arch, "registry")


def meaning(buildah: Callable[..., str], name: str, arch: str, policy: str) -> str:
    """Return the id of the image that a name refers to in the local store, or an empty string. Uses no network.

    Args:
        buildah: Runs buildah and returns its output.
        name: Name of the image, as in the script.
        arch: Debian's name of the job's architecture.
        policy: Origin of Debian's base images: `auto`, `registry` or `bootstrap`.
    """
    wanted = _named_architecture(name) or arch
    suite = debian_suite(name) if policy != "registry" else ""
    return _local(buildah, _places(name, wanted, suite), wanted, arch)


def check_runs(facts: Facts, arch: str) -> None:
    """Verify that programs of an architecture run on this builder.

    Raises:
        RunnerError: They do not, or the architecture is unknown.
    """
    if arch not in PLATFORMS:
        raise RunnerError(f"architecture {arch!r} is unknown.", f"Use one of {', '.join(sorted(PLATFORMS))}.")
    if arch != facts.arch and arch not in facts.emulated:
        raise RunnerError(
            f"the builder ({facts.arch}) cannot run {arch} programs.",
            f"Use an {arch} builder, or run on this one: sudo apt install qemu-user-static binfmt-support",
        )


def qualified(name: str) -> str:
    """Return a name completed with registry and tag, as Docker does it."""
    host, slash, rest = name.partition("/")
    if not (slash and ("." in host or ":" in host or host == "localhost")):
        host, rest = "docker.io", name
    if host in ("docker.io", "index.docker.io"):
        host, rest = "docker.io", rest if "/" in rest else f"library/{rest}"
    last = rest.rpartition("/")[2]
    return f"{host}/{rest}" + ("" if ":" in last or "@" in last else ":latest")


def repository(name: str) -> str:
    """Return an image's name without its tag or digest."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('@')[0].partition(':')[0]}"


def is_local_only(name: str) -> bool:
    """Return whether a name can only be a local cache's tag, for which no registry is queried."""
    host, slash, _ = name.partition("/")
    if host == "localhost":
        return True
    if "@" in name:
        return False
    if slash and ("." in host or ":" in host):
        return False
    last, _, tag = name.rpartition("/")[2].partition(":")
    return last.startswith("gamebear-") or re.fullmatch(r"[0-9a-f]{64}", tag) is not None


def debian_suite(name: str) -> str:
    """Return the suite of a name of one of Debian's official images; an empty string for every other image.

    `debian`, `debian:latest` and `debian:stable` mean the builder's own release if the builder runs Debian.
    """
    folders = "|".join(["library", *REGISTRY_FOLDERS])
    match = re.fullmatch(rf"docker\.io/(?:{folders})/debian:([\w.-]+)", qualified(name))
    if not match:
        return ""
    tag = match.group(1)
    if tag.endswith("-slim"):
        tag = tag[: -len("-slim")]
    if tag in ("latest", "stable"):
        return own_release()[1] or STABLE
    if re.fullmatch(r"\d+(\.\d+)?", tag):
        return RELEASES.get(tag.partition(".")[0], "")
    return tag if re.fullmatch(r"[a-z]+", tag) else ""


def architecture(inspected: dict[str, Any]) -> tuple[str, str]:
    """Return an inspected image's OCI architecture and variant."""
    config = inspected.get("OCIv1") or {}
    return str(config.get("architecture", "")), str(config.get("variant", ""))


def _named_architecture(name: str) -> str:
    match = re.match(r"docker\.io/([^/]+)/", qualified(name))
    return REGISTRY_FOLDERS.get(match.group(1), "") if match else ""


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.:/@+-]{0,499}", name, re.ASCII):
        raise ImageError(f"image name {name!r} is invalid.", "Use a name like debian:bookworm or host/folder/name:tag.")


def _by_id(buildah: Buildah, name: str) -> str:
    """Return the full id if the name is the start of one (12 digits or more) in the local store, or an empty string."""
    match = re.fullmatch(r"(?:sha256:)?([0-9a-f]{12,64})", name)
    if match:
        for identity in _names(buildah):
            if identity.startswith(match.group(1)):
                return identity
    return ""


def _names(buildah: Callable[..., str]) -> dict[str, list[str]]:
    """Return the names of every local image, with tags and with digests, by full id."""
    listed = json.loads(buildah("images", "--all", "--no-trunc", "--json") or "null") or []
    found: dict[str, list[str]] = {}
    for image in listed:
        names = found.setdefault(str(image["id"]).rpartition(":")[2], [])
        for name in image.get("names") or []:
            names += [name, f"{repository(name)}@{image.get('digest')}"]
    return found


def _places(name: str, arch: str, suite: str) -> list[str]:
    """Return the names to search for in the local store, best first."""
    if "@" in name:
        name = f"{repository(name)}@{name.rpartition('@')[2]}"  # a digest makes the tag irrelevant
    last = name.rpartition("/")[2]
    tagged = name if ":" in last or "@" in last else f"{name}:latest"
    places = [tagged, f"localhost/{tagged}", qualified(name), f"localhost/{_pulled_tag(name, arch)}"]
    if suite:
        places.append(f"localhost/{tag_of(suite, arch)}")
    return list(dict.fromkeys(places))


def _pulled_tag(name: str, arch: str) -> str:
    """Return the second name of a pulled image: its own name may move to an image of another architecture."""
    return f"gamebear-base:pulled-{hashlib.sha256(f'{qualified(name)} {arch}'.encode()).hexdigest()[:32]}"


def _local(buildah: Callable[..., str], places: list[str], wanted: str, job: str, notes: Path | None = None) -> str:
    """Return the id of the first local image with one of the names and the wanted architecture, or an empty string.

    Args:
        buildah: Runs buildah and returns its output.
        places: Names to search for.
        wanted: Debian's name of the image's architecture.
        job: Debian's name of the job's architecture; an image that a job for it committed matches, too.
        notes: Folder that records the images in use, if the found image is going to be used. The image's properties are
            cached there, because they never change for an id and `buildah inspect` is slow.
    """
    named = {place: identity for identity, places in _names(buildah).items() for place in places}
    for place in places:
        identity = named.get(place)
        if not identity:
            continue
        note = notes / f"{identity}.used" if notes else None
        about = (_kept(note) if note else None) or _inspected(buildah, identity)
        made_for, found, variant, _ = about
        if made_for == job or _fits(found, variant, wanted):
            if note:
                _keep(note, about)
            return identity
    return ""


def user(buildah: Buildah, identity: str) -> str:
    """Return the user that runs commands in containers of an image in use, by the image's full id; empty for root."""
    note = made_folder(buildah.root / "images") / f"{identity}.used"
    about = _kept(note)
    if about is None:
        about = _inspected(buildah, identity)
        _keep(note, about)
    return str(about[3])


def _inspected(buildah: Callable[..., str], identity: str) -> list[Any]:
    """Return an image's properties: architecture of the job that made it, OCI architecture, OCI variant, user."""
    inspected = json.loads(buildah("inspect", "--type", "image", identity))
    made_for = (inspected.get("ImageAnnotations") or {}).get(ARCHITECTURE_ANNOTATION)
    config = (inspected.get("OCIv1") or {}).get("config") or {}
    return [made_for, *architecture(inspected), config.get("User") or ""]


def _kept(note: Path) -> list[Any] | None:
    """Return the properties that the usage note of an image caches, or None; see `_inspected`."""
    known = read_json(note)
    return known if isinstance(known, list) and len(known) == 4 else None


def _keep(note: Path, about: list[Any]) -> None:
    """Write an image's properties into its usage note.

    Only for images in use: garbage collection reads the time of the note.
    """
    with contextlib.suppress(OSError):
        note.write_text(json.dumps(about))


def _fits(found: str, variant: str, arch: str) -> bool:
    """Return whether an image with an OCI architecture and variant is for a Debian architecture."""
    wanted, _ = PLATFORMS.get(arch, (arch, ""))
    if arch == "armhf":
        return found == wanted and variant != "v5"
    if arch == "armel":
        return found == wanted and variant in ("", "v5", "v6")
    return found == wanted


def _pull(buildah: Buildah, name: str, arch: str) -> str:
    """Pull an image from its registry and return its id.

    Raises:
        BuildahError: The pull failed, or the image is for another architecture.
    """
    usage = buildah("pull", "--help")
    wanted, variant = PLATFORMS[arch]
    command = ["pull", "--arch", wanted]
    if variant:
        command += ["--variant", variant]
    if "--policy" in usage:
        command += ["--policy", "always"]
    if "--retry " in usage:
        command += ["--retry", "1", "--retry-delay", "1s"]
    command.append(f"docker://{qualified(name)}")
    print(f"Pulling {qualified(name)} for {arch}", flush=True)
    status, said = streamed(buildah.command(*command), buildah.environment, silence=_patience)
    if status:
        raise BuildahError(command, status, said)
    identity = next((line for line in reversed(said.split()) if re.fullmatch(r"[0-9a-f]{64}", line)), "")
    identity = identity or {n: i for i, names in _names(buildah).items() for n in names}.get(qualified(name), "")
    if not identity:
        raise BuildahError(command, 0, "the pulled image is not in the store")
    if not _fits(*architecture(json.loads(buildah("inspect", "--type", "image", identity))), arch):
        raise BuildahError(command, 0, f"the registry's image is not for {arch}")
    buildah("tag", identity, _pulled_tag(name, arch))
    return identity


def _patience(said: str) -> float:
    # buildah reports its progress only as text. If a release changes the words, slow layers time out too early.
    return LAYER_SECONDS if re.search("Getting image source|Copying|Storing", said) else FIRST_ANSWER_SECONDS
