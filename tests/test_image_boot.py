"""End to end, in a quarter of an hour: build artifacts for armhf, create a base, bake an image and boot it.

    pytest -m slow tests/test_image_boot.py

It fetches from GitHub, or from the location set by git's `insteadOf`, and needs `apt install qemu-system-arm`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from card import Card
from project import ROOT, Project

from gamebear_tasks.records.task_record import Record
from gamebear_tasks.util.text import size

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


LONGEST = 1800.0
"""Seconds within which an emulated machine must boot, report its contents and power off."""


@pytest.fixture(scope="module")
def needed() -> None:
    """Fail early with a list of the missing prerequisites."""
    if not shutil.which("qemu-system-arm"):
        pytest.fail("The baked image boots in QEMU, which is not here: apt install qemu-system-arm.", pytrace=False)
    for url in re.findall(r'^\w+ = git\("(https://[^"]+)"', (ROOT / "dodo.py").read_text(), re.MULTILINE):
        asked = subprocess.run(
            ["git", "ls-remote", "--quiet", url, "HEAD"], capture_output=True, text=True, check=False
        )
        if asked.returncode != 0:
            site = "/".join(url.split("/")[:3])
            pytest.fail(
                f"This test builds what is at {url}, and git cannot read it: {' '.join(asked.stderr.split())}. With"
                f" clones of it and of the others that dodo.py has from there, this one in"
                f" /MIRROR/{url.removeprefix(f'{site}/')}, only Debian's packages come from the network:"
                f" GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=url./MIRROR/.insteadOf GIT_CONFIG_VALUE_0={site}/"
                f" pytest -m slow tests/test_image_boot.py",
                pytrace=False,
            )


@pytest.fixture(scope="module")
def project(needed: None, emulation: None, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """This project, with an image that also reports its contents on the console."""
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


def test_the_baked_image_boots_and_has_the_artifacts_in_place(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    build = project.folder / "build"
    begun = time.monotonic()
    project.doit("image", "reporting", timeout=7200).ok()
    built = time.monotonic() - begun
    assert project.doit("image", "reporting").ok().ran == []
    card = Card(build / "gamebear.img.xz")
    card.check()
    boot = card.boot()
    assert b"dtoverlay=dwc2" in boot["config.txt"]
    console, booting = booted(build / "reporting.img", project.folder)
    found = re.search("^BEGIN\n(.*)^END\n", console, re.MULTILINE | re.DOTALL)
    assert found, f"the machine did not say what is in it:\n{console[-4000:]}"
    output = found[1]
    assert "host: gamebear" in output
    assert "gt: 0" in output and re.search(r"usage:.*gt", output, re.IGNORECASE), output
    assert "uMTP Responder" in output
    assert "/usr/local/bin/umtprd 755 root" in output
    assert "modules-load=dwc2" in output and "dtoverlay=dwc2" in output
    with capsys.disabled():
        print(f"\n{figures(build, built, booting)}")


def figures(build: Path, built: float, booting: float) -> str:
    """Return all durations, and the sizes of the images."""
    begun = time.monotonic()
    shutil.copyfile(build / "reporting.img", build / "copy.img")
    copying = time.monotonic() - begun
    records = {name: Record.read(build / "logs" / f"{name}.json") for name in ("image", "reporting")}
    seconds = {name: {phase.name: 0.0 for phase in record.phases} for name, record in records.items() if record}
    for name, record in records.items():
        for phase in record.phases if record else ():
            seconds[name][phase.name] += phase.seconds
    bakings = "; ".join(
        f"{name} baked in {sum(parts.values()):.1f} s"
        f" (unpack {parts['unpack']:.1f}, compress {parts.get('compress', 0):.1f})"
        for name, parts in seconds.items()
    )
    image, packed = ((build / name).stat().st_size for name in ("reporting.img", "gamebear.img.xz"))
    return (
        f"all made in {built:.0f} s; {bakings}; copied once in {copying:.1f} s; {size(image)}, {size(packed)} as xz;"
        f" up after {booting:.0f} s"
    )


def booted(image: Path, folder: Path) -> tuple[str, float]:
    """Boot an image with its own kernel, until it is off again.

    Returns:
        What its console output, with plain line ends, and the seconds until it output what is in it.
    """
    boot = Card(image).boot()
    for name in ("vmlinuz", "initrd.img"):
        (folder / name).write_bytes(boot[name])
    words = boot["cmdline.txt"].decode().split()
    machine = subprocess.Popen(
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
    )  # fmt: skip
    begun = time.monotonic()
    up = 0.0
    lines = []
    patience = threading.Timer(LONGEST, machine.kill)
    patience.start()
    try:
        assert machine.stdout
        for line in machine.stdout:
            lines.append(line.decode("utf-8", "replace").replace("\r", ""))
            if lines[-1] == "BEGIN\n":
                up = time.monotonic() - begun
    finally:
        patience.cancel()
        machine.kill()
        machine.wait()
    return "".join(lines), up
