"""What a failed job leaves to be looked at where that was asked for: its containers, and the folder that it worked in.

    jobs/<digest>/kept.json   written by the build as it goes: {"attempt": …, "last": NAME, "containers": {NAME:
                              {"image": what it was made from, "command": words of its last command, "options": those of
                              `buildah run` that it had, "status": how it ended, null as long as it runs}}}
    kept/<digest>             there as long as they are; everyone who has a shell in one of them holds it, shared

A job's containers are either to be cleaned up after (`live/<digest>` is there) or kept. Going from the one to the other
takes the job's lock, and its next attempt begins with the first. So nothing else has to know that there are any.
They go with the job's next attempt, with the job when it is pruned, and unasked when there are too many or too old.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..host import streams
from ..host.buildah import Buildah
from ..host.capabilities import environment, namespace
from ..host.probe import facts
from ..store.store import Lock, Store, StoredJob, runner_folder, stamp
from ..util.atomic_files import is_sha256, read_json, sync_folder, write_json
from ..util.errors import RunnerError
from .cleanup import clean_up

if TYPE_CHECKING:
    from ..protocol.pty import Attended

MOST = 3
"""How many failed jobs' containers a store keeps: those of the last ones."""

AGE = 7 * 86400.0
"""Seconds after which they are removed, when the next job begins: counted from the failure, or from the last shell."""

FINISHED = 3
"""How many containers whose with-block is over are still there when a job fails: the last ones."""

KEEP_VARIABLE = "GAMEBEAR_KEEP"
"""Environment variable with the attempt's name where its containers are to be kept if it fails; else empty."""

SHELL = ("/bin/sh", "-c", "if [ -x /bin/bash ]; then exec /bin/bash; fi; exec /bin/sh")
"""What is run in a container where nothing else is asked for."""


class Notes:
    """What a build writes down of its containers.

    Args:
        path: where.
        attempt: which attempt of the job it is.
    """

    def __init__(self, path: Path, attempt: str) -> None:
        self._path = path
        self._written: dict[str, Any] = {"attempt": attempt, "last": "", "containers": {}}

    def made(self, name: str, image: str) -> None:
        """Note a container and what it was made from."""
        self._written["containers"][name] = {"image": image, "command": [], "options": [], "status": None}
        self._last(name)

    def begun(self, name: str, command: Sequence[str], options: Sequence[str]) -> None:
        """Note that a command runs."""
        self._written["containers"][name].update(command=list(command), options=list(options), status=None)
        self._last(name)

    def ended(self, name: str, status: int) -> None:
        """Note how it ended."""
        self._written["containers"][name]["status"] = status
        self._write()

    def removed(self, *names: str) -> None:
        """Note that containers are gone."""
        for name in names:
            self._written["containers"].pop(name, None)
        self._write()

    def _last(self, name: str) -> None:
        self._written["last"] = name
        self._write()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            write_json(self._path, self._written, sync=False)


# With chroot isolation buildah says of a command that has failed that it has, and says it into the container's own
# terminal. So the command ends well there, and how it ended is told by way of a file that both sides see.
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
    """Return the containers that an attempt has noted, by name, in the order in which they were made."""
    found = read_json(stored.folder / "kept.json")
    if not isinstance(found, dict) or found.get("attempt") != attempt or not isinstance(found.get("containers"), dict):
        return {}
    return {name: about for name, about in found["containers"].items() if isinstance(about, dict)}


def keep(stored: StoredJob) -> None:
    """Let a job's containers and its folder be kept from now on; the caller holds its lock. Raises OSError."""
    stored.kept.parent.mkdir(mode=0o700, exist_ok=True)
    stored.kept.touch(mode=0o600)
    os.utime(stored.kept)
    sync_folder(stored.kept.parent)
    stored.mark.unlink()


def trim(store: Store) -> None:
    """Remove what is kept of more than the last few failed jobs, or for too long; not while somebody looks at it."""
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


def listed(stored: StoredJob) -> dict[str, Any]:
    """Return what is kept of a job, as a client is told it: empty where nothing is."""
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


