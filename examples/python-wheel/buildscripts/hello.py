"""Build the Python wheel hello."""

# Debian packages that the build needs
PACKAGES = ["python3-pip", "python3-setuptools", "python3-wheel"]

with Container(packages_image("debian:bookworm", PACKAGES)) as c:
    c.copy_in("src", "/src")
    c.run(["pip", "wheel", "--no-deps", "--wheel-dir=/wheels", "--no-build-isolation", "/src"])
    c.copy_out("/wheels", ".")
