"""The installed buildah, base images and package images; without a registry."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gamebear_tasks.runner.host import buildah, emulation, probe, subprocesses
from gamebear_tasks.runner.host.buildah import BuildahError, ImageError
from gamebear_tasks.runner.host.capabilities import Facts, environment, from_json, namespace
from gamebear_tasks.runner.images import apt_sources, base_images, package_images
from gamebear_tasks.runner.images.apt_sources import Archive, archives
from gamebear_tasks.runner.images.base_images import debian_suite, is_local_only, qualified
from gamebear_tasks.runner.util.errors import RunnerError

PRELUDE = """
import json, os, sys, time
from pathlib import Path
from runner.images import base_images as bases, package_images as packages
from runner.host.buildah import Buildah
from runner.host.probe import facts
from runner.util.errors import RunnerError
root = Path(sys.argv[1])
found = facts(root)
buildah = Buildah(root, found, "gamebear-test-")
def failure(call, *args, **named):
    try:
        return "no failure: " + call(*args, **named)
    except RunnerError as error:
        return str(error)
"""


class Builder:
    """A separate store on this machine, and programs in its namespace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.facts = probe.facts(root)
        self.environment = environment(root, self.facts)
        self.environment["PYTHONPATH"] = str(Path(buildah.__file__).parents[2])  # without the rest of the package

    def command(self, code: str) -> list[str]:
        return [*namespace(self.facts), sys.executable, "-c", PRELUDE + code, str(self.root)]

    def inside(self, code: str) -> Any:
        """Run code inside the namespace. Return its last output, decoded from JSON."""
        done = subprocess.run(self.command(code), env=self.environment, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def builder(system: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("builder")
    config = folder / "storage.conf"
    # Root's default store belongs to the machine; tests do not modify it.
    config.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/default"\nrunroot = "{folder}/default-run"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        if os.geteuid() == 0:
            patch.setenv("CONTAINERS_STORAGE_CONF", str(config))
        made = Builder(folder / "v1")
        yield made
        buildah.remove_containers(made.root, made.facts, "gamebear-")
        buildah.remove_tree(made.root, made.facts, folder)


def elsewhere(arch: str = "amd64", emulated: tuple[str, ...] = ()) -> Facts:
    return Facts("1.28.2", True, (), "overlay", "chroot", True, arch, emulated)


# Buildah


def test_concurrent_callers_share_one_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[Path] = []

    def slowly(root: Path) -> Facts:
        probed.append(root)
        time.sleep(0.3)
        return elsewhere()

    monkeypatch.setattr(probe, "_probe", slowly)
    threads = [threading.Thread(target=probe.facts, args=[tmp_path]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(probed) == 1


def test_probe_results_are_reused_inside_the_namespace(builder: Builder) -> None:
    assert builder.inside("print(json.dumps(found.arch))") == builder.facts.arch


def test_all_processes_of_a_build_end_with_it(builder: Builder) -> None:
    if not builder.facts.pid_namespace:
        pytest.skip("no PID namespace here")
    code = "import subprocess; subprocess.Popen(['sleep', '86399.25']); print('started', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        builder.command(code), env=builder.environment, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == b"started\n"
        os.killpg(process.pid, signal.SIGKILL)
        # The pipe closes when the last process with its write end has exited.
        assert output.read() == b""
    process.wait()


def test_containers_of_a_lost_build_are_removed_by_their_prefix(builder: Builder) -> None:
    builder.inside("[buildah('from', '--name', n, 'scratch') for n in ('gamebear-a-1', 'gamebear-b-1')]; print(1)")
    buildah.remove_containers(builder.root, builder.facts, "gamebear-a-")
    names = builder.inside("print(json.dumps(buildah('containers', '--format', '{{.ContainerName}}').split()))")
    buildah.remove_containers(builder.root, builder.facts, "gamebear-b-")
    assert [name for name in names if not name.startswith("gamebear-probe")] == ["gamebear-b-1"]


RM = """#!/bin/sh
[ "$first" ] || case " $* " in
    *" rm "*)
        if [ -e "$0.removes" ]; then first=1 "$0" "$@"; fi
        echo "Fehler: etwas anderes" >&2
        exit 125
        ;;
esac
PATH=${PATH#*:} exec buildah "$@"
"""
"""A buildah whose `rm` fails with a localized message, with or without a concurrent removal."""


@pytest.mark.parametrize("is_removed", [True, False])
def test_a_container_that_cannot_be_removed_is_an_error_only_if_it_still_exists(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    builder.inside("buildah('from', '--name', 'gamebear-c-1', 'scratch'); print(1)")
    (tmp_path / "buildah").write_text(RM)
    (tmp_path / "buildah").chmod(0o755)
    (tmp_path / ("buildah.removes" if is_removed else "none")).touch()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path), prepend=":")
        if is_removed:
            buildah.remove_containers(builder.root, builder.facts, "gamebear-c-")
        else:
            with pytest.raises(BuildahError, match="etwas anderes"):
                buildah.remove_containers(builder.root, builder.facts, "gamebear-c-")
    buildah.remove_containers(builder.root, builder.facts, "gamebear-c-")
    assert "gamebear-c-1" not in builder.inside("print(json.dumps(buildah('containers')))")


def test_a_folder_of_another_user_of_the_namespace_is_removed(builder: Builder) -> None:
    builder.inside("p = root / 'tmp' / 'x'; p.mkdir(); (p / 'f').touch(); os.chown(p, 7, 7); p.chmod(0o500); print(1)")
    buildah.remove_tree(builder.root, builder.facts, builder.root / "tmp" / "x")
    assert not (builder.root / "tmp" / "x").exists()


def test_the_error_for_missing_buildah_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(subprocesses, "SYSTEM_FOLDERS", ())
    with pytest.raises(RunnerError, match=r"buildah is not installed.*sudo apt install buildah"):
        probe.facts(tmp_path / "v1")


@pytest.mark.parametrize("backend", ["netavark", "loopback", None])
def test_netavark_is_suggested_only_where_no_network_backend_is_installed(
    system: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    monkeypatch.setattr(probe, "NETWORK_BACKENDS", (str(tmp_path / "netavark"),))
    monkeypatch.setattr(probe, "CNI_PLUGINS", (str(tmp_path / "loopback"),))
    monkeypatch.setattr(probe, "_try", lambda root, tried: "netavark is in this text")
    if backend:
        (tmp_path / backend).mkdir()
        (tmp_path / backend / backend).touch(0o755)
    with pytest.raises(probe.ContainersError, match="netavark is in this text") as caught:
        probe.facts(tmp_path / "v1")
    assert caught.value.package == ("" if backend else "netavark")
    assert ("sudo apt install netavark" in caught.value.hint) is (backend is None)
    assert "buildah unshare true" in caught.value.hint


def test_environment_secrets_are_not_passed_to_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "secret" not in environment(tmp_path, elsewhere()).values()


def test_a_program_of_the_native_architecture_runs() -> None:
    arch = probe.debian_arch(dict(os.environ))
    assert emulation._runs(arch)
    assert arch not in emulation.emulated(arch)


# Names


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("arm32v7/debian:12", "docker.io/arm32v7/debian:12"),
        ("docker.io/debian", "docker.io/library/debian:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("quay.io/a/b@sha256:0", "quay.io/a/b@sha256:0"),
    ],
)
def test_short_names_are_resolved_as_by_docker(name: str, full: str) -> None:
    assert qualified(name) == full


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("gamebear-build:" + "a" * 64, True),
        ("anything:" + "a" * 64, True),
        ("localhost/x", True),
        ("debian", False),
        ("debian@sha256:" + "a" * 64, False),
        ("quay.io/gamebear-x/y", False),
    ],
)
def test_a_local_tag_is_known_by_its_name(name: str, local: bool) -> None:
    assert is_local_only(name) is local


@pytest.mark.parametrize(
    ("name", "suite"),
    [
        ("debian:trixie-slim", "trixie"),
        ("arm32v7/debian:12", "bookworm"),
        ("docker.io/library/debian:11.9-slim", "bullseye"),
        ("debian:bookworm-20250520", ""),
        ("someone/debian:12", ""),
        ("alpine", ""),
    ],
)
def test_bootstrappable_debian_images_are_recognized(name: str, suite: str) -> None:
    assert debian_suite(name) == suite


def test_archives_are_read_from_both_formats_and_without_credentials() -> None:
    one_line = "deb [arch=amd64 signed-by=/k.gpg] https://me:pw@deb.example/debian/ bookworm main contrib # why\n"
    stanza = "Types: deb deb-src\nURIs: https://deb.example/debian\nSuites: bookworm\n bookworm-updates\n"
    stanza += "# a comment\nComponents: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n"
    off = "\nEnabled: no\nTypes: deb\nURIs: https://off.example/\nSuites: x\nComponents: main\n"
    uri = "https://deb.example/debian"
    assert archives(one_line, deb822=False) == [Archive(uri, "bookworm", ("main", "contrib"), "/k.gpg")]
    assert archives(stanza + off, deb822=True) == [
        Archive(uri, "bookworm", ("main",)),
        Archive(uri, "bookworm-updates", ("main",)),
    ]


def test_missing_emulation_is_reported_first() -> None:
    with pytest.raises(RunnerError, match=r"amd64.*cannot run armhf programs.*qemu-user-static"):
        base_images.check_runs(elsewhere(), "armhf")
    base_images.check_runs(elsewhere(emulated=("armhf",)), "armhf")


# Images


def test_an_image_under_the_right_name_but_of_another_architecture_does_not_match(builder: Builder) -> None:
    failed = builder.inside(
        "buildah('from', '--name', 'gamebear-arch', 'scratch')\n"
        "buildah('config', '--arch', 's390x', 'gamebear-arch')\n"
        "made = buildah('commit', '-q', 'gamebear-arch', 'gamebear-cache:x').strip()\n"
        "buildah('rm', 'gamebear-arch')\n"
        "there = bases.resolve(buildah, found, 'gamebear-cache:x', 's390x')\n"
        "by_id = bases.resolve(buildah, found, made[:12], found.arch)\n"
        "print(json.dumps([there == made == by_id, "
        "failure(bases.resolve, buildah, found, 'gamebear-cache:x', found.arch)]))"
    )
    is_same, output = failed
    assert is_same
    assert output == (
        f"image gamebear-cache:x for {builder.facts.arch} is not on the builder."
        " The name is local: build the image and tag it first."
    )


def test_an_inspected_but_unused_image_is_not_owned_by_the_runner(builder: Builder) -> None:
    noted = builder.inside(
        "buildah('from', '--name', 'gamebear-unfit', 'scratch')\n"
        "buildah('config', '--arch', 's390x', 'gamebear-unfit')\n"
        "made = buildah('commit', '-q', 'gamebear-unfit', 'gamebear-cache:unfit').strip()\n"
        "buildah('rm', 'gamebear-unfit')\n"
        "note = root / 'images' / f'{made}.used'\n"
        "failure(bases.resolve, buildah, found, 'gamebear-cache:unfit', found.arch)\n"
        "before = note.exists()\n"
        "bases.resolve(buildah, found, 'gamebear-cache:unfit', 's390x')\n"
        "print(json.dumps([before, json.loads(note.read_text())[1:]]))"
    )
    assert noted == [False, ["s390x", "", ""]]


def test_a_local_image_is_found_by_its_digest_and_by_the_start_of_its_id(builder: Builder) -> None:
    made, by_digest, by_both, other, by_id, absent = builder.inside(
        "buildah('from', '--name', 'gamebear-digest', 'scratch')\n"
        "made = buildah('commit', '-q', 'gamebear-digest', 'gamebear-cache:digest').strip()\n"
        "buildah('rm', 'gamebear-digest')\n"
        "(digest,) = [image['digest'] for image in buildah.images() if image['id'] == made]\n"
        "names = [f'gamebear-cache@{digest}', f'gamebear-cache:digest@{digest}', 'gamebear-cache@sha256:' + 'a' * 64,\n"
        "         made[:12], 'f' * 12]\n"
        "print(json.dumps([made, *(bases.local(buildah, name, found.arch) for name in names)]))"
    )
    assert by_digest == by_both == by_id == made
    assert other == absent == ""


def test_an_unavailable_base_is_reported_with_the_attempts(builder: Builder) -> None:
    code = "print(json.dumps(failure(bases.resolve, buildah, found, '127.0.0.1:1/team/base:1', found.arch)))"
    started = time.monotonic()
    message = builder.inside(code)
    assert "127.0.0.1:1/team/base:1" in message
    assert "connection refused" in message
    assert message.endswith("buildah pull 127.0.0.1:1/team/base:1")
    assert time.monotonic() - started < 30


def test_the_tag_of_a_package_image_depends_on_the_base_but_not_on_the_order() -> None:
    tag = package_images._tag("id", "armhf", ["gcc", "make"], False)
    assert tag == "gamebear-packages:" + tag[-64:]
    assert tag != package_images._tag("other", "armhf", ["gcc", "make"], False)
    assert tag != package_images._tag("id", "arm64", ["gcc", "make"], False)
    assert tag != package_images._tag("id", "armhf", ["gcc", "make"], True)


@pytest.mark.parametrize("package", ["-o=Dir=/x", "gcc-", "Gcc", "gcc make", "gcc;reboot", ""])
def test_invalid_package_names_never_reach_apt(package: str) -> None:
    with pytest.raises(ValueError, match="not the name of a Debian package"):
        package_images.packages_image(None, elsewhere(), "debian", [package], arch="amd64")  # type: ignore[arg-type]


def test_a_disk_too_small_for_a_bootstrap_is_reported_without_further_attempts(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fills = tmp_path / "mmdebstrap"  # the real one times out after ten seconds
    fills.write_text('#!/bin/sh\nfor last; do test -d "$last" && dd if=/dev/zero of="$last/x"; done\nexit 25\n')
    fills.chmod(0o755)
    disk = builder.root.parent / "default"  # of a root's images, see `builder`
    monkeypatch.setitem(builder.environment, "GAMEBEAR_BASE", "bootstrap")
    monkeypatch.setitem(builder.environment, "PATH", f"{tmp_path}:{builder.environment['PATH']}")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", disk], check=True)
    try:
        output, left = builder.inside(
            "output = failure(bases.resolve, buildah, found, 'debian:bookworm', found.arch)\n"
            "print(json.dumps([output, buildah('containers', '--quiet')]))"
        )
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    arch = builder.facts.arch
    assert output.startswith(f"debian bookworm for {arch} cannot be bootstrapped: the disk is full.")
    assert "gamebear prune" in output
    assert not left


@pytest.mark.slow
def test_a_bootstrapped_base_gets_packages_once(builder: Builder) -> None:
    builder.environment["GAMEBEAR_BASE"] = "bootstrap"
    first, again, other, installed, failed, containers, more, anew, own = builder.inside(
        "def make(*names, **named): return packages.packages_image(\n"
        "    buildah, found, 'debian', names, arch=found.arch, **named)\n"
        "first, again = make('make', 'libc6-dev'), make('libc6-dev', 'make', 'make', max_age_days=1)\n"
        "other = make('libc6-dev', 'make', max_age_days=0)\n"
        "def notes(image): return json.loads(buildah('inspect', '--type', 'image', image))['ImageAnnotations']\n"
        "more = notes(make('libc6-dev', 'make', 'hello'))\n"
        "packages.Apt.outdated = lambda self: {'make'}\n"
        "anew = notes(make('libc6-dev', 'make', 'patch'))\n"
        "def unfit(*_): raise packages.Unfit('a test')\n"
        "packages.Apt = unfit\n"
        "own = notes(make('libc6-dev', 'make', 'hello', max_age_days=0))\n"
        "print(json.dumps([first, again, other, notes(other)['gamebear.installed'], failure(make, 'no-such'),\n"
        "                  buildah('containers', '--quiet'), more, anew, own]))"
    )
    assert more["gamebear.begun-from"] == other
    assert {"make", "libc6-dev", "hello"} <= set(more["gamebear.added"].split())
    assert anew["gamebear.begun-from"] == anew["gamebear.base-id"] == more["gamebear.base-id"]
    assert own["gamebear.begun-from"] == own["gamebear.base-id"]
    assert (own["gamebear.installed"], own["gamebear.added"]) == (more["gamebear.installed"], more["gamebear.added"])
    assert first == again != other
    assert "libc6-dev" in installed
    assert failed.startswith(f"package no-such for {builder.facts.arch} is not available in debian.")
    assert not containers


def test_probe_results_survive_the_loss_of_their_file() -> None:
    known = elsewhere(emulated=("armhf",))
    assert from_json(json.loads(json.dumps(known._asdict()))) == known


def test_a_builder_without_an_apt_mirror_is_reported_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt_sources, "own_sources", list)
    with pytest.raises(ImageError, match="Debian has no mirror") as caught:
        apt_sources.main_archive("bookworm", "debian")
    assert "deb MIRROR bookworm main" in str(caught.value)
