"""The HTML report: content, escaping, and rendering in a real browser."""

from __future__ import annotations

import html.parser
import re
import urllib.parse
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Browser
from project import Project

from gamebear_tasks.html_report import model
from gamebear_tasks.html_report.html import element
from gamebear_tasks.html_report.layout import NAMES, TASKS, page
from gamebear_tasks.records import run_journal
from gamebear_tasks.records.run_reader import Entry, Run, last_runs
from gamebear_tasks.records.task_record import Made, Phase, Record

SECRET = "\x1b[31mred\x1b[0m\x07\u202e <script>alert(1)</script> </pre></details><img src=x onerror=alert(1)>"
"""Hostile text from a builder."""

SPANS = (Phase("connect", 0, 0.5), Phase("queue", 0.5, 1.0), Phase("build", 1.5, 7.0), Phase("fetch", 8.5, 0.5))


def record(task: str, begun: float = 1e9, **more: object) -> Record:
    made = (Made("x", f"build/{task}", 2048, "ab" * 32),)
    plain = Record(task, "ab" * 32, "ssh://pi@buildpi", "done", "built", begun, 9.0, 70_000, 2048, SPANS)
    return replace(plain, **{"why": ("x.py changed",), "outputs": made, **more})  # type: ignore[arg-type]


def run(*records: Record, begun: float = 1e9, up_to_date: tuple[str, ...] = (), log: str = "a line\n") -> Run:
    entries = tuple(Entry(each, log, len(log)) for each in records)
    return Run(begun, 10.0, ("all",), entries, up_to_date, True)


