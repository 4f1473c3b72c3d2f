"""Create the pictures of `gamebear report`: build the three artifacts, break one, render the page in a browser.

`python3 docs/pictures/report.py FOLDER` builds in a new folder; builder and architecture are those of the settings
(GAMEBEAR_BUILDER, GAMEBEAR_ARCH). If FOLDER exists, only the pictures are created again. Requires the Python packages
of the tests, and Debian's chromium-headless-shell.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from browser import Browser  # noqa: E402
from PIL import Image  # noqa: E402 - a dependency of matplotlib

PARTS = ("dodo.py", "gamebear.lock", "pyproject.toml", "buildscripts", "image")
"""Files of the project that the builds need."""


def lay(folder: Path) -> None:
    """Copy the project into a new folder."""
    folder.mkdir(parents=True)
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, folder / name)


def build(folder: Path) -> None:
    """Run doit twice: a first build; then with one artifact missing and an error in a script."""
    doit = [sys.executable, "-m", "doit"]
    parallel = ["--continue", "-n", "3", "-P", "thread"]
    subprocess.run([*doit, *parallel], cwd=folder, check=True)
    (folder / "build" / "gt.tar").unlink()
    script = folder / "buildscripts" / "umtprd.py"
    script.write_text(script.read_text("utf-8").replace("-DUSE_SYSLOG", "-DUSE_SYSLOG -Wunused"), "utf-8")
    script.write_text(script.read_text("utf-8").replace("/tmp/umtp/umtprd", "/tmp/umtp/umtpd"), "utf-8")
    subprocess.run([*doit, *parallel], cwd=folder, check=False)


def take_pictures(page: Path, folder: Path) -> None:
    """Render the page in a browser: wide and light, wide and dark with one task unfolded, narrow."""
    second = "document.querySelectorAll('.run')[1]"
    with Browser() as browser:
        browser.open(page, 1120)
        browser.value(f"{second}.open = true")
        height = int(browser.value("document.documentElement.scrollHeight"))
        browser.open(page, 1120, height)
        browser.value(f"{second}.open = true")
        _picture(browser, folder / "report.png")
        browser.open(page, 1120, 560, dark=True)
        browser.value(f"{second}.open = true")
        browser.value(f"{second}.querySelector('.log').open = true")
        browser.value(f"{second}.scrollIntoView()")
        _picture(browser, folder / "report-dark.png")
        browser.open(page, 360, 1000)
        browser.value("document.querySelector('.run').scrollIntoView()")
        _picture(browser, folder / "report-narrow.png")


def _picture(browser: Browser, path: Path) -> None:
    """Write a screenshot, with few colours so that the file is small."""
    browser.picture(path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


if __name__ == "__main__":
    there = Path(sys.argv[1])
    if not there.exists():
        lay(there)
        build(there)
    subprocess.run([sys.executable, "-m", "gamebear_tasks", "report"], cwd=there, check=True)
    take_pictures(there / "build" / "report.html", Path(__file__).parent)
