"""The job that this process builds: owner of its containers and images, and the errors of its commands."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..host import network
from ..host.buildah import Buildah, BuildahError
from ..host.capabilities import Facts
from ..host.subprocesses import last_lines
from ..maintenance.retained_containers import FINISHED, Notes
from ..store import caches
from ..store.phases import Phases
from ..util.errors import ended_by

if TYPE_CHECKING:
    from ..protocol.replies import Programs

RUN_TAKES_SETTINGS = (1, 22)
"""First buildah release whose `run` has `--env` and `--workingdir`."""


CONFIG_TAKES_VARIABLES = (1, 28)
"""First buildah release known to read the value from its environment for `config --env NAME`; 1.19 does not."""

LONGEST = 200
"""Maximum characters of a command in a short line."""

LONG_ID = re.compile(r"\b[0-9a-f]{12,64}\b")
"""Ids of images and containers, digests."""

MATERIALS = "materials.json"
"""File in the job's folder that records the images and programs used for the build; see `server.materials`."""

PHASES = {"commit": "commit", "from": "container", "rm": "container"}
"""Phase that the duration of a buildah command counts toward, by command; all others count as the build."""


class CommandError(subprocess.CalledProcessError):
    """A command in a container failed, or buildah itself did.

    Attributes:
        cmd: Words of the command, as in the script.
        returncode: Exit status, negative for a signal.
        where: The container or image that the command was for, as messages call it.
        stdout: Captured output, if `stdout=PIPE`.
        stderr: Captured errors, if `stderr=PIPE`; for buildah's own commands, its error output.
        hint: Suggested fix; empty for the usual one.
    """

    hint = ""

    def __init__(
        self, returncode: int, cmd: Sequence[str], where: str = "", output: Any = None, stderr: Any = None
    ) -> None:
        super().__init__(returncode, list(cmd), output, stderr)
        self.where = where

    def __str__(self) -> str:
        output = last_lines(self.stderr) if isinstance(self.stderr, str) else ""
        where = self.where and f" in {self.where}"
        return f"`{shlex.join(self.cmd)}` {ended_by(self.returncode)}{where}{output and f': {output}'}"

    @property
    def is_buildahs(self) -> bool:
        """Whether buildah itself failed, and not a command in a container."""
        return self.cmd[0] == "buildah" and isinstance(self.stderr, str)

    @property
    def cause(self) -> str:
        """The failure in a short line: long commands are cut, and buildah's options, names and ids are left out."""
        output = self.stderr.decode("utf-8", "replace") if isinstance(self.stderr, bytes) else self.stderr or ""
        output = LONG_ID.sub("…", last_lines(output, 1).removeprefix("Error: "))
        command = shlex.join(self.cmd[:2] if self.is_buildahs else self.cmd)
        command = command if len(command) <= LONGEST else f"{command[: LONGEST - 1]}…"
        return f"`{command}` {ended_by(self.returncode)}{output and f': {output}'}"


def programs(known: Facts) -> Programs:
    """Return the programs that build here now, with versions.

    They are recorded during the build, because the builder may be upgraded before the record is requested.
    """
    return {"python": sys.version.split()[0], "buildah": known.version, "isolation": known.isolation}


