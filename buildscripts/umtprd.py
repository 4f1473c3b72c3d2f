"""Build the daemon of uMTP-Responder."""

from common import JOBS, compiler_image, take_source

with Container(compiler_image()) as c:
    take_source(c, "umtp")
    c.run(["make", JOBS, "CFLAGS=-DUSE_SYSLOG"])
    c.copy_out("/tmp/umtp/umtprd", "umtprd")
