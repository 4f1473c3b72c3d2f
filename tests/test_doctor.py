"""`gamebear doctor` checks builders and this machine, and turns a fresh account into a builder with `--fix`."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from debian import ENTER, PATH
from keyboard import Keyboard
from project import Project, Run, wait_for
from sshd import Account, Sshd, client_home, new_account

from gamebear_tasks.builders.protocol.responses import facts
from gamebear_tasks.builders.transports.local import open_builder
from gamebear_tasks.cli.doctor import local_checks
from gamebear_tasks.cli.doctor.builder_checks import FAILED, OK, WARNING, Finding, findings_of
from gamebear_tasks.cli.doctor.fixes import Step, StepResult, apply_fixes, steps_for
from gamebear_tasks.config import own_architecture
from gamebear_tasks.runner.server import diagnostics
from gamebear_tasks.runner.store.store import Store

CONTAINED = """
with Container("scratch") as c:
    c.copy_in("x.py", "/x")
    c.copy_out("/x", "x")
"""

DODO = """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", outputs=["build/x"])
"""


# a fresh account


@pytest.fixture(scope="module")
def fresh(system: None) -> Iterator[Account]:
    """An account on a machine without container support. It may use sudo with its password."""
    with new_account(f"fresh-{os.getpid()}") as made:
        take_ids(made)
        subprocess.run(["chpasswd"], input=f"{made.name}:secret", text=True, check=True)
        rules = Path("/etc/sudoers.d") / made.name
        rules.write_text(f"{made.name} ALL=(ALL) ALL\n")
        rules.chmod(0o440)
        try:
            yield made
        finally:
            rules.unlink()


IN_USE = 8
"""Exit status of usermod if the account has running processes, such as those of a login that is ending."""


def take_ids(account: Account) -> None:
    """Remove an account's subordinate ids."""
    every = "1-4000000000"
    command = ["usermod", "--del-subuids", every, "--del-subgids", every, account.name]
    wait_for(lambda: subprocess.run(command, check=False).returncode != IN_USE)
    assert not has_ids(account)


def has_ids(account: Account) -> bool:
    return f"{account.name}:" in Path("/etc/subuid").read_text()


@pytest.fixture(scope="module")
def pi(fresh: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("pi"), fresh) as running:
        yield running


@pytest.fixture
def mine(tmp_path: Path, pi: Sshd) -> Project:
    """A folder without a dodo.py, of a user with access to the fresh account."""
    return Project(tmp_path / "project", home=client_home(tmp_path, pi), GAMEBEAR_BUILDER=pi.url)


def findings(run: Run) -> dict[str, dict[str, Any]]:
    """Return the findings of a run with --json for the only builder, by name."""
    _, place = json.loads(run.out)["places"]
    return {finding["name"]: finding for finding in place["findings"]}


def test_a_fresh_account_becomes_a_builder_with_one_command(mine: Project, pi: Sshd, fresh: Account) -> None:
    look = mine.gamebear("doctor", "--json")
    assert look.status == 1, look.text
    found = findings(look)
    assert {name for name, finding in found.items() if finding["state"] == "failed"} == {"subuids"}
    assert found["host key"]["message"].startswith("SHA256:") and f"{fresh.name}, by" in found["login"]["message"]
    assert re.fullmatch(rf"sudo usermod --add-subuids (\d+-\d+) --add-subgids \1 {fresh.name}", found["subuids"]["fix"])
    assert not has_ids(fresh), "nobody asked for that"

    refused = mine.gamebear("doctor", "--fix")
    assert refused.status == 1
    words = " ".join(refused.out.split())
    assert "sudo asks for a password, and this command has no terminal." in words
    assert "→ Run on it as root: usermod --add-subuids" in words
    assert not has_ids(fresh)

    rules = Path("/etc/sudoers.d") / fresh.name
    rules.write_text(f"{fresh.name} ALL=(ALL) NOPASSWD: ALL\n")
    fixed = mine.gamebear("doctor", "--fix").ok()
    assert f"$ {found['subuids']['commands'][0]}    # subuids" in fixed.out
    assert f"{pi.url} is ready." in fixed.out
    rules.write_text(f"{fresh.name} ALL=(ALL) ALL\n")

    mine.write("dodo.py", DODO)
    mine.write("x.py", CONTAINED)
    mine.doit("x").ok()
    assert (mine.folder / "build" / "x").read_text() == CONTAINED
    again = mine.gamebear("doctor", "--fix", "--json").ok()
    assert json.loads(again.out)["places"][1]["fixed"] == [], "nothing is left to fix"


