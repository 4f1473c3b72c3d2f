"""One trivial job over SSH: a container that runs `true`, and one small output file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from project import Project, wait_for

from gamebear_tasks.builders.base import Order
from gamebear_tasks.builders.protocol.client import RunnerBuilder
from gamebear_tasks.builders.transports.local import ProcessConnection
from gamebear_tasks.jobspec.spec import Job

from . import seed
from .machine import Builder
from .measure import Goal, ProgramError, Result, Row, alternate, checked, seconds
from .phases import phases_of
from .place import Place

COUNT = 7

FAR_COUNT = 5

ONE_WAY = 0.025
"""Seconds of latency in each direction. A round trip has twice that."""

DODO = """\
from gamebear_tasks import artifact

def task_small():
    return artifact("small.py", outputs=["build/small"])
"""

_numbers = itertools.count()


def script() -> str:
    """Return a buildscript that was never built before."""
    return (
        "with Container('debian:bookworm') as c:\n"
        "    c.run(['true'])\n"
        f"Path('small').write_text('made {next(_numbers)}')\n"
    )


def trivial(place: Place) -> Result:
    """Compare with the five steps, podman, and a direct submission to the runner."""
    project = ours_at(place.found)
    with podman_at(place.tuned, place.folder) as (podman, how):
        sides: list[Callable[[], float]] = [
            lambda: built(project),
            lambda: by_steps(place.folder, place.found),
            lambda: by_steps(place.folder, place.tuned),
            podman,
            lambda: by_hand(place.found, place.arch),
        ]
        for side in sides:
            side()
        ours, as_found, tuned, podmans, hand = alternate(COUNT, *sides)
    what = "a trivial job over SSH"
    return Result(
        [
            Row(what, "the seed's five steps, vfs", ours, as_found, Goal("ratio", 1.0), note=VFS),
            Row(what, "the seed's five steps, overlay", ours, tuned, Goal("ratio", 1.0)),
            Row(what, "podman --remote", ours, podmans, Goal("ratio", 1.0), note=how),
            Row(what, "the runner by hand", ours, hand, Goal("more", 0.25), note=BY_HAND),
        ],
        [phases_of(project, what, lambda: built(project))],
    )


def far(place: Place) -> Result:
    """Compare with the five steps at a round-trip time of 50 ms."""
    with place.found.far(ONE_WAY) as (port, environment), place.tuned.far(ONE_WAY) as (their_port, _):
        project = ours_at(place.found, **environment)
        as_found = place.found.ssh_config(port)
        tuned = place.tuned.ssh_config(their_port)
        sides: list[Callable[[], float]] = [
            lambda: built(project),
            lambda: by_steps(place.folder, place.found, as_found),
            lambda: by_steps(place.folder, place.tuned, tuned),
        ]
        for side in sides:
            side()
        ours, vfs, overlay = alternate(FAR_COUNT, *sides)
        what = "a trivial job, 50 ms away"
        return Result(
            [
                Row(what, "the seed's five steps, vfs", ours, vfs, Goal("ratio", 1 / 4), note=VFS),
                Row(what, "the seed's five steps, overlay", ours, overlay, Goal("ratio", 1 / 4)),
            ],
            [phases_of(project, what, lambda: built(project))],
        )


VFS = "vfs is what Debian's buildah uses for an ordinary user by default; the runner finds overlay by itself"

BY_HAND = (
    "the job handed on the builder to the runner's own standard input, by a program that already runs:"
    " no doit, no SSH, no start of a client's Python"
)


def ours_at(builder: Builder, **environment: str) -> Project:
    """Return a project with the trivial task."""
    project = builder.project("trivial", **environment)
    project.write("dodo.py", DODO)
    return project


def built(project: Project) -> float:
    """Build a new trivial job with doit."""
    project.write("small.py", script())
    taken = seconds(lambda: project.doit().ok())
    assert (project.folder / "build" / "small").read_text().startswith("made")
    return taken


def by_steps(folder: Path, builder: Builder, config: Path | None = None) -> float:
    """Build a new trivial job by the five steps."""
    chosen = config or builder.ssh_config()
    text = script()
    return seconds(lambda: seed.five_steps(folder / "seed", text, ["small"], chosen))


def by_hand(builder: Builder, arch: str) -> float:
    """Build a new trivial job by submitting it to the runner on the builder directly."""
    text = script().encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "small.py")
        path.write_bytes(text)
        sha256 = hashlib.sha256(text).hexdigest()
        order = Order(Job(arch, "small.py", sha256, ("small",)), {sha256: path}, dict)
        return seconds(lambda: _hand_over(builder, order))


class _Content(io.BytesIO):
    def skip(self, count: int, /) -> None:
        self.write(bytes(count))


def _hand_over(builder: Builder, order: Order) -> None:
    runner = RunnerBuilder("local:", "the builder", lambda: ProcessConnection(tuple(builder.words())))
    try:
        status, offset = runner.submit(order), 0
        attempt = status.attempt
        while not status.is_final:
            status, log = runner.follow(order.job.digest, attempt, offset)
            offset += len(log)
        assert status.state == "done", status
        content = _Content()
        runner.fetch(order.job.digest, attempt, "small", 0, content, 100)
        assert content.getvalue().startswith(b"made")
    finally:
        runner.close()


@contextlib.contextmanager
def podman_at(builder: Builder, folder: Path) -> Iterator[tuple[Callable[[], float], str]]:
    """Run podman's service on a builder. Yield a function that builds a trivial job with it, and a description."""
    podman = Podman(builder, folder / "podman")
    service = subprocess.Popen(
        builder.words("podman", "system", "service", "--time=0", f"unix://{podman.socket}"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(podman.socket.exists)
        try:
            podman.run()
            yield lambda: seconds(podman.run), "one `podman run`, the file by its standard output"
        except ProgramError:  # the OCI runtime may refuse to run, as in containers and on hybrid cgroups
            yield lambda: seconds(podman.build), "podman build --no-cache, create, cp, rm: its `run` is refused here"
    finally:
        service.terminate()
        service.wait()


class Podman:
    """Client of podman's service on a builder."""

    def __init__(self, builder: Builder, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()
        self.socket = builder.account.home / "podman.sock"
        self._environment = {"HOME": str(builder.home), "PATH": "/usr/bin:/bin"}
        self._command = [
            "podman",
            "--remote",
            "--url",
            f"ssh://{builder.account.name}@127.0.0.1:{builder.server.port}{self.socket}",
            "--identity",
            f"{builder.home}/.ssh/id_ed25519",
        ]

    def run(self) -> None:
        """Run the job in a container, whose standard output becomes the file."""
        image = "docker.io/library/debian:bookworm"
        output = self._podman("run", "--rm", "--pull=never", "--network=host", image, "sh", "-c", "true && echo made")
        (self.folder / "small").write_text(output)

    def build(self) -> None:
        """Build an image that contains the file, and copy it from a container."""
        text = "FROM docker.io/library/debian:bookworm\nRUN true && echo made > /small\n"
        (self.folder / "Containerfile").write_text(text)
        name = f"trivial-{time.monotonic_ns()}"
        self._podman("build", "--no-cache", "--isolation=chroot", "--pull=never", "--tag", name, str(self.folder))
        self._podman("create", "--name", name, name)
        self._podman("cp", f"{name}:/small", str(self.folder / "small"))
        self._podman("rm", name)

    def _podman(self, *words: str) -> str:
        return checked([*self._command, *words], env=self._environment)
