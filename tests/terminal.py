"""A terminal with interactive programs: tmux, whose screen can be read."""

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
    """A terminal with a shell in a project's folder.

    Args:
        folder: Folder of tmux's socket.
    """

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "tmux"

    def tmux(self, *words: str) -> str:
        """Run a command of tmux."""
        command = ["tmux", "-u", "-S", str(self._socket), "-f", "/dev/null", *words]
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=environment).stdout

    def type(self, *keys: str) -> None:
        """Press keys, by tmux's names, or type text."""
        self.tmux("send-keys", *keys)

    def resize(self, columns: int, rows: int) -> None:
        """Resize the terminal."""
        self.tmux("resize-window", "-x", str(columns), "-y", str(rows))

    @property
    def rows(self) -> list[str]:
        """Lines of the screen, without empty lines at the end."""
        return self.screen.rstrip("\n").split("\n")

    @property
    def screen(self) -> str:
        """Content of the screen."""
        return self.tmux("capture-pane", "-p").rstrip("\n") + "\n"

    @property
    def everything(self) -> str:
        """Content of the scrollback buffer and the screen, with wrapped lines joined."""
        return self.tmux("capture-pane", "-p", "-J", "-S", "-").rstrip("\n")

    @property
    def coloured(self) -> str:
        """Content of the screen with escape sequences for colors."""
        return self.tmux("capture-pane", "-p", "-e")

    @property
    def has_cursor(self) -> bool:
        """Whether the cursor is visible."""
        return self.tmux("display-message", "-p", "#{cursor_flag}").strip() == "1"

    def shows(self, *words: str, seconds: float = 90.0) -> str:
        """Wait until the screen contains all words, and return it."""
        return self._wait(lambda: self.screen, words, seconds)

    def showed(self, *words: str, seconds: float = 90.0) -> str:
        """Wait until the scrollback buffer or screen contains all words, and return both."""
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
    """Yield a terminal with a shell in a project's folder, in which `doit` and `gamebear` run the project's."""
    with tempfile.TemporaryDirectory(prefix="tmux-") as name:
        made = Terminal(Path(name))
        for program, command in {"doit": project.command(), "gamebear": project.gamebear_command()}.items():
            path = project.folder.parent / program
            path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
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
