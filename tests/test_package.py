"""The wheel: contents, installation and use."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from project import ROOT, Project
from wheels import pip

pytestmark = pytest.mark.system

pytest_plugins = ("wheels",)

DODO = '''
from gamebear_tasks import archive, artifact, debian, either, git

def task_hello():
    """says hello"""
    return artifact("hello.py", outputs=["out/hello"])

def task_tree():
    """has a source"""
    tree = git("https://git.example/tree.git", rev="52c38a4a756b30efecc6470b5e4d4f22f9187a45")
    return artifact("hello.py", sources={"tree": tree}, outputs=["out/tree"])
'''


class Elsewhere(Project):
    """A project with a separate virtual environment in which the wheel is installed."""

    def __init__(self, folder: Path, home: Path, wheel: Path) -> None:
        super().__init__(folder, home)
        del self.environment["PYTHONPATH"]
        self.python = str(folder / "venv" / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        pip("--python", self.python, "install", "--no-index", "--no-deps", wheel)
        # Shared dependencies: a path in a .pth file does not load other .pth files, such as that of this checkout.
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))


@pytest.fixture(scope="module")
def elsewhere(system: None, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("elsewhere")
    project = Elsewhere(folder / "project", folder / "home", wheel)
    project.write("dodo.py", DODO)
    project.write("hello.py", "open('hello', 'w').write('hello')")
    return project


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "gamebear_tasks"
    ours = {str(path.relative_to(ROOT)) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == ours
    assert {
        "gamebear_tasks/py.typed",
        "gamebear_tasks/runner/__main__.py",
        "gamebear_tasks/sources/deterministic_tar.py",
    } <= names


def test_the_wheel_brings_its_builders_and_its_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        builders = archive.read(about["entry_points.txt"]).decode()
    assert "licenses/LICENSE" in about
    assert "[gamebear_tasks.builders]" in builders and "local = " in builders and "ssh = " in builders


def test_a_dodo_file_in_another_folder_imports_the_installed_package(elsewhere: Project) -> None:
    assert where(elsewhere).is_relative_to(elsewhere.folder / "venv")
    listed = elsewhere.doit("list").ok().out.split("\n")
    assert [line.split()[0] for line in listed if line] == ["hello", "tree"]


def where(project: Project) -> Path:
    """Return the file of the package that a project's Python finds."""
    command = [project.command()[0], "-c", "import gamebear_tasks; print(gamebear_tasks.__file__)"]
    done = subprocess.run(
        command, cwd=project.folder, env=project.environment, capture_output=True, text=True, check=True
    )
    return Path(done.stdout.strip())


def test_the_installed_package_builds(elsewhere: Project) -> None:
    elsewhere.doit("hello").ok()
    assert (elsewhere.folder / "out" / "hello").read_text() == "hello"
