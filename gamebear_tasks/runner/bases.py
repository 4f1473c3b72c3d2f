"""Base images: a name becomes an image of the wanted architecture, from the local store, a registry or a bootstrap.

Short names mean what they mean to Docker (`debian` is `docker.io/library/debian`). Debian's official images can be
made on the builder instead, from its own apt mirror, checked against Debian's keys; an image made so is kept under
`gamebear-base:debian-<suite>-<arch>` and says in its labels where it comes from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .buildah import Buildah, BuildahError, Facts, last_lines, streamed
from .files import RunnerError, locked

POLICY_VARIABLE = "GAMEBEAR_BASE"
"""`auto` (local, registry, bootstrap), `registry` (no bootstrap) or `bootstrap` (no registry)."""

PLATFORMS = {
    "amd64": ("amd64", ""),
    "arm64": ("arm64", ""),
    "armel": ("arm", "v5"),
    "armhf": ("arm", "v7"),
    "i386": ("386", ""),
    "loong64": ("loong64", ""),
    "mips64el": ("mips64le", ""),
    "ppc64el": ("ppc64le", ""),
    "riscv64": ("riscv64", ""),
    "s390x": ("s390x", ""),
}
"""Debian's name of an architecture to the OCI image format's architecture and variant."""

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
"""Docker Hub's folders of official images for one architecture, to Debian's name of it."""

RELEASES = {"11": "bullseye", "12": "bookworm", "13": "trixie", "14": "forky"}
STABLE = "bookworm"
"""The release that `debian` means on a builder that does not run Debian itself."""

ARCHITECTURE_ANNOTATION = "gamebear.arch"
"""The architecture of the job that made an image; a script's own tags are found again by it."""

FIRST_ANSWER_SECONDS = 30.0
"""How long a registry may take until it has sent an image's manifest."""

LAYER_SECONDS = 1800.0
"""How long a registry may be silent while it sends a layer."""

UNPACKED_LIMIT = 1 << 30
"""Bytes beyond which an index is not unpacked any further; Debian's largest has less than a tenth of it."""

UNPACKED_MEMORY = 256 << 20
"""Bytes of memory that unpacking an index may take."""

MIRROR_SECONDS = 20.0
"""How long a mirror may be silent when an extra suite's index is looked at."""


class ImageError(RunnerError):
    """An image cannot be had."""

    kind = "image"


@dataclass(frozen=True)
class Archive:
    """One suite of an apt archive.

    Attributes:
        uri: where it is, without credentials and without a slash at its end.
        suite: for instance `bookworm` or `bookworm-security`.
        components: for instance `("main",)`.
        keyring: the file with the keys that may sign it, empty where the sources don't say.
    """

    uri: str
    suite: str
    components: tuple[str, ...]
    keyring: str = ""

    def line(self) -> str:
        """Return the line for sources.list; the keys are the system's."""
        return f"deb {self.uri} {self.suite} {' '.join(self.components)}"


def resolve(buildah: Buildah, facts: Facts, name: str, arch: str) -> str:
    """Return the full id of the image of a name, fetched or made where it is not there yet.

    Args:
        buildah: to run buildah with, inside the namespace.
        facts: what the builder can do.
        name: an image's id or name, as in `FROM`.
        arch: Debian's name of the wanted architecture; a name that holds one itself (`arm32v7/debian`) goes first.

    Raises:
        ImageError: it cannot be had; says what was tried and why each try failed.
        RunnerError: programs of that architecture do not run here.
    """
    with buildah.looking_for_image():
        identity = _resolve(buildah, facts, name, arch)
        buildah.note_use(identity)
        return identity


