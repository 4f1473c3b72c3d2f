"""Create the pictures of the terminal: build a small project, run a task that fails, run the doctor.

`python3 docs/pictures/screens.py`, as root, builds on this machine in two minutes. It requires what the tests require.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from project import Project  # noqa: E402 - of the tests
from rich.console import Console  # noqa: E402
from rich.text import Text  # noqa: E402
from terminal import Terminal, terminal  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"

COLUMNS, ROWS = 100, 22

DODO = """
from gamebear_tasks import artifact, live

DOIT_CONFIG = {"default_tasks": ["daemon", "library", "manual", "tool"], "reporter": live}


def task_daemon():
    return artifact("compile.py", args={"name": "daemon", "files": 40}, outputs=["build/daemon"])


def task_library():
    return artifact("compile.py", args={"name": "library", "files": 12}, outputs=["build/library"])


def task_manual():
    return artifact("compile.py", args={"name": "manual", "files": 1}, outputs=["build/manual"])


def task_tool():
    return artifact("compile.py", args={"name": "tool", "files": 60}, inputs=["build/library"], outputs=["build/tool"])


def task_broken():
    return artifact("broken.py", inputs=["broken.c"], outputs=["build/broken"])
"""

COMPILE = """
#| arg: name: str
#| arg: files: int

from pathlib import Path

LOOP = 'for part in $(seq "$2"); do echo "cc -O2 -c part$part.c"; cc -O2 -c -o "/$part.o" /part.c; sleep 0.1; done'

Path("part.c").write_text("int add(int a, int b) { return a + b; }\\\\n")
with Container(packages_image("debian:bookworm", ["gcc", "libc6-dev"])) as c:
    c.copy_in("part.c", "/part.c")
    c.run(["sh", "-ec", LOOP, "sh", name, str(files)])
    c.copy_out("/1.o", name)
"""

BROKEN = """
with Container(packages_image("debian:bookworm", ["gcc", "libc6-dev"])) as c:
    c.copy_in("broken.c", "/broken.c")
    c.run(["cc", "-Wall", "-o", "/broken", "/broken.c"])
    c.copy_out("/broken", "broken")
"""

WRONG = """#include <stdio.h>

int main(void)
{
    printf("hello %s\\\\n", name);
}
"""


def main() -> None:
    """Create all pictures."""
    with tempfile.TemporaryDirectory() as name:
        project = Project(Path(name, "handheld"), home=Path(name, "you"), GAMEBEAR_BASE="bootstrap")
        for file, text in (("dodo.py", DODO), ("compile.py", COMPILE), ("broken.py", BROKEN), ("broken.c", WRONG)):
            project.write(file, text.replace("\\\\n", "\\n").lstrip())
        slots = project.home / ".config" / "gamebear" / "builder.json"
        slots.parent.mkdir(parents=True)
        slots.write_text('{"slots": 2}')
        project.doit("daemon", "library", "manual", "tool").ok()
        with terminal(project, COLUMNS, ROWS) as shown:
            _changed(project, "daemon", "library", "tool")
            shown.type("doit -n 3 -P thread", "Enter")
            shown.shows("✓ library", "tool     building", "part2", seconds=120)
            _draw(shown, project, "running")
            shown.shows("built", " in ", "$ ", seconds=180)
        with terminal(project, COLUMNS, ROWS) as shown:
            shown.type("doit broken keep_failed=yes", "Enter")
            shown.shows("failed in", "build/logs/broken.log", "\n$", seconds=120)
            _draw(shown, project, "failed")
        with terminal(project, COLUMNS, 24) as shown:
            shown.type("gamebear doctor", "Enter")
            shown.shows("ready", seconds=60)
            _draw(shown, project, "doctor")


def _changed(project: Project, *tasks: str) -> None:
    """Make tasks out of date, with the same expected duration."""
    path = project.folder / "dodo.py"
    text = path.read_text()
    for task in tasks:
        text = re.sub(rf'("name": "{task}", "files": )(\d+)', lambda match: f"{match[1]}{int(match[2]) + 1}", text)
    path.write_text(text)


def _draw(shown: Terminal, project: Project, name: str) -> None:
    """Write the content of a terminal as SVG, without names of this machine."""
    screen = shown.coloured.rstrip()
    screen = screen.replace(str(project.home), "/home/you").replace(str(project.folder), "/home/you/handheld")
    screen = re.sub(r"(Linux \d+\.\d+)[^, ]*", r"\1", screen)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen))
    drawn = console.export_svg(title="handheld", unique_id=name)
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # a picture must not load fonts from a server
    (PICTURES / f"{name}.svg").write_text(re.sub(r"[ \t]+$", "", drawn, flags=re.MULTILINE))


if __name__ == "__main__":
    main()
