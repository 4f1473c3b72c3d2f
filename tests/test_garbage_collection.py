"""Garbage collection of the store by age, count and size."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamebear_tasks.runner.host.buildah import IMAGES_IN_USE, BuildahError
from gamebear_tasks.runner.images.apt import POOL
from gamebear_tasks.runner.maintenance import garbage_collection
from gamebear_tasks.runner.maintenance.garbage_collection import Policy, Prune, Pruned
from gamebear_tasks.runner.store.store import Store, StoredJob
from gamebear_tasks.runner.util.errors import RunnerError
from gamebear_tasks.runner.util.locks import Lock, hold

DAY = 86400

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "cache" / "v1")
    store.prepare()
    return store


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> float:
    """A stopped clock, so that no test waits."""
    now = float(int(time.time()))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(time, "time", lambda: now)
    return now


@pytest.fixture
def mib(monkeypatch: pytest.MonkeyPatch) -> int:
    """The size of every entry, independent of the file system."""
    monkeypatch.setattr(garbage_collection, "_allocated", lambda path: 1 << 20)
    return 1 << 20


def prune(store: Store, **policy: Any) -> Pruned:
    return Prune(store, Policy(**policy), 60).run()


def age(path: Path, seconds: float) -> Path:
    os.utime(path, (time.time() - seconds,) * 2, follow_symlinks=False)
    return path


def put(store: Store, unused: float = 300, state: str = "done", number: int = 0, **document: Any) -> StoredJob:
    """Add a job to the store that was last used the specified seconds ago."""
    script = {"name": "x.py", "sha256": "0" * 64}
    text = json.dumps({"arch": "armhf", "script": script, "outputs": ["a", "b"], "n": number, **document}).encode()
    job = store.job(hashlib.sha256(text).hexdigest())
    (job.folder / "clients").mkdir(parents=True)
    (job.folder / "job.json").write_bytes(text)
    (job.folder / "lock").touch()
    if state:
        (job.folder / "state.json").write_text(json.dumps({"state": state, "attempt": "a1", "outputs": {}}))
    return disuse(job, unused)


def disuse(job: StoredJob, seconds: float) -> StoredJob:
    for path in job.stamps():
        if path.exists():
            age(path, seconds)
    return job


def blob(store: Store, content: bytes, unused: float) -> Path:
    path = store.blob(hashlib.sha256(content).hexdigest())
    path.write_bytes(content)
    return age(path, unused)


# age


@pytest.mark.parametrize(("unused", "stays"), [(1000, True), (1001, False), (-1, True)])
def test_an_expired_job_is_removed(store: Store, unused: float, stays: bool) -> None:
    job = put(store, unused)
    pruned = prune(store, older=1000.0)
    assert (pruned.jobs, pruned.left, pruned.more) == (0 if stays else 1, [], False)
    assert job.folder.exists() is stays
    assert list(store.trash.iterdir()) == []


@pytest.mark.parametrize(("unused", "stays"), [(0, True), (59, True), (60, False), (61, False), (-1, False)])
def test_a_recently_used_job_is_retained(store: Store, unused: float, stays: bool) -> None:
    job = put(store, unused)
    pruned = prune(store, keep=0)
    assert job.folder.exists() is stays
    assert pruned.jobs == (0 if stays else 1)
    assert [text for text in pruned.left if text.endswith(": 1.")] == (pruned.left if stays else [])
    assert len(pruned.left) == (1 if stays else 0)


def test_without_limits_nothing_is_removed(store: Store) -> None:
    for state in ("done", "failed", "cancelled", "lost", ""):
        put(store, 1000 * DAY, state, arch=state)
    blob(store, b"x", 1000 * DAY)
    assert prune(store) == Pruned()


def test_a_time_in_the_future_is_reset(store: Store, now: float) -> None:
    job = put(store, -DAY - 1)
    paths = [*job.stamps(), blob(store, b"x", -DAY - 1)]
    soon = blob(store, b"y", -DAY)
    prune(store, older=1000.0)
    assert all(abs(path.stat().st_mtime - now) < 60 for path in paths)
    assert soon.stat().st_mtime == now + DAY


# count


def test_the_latest_results_of_each_target_are_retained(store: Store) -> None:
    targets: list[dict[str, Any]] = [
        {},
        {"arch": "arm64"},
        {"script": {"name": "y.py"}},
        {"script": None, "function": {"name": "x.py:f"}},
        {"outputs": ["a"]},
    ]
    jobs = [[put(store, 300 + n, number=n, **target) for n in (2, 0, 1, 3)] for target in targets]
    assert prune(store, keep=2).jobs == 2 * len(targets)
    for of_target in jobs:
        assert [job.folder.exists() for job in of_target] == [False, True, True, False]


def test_the_order_of_outputs_does_not_matter_for_a_target(store: Store) -> None:
    put(store, outputs=["b", "a"])
    put(store, outputs=["a", "b"])
    assert prune(store, keep=1).jobs == 1


def test_each_job_with_a_damaged_description_counts_as_a_separate_target(store: Store) -> None:
    jobs = [put(store, number=number) for number in range(4)]
    for job, text in zip(jobs, ("", "[]", "{}", '{"arch": 1, "script": {"name": 1}, "outputs": 1}'), strict=True):
        (job.folder / "job.json").write_text(text)
        disuse(job, 300)
    assert prune(store, keep=1).jobs == 0
    assert prune(store, keep=0).jobs == 4


@pytest.mark.parametrize("is_seen", [False, True])
@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_result_that_no_client_has_acknowledged_is_retained(store: Store, state: str, is_seen: bool) -> None:
    job = put(store, 300, state)
    if is_seen:
        job.note_seen("a1")
    job.note_seen("a2")
    assert prune(store, older=1000.0).jobs == 0
    assert prune(store, keep=5).jobs == (1 if is_seen else 0)
    assert prune(store, older=100.0).jobs == (0 if is_seen else 1), "age is a reason"


@pytest.mark.parametrize("state", ["lost", ""])
def test_a_job_without_a_result_is_removed_when_results_are_limited(store: Store, state: str) -> None:
    put(store, 300, state)
    assert prune(store, keep=5).jobs == 1


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_running_job_is_retained(store: Store, state: str) -> None:
    job = put(store, 300, state)
    with job.lock():
        assert prune(store, keep=0) == Pruned()
        for policy in (Policy(older=0.0), Policy(size=0)):
            pruned = Prune(store, policy, 60).run()
            assert pruned.jobs == 0 and len(pruned.left) == 1
    assert prune(store, keep=0).jobs == 1


# jobs in use


def test_jobs_being_fetched_or_built_are_retained_and_counted_once(store: Store) -> None:
    jobs = [put(store, 300, number=number) for number in range(3)]
    jobs[0].outputs("a1").mkdir()
    with jobs[0].held_outputs("a1"), jobs[1].lock():
        pruned = prune(store, keep=0, older=0.0, size=0)
    assert [job.folder.exists() for job in jobs] == [True, True, False]
    assert pruned.jobs == 1
    assert len(pruned.left) == 1 and pruned.left[0].endswith(": 2.")


def test_a_check_of_the_lock_does_not_protect_a_job(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    job = put(store, 300)
    checks: list[float] = []
    lock = job.lock()
    assert lock.is_free()  # holds a shared lock

    def sleep(seconds: float) -> None:
        checks.append(seconds)
        if len(checks) == 4:
            lock.release()

    monkeypatch.setattr(time, "sleep", sleep)
    assert prune(store, keep=0).jobs == 1
    assert len(checks) == 4 and 0 < sum(checks) < 1


def test_a_locked_job_is_skipped_after_a_short_wait(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with put(store, 300).lock():
        assert prune(store, keep=0).jobs == 0
    assert 0 < sum(slept) < 1


def test_a_job_replaced_before_its_lock_was_acquired_is_retained(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = put(store, 300)
    acquire = Lock.acquire

    def acquired(lock: Lock, wait: bool = False) -> bool:
        if lock.path.parent == job.folder and not (tmp_path / "old").exists():
            job.folder.rename(tmp_path / "old")
            put(store, 300)
        return acquire(lock, wait)

    monkeypatch.setattr(Lock, "acquire", acquired)
    pruned = prune(store, keep=0)
    assert pruned.jobs == 0 and len(pruned.left) == 1
    assert job.folder.exists()
    assert prune(store, keep=0).jobs == 1


def test_a_job_removed_meanwhile_is_not_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    job = put(store, 300)
    monkeypatch.setattr(Prune, "_go_on", lambda self: shutil.rmtree(job.folder, ignore_errors=True))
    assert prune(store, keep=0) == Pruned()


def test_a_job_with_an_open_shell_is_retained(store: Store) -> None:
    job = put(store, 300, "failed")
    job.kept.touch()
    with job.held_kept():
        disuse(job, 300)
        pruned = prune(store, older=0.0)
        assert pruned.jobs == 0 and job.kept.exists()
        (text,) = pruned.left
        assert "shell" in text and job.digest[:12] in text


@pytest.mark.parametrize("can", [True, False])
def test_a_job_is_removed_after_its_containers(store: Store, monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    job = put(store, 300, "failed")
    job.kept.touch()
    cleaned: list[StoredJob] = []

    def clean_up(stored: StoredJob) -> None:
        cleaned.append(stored)
        if can:
            stored.mark.unlink()

    monkeypatch.setattr(garbage_collection, "clean_up", clean_up)
    pruned = prune(store, older=0.0)
    assert [stored.digest for stored in cleaned] == [job.digest]
    assert pruned.jobs == (1 if can else 0)
    assert [job.digest[:12] in text for text in pruned.left] == ([] if can else [True])
    assert job.folder.exists() is not can


def test_a_job_without_leftovers_needs_no_cleanup(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, 300)
    monkeypatch.delattr(garbage_collection, "clean_up")
    assert prune(store, keep=0).jobs == 1


def test_a_job_is_renamed_into_the_trash_atomically_and_its_size_is_counted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = put(store, 300)
    (job.folder / "big").write_bytes(bytes(1 << 20))
    seen: list[bool] = []
    remove = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        seen.append(job.folder.exists())
        assert path.parent == store.trash and path.name.startswith(job.digest)
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert 1 << 20 <= prune(store, keep=0).freed < 2 << 20
    assert seen == [False]


def test_trash_that_cannot_be_removed_is_removed_as_the_containers_user(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = put(store, 300)
    asked: list[tuple[object, object, Path]] = []
    facts = SimpleNamespace()

    def remove_tree(root: Path, known: object, path: Path) -> None:
        asked.append((root, known, path))
        raise RunnerError(f"{path.name[:64]} cannot be removed.", "")

    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)
    monkeypatch.setattr(garbage_collection, "facts", lambda root: facts if root == store.root else None)
    monkeypatch.setattr(garbage_collection, "remove_tree", remove_tree)
    pruned = prune(store, keep=0)
    (path,) = store.trash.iterdir()
    assert asked == [(store.root, facts, path)]
    assert pruned.left == [f"{job.digest} cannot be removed."]


def test_trash_of_a_killed_prune_is_removed_and_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[tuple[Store, str]] = []
    monkeypatch.setattr(garbage_collection, "clean_up_after_lost_jobs", lambda store, but: cleaned.append((store, but)))
    (store.trash / "x").mkdir()
    (store.trash / "x" / "big").write_bytes(bytes(1 << 20))
    assert prune(store).freed >= 1 << 20
    assert list(store.trash.iterdir()) == []
    assert cleaned == [(store, "")]


# blobs


@pytest.mark.parametrize(
    ("policy", "limit"),
    [
        (Policy(older=100.0), 100),
        (Policy(older=5000.0), 5000),
        (Policy(keep=9), 3600),
        (Policy(older=100.0, keep=9), 100),
        (Policy(older=5000.0, keep=9), 3600),
    ],
)
def test_an_old_unreferenced_blob_is_removed(store: Store, policy: Policy, limit: int) -> None:
    job = put(store, 99, script={"name": "x.py", "sha256": hashlib.sha256(b"script").hexdigest()})
    (job.folder / "order.json").write_text(json.dumps({"trees": [hashlib.sha256(b"tree").hexdigest()]}))
    for name in (b"script", b"tree"):
        blob(store, name, 10**6)
    old, new = blob(store, b"old", limit), blob(store, b"new", limit - 1)
    older = blob(store, b"older", limit + 1)
    for path in (old, older):
        path.write_bytes(os.urandom(1 << 20))
        age(path, limit)
    size = sum(path.stat().st_blocks * 512 for path in (old, older))
    assert Prune(store, policy, 60).run() == Pruned(blobs=2, freed=size)
    assert not old.exists() and new.exists() and len(list(store.blobs.iterdir())) == 3


def test_blobs_of_a_removed_job_are_removed(store: Store) -> None:
    put(store, 5000, script={"name": "x.py", "sha256": hashlib.sha256(b"script").hexdigest()})
    blob(store, b"script", 5000)
    pruned = prune(store, older=4000.0)
    assert (pruned.jobs, pruned.blobs) == (1, 1)


def test_a_blob_removed_meanwhile_is_not_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blob(store, b"old", 5000)
    monkeypatch.setattr(Prune, "_go_on", lambda self: path.unlink(missing_ok=True))
    assert prune(store, older=100.0) == Pruned()


# size


@pytest.fixture
def entries(store: Store, mib: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Six entries of 1 MiB each in the order of removal: retained containers of a failed job, then by last use."""
    failed = put(store, 100, "failed")
    failed.kept.touch()
    monkeypatch.setattr(garbage_collection, "clean_up", lambda job: job.mark.unlink())
    jobs = [put(store, unused, number=unused) for unused in (900, 500)]
    cache = store.root / "ccache" / "key"
    cache.mkdir(parents=True)
    part = store.tmp / f"{'0' * 64}.part"
    other = store.blob("1" * 64)
    for path in (part, other):
        path.write_bytes(os.urandom(1 << 20))
    for path, unused in ((part, 800), (cache, 700), (other, 600)):
        age(path, unused)
    return [failed.folder, jobs[0].folder, part, cache, other, jobs[1].folder]