def _resolve(buildah: Buildah, facts: Facts, name: str, arch: str) -> str:
    policy = os.environ.get(POLICY_VARIABLE) or "auto"
    if policy not in ("auto", "registry", "bootstrap"):
        raise RunnerError(f"{POLICY_VARIABLE} is {policy!r} on the builder.", "It may be auto, registry or bootstrap.")
    by_id = _by_id(buildah, name)
    if by_id:
        return by_id
    _check_name(name)
    wanted = _named_architecture(name) or arch
    suite = debian_suite(name)
    places = _places(name, wanted, suite if policy != "registry" else "")
    found = _local(buildah, places, wanted, arch)
    if found:
        return found
    if is_local_only(name):
        raise ImageError(f"No image {name} for {wanted} is on the builder.", "It is a local name: build it first.")
    check_runs(facts, wanted)
    folder = buildah.root / "images"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = f"{suite}-{wanted}" if suite else hashlib.sha256(f"{qualified(name)} {wanted}".encode()).hexdigest()
    with locked(folder / f"base-{key}.lock"):
        found = _local(buildah, places, wanted, arch)
        if found:
            return found
        failures: list[str] = []
        if policy != "bootstrap" or not suite:
            try:
                return _pull(buildah, name, wanted)
            except BuildahError as error:
                failures.append(f"the registry: {last_lines(error.stderr, 1).removeprefix('Error: ')}")
        if policy != "registry" and suite:
            try:
                return _bootstrap(buildah, facts, suite, wanted)
            except ImageError as error:
                failures.append(f"a bootstrap: {error}")
    hint = "See that the builder reaches the registry"
    if suite and policy != "registry":
        hint += ", or can bootstrap Debian (sudo apt install mmdebstrap, and an apt mirror)"
    raise ImageError(
        f"The base image {name} for {wanted} cannot be had. Tried: the builder's own store: not there; "
        f"{'; '.join(failures)}.",
        f"{hint}, or put the image there by hand: {shlex.join(buildah.command('pull', qualified(name)))}",
    )


def meaning(buildah: Callable[..., str], name: str, arch: str, policy: str) -> str:
    """Return the id of the image that a name means in the local store, empty where there is none; asks no network.

    Args:
        buildah: runs buildah and returns what it prints.
        name: as a script says it.
        arch: Debian's name of the job's architecture.
        policy: where Debian's base images come from: `auto`, `registry` or `bootstrap`.
    """
    wanted = _named_architecture(name) or arch
    suite = debian_suite(name) if policy != "registry" else ""
    return _local(buildah, _places(name, wanted, suite), wanted, arch)


def check_runs(facts: Facts, arch: str) -> None:
    """Raise RunnerError where programs of an architecture do not run on this builder."""
    if arch not in PLATFORMS:
        raise RunnerError(f"There is no architecture {arch!r}.", f"Known are {', '.join(sorted(PLATFORMS))}.")
    if arch != facts.arch and arch not in facts.emulated:
        raise RunnerError(
            f"The builder is {facts.arch} and cannot run {arch} programs.",
            f"Use a builder that is {arch}, or let this one emulate it: "
            "sudo apt install qemu-user-static binfmt-support",
        )


def qualified(name: str) -> str:
    """Return the name with registry and tag, as Docker completes it."""
    host, slash, rest = name.partition("/")
    if not (slash and ("." in host or ":" in host or host == "localhost")):
        host, rest = "docker.io", name
    if host in ("docker.io", "index.docker.io"):
        host, rest = "docker.io", rest if "/" in rest else f"library/{rest}"
    last = rest.rpartition("/")[2]
    return f"{host}/{rest}" + ("" if ":" in last or "@" in last else ":latest")


def is_local_only(name: str) -> bool:
    """Say whether a name can only be a local cache's tag, about which no registry is asked."""
    host, slash, _ = name.partition("/")
    if host == "localhost":
        return True
    if "@" in name:
        return False
    if slash and ("." in host or ":" in host):
        return False
    repository, _, tag = name.rpartition("/")[2].partition(":")
    return repository.startswith("gamebear-") or re.fullmatch(r"[0-9a-f]{64}", tag) is not None


def debian_suite(name: str) -> str:
    """Return the suite that a name of one of Debian's official images means; empty for every other image.

    The builder's own release stands for `debian`, `debian:latest` and `debian:stable` where it runs Debian.
    """
    folders = "|".join(["library", *REGISTRY_FOLDERS])
    match = re.fullmatch(rf"docker\.io/(?:{folders})/debian:([\w.-]+)", qualified(name))
    if not match:
        return ""
    tag = match.group(1)
    if tag.endswith("-slim"):
        tag = tag[: -len("-slim")]
    if tag in ("latest", "stable"):
        return _own_release()[1] or STABLE
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
        raise ImageError(f"{name!r} is not the name of an image.")