class Job:
    """The job that owns the containers and images of this process; one per process.

    Args:
        buildah: Runs buildah, inside the namespace.
        facts: Capabilities of the builder.
        arch: Debian's name of the architecture of the job's images.
        prefix: Prefix of the containers' names.
        on_phase: Called with each phase when it begins.
        notes: Records the containers, if they are retained after a failure; otherwise None.
    """

    def __init__(
        self,
        buildah: Buildah,
        facts: Facts,
        arch: str,
        prefix: str,
        on_phase: Callable[[str], None] | None = None,
        notes: Notes | None = None,
    ) -> None:
        self.notes = notes
        self.finished: list[str] = []
        """Containers whose `with` block has ended and that still exist, in case the job fails."""
        self.buildah = buildah
        self.facts = facts
        self.arch = arch
        self.prefix = prefix
        self.count = 0
        self.had_containers = False
        self.open: dict[str, Callable[[], None]] = {}
        self.committed: list[str] = []
        self._is_network_checked = False
        self.phases = Phases(on_switch=on_phase)
        self.images: dict[str, dict[str, Any]] = {}
        """Facts about the images that were used, by id; see `server.materials`."""
        self.caches: dict[str, caches.Instance] = {}
        """Caches that the job uses, by key; locked until this process ends."""
        self.policies: list[dict[str, Any]] = []
        """Conditions for the validity of the result; see `store.expiry`."""

    def note_image(self, identity: str, **known: Any) -> None:
        """Record facts about a used image, unless the job itself committed it; see `server.materials`."""
        if identity not in self.committed:
            self.images.setdefault(identity, {}).update(known)

    def cache(self, name: str, image: str) -> Path:
        """Return the folder of a cache, which is the job's until it ends.

        Args:
            name: The cache's name, or its path in the container.
            image: Id of the container's image.

        Raises:
            OSError: The store cannot be written.
        """
        key = caches.key_of(name, image, self.arch)
        if key not in self.caches:
            self.caches[key] = caches.acquire(self.buildah.root, key)
        return self.caches[key].files

    def check_network(self) -> None:
        """Verify, once, that this builder can run commands without network.

        Raises:
            NetworkError: It cannot.
        """
        if not self._is_network_checked:
            network.check(self.buildah.environment)
            self._is_network_checked = True

    def run_takes_settings(self) -> bool:
        """Return whether `buildah run` accepts environment and working directory for one command."""
        return self._version >= RUN_TAKES_SETTINGS

    def takes_variables(self) -> bool:
        """Return whether buildah reads a container's variables from its own environment, hidden from other users."""
        return self._version >= CONFIG_TAKES_VARIABLES

    @property
    def _version(self) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", self.facts.version)[:2])

    def remove(self, container: str, where: str) -> None:
        """Remove a container whose `with` block has ended: at once, or later if containers may be retained.

        With `notes`, the last few containers are left until the job ends.

        Args:
            container: Its name.
            where: Its name in messages.

        Raises:
            CommandError: buildah failed.
        """
        if self.notes is None:
            run_buildah(where, "rm", container)
            return
        self.finished.append(container)
        while len(self.finished) > FINISHED:
            self._remove(self.finished.pop(0))

    def remove_finished(self) -> None:
        """Remove the containers whose `with` block has ended, because they block the removal of their images."""
        while self.finished:
            self._remove(self.finished.pop(0))

    def _remove(self, container: str) -> None:
        run_buildah(f"container {container}", "rm", container)
        if self.notes is not None:
            self.notes.removed(container)

    def let_go(self) -> None:
        """Release the containers' files (mounts, compiler caches) and leave the containers."""
        for let_go in self.open.values():
            let_go()

    def close(self, keep: str = "") -> None:
        """Remove the remaining containers, and the committed images that have no name and were not returned.

        Args:
            keep: Id of the image that the script returned.

        Raises:
            BuildahError: A container could not be removed.
        """
        self.let_go()
        left = [*self.open, *self.finished]
        if left:
            self.buildah("rm", *left)
            self.open.clear()
            self.finished.clear()
        if self.notes is not None:
            self.notes.removed(*left)
        images = [identity for identity in self.committed if identity != keep]
        if images:
            with contextlib.suppress(BuildahError):
                named = {entry["id"] for entry in self.buildah.images() if entry["names"]}
                for identity in reversed(images):
                    if identity not in named:
                        with contextlib.suppress(BuildahError):
                            self.buildah("rmi", identity)


_job: Job | None = None


def begin(job: Job | None) -> None:
    """Set the job that owns new containers and images; None for no job."""
    global _job
    _job = job


def current() -> Job:
    """Return the job of this process.

    Raises:
        RuntimeError: This process does not build a job.
    """
    if _job is None:
        raise RuntimeError("There are containers and images only in a build.")
    return _job


def run_buildah(where: str, *args: str, variables: Mapping[str, str] | None = None) -> str:
    """Run buildah quietly and return its output.

    Args:
        where: The container or image that the command is for, as messages call it.
        args: The command and its options.
        variables: Additional environment variables.

    Raises:
        CommandError: buildah failed; scripts can catch it like a failed command of theirs.
    """
    job = current()
    try:
        with job.phases.phase(PHASES.get(args[0], "build")):
            return job.buildah(*args, variables=variables)
    except BuildahError as error:
        raise CommandError(error.status, ["buildah", *args], where, stderr=error.stderr) from None
