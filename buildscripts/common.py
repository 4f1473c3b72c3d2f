"""What the buildscripts share: the image they build in, and tars that are the same whenever they are made."""

from pathlib import Path


def compiler_image():
    """Return an image with a C compiler and make: built once, found again by its tag."""
    return packages_image("debian:bookworm", ["gcc", "libc6-dev", "make", "pkgconf"])


def autotools_image():
    """Return the compiler's image with what libusbgx and gt are built with besides."""
    return packages_image(
        compiler_image(),
        [
            "autoconf",
            "automake",
            "cmake",
            "g++",
            "libconfig-dev",
            "libtool",
            # gt's man pages: asciidoc without TeX, which its recommended packages would bring
            "asciidoc-base",
            "docbook-xml",
            "docbook-xsl",
            "libxml2-utils",
            "xsltproc",
        ],
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
