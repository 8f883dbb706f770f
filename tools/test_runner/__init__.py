"""How the tests are run.

* main: what `tools/test` does: its phases, and the tables of what they took
* spread: plugin of pytest: which process runs which test
* pytest_needs: plugin of pytest: leaves out, and counts, what needs a package that is missing
"""
