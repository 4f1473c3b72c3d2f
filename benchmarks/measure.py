"""Measurements: rows that compare our side, the other side and a goal; how to measure and evaluate them."""

from __future__ import annotations

import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["ratio", "more", "most"]


@dataclass(frozen=True)
class Goal:
    """Goal of a row.

    Attributes:
        kind: Compared quantity: `ratio`, ours divided by theirs; `more`, ours minus theirs; `most`, ours alone.
        value: Maximum for the median over all pairs.
    """

    kind: Kind
    value: float


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: Subject of the measurement.
        against: Baseline; empty for none.
        ours: Our values, one per repetition.
        theirs: Values of the baseline. The n-th one was measured directly before or after our n-th value.
        goal: None if the row is informative only.
        unit: Unit of the values: seconds, MiB, or a count.
        note: Remark for the reader.
    """

    what: str
    against: str
    ours: Sequence[float]
    theirs: Sequence[float] = ()
    goal: Goal | None = None
    unit: Literal["s", "MiB", ""] = "s"
    note: str = ""

    @property
    def pairs(self) -> list[float]:
        """Values that the goal limits, one per repetition, sorted. Ratios if there is a baseline but no goal."""
        kind = self.goal.kind if self.goal else "ratio" if self.theirs else "most"
        if kind == "most":
            return sorted(self.ours)
        pairs = list(zip(self.ours, self.theirs, strict=True))
        if kind == "more":
            return sorted(ours - theirs for ours, theirs in pairs)
        return sorted(ours / theirs for ours, theirs in pairs)

    @property
    def median(self) -> float:
        """Median of the pairs."""
        return statistics.median(self.pairs)

    @property
    def is_met(self) -> bool | None:
        """Whether the median meets the goal; None without a goal."""
        return None if self.goal is None else self.median <= self.goal.value


@dataclass(frozen=True)
class Phases:
    """Time of one of our runs by phase.

    Attributes:
        what: Description of the run.
        wall: Wall-clock seconds.
        seconds: Seconds by phase, in order.
    """

    what: str
    wall: float
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """Result of one benchmark."""

    rows: Sequence[Row]
    phases: Sequence[Phases] = field(default=())


class ProgramError(Exception):
    """A program that is measured, or that prepares a measurement, failed."""


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock seconds of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def processor_seconds(work: Callable[[], object]) -> float:
    """Return the processor seconds of the programs that a call runs, which hardly depend on the machine's load."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def alternate(count: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Measure several sides alternately, A B B A …, so that temporary load affects all of them.

    Args:
        count: Repetitions of each side.
        sides: Each prepares its measurement, and returns the measured value.

    Returns:
        The values of each side.
    """
    values: list[list[float]] = [[] for _ in sides]
    for number in range(count):
        order = list(range(len(sides)))
        for index in order if number % 2 == 0 else reversed(order):
            values[index].append(sides[index]())
    return values


def checked(command: list[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command and return its output.

    Raises:
        ProgramError: The command failed.
    """
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ProgramError(
            f"{' '.join(command)}\nended with status {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )
    return done.stdout
