"""The whole way: the artifacts built for armhf, a base made, the image baked, and booted.

It fetches from GitHub, or from wherever the `insteadOf` of a file named by GIT_CONFIG_GLOBAL leads.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from card import Card
from project import Project

pytestmark = pytest.mark.slow

REPORT = """\
[Unit]
Description=Says what is in the image
After=sys-kernel-config.mount systemd-modules-load.service

[Service]
Type=oneshot
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyAMA0
ExecStart=/bin/sh -c ' \\
    sleep 5; echo; echo BEGIN; \\
    echo host: $$(hostname); \\
    gt --help; echo gt: $$?; \\
    umtprd; journalctl --boot --output=cat | grep "uMTP Responder"; \\
    stat --format="%%n %%a %%U" /usr/local/bin/umtprd; \\
    cat /proc/cmdline; cat /boot/firmware/config.txt; \\
    echo END'
ExecStopPost=/bin/systemctl poweroff --no-block

[Install]
WantedBy=multi-user.target
"""

DODO = """



def task_reporting():
    return sd_image(
        "build/gamebear.img.xz",
        output="build/reporting.img",
        contents=[file("report.service", "/etc/systemd/system/")],
        enable=["report.service"],
        cmdline=["console=ttyAMA0"],
    )
"""


@pytest.fixture(scope="module")
def project(emulation: None, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Our own project, with an image that also says on the console what is in it."""
    assert shutil.which("qemu-system-arm"), "apt install qemu-system-arm"
    project = Project(
        tmp_path_factory.mktemp("gamebear") / "project",
        home=tmp_path_factory.mktemp("home"),
        GAMEBEAR_ARCH="armhf",
        GAMEBEAR_SOURCES="debian",
        GAMEBEAR_BASE="bootstrap",
        BUILDAH_ISOLATION="chroot",
    )
    project.take("dodo.py", "buildscripts", "gamebear.lock", "image")
    project.write("report.service", REPORT)
    with (project.folder / "dodo.py").open("a") as dodo:
        dodo.write(DODO)
    return project


def test_the_baked_image_boots_and_has_the_artifacts_in_place(project: Project) -> None:
    project.doit("image", "reporting", timeout=7200).ok()
    assert project.doit("image", "reporting").ok().ran == []
    card = Card(project.folder / "build" / "gamebear.img.xz")
    card.check()
    boot = card.boot()
    assert b"dtoverlay=dwc2" in boot["config.txt"]
    console = booted(project.folder / "build" / "reporting.img", project.folder)
    said = console[console.index("BEGIN") : console.index("END")]
    assert "host: gamebear" in said
    assert "gt: 0" in said and re.search(r"usage:.*gt", said, re.IGNORECASE), said
    assert "uMTP Responder" in said
    assert "/usr/local/bin/umtprd 755 root" in said
    assert "modules-load=dwc2" in said and "dtoverlay=dwc2" in said


def booted(image: Path, folder: Path) -> str:
    """Boot an image with its own kernel, until it is off again; return what its console said."""
    boot = Card(image).boot()
    for name in ("vmlinuz", "initrd.img"):
        (folder / name).write_bytes(boot[name])
    words = boot["cmdline.txt"].decode().split()
    done = subprocess.run(
        [
            "qemu-system-arm",
            "-machine", "virt",
            "-cpu", "cortex-a15",
            "-smp", "2",
            "-m", "1024",
            "-nographic",
            "-no-reboot",
            "-kernel", folder / "vmlinuz",
            "-initrd", folder / "initrd.img",
            # A login on the console would take it away from the unit that reports there.
            "-append", " ".join([*(word for word in words if word != "console=tty1"), "systemd.getty_auto=no"]),
            "-drive", f"file={image},format=raw,if=none,id=card,snapshot=on",
            "-device", "virtio-blk-device,drive=card",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1800,
        check=False,
    )  # fmt: skip
    return done.stdout.decode("utf-8", "replace")
