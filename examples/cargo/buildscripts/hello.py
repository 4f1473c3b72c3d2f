"""Build hello with Cargo."""

# Debian packages that the build needs
PACKAGES = ["ca-certificates", "cargo"]

with Container(packages_image("debian:trixie", PACKAGES)) as c:
    c.copy_in("src", "/src")
    c.workdir = "/src"
    c.run(["cargo", "build", "--release", "--target-dir=/target", "--locked"])
    c.copy_out("/target/release/hello", "hello")