def entered(stored: StoredJob, container: int, words: Sequence[str], terminal: Mapping[str, Any] | None) -> Attended:
    """Return a command that has been started in a kept container.

    Args:
        stored: the job.
        container: its number, from 0.
        words: the command; none for a shell.
        terminal: the client's, as for `Attended`.

    Raises:
        RunnerError: there is no such container.
    """
    from ..protocol.pty import started  # which no build needs

    number = int(container)
    if not 0 <= number < len(listed(stored).get("containers", ())):
        raise RunnerError(
            f"The builder no longer has that container of job {stored.digest[:12]}.",
            "Run its task again with keep_failed=yes.",
        )
    root = stored.store.root
    known = facts(root)
    runner = str(runner_folder())
    command = [*namespace(known), sys.executable, "-I", "-S", runner, "enter", stored.digest, str(number), *words]
    stored.touch()
    stored.scratch.mkdir(mode=0o700, exist_ok=True)
    env = {**environment(root, known), "TMPDIR": str(stored.scratch)}
    return started(command, env, stored.work, terminal, within=True, umask=0o022)  # as a build has it


def main(digest: str, number: str, *command: str) -> int:
    """Run a command in a kept container, where and as what its last one ran; in the namespace of a build.

    Args:
        digest: the job.
        number: the container's, counted from 0.
        command: its words; none for a shell.

    Returns:
        The command's exit status, 125 where it was not begun.
    """
    for signum in (signal.SIGHUP, signal.SIGTERM):  # process 1 of a namespace is ended only by what it handles
        signal.signal(signum, lambda signum, _: os._exit(128 + signum))
    store = Store()
    stored = store.job(digest)
    try:
        with stored.held_kept() as held:
            containers = noted(stored, stored.written_state().get("attempt", ""))
            if not held or int(number) >= len(containers):
                raise RunnerError("The container is no longer there: it was removed at this moment.", "Run doit again.")
            name = list(containers)[int(number)]
            return _run_in(store, name, containers[name], list(command))
    except RunnerError as error:
        print(f"gamebear: {error}", file=sys.stderr)
        return 125


def _run_in(store: Store, name: str, about: dict[str, Any], command: list[str]) -> int:
    known = facts(store.root)
    options = _without_what_is_gone([str(word) for word in about["options"]])
    buildah = Buildah(store.root, known)
    if not os.isatty(0):
        out, err = streams.descriptor(1), streams.descriptor(2)
        return buildah.run_in(name, command or SHELL, *options, stdin=0, out=out, err=err)
    options += ["--terminal", "--env", f"TERM={os.environ.get('TERM', 'dumb')}"]
    if not command and about["command"]:
        # Bash runs it before its first prompt: so the command that failed is one arrow key away.
        line = shlex.quote(shlex.join(about["command"]))
        options += ["--env", f"PROMPT_COMMAND=unset PROMPT_COMMAND; history -s -- {line}"]
    words = command or SHELL
    with contextlib.ExitStack() as stack:
        told = None
        if known.isolation == "chroot" and os.access(streams.SHARED, os.W_OK):
            told = stack.enter_context(streams.file_for_all(name))
            words = ("/bin/sh", "-c", _TELLING, "sh", str(told), *words)
        # The container's program has a terminal of its own; what comes here is buildah's.
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


def _without_what_is_gone(options: list[str]) -> list[str]:
    """Return options without mounts of what was there for the command only, as a temporary folder is; say so."""
    words = [option for option in options if option != "--terminal"]
    kept: list[str] = []
    for option, value in zip(words[::2], words[1::2]):
        source = value.split(":")[0] if option == "--volume" else _source_of(value) if option == "--mount" else ""
        if source and not os.path.exists(source):
            print(f"gamebear: {source} is gone, so it is not mounted here", file=sys.stderr)
        else:
            kept += [option, value]
    return kept


def _source_of(mount: str) -> str:
    fields = dict(field.partition("=")[::2] for field in mount.split(","))
    return fields.get("src") or fields.get("source") or "" if fields.get("type", "bind") == "bind" else ""
