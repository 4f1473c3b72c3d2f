"""The builder's apt installs packages into a container: real apt, local repository."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gamebear_tasks.runner.host.rootfs import Rootfs
from gamebear_tasks.runner.images import apt
from gamebear_tasks.runner.images.apt import Apt, AptError, Package, Unfit, trim
from gamebear_tasks.runner.images.package_images import _missing, _Step

INSTALLED = """\
Package: dpkg
Status: install ok installed
Architecture: armhf
Maintainer: Nobody <nobody@example.com>
Version: 1.21
Description: it is here already

"""


def make_package(folder: Path, name: str, *, needs: str = "", arch: str = "armhf", compression: str = "xz") -> Path:
    """Create a Debian package with one file and a script."""
    tree = folder / f"{name}-tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr").mkdir()
    (tree / "usr" / name).write_text(name * 1000)
    fields = {"Package": name, "Version": "1:2-3", "Architecture": arch, "Maintainer": "A <a@example.com>"}
    fields |= {"Depends": needs} if needs else {}
    text = "".join(f"{key}: {value}\n" for key, value in fields.items())
    (tree / "DEBIAN/control").write_text(f"{text}Description: a test\n")
    (tree / "DEBIAN/postinst").write_text("#!/bin/sh\n")
    (tree / "DEBIAN/postinst").chmod(0o755)
    made = folder / f"{name}.deb"
    command = ["dpkg-deb", "--root-owner-group", f"-Z{compression}", "--build", str(tree), str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


class Repository:
    """A flat repository that records requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.url = ""

    def publish(self) -> None:
        """Write the index of the packages in the folder."""
        text = ""
        for path in sorted(self.folder.glob("*.deb")):
            fields = subprocess.run(["dpkg-deb", "--field", path], check=True, capture_output=True, text=True).stdout
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            text += f"{fields}Filename: ./{path.name}\nSize: {path.stat().st_size}\nSHA256: {digest}\n\n"
        (self.folder / "Packages.gz").write_bytes(gzip.compress(text.encode()))

    def downloads(self) -> list[str]:
        """Return the requested packages."""
        return [name for name in self.asked if name.endswith(".deb")]


class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, repository: Repository, *args: Any) -> None:
        self.repository = repository
        super().__init__(*args, directory=str(repository.folder))

    def do_GET(self) -> None:
        self.repository.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def repository(system: None, tmp_path: Path) -> Iterator[Repository]:
    folder = tmp_path / "repository"
    folder.mkdir()
    made = Repository(folder)
    make_package(folder, "needed")
    make_package(folder, "tool", needs="needed")
    make_package(folder, "common", arch="all")
    made.publish()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, made)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield made
        server.shutdown()


@pytest.fixture
def root(system: None, tmp_path: Path) -> Path:
    """The files of a container that apt reads."""
    folder = tmp_path / "root"
    for name in ("etc/apt/apt.conf.d", "etc/apt/sources.list.d", "var/lib/dpkg"):
        (folder / name).mkdir(parents=True)
    (folder / "var/lib/dpkg/status").write_text(INSTALLED)
    return folder


def opened(root: Path, number: int = 1) -> Apt:
    folder = root.parent / f"apt-{number}"
    folder.mkdir()
    return Apt(folder, root.parent / "pool", Rootfs(root), dict(os.environ))


def ready(root: Path, repository: Repository, number: int = 1) -> Apt:
    """Return apt with the repository's list."""
    (root / "etc/apt/sources.list").write_text(f"deb [trusted=yes] {repository.url} ./\n")
    found = opened(root, number)
    status, output = found.update()
    assert status == 0, output
    return found


# Container


def test_the_containers_architecture_and_packages_decide_what_is_installed(root: Path, repository: Repository) -> None:
    plan = ready(root, repository).plan(["tool", "common"], recommends=False)
    assert set(plan.packages) == {
        Package("needed", "1:2-3", "armhf"),
        Package("tool", "1:2-3", "armhf"),
        Package("common", "1:2-3", "all"),
    }
    names = [package.name for package in plan.packages]
    assert names.index("needed") < names.index("tool")
    assert {word for word, _ in plan.steps} == {"unpack", "configure"}


def test_installed_packages_are_not_installed_again(root: Path, repository: Repository) -> None:
    more = INSTALLED + INSTALLED.replace("dpkg", "needed").replace("1.21", "1:2-3")
    (root / "var/lib/dpkg/status").write_text(more)
    assert [package.name for package in ready(root, repository).plan(["tool"], False).packages] == ["tool"]


def test_a_missing_package_is_an_error_of_apt(root: Path, repository: Repository) -> None:
    with pytest.raises(AptError) as caught:
        ready(root, repository).plan(["no-such"], False)
    assert "E: Unable to locate package no-such" in caught.value.said