def test_sudo_prompts_for_its_password_at_the_terminal(mine: Project, fresh: Account) -> None:
    take_ids(fresh)
    with Keyboard(mine.command("doctor", "--fix"), mine.folder, mine.environment, size=(30, 100)) as keyboard:
        keyboard.see(rf"\[sudo\] password for {fresh.name} on ")
        keyboard.type("secret\n")
        keyboard.see(r"\$ usermod --add-subuids")
        assert keyboard.end() == 0, keyboard.text
        assert keyboard.is_as_before and "\x1b[32m✓\x1b[0m subuids" in keyboard.text
    assert has_ids(fresh)


@pytest.fixture
def debian(system: None, tmp_path: Path) -> Iterator[Sshd]:
    """A minimal Debian without Python and buildah; the login account may use sudo."""
    root = tmp_path / "debian"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", "--include=sudo", "bookworm", root], check=True)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    entered = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ENTER, "enter", str(root), "--"]
    subprocess.run([*entered, f"PATH={PATH}", "useradd", "--create-home", "pi"], check=True)
    (root / "etc/sudoers.d/pi").write_text("pi ALL=(ALL) NOPASSWD: ALL\n")
    as_pi = ["runuser", "-u", "pi", "--", "env", "HOME=/home/pi", "sh", "-c", 'cd; exec sh -c "$1"', "sh"]
    log_in = tmp_path / "log-in"
    log_in.write_text(f'#!/bin/sh\nexec {shlex.join([*entered, f"PATH={PATH}", *as_pi])} "$SSH_ORIGINAL_COMMAND"\n')
    log_in.chmod(0o755)
    try:
        with Sshd(
            tmp_path / "sshd", Account("root", 0, Path("/root")), ForceCommand=log_in, PermitRootLogin="yes"
        ) as running:
            yield running
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", root], check=False)


