"""File locks."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
from project import wait_for

from gamebear_tasks.runner.util.locks import Lock, hold, is_at, locked, opened_alone, seized


@pytest.fixture(params=["file", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "it"
    path.mkdir() if request.param == "folder" else path.touch()
    return path


def test_a_free_lock_is_seized(path: Path) -> None:
    with seized(path) as held, seized(path) as twice:
        assert held and not twice
    with seized(path) as held:
        assert held


@pytest.mark.parametrize("shared", [False, True])
def test_a_held_lock_is_not_seized(path: Path, shared: bool) -> None:
    fd = hold(path, shared)
    with seized(path) as held:
        assert not held
    os.close(fd)


def test_a_missing_file_or_a_link_is_not_seized(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    for other in ("link", "missing"):
        with seized(tmp_path / other) as held:
            assert not held
    with pytest.raises(FileNotFoundError):
        hold(tmp_path / "missing")


def test_a_file_replaced_meanwhile_is_locked_under_its_path(path: Path, tmp_path: Path) -> None:
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


def test_several_processes_hold_a_shared_lock(path: Path) -> None:
    first = hold(path, shared=True)
    second = os.open(path, os.O_RDONLY)
    fcntl.flock(second, fcntl.LOCK_SH | fcntl.LOCK_NB)
    for fd in (first, second):
        os.close(fd)


def test_a_lock_that_the_file_system_refuses_leaves_no_open_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError) as caught:
        hold(path)
    assert caught.value.errno == errno.ENOLCK
    assert os.listdir("/proc/self/fd") == before


def test_other_users_can_neither_read_nor_hold_a_lock_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with opened_alone(tmp_path / "one"), Lock(tmp_path / "two"):
            assert [(tmp_path / name).stat().st_mode & 0o7777 for name in ("one", "two")] == [0o600, 0o600]
    finally:
        os.umask(before)


def test_a_block_begins_when_another_holder_has_released_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "it"
    order: list[str] = []

    def second() -> None:
        with Lock(path):
            order.append("second")

    with Lock(path):
        thread = threading.Thread(target=second)
        thread.start()
        wait_for(lambda: not thread.is_alive() or len(waiting(path)) == 1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_that_is_released_twice_closes_no_other_file(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "it")
    fd = lock.fd
    lock.release()
    other = os.open(tmp_path, os.O_RDONLY)
    assert other == fd
    lock.release()
    for still_open in (other, 1):
        os.fstat(still_open)
    os.close(other)


def test_a_process_without_standard_input_releases_its_locks(tmp_path: Path) -> None:
    saved = os.dup(0)
    os.close(0)
    try:
        with Lock(tmp_path / "it") as lock:
            assert lock.fd == 0
        with seized(tmp_path / "it") as held:
            assert held
        with pytest.raises(OSError):
            os.fstat(0)  # it was closed
    finally:
        os.dup2(saved, 0)
        os.close(saved)


def test_a_lock_is_acquired_unless_another_holds_it(tmp_path: Path) -> None:
    one, two = Lock(tmp_path / "it"), Lock(tmp_path / "it")
    assert one.path == tmp_path / "it"
    assert one.acquire() and one.acquire()
    assert not two.acquire() and not two.is_free()
    one.release()
    assert two.is_free() and two.acquire()
    three = Lock(tmp_path / "it")
    assert not three.is_free()
    two.release()
    four = Lock(tmp_path / "it")
    assert three.is_free() and four.is_free(), "concurrent checks do not disturb each other"
    assert not four.acquire(), "a check lasts until it is released"
    three.release()
    assert four.acquire()
    four.release()


def test_a_lock_whose_file_was_moved_is_not_current(tmp_path: Path) -> None:
    with Lock(tmp_path / "it") as lock:
        assert lock.is_current()
        (tmp_path / "it").rename(tmp_path / "old")
        assert not lock.is_current()
        (tmp_path / "it").touch()
        assert not lock.is_current()


def test_a_folder_is_held_like_a_file(tmp_path: Path) -> None:
    with opened_alone(tmp_path), seized(tmp_path) as held:
        assert not held


def test_a_lock_ends_with_its_block_although_a_child_has_inherited_the_file(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with opened_alone(tmp_path / "it") as fd:
        inherited = os.dup(fd)
    with seized(tmp_path / "it") as held:
        assert held
    os.close(inherited)
    assert os.listdir("/proc/self/fd") == before


def test_a_block_may_share_its_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "it", shared=True):
        fd = os.open(tmp_path / "it", os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(fd)


def waiting(path: Path) -> list[str]:
    """Return the entries of proc_locks(5) that wait for a file's lock."""
    inode = f":{path.stat().st_ino} "
    return [line for line in Path("/proc/locks").read_text().splitlines() if "->" in line and inode in line]
