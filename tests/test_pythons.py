"""The runner on the oldest and newest supported Debian: Python 3.9 and 3.13, buildah 1.19 and 1.39."""

from __future__ import annotations

import ast
import hashlib
import io
import shutil
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from debian import Debian
from project import ROOT, Memory
from test_jobspec import WITNESS, WITNESS_DIGEST
from wheels import pip

from gamebear_tasks.builders.base import Order, Status
from gamebear_tasks.builders.protocol.bootstrap import bundle
from gamebear_tasks.builders.protocol.client import RunnerBuilder
from gamebear_tasks.builders.protocol.session import CHUNK
from gamebear_tasks.builders.protocol.transport import Channel
from gamebear_tasks.builders.transports.local import ProcessChannel, ProcessConnection
from gamebear_tasks.config import own_architecture
from gamebear_tasks.errors import BuilderError
from gamebear_tasks.jobspec.canonical_json import Json
from gamebear_tasks.jobspec.spec import File, Job

pytest_plugins = ("wheels",)

RUNNER = ROOT / "gamebear_tasks" / "runner"
PYTHON = {"bullseye": "3.9", "trixie": "3.13"}
BUILDER = ("buildah", "busybox-static", "crun", "grep", "procps", "python3", "python3-pytest", "python3-venv")
CLIENT = ("python3-cloudpickle", "python3-doit", "python3-platformdirs")
SHELLS = ("sh", "bash", "zsh", "bsd-csh", "tcsh", "fish", "busybox")


@pytest.fixture(scope="session")
def releases(system: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Debian]]:
    """The releases by suite, and `minimal`, which has python3-minimal only; unpacked at the same time."""
    folder = tmp_path_factory.mktemp("debian")
    made = {
        "trixie": Debian(
            "trixie", folder / "trixie", [*BUILDER, *CLIENT, "netavark", "bash", "csh", "fish", "tcsh", "zsh"]
        ),
        "bullseye": Debian("bullseye", folder / "bullseye", BUILDER),
        "minimal": Debian("bullseye", folder / "minimal", ["python3-minimal"]),
    }
    try:
        for release in made.values():
            release.ready()
        for suite in PYTHON:  # the runner as a Python package, for code that its command line does not start
            shutil.copytree(RUNNER, made[suite].root / "srv/gamebear_tasks/runner")
            (made[suite].root / "srv/gamebear_tasks/__init__.py").touch()
        yield made
    finally:
        for release in made.values():
            release.remove()


@pytest.fixture(params=PYTHON)
def release(request: pytest.FixtureRequest, releases: Mapping[str, Debian]) -> Debian:
    return releases[request.param]


@pytest.fixture
def trixie(releases: Mapping[str, Debian]) -> Debian:
    return releases["trixie"]


def builder(*prefix: str) -> RunnerBuilder:
    """Return the builder behind a command line."""
    return RunnerBuilder("test:", "the builder", lambda: ProcessConnection(prefix))


class LoginShell:
    """Starts programs with the account's login shell, as sshd does."""

    is_alive = True

    def __init__(self, *shell: str) -> None:
        self.shell = shell

    def start(self, command: str) -> Channel:
        """Start a program."""
        return ProcessChannel([*self.shell, "-c", command])

    def close(self) -> None:
        """Do nothing."""


def order(script: Path, *, args: Mapping[str, Json] | None = None, **inputs: Path) -> Order:
    """Return the order of a script that creates `x` from files and a source tree `tree`."""

    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    tree = script.parent / "tree.tar"
    with tarfile.open(tree, "w") as tar:
        member = tarfile.TarInfo("sub/word")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"hello"))
    job = Job(
        arch=own_architecture(),
        program=script.name,
        identity=sha256(script),
        outputs=("x",),
        inputs={name: File(sha256(path)) for name, path in inputs.items()},
        sources={"tree": {"test": sha256(tree)}},
        args=args or {},
    )
    files = {sha256(path): path for path in (script, *inputs.values())}
    return Order(job, files, lambda: {"tree": (sha256(tree), tree)}, time_limit=120.0)


def follow(builder: RunnerBuilder, order: Order) -> tuple[Status, str]:
    """Build a job. Return its final status and its log."""
    status, log = builder.submit(order), b""
    while True:
        status, data = builder.follow(order.job.digest, status.attempt, len(log))
        log += data
        if status.is_final and not data:
            return status, log.decode()


# behaviour on other releases


def test_the_uploaded_runner_reports_its_location(release: Debian) -> None:
    for _ in range(2):
        there = builder(*release.enter())
        assert str(there.describe()["python"]).startswith(f"{PYTHON[release.suite]}.")
        there.close()
    assert [path.name for path in (release.root / "root/.cache/gamebear/v1/runner").iterdir()] == [bundle().sha256]


