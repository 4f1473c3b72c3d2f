"""doit's database, and what is said where it cannot be used; that of this Python, real files (see `errors.py`, too)."""

from __future__ import annotations

import dbm
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doit.dependency import DbmDB, JSONCodec
from project import Project

from gamebear_tasks.doit_plugin import database
from gamebear_tasks.doit_plugin.database import DatabaseError

REMOVE = "Remove it: rm -r .doit.db*; doit then finds on the builder what was built."


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Opens the project's database."""
    monkeypatch.chdir(tmp_path)
    return lambda: database.Dbm(".doit.db", JSONCodec())


def failure(attempt: Callable[[], object]) -> str:
    with pytest.raises(DatabaseError) as caught:
        attempt()
    return str(caught.value)


def test_what_doit_notes_is_there_again(opened: Callable[[], Any]) -> None:
    first = opened()
    first.set("x", "result", 1)
    first.dump()
    second = opened()
    assert second.in_("x") and second.get("x", "result") == 1


def test_an_entry_that_is_damaged_is_told(opened: Callable[[], Any]) -> None:
    with dbm.open(".doit.db", "c") as file:
        file[b"x"] = b'{"result'
    said = "doit's database .doit.db cannot be read: it is damaged, or another Python's."
    assert failure(lambda: opened().get("x", "result")) == f"{said}\n→ {REMOVE}"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), "No space left on device.\n→ Make room there, then run doit again"),
        (OSError(11, "Resource temporarily unavailable"), "Another doit runs in this folder: wait until it has ended."),
        (OSError("database is locked"), "Another doit runs in this folder: wait until it has ended."),
        (ValueError("Expecting value"), REMOVE),
    ],
)
def test_what_a_database_says_becomes_what_to_do(
    opened: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(DbmDB, "dump", fails)
    said = failure(opened().dump)
    assert said.startswith("doit's database .doit.db cannot be written: ") and says in said


@pytest.mark.parametrize("backend", ["dbm", "json", "sqlite3"])
def test_whichever_database_is_chosen_a_damaged_one_is_told(tmp_path: Path, backend: str) -> None:
    project = Project(tmp_path / "project", home=tmp_path / "home")
    project.write("dodo.py", "def task_x():\n    return {'actions': ['true']}\n")
    project.write(".doit.db", "{ no database")
    run = project.doit("--backend", backend).failed(f"cannot be opened: it is damaged, or another Python's. {REMOVE}")
    assert run.status == 3 and "Traceback" not in run.text
