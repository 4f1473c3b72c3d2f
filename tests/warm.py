"""Run doit in forks of a process that has imported everything: hundredths of a second per run instead of tenths.

It is not suitable for tests of Python's startup, such as the locale or the time of imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from project import ROOT, Run

SERVER = """
import json, os, sys
import gamebear_tasks.client.build, gamebear_tasks.builders.transports.local
from gamebear_tasks import *
from gamebear_tasks.cli.main import COMMANDS, Main
from doit.doit_cmd import DoitMain

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        for fd, name in enumerate((os.devnull, request["out"], request["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), fd)
        main = Main() if request["arguments"][0] in COMMANDS else DoitMain()
        sys.argv[:] = [main.BIN_NAME, *request["arguments"]]
        sys.exit(main.run(request["arguments"]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Warm:
    """Runner of doit in child processes of one process."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def doit(self, folder: Path, environment: Mapping[str, str], *arguments: str) -> Run:
        """Run doit in a folder."""
        assert self._server.stdin and self._server.stdout
        with tempfile.TemporaryDirectory() as scratch:
            out, err = Path(scratch, "out"), Path(scratch, "err")
            request = {
                "folder": str(folder),
                "environment": dict(environment),
                "arguments": arguments,
                "out": str(out),
                "err": str(err),
            }
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            status = int(self._server.stdout.readline())
            return Run(status, out.read_text(errors="replace"), err.read_text(errors="replace"))

    def close(self) -> None:
        """End the process."""
        self._server.communicate()
