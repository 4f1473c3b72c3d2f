"""Build hello with CMake."""

# Debian packages that the build needs
PACKAGES = ["cmake", "gcc", "libc6-dev", "make"]

with Container(packages_image("debian:bookworm", PACKAGES)) as c:
    c.copy_in("src", "/src")
    c.run(["cmake", "-S", "/src", "-B", "/build", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_INSTALL_PREFIX=/usr"])
    c.run("cmake --build /build --parallel $(nproc)", shell=True)
    c.run(["cmake", "--install", "/build"], env={"DESTDIR": "/out"})
    c.copy_out("/out", "hello")
