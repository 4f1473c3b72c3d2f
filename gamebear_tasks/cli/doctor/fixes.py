"""Mending a builder: what is done there, by whom, and what came of it. Nothing is done that was not asked for."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...builders.base import Examined, Terminal
from ...errors import BuilderError
from ...util.text import printable
from .builder_checks import Finding

FIRST = 100
"""The exit status of a script whose first step failed; of the next ones, one more each."""

ROOT = """\
echo "uid $(id -u)"
command -v sudo > /dev/null && { sudo -n true 2> /dev/null && echo free || echo asks; }
"""
"""Says who we are there and what sudo lets us do."""

PROMPT = "[sudo] password for %p on %H: "
"""In the form of sudo(8)."""


@dataclass(frozen=True)
class Step:
    """One thing to do as root.

    Attributes:
        command: a line for the shell.
        why: what it is for.
        may_fail: whether the rest goes on without it.
    """

    command: str
    why: str
    may_fail: bool = False


@dataclass(frozen=True)
class Done:
    """What came of a step; `done` is None where it was not begun."""

    step: Step
    done: bool | None


def steps_for(findings: Iterable[Finding]) -> list[Step]:
    """Return what mends all that can be mended by commands: packages first, in one go."""
    packages: dict[str, list[str]] = {}
    commands: dict[str, str] = {}
    for finding in findings:
        for package in finding.packages:
            packages.setdefault(package, []).append(finding.name)
        for command in finding.commands:
            commands.setdefault(command, finding.name)
    steps = []
    if packages:
        names = dict.fromkeys(name for names in packages.values() for name in names)
        install = "DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-remove --option DPkg::Lock::Timeout=300"
        steps.append(Step("apt-get update --option Acquire::Retries=3", "which packages there are", may_fail=True))
        steps.append(Step(f"{install} {' '.join(map(shlex.quote, packages))}", ", ".join(names)))
    return steps + [Step(command, why) for command, why in commands.items()]


def script(steps: Iterable[Step]) -> str:
    """Return the shell's script that does the steps, says each before it is done, and ends with the one that fails."""
    lines = ["PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin", "export PATH"]
    for number, step in enumerate(steps):
        lines.append(f"printf '%s\\n' {shlex.quote(f'$ {step.command}    # {step.why}')}")
        lines.append(f"({step.command}) || {'true' if step.may_fail else f'exit {FIRST + number}'}")
    return "\n".join(lines) + "\n"


def mend(builder: Examined, steps: list[Step], out: Callable[[str], object]) -> list[Done]:
    """Do the steps on a builder as root: as we are, by sudo, or by sudo that asks for a password at our terminal.

    Args:
        builder: which.
        steps: what to do.
        out: is given what is printed there, line by line.

    Raises:
        BuilderError: we may not; the hint has the lines for whoever may. Or the connection broke.
    """
    said: list[str] = []
    _executed(builder, ROOT, lambda line: said.append(line[:100]) if len(said) < 100 else None)
    words = [line.strip() for line in said]  # a login shell may have its own to say before
    doing = script(steps)
    if "uid 0" in words:
        status = _executed(builder, doing, out)
    elif "free" in words:
        status = _executed(builder, f"exec sudo -n sh -c {shlex.quote(doing)}", out)
    elif "asks" in words and isinstance(builder, Terminal) and sys.stdin.isatty() and sys.stdout.isatty():
        status = builder.run_program(["sudo", "-p", PROMPT, "sh", "-c", doing])
    else:
        why = "sudo asks for a password there, and there is no terminal here to type it" if "asks" in words else ""
        raise BuilderError(
            f"It cannot be mended from here: {why or 'the account is not root, and has no sudo'}.",
            "Run there as root: " + " && ".join(step.command for step in steps),
        )
    if status == 0:
        return [Done(step, True) for step in steps]
    failed = status - FIRST
    if not 0 <= failed < len(steps):
        raise BuilderError(
            f"What was to mend it has ended with status {status}.",
            "See what it says above. By hand, there, as root: " + " && ".join(step.command for step in steps),
        )
    return [
        Done(step, True if number < failed else False if number == failed else None)
        for number, step in enumerate(steps)
    ]


def _executed(builder: Examined, text: str, out: Callable[[str], object]) -> int:
    """Run a script there, and pass on what it says by lines."""
    left = bytearray()

    def take(data: bytes) -> None:
        left.extend(data)
        *lines, rest = bytes(left).split(b"\n")
        left[:] = rest[-4096:]
        for line in lines:
            shown = line.rstrip(b"\r").rpartition(b"\r")[2]  # as on a terminal, of what counts up in its place the end
            out(printable(shown.decode("utf-8", "replace")))

    status = builder.execute(text, take)
    if left:
        out(printable(left.decode("utf-8", "replace")))
    return status
