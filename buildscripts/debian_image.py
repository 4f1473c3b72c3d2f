"""Create an SD-card image with Debian and its kernel, partitioned like Raspberry Pi OS: FAT for booting, ext4 as root.

It is a substitute for Raspberry Pi OS, without the non-free firmware of a Pi. It boots in QEMU, and with every boot
loader that reads the kernel from the FAT file system.
"""

import lzma
import shutil

PACKAGES = [
    "dbus",
    "dosfstools",
    "e2fsprogs",
    "fdisk",
    "initramfs-tools",
    "libconfig9",  # for libusbgx
    "mtools",
    "openssh-server",
    "sudo",
    "systemd-sysv",
    "udev",
]

# An initial RAM disk with all modules takes a quarter of an hour under emulation. These suffice to mount the root.
MODULES = "virtio_mmio virtio_pci virtio_blk mmc_block sdhci_iproc bcm2835 ext4 crc32c_generic"

FILES = {
    "etc/fstab": "LABEL=rootfs / ext4 defaults,noatime 0 1\nLABEL=BOOTFS /boot/firmware vfat defaults 0 2\n",
    "etc/hostname": "debian\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n127.0.1.1\tdebian\n",
    "etc/initramfs-tools/conf.d/modules": "MODULES=list\n",
    "etc/initramfs-tools/modules": MODULES.replace(" ", "\n") + "\n",
    "etc/machine-id": "",  # systemd creates an id at the first boot
    "etc/resolv.conf": "",
    "etc/systemd/network/80-dhcp.network": "[Match]\nName=en* eth* usb*\n\n[Network]\nDHCP=yes\n",
    "etc/systemd/system/ssh.service.d/host-keys.conf": (
        "[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\nExecStartPre=/usr/sbin/sshd -t\n"
    ),
    "tmp/boot/cmdline.txt": "console=serial0,115200 console=tty1 root=LABEL=rootfs rootfstype=ext4 rootwait\n",
    "tmp/boot/config.txt": "[all]\nkernel=vmlinuz\ninitramfs initrd.img followkernel\n",
}

MAKE = r"""
set -euo pipefail
boot_sectors=524288
mkdir -p /tmp/boot /tmp/root
tar --directory=/ --create --one-file-system --exclude=./tmp --exclude=./run \
    --exclude=./dev --exclude=./proc --exclude=./sys . |
    tar --directory=/tmp/root --extract --numeric-owner
cd /tmp/root
mkdir -p dev proc sys run tmp boot/firmware
chmod 1777 tmp
rm -f etc/ssh/ssh_host_* etc/apt/apt.conf.d/*gamebear* usr/sbin/policy-rc.d var/lib/dbus/machine-id
rm -rf var/lib/apt/lists/* var/cache/apt/*
cp boot/vmlinuz-* /tmp/boot/vmlinuz
cp boot/initrd.img-* /tmp/boot/initrd.img
ln -sf /lib/systemd/system/systemd-networkd.service etc/systemd/system/multi-user.target.wants/systemd-networkd.service
cp --recursive /tmp/files/. /tmp/root/
mv tmp/boot/* /tmp/boot/
rmdir tmp/boot

used=$(du --summarize --block-size=1M . | cut --fields=1)
root_sectors=$(((used + used / 4 + 64) * 2048))
truncate --size=$(((8192 + boot_sectors + root_sectors) * 512)) /tmp/image
sfdisk --quiet /tmp/image <<TABLE
label: dos
label-id: 0x67616d65
start=8192, size=$boot_sectors, type=c
start=$((8192 + boot_sectors)), size=$root_sectors, type=83
TABLE
truncate --size=$((boot_sectors * 512)) /tmp/boot.fat
mkfs.fat -F 32 -n BOOTFS -i 67616d65 /tmp/boot.fat
mcopy -i /tmp/boot.fat /tmp/boot/* ::
dd if=/tmp/boot.fat of=/tmp/image bs=1M seek=4 conv=notrunc,sparse status=none
mke2fs -q -t ext4 -L rootfs -d /tmp/root -E offset=$(((8192 + boot_sectors) * 512)) /tmp/image $((root_sectors / 2))k
"""

INSTALL = r"""
set -eu
cp --recursive /tmp/files/etc/initramfs-tools /etc/
arch=$(dpkg --print-architecture)
kernel=linux-image-$(test "$arch" = armhf && echo armmp || echo "$arch")
apt-get update --quiet
DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends "$kernel"
"""

with Container(packages_image("debian:bookworm", PACKAGES)) as c:
    for name, text in FILES.items():
        path = Path("files", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    c.copy_in("files", "/tmp/files")
    c.run(["sh", "-c", INSTALL])
    c.run(["bash", "-c", MAKE])
    c.copy_out("/tmp/image", "image")

with open("image", "rb") as plain, lzma.open("debian.img.xz", "wb", preset=1) as packed:
    shutil.copyfileobj(plain, packed, 1 << 20)
