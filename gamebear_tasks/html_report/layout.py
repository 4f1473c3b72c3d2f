"""Page layout of the report: the last runs, newest first, each with a timeline of its tasks, their phases and logs."""

from __future__ import annotations

import os
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from ..records import run_journal
from ..records.run_reader import Run
from ..records.task_log import path_of, record_of
from ..records.task_record import BUILDER, Phase
from ..util.locations import LOGS
from ..util.text import duration, line_of, size
from . import model
from .html import Html, element, joined
from .model import TaskRun

TASKS = 200
"""Maximum number of tasks that are shown for a run."""

NAMES = 400
"""Maximum number of up-to-date tasks that are listed by name for a run."""

LINES = 12
"""Number of last log lines that are shown for a failed task."""

ROOM = 4 << 20
"""Maximum characters of log excerpts in the page. The newest runs have priority."""

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content Security Policy of the page: the browser loads and executes nothing."""


class Page:
    """The page that is being generated.

    Args:
        runs: the runs, newest first.
        project: the name of the project.
        now: current time, in seconds since 1970.
    """

    def __init__(self, runs: Sequence[Run], project: str, now: float) -> None:
        self.runs = runs
        self.project = project
        self.now = now
        self._room = ROOM
        self._logs = 0

    def html(self) -> str:
        """Return the complete HTML document."""
        style = Html(Path(__file__).with_name("style.css").read_text("utf-8"))
        head = element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", f"{self.project}: last runs"),
            element("style", style),
        )
        body = element("body", self._header(), element("main", *self._sections()), self._footer())
        return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"

    def _header(self) -> Html:
        return element(
            "header",
            element("h1", element("span", self.project, class_="project"), " last runs"),
            element("p", "Tasks that doit ran: result and reason, duration by phase, log.", class_="about"),
        )

    def _footer(self) -> Html:
        return element(
            "footer",
            element("p", "Written by ", element("code", "gamebear report"), " on ", _when(self.now), "."),
        )

    def _sections(self) -> list[Html]:
        if not self.runs:
            empty = "No task has run here yet. Run doit, then gamebear report."
            return [element("p", empty, class_="empty")]
        compared = model.compared(self.runs)
        failures = [each for tasks in compared for each in tasks if each.is_newest and each.record.state != "done"]
        sections = [self._failures(failures)] if failures else []
        sections.append(_legend())
        for number, (run, tasks) in enumerate(zip(self.runs, compared, strict=True)):
            sections.append(self._run(run, tasks, number))
        return sections

    def _failures(self, failures: list[TaskRun]) -> Html:
        """Return the section about the tasks whose last run was not successful."""
        items = []
        for task_run in failures[:TASKS]:
            record = task_run.record
            log = _last_lines(task_run)
            items.append(
                element(
                    "li",
                    element("h3", record.task, " ", _badge(model.way(record))),
                    element("p", _when(record.begun), " on ", _where(record.builder), class_="facts"),
                    element("p", record.failure or "No error message.", class_="failure"),
                    log,
                )
            )
        more = [_more(len(failures) - TASKS)] if len(failures) > TASKS else []
        return element(
            "section",
            element("h2", "Failed", id="failed"),
            element("ul", *items, class_="cards"),
            *more,
            class_="failures",
            aria_labelledby="failed",
        )

    def _run(self, run: Run, tasks: list[TaskRun], number: int) -> Html:
        name = f"run-{number + 1}"
        up, down = model.totals(task_run.record for task_run in tasks)
        sums = [f"{duration(run.seconds)}", f"{size(up)} sent", f"{size(down)} received"]
        requested = element("span", "doit ", " ".join(run.asked), class_="asked") if run.asked else None
        badges = [
            joined(_badge(way, f"{count} {way}"), " ") for way, count in model.counts(run).items()
        ]  # fmt: skip
        summary = element(
            "summary",
            element("h2", _when(run.begun), *([" ", requested] if requested else []), id=name),
            " ",
            element("span", *badges, class_="badges"),
            " ",
            element("span", " · ".join(sums), class_="facts"),
        )
        first, last = model.span(run)
        shown = tasks[:TASKS]
        rows = [self._task(task_run, run.begun, first, last) for task_run in shown]
        parts = [
            element("div", _axis(first, last), element("ol", *rows, class_="tasks"), class_="timeline"),
        ]  # fmt: skip
        if len(tasks) > len(shown):
            parts.append(_more(len(tasks) - len(shown)))
        if not run.is_whole:
            parts.append(element("p", "doit was killed, so its up-to-date tasks are unknown.", class_="facts"))
        if run.up_to_date:
            parts.append(_up_to_date(run.up_to_date))
        return element("details", summary, *parts, class_="run", open=number == 0)

    def _task(self, task_run: TaskRun, begun: float, first: float, last: float) -> Html:
        record = task_run.record
        head = element(
            "div",
            element("h3", record.task),
            " ",
            _badge(model.way(record)),
            class_="name",
        )
        took = element(
            "div", element("span", duration(record.seconds), class_="took"), " ", _change(task_run), class_="time"
        )
        why = element("p", f"Reason: {'; '.join(record.why) or 'unknown'}", class_="why")
        failure = [element("p", record.failure, class_="failure")] if record.failure else []
        return element(
            "li",
            head,
            _bars(task_run, begun, first, last),
            took,
            element("div", why, *failure, _made(task_run), self._log(task_run), class_="rest"),
        )

    def _log(self, task_run: TaskRun) -> Html:
        """Return the collapsible element with a task's phases and the end of its log."""
        entry = task_run.entry
        parts = []
        files = _files(task_run)
        if entry.log and self._room > 0:
            lines = "\n".join(_lines(task_run))[-self._room :]
            self._room -= len(lines)
            kept = len(entry.log.encode("utf-8", "replace"))
            cut = f"last {size(kept)} of {size(entry.size)}" if kept < entry.size else size(entry.size)
            parts.append(element("p", "Log (", cut, ")", *([": ", files] if files else []), class_="facts"))
            parts.append(_scrolled(lines, f"log of {task_run.record.task}"))
        else:
            what = "Log not included" if entry.size else "No log"
            parts.append(element("p", what, *([": ", files] if files else ["."]), class_="facts"))
        return element(
            "details", element("summary", "Phases and log"), _phases(task_run), element("div", *parts), class_="log"
        )


