"""The laboratory: a real Debian with systemd, in QEMU or in a container.

* main: the command line of `tools/vm`
* image: makes the images: packages, recipe, wheels
* cache: the directory of images and wheels; an entry is complete or absent
* qemu: boots the machine in QEMU: its input, QEMU itself, its output
* container: boots the same image as a container
* debian: the Debian packages that the commands need, and the missing packages
"""
