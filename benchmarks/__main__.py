"""Command line of the benchmarks: run the named ones, or all. See README.md."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from . import ROOT, armhf, cluster, inputs, memory, report, transfer, trivial, unchanged
from .measure import Result
from .place import Place

BENCHMARKS: dict[str, Callable[[Place], Result]] = {
    "unchanged": unchanged.unchanged,
    "tasks": unchanged.many,
    "trivial": trivial.trivial,
    "far": trivial.far,
    "inputs": inputs.inputs,
    "transfer": transfer.transfer,
    "memory": memory.memory,
    "cluster": cluster.cluster,
    "armhf": armhf.armhf,
}
"""Benchmarks by name, short ones first. `armhf` runs for most of an hour."""

RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Run the benchmarks, print the results, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/run",
        description="Compare this checkout with the manual alternatives. Requires root on a disposable machine.",
    )
    known = ", ".join(BENCHMARKS)
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"benchmarks to run, by default all: {known}")
    chosen = parser.parse_args().name or list(BENCHMARKS)
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {known}")
    if os.geteuid():
        parser.error("run it as root on a disposable machine: it creates users, an sshd and mounts")
    for name in list(os.environ):  # of PYTHON*, PYTHONDONTWRITEBYTECODE would compile the checkout in every run
        if name.startswith(("GAMEBEAR_", "PYTHON", "SSH_", "XDG_")):
            del os.environ[name]
    RESULTS.mkdir(exist_ok=True)
    failed = 0
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gamebear-bench-", dir="/var/tmp")))
        scratch.chmod(0o755)
        os.environ["HOME"] = str(scratch)
        place = Place(scratch, stack)
        for name in chosen:
            print(f"-- {name}", file=sys.stderr, flush=True)
            about = {"began": time.strftime("%Y-%m-%d %H:%M:%S %z"), **machine()}
            try:
                result = BENCHMARKS[name](place)
            except Exception:  # noqa: BLE001 - the other benchmarks still run
                traceback.print_exc()
                failed += 1
                continue
            report.write_json(RESULTS / f"{name}.json", result, about)
            print(report.table({name: result}), flush=True)
        show()  # before the scratch folder, which is HOME, is removed: matplotlib's cache is there
    return 1 if failed else 0


def show() -> None:
    """Print and save the table and the plot of all existing results."""
    results = {
        name: report.read_json(RESULTS / f"{name}.json") for name in BENCHMARKS if (RESULTS / f"{name}.json").exists()
    }
    if results:
        text = "\n".join(filter(None, (report.table(results), report.phase_table(results))))
        (RESULTS / "results.md").write_text(text)
        report.plot(results, [RESULTS / "results.svg", RESULTS / "results.png"])
        print(text)
        print(f"{RESULTS}: results.md, results.svg, results.png, and the JSON of each benchmark")


def machine() -> dict[str, object]:
    """Return the properties of this machine and checkout that influence results."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    programs = {"buildah": "--version", "podman": "--version", "rsync": "--version", "ssh": "-V"}
    versions = {}
    for program, option in programs.items():
        done = subprocess.run([program, option], capture_output=True, text=True, check=False)
        versions[program] = (done.stdout + done.stderr).partition("\n")[0]
    return {
        "commit": commit.stdout.strip(),
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "programs": versions,
    }


if __name__ == "__main__":
    sys.exit(main())
