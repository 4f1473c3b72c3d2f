"""Output of commands in containers, delivered completely and in order.

With chroot isolation buildah copies a command's output itself. It exits when the command has exited, even if output is
left to copy (observed with 1.28: on a busy machine, one command in a hundred loses its last lines). As a workaround the
command writes to a FIFO of the runner, in /dev/shm, which chroot isolation shares with its containers.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..util import processes

Sink = Callable[[bytes], object]
"""Callable that receives the output, piece by piece, as it arrives."""

SHARED = Path("/dev/shm")
"""Folder that is the same inside and outside of a container with chroot isolation."""

# Either this script writes to `begun` and the command runs, or the command does not run at all. If its user is not
# root, it prints the user's number, and the FIFOs are chowned to that user. No other user of the builder can write to
# them. A process that runs as root by number has no supplementary groups. With `$2` = number, the script exits if root
# would have others.
_SHELL = """\
f=$1
by=$2
shift 2
[ -p "$f/out" ] || exit 97
if [ "$by" = number ] && [ -r /etc/passwd ] && [ -r /etc/group ]
then
    root=
    while IFS=: read -r name _ user group _ || [ -n "$name" ]
    do
        [ "$user" != 0 ] || { root=$name; break; }
    done </etc/passwd
    [ -z "$root" ] || [ "$group" = 0 ] || exit 97
    while IFS=: read -r name _ group users || [ -n "$name" ]
    do
        case $root:$group:,$users, in
            :*|*:0:*) ;;
            *",$root,"*) exit 97;;
        esac
    done </etc/group
fi
if ! [ -w "$f/out" ]
then
    echo "$f $(id -u)"
    n=0
    until [ -w "$f/out" ]
    do
        [ $n -lt 500 ] || exit 97
        n=$((n + 1))
        sleep 0.01
    done
