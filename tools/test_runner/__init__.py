"""Runs the tests.

* main: the command `tools/test`: its phases, and the tables of their times
* spread: a plugin of pytest that distributes the tests over processes
* pytest_needs: a plugin of pytest that skips and counts the tests without their Debian packages
"""
