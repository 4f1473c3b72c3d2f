"""File names for arbitrary task names, and the files stored under them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from project import Project

from gamebear_tasks.builders.protocol.materials import Materials
from gamebear_tasks.client import provenance
from gamebear_tasks.client.install_outputs import _part, part_pattern
from gamebear_tasks.records import run_journal, task_log
from gamebear_tasks.records.task_log import TaskLog, materials_of, noted, path_of, record_of
from gamebear_tasks.records.task_record import Phase, Record
from gamebear_tasks.util.file_names import LONGEST, file_name

NAMES = st.text(st.characters(), max_size=400) | st.text("aA/_:.%=~é", max_size=12)
"""Any text, including lone surrogates, and texts that are likely to be similar."""

RECORD = Record("a/b", "ab" * 32, "local:", "done", "built", 1e9, 1.0, 0, 0, (Phase("build", 0, 1),), "attempt")


@given(NAMES, NAMES)
@example("a/b", "a_b")
@example("A", "a")
@example("ß", "SS")
@example("ü", "\udcc3\udcbc")
@example("a" * 300, "a" * 301)
@example("", "%")
@example("con", "%63on")
def test_different_texts_have_different_file_names_also_where_case_is_ignored(one: str, other: str) -> None:
    assert (file_name(one).casefold() == file_name(other).casefold()) == (one == other)


@given(NAMES)
@example("con")
@example("Con.tar")
@example("lpt1.x")
@example("a" * 500)
@example("A" * 190)
@example("..")
@example("a.")
def test_a_file_name_is_valid_on_every_file_system(text: str) -> None:
    name = file_name(text)
    assert re.fullmatch(r"[A-Za-z0-9_+%=-]|[A-Za-z0-9_+%=-][A-Za-z0-9_.+%=-]*[A-Za-z0-9_+%=-]", name)
    assert len(name) <= LONGEST
    assert not re.fullmatch("con|prn|aux|nul|com[0-9]|lpt[0-9]", name.partition(".")[0], re.IGNORECASE)


@pytest.mark.parametrize("name", ["umtprd", "usb-gx_2", "gcc+x.tar", "a" * LONGEST, "console"])
def test_an_ordinary_name_is_unchanged(name: str) -> None:
    assert file_name(name) == name


def test_other_names_stay_readable() -> None:
    assert file_name("glob:9") == "glob%3a9"
    assert file_name("usb/Gx") == "usb%2fGx=40"


@given(NAMES, NAMES)
@example("a", "a.materials")
def test_different_tasks_and_kinds_have_different_files(one: str, other: str) -> None:
    kinds = (path_of, record_of, materials_of, task_log._note_of)
    files = [str(kind(task)).casefold() for task in dict.fromkeys((one, other)) for kind in kinds]
    assert len(set(files)) == len(files)
    assert all(len(Path(file).name.encode()) <= 255 for file in files)


DODO = """
from gamebear_tasks import artifact

def task_all():
    for name, word in (("a/b", "slash"), ("a_b", "underscore"), ("A_B", "capitals")):
        yield {**artifact("x.py", args={"word": word}, outputs=[f"build/{word}/out"]), "basename": name}
"""

SCRIPT = """#| arg: word
import time
for _ in range(40):
    print(word, flush=True)
    time.sleep(0.01)
open("out", "w").write(word)
"""

WORDS = {"a/b": "slash", "a_b": "underscore", "A_B": "capitals"}


@pytest.mark.system
def test_tasks_with_similar_names_have_separate_logs_records_and_statements(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write("dodo.py", DODO)
    project.write("x.py", SCRIPT)
    project.doit("-n", "3", "-P", "thread", "provenance=yes").ok()
    monkeypatch.chdir(project.folder)
    for task, word in WORDS.items():
        lines = [line for line in path_of(task).read_text().splitlines() if not line.startswith("gamebear: ")]
        assert lines == [word] * 40
        record = run_journal.last(task)
        assert record is not None
        assert (record.task, record.job["args"]) == (task, {"word": word})
        assert noted(task) == (record.digest, record.attempt)
        statement = json.loads((project.folder / f"build/{word}/out.intoto.json").read_text())
        run = statement["predicate"]["runDetails"]
        assert run["metadata"]["invocationId"] == f"{record.digest}/{record.attempt}"
    project.write("dodo.py", DODO.replace('"word": word', '"word": word + "s" * (name == "a_b")'))
    project.doit().ok()
    assert [run_journal.last(task).why for task in ("a_b",)] == [("the argument word changed",)]  # type: ignore[union-attr]
    assert {path.name for path in (project.folder / "build/logs").glob("*.log")} == {
        "a%2fb.log",
        "a_b.log",
        "A_B=5.log",
    }


def test_files_of_another_task_from_an_older_release_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logs = tmp_path / "build/logs"
    logs.mkdir(parents=True)
    RECORD.write(logs / "a_b.json")  # former paths of the record and log of a/b
    (logs / "a_b.log").write_text("of a/b\n")
    (logs / ".a_b.json").write_text(json.dumps({"digest": RECORD.digest, "attempt": RECORD.attempt}))
    assert run_journal.last("a_b") is None
    assert noted("a_b") == ("", "")
    of_another = replace(RECORD, task="a_b")
    assert provenance.details(of_another, Materials())["byproducts"] == []
    with TaskLog("a_b", None) as log:
        log.begin(RECORD.digest, RECORD.attempt)
        assert log.offset == 0
        log.write(b"of a_b\n")
    assert path_of("a_b").read_text() == "of a_b\n"
    (about,) = provenance.details(of_another, Materials())["byproducts"]
    assert about["name"] == "log"
    with TaskLog("a_b", None) as log:
        log.begin(RECORD.digest, RECORD.attempt)
        assert log.offset == len("of a_b\n"), "this task's own log is resumed"


def test_each_target_has_its_own_partial_downloads(tmp_path: Path) -> None:
    from gamebear_tasks.builders.base import Output

    output = Output(1, "ab" * 32, False)
    long = "a" * 80
    for name in ("x", "*", "[x]", "x?", long, long + "b", "a\udcff", "a\udcfe"):
        (tmp_path / _part(tmp_path / name, output).name).touch()
    for name in ("x", "*", "[x]", "x?", long, long + "b", "a\udcff", "a\udcfe"):
        target = tmp_path / name
        assert list(tmp_path.glob(part_pattern(target))) == [_part(target, output)]


def test_an_older_run_does_not_link_to_the_log_of_a_later_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gamebear_tasks.html_report.layout import page
    from gamebear_tasks.records.run_reader import Entry, Run

    monkeypatch.chdir(tmp_path)
    run = Run(1e9, 10.0, (), (Entry(RECORD, "a line\n", 7),), (), True)
    assert "the record" not in page([run], "project", 1e9)
    record_of("a/b").parent.mkdir(parents=True)
    RECORD.write(record_of("a/b"))
    assert './logs/a%252fb.json"' in page([run], "project", 1e9)
    replace(RECORD, begun=2e9).write(record_of("a/b"))
    assert "the record" not in page([run], "project", 1e9)
