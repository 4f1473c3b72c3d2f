"""Build hello with autotools."""

# Debian packages that the build needs
PACKAGES = ["autoconf", "automake", "gcc", "libc6-dev", "libtool", "make", "pkgconf"]

with Container(packages_image("debian:bookworm", PACKAGES)) as c:
    c.copy_in("src", "/src")
    c.workdir = "/src"
    c.run(["autoreconf", "--install"])
    c.run(["./configure", "--prefix=/usr"])
    c.run("make clean && make -j$(nproc)", shell=True)
    c.run(["make", "install", "DESTDIR=/out"])
    c.copy_out("/out", "hello")
