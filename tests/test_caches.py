"""`Container.cache`: folders that persist across builds, with real containers, as root and over SSH as another user."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from project import Project, wait_for
from sshd import Account
from test_containers import Builder

from gamebear_tasks.runner.host.buildah import remove_tree
from gamebear_tasks.runner.maintenance.retained_containers import _available
from gamebear_tasks.runner.store import caches
from gamebear_tasks.runner.util.locks import Lock

pytestmark = pytest.mark.system

PROGRAMS = ("sh", "cat", "chmod", "chown", "cp", "id", "ls", "mkdir", "rm", "sleep", "true")

COUNT = """
c.run('echo x >> /c/lines; cat /c/lines', shell=True)
"""
"""Adds a line to a file of the cache in `/c`, and prints all of them."""


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """A builder with the images `tiny` and `other`."""
    folder = tmp_path_factory.mktemp("builder")
    made = Builder(folder / "store")
    tiny.fill(folder / "tiny", PROGRAMS)
    (folder / "tiny/full").mkdir()
    (folder / "tiny/full/of-the-image").touch()
    (folder / "tiny/link").symlink_to("/real")
    for name in ("tiny", "other"):
        made.buildah("from", "--name", f"make-{name}", "scratch")
        made.buildah("copy", "--quiet", f"make-{name}", str(folder / "tiny"), "/")
        made.buildah("config", "--label", f"name={name}", f"make-{name}")
        made.buildah("commit", "--quiet", "--rm", f"make-{name}", name)
    yield made
    made.buildah("rm", "--all")
    remove_tree(made.root, made.facts, made.root)


@pytest.fixture(autouse=True)
def _no_cache_yet(builder: Builder) -> None:
    shutil.rmtree(builder.root / "caches", ignore_errors=True)


def built(builder: Builder, body: str, image: str = "tiny", arch: str = "") -> str:
    """Run a script with a container `c` of an image, and return its log."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    outcome = builder.run(f"with Container({image!r}) as c:\n{lines}", arch=arch)
    assert outcome.status == 0, outcome.log + outcome.message
    return outcome.log


def test_a_cache_has_the_content_of_earlier_builds(builder: Builder) -> None:
    script = "c.cache('/c')\nc.run(['ls', '/c'])" + COUNT
    assert built(builder, script) == "x\n"
    assert built(builder, script) == "lines\nx\nx\n"


def test_a_cache_is_of_one_name_one_image_and_one_architecture(builder: Builder) -> None:
    script = "c.cache('/c')" + COUNT
    assert [built(builder, script), built(builder, script, "other"), built(builder, script)] == ["x\n", "x\n", "x\nx\n"]
    assert built(builder, "c.cache('/d')\nc.run(['ls', '/d'])") == ""
    assert built(builder, "c.cache('/d', name='/c')\nc.run(['cat', '/d/lines'])") == "x\nx\n"
    assert built(builder, "c.cache('/c', name='mine')" + COUNT) == "x\n"
    assert len({caches.key_of("/c", "i", arch) for arch in ("amd64", "i386")}) == 2


def test_containers_of_one_job_share_a_cache(builder: Builder) -> None:
    script = f"c.cache('/c'){COUNT}with Container('tiny') as c:\n    c.cache('/c')\n    c.run(['cat', '/c/lines'])"
    assert built(builder, script) == "x\nx\n"


def test_a_relative_path_starts_in_the_workdir(builder: Builder) -> None:
    built(builder, "c.workdir = '/project'\nc.cache('target')\nc.run('echo 1 > /project/target/file', shell=True)")
    assert built(builder, "c.cache('/project/target/')\nc.run(['cat', '/project/target/file'])") == "1\n"


def test_jobs_at_the_same_time_have_separate_instances(builder: Builder, tmp_path: Path) -> None:
    script = f"""
import time
with Container('tiny') as c:
    c.cache('/c')
    c.run('echo x >> /c/lines; cat /c/lines', shell=True)
    while not Path({str(tmp_path / "go")!r}).exists():
        time.sleep(0.02)
"""
    process, folder = builder.start(script)
    wait_for(lambda: (folder / "log").read_text() == "x\n")
    assert built(builder, "c.cache('/c')" + COUNT) == "x\n", "it does not see the busy one, and does not wait"
    assert built(builder, "c.cache('/c')" + COUNT) == "x\nx\n", "the second instance persists too"
    (tmp_path / "go").touch()
    assert process.wait() == 0
    assert process.stdin is not None
    process.stdin.close()
    assert built(builder, "c.cache('/c')\nc.run('echo y >> /c/lines; cat /c/lines', shell=True)") == "x\ny\n"
    assert len(caches.all_of(builder.root)) == 2


def test_a_killed_job_leaves_its_cache_to_the_next(builder: Builder) -> None:
    process, folder = builder.start("c = Container('tiny')\nc.cache('/c')" + COUNT + "c.run(['sleep', '1000'])")
    wait_for(lambda: (folder / "log").read_text() == "x\n")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()

    def is_released() -> bool:
        [instance] = caches.all_of(builder.root)
        with Lock.opened(caches.lock_file(instance)) as lock:
            return lock.acquire()

    wait_for(is_released)
    assert built(builder, "c.cache('/c')" + COUNT) == "x\nx\n"


