"""Build hello with Meson."""

# Debian packages that the build needs
PACKAGES = ["gcc", "libc6-dev", "meson", "pkgconf"]

with Container(packages_image("debian:bookworm", PACKAGES)) as c:
    c.copy_in("src", "/src")
    c.run(["meson", "setup", "--buildtype=release", "--prefix=/usr", "/build", "/src"])
    c.run(["meson", "compile", "-C", "/build"])
    c.run(["meson", "install", "-C", "/build", "--destdir", "/out"])
    c.copy_out("/out", "hello")
