"""Tab completion for `doit` and `gamebear` in real shells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import Project

from gamebear_tasks.cli.main import COMMANDS

BASH = """
. /usr/share/bash-completion/bash_completion
. ./completion
complete_() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
    _PROGRAM
    echo "$*: ${COMPREPLY[*]}"
}
"""

ZSH = r"""
zmodload zsh/zpty
zpty shell "zsh -f -i"
zpty -w shell "autoload -Uz compinit; compinit -u -D; . ./completion; compdef _gamebear gamebear"
zpty -w shell "LISTMAX=1000; echo RE''ADY"
zpty -r -m shell before '*READY*'
zpty -w -n shell $'gamebear COMMAND --\t\t'
for try in {1..1000}; do
    zpty -r -t shell more && shown+=$more || sleep 0.05
    [[ $shown == *--seek-file* ]] && break
done
print -r -- "$shown"
zpty -d shell
"""


@pytest.fixture
def at_the_prompt(system: None, project: Project) -> Project:
    """A project with two artifacts; its doit is in the PATH."""
    project.write("hello.py", "")
    project.write("dodo.py", "from gamebear_tasks import artifact\n\n")
    for name in ("hello", "help_page"):
        with (project.folder / "dodo.py").open("a") as file:
            file.write(f"def task_{name}():\n    return artifact('hello.py', outputs=['build/{name}'])\n")
    project.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return project


def shell(project: Project, kind: str, script: str, program: str = "gamebear") -> str:
    script = f"{program} tabcompletion --shell {kind} > completion\n{script}"
    done = subprocess.run(
        [kind, "-c", script], cwd=project.folder, env=project.environment, capture_output=True, text=True, timeout=60
    )
    assert not done.stderr
    return done.stdout


def test_bash_completes_commands_and_tasks_where_they_are_valid(at_the_prompt: Project) -> None:
    asked = "".join(f"complete_ gamebear {name[:-1]}\ncomplete_ gamebear {name} hel\n" for name in COMMANDS)
    script = BASH.replace("PROGRAM", "gamebear") + asked + "complete_ gamebear hel\n"
    output = shell(at_the_prompt, "bash", script).splitlines()
    for name in COMMANDS:
        assert name in next(line for line in output if line.startswith(f"gamebear {name[:-1]}: ")).split()[2:]
    assert "gamebear jobs hel: hello help_page" in output
    assert "gamebear hel: help hello help_page" in output


def test_bash_completes_commands_and_tasks_of_doit(at_the_prompt: Project) -> None:
    script = BASH.replace("PROGRAM", "doit") + "complete_ doit hel\ncomplete_ doit job\ncomplete_ doit run hel\n"
    output = shell(at_the_prompt, "bash", script, program="doit").splitlines()
    assert output == ["doit hel: help hello help_page", "doit job: ", "doit run hel: hello help_page"]


def test_zsh_completes_options_with_their_descriptions(at_the_prompt: Project) -> None:
    output = shell(at_the_prompt, "zsh", ZSH.replace("COMMAND", "jobs"))
    assert "--lines" in output and "list the jobs as JSON" in output