def _by_id(buildah: Buildah, name: str) -> str:
    """Return the full id where the name is the start of one (12 digits or more) in the local store."""
    match = re.fullmatch(r"(?:sha256:)?([0-9a-f]{12,64})", name)
    if match:
        for identity in _names(buildah):
            if identity.startswith(match.group(1)):
                return identity
    return ""


def _names(buildah: Callable[..., str]) -> dict[str, list[str]]:
    """Return the full id of every local image and its names."""
    listed = json.loads(buildah("images", "--all", "--no-trunc", "--json") or "null") or []
    return {str(image["id"]).rpartition(":")[2]: list(image.get("names") or []) for image in listed}


def _places(name: str, arch: str, suite: str) -> list[str]:
    """Return the local store's names to look under, first the nearest."""
    last = name.rpartition("/")[2]
    tagged = name if ":" in last or "@" in last else f"{name}:latest"
    places = [tagged, f"localhost/{tagged}", qualified(name), f"localhost/{_pulled_tag(name, arch)}"]
    if suite:
        places.append(f"localhost/{_bootstrap_tag(suite, arch)}")
    return list(dict.fromkeys(places))


def _pulled_tag(name: str, arch: str) -> str:
    """Return where a pulled image is also kept: its own name may pass to another architecture's image."""
    return f"gamebear-base:pulled-{hashlib.sha256(f'{qualified(name)} {arch}'.encode()).hexdigest()[:32]}"


def _bootstrap_tag(suite: str, arch: str) -> str:
    return f"gamebear-base:{_distribution(arch)}-{suite}-{arch}"


def _local(buildah: Callable[..., str], places: list[str], wanted: str, job: str) -> str:
    """Return the id of the first local image under one of the names that is of the wanted architecture."""
    named = {place: identity for identity, places in _names(buildah).items() for place in places}
    for place in places:
        identity = named.get(place)
        if identity:
            inspected = json.loads(buildah("inspect", "--type", "image", identity))
            if (inspected.get("ImageAnnotations") or {}).get(ARCHITECTURE_ANNOTATION) == job:
                return identity
            if _fits(inspected, wanted):
                return identity
    return ""


def _fits(inspected: dict[str, Any], arch: str) -> bool:
    found, variant = architecture(inspected)
    wanted, _ = PLATFORMS.get(arch, (arch, ""))
    if arch == "armhf":
        return found == wanted and variant != "v5"
    if arch == "armel":
        return found == wanted and variant in ("", "v5", "v6")
    return found == wanted


def _pull(buildah: Buildah, name: str, arch: str) -> str:
    """Fetch an image from its registry and return its id; raises BuildahError."""
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
        raise BuildahError(command, 0, "it was pulled, but is not in the store")
    if not _fits(json.loads(buildah("inspect", "--type", "image", identity)), arch):
        raise BuildahError(command, 0, f"the registry's image is not for {arch}")
    buildah("tag", identity, _pulled_tag(name, arch))
    return identity


def _patience(said: str) -> float:
    return LAYER_SECONDS if re.search("Getting image source|Copying|Storing", said) else FIRST_ANSWER_SECONDS


# Bootstrap


def _own_release() -> tuple[str, str]:
    """Return the builder's distribution (`debian`, `raspbian` or empty) and its release's code name."""
    values: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/etc/os-release").read_text().splitlines():
            key, _, value = line.partition("=")
            values[key] = value.strip("\"'")
    distribution = values.get("ID", "")
    if distribution not in ("debian", "raspbian"):
        return "", ""
    return distribution, values.get("VERSION_CODENAME") or RELEASES.get(values.get("VERSION_ID", ""), STABLE)


def _distribution(arch: str) -> str:
    """Return whose packages a base has: Raspbian's are for every Pi's 32-bit CPU, Debian's armhf needs an ARMv7."""
    return "raspbian" if arch == "armhf" and _own_release()[0] == "raspbian" else "debian"


KEYRINGS = {
    "debian": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "raspbian": "/usr/share/keyrings/raspbian-archive-keyring.gpg",
}