class Reader(html.parser.HTMLParser):
    """A strict HTML reader: every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def links(self) -> list[str]:
        return [value or "" for name, value in self.attributes if name == "href"]


# content


@pytest.mark.system
def test_the_report_shows_the_runs(project: Project) -> None:
    project.gamebear("report").failed(
        "gamebear report needs a project: dodo.py does not exist", "gamebear report -f FOLDER/dodo.py"
    )
    assert not (project.folder / "build").exists()
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n"
        "def task_x(): return artifact('x y.py', outputs=['build/x'])\n"
        "def task_z(): return artifact('z.py', outputs=['build/z'])\n",
    )
    project.write("x y.py", "print('this is x'); open('x', 'w').write('x')")
    project.write("z.py", "open('z', 'w').write('z')")
    path = project.folder / "build/report.html"
    assert project.gamebear("report").ok().out == "build/report.html\n"
    assert "No task has run here yet" in Reader(path.read_text()).text
    project.doit().ok()
    project.write("x y.py", "print('that is x'); 1 / 0")
    project.doit().failed()
    assert project.gamebear("report").ok().out == "build/report.html\n"
    read = Reader(path.read_text())
    failed, _, runs = read.text.partition(" Colours ")
    assert "Failed x failed" in failed and "ZeroDivisionError" in failed and "that is x" in failed
    assert "division by zero. → Fix the script at x y.py, line 1" in failed
    assert "1 failed" in runs and "x y.py changed" in runs
    assert "2 built" in runs and "Reason: not built here before" in runs and "this is x" in runs
    assert read.links
    for link in read.links:
        assert (path.parent / urllib.parse.unquote(link)).is_file(), link
    project.gamebear("report", "x").failed("gamebear report takes no arguments, got 'x'")


def test_times_and_sizes_are_compared_with_the_previous_build() -> None:
    first = record("a")
    slower = record("a", seconds=18.0, outputs=(Made("x", "build/a", 4096, "cd" * 32),))
    fetched = record("a", origin="fetched", seconds=1.0)
    failed = record("a", state="failed", outputs=(), seconds=1.0)
    quick = record("a", seconds=9.0, outputs=(Made("x", "build/a", 2048, "ab" * 32),))
    runs = [run(each, begun=1e9 + number) for number, each in enumerate([first, slower, failed, fetched, quick])]
    changes = [[each.change for each in tasks] for tasks in model.compared(runs[::-1])]
    assert changes == [[-0.5], [None], [None], [1.0], [None]]
    text = Reader(page(runs[::-1], "p", 1e9)).text
    assert "18 s +100 %" in text and f"9.0 s {chr(0x2212)}50 %" in text
    assert "build/a 4.0 KiB (+100.0 %)" in text and "build/a 2.0 KiB (unchanged)" in text


def test_only_current_failures_are_shown_first() -> None:
    def bad(task: str) -> Record:
        return record(task, state="failed", failure="no", outputs=())

    runs = [run(record("mended"), bad("bad")), run(bad("mended"), bad("left"))]
    text = Reader(page(runs, "p", 1e9)).text
    told = text[text.index("Failed") : text.index("Colours")]
    assert ("bad failed" in told, "left failed" in told, "mended" in told) == (True, True, False)


def test_a_timeline_includes_jobs_of_another_doit_and_tolerates_any_number() -> None:
    odd = (Phase("build", -5.0, 10.0), Phase("queue", -1e12, 1e300), Phase("x", 1e300, 1.0))
    assert model.span(run(record("a", phases=(Phase("build", -5.0, 12.0),)))) == (-5.0, 10.0)
    assert model.span(run(record("a", phases=odd))) == (-10.0, 10.0)
    text = page([run(record("a", phases=odd, seconds=1e300, begun=-1e300))], "p", 1e300)
    for style in re.findall(r'style="([^"]*)"', text):
        left, width = re.fullmatch(r"left:([\d.]+)%(?:;width:([\d.]+)%)?", style).groups()  # type: ignore[union-attr]
        assert 0 <= float(left) <= 100 and 0 <= float(width or 0) <= 100
    for first, last in ((0, 0.1), (0, 3), (-10, 10), (0, 59), (-3600, 7200), (0, 1e7)):
        marks = model.ticks(first, last)
        assert 2 <= len(marks) <= 7 and first <= marks[0] and marks[-1] < last, (first, last)


# escaping and bounds


def test_text_from_a_builder_is_escaped_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = record(SECRET, why=(SECRET,), failure=SECRET, builder=SECRET, digest=SECRET, origin=SECRET, attempt=SECRET)
    odd = replace(odd, state="failed", phases=(Phase(SECRET, 0, 1),), outputs=(Made(SECRET, SECRET, 1, SECRET),))
    log = tmp_path / "odd.log"
    log.write_text(f"ten %\rhundred %\n{SECRET}\n")
    names = ["../../x", "a b", "é", "\udcff", "'\"", "javascript:alert(1)", *map(chr, range(1, 40))]
    for each in (odd, replace(odd, state=SECRET), *(record(name, state="failed") for name in names)):
        run_journal.keep(each, log)
    monkeypatch.setattr(run_journal, "up_to_date", [SECRET, *names])
    run_journal._at_end()
    text = page(last_runs(), SECRET, 1e9)
    read = Reader(text)
    assert not {"script", "img", "iframe", "link", "object"} & read.tags
    assert not [name for name, _ in read.attributes if name.startswith("on") or name == "src"]
    assert all(re.fullmatch(r"\./logs/[\w.%~-]+", link) for link in read.links), read.links
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)
    logs = re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert logs and all(log.startswith("hundred %\nred\ufffd") for log in logs)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in read.attributes
    text.encode()


def test_a_text_is_escaped_and_an_element_is_not() -> None:
    assert element("p", "<b>", element("i", "&"), title='"<', open=True, hidden=None) == (
        '<p title="&quot;&lt;" open>&lt;b&gt;<i>&amp;</i></p>'
    )


def test_the_size_of_a_page_is_bounded() -> None:
    many = [record(f"t{number}") for number in range(3 * TASKS)]
    names = tuple(f"u{number}" for number in range(3 * NAMES))
    text = page([run(*many, up_to_date=names, log="x" * 60_000)] * 3, "p", 1e9)
    assert len(text) < 8 << 20
    assert f"and {2 * TASKS} more" in Reader(text).text and f"and {2 * NAMES} more" in Reader(text).text


# a browser

CONTRAST = """
(() => {
  const parts = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const found = parts(getComputedStyle(node).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
  };
  const ratio = (one, other) => {
    const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const found = {text: 99, bars: 99};
  for (const node of document.querySelectorAll("body *")) {
    const style = getComputedStyle(node);
    const says = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if (says) found.text = Math.min(found.text, ratio(parts(style.color), behind(node)));
    if (node.matches(".bar:not(.whole), .swatch"))
      found.bars = Math.min(found.bars, ratio(parts(style.backgroundColor), behind(node.parentElement)));
  }
  return found;
})()
"""


@pytest.fixture
def shown(system: None, tmp_path: Path) -> Path:
    """A page with all kinds of content."""
    bad = record("a" * 150, state="failed", failure="make: " + "x" * 300, outputs=())
    other = record("pack:1", state="interrupted", origin="fetched")
    spans = tuple(Phase(name, number, 0.5) for number, name in enumerate(model.KIND_OF))
    more = [record("b", phases=spans), record("c", origin="fetched"), record("d", origin="baked", builder="")]
    runs = [run(bad, other, *more, up_to_date=("e", "f"), log="y" * 900 + "\nz\n" * 99), run(*more)]
    path = tmp_path / "report.html"
    path.write_text(page(runs, "p", 1e9).replace('<details class="run">', '<details class="run" open>'))
    return path


def test_a_browser_renders_the_page_on_every_screen_without_further_requests(shown: Path) -> None:
    backgrounds = set()
    with Browser() as browser:
        for dark in (False, True):
            for width in (360, 800, 1920):
                browser.open(shown, width, dark=dark)
                for unfolded in ("false", "true"):
                    browser.value(f"document.querySelectorAll('.log').forEach(log => {{ log.open = {unfolded} }})")
                    assert browser.value("document.documentElement.scrollWidth") == width
                    assert browser.value(
                        "document.querySelector('.log .lines').checkVisibility({contentVisibilityAuto: true})"
                    ) is (unfolded == "true")
            contrast = browser.value(CONTRAST)
            assert contrast["text"] >= 4.5 and contrast["bars"] >= 3, contrast  # WCAG 2.2, 1.4.3 and 1.4.11
            backgrounds.add(browser.value("getComputedStyle(document.documentElement).backgroundColor"))
        assert len(backgrounds) == 2
        assert set(browser.requests) == {shown.resolve().as_uri()}
        assert browser.complaints == []


def test_a_log_opens_with_the_keyboard_and_shows_its_end(shown: Path) -> None:
    with Browser() as browser:
        browser.open(shown, 800)
        browser.value("document.querySelector('.run .log > summary').focus()")
        for kind in ("keyDown", "keyUp"):
            browser.ask(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )
        assert browser.value("document.querySelector('.run .log').open") is True
        end = "Math.round(document.querySelector('.run .log .lines').scrollTop)"
        assert browser.value(end) == 0, "the end, as it is laid out from there"
        assert browser.value("document.querySelector('.run .log .lines').scrollHeight") > 400
