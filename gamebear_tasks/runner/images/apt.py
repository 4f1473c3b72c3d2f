"""The builder's own apt, run for a container: package lists, installation plan, package downloads.

A container's own apt can do the same, but is ten times slower in an emulated container. Only dpkg must run in
the container, because of the packages' maintainer scripts. The container's configuration decides: its sources, keys,
preferences, architectures and installed packages are copied out first. Apt features that are not reproduced here (a
hook after an update, for example) raise `Unfit`, and the container's own apt is the fallback.

The store caches packages by SHA-256, for all images and architectures.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..host.rootfs import Rootfs
from ..host.subprocesses import captured, last_lines, streamed
from ..util.atomic_files import is_file_name, is_sha256, sha256_of
from ..util.errors import RunnerError
from . import sources_list
from .sources_list import Source

POOL = "debs"
"""Folder of the store that caches packages, each under its SHA-256."""

POOL_LIMIT = 1 << 30
"""Bytes that the cached packages may use; the least recently used are removed first."""

TAKEN = re.compile(
    r"APT::(?:Default-Release|Install-Suggests)|DPkg::Options::"
    r"|Acquire::(?:Retries|Check-Valid-Until|Check-Date|(?:Max|Min)-ValidTime|By-Hash|PDiffs|ForceIPv[46]"
    r"|(?:https?|ftp)::(?:Proxy|Timeout|Dl-Limit|Pipeline-Depth|No-Cache|No-Store|Max-Age)(?:::[\w.-]+)?)",
    re.IGNORECASE,
)
"""Settings of the container's apt that are applied here as well."""

LEFT = re.compile(
    r"APT::(?:NeverAutoRemove|VersionedKernelPackages|Never-MarkAuto-Sections|Move-Autobit-Sections|Architectures"
    r"|AutoRemove|Install-Recommends|Periodic|Update::Post-Invoke(?:-Success)?)(?:::.*)?"
    r"|DPkg::Post-Invoke(?:::)?|DPkg::Pre-Install-Pkgs(?:::)?|Dir::Cache::(?:src)?pkgcache"
    r"|Acquire::(?:Languages|GzipIndexes|CompressionTypes)(?:::.*)?",
    re.IGNORECASE,
)
"""Settings of the container's apt that do not affect the installed packages; hooks among them must match `HARMLESS`."""

HARMLESS = re.compile(r"rm -f [/\w.* -]+(?:\|\| true)?|/usr/sbin/dpkg-preconfigure --apt \|\| true")
"""Hooks in Debian's images that have no effect here: they remove caches or ask debconf's questions early."""


class Unfit(Exception):
    """The builder's apt cannot be used, for this reason; the container's own apt is the fallback."""


class AptError(RunnerError):
    """Apt failed.

    Args:
        status: Its exit status.
        said: Its output.
    """

    def __init__(self, status: int, said: str) -> None:
        super().__init__(
            last_lines(said) or f"apt-get failed with status {status}",
            "Check the names of the packages, and that the builder reaches its mirror.",
        )
        self.status = status
        self.said = said


