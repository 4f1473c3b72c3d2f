"""Running the programs of this machine: quietly, or with what they print going to the log."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import streams

SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


def captured(
    command: Sequence[str], env: dict[str, str], input: bytes | None = None, timeout: float | None = None
) -> tuple[int, str, str]:
    """Run a command; return its status, its output and its errors."""
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    try:
        done = subprocess.run(command, env=env, check=False, capture_output=True, timeout=timeout, **given)
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {timeout:.0f} seconds"
    except OSError as error:
        return 127, "", str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def streamed(
    command: Sequence[str],
    env: dict[str, str],
    *,
    cwd: Path | None = None,
    silence: Callable[[str], float] | None = None,
    kept: int = 1 << 16,
) -> tuple[int, str]:
    """Run a command with its output going to the log as it comes.

    Args:
        command: what to run.
        env: its whole environment.
        cwd: where it runs.
        silence: given what was said last, how many seconds it may say nothing before it is killed.
        kept: how many of the last bytes to return.

    Returns:
        Its exit status (negative for a signal) and the end of what it said.
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
            # A daemon that a command left behind may keep the pipe open: the command's own end counts.
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
                    tail += f"\nnothing was heard for {waited:.0f} seconds\n".encode()
                    silence = None
                    process.kill()
        return process.wait(), tail.decode("utf-8", "replace")
    finally:
        os.close(reader)
        if process.poll() is None:
            process.kill()
            process.wait()


def last_lines(text: str, count: int = 4) -> str:
    """Return the last few lines that say something, as one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:])


def search_path() -> str:
    """Return where programs are looked for: our own `PATH`, and where Debian has those of root."""
    folders = [folder for folder in os.environ.get("PATH", "").split(":") if folder]
    return ":".join([*folders, *(folder for folder in SYSTEM_FOLDERS if folder not in folders)])
