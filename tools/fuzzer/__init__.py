"""Hostile input for every decoder of data from outside; the targets are in tests/fuzz.

* main: the command `tools/fuzz`: runs each target in its own process, and keeps the findings
"""
