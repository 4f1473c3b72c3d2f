"""Debian source packages, fetched and verified by this machine's apt.

apt uses a private folder for its state, cache and sources. Therefore neither root nor a `deb-src` line is required, and
the system does not change. Its sources are the system's, with each `deb` converted to a `deb-src`. Downloads are
checked against the lock file, then unpacked and patched by dpkg-source.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import SettingsError, SourceError
from ..runner.images.sources_list import Source, is_file_of_sources, parse, text_of
from ..runner.util.atomic_files import is_file_name, is_sha256, sha256_of, write_bytes
from ..runner.util.locks import locked
from ..util.disk_space import room_hint
from ..util.file_names import file_name
from ..util.subprocesses import ProgramError, install_hint, run
from .base import REPORT, FetchedSource, Pin, remove, storage_error
from .lockfile import DebianEntry, Lock

APT_CONFIG = "Check the configuration of apt: `apt-config dump`."
"""Hint for an apt that does not run."""

NO_APT = "Use a git or archive source: either(git=git(…), debian=…) and `doit sources=git`."
"""Hint for machines without apt."""

APT_UPDATE = "Check the network and the apt sources: `sudo apt-get update`."
"""Hint for lists that apt cannot download."""

SPACE = 128 << 20
"""Free bytes required for apt's lists. apt hangs forever if the disk is full (observed with apt 2.6)."""

BINARY_ONLY = re.compile(r"(arch|lang|target|architectures|languages|targets)([+-]|-add|-remove)?")
"""Options and fields of apt sources (lower case) that apply to binary packages only."""


@dataclass(frozen=True)
class DebianPin(Pin):
    """A version of a Debian source package.

    Attributes:
        package: Name of the source package.
        entry: Entry of the lock file.
    """

    package: str
    entry: DebianEntry

    def identity(self) -> dict[str, str | int | bool]:
        """Return name, version and the hash of the `.dsc`, which lists the SHA-256 of the other files."""
        entry = self.entry
        return {"debian": self.package, "version": entry.version, "dsc": entry.files[entry.dsc]}

    @property
    def file_name(self) -> str:
        """File name `debian-<sha256 of the .dsc>`."""
        return f"debian-{self.entry.files[self.entry.dsc]}"


