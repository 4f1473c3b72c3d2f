"""What a command in a container prints, brought out whole and in order.

With chroot isolation buildah copies a command's output itself, and ends as soon as the command has, whether or not
it has copied the last of it (seen with 1.28: one command in a hundred on a busy machine loses its last lines). There
the command gets a FIFO of ours instead, in /dev/shm, which that isolation shares with its containers.
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

Sink = Callable[[bytes], object]
"""What is given the output, piece by piece, as it comes."""

SHARED = Path("/dev/shm")
"""The folder that is the same one inside and outside of a container with chroot isolation."""

# Either `begun` is written to and the command runs, or it has not run at all. A user who is not root says so, and the
# FIFOs are given to them; nobody else on the builder can write to them.
# Who runs it as root by number has no other groups: `$2` says whether that has to be so anyway.
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

# What buildah says of a command that failed, and the script is told anyway.
_NOISE = re.compile(rb"(?m)^(?:subprocess exited with status \d+|Error: exit status \d+|exit status \d+)\n?")


def without_noise(said: bytes) -> bytes:
    """Return what buildah says without what it says of the command's status, which is told anyway."""
    return _NOISE.sub(b"", said.replace(b"\r\n", b"\n"))


def without_panic(said: bytes, status: int) -> tuple[bytes, int]:
    """Return what buildah says and its status as if it had not panicked while it cleaned up after a command.

    That of Debian 12 (1.28) does where another run in the same container has ended before: two shells in one.
    """
    before, panic, where = said.partition(b"panic: runtime error: ")
    if not panic or b"buildah.(*Builder).Run.func" not in where:
        return said, status
    told = re.findall(rb"(?m)^subprocess exited with status (\d+)", before)
    return before, int(told[-1]) if told else 0


_NOTHING = ("/bin/sh", "-c", ":")

_PIECE = 1 << 16

_F_GETPIPE_SZ = 1032  # which Python's fcntl has only from 3.10 on

_works: dict[tuple[str, ...], bool] = {}
"""Whether commands can be given FIFOs, by the command line that runs them."""

Command = Callable[[Sequence[str]], list[str]]
"""Gives the command line that runs some words in a container."""


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
        command: gives the `buildah run`.
        numbered: gives one for root by number, if it is root who runs it: buildah starts itself three times (1.28) to
            look up by root's name what almost always comes to the same; it is tried where that can be seen.
        words: the command.
        environment: buildah's.
        prefix: what the names of what it needs begin with, see `remove_leftovers`.
        is_shared: whether the container sees this machine's /dev/shm.
        stdin: what it reads.
        out: gets what it prints.
        err: gets what it prints as errors; None: in order with the rest.
    """
    if is_shared and os.access(SHARED, os.W_OK):
        if stdin != subprocess.DEVNULL:  # what is read in vain could not be read again
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
    """Run a command with FIFOs for its output; None where it cannot be, and has not been run at all.

    With `by="number"`, it is run only where root of the container is in no group but its own.
    """
    begun = False
    said = bytearray()

    def begin(_: bytes) -> None:
        nonlocal begun
        begun = True

    def listen(data: bytes) -> None:
        said.extend(data[: _PIECE - len(said)])
        asked = re.search(rb"(?m)^" + re.escape(os.fsencode(folder)) + rb" (\d{1,10})\n", said)
        if asked and not begun:
            user = int(asked[1])
            del said[asked.start() : asked.end()]
            for name in ("begun", "err", "out"):  # in this order: `out` is what it waits for
                with contextlib.suppress(OSError):
                    os.chown(folder / name, user, -1, follow_symlinks=False)

    with _fifos(prefix, merged=err is None) as folder, contextlib.ExitStack() as stack:
        sinks: dict[int, Sink] = {}
        for name, sink in (("begun", begin), ("out", out), ("err", err)):
            if sink is not None:
                # Opened for both, so that it does not end before the command opens it, and not after each writer.
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
        return None  # no shell there, or a /dev/shm of its own
    rest, status = without_panic(bytes(said), status)
    if rest := without_noise(rest):
        (err or out)(rest)
    return status


@contextlib.contextmanager
def _passable_folder(prefix: str) -> Iterator[Path]:
    """Give a folder in `SHARED` through which every user can pass who is told a name in it, and remove it."""
    top = SHARED / f"{prefix}{os.urandom(8).hex()}"
    top.mkdir(0o700)
    try:
        top.chmod(0o711)
        yield top
    finally:
        shutil.rmtree(top, ignore_errors=True)


@contextlib.contextmanager
def _fifos(prefix: str, merged: bool) -> Iterator[Path]:
    """Give a folder with the FIFOs `out`, `err` and `begun`, which only root of the container can open."""
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
    """Give an empty file in `SHARED` that every user of a container can write to who is told its name."""
    with _passable_folder(prefix) as top:
        path = top / os.urandom(16).hex()
        path.touch()
        path.chmod(0o666)
        yield path


def _pumped(process: subprocess.Popen[bytes], sinks: dict[int, Sink]) -> int:
    """Give what comes to its sinks until a process has ended and nothing of it is left; return its exit status.

    Its own end counts, not that of the output: it may have left a daemon behind that keeps it open.
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
            left = fcntl.fcntl(fd, _F_GETPIPE_SZ)  # what is more was written since, by what the command left behind
            while left > 0 and (data := _read(fd)):
                left -= len(data)
                sink(data)
        return process.wait()
    finally:
        os.close(ended)
        if process.poll() is None:
            process.kill()
            process.wait()


def _read(fd: int) -> bytes | None:
    """Return a piece of what there is, None for nothing yet, no bytes for the end."""
    try:
        return os.read(fd, _PIECE)
    except BlockingIOError:
        return None


def remove_leftovers(prefix: str) -> None:
    """Remove what commands leave whose build was killed; `prefix` is theirs."""
    for left in SHARED.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