class Package(NamedTuple):  # NamedTuple, not a dataclass: see `capabilities.Facts`
    """A package to install.

    Attributes:
        name: Name without the architecture.
        version: Version, as dpkg reports it.
        arch: Architecture; `all` for a package that fits every one.
    """

    name: str
    version: str
    arch: str

    @property
    def file(self) -> str:
        """Name of the file that apt downloads the package to."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.arch}.deb"

    @property
    def dpkg_name(self) -> str:
        """Unambiguous name for dpkg."""
        return self.name if self.arch == "all" else f"{self.name}:{self.arch}"


class Plan(NamedTuple):
    """An installation that apt has planned.

    Attributes:
        command: Arguments of apt-get.
        steps: Steps for dpkg, in order: `unpack` or `configure`, and the packages.
        sha256: SHA-256 of each package, by file name.
    """

    command: tuple[str, ...]
    steps: tuple[tuple[str, tuple[Package, ...]], ...]
    sha256: Mapping[str, str]

    @property
    def packages(self) -> list[Package]:
        """All packages, in the order in which they are unpacked."""
        return [package for step, packages in self.steps if step == "unpack" for package in packages]


class Apt:
    """The builder's apt with the settings and the installed packages of one container.

    Args:
        folder: An empty folder for its exclusive use.
        pool: Folder that caches packages.
        rootfs: The container's file system.
        environment: Environment of the programs that it runs.

    Raises:
        Unfit: The builder has no apt, or its apt would not do the same as the container's.

    Attributes:
        arch: Debian's name of the container's architecture.
        debs: Folder of the packages that `fetch` prepared.
        dpkg_options: Additional options of dpkg from the container's settings.
    """

    def __init__(self, folder: Path, pool: Path, rootfs: Rootfs, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.pool = pool
        self.debs = folder / "debs"
        self.environment = {**environment, "LC_ALL": "C", "APT_CONFIG": str(folder / "apt.conf")}
        if not all(shutil.which(program, path=environment["PATH"]) for program in ("apt-get", "apt-config")):
            raise Unfit("apt is not installed on the builder")
        if re.search(r'["\\\s,\]]', str(folder)):
            raise Unfit(f"apt.conf cannot contain the path {folder}")
        for name in ("cache/archives/partial", "debs", "lists/partial", "none/apt.conf.d", "all/apt.conf.d", "state"):
            (folder / name).mkdir(parents=True)
        for name in ("apt.conf.d", "auth.conf.d", "keys", "preferences.d", "sources.list.d", "trusted.gpg.d"):
            (folder / "etc" / name).mkdir(parents=True)
        pool.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_files(rootfs)
        self.dpkg_options: list[str] = []
        self._configure()

    # settings

    def _take_files(self, rootfs: Rootfs) -> None:
        """Copy apt's and dpkg's configuration and state out of the container."""
        taken = {
            "etc/apt/sources.list": "etc",
            "etc/apt/sources.list.d": "etc/sources.list.d",
            "etc/apt/trusted.gpg": "etc",
            "etc/apt/trusted.gpg.d": "etc/trusted.gpg.d",
            "etc/apt/preferences": "etc",
            "etc/apt/preferences.d": "etc/preferences.d",
            "etc/apt/auth.conf": "etc",
            "etc/apt/auth.conf.d": "etc/auth.conf.d",
            "etc/apt/apt.conf": "all",
            "etc/apt/apt.conf.d": "all/apt.conf.d",
            "var/lib/apt/extended_states": "state",
            "var/lib/dpkg/arch": ".",
            "var/lib/dpkg/status": ".",
        }
        try:
            for source, target in taken.items():
                with contextlib.suppress(FileNotFoundError):
                    rootfs.copy_out(source, self.folder / target)
            for path in [self.folder / "etc/sources.list", *sorted((self.folder / "etc/sources.list.d").iterdir())]:
                if sources_list.is_file_of_sources(path):
                    path.write_text(self._with_keys(path.read_text("utf-8", "replace"), path.suffix, rootfs))
        except OSError as error:
            raise Unfit(str(error)) from None

    def _with_keys(self, sources: str, suffix: str, rootfs: Rootfs) -> str:
        """Return the enabled sources of an apt sources file, with its key files replaced by copies.

        Raises:
            Unfit: The file has unusual syntax, or a source that is not http or https.
        """
        if re.search(r'[^\S \t\n]|[\x00-\x08\x0e-\x1f"]', sources) or re.search(r"(?i)\bsigned-by[+-]", sources):
            raise Unfit("the image's apt sources have an unusual syntax")  # apt might parse them differently
        found = sources_list.parse(sources, suffix)
        if not all(uri.lower().startswith(("http://", "https://")) for source in found for uri in source.uris):
            raise Unfit("the image has an apt source that is not http or https")
        return sources_list.text_of(self._with_copied_keys(source, rootfs) for source in found)

    def _with_copied_keys(self, source: Source, rootfs: Rootfs) -> Source:
        """Return a source that refers to copies of the container's key files."""
        keys = []
        for key in source.keys:
            if key.startswith("/"):
                number = len(list((self.folder / "etc/keys").iterdir()))
                copy = self.folder / f"etc/keys/{number}{Path(key).suffix}"
                rootfs.copy_out(key, copy)
                key = str(copy)
            keys.append(key)
        if not keys:
            return source
        separator = " " if source.deb822 else ","
        return source._replace(options={**source.options, "signed-by": separator.join(keys)})

    def _configure(self) -> None:
        """Write the configuration file for all programs of apt."""
        status = (self.folder / "status").read_text("utf-8", "replace") if (self.folder / "status").exists() else ""
        own = re.search(r"^Package: dpkg\n(?:.+\n)*?Architecture: ([a-z0-9-]+)$", status, re.MULTILINE)
        if not own:
            raise Unfit("dpkg is not installed in the image")
        self.arch = own.group(1)
        architectures = [self.arch]
        with contextlib.suppress(FileNotFoundError):
            architectures += [name for name in (self.folder / "arch").read_text().split() if name not in architectures]
        settings = [
            ("Dir", f"{self.folder}/"),
            ("Dir::Etc", "etc/"),
            ("Dir::State", "state/"),
            ("Dir::State::lists", f"{self.folder}/lists/"),
            ("Dir::State::status", f"{self.folder}/status"),
            ("Dir::Cache", "cache/"),
            ("Dir::Log", "log/"),
            ("APT::Architecture", architectures[0]),
            *(("APT::Architectures::", name) for name in architectures),
            ("APT::Get::Assume-Yes", "true"),
            ("APT::Sandbox::User", "root"),  # root of the namespace is the builder's own user
            ("Acquire::ForceHash", "SHA256"),
            ("Acquire::Languages", "none"),
            ("Acquire::Retries", "3"),
            *self._settings(),
        ]
        text = "".join(f'{name} "{value}";\n' for name, value in settings)
        (self.folder / "apt.conf").write_text(text)

    def _settings(self) -> list[tuple[str, str]]:
        """Return the container's apt settings that must be applied.

        Raises:
            Unfit: A setting is not in one of the lists above.
        """
        without, known = (set(self._dump(self.folder / name)) for name in ("none", "all"))
        found = []
        for line in sorted(known - without):
            name, _, value = line.partition(" ")
            value = value.strip().rstrip(";")[1:-1]
            if name.lower() in ("dir::etc::main", "dir::etc::parts") or not value:
                continue
            if TAKEN.fullmatch(name) and not re.search(r'["\\]', value):
                if name.lower() == "dpkg::options::":
                    self.dpkg_options.append(value)
                else:
                    found.append((name, value))
            elif not LEFT.fullmatch(name) or (("Invoke" in name or "Pkgs" in name) and not HARMLESS.fullmatch(value)):
                raise Unfit(f"the image has the apt setting {name}")
        return found

    def _dump(self, folder: Path) -> list[str]:
        """Return all settings that apt has with the configuration files of a folder."""
        first = folder / "first"
        first.write_text(f'Dir::Etc::main "{folder}/apt.conf";\nDir::Etc::parts "{folder}/apt.conf.d/";\n')
        # These options override the untrusted files. Otherwise apt-config would run the dpkg that they name, to query
        # the architectures, and they could change its output.
        command = ("apt-config", "dump", "--empty", '--format=%F "%v";%n')
        fixed = ("APT::Architectures::=all", "Dir::Bin::dpkg=/bin/false", "DPkg::Chroot-Directory=/")
        status, said, errors = captured(
            [*command, *(f"--option={setting}" for setting in fixed)], {**self.environment, "APT_CONFIG": str(first)}
        )
        if status:
            raise Unfit(last_lines(errors))
        return said.splitlines()

    # work

    def update(self, *options: str) -> tuple[int, str]:
        """Fetch the package lists; return apt's status and output, which is also logged."""
        return streamed(["apt-get", "--quiet", *options, "update"], self.environment)

    def refresh(self, rootfs: Rootfs) -> None:
        """Copy the list of installed packages out of the container again."""
        with contextlib.suppress(FileNotFoundError):
            rootfs.copy_out("var/lib/apt/extended_states", self.folder / "state")
        rootfs.copy_out("var/lib/dpkg/status", self.folder)

    def plan(self, packages: Sequence[str], recommends: bool, action: Sequence[str] = ("install",)) -> Plan:
        """Return the steps that install packages.

        Args:
            packages: Names of the packages.
            recommends: Whether to install recommended packages too.
            action: Command of apt-get, with options.

        Raises:
            AptError: The packages cannot be installed.
            Unfit: A package would have to be removed, or has no SHA-256.
        """
        # An explicit value instead of --no-install-recommends overrides the base's own configuration in both cases.
        option = f"--option=APT::Install-Recommends={'true' if recommends else 'false'}"
        command = (option, *action, "--", *packages)
        said = self._said("--simulate", *command)
        steps: list[tuple[str, list[Package]]] = []
        for word, package in _planned(said):
            step = {"Inst": "unpack", "Conf": "configure"}.get(word)
            if step is None or package is None:
                raise Unfit(f"packages would be removed ({word})")
            if not steps or steps[-1][0] != step:
                steps.append((step, []))
            steps[-1][1].append(package)
        sha256 = {}
        uris = self._said("--print-uris", *command)
        for match in re.finditer(r"^'[^']*' (\S+) \d+ SHA256:([0-9a-f]{64})$", uris, re.MULTILINE):
            if not is_file_name(match.group(1)):
                raise Unfit(f"a package's file name is invalid: {match.group(1)!r}")
            sha256[match.group(1)] = match.group(2)
        plan = Plan(command, tuple((step, tuple(each)) for step, each in steps), sha256)
        missing = [package.file for package in plan.packages if package.file not in sha256]
        if missing:
            raise Unfit(f"{missing[0]} has no SHA-256")
        return plan

    def outdated(self) -> set[str]:
        """Return the names of the packages that an upgrade would replace or remove.

        Raises:
            AptError: apt failed.
        """
        said = self._said("--simulate", "dist-upgrade")
        return {match.group(1) for match in re.finditer(r"^(?:Inst|Remv) ([^\s:]+)(?::\S+)? \[", said, re.MULTILINE)}

    def _said(self, *arguments: str) -> str:
        status, said, errors = captured(["apt-get", "--quiet", *arguments], self.environment)
        if status:
            raise AptError(status, said + errors)
        return said

    def runs(self, *arguments: str) -> bool:
        """Return whether apt-get succeeds with some arguments, without output."""
        return captured(["apt-get", "--quiet", *arguments], self.environment)[0] == 0

    def fetch(self, plan: Plan, unpacked: bool) -> None:
        """Download all packages of a plan into `debs`, each verified against its SHA-256.

        Args:
            plan: The plan.
            unpacked: Store the packages uncompressed, because decompression is faster here than in an emulated
                container.

        Raises:
            AptError: A package cannot be downloaded, or its content is wrong.
        """
        from concurrent.futures import ThreadPoolExecutor  # deferred: slow to import, and most builds never need it

        archives = self.folder / "cache/archives"
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            list(threads.map(lambda file: self._take(plan.sha256[file], archives / file), plan.sha256))
            # Runs even if every package is cached: this command rejects packages that the container's keys do not
            # authenticate.
            status, said = streamed(["apt-get", "--quiet", "--download-only", *plan.command], self.environment)
            if status:
                raise AptError(status, said)
            list(threads.map(lambda file: self._keep(archives / file, plan.sha256[file]), plan.sha256))
            list(threads.map(lambda file: self._lay(archives / file, unpacked), plan.sha256))

    def _take(self, sha256: str, archive: Path) -> None:
        """Link a package from the pool, or remove it there if it is damaged."""
        kept = self.pool / sha256
        with contextlib.suppress(FileNotFoundError):
            if sha256_of(kept) == sha256:
                os.utime(kept)
                os.link(kept, archive)
            else:
                kept.unlink()

    def _keep(self, archive: Path, sha256: str) -> None:
        """Verify a downloaded package and add it to the pool.

        Raises:
            AptError: The package is missing, or differs from the package list.
        """
        if not archive.exists() or sha256_of(archive) != sha256:
            raise AptError(1, f"E: {archive.name} does not match its SHA-256 in the package list")
        with contextlib.suppress(FileExistsError):
            os.link(archive, self.pool / sha256)

    def _lay(self, archive: Path, unpacked: bool) -> None:
        if not unpacked or not _unpack(archive, self.debs / archive.name):
            os.link(archive, self.debs / archive.name)


