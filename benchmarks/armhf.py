"""Build the three artifacts for emulated armhf over SSH, from nothing and again, compared with the seed's script."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from emulation import emulate_armhf
from project import Project
from test_seed import IN_ITS_MANNER, POSTS, the_script_in_the_post
from upstreams import free_port

from dodo import GT, LIBUSBGX, UMTP
from gamebear_tasks.sources.git import Git

from . import seed
from .machine import new_builder
from .measure import Goal, Result, Row, checked, seconds
from .phases import phases_of
from .place import Place

COUNT = 3
"""Repetitions of short runs. Runs from nothing, and those of the other side, are measured once."""

OUTPUTS = ("umtprd", "usbgx.tar", "gt.tar")

UPSTREAM = "https://github.com/"

AT_ONCE = ("-n", "3", "-P", "thread")

NOTE = (
    "both with the base image in the store, the overlay driver, the same upstreams from this machine; the seed's script"
    " is run by a stand-in for buildahscript-py, and its time is one run's"
)


def armhf(place: Place) -> Result:
    """Run the benchmark. The other side's two runs need most of an hour."""
    emulate_armhf()
    folder = place.folder / "armhf"
    folder.mkdir()
    with (
        upstreams(folder / "upstreams") as gitconfig,
        new_builder(folder, slots=2) as ours,
        new_builder(folder, overlay=True) as theirs,
    ):
        ours.make_base("armhf")
        theirs.import_base("armhf", ours.export_base("armhf", folder / "base.tar"), gitconfig)
        seed.install(theirs, "armhf", ours.facts)
        (ours.home / ".gitconfig").write_text(gitconfig)
        project = ours.project("gamebear", GAMEBEAR_ARCH="armhf")
        project.take("dodo.py", "buildscripts", "gamebear.lock")

        say("ours from nothing")
        cold = phases_of(project, "three artifacts from nothing", lambda: _doit(project, *AT_ONCE))
        unchanged = [_doit(project) for _ in range(COUNT)]
        edited = [_edited(project, number) for number in range(COUNT)]
        run = phases_of(project, "one buildscript changed", lambda: _edited(project, COUNT))
        fetched = [seconds(lambda: (project.doit("clean").ok(), project.doit(*AT_ONCE).ok())) for _ in range(COUNT)]
        fetching = phases_of(project, "clean, and doit", lambda: _fetched(project))

        script = the_script_in_the_post() if POSTS else IN_ITS_MANNER
        say(f"the seed's script ({'as it is in the post' if POSTS else 'in our words'}) from nothing")
        first = seconds(lambda: seed.five_steps(folder / "seed", script, OUTPUTS, theirs.ssh_config()))
        say(f"it took {first:.0f} s; again")
        second = seconds(lambda: seed.five_steps(folder / "seed", script, OUTPUTS, theirs.ssh_config()))
        say(f"it took {second:.0f} s")
    again = [second] * COUNT
    return Result(
        [
            Row(
                "three artifacts from nothing, armhf",
                "the seed's first",
                [cold.wall],
                [first],
                Goal("ratio", 1 / 6),
                note=NOTE,
            ),
            Row("nothing changed", "the seed's second", unchanged, again, Goal("ratio", 1 / 500), note=NOTE),
            Row(
                "one buildscript changed (umtprd)", "the seed's second", edited, again, Goal("ratio", 1 / 6), note=NOTE
            ),
            Row("doit clean && doit", "", fetched, goal=Goal("most", 3.0)),
            Row("doit clean && doit", "the seed's second", fetched, again, note=NOTE),
        ],
        [cold, run, fetching],
    )


@contextlib.contextmanager
def upstreams(folder: Path) -> Iterator[str]:
    """Serve the three upstream repositories at the commits that dodo.py pins. Yield a gitconfig that redirects to them.

    They are cloned from GitHub, or from the location in the environment variable UPSTREAMS: a URL prefix or a folder.
    """
    origin = os.environ.get("UPSTREAMS", UPSTREAM).rstrip("/")
    for source in (dict(UMTP.options)["git"], LIBUSBGX, GT):
        assert isinstance(source, Git)
        path = source.url.removeprefix(UPSTREAM)
        mirror = folder / path
        checked(["git", "clone", "--quiet", "--bare", f"{origin}/{path}", str(mirror)])
        checked(["git", "-C", str(mirror), "update-ref", "refs/heads/pinned", source.rev])
        checked(["git", "-C", str(mirror), "symbolic-ref", "HEAD", "refs/heads/pinned"])
    port = free_port()
    daemon = subprocess.Popen(
        ["git", "daemon", "--export-all", "--listen=127.0.0.1", f"--port={port}", f"--base-path={folder}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f'[url "git://127.0.0.1:{port}/"]\n\tinsteadOf = {UPSTREAM}\n'
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(daemon.pid, 15)
        daemon.wait()


def say(text: str) -> None:
    """Print a progress message."""
    print(f"   {time.strftime('%H:%M:%S')} {text}", flush=True)


def _doit(project: Project, *arguments: str) -> float:
    return seconds(lambda: project.doit(*arguments, timeout=7200).ok())


def _edited(project: Project, number: int) -> float:
    with (project.folder / "buildscripts" / "umtprd.py").open("a") as script:
        script.write(f"# edited {number}\n")
    return _doit(project, *AT_ONCE)


def _fetched(project: Project) -> float:
    project.doit("clean").ok()
    return _doit(project, *AT_ONCE)
