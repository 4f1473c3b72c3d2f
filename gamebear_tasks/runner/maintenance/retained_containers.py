"""Containers of failed jobs that are retained for inspection on request, with the working directory of the job.

    jobs/<digest>/kept.json   written by the build as it progresses: {"attempt": …, "last": NAME, "containers": {NAME:
                              {"image": what it was made from, "command": words of its last command, "options": its
                              `buildah run` options, "status": its exit status, null while it runs}}}
    kept/<digest>             exists while the containers do; every open shell in one of them holds its lock, shared

A job's containers are either pending cleanup (`live/<digest>` exists) or retained. The transition requires the job's
lock. The next attempt first returns them to pending cleanup, so no other code has to know about retained containers.
They are removed with the job's next attempt, when the job is pruned, and automatically when there are too many or they
are too old.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..host import streams
from ..host.buildah import Buildah
from ..host.capabilities import environment, namespace
from ..host.probe import facts
from ..store import caches
from ..store.store import Store, StoredJob, runner_folder, stamp
from ..util.atomic_files import is_sha256, read_json, sync_folder, write_json
from ..util.errors import RunnerError
from ..util.locks import Lock
from .cleanup import clean_up

if TYPE_CHECKING:
    from ..protocol.pty import Attended
    from ..protocol.replies import KeptReply
    from ..protocol.requests import Terminal

MOST = 3
"""Maximum number of failed jobs, the latest ones, whose containers a store retains."""

AGE = 7 * 86400.0
"""Seconds since the failure, or since the last shell, after which they are removed when the next job begins."""

FINISHED = 3
"""Number of containers, the latest ones, that still exist after their with-block when a job fails."""

KEEP_VARIABLE = "GAMEBEAR_KEEP"
"""Environment variable with the attempt's name if its containers are retained on failure; else empty."""

SHELL = ("/bin/sh", "-c", "if [ -x /bin/bash ]; then exec /bin/bash; fi; exec /bin/sh")
"""Default command in a container."""


class Notes:
    """Record of a build's containers, written to `kept.json`. Best effort.

    Args:
        path: file to write.
        attempt: attempt of the job.
    """

    def __init__(self, path: Path, attempt: str) -> None:
        self._path = path
        self._written: dict[str, Any] = {"attempt": attempt, "last": "", "containers": {}}

    def made(self, name: str, image: str) -> None:
        """Record a container and the image that it was made from."""
        self._written["containers"][name] = {"image": image, "command": [], "options": [], "status": None}
        self._last(name)

    def begun(self, name: str, command: Sequence[str], options: Sequence[str]) -> None:
        """Record that a command runs in a container."""
        self._written["containers"][name].update(command=list(command), options=list(options), status=None)
        self._last(name)

    def ended(self, name: str, status: int) -> None:
        """Record the exit status of a container's command."""
        self._written["containers"][name]["status"] = status
        self._write()

    def removed(self, *names: str) -> None:
        """Record that containers were removed."""
        for name in names:
            self._written["containers"].pop(name, None)
        self._write()

    def _last(self, name: str) -> None:
        self._written["last"] = name
        self._write()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            write_json(self._path, self._written, sync=False)


# With chroot isolation buildah reports a failed command by printing an error into the container's own terminal.
# To avoid that, the command exits with 0 there and its status is passed through a file that both sides can access.
_TELLING = """\
f=$1
shift
trap : INT QUIT
"$@"
s=$?
{ echo $s >"$f"; } 2>/dev/null || exit $s
"""

# in the store


def noted(stored: StoredJob, attempt: str) -> dict[str, Any]:
    """Return the containers that an attempt recorded, by name, in order of creation."""
    found = read_json(stored.folder / "kept.json")
    if not isinstance(found, dict) or found.get("attempt") != attempt or not isinstance(found.get("containers"), dict):
        return {}
    return {name: about for name, about in found["containers"].items() if isinstance(about, dict)}


def keep(stored: StoredJob) -> None:
    """Retain a job's containers and its working directory from now on. The caller holds the job's lock.

    Raises:
        OSError: the store cannot be written.
    """
    stored.kept.parent.mkdir(mode=0o700, exist_ok=True)
    stored.kept.touch(mode=0o600)
    os.utime(stored.kept)
    sync_folder(stored.kept.parent)
    stored.mark.unlink()


def trim(store: Store) -> None:
    """Remove retained containers that exceed `MOST` or `AGE`, except those with an open shell. Best effort."""
    with contextlib.suppress(OSError):
        marks = sorted(store.kept.iterdir(), key=stamp, reverse=True)
        for number, mark in enumerate(marks):
            old = number >= MOST or time.time() - stamp(mark) > AGE
            if not old or not is_sha256(mark.name):
                continue
            stored = store.job(mark.name)
            if not stored.folder.is_dir():
                mark.unlink()
                continue
            with contextlib.suppress(OSError), Lock.opened(stored.folder / "lock") as lock:
                if lock.acquire() and lock.is_current() and stored.release_kept():
                    clean_up(stored)


def listed(stored: StoredJob) -> KeptReply:
    """Return a job's retained containers, as sent to a client; empty if there are none.

    Returns:
        `attempt`; `age`, seconds since the failure; `last`, index of the last container used; and `containers`, with
        `image`, `command` and `status` of each.
    """
    attempt = stored.written_state().get("attempt", "")
    containers = noted(stored, attempt)
    if not containers or not stored.is_kept():
        return {}
    names = list(containers)
    last = (read_json(stored.folder / "kept.json") or {}).get("last")
    return {
        "attempt": attempt,
        "age": max(0.0, time.time() - stamp(stored.folder / "state.json")),
        "last": names.index(last) if last in names else len(names) - 1,
        "containers": [
            {"image": about.get("image"), "command": about.get("command"), "status": about.get("status")}
            for about in containers.values()
        ],
    }