def test_nothing_of_a_cache_is_in_an_image(builder: Builder) -> None:
    log = built(
        builder,
        """
for path in ("/new/deep/c", "/full", "/tmp"):
    c.cache(path)
    c.run(["cp", "/etc/passwd", path])
assert not Path("/new").exists()
c.run("ls /full /tmp /new/deep/c", shell=True)
for _ in range(2):
    with Container(c.commit()) as other:
        other.run("ls / /full /tmp", shell=True)
    c.run(["cat", "/new/deep/c/passwd"], stdout=-3)
""",
    )
    with_caches, first, second = log.split("bin\n")[0], *log.split("bin\n")[1:]
    assert with_caches.count("passwd") == 3 and "of-the-image" not in with_caches
    assert "passwd" not in first + second
    assert "new" not in first.split() + second.split(), "the mount point does not stay"
    assert first.count("of-the-image") == 1


def test_a_link_in_the_path_stays_inside_the_container(builder: Builder) -> None:
    assert not Path("/real").exists()
    assert built(builder, "c.cache('/link/c')\nc.run('echo 1 > /link/c/file; cat /real/c/file', shell=True)") == "1\n"
    assert not Path("/real").exists()


def test_programs_in_a_cache_run_and_another_user_may_own_it(builder: Builder) -> None:
    script = """
c.cache("/c")
c.run("cp /bin/id /c/mine; /c/mine -u; ls -ldn /c", shell=True)
try:
    c.run("echo 1 > /c/file", shell=True, user="pi", stderr=-3)
except CommandError:
    c.run(["chown", "pi:1000", "/c"])
c.run("echo 2 > /c/file; /c/mine -u; cat /c/file", shell=True, user="pi")
"""
    root, shown, user, content = built(builder, script).splitlines()
    assert (root, user, content) == ("0", "1000", "2") and shown.split()[:4:3] == ["drwxr-xr-x", "0"]
    script = "c.cache('/c')\nc.user = 'pi'\nc.run('echo 3 >> /c/file; cat /c/file', shell=True)"
    assert built(builder, script) == "2\n3\n"


@pytest.mark.parametrize("path", ["/", "/a:b", "", "/x/.."])
def test_a_folder_that_cannot_be_a_cache_is_an_error(builder: Builder, path: str) -> None:
    outcome = builder.run(f"Container('tiny').cache({path!r})\n")
    assert "script.py, line 1: ValueError: cache: " in outcome.message


def test_a_file_in_the_place_of_a_cache_is_an_error(builder: Builder) -> None:
    outcome = builder.run("Container('tiny').cache('/etc/passwd')\n")
    assert "script.py, line 1: NotADirectoryError" in outcome.message


def test_a_shell_in_a_retained_container_has_the_cache_only_while_no_job_uses_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    held = caches.acquire(tmp_path, caches.key_of("/c", "image", "amd64"))
    options = ["--volume", f"{held.files}:/c", "--volume", f"{tmp_path}:/d", "--volume", f"{tmp_path}/gone:/e"]
    kept, locks = _available(options, tmp_path)
    assert kept == ["--volume", f"{tmp_path}:/d"]
    said = capfd.readouterr().err
    assert f"{held.files} is not mounted: a job uses it" in said and "gone is not mounted: it no longer exists" in said
    held.release()
    kept, locks = _available(options, tmp_path)
    assert kept == options[:4]
    again = caches.acquire(tmp_path, caches.key_of("/c", "image", "amd64"))
    assert again.files != held.files, "the shell holds it"
    again.release()
    for lock in locks:
        lock.release()


ROOTLESS = """
with Container("scratch") as c:
    c.copy_in({tree!r}, "/")
    c.cache("/c")
    c.run("ls -ldn /c; echo x >> /c/lines; cat /c/lines; cp /bin/id /c; /c/id -u", shell=True)
    c.run("mkdir -p /c/theirs; echo 1 > /c/theirs/file; chown -R pi /c/theirs; chmod 700 /c/theirs", shell=True)
    c.run("cat /c/theirs/file; echo 2 > /c/theirs/file", shell=True, user="pi")
open("out", "w").write("{number}")
"""


def test_an_ordinary_user_of_the_builder_has_caches_too(
    remote_project: Project, account: Account, tmp_path: Path
) -> None:
    tree = account.home / f"tiny-{os.urandom(4).hex()}"
    tiny.fill(tree, PROGRAMS)
    remote_project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\ndef task_x():\n    return artifact('x.py', outputs=['build/out'])\n",
    )
    logs = []
    for number in range(2):
        remote_project.write("x.py", ROOTLESS.format(tree=str(tree), number=f"{number}-{os.urandom(4).hex()}"))
        remote_project.doit("x").ok()
        logs.append((remote_project.folder / "build/logs/x.log").read_text())
    store = account.home / ".cache/gamebear/v1"
    [instance] = [path for path in caches.all_of(store) if (path / "files/theirs").exists()]
    assert ["0" in log.splitlines() for log in logs] == [True, True], "root in the container"
    assert [log.splitlines().count("x") for log in logs] == [1, 2]
    assert (instance / "files").stat().st_uid == (instance / "files/lines").stat().st_uid == account.uid
    assert (instance / "files/theirs").stat().st_uid not in (0, account.uid)
    os.utime(instance, (1, 1))
    assert "removed" in remote_project.gamebear("prune", "--older", "9").ok().out
    assert not instance.exists()
