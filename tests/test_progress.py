"""Visible output of a run, in a real terminal (tmux) and without one."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from keyboard import Keyboard
from project import Project, wait_for
from remote import known
from sshd import Sshd
from terminal import terminal

HEAD = 'from gamebear_tasks import artifact, live\nDOIT_CONFIG = {"reporter": live}\n'

JOB = HEAD + "def task_a(): return artifact('a.py', outputs=['build/a'])\n"

JOBS = JOB + "def task_b(): return artifact('b.py', outputs=['build/b'])\n"

GATE = "while [ ! -e go ]; do sleep 0.02; done"


def gated(project: Project, name: str, before: str = "", after: str = "") -> None:
    """Write a buildscript that waits for the file `go` in the project's folder."""
    gate = str(project.folder / "go")
    wait = f"import os, time\nwhile not os.path.exists({gate!r}): time.sleep(0.02)\n"
    project.write(f"{name}.py", f"{before}\n{wait}{after}\nopen({name!r}, 'w').write('made')\n")


def go(project: Project) -> None:
    (project.folder / "go").touch()


def commands(project: Project, **actions: str) -> None:
    """Write a dodo.py whose tasks are shell commands."""
    tasks = (f"def task_{name}(): return dict(actions=[{text!r}], verbosity=2)\n" for name, text in actions.items())
    project.write("dodo.py", HEAD + "".join(tasks))


@pytest.mark.system
@pytest.mark.parametrize("kind", ["process", "thread"])
def test_running_tasks_are_below_the_finished_ones(project: Project, kind: str) -> None:
    project.write("dodo.py", JOBS + "def task_c(): return {'actions': ['echo from c'], 'verbosity': 2}\n")
    project.write(str(project.home / ".config/gamebear/builder.json"), '{"slots": 1}')
    gated(project, "a", "print('\\033[31mcc\\033[0m -c a.c', flush=True)")
    gated(project, "b", "print('cc -c b.c', flush=True)")
    with terminal(project, 80, 12) as seen:
        seen.type(f"clear; doit -n 2 -P {kind} a b c", "Enter")
        screen = seen.shows("building", "queued", "cc -c", "next", "[0/3]")
        assert re.search(r"^. [ab]  building +[0-9.]+ s  cc -c [ab]\.c$", screen, re.M), screen
        assert re.search(r"^◦ [ab]  queued +[0-9.]+ s  next$", screen, re.M), screen
        assert "1 running · 1 queued" in screen
        wait_for(lambda: seen.has_cursor)  # it exists until doit is killed
        seen.resize(24, 12)
        rows = seen.shows("building", "[0/3] ", "…\n").rstrip("\n").split("\n")
        assert [len(row) for row in rows] == [23, 23, 23], "one row for each task, and one for all"
        seen.resize(90, 12)
        assert seen.shows("[0/3] ", "cc -c").count("building") == 1
        go(project)
        output = seen.showed(" 1 done in").split("\n")
        assert "from c" in output
        for name in "ab":
            assert (
                len([line for line in output if re.match(rf"[✓↓] {name}  (built|fetched) +[0-9.]+ s  ↑ ", line)]) == 1
            ), output
        assert not [row for row in seen.rows if row.startswith((*"⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏◦", "["))], output
        assert re.search(r"^✓ c  done ", "\n".join(output), re.M)
        assert seen.has_cursor
        seen.type("clear; doit clean; doit", "Enter")
        assert re.search(r"^↓ a  fetched ", seen.shows("2 fetched, 1 done in"), re.M)
        seen.type("clear; gamebear -v 2 a b", "Enter")
        assert seen.shows("up to date\n").count("-- ") == 2


@pytest.mark.system
def test_ctrl_c_reports_cancellations_and_restores_the_terminal(project: Project) -> None:
    project.write("dodo.py", JOB)
    gated(project, "a", "print('begin', flush=True)")
    with terminal(project, NO_COLOR="1") as seen:
        seen.type("clear; doit a", "Enter")
        seen.shows("building", "begin")
        assert not re.search(r"\x1b\[([0-9;]*;)?(3|4|9)[0-7]m", seen.coloured), "no colour, but live"
        seen.type("C-c")
        output = seen.shows("interrupted after", "$")
        assert re.search(
            r"gamebear: cancelling a on local: .*\n✗ interrupted after [0-9.]+ s: 1 not finished\n", output
        ), output
        assert output.count("interrupted") == 1 and "Traceback" not in output and "building" not in output
        assert seen.has_cursor
        seen.type("clear; doit -n 2 a", "Enter")
        seen.shows("building", "begin")
        seen.type("C-c")
        seen.shows("cancelling a on")
        seen.type("C-c")
        output = seen.shows("interrupted after", "$")
        assert "✗ interrupted after" in output and "✓" not in output and output.count("interrupted") == 1
        go(project)
        seen.type("echo $((40 + 2))", "Enter")
        seen.shows("$ echo $((40 + 2))\n42\n")


