"""Parts of the benchmarks. The benchmarks themselves are not run: a busy machine distorts their results."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import report, seed
from benchmarks.machine import new_builder
from benchmarks.measure import Goal, Phases, Result, Row, alternate

RESULTS = {
    "trivial": Result(
        [
            Row("a job", "ssh and scp", [1.0, 4.0, 2.0], [2.0, 4.0, 8.0], Goal("ratio", 1.0), note="of a kind"),
            Row("a job", "by hand", [1.0, 1.5], [0.5, 1.0], Goal("more", 0.25)),
        ],
        [Phases("a job", 2.0, {"connect": 0.5, "build": 1.0})],
    ),
    "memory": Result([Row("memory", "", [70.0], goal=Goal("most", 80.0), unit="MiB"), Row("idle", "", [20.0])]),
}


def test_a_ratio_is_that_of_a_pair_and_not_of_medians() -> None:
    row = RESULTS["trivial"].rows[0]
    assert row.pairs == [0.25, 0.5, 1.0]
    assert row.median == 0.5
    assert row.is_met


def test_a_goal_is_missed_by_the_median() -> None:
    assert RESULTS["trivial"].rows[1].pairs == [0.5, 0.5]
    assert RESULTS["trivial"].rows[1].is_met is False
    assert RESULTS["memory"].rows[0].is_met is True
    assert RESULTS["memory"].rows[1].is_met is None


def test_both_sides_alternate_in_running_first() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    assert alternate(2, lambda: side("a"), lambda: side("b")) == [[1.0, 4.0], [2.0, 3.0]]
    assert order == ["a", "b", "b", "a"]


def test_results_are_read_back_as_they_were(tmp_path: Path) -> None:
    for name, result in RESULTS.items():
        report.write_json(tmp_path / name, result, {"processors": 2})
        read = report.read_json(tmp_path / name)
        assert report.table({name: read}) == report.table({name: result})
        assert report.phase_table({name: read}) == report.phase_table({name: result})


def test_the_table_shows_missed_goals() -> None:
    lines = report.table(RESULTS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == [
        "trivial",
        "a job [1]",
        "ssh and scp",
        "2 s (1 to 4)",
        "4 s (2 to 8)",
        "0.25, 0.5, 1",
        "<= 1 x ok",
    ]
    assert cells[3][-1] == "<= theirs + 0.25 s **missed**"
    assert cells[4] == ["memory", "memory", "", "70 MiB", "", "70, 70, 70", "<= 80 MiB ok"]
    assert lines[-1] == "[1] of a kind"


def test_time_outside_all_phases_is_shown() -> None:
    lines = report.phase_table(RESULTS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells == [
        ["trivial", "a job", "connect", "0.500", "25%"],
        ["trivial", "a job", "build", "1.000", "50%"],
        ["trivial", "a job", "(all else)", "0.500", "25%"],
    ]


@pytest.fixture
def drawn(tmp_path: Path) -> Iterator[Path]:
    targets = [tmp_path / "results.svg", tmp_path / "results.png"]
    report.plot(RESULTS, targets)
    yield tmp_path


def test_the_plot_is_drawn_in_both_formats(drawn: Path) -> None:
    assert b"<svg" in (drawn / "results.svg").read_bytes()
    assert (drawn / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_lists_the_benchmarks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("unchanged", "tasks", "trivial", "far", "inputs", "transfer", "memory", "armhf"):
        assert name in done.stdout
    assert os.access(ROOT / "benchmarks" / "run", os.X_OK)


@pytest.mark.system
def test_the_other_side_runs_a_buildscript_by_its_five_steps(tmp_path: Path) -> None:
    script = "Path('a').write_text(str(len(list(Image.list()))))\n(Path(__file__).parent / 'b').write_text('b')\n"
    with new_builder(tmp_path) as builder:
        seed.install(builder, "amd64", builder.facts)
        before = builder.server.connections
        seed.five_steps(tmp_path / "here", script, ["a", "b"], builder.ssh_config())
        assert builder.server.connections == before + 6  # two outputs
    assert (tmp_path / "here" / "a").read_text() == "0"
    assert (tmp_path / "here" / "b").read_text() == "b"
