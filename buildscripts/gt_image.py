"""Makes the image that gt is built in, and lists what is installed in it."""

from common import gt_image

installed = gt_image().inspect()["ImageAnnotations"]["gamebear.installed"]
Path("gt-packages.txt").write_text(installed.replace(" ", "\n") + "\n")
