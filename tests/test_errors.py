"""Each error of the table in `errors.py` has two lines that name object, cause and fix, and is in the reference."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from doit import doit_cmd
from errors import (
    DODO,
    DOIT,
    IMAGES,
    LONGEST,
    PERMISSIONS,
    PYPROJECT,
    ROWS,
    SCRIPTS,
    SETTINGS,
    SOURCES,
    SSH,
    Page,
    Row,
    cell,
)
from project import OUR_FRAMES, ROOT, Project
from sshd import Sshd, new_key, public
from warm import Warm

import gamebear_tasks
from gamebear_tasks.builders.registry import open_builder
from gamebear_tasks.builders.transports.ssh.connection import SSHConnection
from gamebear_tasks.config import settings
from gamebear_tasks.errors import GamebearError

LOCK = threading.Lock()


def locked() -> None:
    """A function that cannot be sent."""
    LOCK.acquire()


LOOP: dict[str, object] = {}
LOOP["a"] = LOOP

FILES = {
    "x.py": "import shutil; shutil.copy('in', 'x')\n",
    "bad.py": "a = 1\nc.run(\n",
    "tabs.py": "if a:\n\tb()\n        c()\n",
    "with_modules.py": "import mod, pkg.deep\n",
    "mod.py": "",
    "pkg/deep.py": "",
    "in": "",
    "folder/file": "",
    "build/file": "",
}


def ids(row: Row) -> str:
    """Return the id of a test: the user's action."""
    return re.sub(r"\W+", "-", row.did)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder while its dodo.py is loaded, without variables of doit's."""
    made = Project(tmp_path / "project", home=tmp_path / "home")
    for name, text in FILES.items():
        made.write(name, text)
    monkeypatch.chdir(made.folder)
    monkeypatch.setattr(doit_cmd, "_CMDLINE_VARS", {})
    return made.folder


UPDATE = "update the page: pytest tests/test_errors.py -m 'not slow' --write-errors"


@pytest.fixture(scope="session")
def page(request: pytest.FixtureRequest) -> Iterator[Page]:
    """The error reference. With `--write-errors`, the texts that the tests set are written after the last test."""
    page = Page(ROOT / "docs" / "reference" / "errors.md")
    yield page
    if request.config.option.write_errors:
        page.write()


Check = Callable[[Row, str], None]


@pytest.fixture
def check(page: Page, request: pytest.FixtureRequest) -> Check:
    """Assert that an error has two lines, names what its row says, and is the one in the error reference."""

    def two_lines(row: Row, text: str) -> None:
        failure, arrow, fix = text.partition("\n→ ")
        assert failure and arrow and fix and text.count("\n") == 1, text
        assert max(len(failure), len(fix)) < LONGEST, text
        assert row.lacks(failure, fix) == [], text
        assert "secret" not in text
        if request.config.option.write_errors:
            page.cells[row.key] = cell(failure, fix)
        assert page.cells.get(row.key) == cell(failure, fix), UPDATE

    return two_lines


def failure(attempt: Callable[[], object]) -> str:
    """Return the text of the error that an attempt raises."""
    with pytest.raises(GamebearError) as caught:
        attempt()
    return str(caught.value)


def with_settings(what: str) -> None:
    for part in re.split(r" (?=\w+=)", what):
        doit_cmd.set_var(*part.split("=", 1))
    chosen = settings()
    open_builder(chosen.builder_for(chosen.arch))


@pytest.mark.parametrize("row", SETTINGS, ids=ids)
def test_an_invalid_setting(folder: Path, row: Row, check: Check) -> None:
    check(row, failure(lambda: with_settings(row.what)))


@pytest.mark.parametrize("row", PYPROJECT, ids=ids)
def test_an_invalid_pyproject(folder: Path, row: Row, check: Check) -> None:
    (folder / "pyproject.toml").write_text(f"[tool.gamebear]\n{row.what}\n" if "[tool" not in row.what else row.what)
    check(row, failure(settings))


@pytest.mark.parametrize("row", [*DODO, *SOURCES, *IMAGES], ids=ids)
def test_an_invalid_dodo(folder: Path, row: Row, check: Check) -> None:
    names = {**vars(gamebear_tasks), "locked": locked, "LOOP": LOOP}
    names |= {name: getattr(gamebear_tasks, name) for name in gamebear_tasks.__all__}
    check(row, failure(lambda: eval(row.what, names)))