@pytest.mark.parametrize("fitting", range(7))
def test_the_least_recently_used_jobs_are_removed_until_the_rest_fits(
    store: Store, entries: list[Path], mib: int, fitting: int
) -> None:
    for size in (fitting * mib + 600_000, fitting * mib):
        pruned = prune(store, size=size)
        assert [path.exists() for path in entries] == [False] * (6 - fitting) + [True] * fitting
    assert pruned == Pruned()


def test_jobs_in_use_are_retained_and_others_are_removed_instead(store: Store, mib: int) -> None:
    sha256 = hashlib.sha256(b"script").hexdigest()
    job = put(store, 9000, "running", script={"name": "x.py", "sha256": sha256})
    for content, unused in ((b"script", 8000), (b"held", 7000), (b"x", 6000), (b"y", 5000)):
        blob(store, content, unused).write_bytes(os.urandom(mib))
        age(store.blob(hashlib.sha256(content).hexdigest()), unused)
    cache = store.root / "ccache" / "key"
    cache.mkdir(parents=True)
    age(cache, 6500)
    held = hold(cache, shared=True)
    with job.lock(), Lock(store.blob(hashlib.sha256(b"held").hexdigest())):
        pruned = prune(store, size=5 * mib)
        assert (pruned.jobs, pruned.blobs, pruned.others) == (0, 1, 0)
        assert not store.blob(hashlib.sha256(b"x").hexdigest()).exists()
    os.close(held)


