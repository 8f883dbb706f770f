"""Hostile input for every decoder of what comes from outside; the targets are in tests/fuzz.

* main: what `tools/fuzz` does: tries each target in a process of its own, keeps what it finds
"""