def _planned(said: str) -> Iterable[tuple[str, Package | None]]:
    """Yield each step of a simulation, with the package if it is to be installed."""
    for line in said.splitlines():
        match = re.match(r"(Inst|Conf|Remv|Purg) (\S+)(?: \[[^\]]*\])?(?: \((\S+) .*\[([a-z0-9-]+)\]\))?", line)
        if match:
            word, name, version, arch = match.groups()
            yield word, Package(name.partition(":")[0], version, arch) if version else None


class _Member(io.RawIOBase):
    """The next bytes of a file, as a file object."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.file.read(min(len(buffer), self.left))
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)


def _unpack(source: Path, target: Path) -> bool:
    """Rewrite a Debian package with its members uncompressed; return False for an unknown compression.

    The format is described in deb(5): an `ar` archive of `debian-binary`, `control.tar.*` and `data.tar.*`.

    Raises:
        AptError: The file is not a Debian package.
    """
    from gzip import GzipFile  # deferred: slow to import on a small machine, used with emulation only
    from lzma import LZMAFile

    with source.open("rb") as file, target.open("xb") as out:
        if file.read(8) != b"!<arch>\n":
            raise AptError(1, f"E: {source.name} is not a Debian package")
        out.write(b"!<arch>\n")
        while header := file.read(60):
            stem, suffix = os.path.splitext(header[:16].decode("ascii").rstrip(" /"))
            begin, size, place = file.tell(), int(header[48:58]), out.tell()
            if suffix == ".tar":
                stem, suffix = f"{stem}.tar", ""
            if suffix not in ("", ".gz", ".xz"):
                target.unlink()
                return False
            content = io.BufferedReader(_Member(file, size), 1 << 20)
            out.write(header)
            with {"": content, ".gz": GzipFile(fileobj=content), ".xz": LZMAFile(content)}[suffix] as unpacked:
                shutil.copyfileobj(unpacked, out, 1 << 20)
            written = out.tell() - place - 60
            out.write(b"\n" * (written % 2))
            out.seek(place)
            out.write(f"{stem:16}".encode() + header[16:48] + f"{written:<10}".encode() + header[58:])
            out.seek(0, io.SEEK_END)
            file.seek(begin + size + size % 2)
    return True


def trim(pool: Path, older: float | None = None, limit: int = POOL_LIMIT) -> int:
    """Remove cached packages, the least recently used first, until the rest uses at most `limit` bytes.

    Args:
        pool: Folder that caches packages.
        older: Also remove packages that were last used before this time, in seconds since 1970.
        limit: Limit in bytes.

    Returns:
        The number of bytes that were freed.
    """
    kept = []
    with contextlib.suppress(FileNotFoundError):
        for path in pool.iterdir():
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                if is_sha256(path.name):
                    kept.append((about.st_mtime, about.st_blocks * 512, path))
    total = sum(size for _, size, _ in kept)
    freed = 0
    for used, size, path in sorted(kept):
        if total - freed > limit or (older is not None and used < older):
            path.unlink(missing_ok=True)
            freed += size
    return freed
