"""Bootstrap Debian base images on the builder from its own apt mirror, verified with Debian's keys."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from ..host.arch import ARCHITECTURE_ANNOTATION, PLATFORMS
from ..host.buildah import Buildah, BuildahError, ImageError, NoRoomError
from ..host.subprocesses import last_lines, streamed
from ..util.free_space import is_full
from .apt_sources import Archive, distribution_for, extra_archives, keyrings_for, main_archive


def tag_of(suite: str, arch: str) -> str:
    """Return the name of a bootstrapped base in the image store."""
    return f"gamebear-base:{distribution_for(arch)}-{suite}-{arch}"


def bootstrap(buildah: Buildah, suite: str, arch: str) -> str:
    """Install Debian's minimal system into a new image and return the image's id.

    mmdebstrap is tried first, debootstrap is the fallback.

    Raises:
        ImageError: The bootstrap failed; a NoRoomError if the disk is full.
    """
    distribution = distribution_for(arch)
    tools = [tool for tool in ("mmdebstrap", "debootstrap") if shutil.which(tool, path=buildah.environment["PATH"])]
    if not tools:
        raise ImageError(
            "mmdebstrap and debootstrap are not installed on the builder.", "Run there: sudo apt install mmdebstrap"
        )
    main = main_archive(suite, distribution)
    keyrings = keyrings_for(main, distribution)
    all_archives = [main, *extra_archives(main, arch)]
    failures: list[str] = []
    tree = None
    for tool in tools:
        container = f"{buildah.prefix}base-{os.urandom(4).hex()}"
        print(f"Bootstrapping {distribution} {suite} for {arch} from {main.uri} with {tool}", flush=True)
        started = time.monotonic()
        try:
            buildah("from", "--name", container, "scratch")
            tree = Path(buildah("mount", container).strip())
            if tool == "mmdebstrap":
                status, said = _mmdebstrap(buildah, tree, main, all_archives, keyrings, arch)
            elif Path(keyrings[0]).is_file():
                status, said = _debootstrap(buildah, tree, main, keyrings[0], arch)
            else:
                status, said = 1, "debootstrap needs a keyring in one file"
            if status:
                if is_full(tree) or buildah.is_disk_full():
                    raise _no_room(distribution, suite, arch)
                errors = "\n".join(line for line in said.splitlines() if line.startswith("E: "))
                failures.append(f"{tool} failed with status {status}: {last_lines(errors or said, 2)}")
                continue
            _finish(tree, all_archives)
            buildah("umount", container)
            identity = _commit(buildah, container, main, distribution, arch)
        except (BuildahError, OSError) as error:
            if buildah.is_disk_full() or (tree is not None and is_full(tree)):
                raise _no_room(distribution, suite, arch) from error
            failures.append(str(error))
            continue
        finally:
            with contextlib.suppress(BuildahError):
                buildah("rm", container)
        print(f"Bootstrapped in {time.monotonic() - started:.0f} s", flush=True)
        return identity
    raise ImageError(
        "; ".join(failures), f"Check that the builder reaches {main.uri}, and that it has {main.suite} for {arch}."
    )


def _no_room(distribution: str, suite: str, arch: str) -> NoRoomError:
    return NoRoomError(
        f"{distribution} {suite} for {arch} cannot be bootstrapped: the disk is full.",
        "Free 500 MB on the builder: gamebear prune --older 30",
    )


def _mmdebstrap(
    buildah: Buildah, tree: Path, main: Archive, all_archives: list[Archive], keyrings: list[str], arch: str
) -> tuple[int, str]:
    # Installs directly into the mounted container, in "root" mode. Inside the user namespace this mode detects that
    # device nodes cannot be created, and skips them. mmdebstrap's check for qemu reads a /proc without binfmt_misc, so
    # it is skipped.
    command = [
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        f"--architectures={arch}",
        "--format=directory",
        "--skip=check/qemu",
        *(f"--keyring={keyring}" for keyring in keyrings),
        "--aptopt=Acquire::Retries 3",
        "--aptopt=Acquire::http::Timeout 30",
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=force-unsafe-io",
        main.suite,
        str(tree),
        *(archive.line() for archive in all_archives),
    ]
    return streamed(command, buildah.environment)


def _debootstrap(buildah: Buildah, tree: Path, main: Archive, keyring: str, arch: str) -> tuple[int, str]:
    # With container=lxc, debootstrap bind-mounts the host's device nodes where it cannot create its own, which is not
    # possible in a user namespace.
    command = [
        "debootstrap",
        "--variant=minbase",
        f"--arch={arch}",
        f"--keyring={keyring}",
        f"--components={','.join(main.components)}",
        main.suite,
        str(tree),
        main.uri,
    ]
    return streamed(command, {**buildah.environment, "container": "lxc"})


def _finish(tree: Path, all_archives: list[Archive]) -> None:
    """Make a bootstrapped tree equivalent to Docker's images: no started services, no caches, no builder state."""
    for name in ("dev", "proc", "run", "sys", "tmp", "var/cache/apt/archives", "var/lib/apt/lists"):
        for path in (tree / name).iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    for name in ("pkgcache.bin", "srcpkgcache.bin"):
        (tree / "var/cache/apt" / name).unlink(missing_ok=True)
    for name in ("etc/hostname", "etc/resolv.conf", "var/log/bootstrap.log"):
        (tree / name).unlink(missing_ok=True)
    texts = {
        "etc/apt/sources.list": "".join(f"{archive.line()}\n" for archive in all_archives),
        "etc/apt/apt.conf.d/99mmdebstrap": None,
        "etc/apt/apt.conf.d/99gamebear": 'Acquire::Languages "none";\nAcquire::Retries "3";\n',
        "etc/dpkg/dpkg.cfg.d/99mmdebstrap": None,
        "etc/dpkg/dpkg.cfg.d/99gamebear": "force-unsafe-io\n",
        "usr/sbin/policy-rc.d": "#!/bin/sh\nexit 101\n",
        "etc/machine-id": "",
    }
    for name, text in texts.items():
        (tree / name).unlink(missing_ok=True)
        if text is not None:
            (tree / name).write_text(text)
            (tree / name).chmod(0o755 if name.startswith("usr/sbin/") else 0o644)


def _commit(buildah: Buildah, container: str, main: Archive, distribution: str, arch: str) -> str:
    wanted, variant = PLATFORMS[arch]
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    said = {
        "gamebear.base": f"{distribution} {main.suite}",
        "gamebear.mirror": main.uri,
        "gamebear.suite": main.suite,
        "gamebear.date": made,
        ARCHITECTURE_ANNOTATION: arch,
    }
    options = ["--os", "linux", "--arch", wanted, "--cmd", "bash"]
    options += ["--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    # The buildah of Debian 11 cannot record the variant; an ARM image without one counts as armhf.
    if variant and "--variant" in buildah("config", "--help"):
        options += ["--variant", variant]
    for key, value in said.items():
        options += ["--annotation", f"{key}={value}", "--label", f"{key}={value}"]
    buildah("config", *options, container)
    print("Committing the image", flush=True)
    return buildah("commit", "--quiet", container, tag_of(main.suite, arch)).strip().rpartition(":")[2]
