"""Ctrl-C in any phase of a build stops the job on the builder; a second Ctrl-C exits at once."""

from __future__ import annotations

import signal
import subprocess

import pytest
from project import OUR_FRAMES, wait_for
from proxy import DOWN, UP, Cut
from remote import MAKES_BIG, MIB, Remote, big_input

pytestmark = pytest.mark.system


def interrupted(client: subprocess.Popen[bytes], remote: Remote) -> str:
    """Press Ctrl-C, wait until doit exits, and return its output."""
    client.send_signal(signal.SIGINT)
    assert client.wait(60) != 0
    output = remote.output()
    assert not OUR_FRAMES.search(output.partition("KeyboardInterrupt")[0]), output
    return output


def test_during_an_upload_no_job_starts_and_the_next_doit_resumes_the_upload(remote: Remote) -> None:
    expected = big_input(remote)
    remote.proxy.cut_next(Cut(UP, 2 * MIB, "stall"))
    client = remote.project.start()
    wait_for(lambda: remote.proxy.passed[UP] >= 2 * MIB)
    interrupted(client, remote)
    assert not remote.target.exists()
    assert remote.builds == 0
    remote.project.doit().ok()
    assert remote.target.read_text() == expected
    assert remote.proxy.passed[UP] < 6 * MIB, "what had arrived was not sent again"
    remote.assert_nothing_is_left()


@pytest.mark.parametrize("mode", [(), ("-n", "2"), ("-n", "2", "-P", "thread")], ids=["serial", "processes", "threads"])
def test_during_a_build_the_job_is_stopped_on_the_builder(remote: Remote, mode: tuple[str, ...]) -> None:
    remote.waits()
    client = remote.project.start(*mode)
    wait_for(lambda: "begin" in remote.output())
    assert "cancelling x on" in interrupted(client, remote)
    assert not remote.target.exists()
    remote.assert_nothing_is_left()
    remote.go()
    remote.project.doit().ok()


def test_during_a_download_no_target_is_installed_and_the_next_doit_resumes(remote: Remote) -> None:
    remote.write(MAKES_BIG)
    remote.project.doit("list").ok()
    remote.proxy.cut_next(Cut(DOWN, 2 * MIB, "stall"))
    client = remote.project.start()
    wait_for(lambda: any(part.stat().st_size >= MIB for part in remote.target.parent.glob(".*.part")))
    interrupted(client, remote)
    assert not remote.target.exists()
    remote.project.doit().ok()
    assert remote.target.stat().st_size == 4 * MIB
    assert remote.proxy.passed[DOWN] < 6 * MIB, "what had arrived was not fetched again"
    assert remote.builds == 1
    remote.assert_nothing_is_left()


def test_twice_exits_immediately_and_reports_possible_leftovers(remote: Remote) -> None:
    remote.waits()
    client = remote.project.start()
    wait_for(lambda: "begin" in remote.output())
    remote.proxy.stall()
    client.send_signal(signal.SIGINT)
    wait_for(lambda: "cancelling x on" in remote.output())
    output = interrupted(client, remote)
    assert "x may still run on ssh://" in output
    remote.proxy.cut()
    remote.proxy.go_on()
    remote.go()
    remote.project.doit().ok()
    assert remote.target.read_text() == "made"


EIGHT = """
from gamebear_tasks import artifact

def task_x():
    for number in range(8):
        yield {"name": str(number), **artifact("x.py", outputs=[f"build/{number}/x"], args={"n": number})}
"""


def test_with_more_threads_than_sessions_all_jobs_are_stopped(remote: Remote) -> None:
    remote.waits(before="#| arg: n: int\nprint('begin', flush=True)")
    remote.project.write("dodo.py", EIGHT)
    client = remote.project.start("-n", "8", "-P", "thread")
    wait_for(lambda: "begin" in remote.output() and remote.output().count("waiting for a free slot") == 7)
    interrupted(client, remote)
    remote.assert_nothing_is_left()


def test_right_after_the_start_of_a_job_it_is_stopped(remote: Remote) -> None:
    remote.waits()
    remote.project.doit("list").ok()
    remote.write("open('x', 'w').write('made')")
    remote.project.doit().ok()  # the runner is already uploaded, so the next connection transfers little
    remote.waits()
    client = remote.project.start()
    jobs = remote.store / "jobs"
    before = len(list(jobs.iterdir()))
    wait_for(lambda: len(list(jobs.iterdir())) > before)
    interrupted(client, remote)
    remote.assert_nothing_is_left()
