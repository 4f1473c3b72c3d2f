"""What a measurement is: a row with ours, theirs and a goal; how it is taken and what follows from it."""

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
    """What a row is to reach.

    Attributes:
        kind: what is compared: `ratio`, ours by theirs; `more`, ours less theirs; `most`, ours alone.
        value: the most that the median over all pairs may be.
    """

    kind: Kind
    value: float


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: the subject.
        against: what it is compared with; empty for nothing.
        ours: what was measured, one value for each repetition.
        theirs: the same of the other side; the n-th value was taken right beside the n-th of ours.
        goal: None where the row is there for comparison only.
        unit: of the values: seconds, MiB, or a plain count.
        note: what a reader has to know.
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
        """What the goal is about, for each repetition, in order of size; the ratio where there is no goal."""
        kind = self.goal.kind if self.goal else "ratio" if self.theirs else "most"
        if kind == "most":
            return sorted(self.ours)
        pairs = list(zip(self.ours, self.theirs, strict=True))
        if kind == "more":
            return sorted(ours - theirs for ours, theirs in pairs)
        return sorted(ours / theirs for ours, theirs in pairs)

    @property
    def median(self) -> float:
        """The median of the pairs."""
        return statistics.median(self.pairs)

    @property
    def is_met(self) -> bool | None:
        """Whether the median keeps to the goal; None without one."""
        return None if self.goal is None else self.median <= self.goal.value


@dataclass(frozen=True)
class Phases:
    """Where the time of one of our runs went.

    Attributes:
        what: the run.
        wall: its seconds on the clock.
        seconds: by phase, in order.
    """

    what: str
    wall: float
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """What one benchmark found."""

    rows: Sequence[Row]
    phases: Sequence[Phases] = field(default=())


class ProgramError(Exception):
    """A program that is measured, or prepares it, has failed."""


def seconds(work: Callable[[], object]) -> float:
    """Return how long some work takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def processor_seconds(work: Callable[[], object]) -> float:
    """Return the processor time of the programs that some work runs: the same on a busy machine, more or less."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def alternate(count: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Measure several sides in turn, A B A B …, so that a machine's bad moments fall on all of them.

    Args:
        count: how often each.
        sides: each prepares what it needs, and returns what it measured.

    Returns:
        For each side its values.
    """
    values: list[list[float]] = [[] for _ in sides]
    for number in range(count):
        order = list(range(len(sides)))
        for index in order if number % 2 == 0 else reversed(order):
            values[index].append(sides[index]())
    return values


def checked(command: list[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command, which must end well, and return what it prints."""
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ProgramError(
            f"{' '.join(command)}\nended with status {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )
    return done.stdout
