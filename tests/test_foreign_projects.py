"""A project that does not use gamebear-tasks must not notice that it is installed.

The same commands run in two virtual environments, with our wheel and without it, and everything is compared.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from wheels import pip

pytest_plugins = ("wheels",)

pytestmark = pytest.mark.system

DODO = '''
import sys
from pathlib import Path

DOIT_CONFIG = {"default_tasks": ["hello", "report"]}


def task_hello():
    """says hello"""
    return {"actions": ["cp in out", "echo hello"], "file_dep": ["in"], "targets": ["out"], "clean": True}


def task_report():
    """has the name of a command of gamebear"""
    return {"actions": ["echo report > reported"], "targets": ["reported"], "clean": True}


def task_fails():
    return {"actions": ["echo out; echo err >&2; exit 3"]}


def task_raises():
    def action():
        raise ValueError("no")

    return {"actions": [action], "verbosity": 2}


def task_group():
    for name in ("a", "b"):
        yield {"name": name, "actions": [f"echo {name}"], "task_dep": ["hello"], "verbosity": 2}


def task_option():
    return {
        "actions": ["echo %(word)s"],
        "params": [{"name": "word", "long": "word", "default": "none"}],
        "uptodate": [True],
        "verbosity": 2,
    }


for name in ("doctor", "jobs", "lock", "provenance", "prune", "shell", "sources"):
    globals()[f"task_{name}"] = lambda name=name: {"actions": [f"echo {name}"], "verbosity": 2}
'''

COMMANDS = """
doit
doit
doit run hello report fails
doit fails
doit -c fails raises hello
doit raises
doit report
doit shell jobs doctor provenance lock sources prune
doit run report shell
doit report --open
doit jobs follow x
doit -n 2 hello group report
doit -a -n 2 -P thread group jobs
doit -v 2 -a hello
doit option --word some
doit group:a
doit nosuch
doit list
doit list --all --status --deps
doit list --quiet group
doit info hello
doit info report
doit clean --dry-run
doit clean hello report
doit ignore hello
doit hello
doit forget hello
doit forget --all
doit reset-dep
doit dumpdb
doit help
doit help run
doit help report
doit help jobs
doit help hello
doit help task
doit --help
doit --version
doit tabcompletion
doit tabcompletion --shell zsh
doit tabcompletion --hardcode-tasks
doit strace
doit -a -r console hello
doit -a -r executed-only hello
doit -a -r json hello
doit -a -r zero hello
doit -a -r error-only fails
doit -r live hello
doit -r nosuch hello
doit --backend json --db-file db.json hello report
doit --backend json --db-file db.json
doit --backend sqlite3 --db-file db.sqlite hello report
doit list --backend sqlite3 --db-file db.sqlite --status
doit --backend nosuch
doit --backend json --db-file in
doit --db-file in
doit -f nowhere.py list
""".strip().splitlines()


class Environment:
    """A virtual environment with doit, and a project.

    Args:
        folder: where the environment is created.
        project: the project's folder, the same for all environments.
        wheel: gamebear-tasks, to be installed too; None for doit alone.
    """

    def __init__(self, folder: Path, project: Path, wheel: Path | None) -> None:
        self.folder = folder
        self.project = project
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (site,) = (folder / "lib").glob("python*/site-packages")
        for name in ("doit", "cloudpickle"):
            for file in distribution(name).files or ():
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    (site / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(str(file.locate()), site / file)
        self.doit = folder / "bin" / "doit"
        self.doit.write_text(f"#!{folder}/bin/python\nfrom doit.__main__ import main\nmain()\n")
        self.doit.chmod(0o755)
        if wheel is not None:
            pip("--python", folder / "bin" / "python", "install", "--no-index", "--no-deps", wheel)

    def run(self, command: str, **variables: str) -> tuple[int, str, str]:
        """Run a command in the project. Return its exit status and output, without paths and times."""
        done = subprocess.run(
            [self.doit, *command.split()[1:]],
            cwd=self.project,
            env={
                "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
                "HOME": str(self.project),
                "PYTHONHASHSEED": "0",
                **variables,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        out = self._stable(done.stdout)
        if "-n" in command.split() or "dumpdb" in command:  # the order of tasks varies
            out = "\n".join(sorted(out.splitlines()))
        return done.returncode, out, self._stable(done.stderr)

    def _stable(self, text: str) -> str:
        text = text.replace(str(self.folder), "VENV")
        text = re.sub(r'("(?:started|elapsed)": )"?[^,"}]*', r"\1TIME", text)
        return re.sub(r"\b\d{10}\.\d+", "TIME", text)  # an mtime in a database

    def begin(self) -> None:
        """Create the project again."""
        shutil.rmtree(self.project, ignore_errors=True)
        self.project.mkdir()
        (self.project / "dodo.py").write_text(DODO)
        (self.project / "in").write_text("in")

    def files(self) -> dict[str, bytes]:
        """Return the project's files and contents; of binary databases, which contain times, only the existence."""
        return {
            str(path.relative_to(self.project)): b"" if path.name.startswith((".doit.db", "db.")) else path.read_bytes()
            for path in self.project.rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }


@pytest.fixture(scope="module")
def environments(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Environment]:
    """An environment without the package, and one with it."""
    folder = tmp_path_factory.mktemp("foreign")
    project = folder / "project"
    return Environment(folder / "without", project, None), Environment(folder / "with", project, wheel)


def test_all_commands_behave_identically_with_and_without_the_package(
    environments: tuple[Environment, Environment],
) -> None:
    told = []
    for environment in environments:
        environment.begin()
        told.append([(command, environment.run(command), environment.files()) for command in COMMANDS])
    for without, with_ours in zip(*told, strict=True):
        assert with_ours == without
    statuses = {command: status for command, (status, _, _), _ in told[0]}
    assert statuses["doit report"] == 0 and statuses["doit fails"] == 1 and statuses["doit nosuch"] == 3


@pytest.mark.parametrize(
    "command", ["doit", "doit list", "doit help report", "doit tabcompletion", "doit -a -n 2 hello"]
)
def test_no_module_of_the_package_is_imported(environments: tuple[Environment, Environment], command: str) -> None:
    _, with_ours = environments
    with_ours.begin()
    status, _, imports = with_ours.run(command, PYTHONPROFILEIMPORTTIME="1")
    assert status == 0 and "doit.cmd_base" in imports
    assert "gamebear" not in imports


def test_the_test_environment_has_the_package(environments: tuple[Environment, Environment]) -> None:
    without, with_ours = environments
    found = [(each.folder / "bin" / "gamebear").exists() for each in (without, with_ours)]
    assert found == [False, True]
