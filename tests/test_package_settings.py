"""Package images with sources, keys, pinned versions, snapshots and build dependencies of their own.

A real apt and dpkg, signed repositories on loopback, and a base with only dpkg.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_containers import Builder, Outcome

from gamebear_tasks.runner.host.buildah import ImageError, remove_tree
from gamebear_tasks.runner.host.rootfs import Rootfs
from gamebear_tasks.runner.images import apt_settings, package_images, sources_list
from gamebear_tasks.runner.images.apt_settings import Settings, build_dependencies

PROGRAMS = ("sh", "cat", "diff", "env", "rm", "dpkg", "dpkg-deb", "dpkg-split", "dpkg-trigger", "tar", "true")
APT = ("apt-get", "apt-config", "gpgv")
APT_KEY = (
    "awk",
    "base64",
    "cp",
    "head",
    "ln",
    "mv",
    "tail",
    "tr",
    "wc",
    "chmod",
    "cmp",
    "cut",
    "find",
    "grep",
    "mktemp",
    "readlink",
    "sed",
    "sort",
    "touch",
)
METHODS = ("copy", "file", "gpgv", "http", "store")

LINE = "deb http://127.0.0.1:9/ x main"
STANZA = "Types: deb\nURIs: http://127.0.0.1:9/\nSuites: x\nComponents: main\n"
KEY = b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nx\n"


# Tags


def tag(settings: Settings) -> str:
    return package_images._tag("id", "armhf", ["gcc"], False, settings)


def test_each_setting_is_part_of_the_tag_and_the_content_of_a_key_is() -> None:
    settings = [
        Settings(),
        Settings(sources=(LINE,)),
        Settings(sources=(LINE,), keys=(b"\x99a",)),
        Settings(sources=(LINE,), keys=(b"\x99b",)),
        Settings(snapshot="20260101T000000Z"),
        Settings(snapshot="20260102T000000Z"),
        Settings(build_dep="a"),
        Settings(build_dep="a", control="Build-Depends: b\n"),
    ]
    assert len({tag(each) for each in settings}) == len(settings)
    assert tag(Settings()) == package_images._tag("id", "armhf", ["gcc"], False)
    assert tag(Settings()) != package_images._tag("id", "armhf", ["gcc=1:2"], False)


def test_only_the_build_dependencies_of_a_control_file_count() -> None:
    first = "# a comment\nSource: hello\nBuild-Depends: a,\n# another\n b (>= 2) <!nocheck>\nBuild-Conflicts: c\n"
    rest = "\nPackage: hello\nBuild-Depends: not this\n"
    expected = ("hello", "Build-Conflicts: c\nBuild-Depends: a, b (>= 2) <!nocheck>\n")
    assert build_dependencies(f"\n{first}Standards-Version: 1\n{rest}") == expected
    assert build_dependencies(f"{first}Standards-Version: 2\n{rest}") == expected
    with pytest.raises(ValueError, match="no field Source"):
        build_dependencies("Package: x\n")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(sources=("http://127.0.0.1:9/ x main",)), "not an apt source"),
        (Settings(sources=("",)), "not an apt source"),
        (Settings(sources=(f"{LINE}\nnonsense",)), "not an apt source"),
        (Settings(sources=(STANZA.replace("Suites", "Suits"),)), "not an apt source"),
        (Settings(sources=(f"{STANZA}\nTypes: deb\n",)), "not an apt source"),
        (Settings(sources=("deb http://me:pw@127.0.0.1/ x main",)), "password"),
        (Settings(sources=(LINE,), keys=(b"-----BEGIN PGP PRIVATE KEY BLOCK-----",)), "not a public OpenPGP key"),
        (Settings(sources=(LINE,), keys=(b"\x95private",)), "not a public OpenPGP key"),
        (Settings(keys=(KEY,)), "keys without sources"),
        (Settings(snapshot="2026-01-01"), "20261101T000000Z"),
        (Settings(build_dep="-o=x"), "not the name of a Debian source package"),
    ],
)
def test_an_invalid_setting_is_an_error(settings: Settings, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        settings.check()


def test_valid_sources_are_accepted() -> None:
    Settings(sources=(f"# why\n{LINE}\n{LINE} contrib\n", f"# why\n{STANZA}\n{STANZA}"), keys=(KEY, b"\x98x")).check()


# The container's files


@pytest.fixture
def rootfs(tmp_path: Path) -> Iterator[tuple[Rootfs, Path]]:
    """A container's files, and their folder."""
    folder = tmp_path / "root"
    (folder / "etc/apt/sources.list.d").mkdir(parents=True)
    found = Rootfs(folder)
    yield found, folder / "etc/apt"
    found.close()


