"""Run programs of this machine, with their output captured or logged."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..util import processes
from . import streams

SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


def captured(
    command: Sequence[str], env: dict[str, str], input: bytes | None = None, timeout: float | None = None
) -> tuple[int, str, str]:
    """Run a command; return its status, its output and its errors.

    Args:
        command: The command.
        env: Its complete environment.
        input: Its standard input; empty by default.
        timeout: Seconds after which it and its descendants are killed.

    Returns:
        The exit status: negative for a signal, and so after the timeout, 127 if the command cannot be started.
    """
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    try:
        process = subprocess.Popen(command, env=env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        return 127, "", str(error)
    try:
        stdout, stderr = process.communicate(input, timeout)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL, "", f"timeout after {timeout:.0f} seconds"
    finally:
        processes.end(process)
    return process.returncode, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace")


def streamed(
    command: Sequence[str],
    env: dict[str, str],
    *,
    cwd: Path | None = None,
    silence: Callable[[str], float] | None = None,
    kept: int = 1 << 16,
) -> tuple[int, str]:
    """Run a command and log its output as it arrives.

    Args:
        command: The command.
        env: Its complete environment.
        cwd: Its working directory.
        silence: Given the last output, returns the seconds without output after which the command is killed.
        kept: Bytes of output to return at most.

    Returns:
        The exit status (negative for a signal, 127 if the command cannot be started) and the end of the output.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer)
    except OSError as error:
        os.close(reader)
        return 127, str(error)
    finally:
        os.close(writer)
    log = streams.descriptor(1)
    tail = bytearray()
    waited = 0.0
    try:
        while True:
            # The exit of the command counts, not the end of the output: a daemon that it started may keep the pipe
            # open.
            ready, _, _ = select.select([reader], [], [], 0.5)
            if ready:
                data = os.read(reader, 1 << 16)
                if not data:
                    break
                log(data)
                waited = 0.0
                tail += data
                del tail[:-kept]
            elif process.poll() is not None:
                break
            else:
                waited += 0.5
                if silence is not None and waited > silence(tail.decode("utf-8", "replace")):
                    tail += f"\nno output for {waited:.0f} seconds\n".encode()
                    silence = None
                    processes.end(process)
        return process.wait(), tail.decode("utf-8", "replace")
    finally:
        os.close(reader)
        processes.end(process)


def last_lines(text: str, count: int = 4) -> str:
    """Return the last nonempty lines, joined to one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:])


def search_path() -> str:
    """Return the search path for programs: the process's own `PATH`, plus Debian's folders, including root's."""
    folders = [folder for folder in os.environ.get("PATH", "").split(":") if folder]
    return ":".join([*folders, *(folder for folder in SYSTEM_FOLDERS if folder not in folders)])