def test_packages_without_a_candidate_are_found_without_reading_apts_messages(
    root: Path, repository: Repository
) -> None:
    make_package(repository.folder, "broken", needs="absent")
    make_package(repository.folder, "provider", needs="needed\nProvides: virtual")
    repository.publish()
    apt = ready(root, repository)
    wanted = ["tool=2", "tool=1:2-3", "no-such", "common", "needed/no-suite", "broken", "absent", "virtual"]
    steps = [_Step(("install",), tuple(wanted)), _Step(("build-dep",), ("no-source", "/a/folder"))]
    missing = ["absent", "needed/no-suite", "no-such", "tool=2", "src:no-source"]
    assert _missing(apt.runs, steps) == missing


def test_removals_are_left_to_the_containers_apt(root: Path, repository: Repository) -> None:
    old = INSTALLED.replace("dpkg", "rival").replace("1.21", "1\nConflicts: tool")
    (root / "var/lib/dpkg/status").write_text(INSTALLED + old)
    with pytest.raises(Unfit, match="remove"):
        ready(root, repository).plan(["tool"], False)


def test_upgradable_packages_are_detected(root: Path, repository: Repository) -> None:
    (root / "var/lib/dpkg/status").write_text(INSTALLED + INSTALLED.replace("dpkg", "needed"))
    assert ready(root, repository).outdated() == {"needed"}


def test_an_unsigned_packages_list_is_rejected(root: Path, repository: Repository) -> None:
    (root / "etc/apt/sources.list").write_text(f"deb {repository.url} ./\n")
    status, output = opened(root).update()
    assert status != 0
    assert "does not have a Release file" in output


# Settings


def test_a_containers_own_settings_count(root: Path) -> None:
    (root / "etc/apt/apt.conf.d/50own").write_text(
        'Acquire::http::Proxy "http://127.0.0.1:9";\nDPkg::Options { "--force-confold"; };\n'
    )
    found = opened(root)
    assert 'Acquire::http::Proxy "http://127.0.0.1:9";' in (found.folder / "apt.conf").read_text()
    assert found.dpkg_options == ["--force-confold"]


def test_apt_settings_of_docker_images_are_supported(root: Path) -> None:
    (root / "etc/apt/apt.conf.d/docker-clean").write_text(
        'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };\n'
        'APT::Update::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };\n'
        'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";\n'
    )
    opened(root)


@pytest.mark.parametrize(
    "setting",
    [
        'DPkg::Post-Invoke { "touch OUTSIDE"; };',
        'APT::Update::Pre-Invoke { "touch OUTSIDE"; };',
        'Acquire::http::Proxy-Auto-Detect "/bin/proxy";',
        'Dir::Bin::methods "/methods";',
        'APT::Architecture "s390x";',
    ],
)
def test_unknown_settings_are_left_to_the_containers_apt(
    root: Path, repository: Repository, tmp_path: Path, setting: str
) -> None:
    outside = tmp_path / "outside"
    (root / "etc/apt/apt.conf.d/50own").write_text(setting.replace("OUTSIDE", str(outside)))
    with pytest.raises(Unfit, match=setting.split()[0]):
        ready(root, repository)
    assert not outside.exists()


