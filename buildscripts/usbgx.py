"""Build libusbgx, and pack the files that it installs in /usr/local."""

from common import JOBS, autotools_image, take_source, tar_usr_local

with Container(autotools_image()) as c:
    take_source(c, "libusbgx")
    # Equivalent to `autoreconf -i`, which runs the first two twice
    c.run(["libtoolize", "--copy"])
    c.run(["aclocal", "-I", "m4"])
    c.run(["autoconf"])
    c.run(["automake", "--add-missing", "--copy"])
    # configure requires a C++ compiler, but nothing is compiled with it
    c.run(["./configure", "--disable-dependency-tracking", "CXX=no"])
    c.run(["make", JOBS, "install"])
    tar_usr_local(c, "usbgx.tar")