@dataclass(frozen=True)
class Debian(FetchedSource[DebianPin]):
    """A Debian source package.

    Attributes:
        package: Name of the source package.
        version: Full version, such as `1.3.10-1`. Default: the newest.
        suite: Suite of an apt source, such as `bookworm`. Default: all of them.
    """

    package: str
    version: str | None = None
    suite: str | None = None

    def __post_init__(self) -> None:
        """Validate the names according to Debian's policy.

        Raises:
            SettingsError: An attribute is invalid.
        """
        for value, pattern, what, command in (
            (self.package, r"[a-z0-9][a-z0-9+.-]+", "source package", "apt-cache showsrc PACKAGE"),
            (self.version, r"[0-9][A-Za-z0-9.+:~-]*", "version", "apt-cache showsrc PACKAGE"),
            (self.suite, r"[A-Za-z0-9][A-Za-z0-9._/-]*", "suite", "apt-cache policy"),
        ):
            if not (value is None and what != "source package") and not (
                isinstance(value, str) and re.fullmatch(pattern, value)
            ):
                raise SettingsError(
                    f"debian({self.package!r}): {value!r} is not a valid {what}.",
                    f"Use a {what} that `{command}` lists.",
                )

    def __str__(self) -> str:
        """Return the kind, the package and its constraints."""
        return f"debian source {self.key}"

    @property
    def key(self) -> str:
        """Key in the lock file, in apt's notation."""
        version = f"={self.version}" if self.version else ""
        suite = f"/{self.suite}" if self.suite else ""
        return f"{self.package}{version}{suite}"

    @property
    def floating(self) -> bool:
        """Whether `gamebear lock` may find another version later."""
        return self.version is None

    def pin(self, lock: Lock) -> DebianPin | None:
        """Return the pin from the lock file, or None if it has no entry."""
        entry = lock.debian.get(self.key)
        return DebianPin(self.package, entry) if entry else None

    def _metadata(self, pin: DebianPin, lock: Lock) -> dict[str, str]:
        return {"package": pin.package, "version": pin.entry.version}

    def resolve(self, cache: Path, *, refresh: bool = True) -> DebianEntry:
        """Query this machine's apt sources for the requested or newest version.

        Args:
            cache: Cache folder that contains the private apt.
            refresh: Download the package lists again.

        Raises:
            SourceError: apt is missing, or its sources do not have the package.
        """
        try:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._apt(cache) as apt:
                failures = apt.update() if refresh or not apt.updated else ""
                listing = self._listing(apt)
        except ProgramError as error:
            raise self.error(f"cannot be resolved: {error.reason}", error.hint or APT_CONFIG) from error
        except OSError as error:
            raise storage_error(cache, error) from error
        found = entries(listing.decode(errors="replace"), self.package)
        if not found:
            if failures:
                raise self.error(f"cannot be resolved: apt cannot update its lists: {failures}", APT_UPDATE)
            raise self.error(
                "cannot be resolved: no apt source of this machine has such a source package",
                "Check the name on https://tracker.debian.org, or add an apt source that has it.",
            )
        if self.version is None:
            return found[max(found, key=functools.cmp_to_key(_compared))]
        if self.version not in found:
            raise self.error(
                f"cannot be resolved: the apt sources of this machine have only {', '.join(sorted(found))}",
                "Use one of these versions, or add https://snapshot.debian.org as an apt source.",
            )
        return found[self.version]

    def _listing(self, apt: _Apt) -> bytes:
        """Return the stanzas of the source package, or nothing if it is unknown.

        Raises:
            ProgramError: apt cannot read its lists.
        """
        try:
            return apt.run("apt-cache", "showsrc", "--only-source", "--", self.package)
        except ProgramError:
            apt.run("apt-cache", "gencaches")  # showsrc exits with the same status for an unknown package
            return b""

    def _write_tar(self, out: BinaryIO, pin: DebianPin, cache: Path, scratch: Path) -> None:
        from . import deterministic_tar  # not at the top: declaring a source must be cheap

        if not shutil.which("dpkg-source"):
            raise self.error("cannot be unpacked: dpkg-source is not installed", install_hint(["dpkg-source"]))
        downloads = scratch / "downloads"
        downloads.mkdir()
        self._download(pin, cache, downloads)
        for name, expected in pin.entry.files.items():
            if not (downloads / name).is_file():
                raise self.error(f"cannot be fetched: apt did not download {name}", APT_UPDATE)
            actual = sha256_of(downloads / name)
            if actual != expected:
                raise self.error(
                    f"does not match its pin: the SHA-256 of {name} is {actual}, not {expected}",
                    "Check the apt sources of this machine, then run `gamebear lock --update`.",
                )
        unpacked = scratch / "tree"
        try:
            run(["dpkg-source", "--no-copy", "--extract", downloads / pin.entry.dsc, unpacked], cwd=scratch)
        except ProgramError as error:
            hint = error.hint or room_hint(scratch) or "Upgrade dpkg-dev: `sudo apt install dpkg-dev`."
            raise self.error(f"cannot be unpacked: {error.reason}", hint) from error
        try:
            deterministic_tar.write(
                out, deterministic_tar.from_folder(unpacked), _changed(unpacked / "debian" / "changelog")
            )
        except deterministic_tar.TreeError as error:
            raise self.error(f"cannot be used: {error}", REPORT) from error

    def _download(self, pin: DebianPin, cache: Path, folder: Path) -> None:
        """Download the files with apt, which verifies them against the lists signed by Debian."""
        get = ("apt-get", "source", "--quiet", "--download-only", "--only-source", "--")
        wanted = f"{pin.package}={pin.entry.version}"
        with self._apt(cache) as apt:
            if apt.updated:
                with contextlib.suppress(ProgramError):
                    apt.run(*get, wanted, cwd=folder)
                    return
            failures = apt.update()
            try:
                apt.run(*get, wanted, cwd=folder)
            except ProgramError as error:
                raise self.error(
                    f"cannot be fetched: version {pin.entry.version}: {failures or error.reason}",
                    APT_UPDATE
                    if failures
                    else "Pin the current version (`gamebear lock --update`), or add https://snapshot.debian.org "
                    "as an apt source.",
                ) from error

    @contextlib.contextmanager
    def _apt(self, cache: Path) -> Iterator[_Apt]:
        if not shutil.which("apt-get"):
            raise self.error("cannot be used: apt is not installed", NO_APT)
        root = cache / "apt" / (file_name(self.suite) if self.suite else "=all")
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if shutil.disk_usage(root).free < SPACE:
            raise self.error(f"needs {SPACE >> 20} MiB for the lists of apt", f"Make room in {root}.")
        with locked(root / ".lock"):
            os.utime(root)  # garbage collection uses the time of last use
            sources, suites = apt_sources(self.suite)
            if not sources:
                raise self.error(
                    f"cannot be resolved: no apt source of this machine has the suite {self.suite}"
                    if self.suite
                    else "cannot be resolved: this machine has no apt sources",
                    f"Use one of the suites {', '.join(suites)}." if suites else "Add one: see sources.list(5).",
                )
            yield _Apt(root, sources)


