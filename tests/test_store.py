"""The builder's store: paths, states, attempts, clients and outputs of jobs."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gamebear_tasks.runner.store import store as module
from gamebear_tasks.runner.store.store import (
    Store,
    StoredJob,
    cache_home,
    hold_runner,
    runner_folder,
    size_of,
    stamp,
    storage_failure,
)

NOW = 1_700_000_000.0

CONTENT = b"the artifact"

SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "cache" / "v1")
    store.prepare()
    return store


@pytest.fixture
def job(store: Store) -> StoredJob:
    """A submitted job without a state."""
    job = store.job("ab" * 32)
    job.folder.mkdir()
    return job


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(time, "time", lambda: NOW)
    return NOW


@pytest.fixture
def running(job: StoredJob) -> Iterator[StoredJob]:
    """A job with a living supervisor."""
    job.write_state({"state": "running", "attempt": "a1"})
    with job.lock():
        yield job


# the store's place


@pytest.mark.parametrize(
    ("variable", "expected"), [("/there", "/there"), ("", "/home/me/.cache"), ("relative", "/home/me/.cache")]
)
def test_the_cache_folder_is_the_one_of_the_xdg_specification(
    monkeypatch: pytest.MonkeyPatch, variable: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert cache_home() == Path(expected)
    assert Store().root == Path(expected) / "gamebear" / "v1"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path("/home/me/.cache")


def test_a_store_is_private_regardless_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Store(tmp_path / "a" / "b" / "gamebear" / "v1").prepare()
    finally:
        os.umask(before)
    root = tmp_path / "a" / "b" / "gamebear" / "v1"
    folders = [root.parent, root, *root.iterdir()]
    assert {path.name for path in root.iterdir()} >= {
        "blobs",
        "jobs",
        "live",
        "kept",
        "slots",
        "images",
        "tmp",
        "trash",
    }
    assert {path.stat().st_mode & 0o7777 for path in folders} == {0o700}


def test_a_store_is_prepared_again_without_a_change(store: Store) -> None:
    (store.blobs / SHA256).write_bytes(CONTENT)
    store.prepare()
    assert (store.blobs / SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["", "..", "a/b", SHA256[1:], SHA256.upper(), SHA256 + "\n"])
def test_a_path_is_made_of_a_sha256_only(store: Store, name: str) -> None:
    for path_of in (store.blob, store.job):
        with pytest.raises(ValueError, match="is not a"):
            path_of(name)
    assert store.blob(SHA256).parent == store.blobs


def test_entries_of_a_job_in_the_store_have_the_documented_places(store: Store) -> None:
    job = store.job("0123456789abcdef" * 4)
    places = (job.folder, job.log, job.work, job.scratch, job.mark, job.kept, job.outputs("a1"))
    assert [str(path.relative_to(store.root)) for path in places] == [
        f"jobs/{job.digest}",
        f"jobs/{job.digest}/log",
        f"jobs/{job.digest}/work",
        "tmp/0123456789abcdef",
        f"live/{job.digest}",
        f"kept/{job.digest}",
        f"jobs/{job.digest}/out-a1",
    ]
    assert store.notices == store.root / "notices.json"
    job.folder.mkdir()
    with job.lock() as lock:
        assert lock.path == job.folder / "lock"


def test_containers_of_two_jobs_have_different_names(store: Store) -> None:
    assert len({store.job(digit * 64).container_prefix for digit in "0123"}) == 4


@pytest.mark.parametrize(
    ("code", "cause", "fix"),
    [
        (errno.ENOSPC, "full", "Free space"),
        (errno.EDQUOT, "full", "Free space"),
        (errno.EMFILE, "files", "ulimit"),
        (errno.ENFILE, "files", "ulimit"),
        (errno.ENOENT, "/gone", "doit again"),
        (errno.EROFS, "read-only", "dmesg"),
        (errno.EACCES, "Permission denied", "owner"),
    ],
)
def test_a_failure_of_the_stores_disk_has_its_cause_and_fix(code: int, cause: str, fix: str) -> None:
    error = storage_failure(OSError(code, os.strerror(code), "/gone"))
    assert cause in error.message and fix in error.hint
    assert error.kind == "store"


def test_a_failure_without_a_file_names_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    for code in (errno.ENOENT, errno.ENOSPC, errno.EROFS):
        assert "/there/gamebear" in storage_failure(OSError(code, os.strerror(code))).message


# states


def test_a_job_that_was_never_submitted_is_absent(store: Store) -> None:
    job = store.job(SHA256)
    assert job.state() == {"state": "absent"}
    assert not job.is_locked()


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_job_whose_supervisor_died_is_lost(job: StoredJob, state: str) -> None:
    job.write_state({"state": state, "attempt": "a1"})
    with job.lock():
        assert job.is_locked()
        assert job.state()["state"] == state
    assert not job.is_locked()
    assert job.state()["state"] == "lost"
    assert job.written_state()["state"] == state


def test_a_job_that_ends_while_its_state_is_read_is_not_lost(job: StoredJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job.write_state({"state": "running", "attempt": "a1"})

    def ends(job: StoredJob) -> bool:
        job.write_state({"state": "done", "attempt": "a1", "outputs": {}})
        return False

    monkeypatch.setattr(StoredJob, "is_locked", ends)
    assert job.state()["state"] == "done"


def test_a_check_of_the_lock_leaves_no_open_file(running: StoredJob) -> None:
    before = os.listdir("/proc/self/fd")
    assert running.is_locked()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("state", "is_synced"),
    [("queued", False), ("running", False), ("lost", False), ("done", True), ("failed", True), ("cancelled", True)],
)
def test_a_final_state_survives_a_power_cut(
    job: StoredJob, now: float, monkeypatch: pytest.MonkeyPatch, state: str, is_synced: bool
) -> None:
    synced: list[int] = []
    sync = os.fsync

    def synchronize(fd: int) -> None:
        synced.append(fd)
        sync(fd)

    monkeypatch.setattr(os, "fsync", synchronize)
    job.write_state({"state": state, "attempt": "a1", "outputs": {}})
    assert bool(synced) is is_synced
    assert job.written_state() == {"state": state, "attempt": "a1", "outputs": {}, "since": now}


ABOUT = {"size": 12, "sha256": SHA256}


@pytest.mark.parametrize(
    "state",
    [
        {"state": "failed", "attempt": "a1"},
        {"state": "lost", "attempt": "a1"},
        {"state": "done", "attempt": "a1", "outputs": {}},
        {"state": "done", "attempt": "a1", "outputs": {"x": ABOUT, "y": ABOUT}},
    ],
)
def test_a_valid_state_is_read_as_it_was_written(job: StoredJob, state: dict[str, Any]) -> None:
    (job.folder / "state.json").write_text(json.dumps(state))
    assert job.written_state() == state


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        "done",
        {},
        {"state": "done"},
        {"state": ["done"], "attempt": "a1"},
        {"state": "upside down", "attempt": "a1"},
        {"state": "failed"},
        {"state": "failed", "attempt": "../a"},
        {"state": "failed", "attempt": 1},
        {"state": "done", "attempt": "a1"},
        {"state": "done", "attempt": "a1", "outputs": ["x"]},
        {"state": "done", "attempt": "a1", "outputs": {"a/b": ABOUT}},
        {"state": "done", "attempt": "a1", "outputs": {"x": "y"}},
        {"state": "done", "attempt": "a1", "outputs": {"x": ABOUT, "y": {"size": 1}}},
        {"state": "done", "attempt": "a1", "outputs": {"x": {"sha256": SHA256}}},
        {"state": "done", "attempt": "a1", "outputs": {"x": {**ABOUT, "size": "12"}}},
        {"state": "done", "attempt": "a1", "outputs": {"x": {**ABOUT, "sha256": SHA256[1:]}}},
    ],
    ids=json.dumps,
)
def test_a_damaged_state_is_absent(job: StoredJob, state: object) -> None:
    (job.folder / "state.json").write_text(json.dumps(state))
    assert job.written_state() == {"state": "absent"}


def test_a_description_that_does_not_match_its_digest_is_rejected(store: Store) -> None:
    text = b'{"arch":"armhf"}'
    job = store.job(hashlib.sha256(text).hexdigest())
    job.folder.mkdir()
    (job.folder / "job.json").write_bytes(text)
    assert job.document() == {"arch": "armhf"}
    (job.folder / "job.json").write_bytes(text + b" ")
    with pytest.raises(ValueError, match="damaged"):
        job.document()


# attempts


def test_an_attempt_starts_without_leftovers_of_the_last_one(job: StoredJob) -> None:
    for name in ("cancel-a0", "seen-a0", ".x.tmp", "images", "phase", "materials.json", "job.json", "lock"):
        (job.folder / name).touch()
    (job.outputs("a0") / "deep").mkdir(parents=True)
    job.log.write_text("the last attempt's log")
    reader = job.log.open()
    attempt = job.begin_attempt({"who": "me@here"})
    assert {path.name for path in job.folder.iterdir()} == {"job.json", "lock", "log", "order.json", "state.json"}
    assert job.written_state().items() >= {"state": "queued", "attempt": attempt}.items()
    assert job.log.read_text() == "" and job.log.stat().st_mode & 0o7777 == 0o600
    assert reader.read() == "the last attempt's log", "a session that reads it goes on"
    reader.close()
    assert job.mark.exists()
    assert len(attempt) == 16 and job.begin_attempt({}) != attempt


def test_a_forced_attempt_belongs_to_the_run_with_its_token_only(job: StoredJob) -> None:
    attempt = job.begin_attempt({}, "a1")
    assert job.written_state()["attempt"] == attempt and module.is_attempt_of(attempt, "a1")
    assert not any(module.is_attempt_of(attempt, token) for token in ("", "1", "a2"))
    assert not module.is_attempt_of(job.begin_attempt({}), "a1")
    assert job.begin_attempt({}, "a1") != attempt


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_submission_reports_whether_the_last_attempt_was_lost(job: StoredJob, is_lost: bool) -> None:
    if is_lost:
        job.mark.touch()
    job.begin_attempt({"time_limit": 3})
    assert json.loads((job.folder / "order.json").read_text()) == {"time_limit": 3, "after_lost": is_lost}


def test_an_attempt_begins_although_an_old_output_cannot_be_removed(
    job: StoredJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job.outputs("a0") / "deep").mkdir(parents=True)

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "rmdir", refuse)
    attempt = job.begin_attempt({})
    assert job.written_state()["attempt"] == attempt


def test_the_start_of_an_attempt_syncs_only_its_mark(job: StoredJob, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    job.begin_attempt({})
    assert synced == [str(job.store.live)]


def test_the_mark_of_a_live_job_is_on_the_disk_before_its_attempt_begins(
    job: StoredJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(module, "sync_folder", lambda path: synced.append((path, job.mark.exists())))
    job.begin_attempt({})
    assert synced == [(job.store.live, True)]


@pytest.mark.parametrize(
    ("order", "name"),
    [
        ({"who": "me@here"}, "me@here"),
        ({"who": None}, ""),
        ({}, ""),
        ([], ""),
        ({"who": "x" * 201}, "x" * 200),
    ],
)
def test_the_starter_of_an_attempt_is_recorded(job: StoredJob, order: object, name: str) -> None:
    assert job.begun_by() == ""
    (job.folder / "order.json").write_text(json.dumps(order))
    assert job.begun_by() == name


@pytest.mark.parametrize("attempt", ["", ".", "..", "a/b", "a\0"])
def test_an_attempt_named_like_a_path_is_rejected(job: StoredJob, attempt: str) -> None:
    with pytest.raises(ValueError, match="is not an attempt"):
        job.outputs(attempt)
    job.ask_to_stop(attempt)
    job.note_seen(attempt)
    job.touch_client(attempt)
    assert list(job.folder.iterdir()) == []


def test_a_request_to_stop_is_for_one_attempt(job: StoredJob) -> None:
    assert not job.is_asked_to_stop("a1")
    job.ask_to_stop("a1")
    assert job.is_asked_to_stop("a1") and not job.is_asked_to_stop("a2")


def test_an_end_is_acknowledged_for_one_attempt(job: StoredJob) -> None:
    assert not job.was_seen("a1")
    job.note_seen("a1")
    assert job.was_seen("a1") and not job.was_seen("a2")


def test_notes_about_a_removed_job_are_dropped(job: StoredJob) -> None:
    job.folder.rmdir()
    job.note_seen("a1")
    job.touch_client("me")
    job.touch()
    job.forget_client("me")
    job.forget_old_clients()
    assert job.other_clients("me", 60) == []
    assert not job.folder.exists()
    assert job.last_use() == 0


# retained containers


def test_containers_are_retained_until_the_job_is_cleaned_up_after(job: StoredJob) -> None:
    with job.held_kept() as held:
        assert not held
    assert not job.is_kept()
    job.kept.touch()
    os.utime(job.kept, (1, 1))
    with job.held_kept() as held:
        assert held
        assert job.kept.stat().st_mtime > 1, "that was a use"
        assert not job.release_kept() and job.is_kept(), "a shell is open"
    assert job.release_kept()
    assert not job.kept.exists() and job.mark.exists() and not job.is_kept()
    job.kept.touch()
    with job.held_kept() as held:
        assert not held and not job.is_kept(), "they are being removed"


def test_several_shells_hold_retained_containers(job: StoredJob) -> None:
    job.kept.touch()
    before = os.listdir("/proc/self/fd")
    with job.held_kept():
        fd = os.open(job.kept, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(fd)
    assert os.listdir("/proc/self/fd") == before


def test_a_job_without_retained_containers_has_none_to_release(job: StoredJob) -> None:
    assert job.release_kept()
    assert not job.mark.exists() and not job.kept.exists()


def test_the_mark_of_released_containers_is_on_the_disk_before_they_count_as_released(
    job: StoredJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.kept.touch()
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(module, "sync_folder", lambda path: synced.append((path, job.kept.exists())))
    job.release_kept()
    assert synced == [(job.store.live, True)]


# outputs


@pytest.fixture
def done(job: StoredJob) -> StoredJob:
    """A job with two outputs."""
    job.outputs("a1").mkdir()
    for name in ("x", "y"):
        (job.outputs("a1") / name).write_bytes(CONTENT)
    job.write_state({"state": "done", "attempt": "a1", "outputs": {"x": ABOUT, "y": ABOUT}})
    return job


def test_outputs_are_intact_until_one_is_changed_truncated_or_removed(done: StoredJob) -> None:
    state = done.state()
    path = done.outputs("a1") / "y"
    assert done.output_is_sound(state)
    for wrong in (b"THE ARTIFACT", CONTENT[:-1], CONTENT + b"\n"):
        path.write_bytes(wrong)
        assert not done.output_is_sound(state)
    path.unlink()
    assert not done.output_is_sound(state)
    path.write_bytes(CONTENT)
    assert done.output_is_sound(state)


def test_a_size_mismatch_is_detected_without_reading_the_content(
    done: StoredJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def sha256_of(path: Path) -> str:
        read.append(path)
        return SHA256

    monkeypatch.setattr(module, "sha256_of", sha256_of)
    (done.outputs("a1") / "x").write_bytes(b"")
    assert not done.output_is_sound(done.state())
    assert read == []


@pytest.mark.parametrize(
    "state",
    [{}, {"attempt": "a1"}, {"attempt": "..", "outputs": {}}, {"attempt": "a1", "outputs": {"x": 1}}],
)
def test_outputs_of_a_damaged_state_are_not_intact(done: StoredJob, state: dict[str, Any]) -> None:
    assert not done.output_is_sound(state)


def test_outputs_that_are_being_fetched_are_not_seized(done: StoredJob) -> None:
    with done.seized_outputs() as free:
        assert free
    with done.held_outputs("a1"), done.held_outputs("a1"), done.seized_outputs() as free:
        assert not free
    with done.seized_outputs() as free:
        assert free
        fd = os.open(done.outputs("a1"), os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(fd)
    shutil.rmtree(done.outputs("a1"))
    with done.held_outputs("a1"), done.seized_outputs() as free:
        assert free


def test_an_invalid_or_unlockable_output_folder_is_not_held(done: StoredJob, monkeypatch: pytest.MonkeyPatch) -> None:
    (done.folder / "out-file").touch()
    with done.seized_outputs() as free:
        assert free

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with done.held_outputs("a1"), done.seized_outputs() as free:
        assert free


# clients


def aged(job: StoredJob, client: str, seconds: float, content: str = "") -> None:
    job.touch_client(client, content) if content else job.touch_client(client)
    os.utime(job.folder / "clients" / client, (NOW - seconds,) * 2)


@pytest.mark.parametrize(
    ("age", "counts"), [(0, True), (59, True), (60, False), (61, False), (-5, True), (-6, False), (-1e6, False)]
)
def test_a_client_counts_as_waiting_for_a_while_after_its_last_request(
    job: StoredJob, now: float, age: float, counts: bool
) -> None:
    aged(job, "other", age)
    assert job.other_clients("me", 60) == ([""] if counts else [])


def test_other_clients_are_listed_by_name_without_the_client_itself(job: StoredJob, now: float) -> None:
    for client, name in (("me", "me@here"), ("long", "x" * 201), ("odd", "\udcff\N{SNOWMAN}")):
        aged(job, client, 1, name)
    assert sorted(job.other_clients("me", 60)) == sorted(["x" * 200, "\\udcff\N{SNOWMAN}"])
    aged(job, "long", 1)
    assert "x" * 200 in job.other_clients("me", 60), "it is still known"
    (job.folder / "clients" / "odd").write_bytes(b"\xff")
    os.utime(job.folder / "clients" / "odd", (now, now))
    assert "\N{REPLACEMENT CHARACTER}" in job.other_clients("me", 60)
    for client in ("odd", "long", "unknown"):
        job.forget_client(client)
    assert job.other_clients("", 60) == ["me@here"]


def test_a_client_id_that_is_a_path_removes_nothing(job: StoredJob) -> None:
    (job.folder / "clients").mkdir()
    job.log.touch()
    job.forget_client("../log")
    assert job.log.exists()


@pytest.mark.parametrize(("age", "stays"), [(0, True), (86400, True), (86401, False), (-86401, False), (-86400, True)])
def test_a_client_expires_after_a_day(job: StoredJob, now: float, age: float, stays: bool) -> None:
    aged(job, "other", age)
    job.forget_old_clients()
    assert (job.folder / "clients" / "other").exists() is stays


def test_requests_of_a_client_count_as_use_of_the_job(job: StoredJob) -> None:
    for name in ("job.json", "state.json"):
        (job.folder / name).touch()
    uses: list[Callable[[], None]] = [partial(job.touch_client, "me"), partial(job.touch_client, "me", "x"), job.touch]
    for use in uses:
        use()
        for path in job.stamps():
            os.utime(path, (1, 1))
        use()
        assert job.last_use() > 1
        assert stamp(job.folder / "job.json") == 1
    assert (job.folder / "clients").stat().st_mode & 0o7777 == 0o700


def test_a_touched_job_creates_a_private_folder(job: StoredJob) -> None:
    before = os.umask(0)
    try:
        job.touch()
        assert (job.folder / "clients").stat().st_mode & 0o7777 == 0o700
        shutil.rmtree(job.folder / "clients")
        job.touch_client("me")
        assert (job.folder / "clients").stat().st_mode & 0o7777 == 0o700
    finally:
        os.umask(before)


@given(times=st.permutations([10, 20, 30]))
def test_the_last_use_is_the_latest_of_submission_state_and_clients(
    tmp_path_factory: pytest.TempPathFactory, times: list[int]
) -> None:
    store = Store(tmp_path_factory.mktemp("store") / "v1")
    store.prepare()
    job = store.job(SHA256)
    (job.folder / "clients").mkdir(parents=True)
    for name, seconds in zip(("clients", "state.json", "job.json"), times, strict=True):
        path = job.folder / name
        path.touch()
        os.utime(path, (seconds, seconds))
    assert job.last_use() == 30


# the runner itself


def test_a_runner_is_held_while_its_process_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (runner_folder() / "runner" / "__main__.py").is_file()
    os.utime(tmp_path, (1, 1))
    monkeypatch.setattr(module, "runner_folder", lambda: tmp_path)
    before = set(os.listdir("/proc/self/fd"))
    hold_runner()
    assert tmp_path.stat().st_mtime > 1
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with pytest.raises(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    for name in set(os.listdir("/proc/self/fd")) - before:
        if os.path.exists(f"/proc/self/fd/{name}") and os.readlink(f"/proc/self/fd/{name}") == str(tmp_path):
            os.close(int(name))


def test_a_runner_that_cannot_be_held_runs_nevertheless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "runner_folder", lambda: tmp_path / "missing")
    hold_runner()


def test_a_missing_file_has_no_size_and_no_time(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert (size_of(path), stamp(path)) == (0, 0)
    path.write_bytes(b"123")
    os.utime(path, (7, 8.5))
    assert (size_of(path), stamp(path)) == (3, 8.5)