SCRIPT = """
#| arg: greeting: str = "hi"
#| arg: count: int
import hashlib, sys
print("Python", *sys.version_info[:2])
with open("word", "w") as file:
    file.write(greeting * count + open("tree/sub/word").read())
with Container("scratch") as c:
    c.copy_in("/bin/busybox", "/bin/busybox")
    c.copy_in("word", "/in/word")
    c.copy_in("large", "/in/large")
    output = c.run(["/bin/busybox", "sh", "-c", "cat /in/word; sha256sum < /in/large"], stdout=-1, text=True).stdout
    c.run(["/bin/busybox", "sh", "-c", "cat /in/word > /out"])
    c.copy_out("/out", "x")
assert hashlib.sha256(open("large", "rb").read()).hexdigest() in output
if output:
    return
raise AssertionError
"""


def test_a_job_runs_from_upload_to_artifact(release: Debian, tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.write_text(SCRIPT)
    large = tmp_path / "large"
    large.write_bytes(b"0123456789abcdef" * (CHUNK // 8))
    there = builder(*release.enter())
    made = order(script, args={"greeting": "good day", "count": 2}, large=large)
    status, log = follow(there, made)
    assert status.state == "done", (status, log)
    assert log.startswith("Python {} {}\n".format(*PYTHON[release.suite].split(".")))
    target = Memory()
    there.fetch(made.job.digest, status.attempt, "x", 0, target, status.outputs["x"].size)
    assert target.getvalue() == b"good daygood dayhello"
    assert there.submit(made).joined, "it is not built again"
    there.close()
    store = release.root / "root/.cache/gamebear/v1"
    assert list((store / "live").iterdir()) == []
    assert list((store / "jobs").glob("*/work")) == []


def test_a_failed_script_is_shown_without_frames_of_the_runner(release: Debian, tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.write_text("def f():\n    raise ValueError('upside down')\nif 1:\n    f()\n    return\n")
    there = builder(*release.enter())
    status, log = follow(there, order(script))
    there.close()
    assert status.failure is not None and status.failure.message == "x.py, line 2: ValueError: upside down"
    assert 'File "x.py", line 4, in <module>' in log and 'File "x.py", line 2, in f' in log
    assert "gamebear_runner" not in log


def test_a_builder_without_buildah_is_reported_with_the_fix(release: Debian, tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.write_text("open('x', 'w').close()")
    there = builder(*release.enter(hidden=["/usr/bin/buildah"], HOME="/home"))
    assert there.describe()["buildah"] is False
    status, log = follow(there, order(script))
    there.close()
    assert status.failure is not None and "buildah" in status.failure.message
    assert "sudo apt install buildah" in status.failure.hint
    assert log == "", "the error is shown once"


# imports


def test_every_module_compiles_and_can_be_imported(release: Debian) -> None:
    release.run("python3", "-W", "error", "-m", "compileall", "-q", "-f", "/srv/gamebear_tasks")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in RUNNER.rglob("*.py")]
    code = "import importlib, sys; sys.path.insert(0, '/srv'); list(map(importlib.import_module, sys.argv[1:]))"
    release.run("python3", "-I", "-S", "-W", "error", "-c", code, *names)


def imported(path: Path) -> Iterator[str]:
    """Yield the modules that a module imports at run time, also in functions, without those of the runner."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert path.parents[node.level - 1].is_relative_to(RUNNER), path
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_runner_imports_only_itself_and_the_standard_library(release: Debian) -> None:
    names = {name for path in RUNNER.rglob("*.py") for name in imported(path)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
    code = "import importlib, sys; list(map(importlib.import_module, sys.argv[1:]))"
    release.run("python3", "-I", "-S", "-c", code, *sorted(names))


@pytest.mark.parametrize("name", ["test_language.py", "test_rootfs.py"])
def test_unit_tests_of_the_runner_pass_on_this_python(release: Debian, name: str) -> None:
    shutil.copy(ROOT / "tests" / name, release.root / "srv")
    output = release.run("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"/srv/{name}", PYTHONPATH="/srv")
    assert " passed" in output and " failed" not in output


# the client


def test_a_job_has_the_same_digest_on_this_python(trixie: Debian) -> None:
    package = trixie.root / "srv/gamebear_tasks/jobspec"
    package.mkdir()
    for name in ("spec.py", "canonical_json.py"):
        shutil.copy(ROOT / "gamebear_tasks" / "jobspec" / name, package)
    code = f"from gamebear_tasks.jobspec.spec import File, Job; print({WITNESS!a}.digest)"
    assert trixie.run("python3", "-W", "error", "-c", code, PYTHONPATH="/srv").strip() == WITNESS_DIGEST


DODO = """
from gamebear_tasks import artifact

def say():
    with open("y", "w") as file:
        file.write("hello")

def task_x():
    return artifact("x.py", outputs=["build/x"])

def task_y():
    return artifact(say, outputs=["build/y"])
"""


def test_the_client_builds_with_debians_own_packages(trixie: Debian, wheel: Path) -> None:
    project = trixie.root / "srv/project"
    (project / "site").mkdir(parents=True)
    pip("install", "--no-index", "--no-deps", "--target", project / "site", wheel)
    (project / "dodo.py").write_text(DODO)
    (project / "x.py").write_text("open('x', 'w').write('hello')")
    doit = "cd /srv/project && python3 -m doit"
    trixie.run("sh", "-c", doit, PYTHONPATH="/srv/project/site")
    assert [(project / "build" / name).read_text() for name in "xy"] == ["hello", "hello"]
    assert trixie.run("sh", "-c", doit, PYTHONPATH="/srv/project/site") == "-- x\n-- y\n"


# start


BANNERS = {
    "root/.cshrc": 'set who = tcsh; echo -n "Welcome to $who"',
    "root/.zshenv": "printf 'Welcome to zsh'",
    "root/.bashrc": "yes 'Welcome to bash' | head -c 300000",
    "root/.config/fish/config.fish": "echo -n Welcome to fish",
}


@pytest.mark.parametrize("shell", SHELLS)
def test_any_login_shell_starts_the_runner_regardless_of_its_output(trixie: Debian, shell: str) -> None:
    for name, text in BANNERS.items():
        (trixie.root / name).parent.mkdir(parents=True, exist_ok=True)
        (trixie.root / name).write_text(f"{text}\n")
    words = (shell, "sh") if shell == "busybox" else (shell,)
    enter = trixie.enter(BASH_ENV="/root/.bashrc")  # bash reads .bashrc by itself where sshd is its parent
    there = RunnerBuilder("test:", "the builder", lambda: LoginShell(*enter, *words))
    assert str(there.describe()["python"]).startswith("3.13")
    there.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_missing_python_is_reported_in_any_login_shell(trixie: Debian, shell: str) -> None:
    words = ("/bin/busybox", "sh") if shell == "busybox" else (f"/bin/{shell}",)
    enter = trixie.enter(PATH="/nowhere", HOME="/nowhere")
    with pytest.raises(BuilderError, match=r"cannot start python3 .+\.\n→ On the builder: sudo apt install"):
        RunnerBuilder("test:", "the builder", lambda: LoginShell(*enter, *words)).describe()


def test_a_shell_that_cannot_be_started_is_quoted(trixie: Debian) -> None:
    with pytest.raises(BuilderError, match=r"cannot start python3 \(exit status 127\): .*no-such-shell"):
        RunnerBuilder("test:", "the builder", lambda: LoginShell(*trixie.enter(), "/bin/no-such-shell")).describe()


def test_python3_minimal_is_rejected_with_the_fix(releases: Mapping[str, Debian]) -> None:
    with pytest.raises(BuilderError, match=r"has an incomplete Python: json is missing"):
        builder(*releases["minimal"].enter()).describe()
    assert not (releases["minimal"].root / "root/.cache").exists()


OLD = """#!/bin/sh
exec /usr/bin/python3 -I -S -c 'import sys; sys.version_info = (3, 8, 10, "final", 0); exec(sys.argv[1])' "$4"
"""


def test_a_python_that_is_too_old_is_named(trixie: Debian) -> None:
    old = trixie.root / "srv/old/python3"
    old.parent.mkdir()
    old.write_text(OLD)
    old.chmod(0o755)
    with pytest.raises(BuilderError, match=r"the builder has Python 3\.8\.10, but the runner requires 3\.9"):
        builder(*trixie.enter(PATH="/srv/old:/usr/bin")).describe()


def test_the_command_needs_no_quoting_in_any_shell() -> None:
    command = bundle().command
    assert command.isascii() and command.isprintable()
    assert command.count("'") == 2 and command.endswith("'"), "one word in single quotes, and the last"
    assert not set("!\\") & set(command), "csh and fish look for these even there"
    assert len(command) < 2048


def test_a_store_that_cannot_be_used_is_named(trixie: Debian) -> None:
    store = trixie.root / "var/cache/gamebear/v1"
    store.mkdir(parents=True)
    (store / "blobs").touch()
    with pytest.raises(BuilderError, match=r"The builder's store cannot be used: .*/v1/blobs"):
        builder(*trixie.enter(XDG_CACHE_HOME="/var/cache")).describe()


def test_a_home_that_cannot_be_written_to_is_named(trixie: Debian) -> None:
    output = r"the builder cannot store the runner: .*/proc/none.*\.\n→ Free disk space"
    with pytest.raises(BuilderError, match=output):
        builder(*trixie.enter(HOME="/proc/none")).describe()