@pytest.mark.slow
def test_a_fresh_debian_becomes_a_builder_with_one_command(debian: Sshd, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", home=client_home(tmp_path, debian), GAMEBEAR_BUILDER=debian.url)
    assert "cannot start python3" in " ".join(project.gamebear("doctor").out.split())
    fixed = project.gamebear("doctor", "--fix", "--json").ok()
    commands = [each["command"] for each in json.loads(fixed.out)["places"][1]["fixed"]]
    assert [command.rpartition("=300 ")[2] for command in commands if " install " in command] == [
        "python3",
        "buildah uidmap mmdebstrap",
    ]
    assert "Setting up buildah" in fixed.err
    project.write("dodo.py", DODO)
    project.write("x.py", CONTAINED)
    project.doit("x").ok()


# builders that cannot be queried


def test_an_unknown_host_key_is_a_separate_failure_and_is_not_accepted(mine: Project) -> None:
    known = mine.home / ".ssh" / "known_hosts"
    known.write_text("")
    run = mine.gamebear("doctor", "--fix", "--json")
    found = findings(run)
    assert run.status == 2 and list(found) == ["reachable", "host key"]
    assert "ssh-keyscan -p" in found["host key"]["fix"]
    assert known.read_text() == ""


def test_a_failed_login_names_the_keys_that_were_tried(mine: Project, tmp_path: Path, pi: Sshd) -> None:
    client_home(tmp_path / "other", pi)  # its key is the only one now
    run = mine.gamebear("doctor", "--json")
    found = findings(run)
    assert run.status == 2 and list(found) == ["reachable", "host key", "login"]
    assert "id_ed25519 SHA256:" in found["login"]["message"] and "ssh-copy-id" in found["login"]["fix"]


def test_an_unreachable_builder_is_reported_in_forty_columns(project: Project) -> None:
    run = project.gamebear(
        "doctor", "builder=ssh://pi@127.0.0.1:1", "patience=0", COLUMNS="40", PYTHONIOENCODING="ascii"
    )
    assert run.status == 2 and "x reachable" in run.out and "-> Check that it is" in run.out
    assert max(len(line) for line in run.out.splitlines() if "ssh://" not in line) <= 40
    assert not run.err


def test_a_builder_without_python_gets_the_package(tmp_path: Path, fresh: Account) -> None:
    command = 'PATH=/proc/nowhere; export PATH; exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"'
    with Sshd(tmp_path / "sshd", fresh, ForceCommand=command) as server:
        project = Project(tmp_path / "project", home=client_home(tmp_path, server))
        run = project.gamebear("doctor", "--json", f"builder={server.url}")
    found = findings(run)
    assert run.status == 1 and list(found) == ["reachable", "host key", "login", "python"]
    assert found["python"]["packages"] == ["python3"]
    assert "sudo apt install python3" in found["python"]["fix"]


def test_a_builder_without_room_for_its_store_is_a_failure(tmp_path: Path, fresh: Account) -> None:
    command = 'XDG_CACHE_HOME=/proc/nowhere; export XDG_CACHE_HOME; exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"'
    with Sshd(tmp_path / "sshd", fresh, ForceCommand=command) as server:
        project = Project(tmp_path / "project", home=client_home(tmp_path, server))
        run = project.gamebear("doctor", "--json", f"builder={server.url}")
    found = findings(run)
    assert run.status == 1 and list(found) == ["reachable", "host key", "login", "python", "store"]
    assert "/proc/nowhere" in found["store"]["message"] and found["store"]["state"] == "failed"


def test_an_account_without_a_shell_is_a_failure(tmp_path: Path, fresh: Account) -> None:
    with Sshd(tmp_path / "sshd", fresh, ForceCommand="/usr/sbin/nologin") as server:
        project = Project(tmp_path / "project", home=client_home(tmp_path, server))
        run = project.gamebear("doctor", "--json", f"builder={server.url}")
    found = findings(run)
    assert run.status == 1 and list(found) == ["reachable", "host key", "login", "python"]
    assert "chsh --shell /bin/sh" in found["python"]["fix"]


def test_slow_diagnostics_are_polled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(diagnostics, "examine", lambda *_: {"seen": go.wait(30)})
    looking = diagnostics.Examination(Store(tmp_path), [], "auto")
    assert looking.answer(0.01) == {"more": True}
    go.set()
    assert looking.answer(30)["seen"] is True


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (
            ["local:"],
            "Task 'local:' does not exist. → List the tasks: gamebear list --all. To check another builder",
        ),
        (["builder=moon:x"], "has an unknown scheme: 'moon'"),
    ],
)
def test_invalid_arguments_are_rejected(project: Project, arguments: list[str], output: str) -> None:
    assert " ".join(output.split()) in " ".join(project.gamebear("doctor", *arguments).failed().text.split())


# this machine


NEEDS = """
from gamebear_tasks import artifact, debian, either, git, sd_image

DOIT_CONFIG = {"default_tasks": ["all"]}
UP = either(git=git("https://nowhere.invalid/up.git", rev="0" * 40), debian=debian("up"))

def task_x():
    return artifact("x.py", sources={"up": UP}, outputs=["build/x"])

def task_all():
    return {"actions": ["true"], "file_dep": ["build/x"]}

def task_card():
    return sd_image("base.img", output="card.img")
"""


