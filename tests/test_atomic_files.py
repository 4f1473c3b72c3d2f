"""Atomic writes: a file has its old or its new content, also with concurrent writers and after a kill at any point."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gamebear_tasks.runner.util.atomic_files import content, data_extents, sha256_of, write_bytes, written_aside

DIES_HALFWAY = """
import os, signal, sys
from pathlib import Path
from gamebear_tasks.runner.util.atomic_files import written_aside

with written_aside(Path(sys.argv[1])) as file:
    file.write(b"much more than what comes next")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_temporary_file_of_a_killed_writer_is_reused(tmp_path: Path) -> None:
    path = tmp_path / ("ö" * 120)
    path.write_bytes(b"old")
    died = subprocess.run([sys.executable, "-c", DIES_HALFWAY, path], check=False)
    assert died.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 2
    write_bytes(path, b"new", 0o640)
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == [path.name]


def test_concurrent_writers_leave_the_complete_content_of_one_of_them(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    whole = {bytes([number]) * 100_000 for number in range(8)}
    with ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            list(threads.map(lambda data: write_bytes(path, data), whole))
            assert path.read_bytes() in whole
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_failed_write_leaves_the_old_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), written_aside(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["state.json"]


@given(st.lists(st.tuples(st.integers(1, 3 << 20), st.binary(max_size=3)), max_size=5), st.integers(0, 3 << 20))
def test_a_sparse_file_is_hashed_and_copied_like_its_content(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, bytes]], hole: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "sparse"
    with path.open("wb") as file:
        for skipped, data in parts:
            file.seek(skipped, os.SEEK_CUR)
            file.write(data)
        file.truncate(file.tell() + hole)
    whole = path.read_bytes()
    with path.open("rb") as file:
        assert b"".join(content(file.fileno())) == whole
        extents = list(data_extents(file.fileno(), 0, len(whole)))
    assert sha256_of(path) == hashlib.sha256(whole).hexdigest()
    assert all(first < last for first, last in extents) and extents == sorted(extents)
    assert b"".join(whole[first:last] for first, last in extents).replace(b"\0", b"") == whole.replace(b"\0", b"")


def test_holes_of_a_file_are_not_data(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"x")
    with path.open("rb") as file:
        ((first, last),) = data_extents(file.fileno(), 0, 1 << 30)
        assert first <= 1 << 29 < last and last - first <= 1 << 20
        assert list(data_extents(file.fileno(), last, 1 << 30)) == []
        assert list(data_extents(file.fileno(), 0, 1 << 20)) == []
