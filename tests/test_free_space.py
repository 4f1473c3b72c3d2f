"""Detection of a full disk."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gamebear_tasks.runner.util.free_space import is_full


@pytest.fixture
def disk(system: None, tmp_path: Path) -> Iterator[Path]:
    """A file system with 2 MiB and 8 inodes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M,nr_inodes=8", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_is_full_when_its_space_is_used(disk: Path, tmp_path: Path) -> None:
    assert not is_full(tmp_path, disk)
    (disk / "file").write_bytes(bytes(3 << 19))
    assert is_full(tmp_path, disk)


def test_a_disk_is_full_when_its_inodes_are_used(disk: Path) -> None:
    for number in range(7):
        (disk / str(number)).touch()
    assert is_full(disk)


def test_a_missing_folder_and_a_file_system_without_sizes_are_not_full(tmp_path: Path) -> None:
    assert not is_full(tmp_path / "missing", "/proc")