@pytest.mark.parametrize(
    ("arguments", "git", "debian", "image"),
    [
        ([], "failed", None, "warning"),
        (["sources=debian"], None, "failed", "warning"),
        (["card"], "warning", None, "failed"),
        (["all", "card.img"], "failed", None, "failed"),
    ],
)
def test_programs_that_tasks_need_are_checked_on_this_machine(
    project: Project, tmp_path: Path, arguments: list[str], git: str | None, debian: str | None, image: str
) -> None:
    project.write("dodo.py", NEEDS)
    project.write("x.py", "")
    away = ["builder=ssh://pi@127.0.0.1:1", "patience=0"]
    run = project.gamebear("doctor", "--json", *arguments, *away, PATH=str(tmp_path))
    here = {finding["name"]: finding for finding in json.loads(run.out)["places"][0]["findings"]}
    states = {"git": git, "dpkg-source": debian, "image tools": image}
    assert {name: finding["state"] for name, finding in here.items() if name not in ("python", "paramiko", "keys")} == {
        name: state for name, state in states.items() if state
    }
    assert "mcopy" in here["image tools"]["message"] and "mtools" in here["image tools"]["fix"]
    assert "required by task card" in here["image tools"]["message"] and "xz" not in here["image tools"]["message"]
    assert ("(not selected)" in here["image tools"]["message"]) == (image == "warning")


@pytest.mark.system
def test_fixes_stop_at_the_first_failed_step() -> None:
    builder = open_builder("local:")
    steps = [
        Step("false", "a", may_fail=True),
        Step(r"printf '5%%\r99%%\rone\r\n'", "b"),
        Step("exit 3", "c"),
        Step("echo never", "d"),
    ]
    lines: list[str] = []
    done = apply_fixes(builder, steps, lines.append)
    builder.close()
    assert done == [
        StepResult(steps[0], True),
        StepResult(steps[1], True),
        StepResult(steps[2], False),
        StepResult(steps[3], None),
    ]
    assert lines == ["$ false    # a", r"$ printf '5%%\r99%%\rone\r\n'    # b", "one", "$ exit 3    # c"]


def test_all_packages_are_installed_by_one_command() -> None:
    found = [
        Finding("buildah", FAILED, "", packages=("buildah",)),
        Finding("storage", WARNING, "", packages=("fuse-overlayfs",)),
        Finding("subuids", FAILED, "", commands=("usermod pi",)),
        Finding("disk", OK, ""),
    ]
    update, install, ids = steps_for(found)
    assert update.may_fail and update.command.startswith("apt-get update")
    assert install.command.endswith(" buildah fuse-overlayfs") and "--no-remove" in install.command
    assert install.purpose == "buildah, storage"
    assert ids == Step("usermod pi", "subuids")


# findings

GIB = 1 << 30

WELL: dict[str, Any] = {
    "connection": {},
    "system": "Debian GNU/Linux 12 (bookworm)",
    "kernel": "6.1",
    "machine": "armv7l",
    "user": "pi",
    "root": False,
    "python": "3.11.2",
    "programs": dict.fromkeys(
        ["apt-get", "buildah", "mmdebstrap", "newuidmap", "newgidmap", "usermod", "timedatectl"], "/usr/bin/it"
    ),
    "namespaces": {"works": True, "output": "", "settings": {}},
    "subordinate": {"uids": 65536, "gids": 65536, "enough": 65536, "free": 165536},
    "memory": {"total": GIB, "swap": 0},
    "heat": {"degrees": 50.0, "throttled": 0},
    "kills": False,
    "disk": {
        "folder": "/home/pi/.cache/gamebear/v1",
        "total": 30 * GIB,
        "free": 9 * GIB,
        "files": 10**6,
        "executes": True,
    },
    "jobs": {"slots": 1, "running": 0, "queued": 0, "kept": 3},
    "own": {"arch": "armhf", "emulated": []},
    "containers": {"version": "1.28.2", "driver": "overlay", "isolation": "rootless", "arch": "armhf", "emulated": []},
    "costs": {},
    "sizes": {"inputs": 1, "images": None},
    "bases": {"armhf": {"suite": "bookworm", "there": False, "mirror": "http://mirror/debian", "unreachable": ""}},
    "ahead": 0.1,
}

