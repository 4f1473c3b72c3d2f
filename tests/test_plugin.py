"""Builders from other packages: the examples of docs/how-to/own-builder.md, installed and used as documented."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT, Project, wait_for
from sshd import Account
from wheels import build, pip

from gamebear_tasks.builders.registry import open_builder
from gamebear_tasks.errors import BuilderError, SettingsError

pytest_plugins = ("wheels",)

DOCUMENT = ROOT / "docs" / "how-to" / "own-builder.md"
EXAMPLE = ROOT / "docs" / "examples" / "user-builder"

DODO = """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", inputs=["in/word"], outputs=["build/x"])
"""

WHO = """
import os
with open("x", "w") as file:
    user = open("/proc/self/uid_map").read().split()[1]  # who we are outside of the namespace
    print(user, os.path.expanduser("~"), os.environ.get("TOKEN"), open("word").read(), file=file)
"""

SLOW = """
import os, time
print("begin")
while not os.path.exists({go!r}):
    time.sleep(0.02)
print("end")
with open("x", "w") as file:
    file.write(open("word").read())
"""


def documented() -> dict[str, str]:
    """Return the code blocks of the document by the file name in their first line."""
    blocks = {}
    fences = re.finditer(r"^( *)```(?:toml|python)\n(.*?)^ *```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    for _, block in (match.groups() for match in fences):
        name, _, text = textwrap.dedent(block).partition("\n")
        blocks[name.removeprefix("# ")] = text
    return blocks


@pytest.fixture(scope="session")
def plugins(system: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which both examples are installed."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, text in documented().items():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_text(text)
    build(EXAMPLE, folder / "source" / "spool", into=folder / "wheels")
    pip("install", "--no-index", "--no-deps", "--target", folder / "site", *(folder / "wheels").glob("*.whl"))
    return folder / "site"


@pytest.fixture
def mine(tmp_path: Path, plugins: Path) -> Project:
    """A project of a user who has installed the examples."""
    project = Project(
        tmp_path / "project",
        home=tmp_path / "home",
        PYTHONPATH=f"{plugins}:{ROOT}",
        TOKEN="of-root",
    )
    project.write("dodo.py", DODO)
    project.write("x.py", WHO)
    project.write("in/word", "hello")
    return project


@pytest.fixture
def installed(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(plugins)


def install(folder: Path, scheme: str, target: str) -> None:
    """Install a package that consists of an entry point."""
    about = folder / f"{target.partition(':')[0]}_plugin-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about.name[:-12]}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[gamebear_tasks.builders]\n{scheme} = {target}\n")


# another account of this machine


def test_the_document_shows_the_example_as_it_is() -> None:
    blocks = documented()
    for path in ("pyproject.toml", "gamebear_user_builder.py"):
        assert blocks[f"user-builder/{path}"] == (EXAMPLE / path).read_text()


def test_another_account_builds_without_the_package(mine: Project, account: Account) -> None:
    mine.doit(f"builder=user:{account.name}", "x").ok()
    target = mine.folder / "build" / "x"
    assert target.read_text() == f"{account.uid} {account.home} None hello\n"
    assert target.stat().st_uid == os.getuid()
    store = account.home / ".cache" / "gamebear"
    assert {path.stat().st_uid for path in [store, *store.glob("v1/jobs/*/*")]} == {account.uid}


def test_a_missing_account_is_named(mine: Project) -> None:
    mine.doit("builder=user:nobody-at-all", "x").failed("This machine has no user 'nobody-at-all'.", "useradd")


@pytest.mark.usefixtures("installed")
def test_a_user_other_than_root_is_rejected(monkeypatch: pytest.MonkeyPatch, account: Account) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BuilderError, match=f"Only root may start programs as {account.name}"):
        open_builder(f"user:{account.name}").describe()


def test_a_url_without_a_name_is_rejected(mine: Project) -> None:
    mine.doit("builder=user:", "x").failed("The builder 'user:' has no user name", "Use builder=user:NAME.")


def test_an_account_describes_itself(mine: Project, account: Account) -> None:
    output = mine.gamebear("doctor", f"builder=user:{account.name}").ok().out
    assert f"user:{account.name} is ready" in output and f"{account.home}/.cache/gamebear/v1" in output


# entry points


@pytest.mark.usefixtures("installed")
def test_an_unknown_scheme_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(
        SettingsError,
        match=r"scheme: 'moon'\.\n→ Use one of dask, dask\+tls, local, spool, ssh, user, or",
    ):
        open_builder("moon:x")


@pytest.mark.parametrize("target", ["not_there_at_all:open_builder", "json:open_builder"])
def test_a_package_that_is_broken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    install(tmp_path, "moon", target)
    monkeypatch.syspath_prepend(tmp_path)
    package = target.partition(":")[0]
    with pytest.raises(SettingsError, match=f"The builder 'moon:' of the package {package}_plugin cannot be loaded"):
        open_builder("moon:x")


def test_two_packages_with_one_scheme_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "moon", "json:loads")
    install(tmp_path, "moon", "pickle:loads")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingsError, match="'moon:' is ambiguous: json_plugin and pickle_plugin"):
        open_builder("moon:x")


# a builder from scratch


@pytest.fixture
def spool(mine: Project, plugins: Path) -> Iterator[Path]:
    """A spool folder and its worker."""
    folder = mine.folder.parent / "spool"
    folder.mkdir()
    mine.environment["GAMEBEAR_BUILDER"] = f"spool:{folder}"
    worker = subprocess.Popen([sys.executable, plugins.parent / "source" / "spool" / "worker.py", folder])
    try:
        yield folder
    finally:
        worker.kill()
        worker.wait()


def builds(spool: Path) -> int:
    return len(list(spool.glob("[!.]*/log")))


def test_the_example_builder_builds_once(mine: Project, spool: Path) -> None:
    mine.doit("x").ok()
    target = mine.folder / "build" / "x"
    assert target.read_text().endswith("hello\n")
    before = [path.stat().st_mtime_ns for path in spool.glob("*/log")]
    mine.doit("clean", "x").ok()
    mine.doit("x").ok()
    assert target.exists()
    assert [path.stat().st_mtime_ns for path in spool.glob("*/log")] == before
    assert list(spool.glob(".*")) == []


def test_a_killed_client_of_the_example_builder_finds_its_job_again(mine: Project, spool: Path) -> None:
    go = mine.folder / "go"
    mine.write("x.py", SLOW.format(go=str(go)))
    client = mine.start("x")
    wait_for(lambda: b"begin" in (mine.folder / "doit.out").read_bytes())
    client.kill()
    client.wait()
    go.touch()
    assert "begin" not in mine.doit("x").ok().out
    assert (mine.folder / "build" / "x").read_text() == "hello"
    assert (mine.folder / "build" / "logs" / "x.log").read_text() == "begin\nend\n"
    assert builds(spool) == 1


def test_ctrl_c_stops_a_job_of_the_example_builder(mine: Project, spool: Path) -> None:
    mine.write("x.py", SLOW.format(go="/proc/nowhere"))
    client = mine.start("x")
    wait_for(lambda: b"begin" in (mine.folder / "doit.out").read_bytes())
    client.send_signal(signal.SIGINT)
    assert client.wait(60) != 0
    wait_for(lambda: list(spool.glob("*/end.json")))


def test_a_failure_of_the_example_builder_is_reported_and_built_again(mine: Project, spool: Path) -> None:
    mine.write("x.py", "print('no'); raise SystemExit(3)")
    shown = mine.doit("x").failed("x failed on spool:", ": exited with 3.", "The log is")
    assert shown.out.splitlines().count("no") == 1 and "| no" not in shown.out  # already acknowledged
    mine.doit("-v", "1", "x").failed(": exited with 3.", "and ends with: | no")
    mine.doit("x").failed(": exited with 3.")


def test_a_damaged_output_of_the_example_builder_is_built_again(mine: Project, spool: Path) -> None:
    mine.doit("x").ok()
    (output,) = spool.glob("*/out/x")
    content = (mine.folder / "build" / "x").read_text()
    output.write_text("0" * len(content))
    mine.doit("clean", "x").ok()
    mine.doit("x").ok()
    assert (mine.folder / "build" / "x").read_text() == content


def test_the_example_builder_reports_unsupported_operations(mine: Project, spool: Path) -> None:
    mine.write("dodo.py", DODO.replace('"x.py"', "build") + "\ndef build():\n    pass\n")
    mine.doit("x").failed("cannot build build: it supports only buildscripts without sources.")


def test_the_example_builder_removes_old_jobs(mine: Project, spool: Path) -> None:
    mine.doit("x").ok()
    mine.gamebear("prune", "--older", "1").ok()
    assert builds(spool) == 1
    (end,) = spool.glob("*/end.json")
    os.utime(end, (1, 1))
    mine.gamebear("prune", "--size", "1M").failed("can prune by age only.")
    assert "1 job removed" in mine.gamebear("prune", "--older", "1").ok().out
    assert list(spool.iterdir()) == []


def test_doctor_shows_the_description_of_the_example_builder(mine: Project, spool: Path) -> None:
    output = " ".join(mine.gamebear("doctor").ok().out.split())
    assert "this kind of builder has no further checks" in output and f"spool {spool}" in output


def test_a_missing_spool_is_an_error(mine: Project) -> None:
    mine.doit("x", "builder=spool:/proc/nowhere").failed("/proc/nowhere is not a folder.")