def archives(text: str, deb822: bool) -> list[Archive]:
    """Return the binary archives (http, https) that the text of an apt sources file names.

    Args:
        text: the file's content; the formats are in sources.list(5).
        deb822: whether it is a `.sources` file and not a `.list`.
    """
    found: list[Archive] = []
    if deb822:
        for fields in stanzas(text):
            if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
                continue
            keyring = fields.get("signed-by", "").strip()
            for uri in fields.get("uris", "").split():
                for suite in fields.get("suites", "").split():
                    found += _archive(uri, suite, fields.get("components", "").split(), keyring)
        return found
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if match:
            options = dict(option.partition("=")[::2] for option in (match.group(1) or "").split())
            found += _archive(match.group(2), match.group(3), match.group(4).split(), options.get("signed-by", ""))
    return found


def _archive(uri: str, suite: str, components: list[str], keyring: str) -> Iterator[Archive]:
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname and components:
        host = parts.netloc.rpartition("@")[2]
        clean = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
        yield Archive(clean, suite, tuple(components), keyring if keyring.startswith("/") else "")


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Give the fields of each paragraph of a deb822 text, names in lower case; comments are left out."""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and name:
                fields[name] += "\n" + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        yield fields


def _sources() -> list[Archive]:
    """Return what this builder's apt uses."""
    found: list[Archive] = []
    folder = Path("/etc/apt")
    for path in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        if path.suffix in (".list", ".sources"):
            with contextlib.suppress(OSError):
                text = path.read_text(encoding="utf-8", errors="replace")
                found += archives(text, path.suffix == ".sources")
    return found


def _is_official(archive: Archive, distribution: str) -> bool:
    """Say whether an archive is the distribution's main one, by what apt knows of it, else by its address."""
    host = urllib.parse.urlsplit(archive.uri).hostname or ""
    if host.startswith("archive.raspberrypi.") or "security" in archive.suite or "security" in archive.uri:
        return False
    escaped = re.sub(r"[/:]+", "_", archive.uri.partition("://")[2])
    for name in ("InRelease", "Release"):
        path = Path("/var/lib/apt/lists", f"{escaped}_dists_{archive.suite.replace('/', '_')}_{name}")
        with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
            origin = re.search(r"^Origin: *(.*)$", file.read(4096), re.MULTILINE)
            if origin:
                return origin.group(1).strip().lower() == distribution
    return archive.uri.rpartition("/")[2] == distribution


def _main_archive(suite: str, distribution: str) -> Archive:
    """Return the archive to bootstrap from, which is the builder's own mirror; raises ImageError where it has none."""
    own = [archive for archive in _sources() if _is_official(archive, distribution) and "main" in archive.components]
    own.sort(key=lambda archive: archive.suite not in (suite, "stable", _own_release()[1]))
    if not own:
        raise ImageError(
            f"The builder's apt sources name no mirror of {distribution.capitalize()}.",
            f"Name one there in /etc/apt/sources.list: deb MIRROR {suite} main",
        )
    uri, keyring = own[0].uri, own[0].keyring
    components = ("main",) if distribution == "debian" else ("main", "contrib", "non-free", "rpi")
    return Archive(uri, suite, components, keyring)


def _keyrings(archive: Archive, distribution: str) -> list[str]:
    stated = [archive.keyring, KEYRINGS[distribution], KEYRINGS[distribution][: -len(".gpg")] + ".pgp"]
    for path in stated:
        if path and Path(path).is_file():
            return [path]
    trusted = [path for path in ("/etc/apt/trusted.gpg.d", "/etc/apt/trusted.gpg") if Path(path).exists()]
    if trusted and _own_release()[0] == distribution:
        return trusted
    raise ImageError(
        f"The builder has no keys to check {archive.uri} with ({KEYRINGS[distribution]}).",
        f"Install them there: sudo apt install {distribution}-archive-keyring",
    )


