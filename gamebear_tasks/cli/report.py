"""`gamebear report`: a page of the last runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import JobError, SettingsError
from ..records.run_journal import REPORT
from ..util.process import file_mode
from .command import ProjectCommand

PAGE = Path(REPORT)


class Report(ProjectCommand):
    """Writes the page of the last runs."""

    doc_purpose = "write a page of the last runs: what was built and why, where the time went"
    doc_usage = "[--open]"
    doc_description = """Writes build/report.html and prints its path. The page is one file
that needs neither network nor scripts: of the last runs that did
anything (20 at most) a timeline of tasks and phases, what was built,
fetched or up to date and why, sizes, and the end of each log."""
    cmd_options = (
        {
            "name": "open",
            "long": "open",
            "type": bool,
            "default": False,
            "help": "open it in the browser",
        },
    )

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Write it."""
        from ..html_report.layout import page
        from ..records.run_reader import last_runs
        from ..runner.util.atomic_files import write_bytes

        self.refuse(args)
        if not self._is_in_project:
            raise SettingsError(
                "There is no dodo.py here, so no runs to tell of.",
                "Go to the project's folder, or name it: gamebear report -f FOLDER/dodo.py.",
            )
        text = page(last_runs(), Path.cwd().name or "/", time.time())
        try:
            PAGE.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(PAGE, text.encode(), mode=file_mode())
        except OSError as error:
            raise JobError(f"{PAGE} cannot be written: {error.strerror}.", "Make room for it, or move it.") from error
        print(PAGE)
        if options["open"]:
            import webbrowser

            if not webbrowser.open(PAGE.resolve().as_uri()):
                raise JobError("No browser could be started here.", f"Open {PAGE} by hand.")
        return 0
