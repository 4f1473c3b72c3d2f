"""The one way to run buildah."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..util.atomic_files import locked
from ..util.errors import RunnerError
from . import streams
from .capabilities import Facts, environment, made_folder, namespace
from .subprocesses import captured, last_lines

IMAGES_IN_USE = "in-use.lock"
"""The file in `images/` whose lock is shared by all who look for an image; a prune of images holds it alone."""


class BuildahError(RunnerError):
    """A buildah command failed.

    Args:
        command: what followed `buildah` and its storage options.
        status: exit status, negative for a signal.
        stderr: what it had to say, as much as was kept.
    """

    kind = "command"

    def __init__(self, command: Sequence[str], status: int, stderr: str, hint: str = "") -> None:
        said = last_lines(stderr)
        message = f"`buildah {shlex.join(command)}` ended with status {status}"
        message += f": {said}" if said else "."
        super().__init__(message, hint)
        self.command = list(command)
        self.status = status
        self.stderr = stderr


class ImageError(RunnerError):
    """An image cannot be had."""

    kind = "image"


class NoRoomError(ImageError):
    """An image cannot be had because the disk is full; that another way to it is tried would not help."""


class Buildah:
    """Buildah with this builder's store and isolation, to be used inside the namespace.

    Args:
        root: the versioned store folder.
        facts: what the builder can do.
        prefix: what the names of containers that we make for ourselves start with.
        used: the file that notes the ids of the images which the job uses.
    """

    def __init__(self, root: Path, facts: Facts, prefix: str = "gamebear-", used: Path | None = None) -> None:
        self.root = root
        self.prefix = prefix
        self.used = used
        self.facts = facts
        self.environment = environment(root, facts)

    def command(self, *args: str) -> list[str]:
        """Return the command line for `buildah args...` on this builder's store."""
        return ["buildah", *self.facts.storage, *args]

    def __call__(
        self,
        *args: str,
        input: bytes | None = None,
        timeout: float | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """Run buildah quietly and return what it printed.

        Args:
            args: the command and its options.
            input: what it reads; nothing by default.
            timeout: seconds after which it is killed and counts as failed.
            variables: more of its environment; what it needs itself stays.

        Raises:
            BuildahError: it failed.
        """
        env = {**(variables or {}), **self.environment}
        status, stdout, stderr = captured(self.command(*args), env, input, timeout)
        if status:
            raise BuildahError(args, status, stderr)
        return stdout

    def images(self, every: bool = False) -> list[dict[str, Any]]:
        """Return the local images as buildah lists them, with plain full ids and a list of names; raises BuildahError.

        Args:
            every: intermediate images too.
        """
        listed = json.loads(self("images", "--no-trunc", "--json", *(["--all"] if every else [])) or "null") or []
        return [
            {**entry, "id": str(entry["id"]).rpartition(":")[2], "names": list(entry.get("names") or ())}
            for entry in listed
        ]

    @contextlib.contextmanager
    def looking_for_image(self) -> Iterator[None]:
        """Keep every image for the length of the block, in which one is found or made and noted (see `prune`)."""
        folder = made_folder(self.root / "images")
        with locked(folder / IMAGES_IN_USE, shared=True):
            yield

    def note_use(self, image: str) -> None:
        """Note that the job uses an image, by its full id."""
        with contextlib.suppress(OSError):
            (made_folder(self.root / "images") / f"{image}.used").touch()
            if self.used is not None:
                with self.used.open("a") as file:
                    file.write(f"{image}\n")

    def run_in(
        self,
        container: str,
        words: Sequence[str],
        *options: str,
        stdin: int | IO[Any] = subprocess.DEVNULL,
        out: streams.Sink,
        err: streams.Sink | None = None,
        is_root: bool = False,
    ) -> int:
        """Run a command in a container and return its exit status.

        Args:
            container: its name.
            words: the command.
            options: of `buildah run`.
            stdin: what the command reads.
            out: gets what it prints, as it comes.
            err: gets what it prints as errors; None: in order with the rest.
            is_root: the container's user is root, and so who runs it.
        """

        def numbered(words: Sequence[str]) -> list[str]:
            return self.command("run", "--user", "0:0", *options, container, "--", *words)

        return streams.run(
            lambda words: self.command("run", *options, container, "--", *words),
            numbered if is_root else None,
            words,
            self.environment,
            prefix=self.prefix,
            is_shared=self.facts.isolation == "chroot" and "--terminal" not in options,
            stdin=stdin,
            out=out,
            err=err,
        )

    def logged_in(self, container: str, words: Sequence[str], *options: str, kept: int = 1 << 16) -> tuple[int, str]:
        """Run a command in a container with its output going to the log; see `run_in` and `streamed`."""
        sys.stdout.flush()
        sys.stderr.flush()
        log, tail = streams.descriptor(1), bytearray()

        def take(data: bytes) -> None:
            log(data)
            tail.extend(data)
            del tail[:-kept]

        status = self.run_in(container, words, *options, out=take)
        return status, tail.decode("utf-8", "replace")


def remove_containers(root: Path, facts: Facts, prefix: str, but: Collection[str] = ()) -> None:
    """Remove every container whose name starts with `prefix`, but some; to be called from outside the namespace.

    Raises:
        BuildahError: one of them stays.
    """
    streams.remove_leftovers(prefix)
    before, store, env = namespace(facts), list(facts.storage), environment(root, facts)
    status, stdout, stderr = captured([*before, "buildah", *store, "containers", "--all", "--json"], env)
    if status:
        raise BuildahError(["containers", "--all", "--json"], status, stderr)
    try:
        listed = json.loads(stdout or "null") or []
    except ValueError:
        raise BuildahError(["containers", "--all", "--json"], status, "its output is not JSON") from None
    for container in listed:
        if container["containername"].startswith(prefix) and container["containername"] not in but:
            args = ["rm", container["id"]]
            status, _, stderr = captured([*before, "buildah", *store, *args], env)
            if status and "not known" not in stderr:
                raise BuildahError(args, status, stderr)


def remove_tree(root: Path, facts: Facts, path: Path) -> None:
    """Remove a file or folder, whichever of the namespace's users owns what is in it; a missing one is well.

    Raises:
        RunnerError: something of it is left.
    """
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not os.path.lexists(path):
        return
    command = [*namespace(facts), "rm", "-rf", "--", str(path)]
    status, _, stderr = captured(command, environment(root, facts))
    if status or os.path.lexists(path):
        raise RunnerError(
            f"{path} cannot be removed: {last_lines(stderr)}",
            f"Remove it on the builder: buildah unshare rm -rf {path}",
        )


def outside(root: Path, facts: Facts, *args: str, timeout: float | None = None) -> str:
    """Run buildah from outside the namespace and return what it printed; raises BuildahError.

    Args:
        root: the versioned store folder.
        facts: what the builder can do.
        args: the command and its options.
        timeout: seconds after which it is killed and counts as failed.
    """
    command = [*namespace(facts), "buildah", *facts.storage, *args]
    status, stdout, stderr = captured(command, environment(root, facts), timeout=timeout)
    if status:
        raise BuildahError(args, status, stderr)
    return stdout