def _extra_archives(main: Archive, arch: str) -> list[Archive]:
    """Return the security suite and the updates, where the builder uses them and their index is whole."""
    wanted = (f"{main.suite}-security", f"{main.suite}-updates")
    extras: list[Archive] = []
    for archive in _sources():
        if archive.suite in wanted and archive.suite not in [extra.suite for extra in extras]:
            extra = Archive(archive.uri, archive.suite, ("main",))
            reason = _index_failure(extra, arch)
            if reason:
                print(f"Leaving out {extra.suite}: {reason}", flush=True)
            else:
                extras.append(extra)
    return extras


def _index_failure(archive: Archive, arch: str) -> str:
    """Return why apt would stumble over an archive's index; empty when it would not.

    This is no check of authenticity, that is apt's; a mirror whose index does not fit its own list of hashes
    would make every installation fail.
    """
    import lzma  # these take long to import on a small machine, and most builds never come here
    import urllib.error
    import urllib.request

    base = f"{archive.uri}/dists/{archive.suite}"
    name = f"main/binary-{arch}/Packages.xz"
    try:
        with urllib.request.urlopen(f"{base}/InRelease", timeout=MIRROR_SECONDS) as answer:
            listed = answer.read(1 << 22).decode("utf-8", "replace")
        match = re.search(rf"^ ([0-9a-f]{{64}}) +\d+ {re.escape(name)}$", listed, re.MULTILINE)
        if not match:
            return f"it has no {name}"
        with urllib.request.urlopen(f"{base}/{name}", timeout=MIRROR_SECONDS) as answer:
            content = answer.read(1 << 26)
        if hashlib.sha256(content).hexdigest() != match.group(1):
            return f"its {name} is not the one that its InRelease lists"
        _check_xz(content)
    except (OSError, ValueError, lzma.LZMAError, urllib.error.URLError) as error:
        return f"{name}: {error}"
    return ""


def _check_xz(content: bytes) -> None:
    """Unpack xz data and keep nothing of it; raises LZMAError where it is not whole, or is more than any index."""
    import lzma

    unpacked = 0
    while content or not unpacked:
        stream = lzma.LZMADecompressor(memlimit=UNPACKED_MEMORY)
        while not stream.eof:
            if stream.needs_input and not content:
                raise lzma.LZMAError("it is cut off")
            unpacked += len(stream.decompress(content, 1 << 20))
            content = b""
            if unpacked > UNPACKED_LIMIT:
                raise lzma.LZMAError(f"it unpacks to more than {UNPACKED_LIMIT >> 20} MiB")
        content = stream.unused_data.lstrip(b"\0")
        if not unpacked and not content:
            return  # an index of no packages


def _bootstrap(buildah: Buildah, facts: Facts, suite: str, arch: str) -> str:
    """Install Debian's minimal system into a new image and return the image's id; raises ImageError."""
    distribution = _distribution(arch)
    tools = [tool for tool in ("mmdebstrap", "debootstrap") if shutil.which(tool, path=buildah.environment["PATH"])]
    if not tools:
        raise ImageError(
            "The builder has neither mmdebstrap nor debootstrap.", "Install one: sudo apt install mmdebstrap"
        )
    main = _main_archive(suite, distribution)
    keyrings = _keyrings(main, distribution)
    all_archives = [main, *_extra_archives(main, arch)]
    failures: list[str] = []
    for tool in tools:
        container = f"{buildah.prefix}base-{uuid.uuid4().hex[:8]}"
        print(f"Bootstrapping {distribution} {suite} for {arch} from {main.uri} with {tool}", flush=True)
        started = time.monotonic()
        try:
            buildah("from", "--name", container, "scratch")
            tree = Path(buildah("mount", container).strip())
            if tool == "mmdebstrap":
                status, said = _mmdebstrap(buildah, tree, main, all_archives, keyrings, arch)
            elif Path(keyrings[0]).is_file():
                status, said = _debootstrap(buildah, tree, main, keyrings[0], arch)
            else:
                status, said = 1, "debootstrap needs a keyring in one file"
            if status:
                errors = "\n".join(line for line in said.splitlines() if line.startswith("E: "))
                failures.append(f"{tool} ended with status {status}: {last_lines(errors or said, 2)}")
                continue
            _finish(tree, all_archives)
            buildah("umount", container)
            identity = _commit(buildah, container, main, distribution, arch)
        except (BuildahError, OSError) as error:
            failures.append(str(error))
            continue
        finally:
            with contextlib.suppress(BuildahError):
                buildah("rm", container)
        print(f"Bootstrapped in {time.monotonic() - started:.0f} s", flush=True)
        return identity
    raise ImageError(
        "; ".join(failures), f"See that the builder reaches {main.uri} and that it has {main.suite} for {arch}."
    )