class _Apt:
    """An apt with private state, cache and sources."""

    def __init__(self, root: Path, sources: Mapping[str, str]) -> None:
        """Create or update the folder.

        Args:
            root: The folder.
            sources: Text of each apt sources file, by name.
        """
        self.root = root
        for name in ("state/lists/partial", "cache/archives/partial", "sources"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for path in (root / "sources").iterdir():
            if path.name not in sources:
                remove(path)
        for name, text in sources.items():
            self._write(f"sources/{name}", text)
        self._write("status", "")
        # apt reads $APT_CONFIG, then the system's apt.conf.d, then Dir::Etc::main. Setting the latter to last.conf
        # overrides the system's settings, but keeps its proxies, certificates and so on.
        user_file = os.environ.get("APT_CONFIG")
        main = system_setting("Dir::Etc::main/f")
        self._write("first.conf", f'{_include(user_file)}Dir::Etc::main "{root}/last.conf";\n')
        self._write(
            "last.conf",
            f"""{_include(main)}
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Sandbox::User "root";
Acquire::Languages "none";
Dir::State "{root}/state";
Dir::State::lists "lists/";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
Dir::Cache::archives "archives/";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{root}/sources";
""",
        )

    @property
    def updated(self) -> bool:
        """Whether the lists have been downloaded since the sources were last changed."""
        return (self.root / "updated").exists()

    def run(self, *argv: str, cwd: Path | None = None) -> bytes:
        """Run a program of apt.

        Raises:
            ProgramError: It failed.
        """
        return run(argv, env={**os.environ, "LC_ALL": "C", "APT_CONFIG": str(self.root / "first.conf")}, cwd=cwd)

    def update(self) -> str:
        """Download the lists of source packages. Return the reason of the first failure, or an empty string."""
        try:
            self.run("apt-get", "--quiet", "--option", "APT::Update::Error-Mode=any", "update")
        except ProgramError as error:
            failures = [line.removeprefix("E: ") for line in error.output.splitlines() if line.startswith("E: ")]
            return failures[0] if failures else error.reason
        (self.root / "updated").touch()
        return ""

    def _write(self, name: str, text: str) -> None:
        path = self.root / name
        if not path.is_file() or path.read_text(encoding="utf-8", errors="surrogateescape") != text:
            remove(self.root / "updated")
            write_bytes(path, text.encode("utf-8", "surrogateescape"))


def _include(path: str | None) -> str:
    return f'#include "{path}";\n' if path and Path(path).is_file() and Path(path).stat().st_size else ""


def system_setting(name: str) -> str:
    """Return a setting of this machine's apt, such as `Dir::Etc::sourceparts/d`, or an empty string if unset."""
    text = run(["apt-config", "shell", "VALUE", name]).decode(errors="surrogateescape")
    return (shlex.split(text) or [""])[0].removeprefix("VALUE=")


def apt_sources(suite: str | None) -> tuple[dict[str, str], list[str]]:
    """Return this machine's apt sources, converted to source packages.

    Args:
        suite: Restrict the result to this suite.

    Returns:
        The text of each file by name, and the names of all suites.
    """
    texts: dict[str, str] = {}
    suites: set[str] = set()
    paths = [Path(system_setting("Dir::Etc::sourcelist/f"))]
    with contextlib.suppress(OSError):
        paths += sorted(Path(system_setting("Dir::Etc::sourceparts/d")).iterdir())
    for path in paths:
        if not is_file_of_sources(path):
            continue
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        converted, found = for_sources(text, path.suffix, suite)
        suites |= found
        if converted:
            name = path.name if path.name not in texts else f"{len(texts)}-{path.name}"  # sources.list.d/sources.list
            texts[name] = converted
    return texts, sorted(suites)


def for_sources(text: str, suffix: str, suite: str | None) -> tuple[str, set[str]]:
    """Convert an apt sources file to source packages.

    Args:
        text: Content of the file.
        suffix: Suffix of the file's name, which determines the format.
        suite: Restrict the result to this suite.

    Returns:
        The new text, and the suites of the original one.
    """
    suites: set[str] = set()
    kept: list[Source] = []
    for source in parse(text, suffix):
        uris = tuple(uri for uri in source.uris if not uri.lower().startswith("cdrom:"))
        if not uris:
            continue
        suites.update(source.suites)
        if suite is not None and suite not in source.suites:
            continue
        options = {name: value for name, value in source.options.items() if not BINARY_ONLY.fullmatch(name)}
        chosen = source.suites if suite is None else (suite,)
        kept.append(source._replace(types=("deb-src",), uris=uris, suites=chosen, options=options))
    return text_of(kept), suites


FIRST_ENTRY = 1 << 20
"""Maximum bytes of a changelog that are searched for its first entry."""

FIELD = r"(?m)^(Package|Version|Checksums-Sha256):(.*(?:\n .*)*)"
"""Pattern of a field in a stanza of a list of source packages."""


def entries(listing: str, package: str) -> dict[str, DebianEntry]:
    """Parse the output of `apt-cache showsrc`.

    Returns:
        The entry of each version, ignoring those without SHA-256.

    Raises:
        SourceError: Files of the same version differ.
    """
    found: dict[str, DebianEntry] = {}
    for stanza in listing.split("\n\n"):
        fields: dict[str, str] = dict(re.findall(FIELD, stanza))
        if fields.get("Package", "").strip() != package:
            continue
        files = {
            words[2]: words[0].lower()
            for words in (line.split() for line in fields.get("Checksums-Sha256", "").splitlines())
            if len(words) == 3 and is_sha256(words[0].lower()) and is_file_name(words[2])
        }
        version = fields.get("Version", "").strip()
        if not version or sum(name.endswith(".dsc") for name in files) != 1:
            continue
        entry = DebianEntry(version, files)
        if found.setdefault(version, entry) != entry:
            raise SourceError(
                f"debian source {package} is ambiguous: the apt sources of this machine have two versions {version}.",
                "Select one: debian(…, suite=…).",
            )
    return found


def _compared(one: str, other: str) -> int:
    """Compare two versions according to Debian's policy; a `cmp` function."""
    for operator, result in (("lt", -1), ("gt", 1)):
        with contextlib.suppress(ProgramError):
            run(["dpkg", "--compare-versions", one, operator, other])
            return result
    return 0


def _changed(changelog: Path) -> int:
    """Return the time of a changelog's first entry, in seconds since 1970, or 0 if there is none."""
    import email.utils

    with contextlib.suppress(OSError, ValueError, TypeError), changelog.open("rb") as file:
        start = file.read(FIRST_ENTRY).decode("utf-8", "replace")
        match = re.search(r"^ -- .*>  ?(.+)$", start, re.MULTILINE)
        if match:
            return int(email.utils.parsedate_to_datetime(match[1].strip()).timestamp())
    return 0