def test_nothing_that_an_image_names_runs_outside_of_it(root: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    (root / "etc/apt/apt.conf.d/99trap").write_text(
        f'Dir::Bin::dpkg "/bin/sh";\nDPkg::Options {{ "-c"; "touch {trap}"; }};\nAPT::Config::Dump::Format "";\n'
    )
    with contextlib.suppress(Unfit):
        opened(root)
    assert not trap.exists()


@pytest.mark.parametrize(
    "source",
    [
        "deb\x0bfile:/srv bookworm main",
        'deb [a="] http://ok "] file:/srv bookworm main',
        "deb [signed-by+=/k] http://x y z",
    ],
)
def test_ambiguous_sources_are_left_to_the_containers_apt(root: Path, source: str) -> None:
    (root / "etc/apt/sources.list").write_text(f"{source}\n")
    with pytest.raises(Unfit, match="unusual"):
        opened(root)


@pytest.mark.parametrize("source", ["deb [trusted=yes] file:/srv ./", "deb cdrom:[Debian]/ bookworm main"])
def test_local_sources_are_left_to_the_containers_apt(root: Path, source: str) -> None:
    (root / "etc/apt/sources.list").write_text(f"{source}\n")
    with pytest.raises(Unfit, match="not http or https"):
        opened(root)


@pytest.mark.parametrize("deb822", [False, True], ids=["one line", "deb822"])
def test_keys_of_the_container_are_used(root: Path, deb822: bool) -> None:
    (root / "etc/own.gpg").write_bytes(b"its key")
    if deb822:
        text = "Types: deb\nURIs: http://127.0.0.1:9/\nSuites: x\nComponents: main\nSigned-By: /etc/own.gpg\n"
        (root / "etc/apt/sources.list.d/own.sources").write_text(text)
    else:
        (root / "etc/apt/sources.list").write_text("deb [signed-by=/etc/own.gpg] http://127.0.0.1:9/ x main\n")
    copies = list((opened(root).folder / "etc/keys").iterdir())
    assert [path.read_bytes() for path in copies] == [b"its key"]


def test_an_inline_key_is_retained_and_a_disabled_source_needs_no_key(root: Path) -> None:
    key = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n /etc/own.gpg\n -----END PGP PUBLIC KEY BLOCK-----"
    source = "Types: deb\nURIs: http://127.0.0.1:9/\nSuites: x\nComponents: main\nSigned-By: "
    off = f"{source.replace('http://127.0.0.1:9/', 'cdrom:[x]/')}/nowhere.gpg\nEnabled: off\n"
    (root / "etc/apt/sources.list.d/own.sources").write_text(f"{source}\n {key}\n\n{off}")
    folder = opened(root).folder
    assert list((folder / "etc/keys").iterdir()) == []
    assert (folder / "etc/sources.list.d/own.sources").read_text() == f"{source}\n {key}\n"


def test_several_keys_are_copied(root: Path) -> None:
    for name in ("a", "b"):
        (root / f"etc/{name}.gpg").write_bytes(name.encode())
    (root / "etc/apt/sources.list").write_text(
        "deb [signed-by=/etc/a.gpg,AB12!,/etc/b.gpg] http://127.0.0.1:9/ x main\n"
    )
    folder = opened(root).folder
    copies = f"{folder}/etc/keys/0.gpg,AB12!,{folder}/etc/keys/1.gpg"
    text = f"deb [signed-by={copies}] http://127.0.0.1:9/ x main\n"
    assert (folder / "etc/sources.list").read_text() == text
    assert [(folder / f"etc/keys/{number}.gpg").read_text() for number in (0, 1)] == ["a", "b"]


def test_keys_that_only_the_builder_has_do_not_count(root: Path, tmp_path: Path) -> None:
    (tmp_path / "builders.gpg").write_bytes(b"not its key")
    (root / "etc/apt/sources.list").write_text(f"deb [signed-by={tmp_path}/builders.gpg] http://127.0.0.1:9/ x main\n")
    with pytest.raises(Unfit, match="builders"):
        opened(root)


def test_an_image_without_dpkg_is_left_alone(root: Path) -> None:
    (root / "var/lib/dpkg/status").unlink()
    with pytest.raises(Unfit, match="dpkg is not installed"):
        opened(root)


# Packages


def test_a_package_is_downloaded_once(root: Path, repository: Repository) -> None:
    for number in (1, 2):
        found = ready(root, repository, number)
        found.fetch(found.plan(["tool"], False), unpacked=False)
        assert {path.name for path in found.debs.iterdir()} == {"needed_1%3a2-3_armhf.deb", "tool_1%3a2-3_armhf.deb"}
    assert sorted(repository.downloads()) == ["/./needed.deb", "/./tool.deb"]


def test_a_damaged_cached_package_is_downloaded_again(root: Path, repository: Repository) -> None:
    found = ready(root, repository)
    found.fetch(found.plan(["common"], False), unpacked=False)
    (kept,) = found.pool.iterdir()
    kept.write_bytes(b"damaged")
    again = ready(root, repository, 2)
    again.fetch(again.plan(["common"], False), unpacked=False)
    (placed,) = again.debs.iterdir()
    assert placed.read_bytes() == kept.read_bytes() == (repository.folder / "common.deb").read_bytes()


def test_a_package_with_the_wrong_hash_is_rejected(root: Path, repository: Repository) -> None:
    found = ready(root, repository)
    plan = found.plan(["common"], False)
    damaged = repository.folder / "common.deb"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(AptError):
        found.fetch(plan, unpacked=False)
    assert not list(found.pool.iterdir())


@pytest.mark.system
@pytest.mark.parametrize("compression", ["gzip", "xz", "none"])
def test_a_package_without_its_compression_is_the_same_package(tmp_path: Path, compression: str) -> None:
    package = make_package(tmp_path, "tool", compression=compression)
    assert apt._unpack(package, tmp_path / "unpacked.deb")
    for part in ("--fsys-tarfile", "--ctrl-tarfile"):
        contents = [
            subprocess.run(["dpkg-deb", part, path], check=True, capture_output=True).stdout
            for path in (package, tmp_path / "unpacked.deb")
        ]
        assert contents[0] == contents[1]
    listed = subprocess.run(["ar", "t", tmp_path / "unpacked.deb"], check=True, capture_output=True, text=True).stdout
    assert listed.split() == ["debian-binary", "control.tar", "data.tar"]


@pytest.mark.system
def test_a_package_with_an_unknown_compression_is_unchanged(tmp_path: Path) -> None:
    package = make_package(tmp_path, "tool", compression="none")
    package.write_bytes(
        package.read_bytes().replace(b"data.tar ", b"data.tar.zst "[:9], 1).replace(b"data.tar", b"data.zst")
    )
    assert not apt._unpack(package, tmp_path / "unpacked.deb")
    assert not (tmp_path / "unpacked.deb").exists()


def test_cached_packages_are_bounded_and_expire(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / f"{number:064}"
        path.write_bytes(bytes(8192))
        os.utime(path, (number, number))
    size = path.stat().st_blocks * 512
    assert trim(tmp_path, limit=3 * size) == size
    assert trim(tmp_path, older=2.5) == 2 * size
    assert [path.name for path in tmp_path.iterdir()] == [f"{3:064}"]
    assert trim(tmp_path / "missing") == 0
