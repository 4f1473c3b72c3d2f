"""Build gt against libusbgx, and pack /usr/local with both and gt's man pages."""

from common import JOBS, gt_image, take_source, tar_usr_local

with Container(gt_image()) as c:
    c.copy_in("usbgx.tar", "/tmp/usbgx.tar")
    c.run(["tar", "--extract", "--file=/tmp/usbgx.tar", "--directory=/"])
    take_source(c, "gt")
    c.run(["cmake", "-DCMAKE_INSTALL_PREFIX=/usr/local/", "./source/"])
    c.run(["make", JOBS, "install"])
    # CMake installs the man pages below the prefix's own usr/: https://github.com/kopasiak/gt/issues/15
    c.run("cp --archive /usr/local/usr/share/. /usr/local/share/ && rm --recursive /usr/local/usr", shell=True)
    tar_usr_local(c, "gt.tar")
