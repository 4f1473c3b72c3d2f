"""A real artifact from a Debian source package: emulated armhf, rootless, over SSH; later fetched and not rebuilt."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from packageurl import PackageURL
from project import Project, wait_for
from sshd import Account, Sshd
from statements import by_role, packages, read_statement

pytestmark = pytest.mark.system

RUN_IT = """
import subprocess

LISTEN = '''
use Socket;
socket(S, PF_UNIX, SOCK_DGRAM, 0) or die $!;
bind(S, sockaddr_un("/dev/log")) or die $!;
my $umtprd = fork;
exec "/umtprd" unless $umtprd;
alarm 60;
while (defined recv(S, $output, 4096, 0)) {
    print "$output\\\\n";
    last if $output =~ /Version/;
}
kill KILL => $umtprd;
'''
Path("listen.pl").write_text(LISTEN)
with Container("debian:bookworm") as c:
    c.copy_in("umtprd", "/umtprd")
    c.copy_in("listen.pl", "/listen.pl")
    # `run` gives a container a /dev that cannot be written to: this must have a socket there
    with c.mount() as root, open("output", "wb") as output:
        subprocess.run(["chroot", root, "perl", "/listen.pl"], stdout=output, check=True)
"""
"""Runs umtprd with a listener on the system log, to which alone it writes its version."""


RUN_IT_TASK = """

def task_run_it():
    return artifact("run_it.py", inputs=["build/umtprd"], outputs=["build/output"])
"""


@pytest.fixture(scope="session")
def gamebear(server: Sshd, home: Path, emulation: None, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """This project, built for armhf by the builder behind sshd."""
    project = Project(
        tmp_path_factory.mktemp("gamebear") / "project",
        home=home,
        GAMEBEAR_BUILDER=server.url,
        GAMEBEAR_ARCH="armhf",
        GAMEBEAR_SOURCES="debian",
        GAMEBEAR_BASE="bootstrap",
    )
    project.take("dodo.py", "buildscripts", "gamebear.lock")
    with (project.folder / "dodo.py").open("a") as dodo:
        dodo.write(RUN_IT_TASK)
    project.write("run_it.py", RUN_IT)
    return project


def jobs_on(account: Account) -> dict[str, int]:
    """Return the number of starts of each job on the builder, by digest."""
    folder = account.home / ".cache" / "gamebear" / "v1" / "jobs"
    return {path.name: (path / "state.json").stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture(scope="session")
def umtprd(gamebear: Project) -> Path:
    """umtprd, built once for all tests here."""
    gamebear.doit("umtprd").ok()
    return gamebear.folder / "build" / "umtprd"


def test_umtprd_is_an_arm_program_and_runs(umtprd: Path, gamebear: Project) -> None:
    about = subprocess.run(["readelf", "--file-header", umtprd], capture_output=True, text=True, check=True).stdout
    assert "ELF32" in about and "ARM" in about
    assert os.access(umtprd, os.X_OK)
    gamebear.doit("run_it").ok()
    assert "Version: v1.3.10 compiled" in (gamebear.folder / "build" / "output").read_text()


def test_packages_of_an_emulated_image_are_installed_with_the_builders_apt(umtprd: Path, gamebear: Project) -> None:
    log = (gamebear.folder / "build" / "logs" / "umtprd.log").read_text()
    assert "Installing into debian:bookworm for armhf: gcc libc6-dev make pkgconf" in log
    assert "Using the image's apt" not in log
    assert "is not installed" not in log and "E: " not in log


def test_the_provenance_of_an_artifact_has_a_standard_format(umtprd: Path, gamebear: Project) -> None:
    assert gamebear.gamebear("provenance", "umtprd").ok().out == "build/umtprd.intoto.json\n"
    provenance = read_statement(umtprd)
    debian = json.loads((gamebear.folder / "gamebear.lock").read_text())["debian"]["umtp-responder"]
    source = by_role(provenance, "source")["umtp"]
    assert source.digest["sha256"] == debian["files"][next(name for name in debian["files"] if name.endswith(".dsc"))]
    assert PackageURL.from_string(source.uri).version == debian["version"]
    (image,) = by_role(provenance, "package image").values()
    (base,) = by_role(provenance, "base image").values()
    assert (base.annotations["origin"], image.annotations["base-id"]) == ("bootstrap", base.digest["sha256"])
    found = packages(provenance)
    assert found["gcc"].qualifiers == found["dpkg"].qualifiers == {"arch": "armhf"}
    assert found["base-files"].version and found["tzdata"].qualifiers == {"arch": "all"}


def test_one_edited_buildscript_rebuilds_one_task(umtprd: Path, gamebear: Project) -> None:
    gamebear.doit("run_it").ok()
    with (gamebear.folder / "run_it.py").open("a") as script:
        script.write("# edited\n")
    assert gamebear.doit("run_it").ok().ran == ["run_it"]


def test_a_second_doit_runs_nothing_and_connects_to_nothing(umtprd: Path, gamebear: Project, server: Sshd) -> None:
    before = server.connections
    assert gamebear.doit("umtprd").ok().out == "-- umtprd\n"
    assert server.connections == before


def test_doit_after_clean_fetches_and_does_not_build(
    umtprd: Path, gamebear: Project, server: Sshd, account: Account
) -> None:
    content = umtprd.read_bytes()
    jobs, connections = jobs_on(account), server.connections
    gamebear.doit("clean", "umtprd").ok()
    assert not umtprd.exists()
    gamebear.doit("umtprd").ok()
    assert umtprd.read_bytes() == content
    assert jobs_on(account) == jobs, "no job was begun or begun again"
    assert server.connections == connections + 1


def test_no_process_or_container_remains_on_the_builder(umtprd: Path, account: Account) -> None:
    def alive() -> list[str]:
        found = subprocess.run(
            ["ps", "-u", account.name, "-o", "stat=,args="], capture_output=True, text=True, check=False
        )
        lines = [line for line in found.stdout.splitlines() if line[0] != "Z"]  # those of init, if it runs
        return [line for line in lines if "buildah" in line or "python3" in line]

    wait_for(lambda: not alive())  # a session detects its client's exit with a delay
    store = account.home / ".cache" / "gamebear" / "v1"
    assert list((store / "live").iterdir()) == []
    assert list((store / "jobs").glob("*/work")) == []
