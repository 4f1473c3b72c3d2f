"""The job that this process builds: what its containers and images belong to, and how a command of it fails."""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..host.buildah import Buildah, BuildahError
from ..host.capabilities import Facts
from ..host.subprocesses import last_lines
from ..maintenance.retained_containers import FINISHED, Notes
from ..store.phases import Phases

RUN_TAKES_SETTINGS = (1, 22)
"""The first release whose `buildah run` has `--env` and `--workingdir`."""


CONFIG_TAKES_VARIABLES = (1, 28)
"""The first release that is known to have values from its environment for `buildah config --env NAME`; 1.19 has not."""

MATERIALS = "materials.json"
"""The file in the job's folder with what it was built in, see `materials`."""

PHASES = {"commit": "commit", "from": "container", "rm": "container"}
"""What buildah's time is for, by its command; all else is the build."""


class CommandError(subprocess.CalledProcessError):
    """A command in a container failed, or buildah itself did.

    Attributes:
        cmd: the command, as the script gave it.
        returncode: its exit status, negative for a signal.
        where: the container or image that it was about.
    """

    def __init__(
        self, returncode: int, cmd: Sequence[str], where: str = "", output: Any = None, stderr: Any = None
    ) -> None:
        super().__init__(returncode, list(cmd), output, stderr)
        self.where = where

    def __str__(self) -> str:
        number = self.returncode
        number = -number if number < 0 else number - 128
        killed = self.returncode != 255 and number in set(signal.Signals)
        how = f"was ended by {signal.Signals(number).name}" if killed else f"failed with status {self.returncode}"
        said = last_lines(self.stderr) if isinstance(self.stderr, str) else ""
        return f"`{shlex.join(self.cmd)}` {how}{self.where and f' in {self.where}'}{said and f': {said}'}"


def programs(known: Facts) -> dict[str, str]:
    """Return what builds here now, which may be another release when somebody asks."""
    return {"python": sys.version.split()[0], "buildah": known.version, "isolation": known.isolation}


class Job:
    """What the containers of this process belong to; there is one job for each process.

    Args:
        buildah: to run buildah with, inside the namespace.
        facts: what the builder can do.
        arch: Debian's name of the architecture that images are to have.
        prefix: what the names of the containers begin with.
        tell: called with each phase as it begins.
        notes: where its containers are noted if they are to be kept should it fail; else None.
    """

    def __init__(
        self,
        buildah: Buildah,
        facts: Facts,
        arch: str,
        prefix: str,
        tell: Callable[[str], None] | None = None,
        notes: Notes | None = None,
    ) -> None:
        self.notes = notes
        self.finished: list[str] = []
        """The containers whose with-block is over and that are still there, in case the job fails."""
        self.buildah = buildah
        self.facts = facts
        self.arch = arch
        self.prefix = prefix
        self.count = 0
        self.had_containers = False
        self.open: dict[str, Callable[[], None]] = {}
        self.committed: list[str] = []
        self.phases = Phases(tell=tell)
        self.images: dict[str, dict[str, Any]] = {}
        """What is known of the images that were used, by their ids, see `materials`."""
        self.policies: list[dict[str, Any]] = []
        """What the result's validity hangs on, see `policy`."""

    def note_image(self, identity: str, **known: Any) -> None:
        """Note something about an image that is used: see `materials`."""
        if identity not in self.committed:
            self.images.setdefault(identity, {}).update(known)

    def run_takes_settings(self) -> bool:
        """Say whether environment and working directory can be had for one command only."""
        return self._version >= RUN_TAKES_SETTINGS

    def takes_variables(self) -> bool:
        """Say whether a container's variables can be told by buildah's own environment, where nobody else sees them."""
        return self._version >= CONFIG_TAKES_VARIABLES

    @property
    def _version(self) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", self.facts.version)[:2])

    def remove(self, container: str, where: str) -> None:
        """Remove a container whose with-block is over: at once, or some time later where it is noted.

        Args:
            container: its name.
            where: what it is called in messages.

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
        """Remove the containers whose with-block is over, for they have images that are to go."""
        while self.finished:
            self._remove(self.finished.pop(0))

    def _remove(self, container: str) -> None:
        run_buildah(f"container {container}", "rm", container)
        if self.notes is not None:
            self.notes.removed(container)

    def let_go(self) -> None:
        """Let go of the containers' files, and leave the containers."""
        for let_go in self.open.values():
            let_go()

    def close(self, keep: str = "") -> None:
        """Remove the containers that are left, and the images that were committed and then neither named nor returned.

        Args:
            keep: the id of the image that the script returned.

        Raises:
            BuildahError: a container stays.
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
    """Make a job the one that new containers and images belong to."""
    global _job
    _job = job


def current() -> Job:
    """Return the job of this process."""
    if _job is None:
        raise RuntimeError("There are containers and images only in a build.")
    return _job


def run_buildah(where: str, *args: str, variables: Mapping[str, str] | None = None) -> str:
    """Run buildah quietly; what fails is an error that a script can catch like that of a command.

    Args:
        where: the container or image that it is about.
        args: the command and its options.
        variables: more of its environment.
    """
    job = current()
    try:
        with job.phases.phase(PHASES.get(args[0], "build")):
            return job.buildah(*args, variables=variables)
    except BuildahError as error:
        raise CommandError(error.status, ["buildah", *args], where, stderr=error.stderr) from None
