"""File locks."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from project import wait_for

from gamebear_tasks.runner.util.locks import hold, is_at, seized


@pytest.fixture(params=["file", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "it"
    path.mkdir() if request.param == "folder" else path.touch()
    return path


def test_what_is_free_is_seized(path: Path) -> None:
    with seized(path) as held, seized(path) as twice:
        assert held and not twice
    with seized(path) as held:
        assert held


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_held_is_not_seized(path: Path, shared: bool) -> None:
    fd = hold(path, shared)
    with seized(path) as held:
        assert not held
    os.close(fd)


def test_what_is_missing_or_a_link_is_not_seized(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    for other in ("link", "missing"):
        with seized(tmp_path / other) as held:
            assert not held
    with pytest.raises(FileNotFoundError):
        hold(tmp_path / "missing")


def test_a_file_that_is_replaced_meanwhile_is_locked_where_it_is_now(path: Path, tmp_path: Path) -> None:
    first = hold(path)
    held: list[int] = []
    thread = threading.Thread(target=lambda: held.append(hold(path)))
    thread.start()
    wait_for(lambda: len(waiting(path)) == 1)
    path.rename(tmp_path / "old")
    path.mkdir() if (tmp_path / "old").is_dir() else path.touch()
    os.close(first)
    thread.join()
    assert is_at(held[0], path)
    os.close(held[0])


def waiting(path: Path) -> list[str]:
    """Return the entries of proc_locks(5) that wait for a file's lock."""
    inode = f":{path.stat().st_ino} "
    return [line for line in Path("/proc/locks").read_text().splitlines() if "->" in line and inode in line]
