"""Dask clusters: jobs run on suitable workers, and are found again after the loss of any process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import os
import pickle
import signal
import socket
import ssl
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest
import tiny
from cluster import Cluster, running, settings_of_tls
from distributed.protocol import Serialize, ToPickle
from project import OUR_FRAMES, Memory, Project, assert_nothing_is_left, processes, wait_for

from gamebear_tasks.builders.base import Order
from gamebear_tasks.builders.dask import builder as dask_builder
from gamebear_tasks.builders.dask import client, comm
from gamebear_tasks.builders.dask.builder import DaskBuilder
from gamebear_tasks.builders.dask.client import Link
from gamebear_tasks.builders.dask.comm import PLUGIN, PROTOCOL, Loop, connect
from gamebear_tasks.builders.dask.distributed_api import UnsupportedDask, check_scheduler
from gamebear_tasks.builders.dask.scheduler_plugin import _why
from gamebear_tasks.builders.registry import open_builder
from gamebear_tasks.errors import BuilderError, BuilderLost, SettingsError
from gamebear_tasks.jobspec.spec import Job

DODO = """
from gamebear_tasks import artifact

DOIT_CONFIG = {"default_tasks": ["x"]}

def task_x():
    return artifact("x.py", outputs=["build/x"], arch="amd64")
"""

WAITS = """
import os, sys, time
print("begin")
with open({tally!r}, "a") as file:
    file.write("x")
while not os.path.exists({go!r}):
    time.sleep(0.02)
print("end")
open("x", "w").write("built")
"""


@pytest.fixture(scope="module")
def shelf(system: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and two workers that simulate machines of two architectures."""
    with running(tmp_path_factory.mktemp("shelf"), "amd64=1", "i386=1") as cluster:
        yield cluster