# through doit


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """A doit that starts at once."""
    made = Warm()
    yield made
    made.close()


def without_doits_lines(output: str) -> str:
    """Return the error in doit's output."""
    own = re.compile(r"\.  |-- |TaskError - |TaskFailed - |#+$")
    return "\n".join(line for line in output.splitlines() if line and not own.match(line)).removeprefix("ERROR: ")


@pytest.mark.system
@pytest.mark.parametrize("row", DOIT, ids=ids)
def test_a_run_that_fails(folder: Path, tmp_path: Path, warm: Warm, row: Row, check: Check) -> None:
    project = Project(folder, home=tmp_path / "home")
    task, _, command = row.what.rpartition(" → ")
    project.write(
        "dodo.py",
        f"from gamebear_tasks import *\ndef task_x():\n    return {task}\n",
    )
    if row.lock:
        project.write("gamebear.lock", row.lock)
    run = warm.doit(folder, project.environment, *command.split()[1:])
    assert run.status != 0 and not OUR_FRAMES.search(run.text), run.text
    check(row, without_doits_lines(run.text))


WITHOUT_RIGHTS = ("--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")
"""Drops the capability by which root bypasses file permissions."""


@pytest.mark.system
@pytest.mark.parametrize("row", PERMISSIONS, ids=ids)
def test_a_permission_or_limit_of_this_machine(folder: Path, tmp_path: Path, row: Row, check: Check) -> None:
    project = Project(folder, home=tmp_path / "home")
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\n"
        "def task_x():\n    return artifact('x.py', inputs=['in'], outputs=['build/x'])\n",
    )
    variables = {}
    within: list[str] = []
    if setting := re.fullmatch(r"([A-Z]+)=(.*)", row.what):
        variables[setting[1]] = setting[2]
    elif row.what.startswith("ulimit "):
        within = ["sh", "-c", f'{row.what}; exec "$@"', "sh"]
    else:
        subprocess.run(["sh", "-e", "-c", row.what], cwd=folder, check=True)
    command = project.gamebear_command("-r", "console", "x")
    done = subprocess.run(
        [str(shutil.which("setpriv")), *WITHOUT_RIGHTS, "--", *within, *command],
        cwd=folder,
        env={**project.environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    message = done.stdout + done.stderr
    assert done.returncode != 0 and not OUR_FRAMES.search(message), message
    check(row, without_doits_lines(message).replace(str(tmp_path / "home"), "~"))


@pytest.mark.system
@pytest.mark.parametrize("into", ["> /dev/full", ">&-", "<&- >&- 2>&-", "2> /dev/full", "2>&1 | true"])
def test_a_build_continues_without_a_usable_output(folder: Path, tmp_path: Path, into: str) -> None:
    project = Project(folder, home=tmp_path.parent / "shown")
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\n"
        "def task_x():\n    return artifact('x.py', inputs=['in'], outputs=['build/x'])\n",
    )
    command = f"set -o pipefail; {shlex.join(project.gamebear_command())} {into}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=project.environment, capture_output=True, text=True)
    assert done.returncode == 0 and not OUR_FRAMES.search(done.stdout + done.stderr), done.stderr
    assert (folder / "build" / "x").exists()
    assert ("output stops here (No space left on device); builds continue" in done.stderr) == (into == "> /dev/full")


@pytest.mark.system
@pytest.mark.parametrize("reporter", ["live", "console"])
def test_threads_work_without_dev_shm(folder: Path, tmp_path: Path, reporter: str) -> None:
    project = Project(folder, home=tmp_path.parent / "shown")
    project.write("dodo.py", "from gamebear_tasks import *\ndef task_x():\n    return {'actions': ['touch made']}\n")
    within = ["unshare", "--mount", "sh", "-c", 'mount --bind /proc/self/fdinfo /dev/shm; exec "$@"', "sh"]
    for more, status in ((), 3), (("-P", "thread"), 0):
        command = [*within, *project.gamebear_command("run", "-r", reporter, "-n", "2", *more, "x")]
        done = subprocess.run(command, cwd=folder, env=project.environment, capture_output=True, text=True, check=False)
        assert done.returncode == status and not OUR_FRAMES.search(done.stderr), done.stderr
        assert ("gamebear -n cannot start processes: /dev/shm" in done.stderr) == (status == 3)
    assert (folder / "made").exists()


@pytest.mark.system
def test_logs_and_records_have_private_permissions(folder: Path, tmp_path: Path) -> None:
    project = Project(folder, home=tmp_path.parent / "shown", GAMEBEAR_PROVENANCE="yes")
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\n"
        "def task_x():\n    return artifact('x.py', inputs=['in'], outputs=['build/x'])\n",
    )
    command = f"umask 077; {shlex.join(project.command('x'))} && {shlex.join(project.command('report'))}"
    subprocess.run(["sh", "-c", command], cwd=folder, env=project.environment, check=True, capture_output=True)
    made = [path for path in (folder / "build").rglob("*") if path.name != "file"]
    assert len(made) > 4 and not [path for path in made if path.stat().st_mode & 0o077]


