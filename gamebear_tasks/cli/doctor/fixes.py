"""Apply the fixes of findings on a builder, as root."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...builders.base import Examined, Terminal
from ...errors import BuilderError
from ...util.text import printable
from .builder_checks import Finding

FIRST_STATUS = 100
"""Exit status of a script whose first step failed; the status increases by one per step."""

PRIVILEGES = """\
echo "uid $(id -u)"
command -v sudo > /dev/null && { sudo -n true 2> /dev/null && echo free || echo asks; }
"""
"""Script that prints the user's id, and whether sudo works without a password (`free`) or with one (`asks`)."""

PROMPT = "[sudo] password for %p on %H: "
"""Prompt, in the format of sudo(8)."""


@dataclass(frozen=True)
class Step:
    """A command to run as root.

    Attributes:
        command: Shell command.
        purpose: Names of the findings that it fixes, or another reason.
        may_fail: Whether the script continues if it fails.
    """

    command: str
    purpose: str
    may_fail: bool = False


@dataclass(frozen=True)
class StepResult:
    """Result of a step; `succeeded` is None if it was not started."""

    step: Step
    succeeded: bool | None


def steps_for(findings: Iterable[Finding]) -> list[Step]:
    """Return the steps that fix findings: first one installation of all packages, then commands."""
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
        steps.append(Step("apt-get update --option Acquire::Retries=3", "package lists", may_fail=True))
        steps.append(Step(f"{install} {' '.join(map(shlex.quote, packages))}", ", ".join(names)))
    return steps + [Step(command, purpose) for command, purpose in commands.items()]


def script(steps: Iterable[Step]) -> str:
    """Return a shell script that prints and runs each step, and stops at the first that fails."""
    lines = ["PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin", "export PATH"]
    for number, step in enumerate(steps):
        lines.append(f"printf '%s\\n' {shlex.quote(f'$ {step.command}    # {step.purpose}')}")
        lines.append(f"({step.command}) || {'true' if step.may_fail else f'exit {FIRST_STATUS + number}'}")
    return "\n".join(lines) + "\n"


def apply_fixes(builder: Examined, steps: list[Step], out: Callable[[str], object]) -> list[StepResult]:
    """Run the steps on a builder as root: directly, with sudo, or with sudo that asks for a password.

    Args:
        builder: The builder.
        steps: Steps to run.
        out: Function that receives the output by lines.

    Raises:
        BuilderError: Root access is not available, and the hint has the commands; or the connection was lost.
    """
    lines: list[str] = []
    _execute(builder, PRIVILEGES, lambda line: lines.append(line[:100]) if len(lines) < 100 else None)
    words = [line.strip() for line in lines]  # a login shell may print other lines first
    text = script(steps)
    by_hand = "Run on it as root: " + " && ".join(step.command for step in steps)
    if "uid 0" in words:
        status = _execute(builder, text, out)
    elif "free" in words:
        status = _execute(builder, f"exec sudo -n sh -c {shlex.quote(text)}", out)
    elif "asks" in words and isinstance(builder, Terminal) and sys.stdin.isatty() and sys.stdout.isatty():
        status = builder.run_program(["sudo", "-p", PROMPT, "sh", "-c", text])
    else:
        no_terminal = "sudo asks for a password, and this command has no terminal"
        cause = no_terminal if "asks" in words else "its user is not root and has no sudo"
        raise BuilderError(f"Fixes cannot be applied: {cause}.", by_hand)
    if status == 0:
        return [StepResult(step, True) for step in steps]
    failed = status - FIRST_STATUS
    if not 0 <= failed < len(steps):
        raise BuilderError(f"Fixes cannot be applied: the script exited with status {status}.", by_hand)
    return [
        StepResult(step, True if number < failed else False if number == failed else None)
        for number, step in enumerate(steps)
    ]


def _execute(builder: Examined, text: str, out: Callable[[str], object]) -> int:
    """Run a script on a builder, pass its output on by lines, and return its exit status."""
    left = bytearray()

    def take(data: bytes) -> None:
        left.extend(data)
        *lines, rest = bytes(left).split(b"\n")
        left[:] = rest[-4096:]
        for line in lines:
            shown = line.rstrip(b"\r").rpartition(b"\r")[2]  # progress bars: only their last state
            out(printable(shown.decode("utf-8", "replace")))

    status = builder.execute(text, take)
    if left:
        out(printable(left.decode("utf-8", "replace")))
    return status