def test_keys_verify_the_sources_that_state_none(rootfs: tuple[Rootfs, Path], tmp_path: Path) -> None:
    root, folder = rootfs
    own = f"{STANZA}Signed-By: /own.gpg\n"
    apt_settings.apply(Settings(sources=(LINE, f"{STANZA}\n{own}"), keys=(KEY, b"\x99x")), root, tmp_path, "base")
    keys = sorted(path.name for path in (folder / "keyrings").iterdir())
    assert sorted((folder / "keyrings" / name).read_bytes() for name in keys) == sorted([KEY, b"\x99x"])
    assert {path.suffix for path in (folder / "keyrings").iterdir()} == {".asc", ".gpg"}
    found = {}
    for path in (folder / "sources.list.d").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
        found[path.suffix] = sources_list.parse(path.read_text(), path.suffix)
    (line,) = found[".list"]
    stanza, kept = found[".sources"]
    assert {Path(key).name for key in line.keys} == {Path(key).name for key in stanza.keys} == set(keys)
    assert kept.keys == ("/own.gpg",)


def test_a_snapshot_replaces_debians_archives(rootfs: tuple[Rootfs, Path], tmp_path: Path) -> None:
    root, folder = rootfs
    (folder / "sources.list").write_text(
        "deb http://deb.example/x bookworm main\ndeb [arch=amd64] http://s.example/ bookworm-security main contrib\n"
    )
    (folder / "sources.list.d/debian.sources").write_text(
        "Types: deb\nURIs: http://deb.example/debian\nSuites: trixie trixie-updates\nComponents: main\nSigned-By: /k\n"
    )
    for time in ("20250101T000000Z", "20260101T000000Z"):
        apt_settings.apply(Settings(snapshot=time), root, tmp_path, "base")
    base = f"http://snapshot.debian.org/archive/{{}}/{time}/"
    first, second = base.format("debian"), base.format("debian-security")
    assert (folder / "sources.list").read_text() == (
        f"deb [check-valid-until=no] {first} bookworm main\n"
        f"deb [arch=amd64 check-valid-until=no] {second} bookworm-security main contrib\n"
    )
    assert (folder / "sources.list.d/debian.sources").read_text() == (
        f"Types: deb\nURIs: {first}\nSuites: trixie trixie-updates\nComponents: main\n"
        "Signed-By: /k\nCheck-Valid-Until: no\n"
    )
    assert 'origin "snapshot.debian.org"' in (folder / "preferences.d/gamebear-snapshot").read_text()


@pytest.mark.parametrize(
    "source",
    [
        "deb http://archive.raspberrypi.com/debian bookworm main",
        "deb http://raspbian.example/raspbian bookworm main",
        "deb http://docker.example/linux/debian bookworm stable",
        "deb http://pg.example/pub/repos/apt bookworm-pgdg main",
        "deb http://flat.example/ ./",
    ],
)
def test_an_archive_without_snapshots_is_an_error(rootfs: tuple[Rootfs, Path], tmp_path: Path, source: str) -> None:
    root, folder = rootfs
    (folder / "sources.list").write_text(f"{source}\n")
    with pytest.raises(ImageError, match="base has an apt source without snapshots: http"):
        apt_settings.apply(Settings(snapshot="20260101T000000Z"), root, tmp_path, "base")