# in a container


def entered(stored: StoredJob, container: int, words: Sequence[str], terminal: Terminal | None) -> Attended:
    """Start a command in a retained container and return it.

    Args:
        stored: the job.
        container: index of the container, from 0.
        words: the command; empty for a shell.
        terminal: the client's terminal, as for `Attended`.

    Raises:
        RunnerError: the container does not exist, or the command cannot be started.
    """
    from ..protocol.pty import started  # not needed by builds

    if not 0 <= container < len(listed(stored).get("containers", ())):
        raise RunnerError(
            f"The container of job {stored.digest[:12]} no longer exists.",
            "Run the task again with keep_failed=yes.",
        )
    root = stored.store.root
    known = facts(root)
    runner = str(runner_folder())
    command = [*namespace(known), sys.executable, "-I", "-S", runner, "enter", stored.digest, str(container), *words]
    stored.touch()
    stored.scratch.mkdir(mode=0o700, exist_ok=True)
    env = {**environment(root, known), "TMPDIR": str(stored.scratch)}
    return started(command, env, stored.work, terminal, within=True, umask=0o022)  # the umask of a build


def main(digest: str, number: str, *command: str) -> int:
    """Run a command in a retained container with the options of its last command. Runs in the namespace of a build.

    Args:
        digest: digest of the job.
        number: index of the container, from 0.
        command: its words; none for a shell.

    Returns:
        The command's exit status, or 125 if it was not started.
    """
    for signum in (signal.SIGHUP, signal.SIGTERM):  # process 1 of a namespace ignores unhandled signals
        signal.signal(signum, lambda signum, _: os._exit(128 + signum))
    store = Store()
    stored = store.job(digest)
    try:
        with stored.held_kept() as held:
            containers = noted(stored, stored.written_state().get("attempt", ""))
            if not held or int(number) >= len(containers):
                raise RunnerError("The container no longer exists: it was just removed.", "Run doit again.")
            name = list(containers)[int(number)]
            return _run_in(store, name, containers[name], list(command))
    except RunnerError as error:
        print(f"gamebear: {error}", file=sys.stderr)
        return 125


def _run_in(store: Store, name: str, about: dict[str, Any], command: list[str]) -> int:
    known = facts(store.root)
    options, _locks = _available([str(word) for word in about["options"]], store.root)
    buildah = Buildah(store.root, known)
    if not os.isatty(0):
        out, err = streams.descriptor(1), streams.descriptor(2)
        return buildah.run_in(name, command or SHELL, *options, stdin=0, out=out, err=err)
    options += ["--terminal", "--env", f"TERM={os.environ.get('TERM', 'dumb')}"]
    if not command and about["command"]:
        # Bash runs it before its first prompt: the up-arrow key then recalls the command that failed.
        line = shlex.quote(shlex.join(about["command"]))
        options += ["--env", f"PROMPT_COMMAND=unset PROMPT_COMMAND; history -s -- {line}"]
    words = command or SHELL
    with contextlib.ExitStack() as stack:
        told = None
        if known.isolation == "chroot" and os.access(streams.SHARED, os.W_OK):
            told = stack.enter_context(streams.file_for_all(name))
            words = ("/bin/sh", "-c", _TELLING, "sh", str(told), *words)
        # The container's program has a separate terminal; this stderr is that of buildah alone.
        process = subprocess.Popen(
            buildah.command("run", *options, name, "--", *words),
            env=environment(store.root, known),
            stderr=subprocess.PIPE,
        )
        _, said = process.communicate()
        said, status = streams.without_panic(said, process.returncode)
        os.write(2, streams.without_noise(said))
        status = status if status >= 0 else 128 - status
        if told is not None and not status:
            with contextlib.suppress(OSError, ValueError):
                status = int(told.read_text()[:4]) & 0xFF
        return status


def _available(options: list[str], root: Path) -> tuple[list[str], list[Lock]]:
    """Return options without the mounts that are unavailable now; report each of these on stderr.

    A source may be gone, such as a temporary folder, or be a cache that a job uses.

    Args:
        options: options of `buildah run`.
        root: the versioned store folder.

    Returns:
        The options, and the locks of the caches among them.
    """
    words = [option for option in options if option != "--terminal"]
    kept: list[str] = []
    locks: list[Lock] = []
    for option, value in zip(words[::2], words[1::2]):
        source = value.split(":")[0] if option == "--volume" else _source_of(value) if option == "--mount" else ""
        cause = ""
        try:
            if source:
                os.stat(source)
            if instance := caches.instance_of(root, Path(source)):
                locks.append(Lock(instance / "lock"))
                cause = "" if locks[-1].acquire() else "a job uses it"
        except OSError:
            cause = "it no longer exists"
        if cause:
            print(f"gamebear: {source} is not mounted: {cause}", file=sys.stderr)
        else:
            kept += [option, value]
    return kept, locks


def _source_of(mount: str) -> str:
    fields = dict(field.partition("=")[::2] for field in mount.split(","))
    return fields.get("src") or fields.get("source") or "" if fields.get("type", "bind") == "bind" else ""