def page(runs: Sequence[Run], project: str, now: float) -> str:
    """Return the page as an HTML document.

    Args:
        runs: the runs, newest first.
        project: the name of the project.
        now: current time, in seconds since 1970.
    """
    return Page(runs, project, now).html()


def _legend() -> Html:
    items = [
        element("li", element("span", class_=f"swatch {kind}"), f" {kind} ", element("span", _listed(kind, names)))
        for kind, names in model.KINDS.items()
    ]
    return element(
        "section",
        element("h2", "Colours", id="colours"),
        element("ul", *items),
        element("p", "Upper bar of a task: this machine. Lower bar: its builder."),
        class_="legend",
        aria_labelledby="colours",
    )


def _listed(kind: str, names: Sequence[str]) -> str:
    return "" if [kind] == [*names] else ", ".join(names)


def _axis(first: float, last: float) -> Html:
    marks = []
    for second in model.ticks(first, last):
        place = 100 * (second - first) / (last - first)
        last_one = " last" if place > 88 else ""
        marks.append(
            element("span", _clock(second, last - first), style=f"left:{place:.2f}%", class_=f"tick{last_one}")
        )
    return element("div", element("div", *marks, class_="ticks"), class_="axis", aria_hidden="true")


def _clock(second: float, length: float) -> str:
    """Format a label of a timeline's axis.

    Args:
        second: the label's position, in seconds.
        length: length of the timeline, in seconds.
    """
    if length < 3:
        return f"{second:.2f}".rstrip("0").rstrip(".") + " s"
    whole = abs(round(second))
    sign = MINUS if second < 0 else ""
    if length < 100:
        return f"{sign}{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{sign}{hours}:{minutes:02}:{seconds:02}" if hours else f"{sign}{minutes}:{seconds:02}"


def _bars(task_run: TaskRun, begun: float, first: float, last: float) -> Html:
    record = task_run.record
    offset = record.begun - begun
    whole = Phase("", 0.0, record.seconds)
    theirs = [phase for phase in record.phases if phase.name in BUILDER]
    ours = [phase for phase in record.phases if phase.name not in BUILDER]
    summary = ", ".join(f"{name} {duration(seconds)}" for name, seconds in record.totals().items()) or "no phases"
    bars = [
        _bar(whole, offset, first, last, "whole"),
        *(_bar(phase, offset, first, last, f"ours {model.KIND_OF.get(phase.name, '')}") for phase in ours),
        *(_bar(phase, offset, first, last, f"theirs {model.KIND_OF.get(phase.name, '')}") for phase in theirs),
    ]
    return element("div", *bars, class_="bars", role="img", aria_label=f"{record.task}: {summary}")


def _bar(phase: Phase, offset: float, first: float, last: float, kind: str) -> Html:
    start = max(phase.start + offset, first)
    end = min(max(phase.start + offset + phase.seconds, start), last)
    left = 100 * (start - first) / (last - first)
    width = 100 * (end - start) / (last - first)
    title = f"{phase.name}: {duration(phase.seconds)}, at {duration(max(phase.start, 0))}" if phase.name else None
    return element("span", class_=f"bar {kind}", style=f"left:{min(left, 100):.3f}%;width:{width:.3f}%", title=title)