fi
echo >"$f/begun"
exec "$@" >"$f/out" 2>"$f/err"
"""

# Redundant messages: the script gets the exit status of a failed command anyway.
_NOISE = re.compile(rb"(?m)^(?:subprocess exited with status \d+|Error: exit status \d+|exit status \d+)\n?")


def without_noise(output: bytes) -> bytes:
    """Return buildah's error output without its lines on the command's exit status, which is reported anyway."""
    return _NOISE.sub(b"", output.replace(b"\r\n", b"\n"))


def without_panic(output: bytes, status: int) -> tuple[bytes, int]:
    """Return buildah's error output and status, corrected if buildah panicked during the cleanup after a command.

    Debian 12's release (1.28) panics if another run in the same container ended earlier: two concurrent shells, for
    example. The command's exit status is then only in the text before the panic.
    """
    before, panic, where = output.partition(b"panic: runtime error: ")
    if not panic or b"buildah.(*Builder).Run.func" not in where:
        return output, status
    statuses = re.findall(rb"(?m)^subprocess exited with status (\d+)", before)
    return before, int(statuses[-1]) if statuses else 0


_NOTHING = ("/bin/sh", "-c", ":")

_PIECE = 1 << 16

_F_GETPIPE_SZ = 1032  # in Python's fcntl since 3.10 only

_works: dict[tuple[str, ...], bool] = {}
"""Whether FIFOs can be passed to commands, by the command line that runs them."""

Command = Callable[[Sequence[str]], list[str]]
"""Callable that returns the command line that runs some words in a container."""


def descriptor(fd: int) -> Sink:
    """Return a sink that writes to a file descriptor."""

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    return write


def run(
    command: Command,
    numbered: Command | None,
    words: Sequence[str],
    environment: dict[str, str],
    *,
    prefix: str,
    is_shared: bool,
    stdin: int | IO[Any] = subprocess.DEVNULL,
    out: Sink,
    err: Sink | None = None,
) -> int:
    """Run a command in a container and return its exit status, negative for a signal to buildah.

    Args:
        command: Returns the `buildah run` command line.
        numbered: Returns one that runs the command as root by number, if root runs it. To look up root by name, buildah
            starts itself three times (1.28), and the result is almost always the same. It is used if the container's
            files show that it is the same.
        words: The command.
        environment: Environment of buildah.
        prefix: Prefix of the names of temporary files, see `remove_leftovers`.
        is_shared: Whether the container shares this machine's /dev/shm.
        stdin: Standard input of the command.
        out: Sink for the output.
        err: Sink for the error output; None: it goes to `out`, in order with the rest.
    """
    if is_shared and os.access(SHARED, os.W_OK):
        if stdin != subprocess.DEVNULL:  # input that a failed attempt has read is lost
            numbered = None
            if (way := tuple(command(()))) not in _works:
                _works[way] = _through_fifos(command, _NOTHING, environment, prefix, subprocess.DEVNULL, len, None) == 0
        for by, each in (("number", numbered), ("name", command)):
            if each is not None and _works.get(way := tuple(each(())), True):
                status = _through_fifos(each, words, environment, prefix, stdin, out, err, by)
                _works[way] = status is not None
                if status is not None:
                    return status
    return _through_buildah(command(words), environment, stdin, out, err)


def _through_buildah(
    command: list[str], environment: dict[str, str], stdin: int | IO[Any], out: Sink, err: Sink | None
) -> int:
    with contextlib.ExitStack() as stack:
        sinks: dict[int, Sink] = {}
        ends = []
        for sink in (out,) if err is None else (out, err):
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            stack.callback(os.close, writer)
            os.set_blocking(reader, False)
            sinks[reader] = sink
            ends.append(writer)
        process = subprocess.Popen(command, env=environment, stdin=stdin, stdout=ends[0], stderr=ends[-1])
        return _pumped(process, sinks)


def _through_fifos(
    command: Command,
    words: Sequence[str],
    environment: dict[str, str],
    prefix: str,
    stdin: int | IO[Any],
    out: Sink,
    err: Sink | None,
    by: str = "name",
) -> int | None:
    """Run a command with FIFOs for its output; return None if that is impossible, in which case it has not run at all.

    With `by="number"`, the command runs only if the container's root is in no group but its own.
    """
    begun = False
    output = bytearray()

    def begin(_: bytes) -> None:
        nonlocal begun
        begun = True

    def listen(data: bytes) -> None:
        output.extend(data[: _PIECE - len(output)])
        request = re.search(rb"(?m)^" + re.escape(os.fsencode(folder)) + rb" (\d{1,10})\n", output)
        if request and not begun:
            user = int(request[1])
            del output[request.start() : request.end()]
            for name in ("begun", "err", "out"):  # in this order: the script waits for `out`
                with contextlib.suppress(OSError):
                    os.chown(folder / name, user, -1, follow_symlinks=False)

    with _fifos(prefix, merged=err is None) as folder, contextlib.ExitStack() as stack:
        sinks: dict[int, Sink] = {}
        for name, sink in (("begun", begin), ("out", out), ("err", err)):
            if sink is not None:
                # Opened for reading and writing: otherwise it would be at end-of-file before the first writer and after
                # each one.
                fd = os.open(folder / name, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                sinks[fd] = sink
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        os.set_blocking(reader, False)
        sinks[reader] = listen
        try:
            process = subprocess.Popen(
                command(["/bin/sh", "-c", _SHELL, "sh", str(folder), by, *words]),
                env=environment,
                stdin=stdin,
                stdout=writer,
                stderr=writer,
            )
        finally:
            os.close(writer)
        status = _pumped(process, sinks)
    if not begun and status:
        return None  # the container has no shell, or a separate /dev/shm
    rest, status = without_panic(bytes(output), status)
    if rest := without_noise(rest):
        (err or out)(rest)
    return status


@contextlib.contextmanager
def _passable_folder(prefix: str) -> Iterator[Path]:
    """Yield a folder in `SHARED` that is removed afterwards. Users can traverse it but not list it.

    Only a user that knows the random name of an entry can access it.
    """
    top = SHARED / f"{prefix}{os.urandom(8).hex()}"
    top.mkdir(0o700)
    try:
        top.chmod(0o711)
        yield top
    finally:
        shutil.rmtree(top, ignore_errors=True)


@contextlib.contextmanager
def _fifos(prefix: str, merged: bool) -> Iterator[Path]:
    """Yield a folder with the FIFOs `out`, `err` and `begun`, which only root of the container can open."""
    with _passable_folder(prefix) as top:
        folder = top / os.urandom(8).hex()
        folder.mkdir()
        folder.chmod(0o711)
        os.mkfifo(folder / "begun", 0o600)
        os.mkfifo(folder / "out", 0o600)
        if merged:
            os.link(folder / "out", folder / "err")
        else:
            os.mkfifo(folder / "err", 0o600)
        yield folder


@contextlib.contextmanager
def file_for_all(prefix: str) -> Iterator[Path]:
    """Yield an empty file in `SHARED` that every user of a container can write to who knows its random name."""
    with _passable_folder(prefix) as top:
        path = top / os.urandom(16).hex()
        path.touch()
        path.chmod(0o666)
        yield path


def _pumped(process: subprocess.Popen[bytes], sinks: dict[int, Sink]) -> int:
    """Pass output to its sinks until a process has exited and its output is drained; return its exit status.

    The exit of the process counts, not the end of its output: a daemon that it started may keep the output open.
    """
    ended, end = os.pipe()

    def wait() -> None:
        process.wait()
        os.close(end)

    threading.Thread(target=wait, daemon=True).start()
    poll = select.poll()
    for fd in (ended, *sinks):
        poll.register(fd, select.POLLIN)
    try:
        running = True
        while running:
            for fd, _ in poll.poll():
                if fd == ended:
                    running = False
                elif data := _read(fd):
                    sinks[fd](data)
                elif data is not None:
                    poll.unregister(fd)
        for fd, sink in sinks.items():
            left = fcntl.fcntl(fd, _F_GETPIPE_SZ)  # more than this was written by a daemon since the exit
            while left > 0 and (data := _read(fd)):
                left -= len(data)
                sink(data)
        return process.wait()
    finally:
        os.close(ended)
        processes.end(process)


def _read(fd: int) -> bytes | None:
    """Return a piece of the available data, None if there is none yet, or empty bytes at the end."""
    try:
        return os.read(fd, _PIECE)
    except BlockingIOError:
        return None


def remove_leftovers(prefix: str) -> None:
    """Remove the temporary files of commands whose build was killed, by the prefix of their names."""
    for left in SHARED.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