NO_CONTAINERS = {"containers": None, "failure": {"what": "No container can be run.", "remedy": "Do this."}}


def checked(changes: dict[str, Any], base: str = "auto", arch: str = "armhf") -> list[Finding]:
    output = copy.deepcopy(WELL)
    for path, value in changes.items():
        *groups, name = path.split("/")
        part = output
        for group in groups:
            part = part[group]
        part[name] = value
    return findings_of(facts(output), [arch], base)


def test_a_complete_builder_passes_all_checks() -> None:
    found = checked({})
    assert {finding.state for finding in found} == {OK}
    (store,) = [finding for finding in found if finding.name == "store"]
    assert store.message == "3 jobs; inputs 1 bytes, images not measured"


@pytest.mark.parametrize(
    ("changes", "name", "state", "words"),
    [
        ({"programs/buildah": "", **NO_CONTAINERS}, "buildah", FAILED, "sudo apt install buildah"),
        (
            {"programs/buildah": "", "programs/apt-get": "", **NO_CONTAINERS},
            "buildah",
            FAILED,
            "Install on the builder",
        ),
        ({"programs/newuidmap": "", **NO_CONTAINERS}, "rootless", FAILED, "sudo apt install uidmap"),
        (
            {"subordinate/uids": 0, **NO_CONTAINERS},
            "subuids",
            FAILED,
            "sudo usermod --add-subuids 165536-231071 --add-subgids 165536-231071 pi",
        ),
        ({"user": "pi; reboot", "subordinate/uids": 0, **NO_CONTAINERS}, "subuids", FAILED, "165536-231071 ACCOUNT"),
        (
            {"namespaces/works": False, "namespaces/settings": {"user.max_user_namespaces": 0}, **NO_CONTAINERS},
            "user namespaces",
            FAILED,
            "user.max_user_namespaces=15000",
        ),
        (
            {
                "namespaces/works": False,
                "namespaces/settings": {"kernel.apparmor_restrict_unprivileged_userns": 1},
                **NO_CONTAINERS,
            },
            "user namespaces",
            FAILED,
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ({"namespaces/works": False, **NO_CONTAINERS}, "user namespaces", FAILED, "--privileged"),
        (NO_CONTAINERS, "isolation", FAILED, "Do this."),
        ({"costs": {"storage": "vfs is slow: install it"}}, "storage", WARNING, "sudo apt install fuse-overlayfs"),
        (
            {"costs": {"storage": "vfs is slow"}, "programs/fuse-overlayfs": "/usr/bin/x"},
            "storage",
            WARNING,
            "/dev/fuse",
        ),
        ({"disk/free": GIB - 1}, "disk", FAILED, "gamebear prune"),
        ({"disk/files": 10}, "disk", FAILED, "gamebear prune"),
        ({"disk/files": None}, "disk", OK, ""),
        ({"disk/executes": False}, "disk", FAILED, "noexec"),
        (
            {"costs": {"disk speed": "a file takes long: have the store elsewhere"}},
            "disk speed",
            WARNING,
            "Have the store",
        ),
        ({"ahead": -90000.0}, "clock", FAILED, "timedatectl set-ntp true"),
        ({"ahead": 60.0}, "clock", WARNING, "Run date on both machines"),
        ({"memory": {"total": GIB // 2, "swap": 0}}, "memory", WARNING, "swap"),
        ({"memory": {"total": GIB // 2, "swap": GIB}}, "memory", OK, ""),
        ({"heat": {"degrees": 85.0, "throttled": 0x50005}}, "power", WARNING, "stronger power supply"),
        ({"heat": {"degrees": 85.0, "throttled": 0}}, "temperature", WARNING, "fan"),
        ({"kills": True}, "logout", FAILED, "KillUserProcesses=no"),
        ({"containers/arch": "arm64"}, "architecture", FAILED, "qemu-user-static"),
        ({"containers/arch": "arm64", "containers/emulated": ["armhf"]}, "architecture", OK, ""),
        ({"bases/armhf/there": True}, "base image", OK, ""),
        ({"bases/armhf/unreachable": "no such host"}, "base image", WARNING, "apt-get update"),
        ({"programs/mmdebstrap": ""}, "base image", WARNING, "sudo apt install mmdebstrap"),
        (
            {
                "bases/armhf/lacks": {"what": "no keys.", "remedy": "x"},
                "bases/armhf/keyring": "raspbian-archive-keyring",
            },
            "base image",
            WARNING,
            "sudo apt install raspbian-archive-keyring",
        ),
    ],
)
def test_each_failed_check_has_a_fix(changes: dict[str, Any], name: str, state: str, words: str) -> None:
    (found,) = [finding for finding in checked(changes) if finding.name == name]
    assert found.state == state
    assert words in f"{found.message} {found.fix}" and bool(found.fix) == (state != OK)


def test_a_base_that_cannot_be_bootstrapped_is_a_failure() -> None:
    (found,) = [
        finding for finding in checked({"programs/mmdebstrap": ""}, "bootstrap") if finding.name == "base image"
    ]
    assert found.state == FAILED and found.packages == ("mmdebstrap",)


HOSTILE: list[Any] = [None, "", "\x1b[2J", 1, -1, True, 1e308, float("nan"), [], [[]], {}, {"a": {}}, "x" * 10_000]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:12])
def test_diagnostics_of_a_hostile_builder_are_sanitized(value: Any) -> None:
    for name, known in WELL.items():
        paths = [name, *(f"{name}/{part}" for part in known)] if isinstance(known, dict) else [name]
        for path in paths:
            for finding in checked({path: value}):
                assert len(finding.message + finding.fix) < 40_000
                assert "\x1b" not in finding.message + finding.fix + "".join(finding.commands)


@pytest.mark.parametrize("user", ["x; reboot", "--root=/", "$(reboot)", "", "a b"])
def test_text_from_a_builder_is_never_run_as_root(user: str) -> None:
    lacks = {"bases/armhf/lacks": {"what": "no keys", "remedy": "x"}, "bases/armhf/keyring": user}
    for finding in checked({"user": user, "subordinate/uids": 0, **lacks, **NO_CONTAINERS}):
        assert all(user not in command for command in finding.commands) or not user
        assert user not in finding.packages


@pytest.mark.system
def test_each_builder_of_a_table_is_checked_for_its_own_architectures(project: Project) -> None:
    own = own_architecture()
    run = project.gamebear("doctor", "--json", f"builder={own}=local:,loong64=local:", timeout=120)
    assert run.status == 1
    found = findings(run)
    assert "programs for loong64 do not run" in found["architecture"]["message"]
    assert {f"base image {own}", "base image loong64"} <= set(found)


@pytest.mark.parametrize(
    ("release", "state", "output"),
    [("5.1.0", "ok", "accelerated"), ("99.0", "warning", "public API")],
    ids=["tested", "new"],
)
def test_doctor_reports_how_paramiko_is_used(
    monkeypatch: pytest.MonkeyPatch, release: str, state: str, output: str
) -> None:
    monkeypatch.setattr(local_checks, "version", lambda _: release)
    finding = local_checks.findings([], by_ssh=True)[1]
    assert (finding.name, finding.state) == ("paramiko", state)
    assert output in finding.message and ("pip install" in finding.fix) is (state != "ok")