@pytest.fixture
def pair(system: None, tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler and two workers of one architecture, for fault injection."""
    with running(tmp_path / "pair", "amd64=1", "amd64=1") as cluster:
        yield cluster


def project_on(cluster: Cluster, folder: Path, **settings: str) -> Project:
    """Return a project that is built by a cluster."""
    project = Project(folder / "project", home=folder / "home", GAMEBEAR_BUILDER=cluster.url, **settings)
    project.write("dodo.py", DODO)
    return project


def waiting(project: Project) -> None:
    """Add a job to the project that waits for `go` and counts its runs."""
    project.write("x.py", WAITS.format(go=str(project.folder / "go"), tally=str(project.folder / "tally")))


def order(folder: Path, arch: str) -> Order:
    """Return the order of a script that does nothing."""
    script = folder / "x.py"
    script.write_text("open('x', 'w').close()")
    sha256 = hashlib.sha256(script.read_bytes()).hexdigest()
    return Order(Job(arch, script.name, sha256, ("x",)), {sha256: script}, dict)


def output(project: Project) -> str:
    """Return the output of the started doit."""
    return (project.folder / "doit.out").read_text(errors="replace")


def begun(project: Project) -> int:
    """Return how often the waiting job was started."""
    tally = project.folder / "tally"
    return len(tally.read_text()) if tally.exists() else 0


def test_each_job_runs_on_a_worker_of_its_architecture_and_is_found_there(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path)
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n"
        "def task_x():\n"
        "    for arch in ('amd64', 'i386'):\n"
        "        for n in range(2):\n"
        "            yield {**artifact('x.py', outputs=[f'build/{arch}{n}/x'], arch=arch, args={'n': n}),\n"
        "                   'name': f'{arch}{n}'}\n",
    )
    project.write("x.py", "#| arg: n: int\nopen('x', 'w').write(f'number {n}')\n")
    amd64, i386 = shelf.workers
    before = len(amd64.digests), len(i386.digests)
    project.doit("-n", "4", "-P", "thread").ok()
    assert (len(amd64.digests) - before[0], len(i386.digests) - before[1]) == (2, 2)
    assert (project.folder / "build/i3861/x").read_text() == "number 1"
    project.doit("clean").ok()
    run = project.doit("-n", "4", "-P", "thread").ok()
    assert run.err.count("was built on dask://") == 4, run.text
    assert (len(amd64.digests) - before[0], len(i386.digests) - before[1]) == (2, 2)


def test_an_up_to_date_doit_does_not_import_dask(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path)
    project.write("x.py", "open('x', 'w').close()")
    project.doit().ok()
    project.write(
        "dodo.py",
        "import atexit, sys\n"
        "atexit.register(lambda: print('MODULES', 'distributed' in sys.modules, 'dask' in sys.modules))\n" + DODO,
    )
    run = project.doit().ok()
    assert not run.ran and "MODULES False False" in run.out, run.text


def test_the_worker_that_has_built_a_target_before_is_preferred(pair: Cluster, tmp_path: Path) -> None:
    project = project_on(pair, tmp_path)
    for number in range(4):
        project.write("x.py", f"open('x', 'w').write('{number}')")
        project.doit().ok()
    assert sorted(len(worker.digests) for worker in pair.workers) == [0, 4]


@pytest.mark.system
def test_slots_limit_concurrent_jobs(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        cluster.start_worker("amd64=2", "--nthreads", "2")
        cluster.start_worker("amd64=1")
        cluster.wait_for_workers()
        project = project_on(cluster, tmp_path)
        project.write(
            "dodo.py",
            "from gamebear_tasks import artifact\n"
            "def task_x():\n"
            "    for n in range(3):\n"
            "        task = artifact('x.py', outputs=[f'build/{n}/x'], arch='amd64', args={'n': n})\n"
            "        yield {**task, 'name': str(n)}\n",
        )
        project.write(
            "x.py",
            "#| arg: n: int\n"
            "import os, time\n"
            f"here = {str(tmp_path)!r}\n"
            "open(f'{here}/begun{n}', 'w').close()\n"
            "while not all(os.path.exists(f'{here}/begun{other}') for other in range(3)):\n"
            "    time.sleep(0.02)\n"
            "open('x', 'w').close()\n",
        )
        project.doit("-n", "32", "-P", "thread", timeout=120).ok()
        assert sorted(len(worker.digests) for worker in cluster.workers) == [1, 2]
    finally:
        cluster.close()


def test_a_large_result_is_streamed(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path)
    size = 192 << 20
    project.write("x.py", f"with open('x', 'wb') as file:\n    file.truncate({size})\n")
    before = [shelf.memory(shelf.scheduler), shelf.memory(shelf.workers[0].process)]
    run, most = project.measured(*project.command())
    run.ok()
    assert (project.folder / "build/x").stat().st_size == size
    after = [shelf.memory(shelf.scheduler), shelf.memory(shelf.workers[0].process)]
    assert most < 160 << 20
    assert all(now - then < 32 << 20 for then, now in zip(before, after, strict=True)), (before, after)


def only_reach_the_scheduler(project: Project, cluster: Cluster) -> None:
    """Make the workers' addresses unreachable for the project's client."""
    project.write(
        "sitecustomize.py",
        "import socket\n"
        "connect = socket.socket.connect\n"
        "def only_the_scheduler(self, address):\n"
        f"    if isinstance(address, tuple) and address[1] != {cluster.port}:\n"
        "        raise ConnectionRefusedError(111, 'Connection refused')\n"
        "    return connect(self, address)\n"
        "socket.socket.connect = only_the_scheduler\n",
    )


def test_unreachable_workers_are_reached_through_the_scheduler(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path)
    only_reach_the_scheduler(project, shelf)
    project.write("x.py", f"with open('x', 'wb') as file:\n    file.truncate({48 << 20})\n")
    before = shelf.memory(shelf.scheduler)
    run = project.doit(PYTHONPATH=f"{project.folder}:{project.environment['PYTHONPATH']}").ok()
    assert "cannot be reached from here; what it builds comes through" in run.err
    assert (project.folder / "build/x").stat().st_size == 48 << 20
    assert shelf.memory(shelf.scheduler) - before < 24 << 20


def test_without_a_worker_of_the_architecture_the_error_lists_the_available_ones(
    shelf: Cluster, tmp_path: Path
) -> None:
    project = project_on(shelf, tmp_path, GAMEBEAR_PATIENCE="1")
    project.write("dodo.py", DODO.replace("amd64", "riscv64"))
    project.write("x.py", "")
    run = project.doit()
    run.failed("has no worker for riscv64", "amd64=1, i386=1", '--resources "riscv64=1"')
    assert "waiting for one" in run.err


def test_without_a_free_slot_a_job_waits_and_reports_it(shelf: Cluster, tmp_path: Path) -> None:
    first, second = project_on(shelf, tmp_path / "first"), project_on(shelf, tmp_path / "second")
    waiting(first)
    waiting(second)
    running = first.start()
    wait_for(lambda: begun(first), 60)
    queued = second.start()
    wait_for(lambda: "has no free slot for amd64 now" in output(second), 60)
    assert begun(second) == 0
    queued.send_signal(signal.SIGINT)  # a job that waits for a slot is released at once
    assert queued.wait(60) != 0
    assert not OUR_FRAMES.search(output(second)), output(second)
    (first.folder / "go").touch()
    assert running.wait(60) == 0, output(first)
    (second.folder / "go").touch()
    second.doit().ok()
    assert begun(second) == 1


def test_doctor_checks_each_worker(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path)
    project.write("x.py", "")
    run = project.gamebear("doctor", "--json")
    _, *workers = json.loads(run.out)["places"]
    assert len(workers) == 2 and all(place["place"].startswith(f"{shelf.url} tcp://") for place in workers), run.text
    assert all("buildah" in [finding["name"] for finding in place["findings"]] for place in workers)


def test_prune_covers_every_worker(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path)
    project.write("x.py", "open('x', 'w').close()")
    project.doit().ok()
    project.write("dodo.py", DODO.replace("amd64", "i386"))
    project.doit().ok()
    assert all(worker.digests for worker in shelf.workers)
    for worker in shelf.workers:
        for path in worker.store.rglob("*"):
            os.utime(path, (1e9, 1e9), follow_symlinks=False)
    run = project.gamebear("prune", "--older", "1").ok()
    assert "jobs" in run.out, run.text
    assert [worker.digests for worker in shelf.workers] == [[], []]
    project.doit("clean").ok()
    project.doit().ok()  # missing results are built again


def test_a_job_cancelled_in_the_queue_is_not_queued_again_by_its_waiting_thread(shelf: Cluster, tmp_path: Path) -> None:
    builder = open_builder(shelf.url)
    builder.patience = 60.0
    queued = order(tmp_path, "riscv64")
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(builder.submit, queued)
        wait_for(lambda: builder.cancel(queued.job.digest, "") and waits.done(), 60)
        with pytest.raises(BuilderError, match="has removed job"):
            waits.result()
    builder.close()


def test_a_closed_builder_reconnects(shelf: Cluster, tmp_path: Path) -> None:
    builder = open_builder(shelf.url)
    before = builder.describe()
    builder.close()
    assert builder.describe().keys() == before.keys()
    builder.close()


def test_ctrl_c_stops_the_job_on_the_worker(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path)
    waiting(project)
    client = project.start("-n", "2", "-P", "thread")
    wait_for(lambda: "begin" in output(project), 60)
    client.send_signal(signal.SIGINT)
    assert client.wait(60) != 0
    assert "cancelling x on" in output(project)
    assert not OUR_FRAMES.search(output(project).partition("KeyboardInterrupt")[0]), output(project)
    assert_nothing_is_left(project, shelf.workers[0].store)
    (project.folder / "go").touch()
    project.doit().ok()  # the slot is free again


def test_the_job_of_a_killed_client_is_found_by_the_next_doit(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path)
    waiting(project)
    client = project.start()
    wait_for(lambda: begun(project), 60)
    client.kill()
    client.wait()
    again = project.start()
    wait_for(lambda: "is already being built on" in output(project), 60)
    (project.folder / "go").touch()
    assert again.wait(60) == 0, output(project)
    assert begun(project) == 1


def test_the_jobs_of_all_workers_are_listed_and_one_is_cancelled(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path)
    waiting(project)
    client = project.start()
    wait_for(lambda: "begin" in output(project))
    entry = json.loads(project.gamebear("jobs", "--json").ok().out)[0]
    assert (entry["state"], entry["program"]) == ("running", "x.py")
    assert entry["where"].startswith("tcp://") and entry["where"] != shelf.address
    project.gamebear("jobs", "cancel", entry["digest"], "--force").ok()
    assert client.wait() != 0
    assert "x was cancelled on dask://" in output(project)


def test_a_failure_names_the_worker_and_shows_the_log(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path)
    project.write("x.py", "print('about to fail')\nraise ValueError('no')\n")
    project.doit().failed("about to fail", "(worker tcp://127.0.0.1")


def test_the_job_of_a_dead_worker_is_built_once_by_another(pair: Cluster, tmp_path: Path) -> None:
    project = project_on(pair, tmp_path)
    waiting(project)
    client = project.start()
    wait_for(lambda: begun(project) == 1, 60)
    (dying,) = (worker for worker in pair.workers if processes(worker.store, "supervise"))
    dying.kill()
    wait_for(lambda: begun(project) == 2, 60)
    (project.folder / "go").touch()
    assert client.wait(60) == 0, output(project)
    assert (project.folder / "build/x").read_text() == "built"
    assert begun(project) == 2
    assert not OUR_FRAMES.search(output(project)), output(project)
    assert "distributed" not in output(project)


@pytest.mark.system
def test_a_job_waits_for_a_worker_when_the_only_one_of_its_architecture_dies(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        dying, other = cluster.start_worker("amd64=1"), cluster.start_worker("i386=1")
        cluster.wait_for_workers()
        project = project_on(cluster, tmp_path)
        waiting(project)
        client = project.start()
        wait_for(lambda: begun(project) == 1, 60)
        dying.kill()
        wait_for(lambda: "waiting for one" in output(project), 60)
        next_one = cluster.start_worker("amd64=1")
        wait_for(lambda: begun(project) == 2, 60)
        (project.folder / "go").touch()
        assert client.wait(60) == 0, output(project)
        assert (len(next_one.digests), len(other.digests)) == (1, 0)
        assert "KeyError" not in (cluster.folder / "scheduler" / "log").read_text()
    finally:
        cluster.close()


def test_a_returning_worker_stops_jobs_that_another_worker_runs(pair: Cluster, tmp_path: Path) -> None:
    project = project_on(pair, tmp_path)
    waiting(project)
    client = project.start()
    wait_for(lambda: begun(project) == 1, 60)
    (dying,) = (worker for worker in pair.workers if processes(worker.store, "supervise"))
    dying.kill(jobs=False)
    wait_for(lambda: begun(project) == 2, 60)
    pair.start_worker("amd64=1", name=dying.folder.name)
    wait_for(lambda: not processes(dying.store), 60)
    (project.folder / "go").touch()
    assert client.wait(60) == 0, output(project)
    assert begun(project) == 2


def test_a_restart_of_the_scheduler_repeats_no_build(pair: Cluster, tmp_path: Path) -> None:
    project = project_on(pair, tmp_path)
    waiting(project)
    client = project.start()
    wait_for(lambda: "begin" in output(project), 60)
    pair.stop_scheduler()
    wait_for(lambda: "lost the connection" in output(project), 60)
    for worker in pair.workers:  # they end with their scheduler; systemd starts them again
        worker.process.wait(60)
    pair.start_scheduler()
    for worker in list(pair.workers):
        pair.start_worker("amd64=1", name=worker.folder.name)
    wait_for(lambda: "again" in output(project), 60)
    (project.folder / "go").touch()
    assert client.wait(60) == 0, output(project)
    assert begun(project) == 1
    assert output(project).count("begin\n") == output(project).count("end\n") == 1, output(project)


def test_an_unreachable_scheduler_is_reported_and_the_build_continues(pair: Cluster, tmp_path: Path) -> None:
    project = project_on(pair, tmp_path, GAMEBEAR_PATIENCE="2")
    waiting(project)
    client = project.start()
    wait_for(lambda: begun(project) == 1, 60)
    pair.stop_scheduler()
    assert client.wait(60) != 0
    assert "cannot be reached for 2 seconds" in output(project) and "run doit again" in output(project).lower()
    assert not OUR_FRAMES.search(output(project)), output(project)
    project.doit().failed("The scheduler of dask://", "cannot be reached", "dask scheduler")


@pytest.mark.system
def test_a_worker_without_gamebear_tasks_is_reported(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        cluster.start_worker("amd64=1", code="import sys; sys.modules['gamebear_tasks'] = None")
        cluster.wait_for_workers()
        project = project_on(cluster, tmp_path, GAMEBEAR_PATIENCE="1")
        project.write("x.py", "")
        project.doit().failed("cannot be used", "gamebear-tasks")
    finally:
        cluster.close()


@pytest.mark.system
def test_over_tls_both_sides_authenticate(tmp_path: Path) -> None:
    tls = settings_of_tls(tmp_path / "tls")
    cluster = Cluster(tmp_path / "cluster", "tls", **tls)
    try:
        cluster.start_worker("amd64=1")
        cluster.wait_for_workers()
        project = project_on(cluster, tmp_path)
        project.write("x.py", "open('x', 'w').write('safe')")
        project.doit(**tls).ok()
        assert (project.folder / "build/x").read_text() == "safe"
        project.gamebear("doctor").failed("has no certificates", "CA_FILE")
        other = settings_of_tls(tmp_path / "other")
        project.gamebear("doctor", **other).failed("TLS handshake")
        project.gamebear("doctor", f"builder=dask://127.0.0.1:{cluster.port}", **tls).failed("dask+tls://")
    finally:
        cluster.close()


def tls_context(folder: Path, ca: Path, purpose: ssl.Purpose) -> ssl.SSLContext:
    """Return a TLS context with the certificate of one folder that trusts the authority of another."""
    context = ssl.create_default_context(purpose, cafile=str(ca / "ca.pem"))
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


@pytest.fixture(scope="module")
def certificates(system: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders, each with a certificate authority and a certificate that it signed."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ours", "other"):
        settings_of_tls(folder / name)
    return folder / "ours", folder / "other"


@contextlib.contextmanager
def dask_listener(context: ssl.SSLContext) -> Iterator[tuple[Loop, str]]:
    """A Dask server that only accepts connections over TLS."""

    async def answer(comm: Any) -> None:
        with contextlib.suppress(OSError):
            await comm.read()

    async def listening() -> Any:
        return await distributed.comm.listen("tls://127.0.0.1", answer, ssl_context=context)

    async def stop() -> None:
        listener.stop()

    loop = Loop()
    try:
        listener = loop.wait_for(listening(), 10)
        yield loop, listener.contact_address
        loop.wait_for(stop(), 10)
    finally:
        loop.close()


@pytest.mark.parametrize("distrusts", ["the client", "the scheduler"])
def test_a_certificate_of_another_authority_is_fatal(certificates: tuple[Path, Path], distrusts: str) -> None:
    ours, other = certificates
    theirs = tls_context(ours, other if distrusts == "the scheduler" else ours, ssl.Purpose.CLIENT_AUTH)
    client_side = tls_context(ours, other if distrusts == "the client" else ours, ssl.Purpose.SERVER_AUTH)
    with dask_listener(theirs) as (loop, address):
        with pytest.raises(BuilderError, match="TLS handshake") as caught:
            loop.wait_for(connect(address, client_side), 30)
        assert not isinstance(caught.value, BuilderLost)


def test_a_refused_connection_over_tls_is_lost_as_over_tcp(certificates: tuple[Path, Path]) -> None:
    ours, _ = certificates
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    loop = Loop()
    try:
        with pytest.raises(BuilderLost, match="cannot be reached: Connection refused"):
            loop.wait_for(connect(f"tls://127.0.0.1:{port}", tls_context(ours, ours, ssl.Purpose.SERVER_AUTH)), 30)
    finally:
        loop.close()


def test_a_connection_cut_in_the_tls_handshake_is_lost(certificates: tuple[Path, Path]) -> None:
    ours, _ = certificates
    with socket.create_server(("127.0.0.1", 0)) as server:

        def cut() -> None:
            connection, _ = server.accept()
            connection.recv(1)
            connection.close()

        thread = threading.Thread(target=cut)
        thread.start()
        loop = Loop()
        try:
            context = tls_context(ours, ours, ssl.Purpose.SERVER_AUTH)
            with pytest.raises(BuilderLost):
                loop.wait_for(connect(f"tls://127.0.0.1:{server.getsockname()[1]}", context), 30)
        finally:
            loop.close()
            thread.join()


def test_a_connection_that_ends_between_two_tls_records_is_lost(certificates: tuple[Path, Path]) -> None:
    ours, _ = certificates
    with socket.create_server(("127.0.0.1", 0)) as server:

        def end() -> None:
            connection, _ = server.accept()
            context = tls_context(ours, ours, ssl.Purpose.CLIENT_AUTH)
            with context.wrap_socket(connection, server_side=True) as wrapped:
                wrapped.sendall(struct.pack("Q", 64))
                wrapped.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=end)
        thread.start()
        loop = Loop()
        try:
            context = tls_context(ours, ours, ssl.Purpose.SERVER_AUTH)
            with pytest.raises(BuilderLost, match="broke"):
                loop.wait_for(connect(f"tls://127.0.0.1:{server.getsockname()[1]}", context), 30)
        finally:
            loop.close()
            thread.join()


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (ssl.SSLCertVerificationError(1, "self-signed"), True),
        (ssl.SSLError(1, "TLSV1_ALERT_UNKNOWN_CA"), True),
        (ssl.SSLEOFError(8, "EOF in violation of protocol"), False),
        (ssl.SSLZeroReturnError(6, "closed"), False),
        (ConnectionRefusedError(111, "TLS certificate"), False),
        (EOFError("TLS certificate"), False),
    ],
)
def test_only_a_rejected_peer_is_distrusted(error: Exception, fatal: bool) -> None:
    assert comm._is_distrust(error) is fatal


@pytest.mark.system
def test_workers_out_of_reach_over_tls_are_reached_through_the_scheduler(tmp_path: Path) -> None:
    tls = settings_of_tls(tmp_path / "tls")
    cluster = Cluster(tmp_path / "cluster", "tls", **tls)
    try:
        cluster.start_worker("amd64=1")
        cluster.wait_for_workers()
        project = project_on(cluster, tmp_path, **tls)
        only_reach_the_scheduler(project, cluster)
        project.write("x.py", "open('x', 'w').write('safe')")
        run = project.doit(PYTHONPATH=f"{project.folder}:{project.environment['PYTHONPATH']}").ok()
        assert "cannot be reached from here; what it builds comes through" in run.err
    finally:
        cluster.close()


def test_a_missing_module_is_recognized_by_the_type_of_the_error() -> None:
    assert "pip install" in _why(ModuleNotFoundError("gone"))
    assert "pip install" in _why(Exception(repr(ModuleNotFoundError("gone"))))  # for unpicklable errors
    assert _why(ValueError("No module named x")) == "ValueError: No module named x"


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("ModuleNotFoundError('gone')", "pip install"),
        ("ValueError(\"No module named 'x'\")", "the same release"),
    ],
)
def test_a_scheduler_that_cannot_load_the_plugin_is_reported_with_the_cause(text: str, fix: str) -> None:
    async def answer(comm: Any) -> None:
        await comm.read()
        await comm.write({"status": "uncaught-error", "exception_text": text})

    async def listening() -> Any:
        return await distributed.comm.listen("tcp://127.0.0.1", answer)

    loop = Loop()
    try:
        builder = open_builder(loop.wait_for(listening(), 10).contact_address.replace("tcp:", "dask:"))
        with pytest.raises(BuilderError) as caught:
            builder.describe()
        builder.close()
        assert fix in str(caught.value.hint)
    finally:
        loop.close()


def test_a_release_of_dask_without_a_required_name_is_rejected() -> None:
    class Scheduler:
        address = "tcp://127.0.0.1:1"
        workers: Mapping[str, Any] = {}

    with pytest.raises(UnsupportedDask, match=r"has no Scheduler.handlers; tested are"):
        check_scheduler(Scheduler())


def test_a_closed_scheduler_is_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours: list[weakref.ref[object]] = []

    async def use() -> list[weakref.ref[object]]:
        scheduler = await distributed.Scheduler(host="127.0.0.1", port=0, dashboard=False)
        worker = await distributed.Worker(scheduler.address, nthreads=1, resources={"amd64": 1})
        builder = open_builder(scheduler.address.replace("tcp:", "dask:"))
        assert worker.address in await asyncio.to_thread(builder.describe)
        await asyncio.to_thread(builder.close)
        table = scheduler.extensions[PLUGIN]
        while not table._leaving:  # the scheduler has not detected the client's exit yet
            await asyncio.sleep(0.01)
        ours.extend(map(weakref.ref, (table, worker.extensions[PLUGIN])))
        del table
        await worker.close()
        await scheduler.close()
        await asyncio.wait_for(collected(ours[0]), 30)  # Dask stores called operations forever
        return [weakref.ref(scheduler), weakref.ref(worker)]

    async def collected(item: weakref.ref[object]) -> None:
        while gc.collect() >= 0 and item() is not None:
            await asyncio.sleep(0.1)

    servers = asyncio.run(use())
    distributed.core._expects_comm.cache_clear()  # Dask's own leak
    wait_for(lambda: gc.collect() >= 0 and not any(item() for item in (*servers, *ours)), 30)  # the runner exits first


@pytest.mark.parametrize(
    "url",
    [
        *("dask:", "dask://", "dask://user@host", "dask+ssh://host"),
        *("dask://host:0", "dask://host:65536", "dask://host:123456", "dask://host:\u0663"),
    ],
)
def test_a_url_without_a_scheduler_is_rejected(url: str) -> None:
    with pytest.raises(SettingsError):
        open_builder(url)


def test_an_invalid_host_name_is_reported() -> None:
    builder = open_builder("dask://a..b")
    with pytest.raises(BuilderError, match="is not a valid address"):
        builder.describe()
    builder.close()


def test_a_connection_closed_while_it_opens_is_abandoned() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        link = Link("dask://silent", f"tcp://127.0.0.1:{server.getsockname()[1]}")
        asks = pool.submit(link.ask, "workers", 600.0)
        connection, _ = server.accept()
        with connection:
            link.close()
            with pytest.raises(BuilderLost, match=r"\AThe connection to Dask was closed"):
                asks.result()


def test_the_port_is_optional() -> None:
    builder = open_builder("dask://shelf")
    assert isinstance(builder, DaskBuilder) and builder.address == "tcp://shelf:8786"


@pytest.mark.system
def test_a_worker_is_not_contacted_without_tls_if_its_scheduler_uses_tls(tmp_path: Path) -> None:
    tls = settings_of_tls(tmp_path / "tls")
    names = {
        "distributed.comm.tls.ca-file": tls["DASK_DISTRIBUTED__COMM__TLS__CA_FILE"],
        "distributed.comm.tls.client.cert": tls["DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT"],
        "distributed.comm.tls.client.key": tls["DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY"],
    }
    with dask.config.set(names):
        link = Link("dask+tls://shelf", "tls://shelf:8786")
        try:
            with pytest.raises(BuilderError, match="another protocol"):
                link.connection("tcp://10.0.0.1:4000")
        finally:
            link.close()


def test_one_doit_builds_for_two_architectures_on_two_builders(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path)
    project.write("pyproject.toml", f"[tool.gamebear.builder]\namd64 = 'local:'\ni386 = '{shelf.url}'\n")
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n"
        "def task_x():\n"
        "    for arch in ('amd64', 'i386'):\n"
        "        yield {**artifact('x.py', outputs=[f'build/{arch}/x'], arch=arch), 'name': arch}\n",
    )
    project.write("x.py", "open('x', 'w').write('for two')")
    del project.environment["GAMEBEAR_BUILDER"]
    before = len(shelf.workers[1].digests)
    project.doit("-n", "2").ok()
    assert len(list((project.store / "jobs").iterdir())) == 1
    assert len(shelf.workers[1].digests) - before == 1


class Evil:
    """An object that creates a marker file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


HOSTILE: dict[str, Callable[[Evil], object]] = {
    "a message that Dask unpickles": lambda evil: ToPickle(evil),
    "a result": lambda evil: {"id": 0, "protocol": PROTOCOL, "workers": Serialize(evil)},
    "an exception": lambda evil: {"status": "error", "exception": Serialize(evil), "exception_text": "it failed"},
    "pickled bytes": lambda evil: {"exception_text": pickle.dumps(evil)},
    "a name to import": lambda evil: {"__Enum__": 1, "name": "x", "__module__": "antigravity", "__name__": "y"},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_that_a_cluster_sends_is_unpickled(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE", 1.0)  # some replies do not match the request
    mark = tmp_path / "mark"

    async def answer(comm: Any) -> None:
        with contextlib.suppress(OSError):
            while True:
                await comm.read()
                await comm.write(HOSTILE[kind](Evil(mark)))

    async def listening() -> Any:
        return await distributed.comm.listen("tcp://127.0.0.1", answer, deserialize=False)

    async def a_dask_client(address: str) -> None:
        comm = await distributed.comm.connect(address)
        await comm.write({"op": "identity"})
        await comm.read()
        await comm.close()

    loop = Loop()
    try:
        listener = loop.wait_for(listening(), 10)
        builder = open_builder(listener.contact_address.replace("tcp:", "dask:"))
        builder.patience = 0.0
        with contextlib.suppress(BuilderError):
            builder.describe()
        builder.close()
        assert not mark.exists()
        if kind.startswith("a message") or "result" in kind:
            loop.wait_for(a_dask_client(listener.contact_address), 10)
            assert mark.exists(), "Dask's own client does"
    finally:
        loop.close()


def test_retries_against_an_inconsistent_scheduler_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_builder, "PAUSE", 0.01)
    worker = {"worker": "tcp://127.0.0.1:9"}
    answers: dict[str, Mapping[str, object]] = {"place": worker, "where": worker, "worker": {"there": False}}

    async def answer(comm: Any) -> None:
        with contextlib.suppress(OSError):
            while True:
                asked = await comm.read()
                about = answers.get(asked.get("ask"), {})
                await comm.write({"protocol": PROTOCOL, "id": asked.get("id"), **about})

    async def listening() -> Any:
        return await distributed.comm.listen("tcp://127.0.0.1", answer, deserialize=False)

    loop = Loop()
    try:
        listener = loop.wait_for(listening(), 10)
        builder = open_builder(listener.contact_address.replace("tcp:", "dask:"))
        states = [builder.follow("0" * 64, "a", 0)[0].state for _ in range(dask_builder.TRIES)]
        assert states == ["running"] * (dask_builder.TRIES - 1) + ["lost"]
        with pytest.raises(BuilderLost, match="has lost the worker"):
            builder.fetch("0" * 64, "a", "x", 0, Memory(), 1)
        with pytest.raises(BuilderError, match="has lost the worker"):
            builder.submit(order(tmp_path, "amd64"))
        builder.discard("0" * 64, "a")
        builder.close()
    finally:
        loop.close()


@pytest.mark.parametrize(
    "frames",
    [
        struct.pack("Q", 1 << 60),
        struct.pack("3Q", 16, 1 << 40, 0),
        struct.pack("4Q", 24, 2, 8, 1 << 50),
        struct.pack("3Q", 17, 1, 1) + b"\xc1",
        struct.pack("3Q", 16 + 2000, 1, 2000) + b"\x91" * 2000,
    ],
    ids=["too long", "too many frames", "a frame too long", "not msgpack", "too deep"],
)
def test_an_invalid_message_is_rejected(frames: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(frames)
                connection.recv(4096)

        thread = threading.Thread(target=talk)
        thread.start()
        builder = open_builder(f"dask://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(BuilderError, match="sends an invalid message"):
            builder.describe()
        builder.close()
        thread.join()


def test_a_shell_opens_on_the_worker_that_retained_the_container(shelf: Cluster, tmp_path: Path) -> None:
    project = project_on(shelf, tmp_path, GAMEBEAR_KEEP_FAILED="yes")
    tree = tmp_path / "tree"
    tiny.fill(tree, ("sh", "cat"))
    project.write("x.py", f"c = Container('scratch')\nc.copy_in({str(tree)!r}, '/')\nc.run(['sh', '-c', 'exit 3'])\n")
    project.doit("x").failed("exited with 3 (worker ", "Open a shell in it: gamebear shell x")
    run = project.gamebear("shell", "x", "--", "sh", "-c", "cat /etc/passwd; exit 7")
    assert (run.status, run.out) == (7, (tree / "etc/passwd").read_text())
    project.doit("x", GAMEBEAR_KEEP_FAILED="no").failed("exited with 3")
    project.gamebear("shell", "x", GAMEBEAR_KEEP_FAILED="no").failed("Task x has no retained container on dask://")


def test_slot_counts_from_a_scheduler_are_bounded() -> None:
    claimed = {"armhf": 2, "arm64": -1, "amd64": 1 << 63, "i386": True, "armel": 1.5, "x": 1}
    assert dask_builder._counts(claimed) == {"armhf": 2, "amd64": 999_999}
    assert dask_builder._counts(None) == {}
