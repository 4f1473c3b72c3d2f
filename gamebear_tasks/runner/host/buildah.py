"""Run buildah with this builder's image store, isolation and environment."""

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

from ..util.errors import RunnerError
from ..util.free_space import is_full
from ..util.locks import locked
from . import streams
from .capabilities import Facts, environment, made_folder, namespace
from .network import WITHOUT_NETWORK
from .subprocesses import captured, last_lines

IMAGES_IN_USE = "in-use.lock"
"""Lock file in `images/`.

Jobs that search for an image share the lock; garbage collection of images holds it exclusively.
"""

BUILD_MARKER = "gamebear-build-of-"
"""Prefix of the id of a secret, followed by the prefix of a job's containers, that marks the containers of
`buildah build`.

Buildah chooses the names of these containers. It stores the ids of secrets, but not their content, in the container's
state.
"""


class BuildahError(RunnerError):
    """A buildah command failed.

    Args:
        command: The arguments after `buildah` and its storage options.
        status: Exit status, negative for a signal.
        stderr: Error output, possibly only its end.
    """

    kind = "command"

    def __init__(self, command: Sequence[str], status: int, stderr: str, hint: str = "") -> None:
        output = last_lines(stderr)
        message = f"`buildah {shlex.join(command)}` failed with status {status}"
        message += f": {output}" if output else "."
        super().__init__(message, hint)
        self.command = list(command)
        self.status = status
        self.stderr = stderr


class ImageError(RunnerError):
    """An image cannot be found, fetched or built."""

    kind = "image"


class NoRoomError(ImageError):
    """An image cannot be stored because the disk is full, so a fallback would fail as well."""