def test_the_size_of_a_job_is_read_once_for_each_use(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[Path] = []

    def allocated(path: Path) -> int:
        walked.append(path)
        return 1

    monkeypatch.setattr(garbage_collection, "_allocated", allocated)
    job, other = put(store, 300), put(store, 300, number=2)
    running = put(store, 300, "running", number=1)
    with running.lock():
        for _ in range(2):
            prune(store, size=100)
    assert [walked.count(each.folder) for each in (job, other, running)] == [1, 1, 2], "a running job grows"
    disuse(job, 200)
    prune(store, size=100)
    assert walked.count(job.folder) == 2


# other entries


@pytest.fixture
def own(store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
    own = store.root / "runner" / "own"
    monkeypatch.setattr(garbage_collection, "runner_folder", lambda: own)
    return own


KINDS: dict[str, Callable[[Store], Path]] = {
    "runner": lambda store: store.root / "runner" / "0123",
    "compiler cache": lambda store: store.root / "ccache" / "0123",
    "scratch folder": lambda store: store.tmp / "0123",
    "environment": lambda store: store.root / "venvs" / "0123",
}


@pytest.mark.parametrize(
    ("older", "limit"), [(None, DAY), (0.0, DAY), (100.0, DAY), (2.0 * DAY, 2 * DAY)], ids=["none", "0", "100", "2d"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_entries_are_removed_at_least_a_day_after_their_last_use(
    store: Store, own: Path, kind: str, older: float | None, limit: int
) -> None:
    path = KINDS[kind](store)
    path.mkdir(parents=True)
    own.mkdir(parents=True)
    age(own, 1000 * DAY)
    age(path, limit)
    assert prune(store, older=older) == Pruned()
    age(path, limit + 1)
    pruned = prune(store, older=older)
    assert (pruned.others, pruned.left) == (1, [])
    assert not path.exists() and own.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_other_entries_with_a_time_in_the_future_expire(store: Store, own: Path, now: float, kind: str) -> None:
    path = KINDS[kind](store)
    path.mkdir(parents=True)
    age(path, -2 * DAY)
    assert prune(store).others == 0
    assert abs(path.stat().st_mtime - now) < 60


@pytest.mark.parametrize("kind", ["runner", "compiler cache"])
def test_a_folder_in_use_by_a_process_is_retained(store: Store, own: Path, kind: str) -> None:
    path = KINDS[kind](store)
    path.mkdir(parents=True)
    age(path, 1000 * DAY)
    fd = hold(path, shared=True)
    assert prune(store).others == 0 and path.exists()
    os.close(fd)
    assert prune(store).others == 1


@pytest.mark.parametrize("kind", ["scratch folder", "environment"])
def test_entries_that_a_job_may_use_are_retained_while_one_runs(store: Store, own: Path, kind: str) -> None:
    path = KINDS[kind](store)
    path.mkdir(parents=True)
    age(path, 1000 * DAY)
    put(store, 300)
    with put(store, 300, "running", number=1).lock():
        assert prune(store).others == 0
    assert prune(store).others == 1


def test_an_incomplete_upload_is_removed_a_day_after_its_last_byte(store: Store, own: Path) -> None:
    path = store.tmp / f"{'0' * 64}.part"
    path.touch()
    age(path, DAY - 1)
    assert prune(store) == Pruned()
    age(path, DAY + 1)
    with put(store, 300, "running").lock():
        pruned = prune(store)
    assert (pruned.blobs, pruned.others) == (1, 0)
    path.touch()
    age(path, 2 * DAY - 1)
    assert prune(store, older=2.0 * DAY).blobs == 0
    age(path, -2 * DAY)
    assert prune(store).blobs == 0
    assert path.stat().st_mtime < time.time() + DAY, "it would never expire"


def test_a_used_environment_is_retained_and_later_removed_with_its_lock(store: Store, own: Path) -> None:
    path = store.root / "venvs" / "0123"
    path.mkdir(parents=True)
    lock = path.with_name("0123.lock")
    for each in (path / "complete", lock):
        each.touch()
    for each in (lock, path):
        age(each, 1000 * DAY)
    age(path / "complete", 1)
    assert prune(store).others == 0
    age(path / "complete", 1000 * DAY)
    age(path, 1)
    assert prune(store).others == 0
    age(path, 1000 * DAY)
    assert prune(store).others == 1
    assert list((store.root / "venvs").iterdir()) == []


def test_cached_packages_are_removed_by_age(store: Store, own: Path) -> None:
    pool = store.root / POOL
    pool.mkdir()
    old, new = pool / ("0" * 64), pool / ("1" * 64)
    for path, unused in ((old, 3 * DAY + 1), (new, 3 * DAY - 1)):
        path.write_bytes(bytes(1 << 20))
        age(path, unused)
    assert prune(store) == Pruned()
    assert 1 << 20 <= prune(store, older=3.0 * DAY).freed < 2 << 20
    assert not old.exists() and new.exists()


def test_all_other_entries_are_counted(store: Store, own: Path) -> None:
    for kind in KINDS:
        path = KINDS[kind](store)
        path.mkdir(parents=True)
        age(path, 1000 * DAY)
    assert prune(store).others == len(KINDS)


def test_each_call_removes_something_and_reports_whether_more_remains(store: Store, own: Path) -> None:
    for kind in KINDS:
        path = KINDS[kind](store)
        path.mkdir(parents=True)
        age(path, 1000 * DAY)
    for left in (3, 2, 1, 0):
        pruned = Prune(store, Policy(), 0.0).run()
        assert pruned.others == 1 and pruned.more is (left > 0)


@pytest.mark.parametrize("name", ["jobs", "blobs", "images", "others", "freed"])
def test_the_time_limit_applies_after_the_first_removal(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    gc = Prune(store, Policy(), 15.0)
    clock[0] = 115.5
    gc._go_on()
    setattr(gc.pruned, name, 1)
    clock[0] = 115.0
    gc._go_on()
    clock[0] = 115.5
    with pytest.raises(garbage_collection._TimeIsUp):
        gc._go_on()


# images


class Images:
    """The image store of a builder."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.there: list[dict[str, Any]] | None = []
        self.removed: list[tuple[str, ...]] = []
        self.known = SimpleNamespace(storage=())
        self.in_use: set[str] = set()
        self.free = 0

    def put(self, number: int, names: list[str] | None, unused: float | None) -> str:
        """Add an image to the store. Return its id."""
        identity = f"{number:064x}"
        assert self.there is not None
        self.there.append({"id": f"sha256:{identity}" if number % 2 else identity, "names": names})
        if unused is not None:
            path = self.store.images / f"{identity}.used"
            path.touch()
            age(path, unused)
        return identity

    def outside(self, root: Path, known: object, *words: str) -> str:
        assert root == self.store.root and known is self.facts(root)
        if words[0] == "images":
            assert words == ("images", "--all", "--no-trunc", "--json")
            return json.dumps(self.there) if self.there else "" if self.there is None else "null"
        assert words[0] == "rmi"
        if self.in_use & set(words):
            raise BuildahError(words, 1, "it is in use")
        self.removed.append(words[1:])
        self.free += 1 << 20
        return ""

    def facts(self, root: Path) -> object:
        assert root == self.store.root
        return self.known


@pytest.fixture
def images(store: Store, own: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    images = Images(store)
    monkeypatch.setattr(garbage_collection, "facts", images.facts)
    monkeypatch.setattr(garbage_collection, "outside", images.outside)
    monkeypatch.setattr(garbage_collection, "_free", lambda root: images.free if root == store.root else -1)
    return images


OURS = "localhost/gamebear-packages:1"


def test_unused_images_of_the_runner_are_removed(store: Store, images: Images) -> None:
    named = images.put(1, [OURS, "localhost/gamebear-packages:2", "docker.io/mine:1"], 101)
    unnamed = images.put(2, None, 100)
    stay = {
        images.put(3, [OURS], 99),
        images.put(4, ["docker.io/debian:12", "docker.io/gamebear-x:1"], 1000),
        images.put(6, [OURS], 1000),
    }
    images.put(5, [OURS], None)
    images.put(7, None, None)
    (store.images / f"{'f' * 64}.used").touch()  # left by an image that others removed
    job = put(store, 10)
    (job.folder / "images").write_bytes(f"\xff\n{'0' * 64}\n{6:064x}\n".encode("latin-1"))
    (put(store, 200, number=1).folder / "big").write_bytes(bytes(8 << 20))
    pruned = prune(store, older=100.0, images=True)
    assert images.removed == [(OURS, "localhost/gamebear-packages:2"), (unnamed,)]
    assert (pruned.images, pruned.others, pruned.left) == (2, 0, [])
    assert 10 << 20 <= pruned.freed < 11 << 20, "with the job"
    assert {path.stem for path in store.images.glob("*.used")} == stay
    assert named not in stay


def test_images_are_retained_unless_requested(store: Store, images: Images) -> None:
    images.put(1, [OURS], 1000)
    assert prune(store, older=0.0) == Pruned()
    assert prune(store, images=True).images == 1


def test_in_the_runners_own_image_store_all_names_are_removed(store: Store, images: Images) -> None:
    images.known.storage = ("--root", "/there")
    images.put(1, [OURS, "docker.io/mine:1"], 1000)
    prune(store, images=True)
    assert images.removed == [(OURS, "docker.io/mine:1")]


def test_images_without_containers_are_removed(store: Store, images: Images) -> None:
    first, second = images.put(1, [OURS], 1000), images.put(2, None, 1000)
    third = images.put(3, None, 1000)
    images.in_use = {OURS, second}
    pruned = prune(store, images=True)
    assert pruned.images == 1 and images.removed == [(third,)]
    assert [OURS in pruned.left[0], second in pruned.left[1]] == [True, True]
    assert {path.stem for path in store.images.glob("*.used")} == {first, second}


@pytest.mark.parametrize("there", [[], None])
def test_an_image_store_may_be_empty(store: Store, images: Images, there: None) -> None:
    images.there = there
    assert prune(store, images=True) == Pruned()


@pytest.mark.parametrize("name", [IMAGES_IN_USE, "gamebear-packages-0.lock"])
def test_images_are_retained_while_a_job_uses_or_creates_one(
    store: Store, images: Images, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    images.put(1, [OURS], 1000)
    locks = [store.images / IMAGES_IN_USE, store.images / "gamebear-packages-0.lock", store.images / "x.lock"]
    for path in locks:
        path.touch()
    with Lock(store.images / name):
        pruned = prune(store, images=True)
        assert images.removed == [] and len(pruned.left) == 1
        assert all(path.exists() for path in locks)
    assert prune(store, images=True).images == 1
    assert [path.exists() for path in locks] == [True, False, False], "locks that nobody holds go"


def test_a_disk_filled_by_others_meanwhile_counts_as_nothing_freed(
    store: Store, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.put(1, [OURS], 1000)
    images.free = 10 << 20

    def outside(*words: Any) -> str:
        images.free = 0
        return images.outside(*words)

    monkeypatch.setattr(garbage_collection, "outside", outside)
    assert prune(store, images=True).freed == 0


def test_a_builder_without_buildah_has_no_images(store: Store, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(root: Path) -> object:
        raise RunnerError("buildah is missing", "")

    monkeypatch.setattr(garbage_collection, "facts", facts)
    assert prune(store, images=True) == Pruned()


# sizes


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(0, 3), max_size=4), link=st.booleans())
def test_the_allocated_size_is_the_sum_of_all_entries(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], link: bool
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    outside = folder / "big"
    outside.write_bytes(bytes(10 * BLOCK))
    top = folder / "top"
    top.mkdir()
    inner = top
    for number, blocks in enumerate(sizes):
        (inner / str(number)).write_bytes(os.urandom(blocks * BLOCK))
        inner = inner / "deeper"
        inner.mkdir()
    if link:
        (inner / "link").symlink_to(outside)
        (inner / "dangling").symlink_to("nowhere")
    expected = sum(path.lstat().st_blocks * 512 for path in [top, *top.rglob("*")])
    assert garbage_collection._allocated(top) == expected >= sum(sizes) * BLOCK
    assert garbage_collection._allocated(outside) == outside.stat().st_blocks * 512
    assert garbage_collection._allocated(folder / "missing") == 0
    shutil.rmtree(folder)


def test_free_space_is_in_bytes(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path)
    assert abs(garbage_collection._free(tmp_path) - (free.total - free.used)) < 1 << 30
