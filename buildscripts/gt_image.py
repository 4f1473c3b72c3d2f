"""Create the image for building gt, and list its packages."""

from common import gt_image

installed = gt_image().inspect()["ImageAnnotations"]["gamebear.installed"]
Path("gt-packages.txt").write_text(installed.replace(" ", "\n") + "\n")
