"""Provenance statements, parsed by the libraries of their formats."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tiny
from packageurl import PackageURL
from project import Project
from statements import by_role, packages, read_statement

from gamebear_tasks.builders.protocol.materials import Materials
from gamebear_tasks.client.provenance import _git_uri, debian_purl
from gamebear_tasks.runner.host.buildah import outside
from gamebear_tasks.runner.host.probe import facts
from gamebear_tasks.sources.base import public_url

DODO = """
from gamebear_tasks import artifact

def task_pair():
    return artifact("x.py", outputs=["build/one", "build/two"], inputs={"word": "in/word"}, args={"n": 3})

def task_never():
    return artifact("x.py", outputs=["build/never"])

def task_plain():
    return {"actions": None}
"""

SCRIPT = """
#| arg: n: int
import helping
with Container("gamebear-mini:1") as c:
    c.run(["true"])
    c.commit()
for name in ("one", "two"):
    open(name, "w").write(open("word").read() * n)
"""

STATUS = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Multi-Arch: same
Version: 2.36-9+deb12u1

Package: tzdata
Status: install ok installed
Architecture: all
Version: 1:2024a-0

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""


@pytest.fixture
def pair(system: None, project: Project, tmp_path: Path) -> Project:
    """A project with one task and two outputs, built in a container of a small image."""
    storage = tmp_path / "storage.conf"
    storage.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{tmp_path}/storage"\nrunroot = "{tmp_path}/run-storage"\n'
    )
    project.environment["CONTAINERS_STORAGE_CONF"] = str(storage)
    project.write("dodo.py", DODO)
    project.write("x.py", SCRIPT)
    project.write("helping.py", "")
    project.write("in/word", "word")
    tree = tmp_path / "tree"
    tiny.fill(tree, ["sh", "true"])
    (tree / "var/lib/dpkg").mkdir(parents=True)
    (tree / "var/lib/dpkg/status").write_text(STATUS)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "CONTAINERS_STORAGE_CONF"):
            patch.setenv(name, project.environment[name])
        known = facts(project.store)
        outside(project.store, known, "from", "--name", "make", "scratch")
        outside(project.store, known, "copy", "make", str(tree), "/")
        outside(project.store, known, "commit", "--rm", "make", "gamebear-mini:1")
    return project


def test_every_build_writes_provenance_if_configured(pair: Project) -> None:
    pair.doit("pair", "provenance=true").ok()
    files = [pair.folder / "build" / name for name in ("one", "two")]
    for file in files:
        provenance = read_statement(file)
        for role, name, path in (("script", "x.py", "x.py"), ("module", "helping.py", "helping.py")):
            digest = hashlib.sha256((pair.folder / path).read_bytes()).hexdigest()
            assert by_role(provenance, role)[name].digest["sha256"] == digest
        assert by_role(provenance, "input")["word"].digest["sha256"] == hashlib.sha256(b"word").hexdigest()
        (image,) = by_role(provenance, "image").values()
        assert image.name == "gamebear-mini:1" and len(image.digest["sha256"]) == 64
        assert packages(provenance) == {
            "libc6": PackageURL("deb", "debian", "libc6", "2.36-9+deb12u1", {"arch": "amd64"}),
            "tzdata": PackageURL("deb", "debian", "tzdata", "1:2024a-0", {"arch": "all"}),
        }
        declared = provenance.build_definition.external_parameters
        assert declared["args"]["n"] == 3 and declared["program"]["name"] == "x.py"
        details = provenance.run_details
        assert details.builder.id.startswith("local://")
        assert 0 <= details.metadata.finished_on.seconds - details.metadata.started_on.seconds < 600
    shutil.rmtree(pair.store)
    files[0].with_name("one.intoto.json").unlink()
    assert pair.gamebear("provenance").ok().out.split() == ["build/one.intoto.json", "build/two.intoto.json"]
    read_statement(files[0])  # without the builder
    pair.doit("clean", "pair").ok()
    assert [path.name for path in (pair.folder / "build").iterdir()] == ["logs"]


def test_the_provenance_command_covers_up_to_date_targets_only(pair: Project) -> None:
    pair.gamebear("provenance", "never").failed("never is not up to date", "Run doit never first")
    pair.gamebear("provenance", "plain").failed(
        "Task plain has no provenance: it uses neither artifact() nor sd_image()"
    )
    pair.gamebear("provenance", "nobody").failed("Task 'nobody' does not exist", "gamebear list --all")
    pair.doit("pair").ok()
    assert not list(pair.folder.glob("build/*.intoto.json"))
    (noted,) = pair.store.glob("jobs/*/materials.json")
    noted.write_text(json.dumps({**json.loads(noted.read_text()), "by": {"buildah": "1.0"}}))
    pair.gamebear("provenance").ok()
    before = read_statement(pair.folder / "build/one")
    assert before.run_details.builder.version["buildah"] == "1.0", "the builder has another one since"
    assert "libc6" in packages(before)
    (pair.folder / "build/one").write_text("changed")
    pair.gamebear("provenance", "pair").failed(
        "build/one does not match the record of pair", "doit clean pair && doit pair"
    )
    pair.write("in/word", "another")
    pair.gamebear("provenance", "pair").failed("pair is not up to date")
    pair.doit("pair").ok()
    assert not list(pair.folder.glob("build/*.intoto.json")), "the old statements are about other files"
    for path in pair.store.glob("jobs/*/state.json"):
        path.unlink()
    pair.gamebear("provenance").failed("is no longer on the builder", "doit clean TASK, then doit TASK")


def test_provenance_contains_no_secrets_of_urls() -> None:
    assert public_url("https://me:secret@example.com/a.tar.gz?token=secret#secret") == "https://example.com/a.tar.gz"
    assert public_url("https://token@example.com/a.git") == "https://example.com/a.git"
    assert public_url("ssh://git:secret@example.com:22/a.git") == "ssh://git@example.com:22/a.git"


def test_repositories_and_packages_have_standard_identifiers() -> None:
    assert _git_uri("https://example.com/a.git") == "git+https://example.com/a.git"
    assert _git_uri("git@example.com:b/a.git") == "git+ssh://git@example.com/b/a.git"
    assert _git_uri("/srv/a.git") == "git+file:///srv/a.git"
    for name, version, arch in (("libstdc++6", "1:2~rc1-3+deb12u1", "armhf"), ("a", "1", "")):
        known = PackageURL("deb", "debian", name, version, {"arch": arch} if arch else {})
        assert debian_purl(name, version, arch) == known.to_string()


def test_images_reported_by_a_builder_are_bounded() -> None:
    good = {"id": "a" * 64, "packages": [["gcc", "1", "all"], ["\x1b[2J", "1", ""], ["short"], 5], "names": 7}
    output = {"images": [good, {"id": "../x"}, 5] + [good] * 99, "begun": float("nan"), "ended": "never", "host": ["x"]}
    materials = Materials.of_document(json.loads(json.dumps(output)))
    assert (materials.begun, materials.ended, materials.host) == (0.0, 0.0, "")
    assert len(materials.images) == 18
    first = materials.images[0]
    gcc, odd = first.packages
    assert gcc.name == "gcc" and odd.name.isprintable()
