"""Build the Debian package hello."""

# Debian packages that the build needs
PACKAGES = ["build-essential", "debhelper"]

with Container(packages_image("debian:bookworm", PACKAGES)) as c:
    c.copy_in("src", "/build/src")
    c.workdir = "/build/src"
    c.run(["dpkg-buildpackage", "--build=binary", "--unsigned-source", "--unsigned-changes"])
    c.run("mkdir /debs && mv ../*.deb /debs", shell=True)
    c.copy_out("/debs", ".")
