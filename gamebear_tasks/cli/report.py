"""`gamebear report`: write an HTML page about the last runs."""

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
    """Writes an HTML page about the last runs."""

    doc_purpose = "write an HTML page about the last runs: results, reasons and durations"
    doc_usage = "[--open]"
    doc_description = """Writes build/report.html and prints its path. The page is a single
file without scripts and works offline. It covers up to 20 runs,
without those in which every task was up to date: a timeline of
tasks and their phases, the result and reason of each task, sizes,
and the end of each log."""
    cmd_options = (
        {
            "name": "open",
            "long": "open",
            "type": bool,
            "default": False,
            "help": "open the page in the browser",
        },
    )

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Write the page."""
        from ..html_report.layout import page
        from ..records.run_reader import last_runs
        from ..runner.util.atomic_files import write_bytes

        self.refuse(args)
        if not self._is_in_project:
            raise SettingsError(
                f"gamebear report needs a project: {options['dodoFile']} does not exist.",
                "Go to the project's folder, or name its file: gamebear report -f FOLDER/dodo.py",
            )
        text = page(last_runs(), Path.cwd().name or "/", time.time())
        try:
            PAGE.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(PAGE, text.encode(), mode=file_mode())
        except OSError as error:
            raise JobError(
                f"{PAGE} cannot be written: {error.strerror}.",
                f"Check free disk space and permissions: df -h {PAGE.parent}; ls -ld {PAGE.parent} {PAGE}",
            ) from error
        print(PAGE)
        if options["open"]:
            import webbrowser

            if not webbrowser.open(PAGE.resolve().as_uri()):
                raise JobError(
                    f"{PAGE} cannot be opened: no browser was found.", f"Open {PAGE.resolve()} in a browser."
                )
        return 0
