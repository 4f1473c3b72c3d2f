"""A terminal with a person's programs in it: tmux, whose screen is what is looked at."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from project import Project, wait_for


class Terminal:
    """A shell in a project's folder, in a terminal.

    Args:
        folder: where tmux has its socket.
    """

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "tmux"

    def tmux(self, *words: str) -> str:
        """Have tmux do something."""
        command = ["tmux", "-u", "-S", str(self._socket), "-f", "/dev/null", *words]
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=environment).stdout

    def type(self, *keys: str) -> None:
        """Press keys, by tmux's names, or type a text."""
        self.tmux("send-keys", *keys)

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size."""
        self.tmux("resize-window", "-x", str(columns), "-y", str(rows))

    @property
    def rows(self) -> list[str]:
        """What is on the screen, without what is empty below."""
        return self.screen.rstrip("\n").split("\n")

    @property
    def screen(self) -> str:
        """What is on the screen."""
        return self.tmux("capture-pane", "-p").rstrip("\n") + "\n"

    @property
    def everything(self) -> str:
        """The screen and what has gone up from it, lines that were wrapped being whole."""
        return self.tmux("capture-pane", "-p", "-J", "-S", "-").rstrip("\n")

    @property
    def coloured(self) -> str:
        """The screen with its colours, as a terminal is told them."""
        return self.tmux("capture-pane", "-p", "-e")

    @property
    def has_cursor(self) -> bool:
        """Whether the cursor is to be seen."""
        return self.tmux("display-message", "-p", "#{cursor_flag}").strip() == "1"

    def shows(self, *words: str, seconds: float = 90.0) -> str:
        """Wait until all of some words are on the screen; return it."""
        return self._wait(lambda: self.screen, words, seconds)

    def showed(self, *words: str, seconds: float = 90.0) -> str:
        """Wait until all of some words are on the screen or have gone up from it; return all of it."""
        return self._wait(lambda: self.everything, words, seconds)

    def _wait(self, look: Callable[[], str], words: tuple[str, ...], seconds: float) -> str:
        seen = ""

        def is_there() -> bool:
            nonlocal seen
            seen = look()
            return all(word in seen for word in words)

        try:
            wait_for(is_there, seconds)
        except AssertionError:
            raise AssertionError(f"not all of {words} in:\n{seen}") from None
        return seen


@contextmanager
def terminal(project: Project, columns: int = 80, rows: int = 24, **environment: str) -> Iterator[Terminal]:
    """Give a terminal with a shell in a project's folder, in which `doit` is the project's."""
    with tempfile.TemporaryDirectory(prefix="tmux-") as name:
        made = Terminal(Path(name))
        path = project.folder.parent / "doit"
        path.write_text(f'#!/bin/sh\nexec {shlex.join(project.command())} "$@"\n')
        path.chmod(0o755)
        wanted = {
            **project.environment,
            "PATH": f"{path.parent}:{os.environ['PATH']}",
            "PS1": "$ ",
            "LC_ALL": "C.UTF-8",
        }
        wanted.update({"TERM": "screen-256color", **environment})
        shell = shlex.join(["env", *(f"{variable}={value}" for variable, value in wanted.items()), "sh"])
        made.tmux(
            *("new-session", "-d", "-x", str(columns), "-y", str(rows), "-c", str(project.folder), shell),
        )
        try:
            made.shows("$")
            yield made
        finally:
            made.tmux("kill-server")
