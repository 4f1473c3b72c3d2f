"""The artifacts for a Gamebear, umtprd, usbgx.tar and gt.tar, and an SD-card image that contains them."""

import os
from pathlib import Path

from gamebear_tasks import (
    artifact,
    debian,
    either,
    file,
    git,
    live,
    sd_image,
    tar,
    user,
)

DOIT_CONFIG = {"default_tasks": ["umtprd", "usbgx", "gt"], "reporter": live}

UMTP = either(
    git=git("https://github.com/viveris/uMTP-Responder.git", rev="52c38a4a756b30efecc6470b5e4d4f22f9187a45"),
    debian=debian("umtp-responder"),
)
LIBUSBGX = git("https://github.com/libusbgx/libusbgx.git", rev="664b7e6fe7f8269a774101d7625dd0a82c8aadd3")
GT = git("https://github.com/kopasiak/gt.git", rev="a425870aa14d35357dc3bd51e3233c5b7f51bbd1")

MY_KEYS = sorted(Path(os.path.expanduser("~/.ssh")).glob("id_*.pub"))
"""Public SSH keys that can log in to the image: those of the user who bakes it."""


def task_umtprd():
    """uMTP-Responder: access the Gamebear's files over USB (MTP)"""
    return artifact("buildscripts/umtprd.py", sources={"umtp": UMTP}, outputs=["build/umtprd"])


def task_usbgx():
    """libusbgx: library that configures USB gadgets"""
    return artifact("buildscripts/usbgx.py", sources={"libusbgx": LIBUSBGX}, outputs=["build/usbgx.tar"])


def task_gt_image():
    """image with gt's build dependencies, created in parallel to libusbgx with doit -n 3"""
    return artifact("buildscripts/gt_image.py", outputs=["build/gt-packages.txt"])


def task_gt():
    """gt: command line for USB gadgets, with its man page"""
    task = artifact("buildscripts/gt.py", sources={"gt": GT}, inputs=["build/usbgx.tar"], outputs=["build/gt.tar"])
    return {**task, "task_dep": ["gt_image"]}


def task_base_image():
    """SD-card image with Debian and its kernel, as a substitute for Raspberry Pi OS"""
    return artifact("buildscripts/debian_image.py", outputs=["build/debian.img.xz"])


def task_image():
    """SD-card image with all artifacts"""
    return sd_image(
        "build/debian.img.xz",
        output="build/gamebear.img.xz",
        contents=[
            file("build/umtprd", "/usr/local/bin/"),
            tar("build/usbgx.tar"),
            tar("build/gt.tar"),
            file("image/gadget.conf", "/etc/modules-load.d/"),
            file("image/gt.conf", "/etc/gt/"),
            file("image/ldconfig.service", "/etc/systemd/system/"),
        ],
        config=["dtoverlay=dwc2"],
        cmdline=["modules-load=dwc2"],
        enable=["ldconfig.service"],
        hostname="gamebear",
        user=user("bear", authorized_keys=MY_KEYS),
    )