class Buildah:
    """Buildah with this builder's store and isolation, for use inside the namespace.

    Args:
        root: The versioned store folder.
        facts: Capabilities of the builder.
        prefix: Prefix of the names of containers that the runner creates for itself.
        used: File that records the ids of the images that the job uses.
    """

    def __init__(self, root: Path, facts: Facts, prefix: str = "gamebear-", used: Path | None = None) -> None:
        self.root = root
        self.prefix = prefix
        self.used = used
        self.facts = facts
        self.environment = environment(root, facts)

    def command(self, *args: str) -> list[str]:
        """Return the command line of `buildah args...` for this builder's store."""
        return ["buildah", *self.facts.storage, *args]

    def __call__(
        self,
        *args: str,
        input: bytes | None = None,
        timeout: float | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """Run buildah quietly and return its output.

        Args:
            args: The command and its options.
            input: Standard input; empty by default.
            timeout: Seconds after which buildah is killed and counts as failed.
            variables: Additional environment variables; those that buildah itself needs have precedence.

        Raises:
            BuildahError: buildah failed.
        """
        env = {**(variables or {}), **self.environment}
        status, stdout, stderr = captured(self.command(*args), env, input, timeout)
        if status:
            raise BuildahError(args, status, stderr)
        return stdout

    def images(self, every: bool = False) -> list[dict[str, Any]]:
        """Return the local images as buildah lists them, with full ids without a prefix and a list of names.

        Args:
            every: Include intermediate images.

        Raises:
            BuildahError: buildah failed.
        """
        listed = json.loads(self("images", "--no-trunc", "--json", *(["--all"] if every else [])) or "null") or []
        return [
            {**entry, "id": str(entry["id"]).rpartition(":")[2], "names": list(entry.get("names") or ())}
            for entry in listed
        ]

    def is_disk_full(self) -> bool:
        """Return whether the disk of the image store or of buildah's temporary files is full."""
        return is_full(self.environment["TMPDIR"], *filter(None, [self.facts.graph_root]))

    @contextlib.contextmanager
    def looking_for_image(self) -> Iterator[None]:
        """Protect all images from garbage collection for the length of the block.

        The block finds or builds an image and records its use with `note_use`.
        """
        folder = made_folder(self.root / "images")
        with locked(folder / IMAGES_IN_USE, shared=True):
            yield

    def note_use(self, image: str) -> None:
        """Record that the job uses an image, by its full id."""
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
        network: bool = True,
    ) -> int:
        """Run a command in a container and return its exit status.

        Args:
            container: Name of the container.
            words: The command.
            options: Options of `buildah run`.
            stdin: Standard input of the command.
            out: Sink for the output, called with each piece as it arrives.
            err: Sink for the error output; None: it goes to `out`, in order with the rest.
            is_root: Whether the container's user is root, so that root runs the command.
            network: Whether the command has the builder's network. Without it, `network.check` must have succeeded.
        """
        within = () if network else WITHOUT_NETWORK

        def plain(words: Sequence[str]) -> list[str]:
            return [*within, *self.command("run", *options, container, "--", *words)]

        def numbered(words: Sequence[str]) -> list[str]:
            return [*within, *self.command("run", "--user", "0:0", *options, container, "--", *words)]

        return streams.run(
            plain,
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
        """Run a command in a container and log its output; see `run_in`.

        Args:
            container: Name of the container.
            words: The command.
            options: Options of `buildah run`.
            kept: Bytes of output to return at most.

        Returns:
            The exit status and the end of the output.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        log, tail = streams.descriptor(1), bytearray()

        def take(data: bytes) -> None:
            log(data)
            tail.extend(data)
            del tail[:-kept]

        status = self.run_in(container, words, *options, out=take)
        return status, tail.decode("utf-8", "replace")


def remove_containers(
    root: Path, facts: Facts, prefix: str, but: Collection[str] = (), scratch: Path | None = None
) -> None:
    """Remove all containers with a name prefix, with exceptions; for use outside the namespace.

    Args:
        root: The versioned store folder.
        facts: Capabilities of the builder.
        prefix: Prefix of the names.
        but: Names of containers to retain.
        scratch: Folder for buildah's temporary files, which it leaves if it is killed; by default the store's.

    Raises:
        BuildahError: A container could not be removed.
    """
    streams.remove_leftovers(prefix)
    before, store, env = namespace(facts), list(facts.storage), environment(root, facts)
    if scratch is not None:
        env["TMPDIR"] = str(made_folder(scratch))

    def run(*args: str) -> str:
        status, stdout, stderr = captured([*before, "buildah", *store, *args], env)
        if status:
            raise BuildahError(args, status, stderr)
        return stdout

    def names() -> dict[str, str]:
        """Return the name of every container, by id."""
        args = ("containers", "--all", "--json")
        try:
            listed = json.loads(run(*args) or "null") or []
        except ValueError:
            raise BuildahError(args, 0, "the output is not JSON") from None
        return {container["id"]: container["containername"] for container in listed}

    for identity, name in names().items():
        if (name.startswith(prefix) and name not in but) or _is_of_build(facts, identity, prefix):
            try:
                run("rm", identity)
            except BuildahError:
                if identity in names():  # race: another process may have removed it
                    raise


def _is_of_build(facts: Facts, identity: str, prefix: str) -> bool:
    """Return whether a container belongs to `buildah build` of a job; see `BUILD_MARKER`."""
    state = Path(facts.graph_root, f"{facts.driver}-containers", identity, "userdata", "buildah.json")
    try:
        return f'"id={BUILD_MARKER}{prefix}'.encode() in state.read_bytes()
    except OSError:
        return False  # removed meanwhile, or another release of buildah


def remove_tree(root: Path, facts: Facts, path: Path) -> None:
    """Remove a file or folder whose content may belong to other users of the namespace; a missing one is not an error.

    Raises:
        RunnerError: A part could not be removed.
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
            f"{path} cannot be removed: {last_lines(stderr) or f'rm failed with status {status}'}.",
            f"Remove it on the builder: buildah unshare rm -rf {shlex.quote(str(path))}",
        )


def outside(root: Path, facts: Facts, *args: str, timeout: float | None = None) -> str:
    """Run buildah from outside the namespace and return its output.

    Args:
        root: The versioned store folder.
        facts: Capabilities of the builder.
        args: The command and its options.
        timeout: Seconds after which buildah is killed and counts as failed.

    Raises:
        BuildahError: buildah failed.
    """
    command = [*namespace(facts), "buildah", *facts.storage, *args]
    status, stdout, stderr = captured(command, environment(root, facts), timeout=timeout)
    if status:
        raise BuildahError(args, status, stderr)
    return stdout
