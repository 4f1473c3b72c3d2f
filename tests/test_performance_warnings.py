"""Performance warnings of a builder: shown once with the fix, and again when the cause recurs."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project import Project

from gamebear_tasks.runner.host.capabilities import Facts, boot
from gamebear_tasks.runner.maintenance import performance_warnings
from gamebear_tasks.runner.store import builder_config, slots

DODO = """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", outputs=["build/x"])

def task_y():
    return artifact("y.py", outputs=["build/y"])
"""

VFS = "gamebear: on local: the image store uses the vfs driver, which copies the whole base image for every container: "
VFS += "run there sudo apt install fuse-overlayfs\n"

GOOD = Facts("1.28.2", True, (), "overlay", "chroot", True, "amd64", ())


@pytest.fixture
def mine(system: None, project: Project) -> Project:
    project.write("dodo.py", DODO)
    for name in "xy":
        project.write(f"{name}.py", f"open({name!r}, 'w').close()")
    output = [line for line in project.doit().ok().err.splitlines() if line.startswith("gamebear: on ")]
    assert all("to reach the disk" in line for line in output), (
        "an ordinary machine, if not a busy one, has nothing to tell"
    )
    assert json.loads((project.store / "sync.json").read_text())["seconds"] > 0
    (project.store / "sync.json").write_text(json.dumps({"boot": boot(), "at": time.time(), "seconds": 0.01}))
    project.doit("-a").ok()
    return project


def built(project: Project, *arguments: str) -> str:
    """Build both jobs again. Return the other output."""
    for name in "xy":
        path = project.folder / f"{name}.py"
        path.write_text(f"{path.read_text()}\n#")
    return project.doit(*arguments).ok().err


def set_driver(project: Project, driver: str) -> None:
    path = project.store / "facts.json"
    probed = json.loads(path.read_text())
    probed["facts"]["driver"] = driver
    path.write_text(json.dumps(probed))


def test_a_warning_is_shown_once_until_its_cause_recurs(mine: Project) -> None:
    set_driver(mine, "vfs")
    assert built(mine).count(VFS) == 1
    assert "gamebear: on local:" not in built(mine)
    assert "vfs driver" not in (mine.folder / "build" / "logs" / "x.log").read_text(), "a log is the job's"
    set_driver(mine, "overlay")
    assert "gamebear: on local:" not in built(mine)
    set_driver(mine, "vfs")
    assert built(mine, "-n", "2").count(VFS) == 1
    output = " ".join(mine.gamebear("doctor").out.split())
    assert "! storage the image store uses the vfs driver" in output


def test_without_a_writable_log_folder_warnings_are_shown_in_each_run(mine: Project) -> None:
    set_driver(mine, "vfs")
    told = mine.home / ".cache" / "gamebear-tasks" / "told"
    told.parent.mkdir(exist_ok=True)
    told.write_text("in the way")
    assert [built(mine).count(VFS) for _ in range(2)] == [1, 1]


def test_a_slow_card_is_reported_with_a_fix(mine: Project) -> None:
    (mine.store / "sync.json").write_text(json.dumps({"boot": boot(), "at": time.time(), "seconds": 2.5}))
    output = built(mine)
    assert "on local: syncing a small file to the disk of" in output
    assert "move the store to a USB disk (XDG_CACHE_HOME=/its/folder in /etc/environment there)" in output


def test_invalid_settings_of_a_builder_are_reported_with_a_fix(mine: Project) -> None:
    path = mine.write(str(mine.home / ".config/gamebear/builder.json"), '{"slots": 2,}')
    output = f"{path} is ignored: it is not JSON"
    assert built(mine).count(f"gamebear: on local: {output}") == 1
    assert (mine.folder / "build" / "logs" / "x.log").read_text().count(output) == 1
    assert output not in built(mine), "shown before"
    run = mine.gamebear("doctor", "--json", "builder=local:")
    found = {finding["name"]: finding for finding in json.loads(run.out)["places"][1]["findings"]}
    assert found["builder.json"]["state"] == "warning" and output in found["builder.json"]["message"]
    assert found["builder.json"]["fix"] == 'Write for example {"slots": 2}, or remove the file.'


# on the builder


@pytest.mark.parametrize(
    ("text", "heeded", "words"),
    [
        ("{}", None, ""),
        ('{"slots": 2}', 2, ""),
        ('{"slots": "two"}', None, 'is ignored: slots is "two"'),
        ('{"slots": 0}', None, "is ignored: slots is 0"),
        ('{"slots": true}', None, "is ignored: slots is true"),
        ('{"slots": 2, "slot\\n": 3}', 2, 'unknown settings, which are ignored: "slot\\n"'),
        ("[2]", None, "it is not a JSON object"),
        ("", None, "is not JSON"),
        ("[" * 100_000, None, "is not JSON"),
    ],
)
def test_the_valid_contents_of_builder_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, heeded: int | None, words: str
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    default = slots.slot_count()
    (tmp_path / "gamebear").mkdir()
    (tmp_path / "gamebear" / "builder.json").write_text(text)
    output = builder_config.read()
    assert output.slots == heeded and slots.slot_count() == (heeded or default)
    assert words in output.wrong and bool(output.wrong) == bool(output.remedy) == bool(words)
    assert "\n" not in output.wrong


def test_an_unreadable_builder_json_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "gamebear" / "builder.json").mkdir(parents=True)
    assert "is ignored: it cannot be read (Is a directory)" in builder_config.read().wrong


@pytest.fixture
def mounted(system: None, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a store on a small file system."""
    root = tmp_path / "small" / "v1"
    root.mkdir(parents=True)

    def mount(options: str) -> Path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", root], check=True)
        (root / "tmp").mkdir()
        return root

    yield mount
    subprocess.run(["umount", root], check=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("size=1000M", ["has less than 1 GiB left: free space, for example with gamebear prune --older 30 --images"]),
        ("size=2G,nr_inodes=10000", ["has few free inodes (df -i)"]),
        ("size=2G,nr_inodes=0", []),
        ("size=2G,nr_inodes=100000", []),
    ],
)
def test_a_nearly_full_disk_is_reported(mounted: Callable[[str], Path], options: str, words: list[str]) -> None:
    found = list(performance_warnings.notices(mounted(options), GOOD).values())
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


def test_missing_namespaces_are_reported(mounted: Callable[[str], Path]) -> None:
    (found,) = performance_warnings.notices(mounted("size=2G"), GOOD._replace(pid_namespace=False)).values()
    assert "PID namespaces are unavailable" in found and "--privileged" in found


@pytest.mark.parametrize(
    ("seconds", "best", "asked"), [([0.1], 0.1, 1), ([9.0, 0.01], 0.01, 2), ([9.0, 3.0, 5.0], 3.0, 3)]
)
def test_the_best_of_several_measurements_is_cached_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: list[float], best: float, asked: int
) -> None:
    left = list(seconds)
    monkeypatch.setattr(performance_warnings, "_sync_once", lambda folder: left.pop(0))
    for _ in range(3):
        assert performance_warnings.sync_seconds(tmp_path) == best
    assert len(seconds) - len(left) == asked
    now = time.time()
    for later in (2 * performance_warnings.DAY, -performance_warnings.DAY):
        left = [0.02]
        monkeypatch.setattr(time, "time", lambda: now + later)  # noqa: B023
        assert performance_warnings.sync_seconds(tmp_path) == 0.02
