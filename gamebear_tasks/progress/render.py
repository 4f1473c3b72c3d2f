"""Rendering of tasks for a terminal: a line for each running and each finished task, and a status line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from rich.cells import cell_len
from rich.text import Text

from ..util.text import clock, duration, in_line, line_of, printable, size
from .model import Board, Outcome, Running

BAR = 16
"""Columns of a progress bar."""

ROOMY = 90
"""Minimum columns of a terminal for showing a progress bar and the builder."""

NARROW = 50
"""Columns of a terminal below which a task's line has only its name and time, and its activity if that fits."""

NAMES = 24
"""Maximum columns for task names, unless the terminal is wide."""


@dataclass(frozen=True)
class Signs:
    """Symbols for a terminal: UTF-8 by default, or `ASCII`."""

    spinner: str = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
    waits: str = "◦"
    well: str = "✓"
    same: str = "↓"
    failed: str = "✗"
    up: str = "↑"
    down: str = "↓"
    bar: str = "━"
    rest: str = "─"
    left: str = "│"
    more: str = "…"
    between: str = " · "


ASCII = Signs("-\\|/", "o", "+", "=", "x", "up", "down", "#", ".", "|", "...", ", ")


def width_of_names(names: Sequence[str], columns: int) -> int:
    """Return the columns to use for task names.

    Args:
        names: the task names.
        columns: columns of the terminal.
    """
    longest = max(map(cell_len, names), default=0)
    return min(longest, max(NAMES, columns // 4), max(6, columns // 3))


def running_lines(
    tasks: Sequence[Running], now: float, columns: int, names: int, frame: int, signs: Signs
) -> list[Text]:
    """Render running tasks, a line each, none wider than `columns`.

    Args:
        tasks: the running tasks.
        now: current time, by the monotonic clock.
        columns: columns of the terminal.
        names: columns of the names.
        frame: frame number of the spinner.
        signs: symbols of the terminal.
    """
    before = max((len(_before(task)) for task in tasks), default=0)
    return [_running_line(task, now, columns, names, before, frame, signs) for task in tasks]


def _before(task: Running) -> str:
    """Return the duration of a task's last build, as text; empty if unknown."""
    return f" of ~{clock(task.expected)}" if task.expected else ""


def _running_line(task: Running, now: float, columns: int, names: int, before: int, frame: int, signs: Signs) -> Text:
    waits = not task.phase and task.there == "queue"
    line = Text(no_wrap=True)
    line.append(signs.waits if waits else signs.spinner[frame % len(signs.spinner)], "dim" if waits else "cyan")
    line.append(" ")
    elapsed = now - task.begun
    spent = clock(elapsed)
    if columns < NARROW:
        room = columns - 2 - 1 - len(spent)
        line.append_text(_fitted(task.name, min(room, max(names, room - 12)), "bold", signs))
        rest = room - cell_len(line.plain) + 2
        line.append(f" {task.doing}"[:rest].ljust(rest) if rest > 5 else " " * rest, "blue")
        line.append(f" {spent}")
        return _cut(line, columns, signs)
    line.append_text(_fitted(task.name, names, "bold", signs))
    line.append(f"  {task.doing:<10}", "dim" if waits else "blue")
    line.append(f" {spent:>7}")
    late = bool(task.expected) and elapsed > 1.2 * (task.expected or 0) + 5
    line.append(f"{_before(task):<{before}}", "yellow" if late else "dim")
    line.append("  ")
    if waits and task.ahead is not None:
        line.append(f"{task.ahead} ahead" if task.ahead else "next", "dim")
    elif task.transfers and (task.moved > 64 << 10 or task.goal > 1 << 20):
        _append_transfer(line, task, now, columns, signs)
    else:
        line.append(task.line, "dim")
    return _cut(line, columns, signs)


def _append_transfer(line: Text, task: Running, now: float, columns: int, signs: Signs) -> None:
    moved = min(task.moved, task.goal) if task.goal else task.moved
    if task.goal and columns >= ROOMY:
        full = BAR * moved // task.goal
        line.append(signs.bar * full, "cyan")
        line.append(signs.rest * (BAR - full), "dim")
        line.append(" ")
    line.append(size(moved))
    if task.goal:
        line.append(f" of {size(task.goal)}")
    rate = task.rate(now)
    if rate > 1 << 10:
        line.append(f"  {size(round(rate))}/s", "cyan")
        if task.goal and (left := (task.goal - moved) / rate) > 2:
            line.append(f"  ~{clock(left)} left", "dim")


def outcome_line(outcome: Outcome, columns: int, names: int, signs: Signs) -> Text:
    """Render a finished task."""
    failed = outcome.how in ("failed", "not run")
    fetched = outcome.how == "fetched"
    line = Text(no_wrap=True)
    line.append(
        signs.failed if failed else signs.same if fetched else signs.well,
        "bold red" if failed else "cyan" if fetched else "green",
    )
    line.append(" ")
    spent = clock(outcome.seconds)
    if columns < NARROW:
        line.append_text(_fitted(outcome.name, min(names, columns - 3 - len(spent)), "bold", signs))
        line.append(f" {outcome.how}"[: max(0, columns - cell_len(line.plain) - 1 - len(spent))])
        line.append(f" {spent}", "dim")
        return _cut(line, columns, signs)
    line.append_text(_fitted(outcome.name, names, "bold", signs))
    line.append(f"  {outcome.how:<10}", "red" if failed else "")
    line.append(f" {spent:>7}")
    moved = (signs.up, outcome.up), (signs.down, outcome.down)
    words = "  ".join(f"{sign} {size(count)}" for sign, count in moved if count)
    line.append(f"  {words:<25}", "dim")
    if columns >= ROOMY:
        line.append(f"  {outcome.builder}", "dim")
    line.rstrip()
    return _cut(line, columns, signs)


def failure_lines(text: str, columns: int) -> list[Text]:
    """Render the description of a failure, wrapped at words; log lines, which start with `  |`, are not wrapped."""
    lines = []
    style = "red"
    for line in printable(text.rstrip()).splitlines():
        if line.startswith("  |"):
            lines.append(Text(f"  {line}", "dim"))
            continue
        parts = wrap(line, max(columns - 2, 10), break_long_words=False, break_on_hyphens=False) or [""]
        lines += [Text(f"  {part}", style) for part in parts]
        style = ""
    return lines


def log_prefix(task: str, names: int, colour: str, signs: Signs) -> Text:
    """Return the prefix of a task's log lines: the task's name."""
    return Text.assemble(_fitted(task, names, colour, signs), (f" {signs.left} ", "dim"))


def status_line(board: Board, now: float, columns: int, signs: Signs) -> Text:
    """Render the status line for all tasks of a run."""
    waiting = sum(not task.phase and task.there == "queue" for task in board.running.values())
    line = Text(no_wrap=True)
    line.append(f"[{board.done}/{board.total}]", "bold")
    line.append(f" {clock(now - board.begun)}")
    words = [f"{len(board.running) - waiting} running"] if len(board.running) > waiting else []
    words += [f"{waiting} queued"] if waiting else []
    words += [f"{board.counts[how]:,} {how}" for how in ("up to date",) if board.counts[how]]
    for word in words:
        line.append(f"{signs.between}{word}", "dim")
    if board.failed:
        line.append(signs.between, "dim")
        line.append(f"{len(board.failed)} failed", "bold red")
    left = _left(board, now)
    if left is not None:
        line.append(f"{signs.between}~{clock(left)} left", "dim")
    return _cut(line, columns, signs)


def _left(board: Board, now: float) -> float | None:
    """Return the estimated seconds until the run ends.

    None if there is no estimate: a task has not started yet, or a running one has not been built before.
    """
    if not board.running or board.done + len(board.running) < board.total:
        return None
    left = 0.0
    for task in board.running.values():
        if not task.expected:
            return None
        left = max(left, task.expected - (now - task.begun))
    return left if left >= 1 else None


def summary_lines(board: Board, now: float, columns: int, signs: Signs, interrupted: bool) -> list[Text]:
    """Render the summary at the end of a run."""
    spent = duration(now - board.begun)
    line = Text()
    if interrupted:
        line.append(f"{signs.failed} interrupted", "bold yellow")
        line.append(f" after {spent}: {board.summary()}")
        return [line]
    line.append(f"{signs.failed if board.failed else signs.well} ", "bold red" if board.failed else "green")
    line.append(board.summary(), "bold")
    line.append(f" in {spent}")
    if board.up + board.down > 1 << 10 and columns >= NARROW:
        line.append(f"  {signs.up} {size(board.up)}  {signs.down} {size(board.down)}", "dim")
    if board.failed and board.done > 1:
        return [line, Text(in_line(f"  failed: {', '.join(board.failed)}"), "red")]
    return [line]


def part_line(text: str, columns: int, signs: Signs) -> Text:
    """Render a captured line that is not complete yet, for example a prompt."""
    return _cut(Text(line_of(text), no_wrap=True), columns, signs)


def more_line(count: int, columns: int, signs: Signs) -> Text:
    """Render the line that replaces running tasks which do not fit on the terminal."""
    return _cut(Text(f"{signs.more} + {count} more", "dim", no_wrap=True), columns, signs)


def _fitted(name: str, columns: int, style: str, signs: Signs) -> Text:
    """Cut or pad a name to a number of columns."""
    text = _cut(Text(in_line(name), style, no_wrap=True), columns, signs)
    text.pad_right(max(0, columns - text.cell_len))
    return text


def _cut(line: Text, columns: int, signs: Signs) -> Text:
    """Cut a line to a number of columns."""
    if line.cell_len > columns:
        if signs is ASCII:
            line.truncate(max(columns, 0), overflow="crop")
        else:
            line.truncate(max(columns, 1), overflow="ellipsis")
    return line
