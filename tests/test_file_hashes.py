"""Cached hashes of files: what is cached, for how long, and where."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gamebear_tasks.util import file_hashes
from gamebear_tasks.util.file_hashes import CACHE_FILE, SETTLED, content_of, is_settled, opened_content_of

OLD = 1_600_000_000


@pytest.fixture
def next_doit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A project with a log folder; calling it ends this doit and starts another, with the cache on disk only."""
    monkeypatch.chdir(tmp_path)
    CACHE_FILE.parent.mkdir(parents=True)
    monkeypatch.setattr(file_hashes, "_known", {})
    monkeypatch.setattr(file_hashes, "_new", set())
    monkeypatch.setattr(file_hashes, "_places", [])

    def start() -> None:
        for place in file_hashes._places:
            file_hashes._keep(place)
        for cache in (file_hashes._known, file_hashes._new, file_hashes._places):
            cache.clear()

    return start


@pytest.fixture(params=[content_of, opened_content_of])
def content(request: pytest.FixtureRequest) -> Callable[[str], tuple[str, bool]]:
    read: Callable[[str], tuple[str, bool]] = request.param
    return read


def settled(name: str, text: str) -> str:
    """Write a file whose times are reliable."""
    Path(name).write_text(text)
    time.sleep(2 * SETTLED)
    return hashlib.sha256(text.encode()).hexdigest()


def falsify(name: str) -> None:
    """Put a wrong hash into the cache file; if it is returned, the file was not read."""
    kept = json.loads(CACHE_FILE.read_text())
    kept["files"][name] = kept["files"][name][:-64] + "0" * 64
    CACHE_FILE.write_text(json.dumps(kept))


def test_the_hash_of_a_settled_file_is_cached_for_the_next_doit(
    next_doit: Callable[[], None], content: Callable[[str], tuple[str, bool]]
) -> None:
    sha256 = settled("file", "text")
    assert content("file") == (sha256, False)
    next_doit()
    falsify("file")
    assert content("file") == ("0" * 64, False)
    Path("file").chmod(0o744)
    assert content("file") == (sha256, True), "it changed"


def test_a_file_is_executable_if_its_owner_may_execute_it(
    next_doit: Callable[[], None], content: Callable[[str], tuple[str, bool]]
) -> None:
    settled("file", "text")
    for mode, executable in ((0o677, False), (0o100, True), (0o611, False), (0o744, True)):
        Path("file").chmod(mode)
        for _ in range(2):
            assert content("file")[1] is executable


def test_the_cache_file_has_the_new_entries_and_the_old_ones_of_files_that_exist(
    next_doit: Callable[[], None],
) -> None:
    for name in ("a", "b"):
        Path(name).write_text(name)
    settled("c", "c")
    for name in "abc":
        content_of(name)
    next_doit()
    assert json.loads(CACHE_FILE.read_text()).keys() == {"version", "files"}
    assert json.loads(CACHE_FILE.read_text())["version"] == "1"
    Path("a").unlink()
    settled("d", "d")
    content_of("d")
    next_doit()
    assert json.loads(CACHE_FILE.read_text())["files"].keys() == {"b", "c", "d"}


def test_the_cache_file_is_not_written_without_new_entries_or_a_log_folder(next_doit: Callable[[], None]) -> None:
    Path("new").write_text("just written")
    content_of("new")
    next_doit()
    assert not CACHE_FILE.exists()
    settled("file", "text")
    content_of("file")
    CACHE_FILE.parent.rmdir()
    next_doit()
    assert not CACHE_FILE.parent.exists()


def test_the_cache_file_of_another_folder_is_not_written(
    next_doit: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled("file", "text")
    content_of("file")
    other = tmp_path / "other"
    (other / CACHE_FILE.parent).mkdir(parents=True)
    monkeypatch.chdir(other)
    next_doit()
    assert not CACHE_FILE.exists() and not (tmp_path / CACHE_FILE).exists()


def test_a_cache_that_cannot_be_written_does_not_stop_doit(
    next_doit: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(file_hashes, "write_json", refuse)
    settled("file", "text")
    content_of("file")
    next_doit()
    assert not CACHE_FILE.exists()


def test_the_cache_is_saved_at_exit_once(next_doit: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[object, ...]] = []
    monkeypatch.setattr(atexit, "register", lambda *arguments: registered.append(arguments))
    Path("file").write_text("text")
    for _ in range(2):
        content_of("file")
    assert registered == [(file_hashes._keep, os.path.abspath(CACHE_FILE))]


def test_caching_does_not_wait_for_the_disk(next_doit: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fsync")
    settled("file", "text")
    content_of("file")
    next_doit()
    assert CACHE_FILE.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"version": "1"}',
        '{"version": "1", "files": []}',
        '{"version": "1", "files": {"file": 1}}',
        '{"version": "1", "files": {"file": "x", "other": null}}',
        '{"version": "2", "files": {"file": "x"}}',
    ],
)
def test_a_damaged_cache_counts_as_empty(next_doit: Callable[[], None], content: str) -> None:
    CACHE_FILE.write_text(content)
    assert file_hashes._read(str(CACHE_FILE)) == {}
    Path("file").write_text("text")
    assert content_of("file")[0] == hashlib.sha256(b"text").hexdigest()


def about(seconds_ago: float, nanoseconds: int = 1) -> os.stat_result:
    then = int(time.time() - seconds_ago) if nanoseconds == 0 else time.time() - seconds_ago
    return os.stat_result([*os.stat("/")[:10]], {"st_ctime": then, "st_ctime_ns": int(then) * 10**9 + nanoseconds})


@pytest.mark.parametrize(
    ("seconds_ago", "expected"),
    [(10, True), (0.25, True), (0.125, False), (0, False), (-0.125, False), (-0.25, True), (-10, True)],
)
def test_a_file_is_settled_a_moment_after_its_last_change(
    monkeypatch: pytest.MonkeyPatch, seconds_ago: float, expected: bool
) -> None:
    monkeypatch.setattr(time, "time", lambda: float(OLD))
    monkeypatch.setattr(file_hashes, "SETTLED", 0.125)
    assert is_settled(about(seconds_ago)) is expected


@pytest.mark.parametrize(("nanoseconds", "expected"), [(0, False), (1, True), (500_000_000, True), (999_999_999, True)])
def test_a_file_with_a_time_in_whole_seconds_is_never_settled(nanoseconds: int, expected: bool) -> None:
    assert is_settled(about(1000, nanoseconds)) is expected


def test_a_file_that_changes_while_it_is_read_is_not_cached(
    next_doit: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its times were recent before it was read, which may take long."""
    Path("file").write_text("text")

    def slow(file: object) -> str:
        time.sleep(2 * SETTLED)
        return "0" * 64

    monkeypatch.setattr(file_hashes, "sha256", slow)
    content_of("file")
    assert file_hashes._known == {}
