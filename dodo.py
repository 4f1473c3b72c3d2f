"""The three artifacts for a Gamebear: umtprd, usbgx.tar and gt.tar."""

from gamebear_tasks import artifact, debian, either, git, task_builder, task_lock, task_prune, task_sources

DOIT_CONFIG = {"default_tasks": ["umtprd", "usbgx", "gt"]}

UMTP = either(
    git=git("https://github.com/viveris/uMTP-Responder.git", rev="52c38a4a756b30efecc6470b5e4d4f22f9187a45"),
    debian=debian("umtp-responder"),
)
LIBUSBGX = git("https://github.com/libusbgx/libusbgx.git", rev="664b7e6fe7f8269a774101d7625dd0a82c8aadd3")
GT = git("https://github.com/kopasiak/gt.git", rev="a425870aa14d35357dc3bd51e3233c5b7f51bbd1")


def task_umtprd():
    """uMTP-Responder: shows the Gamebear's files to a computer over USB (MTP)"""
    return artifact("buildscripts/umtprd.py", sources={"umtp": UMTP}, outputs=["build/umtprd"])


def task_usbgx():
    """libusbgx: the library that describes USB gadgets to the kernel"""
    return artifact("buildscripts/usbgx.py", sources={"libusbgx": LIBUSBGX}, outputs=["build/usbgx.tar"])


def task_gt_image():
    """what gt is built in, made while libusbgx is being built (doit -n 3)"""
    return artifact("buildscripts/gt_image.py", outputs=["build/gt-packages.txt"])


def task_gt():
    """gt: sets up USB gadgets from the command line, with its man page"""
    task = artifact("buildscripts/gt.py", sources={"gt": GT}, inputs=["build/usbgx.tar"], outputs=["build/gt.tar"])
    return {**task, "task_dep": ["gt_image"]}


__all__ = ["task_builder", "task_lock", "task_prune", "task_sources"]
