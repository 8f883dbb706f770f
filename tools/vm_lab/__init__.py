"""The laboratory: a real Debian with systemd, in QEMU or in a container.

* main: the command line of `tools/vm`
* image: how the images are made: packages, recipe, wheels
* cache: what is kept outside the tree: made once, whole or not at all
* qemu: one boot: what goes in, QEMU itself, what comes out
* container: the same image as a container
* debian: which Debian packages the commands need, and which of them are missing
"""