@pytest.fixture(scope="module")
def reports(system: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """doit's report of each script; one run builds all."""
    folder = tmp_path_factory.mktemp("scripts")
    project = Project(folder / "project", home=folder / "home")
    (project.home / ".config" / "gamebear").mkdir(parents=True)
    (project.home / ".config" / "gamebear" / "builder.json").write_text('{"slots": 4}')
    tasks = "from gamebear_tasks import artifact\n"
    for number, row in enumerate(SCRIPTS):
        project.write(f"s{number}.py", row.what)
        task = f"artifact('s{number}.py', outputs=['build/{number}/out'])"
        tasks += f"def task_s{number}(): return {{**{task}, 'verbosity': 0}}\n"
    project.write("dodo.py", tasks)
    run = project.doit("--continue", "-n", "4", "-P", "thread").failed()
    found = re.findall(r"^TaskFailed - taskid:s(\d+)\n(.+?^The log is .+?)$", run.out, re.MULTILINE | re.DOTALL)
    return {SCRIPTS[int(number)].did: re.sub(r"\bs\d+\b", "x", text) for number, text in found}


@pytest.mark.parametrize("row", SCRIPTS, ids=ids)
def test_a_script_that_fails(reports: dict[str, str], row: Row, check: Check) -> None:
    failure, fix, log = reports[row.did].splitlines()
    check(row, f"{failure}\n{fix}")
    assert log.startswith("The log is build/logs/x.log")


# over SSH


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Keys that the builder does not accept."""
    folder = tmp_path_factory.mktemp("keys")
    return {"other": new_key(folder / "other"), "ecdsa": new_key(folder / "ecdsa", "ecdsa")}


def encrypt(key: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(key)], check=True, capture_output=True)


@pytest.mark.parametrize("row", SSH, ids=ids)
def test_a_connection_that_fails(
    row: Row,
    check: Check,
    server: Sshd,
    home: Path,
    keys: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = tmp_path / "home"
    shutil.copytree(home / ".ssh", own / ".ssh")
    monkeypatch.setenv("HOME", str(own))
    url = {"user": server.account.name, "host": "127.0.0.1", "port": str(server.port)}
    names: dict[str, Any] = {
        **keys, "server": server, "home": own, "url": url, "encrypt": encrypt, "public": public, "shutil": shutil,
        "host": f"[127.0.0.1]:{server.port}", "key": own / ".ssh" / "id_ed25519",
        "config": own / ".ssh" / "config", "known_hosts": own / ".ssh" / "known_hosts",
    }  # fmt: skip
    exec(row.what, names)
    text = failure(lambda: SSHConnection("ssh://{user}@{host}:{port}".format(**url)))
    text = re.sub(r"SHA256:[\w+/]{43}", "SHA256:…", text)
    example = ((server.account.name, "pi"), ("127.0.0.1", "buildpi"), (str(server.port), "2222"), (str(own), "~"))
    for own_value, shown in example:
        text = text.replace(own_value, shown)
    check(row, text)


def test_the_error_reference_lists_each_row_once(page: Page, request: pytest.FixtureRequest) -> None:
    assert len({row.did for row in ROWS}) == len(ROWS)
    if not request.config.option.write_errors:
        assert [row.did for row in ROWS if row.key not in page.cells] == [], UPDATE
        assert page.text() == page.written, UPDATE
