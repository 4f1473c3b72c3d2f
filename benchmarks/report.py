"""Reports of results: a table, the time by phase, a plot of each goal, and JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from .measure import Goal, Phases, Result, Row

LEAST_SHOWN = 0.01
"""Smallest plotted share of a goal. Better results are plotted here."""

HEAD = ("", "what", "against", "ours", "theirs", "least, median, most", "goal")


def write_json(path: Path, result: Result, machine: Mapping[str, object]) -> None:
    """Write one benchmark's results."""
    document = {"machine": machine, **dataclasses.asdict(result)}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Result:
    """Read a file that `write_json` has written."""
    document = json.loads(path.read_text())
    rows = [Row(**{**row, "goal": Goal(**row["goal"]) if row["goal"] else None}) for row in document["rows"]]
    return Result(rows, [Phases(**phases) for phases in document["phases"]])


def table(results: Mapping[str, Result]) -> str:
    """Return a Markdown table of all rows, followed by their notes."""
    notes: list[str] = []
    lines: list[tuple[str, ...]] = [HEAD]
    for name, result in results.items():
        for row in result.rows:
            mark = ""
            if row.note:
                if row.note not in notes:
                    notes.append(row.note)
                mark = f" [{notes.index(row.note) + 1}]"
            met = {True: "ok", False: "**missed**", None: ""}[row.is_met]
            lines.append(
                (
                    name,
                    row.what + mark,
                    row.against,
                    _values(row.ours, row.unit),
                    _values(row.theirs, row.unit),
                    ", ".join(_number(value) for value in (row.pairs[0], row.median, row.pairs[-1])),
                    f"{_goal(row)} {met}".strip(),
                )
            )
    text = _aligned(lines)
    return text + "".join(f"\n[{number}] {note}" for number, note in enumerate(notes, 1)) + "\n" * bool(notes)


def phase_table(results: Mapping[str, Result]) -> str:
    """Return a Markdown table of the time by phase, or an empty string if no phases were measured."""
    lines: list[tuple[str, ...]] = [("", "run", "phase", "seconds", "share of the run")]
    for name, result in results.items():
        for phases in result.phases:
            named = sum(phases.seconds.values())
            parts = {**phases.seconds, "(all else)": max(0.0, phases.wall - named)}
            for phase, spent in parts.items():
                lines.append((name, phases.what, phase, f"{spent:.3f}", f"{spent / phases.wall:.0%}"))
    return _aligned(lines) if len(lines) > 1 else ""


def plot(results: Mapping[str, Result], targets: Iterable[Path]) -> None:
    """Plot each row's minimum, median and maximum as a share of its goal. The targets' suffixes select the formats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [
        (
            f"{row.what}{f' / {row.against}' if row.against else ''}",
            [value / row.goal.value for value in row.pairs],
            row,
        )
        for result in results.values()
        for row in result.rows
        if row.goal and row.goal.value > 0
    ]
    if not shown:
        return
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.3 * len(shown)), layout="constrained")
    for place, (_, shares, row) in enumerate(shown):
        least, median, most = (max(LEAST_SHOWN, share) for share in (shares[0], statistics.median(shares), shares[-1]))
        colour = "tab:green" if row.is_met else "tab:red"
        axes.plot([least, most], [place, place], color=colour, linewidth=2)
        axes.plot([median], [place], color=colour, marker="o")
        axes.annotate(f"   {_number(row.median)}, goal {_goal(row)}", (max(1.0, most), place), va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [label for label, _, _ in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(LEAST_SHOWN / 1.1, max(30.0, *(8 * shares[-1] for _, shares, _ in shown)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", alpha=0.3)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xlabel("measured / goal (left of 1: reached); dot: median, line: least to most")
    for target in targets:
        figure.savefig(target, dpi=150, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows) + "\n"


def _values(values: Iterable[float], unit: str) -> str:
    ordered = sorted(values)
    if not ordered:
        return ""
    spread = f" ({_number(ordered[0])} to {_number(ordered[-1])})" if len(ordered) > 1 else ""
    return f"{_number(statistics.median(ordered))}{f' {unit}' if unit else ''}{spread}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    value = row.goal.value
    unit = f" {row.unit}" if row.unit else ""
    if row.goal.kind == "most":
        return f"<= {_number(value)}{unit}"
    if row.goal.kind == "more":
        return f"<= theirs + {_number(value)}{unit}"
    return f"<= 1/{1 / value:.0f}" if value < 0.6 else f"<= {_number(value)} x"
