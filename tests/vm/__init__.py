"""Tests of the installed node in a real Debian with systemd; run by `tools/vm test`, as root."""
