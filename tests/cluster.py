"""A Dask scheduler and its workers as processes. Each worker has its own store."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from project import ROOT, processes, wait_for

STARTING = 120.0
"""Seconds after which the start of a scheduler or worker times out."""


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Worker:
    """A worker.

    Attributes:
        folder: Folder of its cache, log and scratch files.
        process: Its process.
        command: Its command line.
    """

    folder: Path
    process: subprocess.Popen[bytes]
    command: tuple[str, ...]

    @property
    def store(self) -> Path:
        """Store of its jobs."""
        return self.folder / "cache" / "gamebear" / "v1"

    @property
    def digests(self) -> list[str]:
        """Digests of all its jobs."""
        return [path.name for path in (self.store / "jobs").glob("*")]

    def states(self) -> list[dict[str, Any]]:
        """Return the states of its jobs."""
        return [json.loads(path.read_bytes()) for path in (self.store / "jobs").glob("*/state.json")]

    def kill(self, jobs: bool = True) -> None:
        """Kill the worker as in a power failure, or without `jobs` only Dask's process."""
        self.process.kill()
        self.process.wait()
        while jobs and (left := processes(self.store)):
            for number in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


class Cluster:
    """A scheduler and its workers.

    Args:
        folder: Folder for all their files.
        scheme: `tcp` or `tls`.
        environment: Additional environment variables.
    """

    def __init__(self, folder: Path, scheme: str = "tcp", **environment: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"{scheme}://127.0.0.1:{self.port}"
        self.url = f"dask://127.0.0.1:{self.port}".replace("dask:", "dask+tls:" if scheme == "tls" else "dask:")
        self.workers: list[Worker] = []
        self.environment = {
            **os.environ,
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "DASK_DISTRIBUTED__WORKER__USE_FILE_LOCKING": "False",
            **environment,
        }
        self.start_scheduler()

    def start_scheduler(self) -> None:
        """Start the scheduler, or restart it."""
        self.scheduler = self._start(
            self.folder / "scheduler", "scheduler", "--host", self.address, "--no-dashboard", "--no-show"
        )
        log = self.folder / "scheduler" / "log"
        wait_for(lambda: "Scheduler at" in log.read_text(), STARTING)

    def stop_scheduler(self) -> None:
        """Kill the scheduler as in a power failure."""
        self.scheduler.kill()
        self.scheduler.wait()

    def start_worker(self, resources: str, *options: str, name: str = "", code: str = "") -> Worker:
        """Start a worker.

        Args:
            resources: Value of `dask worker --resources`.
            options: Additional options of `dask worker`.
            name: Name of its folder. The name of a former worker reuses that one's store.
            code: Python code that runs in the worker before Dask.
        """
        folder = self.folder / (name or f"worker{len(self.workers)}")
        process = self._start(
            folder,
            "worker",
            self.address,
            *("--host", "127.0.0.1"),
            *("--nthreads", "1"),
            *("--resources", resources),
            *("--local-directory", str(folder / "scratch")),
            *("--no-dashboard", "--no-nanny"),
            *options,
            code=code,
        )
        worker = Worker(folder, process, ())
        self.workers.append(worker)
        return worker

    def wait_for_workers(self) -> None:
        """Wait until all running workers have registered."""
        for worker in self.workers:
            if worker.process.poll() is None:
                log = worker.folder / "log"
                wait_for(lambda log=log: "Registered to" in log.read_text(), STARTING)  # type: ignore[misc]

    def _start(self, folder: Path, *arguments: str, code: str = "") -> subprocess.Popen[bytes]:
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        start = f"{code}\nfrom dask.__main__ import main\nmain()"
        with (folder / "log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", start, *arguments],
                cwd=folder,
                env={**self.environment, "XDG_CACHE_HOME": str(folder / "cache")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def memory(self, process: subprocess.Popen[bytes]) -> int:
        """Return the peak resident memory of a process, in bytes."""
        status = Path(f"/proc/{process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def close(self) -> None:
        """Kill the scheduler, the workers and their jobs."""
        for worker in self.workers:
            worker.kill()
        self.stop_scheduler()


def settings_of_tls(folder: Path) -> dict[str, Any]:
    """Create a certificate authority and a certificate. Return the environment variables by which Dask uses them."""
    folder.mkdir(parents=True)
    ca, cert, key, request = folder / "ca.pem", folder / "cert.pem", folder / "key.pem", folder / "request.pem"

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new, "-keyout", str(folder / "ca.key"), "-out", str(ca), "-subj", "/CN=shelf")
    openssl("req", *new, "-keyout", str(key), "-out", str(request), "-subj", "/CN=builder")
    openssl(
        *("x509", "-req", "-in", str(request), "-out", str(cert)),
        *("-CA", str(ca), "-CAkey", str(folder / "ca.key"), "-CAcreateserial"),
    )
    tls = "DASK_DISTRIBUTED__COMM__TLS"
    return {
        f"{tls}__CA_FILE": str(ca),
        "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True",
        **{f"{tls}__{role}__CERT": str(cert) for role in ("SCHEDULER", "WORKER", "CLIENT")},
        **{f"{tls}__{role}__KEY": str(key) for role in ("SCHEDULER", "WORKER", "CLIENT")},
    }


@contextlib.contextmanager
def running(folder: Path, *resources: str) -> Iterator[Cluster]:
    """Start a scheduler and one worker with each of the resources, and close them after the block."""
    cluster = Cluster(folder)
    try:
        for resource in resources:
            cluster.start_worker(resource)
        cluster.wait_for_workers()
        yield cluster
    finally:
        cluster.close()
