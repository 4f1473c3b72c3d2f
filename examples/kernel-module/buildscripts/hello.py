"""Build the kernel module hello."""

# Debian packages that the build needs
PACKAGES = ["linux-headers-amd64", "make"]

with Container(packages_image("debian:bookworm", PACKAGES)) as c:
    c.copy_in("src", "/src")
    c.run("make -C /lib/modules/*-amd64/build M=/src clean modules", shell=True)
    c.run("mkdir /modules && find /src -name '*.ko' -exec cp {} /modules ';'", shell=True)
    c.copy_out("/modules", ".")
