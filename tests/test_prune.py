"""Pruning a builder's store, also while it is in use."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from project import Project, wait_for
from sshd import Account
from test_store_faults import WAIT, Job

from gamebear_tasks.runner.maintenance import garbage_collection as pruning
from gamebear_tasks.runner.maintenance.garbage_collection import Policy, Prune
from gamebear_tasks.runner.protocol.requests import Fetch
from gamebear_tasks.runner.server import outputs
from gamebear_tasks.runner.store import caches
from gamebear_tasks.runner.store.store import Store, StoredJob
from gamebear_tasks.runner.util.locks import Lock, locked, seized

DAY = 86400.0


@pytest.fixture
def fresh_home(tmp_path: Path, facts: Path) -> Path:
    """A home folder without a store, on a machine with cached capabilities."""
    root = tmp_path / "home" / ".cache" / "gamebear" / "v1"
    root.mkdir(parents=True)
    known = json.loads((facts / "facts.json").read_bytes())
    known["key"]["root"] = str(root)
    (root / "facts.json").write_text(json.dumps(known))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def facts(system: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a runner."""
    folder = tmp_path_factory.mktemp("facts")
    job = Job(folder / "project", folder / "home")
    job.ok()
    return job.store.root


def grow_old(store: Store, days: float, *jobs: StoredJob) -> None:
    """Age jobs, or a whole store, by some days."""
    then = time.time() - days * DAY
    for folder in [job.folder for job in jobs] or [store.blobs, store.jobs, store.images]:
        for path in folder.rglob("*"):
            os.utime(path, (then, then), follow_symlinks=False)


def prune(job: Job, *options: str) -> str:
    return job.project.gamebear("prune", *options).ok().out


def stored(job: Job) -> StoredJob:
    return job.store.job(job.stored.name)


def test_unused_results_expire_with_their_inputs(tmp_path: Path, fresh_home: Path) -> None:
    old = Job(tmp_path / "old", fresh_home, inputs={"a": b"a" * 100_000})
    new = Job(tmp_path / "new", fresh_home, inputs={"b": b"b" * 100_000})
    old.ok()
    grow_old(old.store, 10)
    new.ok()
    assert "nothing removed" in prune(old, "--older", "11")
    assert "1 job, 2 inputs removed on local:, " in prune(old, "--older", "9.5")
    assert len(list(old.store.jobs.iterdir())) == 1
    assert len(list(old.store.blobs.iterdir())) == 2
    for job in (new, old):
        job.project.doit("clean", "x").ok()
        job.ok()
    assert (new.builds, old.builds) == (1, 2)


def test_a_result_that_is_fetched_again_counts_as_used(tmp_path: Path, fresh_home: Path) -> None:
    job = Job(tmp_path, fresh_home)
    job.ok()
    grow_old(job.store, 10)
    job.project.doit("clean", "x").ok()
    job.ok()
    assert "nothing removed" in prune(job, "--older", "9")


def test_a_result_from_the_future_ages_from_now(tmp_path: Path, fresh_home: Path) -> None:
    job = Job(tmp_path, fresh_home)
    job.ok()
    grow_old(job.store, -1000)
    assert "nothing removed" in prune(job, "--older", "1")
    assert stored(job).last_use() < time.time() + 1
    assert all(path.stat().st_mtime < time.time() + 1 for path in job.store.blobs.iterdir())


def test_the_last_results_of_each_target_are_retained(tmp_path: Path, fresh_home: Path) -> None:
    job = Job(tmp_path / "one", fresh_home)
    other = Job(tmp_path / "other", fresh_home)
    digests = []
    script = (tmp_path / "one" / "x.py").read_text()
    for number in range(3):
        job.project.write("x.py", f"{script}# {number}")
        job.project.doit().ok()
        digests.append(job.stored.name)
        grow_old(job.store, 10 - number, stored(job))
    other.project.write("dodo.py", (tmp_path / "one" / "dodo.py").read_text().replace("x.py", "z.py"))
    shutil.move(tmp_path / "other" / "x.py", tmp_path / "other" / "z.py")
    other.project.doit().ok()
    grow_old(
        job.store, 20, *(job.store.job(path.name) for path in job.store.jobs.iterdir() if path.name not in digests)
    )
    assert "2 jobs" in prune(job, "--keep", "1")
    left = {path.name for path in job.store.jobs.iterdir()}
    assert len(left) == 2 and digests[2] in left


