"""Build hello with Make."""

# Debian packages that the build needs
PACKAGES = ["gcc", "libc6-dev", "make"]

with Container(packages_image("debian:bookworm", PACKAGES)) as c:
    c.copy_in("src", "/src")
    c.workdir = "/src"
    c.run("make --always-make -j$(nproc)", shell=True)
    c.copy_out("/src/hello", "hello")
