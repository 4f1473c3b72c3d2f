"""Build hello with Go."""

# Debian packages that the build needs
PACKAGES = ["ca-certificates", "golang-go"]

with Container(packages_image("debian:trixie", PACKAGES)) as c:
    c.copy_in("src", "/src")
    c.workdir = "/src"
    c.environ["CGO_ENABLED"] = "0"
    c.run(["go", "build", "-o", "/out/hello", "."])
    c.copy_out("/out/hello", "hello")
