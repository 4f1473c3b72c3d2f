"""The example of each kind of project: what `gamebear init` writes for it, what it builds, and its page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from project import ROOT, Project
from upstreams import call_git, commit

from gamebear_tasks.cli.init.detection import KINDS
from gamebear_tasks.config import own_architecture

pytest_plugins = ("upstreams",)

EXAMPLES = ROOT / "examples"

WRITTEN = ("dodo.py", "buildscripts/hello.py", "pyproject.toml", ".gitignore")
"""Files of an example that `gamebear init` writes."""

TABLE = '[tool.gamebear]\nbuilder = "local:"\n'

PAGES = [kind.page for kind in KINDS]


def take(project: Project, name: str) -> None:
    """Copy an example."""
    shutil.copytree(EXAMPLES / name, project.folder, dirs_exist_ok=True)


@pytest.fixture
def hello(tmp_path: Path) -> Project:
    """An empty project with the name of the examples, built on this machine in a base without a registry."""
    return Project(tmp_path / "hello", home=tmp_path / "home", GAMEBEAR_BASE="bootstrap")


def test_each_kind_of_project_has_an_example_and_a_page() -> None:
    assert sorted(PAGES) == sorted(path.name for path in EXAMPLES.iterdir())
    assert sorted(PAGES) == sorted(path.stem for path in (ROOT / "docs/how-to/recipes").glob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_init_writes_the_files_of_the_example(hello: Project, name: str) -> None:
    take(hello, name)
    for written in WRITTEN:
        path = hello.folder / written
        kept = path.read_text().removesuffix(f"\n{TABLE}") if written == "pyproject.toml" else ""
        path.unlink()
        if kept and kept != TABLE:
            path.write_text(kept)
    hello.gamebear("init", GAMEBEAR_ARCH="amd64").ok()
    for written in WRITTEN:
        expected = (EXAMPLES / name / written).read_text()
        found = (hello.folder / written).read_text().replace('arch = "amd64"\n', "")
        assert found == expected


@pytest.mark.parametrize("name", PAGES)
def test_the_page_shows_the_files_of_the_example(name: str) -> None:
    text = (ROOT / "docs/how-to/recipes" / f"{name}.md").read_text()
    shown = dict(re.findall(r"^```\w*\n# (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert {"dodo.py", "buildscripts/hello.py"} <= shown.keys()
    assert shown == {path: (EXAMPLES / name / path).read_text() for path in shown}


def built(hello: Project, name: str) -> Path:
    """Build an example. Return its `build` folder."""
    take(hello, name)
    hello.doit().ok()
    assert hello.doit().ok().ran == []
    return hello.folder / "build"


def output_of(*command: object) -> str:
    """Run a program and return its output."""
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


@pytest.mark.system
@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("make", "hello"),
        ("cmake", "hello/usr/bin/hello"),
        ("autotools", "hello/usr/bin/hello"),
        pytest.param("meson", "hello/usr/bin/hello", marks=pytest.mark.slow),
        pytest.param("cargo", "hello", marks=pytest.mark.slow),
        pytest.param("go", "hello", marks=pytest.mark.slow),
    ],
)
def test_a_program_is_built_and_runs(hello: Project, name: str, program: str) -> None:
    for stale in ("hello", "hello.o", "target/release/hello"):  # of a build on this machine
        hello.write(stale, "#!/bin/sh\necho stale\n").chmod(0o755)
    assert output_of(built(hello, name) / program) == "hello\n"


@pytest.mark.system
def test_a_repository_is_set_up_and_built(tmp_path: Path, git_settings: Path) -> None:
    upstream = Project(tmp_path / "upstream" / "hello", home=tmp_path / "home")
    take(upstream, "make")
    for name in WRITTEN:
        (upstream.folder / name).unlink()
    call_git(upstream.folder, "init", "--quiet")
    commit(upstream.folder)
    project = Project(tmp_path / "empty", home=tmp_path / "home", GAMEBEAR_BASE="bootstrap")
    project.gamebear("init", f"file://{upstream.folder}").ok()
    project.doit().ok()
    assert output_of(project.folder / "build/hello") == "hello\n"


@pytest.mark.system
def test_a_build_that_fails_names_the_line_to_edit(hello: Project) -> None:
    take(hello, "make")
    hello.write("hello.c", "#include <zlib.h>\n")
    run = hello.doit().failed("make --always-make", "hello.py, line 9", "build/logs/hello.log")
    assert "zlib.h: No such file or directory" in run.text


@pytest.mark.system
def test_a_wheel_is_built_and_its_module_runs(hello: Project) -> None:
    (wheel,) = (built(hello, "python-wheel") / "hello").iterdir()
    assert wheel.name == "hello-1.0-py3-none-any.whl"
    assert zipfile.ZipFile(wheel).namelist()[0] == "hello.py"
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); import hello; hello.main()"
    assert output_of(sys.executable, "-I", "-c", code) == "hello\n"


@pytest.mark.system
@pytest.mark.slow
def test_a_debian_package_is_built_and_its_program_runs(hello: Project, tmp_path: Path) -> None:
    packages = list((built(hello, "debian-package") / "hello").iterdir())
    (package,) = (path for path in packages if path.name.startswith("hello_"))
    assert output_of("dpkg-deb", "--field", package, "Package", "Version") == "Package: hello\nVersion: 1.0\n"
    output_of("dpkg-deb", "--extract", package, tmp_path / "root")
    assert output_of(tmp_path / "root/usr/bin/hello") == "hello\n"


@pytest.mark.system
@pytest.mark.slow
def test_a_kernel_module_is_built_for_debians_kernel(hello: Project) -> None:
    module = built(hello, "kernel-module") / "hello" / "hello.ko"
    about = output_of("readelf", "--string-dump=.modinfo", module)
    assert "description=says hello\n" in about
    assert re.search(rf"vermagic=6\.1\.0-\d+-{own_architecture()} SMP", about)


@pytest.mark.system
def test_a_containerfile_becomes_an_image(hello: Project) -> None:
    archive = built(hello, "containerfile") / "hello.tar"
    with tarfile.open(archive) as tar:
        (manifest,) = (blob["digest"] for blob in content(tar, "index.json")["manifests"])
        parts = content(tar, blob_of(manifest))
        config = content(tar, blob_of(parts["config"]["digest"]))
        with tarfile.open(fileobj=tar.extractfile(blob_of(parts["layers"][1]["digest"]))) as layer:
            program = layer.extractfile("usr/local/bin/hello")
            assert program is not None and program.read() == (hello.folder / "hello.sh").read_bytes()
    assert config["config"]["Cmd"] == ["hello"]


def content(tar: tarfile.TarFile, name: str) -> Any:
    """Return the content of a JSON file in an archive."""
    file = tar.extractfile(name)
    assert file is not None
    return json.load(file)


def blob_of(digest: str) -> str:
    """Return the place of a blob in an OCI image layout."""
    return f"blobs/{digest.replace(':', '/')}"
