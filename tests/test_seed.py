"""The unchanged script of the original blog post is a valid buildscript; here with substitute upstreams."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT, Project
from upstreams import stand_ins

pytestmark = pytest.mark.system

POSTS = sorted(ROOT.parent.glob("shared/seed/*.txt"))
"""The blog post, if it is beside the checkout. It belongs to its author and is not part of this project."""

# The steps of the post, rewritten: a computed tag, looked up and created; three containers of one image; `__file__`;
# outputs of one container that are inputs of another.
IN_ITS_MANNER = """\
#!/usr/bin/env buildahscript-py
import hashlib
from pathlib import Path

here = Path(__file__).resolve().parent
packages = ["git", "libc-dev", "gcc", "g++", "make", "pkgconf", "libconfig-dev",
            "autoconf", "libtool", "cmake", "asciidoc"]
tag = "gamebear-build:" + hashlib.sha256(" ".join(packages).encode()).hexdigest()
try:
    image = Image(tag)
except ImageNotFoundError:
    with Container("arm32v7/debian") as container:
        container.run(["apt-get", "update", "-y"])
        container.run(["apt-get", "install", "-y", *packages])
        image = container.commit()
        image.add_tag(tag)

with Container(image) as container:
    container.run(["git", "clone", "https://github.com/viveris/uMTP-Responder.git", "/src"])
    container.workdir = "/src"
    container.run(["make", 'CFLAGS="-DUSE_SYSLOG"'])
    container.copy_out("/src/umtprd", "umtprd")

with Container(image) as container:
    container.run(["git", "clone", "https://github.com/libusbgx/libusbgx.git", "/src"])
    container.workdir = "/src"
    for command in (["autoreconf", "-i"], ["./configure"], ["make"], ["make", "install"]):
        container.run(command)
    container.run(["tar", "caf", "/usbgx.tar", "/usr/local"])
    container.copy_out("/usbgx.tar", here / "usbgx.tar")

with Container(image) as container:
    container.copy_in("usbgx.tar", "/usbgx.tar")
    container.run(["tar", "xaf", "/usbgx.tar"])
    container.run(["git", "clone", "https://github.com/kopasiak/gt.git", "/src"])
    container.workdir = "/src"
    container.run(["cmake", "-DCMAKE_INSTALL_PREFIX=/usr/local/", "./source/"])
    container.run(["make"])
    container.run(["make", "install"])
    container.run(["tar", "caf", "/gt.tar", "/usr/local"])
    container.copy_out("/gt.tar", here / "gt.tar")
"""

# The packages that the script installs under its computed tag take long; these are enough for the substitutes.
PREPARE = """\
import hashlib

PACKAGES = ["git", "libc-dev", "gcc", "g++", "make", "pkgconf", "libconfig-dev"]
PACKAGES += ["autoconf", "libtool", "cmake", "asciidoc"]
tag = "gamebear-build:" + hashlib.sha256(" ".join(PACKAGES).encode("utf-8")).hexdigest()
enough = ["git", "ca-certificates", "gcc", "libc6-dev", "make", "autoconf", "automake", "libtool", "cmake"]
image = packages_image("debian:bookworm", enough)
with Container(image) as c:
    for name in ("viveris", "libusbgx", "kopasiak"):
        c.run(["git", "config", "--system", "url.git://127.0.0.1:{port}/" + name + "/.insteadOf",
               "https://github.com/" + name + "/"])
    c.commit().add_tag(tag)
open("tag", "w").write(tag)
"""

DODO = """
from gamebear_tasks import artifact

def task_prepare():
    return artifact("prepare.py", outputs=["build/tag"])

def task_seed():
    task = artifact("buildscript.py", outputs=["build/umtprd", "build/usbgx.tar", "build/gt.tar"])
    task["task_dep"] = ["prepare"]
    return task
"""


@pytest.fixture
def upstreams(tmp_path: Path) -> Iterator[int]:
    """Serve the substitutes with git daemon. Yield its port."""
    with stand_ins(tmp_path / "srv") as (port, _):
        yield port


def the_script_in_the_post() -> str:
    text = POSTS[-1].read_text("utf-8")
    return str(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1])


@pytest.mark.parametrize("whose", ["ours", "the post's"])
def test_the_seeds_script_is_one_job_with_three_outputs(remote_project: Project, upstreams: int, whose: str) -> None:
    if whose == "the post's" and not POSTS:
        pytest.skip("the post is not beside this checkout")
    script = IN_ITS_MANNER if whose == "ours" else the_script_in_the_post()
    remote_project.environment["GAMEBEAR_BASE"] = "bootstrap"
    remote_project.write("dodo.py", DODO)
    remote_project.write("prepare.py", PREPARE.replace("{port}", str(upstreams)))
    remote_project.write("buildscript.py", script)
    run = remote_project.doit("seed").ok()
    assert run.ran == ["prepare", "seed"]
    build = remote_project.folder / "build"
    assert os.access(build / "umtprd", os.X_OK)
    with tarfile.open(build / "usbgx.tar") as tar:
        assert "usr/local/lib/libusbgx.so" in tar.getnames()
    with tarfile.open(build / "gt.tar") as tar:
        assert {"usr/local/bin/gt", "usr/local/lib/libusbgx.so"} <= set(tar.getnames())
    assert remote_project.doit("seed").ok().ran == []