def test_an_unacknowledged_failure_is_retained_when_results_are_removed(tmp_path: Path, fresh_home: Path) -> None:
    job = Job(tmp_path, fresh_home, f"{WAIT}\nraise ValueError('upside down')")
    client = job.started()
    client.kill()
    client.wait()
    job.go()
    wait_for(lambda: not job.supervisors())
    grow_old(job.store, 10)
    assert "job" not in prune(job, "--keep", "0")
    job.failed("upside down")
    assert job.builds == 1
    grow_old(job.store, 10)
    assert "1 job" in prune(job, "--keep", "0")


def test_least_recently_used_results_are_removed_until_the_store_fits(tmp_path: Path, fresh_home: Path) -> None:
    jobs = []
    for number in range(3):
        job = Job(
            tmp_path / str(number),
            fresh_home,
            f'import shutil; shutil.copy("big", HERE + "/copy")  # {number}',
            {"big": os.urandom(1 << 20)},
        )
        job.ok()
        for path in (*job.store.blobs.iterdir(), *job.stored.rglob("*")):
            if path.stat().st_mtime > time.time() - DAY:
                os.utime(path, (time.time() - (9 - number) * DAY,) * 2)
        jobs.append(job)
    assert "nothing removed" in prune(jobs[0], "--size", "4M")
    prune(jobs[0], "--size", "1.5M")
    kept = {path.name for path in jobs[0].store.blobs.iterdir()}
    bigs = [hashlib.sha256((job.folder / "big").read_bytes()).hexdigest() for job in jobs]
    assert [big in kept for big in bigs] == [False, False, True]
    assert jobs[2].stored.is_dir()


def test_a_job_that_runs_is_left_alone(tmp_path: Path, fresh_home: Path) -> None:
    job = Job(tmp_path, fresh_home, WAIT, inputs={"big": os.urandom(300_000)})
    client = job.started()
    grow_old(job.store, 10)
    output = prune(job, "--older", "0", "--size", "0", "--keep", "0")
    assert "Kept jobs that are in use or were used a moment ago: 1." in output
    job.go()
    assert client.wait(60) == 0, job.output
    assert job.builds == 1
    job.ok()


def test_leftovers_of_a_lost_job_are_removed_regardless_of_their_owner(
    tmp_path: Path, remote_project: Project, account: Account
) -> None:
    remote_project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\ndef task_x():\n    return artifact('x.py', outputs=['build/x'])\n",
    )
    remote_project.write("x.py", f"open('x', 'w').close()  # {os.urandom(8).hex()}")
    remote_project.doit("x").ok()
    store = Store(account.home / ".cache" / "gamebear" / "v1")
    first = next(
        int(line.split(":")[1])
        for line in Path("/etc/subuid").read_text().splitlines()
        if line.startswith(f"{account.name}:")
    )
    for path in store.jobs.iterdir():
        job = store.job(path.name)
        shutil.rmtree(job.work, ignore_errors=True)
        foreign = job.work / "foreign"
        foreign.mkdir(parents=True)
        (foreign / "file").touch()
        for each in (job.work, foreign, foreign / "file"):
            os.chown(each, *((account.uid, account.uid) if each == job.work else (first + 100, first + 100)))
        foreign.chmod(0o700)
        job.mark.touch()
        os.chown(job.mark, account.uid, account.uid)
    grow_old(store, 10)
    assert "removed" in remote_project.gamebear("prune", "--older", "9").ok().out
    assert [*store.jobs.iterdir(), *store.trash.iterdir(), *store.live.iterdir()] == []


def test_trash_of_a_prune_that_was_killed_is_removed_by_the_next_job(tmp_path: Path, fresh_home: Path) -> None:
    job = Job(tmp_path, fresh_home)
    job.store.prepare()
    (job.store.trash / "something" / "deep").mkdir(parents=True)
    job.ok()


