"""Builds libusbgx and packs what it installs in /usr/local."""

from common import autotools_image, take_source, tar_usr_local

with Container(autotools_image()) as c:
    take_source(c, "libusbgx")
    c.run(["autoreconf", "-i"])
    c.run(["./configure"])
    c.run(["make"])
    c.run(["make", "install"])
    tar_usr_local(c, "usbgx.tar")
