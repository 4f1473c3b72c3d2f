"""Shared by the buildscripts: images with compilers, and reproducible tar archives."""

import os
from pathlib import Path

COMPILER = ["gcc", "libc6-dev", "make", "pkgconf"]

JOBS = f"--jobs={os.cpu_count()}"
"""Option of make that uses all processors of the builder."""


def compiler_image(*further):
    """Return an image with a C compiler, make and further packages. It is created once and cached under its tag.

    A new image starts from the cached image that already has the most of its packages.
    """
    return packages_image("debian:bookworm", [*COMPILER, *further])


def autotools_image():
    """Return the image for building libusbgx."""
    return compiler_image("autoconf", "automake", "libconfig-dev", "libtool")


def gt_image():
    """Return the image for building gt."""
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
    """Copy a source into the container, and set its working folder and SOURCE_DATE_EPOCH for a reproducible build."""
    container.copy_in(name, f"/tmp/{name}")
    container.workdir = f"/tmp/{name}"
    newest = max(int(path.lstat().st_mtime) for path in Path(name).rglob("*"))
    container.environ["SOURCE_DATE_EPOCH"] = str(newest)  # https://reproducible-builds.org/specs/source-date-epoch/


def tar_usr_local(container, name):
    """Pack the container's /usr/local into a reproducible tar archive: sorted, fixed times and owners."""
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
