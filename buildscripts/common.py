"""What the buildscripts share: the images they build in, and tars that are the same whenever they are made."""

import os
from pathlib import Path

COMPILER = ["gcc", "libc6-dev", "make", "pkgconf"]

JOBS = f"--jobs={os.cpu_count()}"
"""How make is to use all of the builder's processors."""


def compiler_image(*further):
    """Return an image with a C compiler, make and further packages: built once, found again by its tag.

    Each begins with the one that has most of its packages already.
    """
    return packages_image("debian:bookworm", [*COMPILER, *further])


def autotools_image():
    """Return the image that libusbgx is built in."""
    return compiler_image("autoconf", "automake", "libconfig-dev", "libtool")


def gt_image():
    """Return the image that gt is built in."""
    return compiler_image(
        "cmake",
        "g++",
        "libconfig-dev",
        # for the man pages: asciidoc without TeX, which its recommended packages include
        "asciidoc-base",
        "docbook-xml",
        "docbook-xsl",
        "libxml2-utils",
        "xsltproc",
    )


def take_source(container, name):
    """Copy a source into the container, to work on there; what asks for the time is told the source's own."""
    container.copy_in(name, f"/tmp/{name}")
    container.workdir = f"/tmp/{name}"
    newest = max(int(path.lstat().st_mtime) for path in Path(name).rglob("*"))
    container.environ["SOURCE_DATE_EPOCH"] = str(newest)  # https://reproducible-builds.org/specs/source-date-epoch/


def tar_usr_local(container, name):
    """Pack the container's /usr/local, sorted and with fixed times and owners, and leave it here as an output."""
    container.run(
        [
            "tar",
            "--create",
            f"--file=/tmp/{name}",
            "--sort=name",
            "--mtime=@0",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--format=gnu",
            "/usr/local",
        ]
    )
    container.copy_out(f"/tmp/{name}", Path(name))