def _badge(way: str, text: str = "") -> Html:
    return element("span", text or way, class_=f"badge {way.replace(' ', '-')}")


def _change(task_run: TaskRun) -> Html:
    change = task_run.change
    if change is None or task_run.before is None:
        return Html()
    if abs(change) < model.ALIKE:
        return element("span", "unchanged", class_="change")
    title = f"previously {duration(task_run.before.seconds)}"
    return element("span", _percent(change), class_=f"change {'more' if change > 0 else 'less'}", title=title)


def _percent(change: float) -> str:
    if change >= 9:
        return f"{TIMES}{change + 1:.0f}"
    return f"{'+' if change > 0 else MINUS}{abs(change) * 100:.0f} %"


def _made(task_run: TaskRun) -> Html:
    record = task_run.record
    parts: list[str] = []
    for made in record.outputs[:20]:
        growth = task_run.growth(made)
        if task_run.is_same(made):
            note = " (unchanged)"
        elif growth is not None and abs(growth) >= 0.0005:
            note = f" ({'+' if growth > 0 else MINUS}{abs(growth) * 100:.1f} %)"
        else:
            note = ""
        parts.append(joined(element("code", made.path), f" {size(made.size)}{note}"))
    if len(record.outputs) > 20:
        parts.append(f"and {len(record.outputs) - 20} more outputs")
    if record.builder:
        parts.append(joined(f"{size(record.up)} sent, {size(record.down)} received, on ", _where(record.builder)))
    return element("ul", *(element("li", part) for part in parts), class_="facts")


def _phases(task_run: TaskRun) -> Html:
    totals = task_run.record.totals()
    if not totals:
        return Html()
    rows = [
        element(
            "tr",
            element("th", element("span", class_=f"swatch {model.KIND_OF.get(name, '')}"), f" {name}", scope="row"),
            element("td", "builder" if name in BUILDER else "this machine"),
            element("td", duration(seconds), class_="number"),
        )
        for name, seconds in totals.items()
    ]
    heads = [element("th", name, scope="col") for name in ("phase", "where", "time")]
    return element(
        "table", element("thead", element("tr", *heads)), element("tbody", *rows), class_="phases"
    )  # fmt: skip


def _lines(task_run: TaskRun) -> list[str]:
    return list(map(line_of, task_run.entry.log.rstrip("\n").split("\n")))


def _last_lines(task_run: TaskRun) -> Html:
    """Return the last log lines of a failed task, and links to its files."""
    parts = []
    if task_run.entry.log:
        parts.append(_scrolled("\n".join(_lines(task_run)[-LINES:]), f"last lines of {task_run.record.task}"))
    if files := _files(task_run):
        parts.append(element("p", "Files: ", files, class_="facts"))
    return joined(*parts)


def _scrolled(lines: str, label: str) -> Html:
    """Return a scrollable element with log lines, scrolled to the end."""
    return element("div", element("pre", lines), class_="lines", tabindex="0", role="region", aria_label=label)


def _files(task_run: TaskRun) -> Html | None:
    """Return links to the task's log and record, if they still belong to this run."""
    task = task_run.record.task
    record = run_journal.last(task) if task_run.is_newest else None
    if record is None or record.begun != task_run.record.begun:
        return None
    links = [("the whole log", path_of(task))] if task_run.entry.size else []
    links.append(("the record", record_of(task)))
    shown = [joined(" and " if number else "", _link(*link)) for number, link in enumerate(links)]
    return joined(*shown, ".")


def _link(text: str, path: Path) -> Html:
    name = os.fsencode(path.relative_to(LOGS.parent))
    return element("a", text, href=f"./{urllib.parse.quote(name)}")


def _up_to_date(names: Sequence[str]) -> Html:
    more = [_more(len(names) - NAMES)] if len(names) > NAMES else []
    return element(
        "details",
        element("summary", f"{len(names)} up to date"),
        element("ul", *(element("li", name) for name in names[:NAMES]), class_="names"),
        *more,
        class_="skipped",
    )


def _more(count: int) -> Html:
    return element("p", f"and {count} more", class_="facts")


def _where(builder: str) -> Html:
    return element("code", builder) if builder else Html("this machine")


def _when(seconds: float) -> Html:
    """Format a time in this machine's time zone.

    Args:
        seconds: the time, in seconds since 1970.
    """
    try:
        local = time.strftime("%-d %B %Y, %H:%M:%S", time.localtime(seconds))
        exact = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):  # a damaged record
        return Html("unknown time")
    return element("time", local, datetime=exact)