def test_unused_runners_are_removed(tmp_path: Path, fresh_home: Path) -> None:
    job = Job(tmp_path, fresh_home)
    job.ok()
    top = job.store.root / "runner"
    (own,) = (path for path in top.iterdir())
    unused, held, aside = (top / ("0" * 64), top / ("1" * 64), top / "tmp1234")
    for path in (unused, held, aside):
        (path / "gamebear_runner").mkdir(parents=True)
        os.utime(path, (1, 1))
    os.utime(own, (1, 1))
    fd = os.open(held, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    assert "2 other items removed" in prune(job, "--keep", "5")
    os.close(fd)
    assert sorted(top.iterdir()) == sorted([own, held])


def test_old_incomplete_uploads_and_environments_are_removed(tmp_path: Path, fresh_home: Path) -> None:
    job = Job(tmp_path, fresh_home)
    job.store.prepare()
    part, fresh = job.store.tmp / f"{'0' * 64}.part", job.store.tmp / f"{'1' * 64}.part"
    environment = job.store.root / "venvs" / "0123"
    (environment / "bin").mkdir(parents=True)
    for path in (part, fresh, environment / "complete"):
        path.touch()
    for path in (part, environment, environment / "complete"):
        os.utime(path, (1, 1))
    prune(job, "--older", "3")
    assert not part.exists() and fresh.exists() and not environment.exists()


def test_an_old_unused_compiler_cache_is_removed(bare_store: Store) -> None:
    caches = bare_store.root / "ccache"
    then = time.time() - 5 * DAY
    for name in ("old", "held", "new"):
        (caches / name / "cache").mkdir(parents=True)
        (caches / name / "cache" / "entry").write_bytes(bytes(100_000))
        if name != "new":
            os.utime(caches / name, (then, then))
    held = os.open(caches / "held", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    assert Prune(bare_store, Policy(older=4 * DAY), 60).run().others == 1
    assert {path.name for path in caches.iterdir()} == {"held", "new"}
    Prune(bare_store, Policy(size=0), 60).run()
    assert {path.name for path in caches.iterdir()} == {"held"}
    os.close(held)
    assert Prune(bare_store, Policy(size=0), 60).run().freed >= 100_000
    assert list(caches.iterdir()) == []


def test_a_cache_goes_when_it_is_old_and_no_job_uses_it(bare_store: Store) -> None:
    instances = {name: caches.acquire(bare_store.root, caches.key_of(name, "", "amd64")) for name in ("old", "used")}
    for each in instances.values():
        (each.files / "entry").write_bytes(bytes(100_000))
        os.utime(each.files.parent, (1, 1))
    instances["old"].release()
    caches.acquire(bare_store.root, caches.key_of("new", "", "amd64")).release()
    assert Prune(bare_store, Policy(older=4 * DAY), 60).run().others == 1
    assert len(caches.all_of(bare_store.root)) == 2 and instances["used"].files.exists()
    Prune(bare_store, Policy(size=0), 60).run()
    assert caches.all_of(bare_store.root) == [instances["used"].files.parent]
    instances["used"].release()
    assert Prune(bare_store, Policy(size=0), 60).run().freed >= 100_000
    assert caches.all_of(bare_store.root) == []


def test_a_job_does_not_take_a_cache_that_is_being_removed(bare_store: Store) -> None:
    key = caches.key_of("/c", "", "amd64")
    first = caches.acquire(bare_store.root, key)
    first.release()
    folder, taken = first.files.parent, []
    with Lock(folder / "lock"):
        taken.append(caches.acquire(bare_store.root, key))
    assert taken[0].files.parent.name == f"{key}-1", "it does not wait"
    with Lock(folder / "lock"), seized(folder / "lock") as held:
        assert not held
    with seized(folder / "lock") as held:
        folder.rename(bare_store.trash / "old")
        taken.append(caches.acquire(bare_store.root, key))
    assert taken[1].files == folder / "files"
    for each in taken:
        each.release()


def test_a_cache_that_is_removed_while_a_job_locks_it_is_not_used(
    bare_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = caches.key_of("/c", "", "amd64")
    first = caches.acquire(bare_store.root, key)
    first.release()
    flock, away = fcntl.flock, bare_store.trash / "old"

    def removed_before(fd: int, operation: int) -> None:
        if not away.exists():
            first.files.parent.rename(away)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    taken = caches.acquire(bare_store.root, key)
    assert taken.files == first.files and taken.files.exists() and away.exists()
    taken.release()


def test_a_use_makes_a_cache_new(bare_store: Store) -> None:
    key = caches.key_of("/c", "", "amd64")
    for _ in range(2):
        used = caches.acquire(bare_store.root, key)
        used.release()
        assert Prune(bare_store, Policy(older=4 * DAY), 60).run().others == 0
        os.utime(used.files.parent, (1, 1))
    assert Prune(bare_store, Policy(older=4 * DAY), 60).run().others == 1


def test_a_lock_of_a_file_that_was_replaced_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").touch()
    flock = fcntl.flock

    def replaced(fd: int, operation: int) -> None:
        flock(fd, operation)
        (tmp_path / "new").touch()
        (tmp_path / "new").replace(tmp_path / "x")

    monkeypatch.setattr(fcntl, "flock", replaced)
    with seized(tmp_path / "x") as held:
        assert not held


def test_only_images_without_a_retained_job_are_removed(tmp_path: Path, fresh_home: Path) -> None:
    storage = tmp_path / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{tmp_path}/images"\nrunroot = "{tmp_path}/run"\n')
    make = 'with Container("scratch") as c:\n    c.copy_in("x.py", "/x")\n    c.commit().add_tag("gamebear-test:{}")'
    variables = {"CONTAINERS_STORAGE_CONF": str(storage)}
    made = [Job(tmp_path / name, fresh_home, make.format(name), None, **variables) for name in ("one", "two")]
    for job in made:
        job.ok()
    use = Job(tmp_path / "use", fresh_home, 'Container("gamebear-test:two")', None, **variables)
    use.ok()
    command = ["buildah", "images", "--json"]

    def images() -> list[str]:
        out = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, check=True).stdout
        return sorted(name for image in json.loads(out) for name in image["names"] or ())

    assert images() == ["localhost/gamebear-test:one", "localhost/gamebear-test:two"]
    grow_old(use.store, 10)
    os.utime(use.stored / "state.json")
    held = use.store.images / "gamebear-packages-0.lock"
    with locked(held):
        assert "images were kept" in prune(use, "--older", "9", "--images")
    assert len(images()) == 2
    assert "1 image " in prune(use, "--older", "9", "--images")
    assert images() == ["localhost/gamebear-test:two"]
    assert sorted(path.suffix for path in use.store.images.iterdir()) == [".lock", ".used"], (
        "locks that nobody holds go"
    )
    made[1].ok()


def test_an_image_built_from_a_containerfile_goes_with_its_layers(tmp_path: Path, fresh_home: Path) -> None:
    storage = tmp_path / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{tmp_path}/images"\nrunroot = "{tmp_path}/run"\n')
    text = "FROM scratch AS one\\nCOPY x.py /x\\nCOPY x.py /y\\nFROM scratch\\nCOPY --from=one /x /\\nCOPY x.py /z\\n"
    script = f"Path('Containerfile').write_text('{text}')\nImage.build()"
    job = Job(tmp_path / "job", fresh_home, script, None, CONTAINERS_STORAGE_CONF=str(storage))
    job.ok()
    command = ["buildah", "images", "--all", "--quiet"]
    variables = {**os.environ, "CONTAINERS_STORAGE_CONF": str(storage)}

    def count() -> int:
        return len(subprocess.run(command, env=variables, capture_output=True, check=True).stdout.splitlines())

    assert count() == 4
    assert "image" not in prune(job, "--older", "9", "--images")
    assert count() == 4
    grow_old(job.store, 10)
    said = prune(job, "--older", "9", "--images")
    assert "4 images " in said
    assert "kept" not in said
    assert count() == 0
    assert not list(job.store.images.glob("*.used"))


# races that a run of doit does not reach


@pytest.fixture
def bare_store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "gamebear" / "v1")
    store.prepare()
    return store


def test_a_process_waiting_for_a_removed_lock_acquires_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    at_once: list[int] = []
    most: list[int] = []

    def take() -> None:
        for _ in range(50):
            with locked(path):
                at_once.append(1)
                most.append(len(at_once))
                time.sleep(0.0005)
                at_once.pop()
                path.unlink()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (200, 1)


def old_result(store: Store, digit: str) -> StoredJob:
    """Add a result to a store that was unused for some minutes."""
    job = store.job(digit * 64)
    (job.folder / "clients").mkdir(parents=True)
    for path in (job.folder / "job.json", job.folder / "lock"):
        path.touch()
    outputs = job.outputs("a1")
    outputs.mkdir()
    (outputs / "x").write_bytes(b"artifact")
    about = {"size": 8, "sha256": hashlib.sha256(b"artifact").hexdigest(), "executable": False}
    job.write_state({"state": "done", "attempt": "a1", "outputs": {"x": about}})
    disuse(job)
    return job


def disuse(job: StoredJob) -> None:
    for path in job.stamps():
        os.utime(path, (time.time() - 300,) * 2)


def test_a_result_is_retained_while_it_is_fetched(bare_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    job = old_result(bare_store, "a")
    written: list[bytes] = []
    used: list[bool] = []

    def pass_on(fd: int, most: int) -> int:
        disuse(job)  # the client takes this long
        assert Prune(bare_store, Policy(size=0), 15).run().jobs == 0
        written.append(os.read(fd, most))
        return len(written[-1])

    def note_use(job: StoredJob) -> None:
        used.append(True)
        touch(job)

    touch = StoredJob.touch
    monkeypatch.setattr(outputs, "write", written.append)
    monkeypatch.setattr(outputs, "_pass_on", pass_on)
    monkeypatch.setattr(outputs, "USE_INTERVAL", -1.0)
    monkeypatch.setattr(StoredJob, "touch", note_use)
    reply, send = outputs.fetch(bare_store, Fetch(digest=job.digest, attempt="a1", name="x", offset=0))
    assert Prune(bare_store, Policy(size=0), 15).run().jobs == 0
    disuse(job)
    assert Prune(bare_store, Policy(size=0), 15).run().jobs == 0
    assert send is not None
    send(reply)
    assert written[-1] == b"artifact" and len(used) == 3
    assert Prune(bare_store, Policy(size=0), 15).run().jobs == 0, "its client fetches the next output now"
    disuse(job)
    assert Prune(bare_store, Policy(size=0), 15).run().jobs == 1


def test_each_prune_makes_progress_on_a_slow_disk(bare_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for digit in "abc":
        old_result(bare_store, digit)
    walked: list[Path] = []

    def allocated(path: Path) -> int:
        walked.append(path)
        return 1

    monkeypatch.setattr(pruning, "_allocated", allocated)
    for left in (2, 1, 0):
        pruned = Prune(bare_store, Policy(size=0), 0.0).run()
        assert len(list(bare_store.jobs.iterdir())) == left and pruned.jobs == 1
    assert len([path for path in walked if path.parent == bare_store.jobs]) == 3, "each once"


def test_a_retained_upload_is_not_counted_as_removed(bare_store: Store) -> None:
    part, blob = bare_store.tmp / f"{'0' * 64}.part", bare_store.blobs / ("1" * 64)
    for number, path in enumerate((part, blob)):
        path.write_bytes(bytes(100_000))
        os.utime(path, (1000 + number,) * 2)
    with Lock(part):
        assert Prune(bare_store, Policy(size=150_000), 15).run().blobs == 1
    assert part.exists() and not blob.exists()


def test_the_removal_of_images_stops_at_the_time_limit(bare_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [{"id": f"{number:064x}", "names": [f"localhost/gamebear-test:{number}"]} for number in range(5)]
    for image in images:
        (bare_store.images / f"{image['id']}.used").touch()
    monkeypatch.setattr(pruning, "facts", lambda root: SimpleNamespace(storage=("--root",)))
    monkeypatch.setattr(pruning, "outside", lambda root, known, *words: json.dumps(images) if "images" in words else "")
    pruned = Prune(bare_store, Policy(images=True), 0.0).run()
    assert pruned.images == 1 and pruned.more
    assert len(list(bare_store.images.glob("*.used"))) == 5


# caches of this machine


def test_unused_sources_of_this_machine_are_removed(tmp_path: Path, fresh_home: Path) -> None:
    job = Job(tmp_path, fresh_home)
    kept = fresh_home / ".cache/gamebear-tasks/sources"
    for name in (
        "git-old.tar",
        "git-new.tar",
        "git/old.git/objects/ab/cd",
        "git/new.git/HEAD",
        "apt/all/state/lists/x",
    ):
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).write_text("x" * 1024)
    (kept / "apt/all/.lock").touch()
    for name in ("git-old.tar", "git/old.git", "apt/all"):
        os.utime(kept / name, (time.time() - 11 * 86400,) * 2)
    output = prune(job, "--older", "10")
    assert "3 sources removed on this machine, 3.0 KiB freed" in output
    assert not (kept / "git-old.tar").exists() and not (kept / "git/old.git").exists()
    assert [path.name for path in (kept / "apt/all").iterdir()] == [".lock"]
    assert (kept / "git-new.tar").exists() and (kept / "git/new.git/HEAD").exists()
    assert "on this machine" not in prune(job, "--older", "0")


def test_a_used_source_counts_as_new(tmp_path: Path, fresh_home: Path) -> None:
    project = Project(tmp_path / "project", home=fresh_home)
    (tmp_path / "file").write_text("x")
    subprocess.run(["tar", "-C", tmp_path, "-cf", tmp_path / "a.tar", "file"], check=True)
    sha256 = hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
    project.write(
        "dodo.py",
        "from gamebear_tasks import archive, artifact\n"
        f"A = archive({(tmp_path / 'a.tar').as_uri()!r}, sha256={sha256!r}, strip=0)\n"
        "def task_x(): return artifact('x.py', sources={'a': A}, outputs=['x'])\n",
    )
    project.write("x.py", "")
    project.gamebear("sources").ok()
    (tar,) = (fresh_home / ".cache/gamebear-tasks/sources").glob("*.tar")
    os.utime(tar, (1e9, 1e9))
    project.gamebear("sources").ok()
    project.gamebear("prune", "--older", "1").ok()
    assert tar.exists()
    os.utime(tar, (1e9, 1e9))
    project.gamebear("prune", "--older", "1").ok()
    assert not tar.exists()
