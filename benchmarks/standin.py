#!/usr/bin/python3 -I
"""Substitute for the command `buildahscript-py FILE` on the seed's side of a benchmark.

It runs a buildscript in the foreground with the runner's implementation of the language: without job, store, slot, log
or supervisor. It requires the files that the benchmark puts beside it: the runner as `gamebear_runner`, `facts.json`
and `arch.json`.
"""

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if "_CONTAINERS_USERNS_CONFIGURED" not in os.environ:  # set by `buildah unshare`
    os.execvp("buildah", ["buildah", "unshare", sys.executable, "-I", *sys.argv])

sys.path.insert(0, str(HERE))
os.environ["GAMEBEAR_FACTS"] = (HERE / "facts.json").read_text()

from gamebear_runner.executor import worker  # noqa: E402
from gamebear_runner.host.buildah import Buildah  # noqa: E402
from gamebear_runner.host.probe import facts  # noqa: E402
from gamebear_runner.script.context import Job, begin  # noqa: E402

script = Path(sys.argv[1]).resolve()
root = Path.home() / ".cache" / "buildahscript-py"
root.mkdir(parents=True, exist_ok=True)
known = facts(root)
prefix = f"script-{os.getpid()}-"
arch = json.loads((HERE / "arch.json").read_text())
job = Job(Buildah(root, known, prefix), known, arch, prefix)
begin(job)
os.chdir(script.parent)
try:
    worker._call(root, script.parent, {"script": {"name": script.name}})
finally:
    job.close()