@pytest.mark.system
def test_a_failure_is_shown_once_with_the_end_of_its_log(project: Project) -> None:
    tasks = "def task_c(): return {'actions': ['echo captured; echo shown >&2; exit 3']}\n"
    project.write("dodo.py", JOB + tasks)
    project.write("a.py", "print('about to fail')\nraise SystemExit('it broke')")
    with terminal(project, 100, 30) as seen:
        seen.type("clear; doit -c a c", "Enter")
        output = seen.shows("2 failed in", "failed: a, c")
        for word in (
            "about to fail",
            "it broke",
            "  | captured",
            "shown\n",
            "returned 3",
            "✗ a  failed",
            "✗ c  failed",
        ):
            assert output.count(word) == 1, f"{word} in {output}"


@pytest.mark.system
@pytest.mark.parametrize("kind", ["process", "thread"])
def test_lines_of_full_logs_are_prefixed_with_their_task_and_never_mixed(project: Project, kind: str) -> None:
    project.write("dodo.py", JOBS)
    project.write(str(project.home / ".config/gamebear/builder.json"), '{"slots": 2}')
    for name in "ab":
        body = (
            f"import sys\nfor n in range(300): sys.stdout.write('{name} '); sys.stdout.write('{name}{name}{name}\\n')"
        )
        project.write(f"{name}.py", f"{body}\nopen({name!r}, 'w').write('made')\n")
    run = project.doit("-n", "2", "-P", kind).ok()
    logs = [line for line in run.out.splitlines() if " | " in line]
    assert sorted(logs) == ["a | a aaa"] * 300 + ["b | b bbb"] * 300
    assert re.search(r"^a: built in .* on local: \(", run.out, re.M), run.out
    assert re.search(r"^2 built in .* sent, .* received$", run.out.splitlines()[-1]), run.out
    with terminal(project) as seen:
        seen.type(f"clear; rm -r build ~/.cache/gamebear/v1/jobs; gamebear -n 2 -P {kind} -v 2", "Enter")
        output = seen.showed("2 built in").split("\n")
        logs = [line for line in output if " │ " in line]
        assert sorted(logs) == ["a │ a aaa"] * 300 + ["b │ b bbb"] * 300


@pytest.mark.system
def test_a_binary_log_is_shown_to_its_end(project: Project) -> None:
    project.write("dodo.py", JOB)
    project.write(
        "a.py",
        "import sys\nsys.stdout.buffer.write(bytes(1_000_000) + b'\\nthe end\\n')\nopen('a', 'w').write('made')\n",
    )
    run = project.doit("-n", "2").ok()
    assert "\na | the end\n" in run.out
    assert re.search("^a: built in ", run.out, re.M)


@pytest.mark.system
def test_tasks_beyond_the_screen_are_counted_and_foreign_output_is_preserved(project: Project) -> None:
    names = [f"t{number}" for number in range(8)]
    commands(project, **dict.fromkeys(names, f"echo from $$; {GATE}"))
    with terminal(project, 60, 6) as seen:
        seen.type("clear; doit -n 8", "Enter")
        seen.shows("+ 5 more", "[0/8]", "8 running")
        go(project)
        output = seen.showed("8 done in")
        assert len(re.findall("^from [0-9]+$", output, re.M)) == 8
        assert len(re.findall("^✓ t[0-9]  done ", output, re.M)) == 8


@pytest.mark.system
def test_a_task_may_have_the_terminal_for_itself(project: Project) -> None:
    project.write(
        "dodo.py",
        HEAD + "def task_x(): return {'actions': ['[ -t 1 ] && read answer && echo \"<$answer>\"'],"
        " 'io': {'capture': False}, 'verbosity': 2}",
    )
    with terminal(project) as seen:
        seen.type("clear; doit", "Enter")
        seen.type("forty-two", "Enter")
        assert re.search(r"<forty-two>\n✓ x  done ", seen.shows("1 done in"))


@pytest.mark.system
@pytest.mark.parametrize("how", [(), ("-n", "2")])
def test_a_blocked_terminal_does_not_stop_builds(project: Project, how: tuple[str, ...]) -> None:
    less = "from gamebear_tasks.progress import events, live_view\nevents.STOPPED, live_view.PENDING = 0.3, 1 << 16\n"
    project.write("dodo.py", JOBS + less)
    for name in "ab":
        project.write(f"{name}.py", f"print('{name * 99}\\n' * 20_000, flush=True)\nopen({name!r}, 'w').close()\n")
    with Keyboard(project.gamebear_command("-v", "2", *how), project.folder, project.environment) as keyboard:
        wait_for(lambda: all((project.folder / "build" / name).exists() for name in "ab"))
        time.sleep(2.0)  # longer than the end of a task is delayed
        assert keyboard.end() == 0
    words = r"\(\d[\d,]* lines omitted: the terminal accepted no data; the log in build/logs is complete\)"
    assert re.search(words, keyboard.text) and re.search(r"2 built\S* in", keyboard.text)
    assert (project.folder / "build/logs/a.log").read_text().count("a" * 99) == 20_000