def _mmdebstrap(
    buildah: Buildah, tree: Path, main: Archive, all_archives: list[Archive], keyrings: list[str], arch: str
) -> tuple[int, str]:
    # Straight into the mounted container, in "root" mode: inside the user namespace that mode finds by itself that
    # device nodes cannot be made, and does without. Its check for qemu looks at a /proc that has no binfmt_misc.
    command = [
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        f"--architectures={arch}",
        "--format=directory",
        "--skip=check/qemu",
        *(f"--keyring={keyring}" for keyring in keyrings),
        "--aptopt=Acquire::Retries 3",
        "--aptopt=Acquire::http::Timeout 30",
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=force-unsafe-io",
        main.suite,
        str(tree),
        *(archive.line() for archive in all_archives),
    ]
    return streamed(command, buildah.environment)


def _debootstrap(buildah: Buildah, tree: Path, main: Archive, keyring: str, arch: str) -> tuple[int, str]:
    # As "lxc" it binds the host's device nodes where it cannot make its own, which no user namespace allows.
    command = [
        "debootstrap",
        "--variant=minbase",
        f"--arch={arch}",
        f"--keyring={keyring}",
        f"--components={','.join(main.components)}",
        main.suite,
        str(tree),
        main.uri,
    ]
    return streamed(command, {**buildah.environment, "container": "lxc"})


def _finish(tree: Path, all_archives: list[Archive]) -> None:
    """Make a bootstrapped tree what Docker's images are: no services started, no caches, nothing of the builder."""
    for name in ("dev", "proc", "run", "sys", "tmp", "var/cache/apt/archives", "var/lib/apt/lists"):
        for path in (tree / name).iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    for name in ("pkgcache.bin", "srcpkgcache.bin"):
        (tree / "var/cache/apt" / name).unlink(missing_ok=True)
    for name in ("etc/hostname", "etc/resolv.conf", "var/log/bootstrap.log"):
        (tree / name).unlink(missing_ok=True)
    texts = {
        "etc/apt/sources.list": "".join(f"{archive.line()}\n" for archive in all_archives),
        "etc/apt/apt.conf.d/99mmdebstrap": None,
        "etc/apt/apt.conf.d/99gamebear": 'Acquire::Languages "none";\nAcquire::Retries "3";\n',
        "etc/dpkg/dpkg.cfg.d/99mmdebstrap": None,
        "etc/dpkg/dpkg.cfg.d/99gamebear": "force-unsafe-io\n",
        "usr/sbin/policy-rc.d": "#!/bin/sh\nexit 101\n",
        "etc/machine-id": "",
    }
    for name, text in texts.items():
        (tree / name).unlink(missing_ok=True)
        if text is not None:
            (tree / name).write_text(text)
            (tree / name).chmod(0o755 if name.startswith("usr/sbin/") else 0o644)


def _commit(buildah: Buildah, container: str, main: Archive, distribution: str, arch: str) -> str:
    wanted, variant = PLATFORMS[arch]
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    said = {
        "gamebear.base": f"{distribution} {main.suite}",
        "gamebear.mirror": main.uri,
        "gamebear.suite": main.suite,
        "gamebear.date": made,
        ARCHITECTURE_ANNOTATION: arch,
    }
    options = ["--os", "linux", "--arch", wanted, "--cmd", "bash"]
    options += ["--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    # The buildah of Debian 11 cannot write the variant down; an ARM image without one counts as armhf.
    if variant and "--variant" in buildah("config", "--help"):
        options += ["--variant", variant]
    for key, value in said.items():
        options += ["--annotation", f"{key}={value}", "--label", f"{key}={value}"]
    buildah("config", *options, container)
    print("Keeping it in the image store", flush=True)
    return buildah("commit", "--quiet", container, _bootstrap_tag(main.suite, arch)).strip().rpartition(":")[2]