def test_source_packages_are_listed_only_for_the_installation(rootfs: tuple[Rootfs, Path], tmp_path: Path) -> None:
    root, folder = rootfs
    (folder / "sources.list").write_text(f"{LINE}\ndeb-src {LINE[4:]}\n{LINE.replace(' x ', ' y ')}\n")
    (folder / "sources.list.d/a.sources").write_text(f"{STANZA.replace('x', 'z')}Signed-By: /k\n")
    before = sorted(folder.rglob("*"))
    apt_settings.add_source_indexes(root, tmp_path)
    added = folder / "sources.list.d/gamebear-deb-src"
    assert added.with_suffix(".list").read_text() == f"deb-src {LINE[4:]}\n".replace(" x ", " y ")
    assert added.with_suffix(".sources").read_text() == (
        f"{STANZA}Signed-By: /k\n".replace("x", "z").replace("Types: deb", "Types: deb-src")
    )
    apt_settings.remove_source_indexes(root)
    assert sorted(folder.rglob("*")) == before


# Installations


class Archive:
    """A signed apt repository of one suite, `bookworm`."""

    def __init__(self, folder: Path, arch: str, gpg: Path) -> None:
        self.folder = folder
        self.arch = arch
        self.gpg = gpg
        self.packages = self.sources = ""

    def add(self, name: str, version: str, needs: str = "") -> None:
        """Add a binary package."""
        tree = self.folder / "tree"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "usr/share").mkdir(parents=True)
        (tree / "usr/share" / name).write_text(version)
        fields = {"Package": name, "Version": version, "Architecture": "all", "Maintainer": "A <a@example.com>"}
        fields |= {"Depends": needs} if needs else {}
        text = "".join(f"{key}: {value}\n" for key, value in fields.items()) + "Description: a test\n"
        (tree / "DEBIAN/control").write_text(text)
        made = self.folder / f"{name}_{version}.deb"
        command = ["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(tree), str(made)]
        subprocess.run(command, check=True, capture_output=True)
        shutil.rmtree(tree)
        digest = hashlib.sha256(made.read_bytes()).hexdigest()
        self.packages += f"{text}Filename: {made.name}\nSize: {made.stat().st_size}\nSHA256: {digest}\n\n"

    def add_source(self, name: str, needs: str) -> None:
        """Add a source package, without its files."""
        self.sources += (
            f"Package: {name}\nBinary: {name}\nVersion: 1\nMaintainer: A <a@example.com>\nBuild-Depends: {needs}\n"
            f"Architecture: any\nFormat: 1.0\nDirectory: .\nChecksums-Sha256:\n {'0' * 64} 1 {name}_1.dsc\n\n"
        )

    def publish(self, until: str = "") -> None:
        """Write and sign the indexes; `until` is the end of their validity."""
        top = self.folder / "dists/bookworm"
        indexes = {f"main/binary-{self.arch}/Packages": self.packages, "main/source/Sources": self.sources}
        listed = ""
        for name, text in indexes.items():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text(text)
            listed += f" {hashlib.sha256(text.encode()).hexdigest()} {len(text.encode())} {name}\n"
        valid = f"Valid-Until: {until}\n" if until else ""
        (top / "Release").write_text(
            f"Origin: Test\nSuite: bookworm\nCodename: bookworm\nDate: Thu, 01 Jan 2026 00:00:00 UTC\n{valid}"
            f"Architectures: {self.arch}\nComponents: main\nSHA256:\n{listed}"
        )
        command = ["gpg", "--homedir", str(self.gpg), "--batch", "--yes", "--clearsign", "-o", str(top / "InRelease")]
        subprocess.run([*command, str(top / "Release")], check=True, capture_output=True)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class Site:
    """A builder with the base `mini`, and a web server with archives signed by one key."""

    def __init__(self, builder: Builder, folder: Path, url: str) -> None:
        self.builder = builder
        self.url = url
        self.gpg = folder / "gpg"
        self.gpg.mkdir(mode=0o700)
        self.www = folder / "www"
        command = ["gpg", "--homedir", str(self.gpg), "--batch"]
        new = ["--passphrase", "", "--quick-generate-key", "test@example.com", "ed25519", "sign", "never"]
        subprocess.run([*command, *new], check=True, capture_output=True)
        exported = subprocess.run([*command, "--armor", "--export"], check=True, capture_output=True)
        self.key = exported.stdout.decode()
        self.old = self.archive("archive/debian/20260101T000000Z")
        self.old.add("lib", "1")
        self.old.add("tool", "1", needs="lib (= 1)")
        self.old.publish("Fri, 02 Jan 2026 00:00:00 UTC")
        self.now = self.archive("now")
        self.now.add("lib", "2")
        self.now.add("tool", "1", needs="lib")
        self.now.add("tool", "2", needs="lib (= 2)")
        self.now.add("helper", "1")
        self.now.add("build-essential", "1")  # each source package needs it
        self.now.add_source("program", "tool (>= 2), helper")
        self.now.publish()

    def archive(self, path: str) -> Archive:
        (self.www / path).mkdir(parents=True)
        return Archive(self.www / path, self.builder.facts.arch, self.gpg)

    def make_base(self, tree: Path) -> None:
        """Make the image `mini`: dpkg, a newer `lib`, and sources that nothing signed is available from."""
        methods = [f"/usr/lib/apt/methods/{name}" for name in METHODS]
        tiny.fill(tree, (*PROGRAMS, *APT, *APT_KEY, *methods))
        (tree / "usr/lib/apt/methods").mkdir(parents=True)
        for name in METHODS:
            (tree / "bin" / name).rename(tree / "usr/lib/apt/methods" / name)
        for name in ("apt-key", "gpgv"):
            shutil.copy(f"/usr/bin/{name}", tree / "bin")
        (tree / "usr/bin").symlink_to("../bin")
        shutil.copytree("/usr/share/dpkg", tree / "usr/share/dpkg")
        for name in ("ldconfig", "start-stop-daemon"):
            (tree / "bin" / name).write_text("#!/bin/sh\n")
            (tree / "bin" / name).chmod(0o755)
        for name in ("info", "updates", "triggers"):
            (tree / "var/lib/dpkg" / name).mkdir(parents=True)
        for name in ("sources.list.d", "trusted.gpg.d", "apt.conf.d", "preferences.d", "auth.conf.d"):
            (tree / "etc/apt" / name).mkdir(parents=True)
        for name in ("var/lib/apt", "var/cache/apt", "var/log"):
            (tree / name).mkdir(parents=True)
        (tree / "etc/apt/trusted.gpg.d/test.asc").write_text(self.key)
        status = "".join(
            f"Package: {name}\nStatus: install ok installed\nMaintainer: A <a@example.com>\nArchitecture: {arch}\n"
            f"Version: {version}\nDescription: a test\n\n"
            for name, arch, version in (("dpkg", self.builder.facts.arch, "1"), ("lib", "all", "2"))
        )
        (tree / "var/lib/dpkg/status").write_text(status)
        for name, text in {"dpkg": "", "lib": "/.\n/usr\n/usr/share\n/usr/share/lib\n"}.items():
            (tree / f"var/lib/dpkg/info/{name}.list").write_text(text)
        (tree / "usr/share/lib").write_text("2")
        (tree / "etc/apt/sources.list").write_text(f"deb {self.url}/now bookworm main\n")
        self.builder.buildah("from", "--name", "make-mini", "scratch")
        self.builder.buildah("copy", "make-mini", str(tree), "/")
        self.builder.buildah("commit", "--rm", "make-mini", "mini")

    def new_base(self, name: str) -> None:
        """Make another image like `mini`, so that no package image of it exists."""
        self.builder.buildah("from", "--name", "make-new", "mini")
        self.builder.buildah("config", "--label", f"name={name}", "make-new")
        self.builder.buildah("commit", "--rm", "make-new", name)

    def run(self, call: str, before: str = "") -> Outcome:
        """Run a script that makes a package image and prints its installed packages and its files."""
        patch = "import sys\nsys.modules['gamebear_tasks.runner.images.apt_settings'].SNAPSHOTS = "
        return self.builder.run(
            f"{patch}{self.url + '/archive'!r}\nPath('key.asc').write_text({self.key!r})\n{before}\nimage = {call}\n"
            "print('ID', image.id)\nprint('NOTES', __import__('json').dumps(image.inspect()['ImageAnnotations']))\n"
            "with Container(image) as c:\n"
            "    c.run('for f in /usr/share/*; do [ -d $f ] || echo FILE ${f##*/} $(cat $f); done', shell=True)\n"
            "    c.run('cd /etc/apt/sources.list.d; echo SOURCES *', shell=True)\n"
        )

    def made(self, call: str, before: str = "", own_apt: bool = False) -> tuple[dict[str, str], dict[str, str]]:
        """Return the versions of the installed packages, and the annotations of the image."""
        outcome = self.run(call, before)
        assert outcome.result["ok"], (outcome.message, outcome.log)
        assert "SOURCES gamebear-deb-src" not in outcome.log
        assert ("Using the image's apt" in outcome.log) is own_apt
        files = dict(line.split()[1:] for line in outcome.log.splitlines() if line.startswith("FILE "))
        (notes,) = re.findall(r"^NOTES (.*)$", outcome.log, re.MULTILINE)
        known: dict[str, str] = json.loads(notes)
        installed = dict(each.split("=") for each in known["gamebear.installed"].split())
        del installed["dpkg"]
        assert files == installed
        return files, known


@pytest.fixture(scope="module")
def site(system: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    builder = Builder(folder / "store")
    handler = functools.partial(Handler, directory=str(folder / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made = Site(builder, folder, f"http://127.0.0.1:{server.server_address[1]}")
        made.make_base(folder / "tree")
        yield made
        server.shutdown()
    subprocess.run(["gpgconf", "--homedir", str(made.gpg), "--kill", "gpg-agent"], check=True)
    builder.buildah("rm", "--all")
    remove_tree(builder.root, builder.facts, builder.root)


def test_a_pinned_version_is_installed_and_may_be_older(site: Site) -> None:
    assert site.made("packages_image('mini', ['tool=1'])")[0] == {"lib": "2", "tool": "1"}
    newer = "packages_image(packages_image('mini', ['tool']), ['tool=1'])"
    assert site.made(newer)[0] == {"lib": "2", "tool": "1"}


def test_a_snapshot_gives_the_versions_of_that_day(site: Site) -> None:
    files, notes = site.made("packages_image('mini', ['tool'], snapshot='20260101T000000Z')")
    assert files == {"lib": "1", "tool": "1"}
    assert notes["gamebear.snapshot"] == "20260101T000000Z"
    assert site.made("packages_image('mini', snapshot='20260101T000000Z')")[0] == {"lib": "1"}
    assert site.made("packages_image('mini', ['tool'])")[0] == {"lib": "2", "tool": "2"}


def test_build_dependencies_of_a_source_package_are_installed(site: Site) -> None:
    files, notes = site.made("packages_image('mini', build_dep='program')")
    assert files == {"lib": "2", "tool": "2", "helper": "1", "build-essential": "1"}
    assert notes["gamebear.build-dep"] == "program"
    failed = site.run("packages_image('mini', build_dep='nosuch')")
    assert failed.result["kind"] == "image"
    assert "src:nosuch" in failed.message
    assert not site.builder.containers()


def test_build_dependencies_of_a_folder_are_installed_and_only_they_count(site: Site) -> None:
    site.new_base("folder")
    control = "Source: mine\\nBuild-Depends: helper, tool (>= 2)\\nHomepage: {}\\n\\nPackage: mine\\n"
    ids = []
    for page in ("a", "b"):
        before = f"Path('source/debian').mkdir(parents=True)\nPath('source/debian/control').write_text('{control}')\n"
        outcome = site.run("packages_image('folder', ['tool'], build_dep='source')", before.format(page))
        assert outcome.result["ok"], (outcome.message, outcome.log)
        assert outcome.log.count("Unpacking tool") == (page == "a")
        assert "Using the image's apt" not in outcome.log
        ids += re.findall(r"^ID (.*)$", outcome.log, re.MULTILINE)
        assert "FILE helper 1" in outcome.log and "FILE tool 2" in outcome.log
    assert len(ids) == 2 and len(set(ids)) == 1
    failed = site.run("packages_image('folder', build_dep='source')", "Path('source').mkdir()")
    assert "source/debian/control" in failed.message


def test_packages_of_an_additional_source_are_verified_with_its_key(site: Site) -> None:
    other = site.archive("other")
    other.add("extra", "1", needs="helper")
    other.publish()
    source = f"sources=['deb {site.url}/other bookworm main']"
    # The base trusts the key for every source. This takes it away.
    before = (
        "with Container('mini') as c:\n    with c.mount() as root:\n"
        "        (root / 'etc/apt/trusted.gpg.d/test.asc').unlink()\n"
        f"    with c.mount() as root:\n        (root / 'etc/apt/sources.list').write_text(\n"
        f"            'deb [trusted=yes] {site.url}/now bookworm main\\n')\n"
        "    base = c.commit()\n    base.add_tag('distrustful')\n"
    )
    failed = site.run(f"packages_image(base, ['extra'], {source})", before)
    assert failed.result["kind"] == "image", failed.log
    files, notes = site.made(f"packages_image('distrustful', ['extra'], {source}, keys=['key.asc'])")
    assert files == {"lib": "2", "helper": "1", "extra": "1"}
    assert notes["gamebear.keys"] == hashlib.sha256(site.key.encode()).hexdigest()
    assert notes["gamebear.sources"] == f"deb {site.url}/other bookworm main"


CONTROL = "Path('source/debian/control').write_text('Source: own\\nBuild-Depends: helper\\n')\n"


@pytest.mark.parametrize(
    ("call", "before", "expected"),
    [
        ("['tool'], snapshot='20260101T000000Z'", "", {"lib": "1", "tool": "1"}),
        ("['tool=1']", "", {"lib": "2", "tool": "1"}),
        ("build_dep='program'", "", {"lib": "2", "tool": "2", "helper": "1", "build-essential": "1"}),
        (
            "['tool'], build_dep='source'",
            "Path('source/debian').mkdir(parents=True)\n" + CONTROL,
            {"lib": "2", "tool": "2", "helper": "1", "build-essential": "1"},
        ),
    ],
)
def test_the_images_own_apt_follows_the_same_settings(
    site: Site, call: str, before: str, expected: dict[str, str]
) -> None:
    unfit = (
        "packages = sys.modules['gamebear_tasks.runner.images.package_images']\n"
        "def unfit(*_): raise packages.Unfit('a test')\npackages.Apt = unfit\n"
    )
    files, notes = site.made(f"packages_image('mini', {call}, recommends=True)", before + unfit, own_apt=True)
    assert files == expected
    assert notes["gamebear.begun-from"] == notes["gamebear.base-id"]


def test_an_image_is_extended_only_by_one_with_the_same_settings(site: Site) -> None:
    site.new_base("extended")
    first = site.made("packages_image('extended', ['helper'])")[1]
    base = first["gamebear.base-id"]
    more = site.made("packages_image('extended', ['helper'], build_dep='program')")[1]
    assert more["gamebear.begun-from"] != base
    source = f"sources=['deb {site.url}/now bookworm main']"
    for setting in (source, f"{source}, keys=['key.asc']", "snapshot='20260101T000000Z'"):
        names = "['tool']" if "snapshot" in setting else "['helper']"
        smaller = site.made(f"packages_image('extended', {names})")[1]
        assert "gamebear.sources" not in smaller
        larger = site.made(f"packages_image('extended', {names[:-1]}, 'lib'], {setting})")[1]
        assert larger["gamebear.begun-from"] == larger["gamebear.base-id"] == base
    site.made(f"packages_image('extended', ['helper'], {source})")
    same = site.made(f"packages_image('extended', ['helper', 'tool'], {source})")[1]
    assert same["gamebear.begun-from"] not in (base, first["gamebear.begun-from"])