def test_a_prompt_has_the_terminal_for_itself(tmp_path: Path, server: Sshd, home: Path) -> None:
    own = known(home, tmp_path / "home", server.port, server)
    key = own / ".ssh" / "id_ed25519"
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-P", "", "-N", "open sesame", "-f", key], check=True, capture_output=True
    )
    project = Project(tmp_path / "project", own, GAMEBEAR_BUILDER=server.url)
    project.write("dodo.py", JOB)
    project.write("a.py", "open('a', 'w').write('made')")
    with terminal(project, 200) as seen:
        for command, words in (("doit -n 2", "built"), ("rm build/a; doit", "fetched")):
            seen.type("clear", "Enter")
            wait_for(lambda: "Passphrase" not in seen.screen)
            seen.type(command, "Enter")
            assert seen.shows("Passphrase for").split("\n")[-2].startswith("Passphrase for"), (
                "nothing is painted over it"
            )
            seen.type("open sesame", "Enter")
            assert "sesame" not in seen.shows(f"1 {words} in")


@pytest.mark.system
@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("CI", "true")])
def test_dumb_terminals_and_ci_get_plain_lines(project: Project, name: str, value: str) -> None:
    commands(project, x="echo hello")
    with terminal(project, 80, 24, **{name: value}) as seen:
        seen.type("clear; doit", "Enter")
        assert re.search(r"^\.  x\nhello\nx: done in [0-9.]+ s\n1 done in ", seen.shows("1 done in"), re.M)


def test_a_file_gets_plain_lines(project: Project) -> None:
    commands(project, x="echo hello")
    run = project.doit("-o", "output").ok()
    assert run.out == "hello\n"
    assert re.match(r"\.  x\nx: done in [0-9.]+ s\n1 done in ", (project.folder / "output").read_text())


@pytest.mark.system
def test_two_thousand_up_to_date_tasks_print_one_line_without_importing_rich(project: Project) -> None:
    project.write(
        "dodo.py",
        HEAD + "import atexit, sys\n"
        "slow = {'rich', 'gamebear_tasks.progress.model', 'gamebear_tasks.progress.events'}\n"
        "atexit.register(lambda: print('loaded', sorted(slow & sys.modules.keys())))\n"
        "def nothing(): pass\n"
        "def task_x():\n    for n in range(2000):\n"
        "        yield {'name': str(n), 'actions': [nothing], 'uptodate': [True], 'file_dep': ['dodo.py']}\n",
    )
    with terminal(project) as seen:
        seen.type("clear; doit -r zero; clear; doit", "Enter")
        assert "2,000 up to date\nloaded []\n$" in seen.shows("2,000 up to date\n", "loaded", "\n$")


@pytest.mark.system
def test_a_failed_view_does_not_affect_builds(project: Project) -> None:
    commands(project, x="echo from x", y="echo from y")
    project.write("rich/__init__.py", "raise ImportError('broken')")
    with terminal(project) as seen:
        seen.type("clear; doit -n 2; doit list", "Enter")
        output = seen.shows("the live view failed (ImportError: broken)", "\ny", "from x", "from y")
        assert "Traceback" not in output and seen.has_cursor


@pytest.mark.system
def test_other_reporters_are_unchanged(project: Project) -> None:
    project.write("dodo.py", JOBS)
    for name in "ab":
        project.write(f"{name}.py", f"print('log of {name}')\nopen({name!r}, 'w').write('made')\n")
    run = project.doit("-r", "console").ok()
    assert run.out == ".  a\nlog of a\n.  b\nlog of b\n"
    assert re.search("^gamebear: a: built in ", run.err, re.M)
    assert project.doit("-r", "console").ok().text == "-- a\n-- b\n"
    tasks = json.loads(project.doit("-r", "json").ok().out)["tasks"]
    assert [task["result"] for task in tasks] == ["up-to-date"] * 2
    assert project.doit("list").ok().out.split() == ["a", "b"]


@pytest.mark.system
def test_the_last_build_time_is_shown_even_if_the_result_was_fetched_since(project: Project) -> None:
    project.write("dodo.py", JOB)
    gated(project, "a")
    go(project)
    project.doit("a").ok()
    (run,) = (project.folder / "build/logs/runs").iterdir()
    run.write_text(re.sub('"seconds": [0-9.]+, "bytes"', '"seconds": 310.2, "bytes"', run.read_text()))
    project.doit("clean").ok()
    project.doit().ok()
    (project.folder / "go").unlink()
    gated(project, "a", "# changed")
    with terminal(project) as seen:
        seen.type("clear; doit a", "Enter")
        assert re.search(r"a  building +[0-9.]+ s of ~5:10", seen.shows("building", "of ~5:10", "left"))
        go(project)
        seen.shows("1 built in")
